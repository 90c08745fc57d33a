"""Hydra's grid of jobs, where a setting goes to those choices alone that know it.

Hydra takes sweepers from the package ``hydra_plugins`` only.
"""

from collections.abc import Sequence

from hydra._internal.core_plugins.basic_sweeper import BasicSweeper
from hydra.core.override_parser.types import Override
from omegaconf import DictConfig, OmegaConf

from fusion_bench.problems import FusionBenchError, did_you_mean
from fusion_bench.scripts.sweep import SweepCallback


class GridSweeper(BasicSweeper):
    """Runs every combination of the values, each once.

    ``method=simple_average,ties_merging method.threshold=10,20`` are three jobs: there is no
    threshold to an average. A key that none of the choices knows stays, and is refused.
    """

    def __init__(self, max_batch_size: int | None, params: dict[str, str] | None = None):
        super().__init__(max_batch_size, params)
        self._groups: dict[str, bool] = {}

    def split_arguments(  # type: ignore[override]
        self, overrides: list[Override], max_batch_size: int | None
    ) -> list[list[list[str]]]:
        """Return the jobs' overrides, in batches.

        Raises:
            FusionBenchError: a pattern that fits no choice.
        """
        for override in overrides:
            if override.is_choice_sweep() and not any(True for _ in override.sweep_iterator()):
                raise FusionBenchError(self._without_values(override))
        (jobs,) = super().split_arguments(overrides, None)
        keys = [override.get_key_element() for override in overrides]
        for swept in filter(self._chooses, overrides):
            choices = [f"{swept.get_key_element()}={c}" for c in swept.sweep_string_iterator()]
            group = swept.get_key_element().lstrip("+")
            for key in (key for key in keys if key.startswith(f"{group}.")):
                unknown = {choice for choice in choices if not self._knows(choice, key)}
                if len(unknown) < len(choices):
                    jobs = [_without(key, job) if unknown & set(job) else job for job in jobs]
        different = [list(job) for job in dict.fromkeys(map(tuple, jobs))]
        self._tell_number(len(different))
        return list(self.split_overrides_to_chunks(different, max_batch_size))

    def _tell_number(self, jobs: int) -> None:
        """Tell the callback of the sweep how many jobs there are."""
        assert self.hydra_context is not None
        for callback in self.hydra_context.callbacks.callbacks:
            if isinstance(callback, SweepCallback):
                callback.count(jobs)

    def validate_batch_is_legal(self, batch: Sequence[Sequence[str]]) -> None:
        """Compose one job of each form; those that differ in a value alone are as sound."""
        forms = {tuple(self._form(override) for override in job): job for job in batch}
        super().validate_batch_is_legal(list(forms.values()))

    def _without_values(self, override: Override) -> str:
        assert self.hydra_context is not None
        group = override.get_key_element().lstrip("+").partition("@")[0]
        loader = self.hydra_context.config_loader
        known = loader.get_group_options(group, results_filter=None)
        why = did_you_mean("", known) or f"There is no config group '{group}'."
        return f"'{override.input_line}': no choice fits. {why}"

    def _form(self, override: str) -> str:
        key = override.partition("=")[0]
        return override if self._is_group(key) else key

    def _chooses(self, override: Override) -> bool:
        return override.is_sweep_override() and self._is_group(override.get_key_element())

    def _is_group(self, key: str) -> bool:
        if key not in self._groups:
            assert self.hydra_context is not None
            loader, group = self.hydra_context.config_loader, key.lstrip("+").partition("@")[0]
            self._groups[key] = bool(loader.get_group_options(group, results_filter=None))
        return self._groups[key]

    def _knows(self, choice: str, key: str) -> bool:
        """Tell whether the config that a choice gives has a key."""
        assert self.hydra_context is not None and self.config is not None
        config = self.hydra_context.config_loader.load_sweep_config(self.config, [choice])
        parent, _, name = key.rpartition(".")
        node = OmegaConf.select(config, parent)
        return isinstance(node, DictConfig) and name in node.keys()  # noqa: SIM118


def _without(key: str, job: Sequence[str]) -> list[str]:
    return [override for override in job if override.partition("=")[0] != key]
