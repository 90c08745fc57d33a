"""Fuse, then evaluate: the main program."""

import logging
from collections.abc import Sequence
from pathlib import Path

from fusion_bench.instantiate import SharedObjects
from fusion_bench.problems import Problem
from fusion_bench.programs.clock import Clock
from fusion_bench.programs.execute import execute
from fusion_bench.programs.preflight import preflight
from fusion_bench.programs.prepare import prepare
from fusion_bench.programs.spec import Baselines, FusionSpec, Section
from fusion_bench.report import Report
from fusion_bench.storage import is_first_process

log = logging.getLogger(__name__)


class FabricModelFusionProgram:
    """Merges a model pool with a method and evaluates the result and its inputs.

    Args:
        method: the fusion method, as config node or object; so are the next four. With ``None``
            nothing is merged, and the models alone are evaluated.
        modelpool: the models.
        taskpool: the tasks; without it nothing is evaluated.
        fabric: ``lightning.Fabric``'s arguments; by default one process on the best device.
        search: finds the method's options first, such as ``GridSearch``; the method must be a node.
        output_dir: the directory for the report and the config; ``None`` writes none.
        seed: seeds every random number generator.
        baselines: which other models are evaluated: the pretrained model on every task and each
            individual model on its ``own_task``, on ``all_tasks``, or ``none`` of them.
        report_save_path: an extra path for the report's JSON; ``{log_dir}`` in it is
            ``output_dir``.
        merged_model_save_path: directory for the merged model, with the same placeholder.
        overwrite: replace another run's output at these two paths, or in ``output_dir``.
        allow_test_split: let the method learn from data that the models are evaluated on.
        similarity: measure the similarity of the task vectors, which reads the weights once.
        fast_dev_run: evaluate only the first batch of each task.
        dry_run: print the plan and all problems, and stop before anything is loaded.
        recipe: the text of the mergekit recipe that ``method`` and ``modelpool`` were made of, for
            the record. In a config it is the name of its file, which takes the place of both.
        parts: objects that are shared between runs of this process.
        problems: known problems of the config, reported with the others.
    """

    #: What is wrong with the sections is said here, for all of them at once.
    tells_all_problems = True

    def __init__(
        self,
        method: Section,
        modelpool: Section,
        taskpool: Section = None,
        fabric: Section = None,
        search: Section = None,
        output_dir: str | Path | None = None,
        seed: int | None = None,
        baselines: Baselines = "own_task",
        report_save_path: str | None = None,
        merged_model_save_path: str | None = None,
        overwrite: bool = False,
        allow_test_split: bool = False,
        similarity: bool = True,
        fast_dev_run: bool = False,
        dry_run: bool = False,
        recipe: str | None = None,
        parts: SharedObjects | None = None,
        problems: Sequence[Problem] = (),
    ):
        self.spec = FusionSpec(
            method=method,
            modelpool=modelpool,
            taskpool=taskpool,
            fabric=fabric,
            search=search,
            output_dir=None if output_dir is None else Path(output_dir).absolute(),
            seed=seed,
            baselines=baselines,
            report_save_path=report_save_path,
            merged_model_save_path=merged_model_save_path,
            overwrite=overwrite,
            allow_test_split=allow_test_split,
            similarity=similarity,
            fast_dev_run=fast_dev_run,
            dry_run=dry_run,
            recipe=recipe,
        )
        # The pools of a dry run have a temporary directory for downloads.
        self.parts = SharedObjects() if parts is None or dry_run else parts
        self.problems = problems

    def run(self) -> Report | None:
        """Fuse, evaluate, save and print; returns the report, or ``None`` after a dry run.

        Raises:
            ConfigError: with all problems of the arguments and of what they name.
        """
        clock = Clock(is_first_process())
        with clock.measure("prepare"):
            prepared = prepare(self.spec, self.parts, self.problems)
        with clock.measure("plan"):
            plan = preflight(prepared)
        if self.spec.dry_run:
            log.info("Dry run: the config is valid; nothing was loaded.")
            return None
        return execute(prepared, plan)
