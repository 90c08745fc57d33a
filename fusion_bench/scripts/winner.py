"""Evaluates the winner at the end of a sweep on the validation split."""

from pathlib import Path

from hydra.experimental.callback import Callback
from omegaconf import DictConfig

from fusion_bench.problems import FusionBenchError
from fusion_bench.scripts.sweep import exit_with_error


class JudgeWinner(Callback):
    """Evaluates a sweep's best job on the test split, once; the report goes to ``winner/``."""

    def on_multirun_end(self, config: DictConfig, **kwargs: object) -> None:
        """Run ``SearchWinner``; the process fails where it does."""
        from fusion_bench.programs import SearchWinner

        sweep = Path(config.hydra.sweep.dir).absolute()
        try:
            SearchWinner(str(sweep), output_dir=sweep / "winner").run()
        except FusionBenchError as error:
            exit_with_error(error)
