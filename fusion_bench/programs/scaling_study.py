"""Merges random subsets of a growing number of experts, for models of several sizes.

Yadav et al., What Matters for Model Merging at Scale?, https://arxiv.org/abs/2410.03617
"""

import hashlib
import json
import logging
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import suppress
from math import comb
from pathlib import Path
from typing import Any

import numpy as np
from lightning.fabric import Fabric
from pydantic import ValidationError

from fusion_bench import __version__
from fusion_bench.configs import composed
from fusion_bench.instantiate import instantiate
from fusion_bench.method.plain import as_method
from fusion_bench.problems import FusionBenchError, check_choice, did_you_mean, within
from fusion_bench.programs.environment import describe_run, launch, make_fabric
from fusion_bench.programs.evaluating import Evaluator
from fusion_bench.programs.fusing import (
    MERGED,
    describe_tuning,
    fuse,
    materialize,
    seeded,
    tuning_data,
)
from fusion_bench.programs.pools import PlacedModelPool, TaskPool, as_taskpool, placed
from fusion_bench.programs.previous import identities
from fusion_bench.progress import bar, quiet_libraries
from fusion_bench.report import Seconds, Tuning
from fusion_bench.report.scaling import Base, Merge, Normalizer, Study
from fusion_bench.report.table import wide_console
from fusion_bench.storage import cache_dir, claimed, write_text
from fusion_bench.tasks import canonical_name
from fusion_bench.weights import is_special

log = logging.getLogger(__name__)


class ScalingStudy:
    """Measures merging for different numbers of experts and sizes of models.

    Each merge is evaluated on all tasks of its base: held-in are those of the merged experts,
    held-out the others. Finished merges are cached, so an interrupted study resumes.

    Args:
        bases: a name to the config nodes ``modelpool`` and ``taskpool`` of a pretrained model and
            its experts. Each expert has the name of its task.
        methods: names of method configs, or config nodes.
        counts: how many experts are merged.
        subsets: number of random subsets for each count; fewer if there are not enough.
        held_in: the divisor of the accuracy on held-in tasks: that of the task's ``expert``, of the
            pretrained ``base``, or ``none``.
        held_out: the same for held-out tasks.
        categories: maps a name to tasks that count as one.
        fabric: as in ``FabricModelFusionProgram``; so are the next two.
        seed: also the seed of the subsets.
        allow_test_split: let the methods learn from data that the models are evaluated on.
        output_dir: the directory for the study; ``None`` writes none.
        dry_run: check the config and stop before anything is loaded.

    Raises:
        FusionBenchError: no base, method or count, or more experts than there are.
    """

    def __init__(
        self,
        bases: Mapping[str, Any],
        methods: Sequence[Any],
        counts: Sequence[int],
        subsets: int = 3,
        held_in: Normalizer = "expert",
        held_out: Normalizer = "base",
        categories: Mapping[str, Sequence[str]] | None = None,
        fabric: Any = None,
        seed: int = 0,
        allow_test_split: bool = False,
        output_dir: str | Path | None = None,
        dry_run: bool = False,
    ):
        self.config: dict[str, Any] = {
            "_target_": "fusion_bench.programs.ScalingStudy",
            "_recursive_": False,
            "bases": bases,
            "methods": methods,
            "counts": counts,
            "subsets": subsets,
            "held_in": held_in,
            "held_out": held_out,
            "categories": categories,
            "fabric": fabric,
            "seed": seed,
            "allow_test_split": allow_test_split,
        }
        check_choice("held_in", held_in, Normalizer)
        check_choice("held_out", held_out, Normalizer)
        for key, values in {"bases": bases, "methods": methods, "counts": counts}.items():
            if not values:
                raise FusionBenchError("is empty.", "Name at least one.", place=(key,))
        if subsets < 1:
            raise FusionBenchError(f"{subsets} is not 1 or more.", place=("subsets",))
        self.bases = {name: _Source(name, node) for name, node in bases.items()}
        for name, base in self.bases.items():
            self._check_base(name, base, counts, categories or {})
        self.methods = _named([_method(method, seed) for method in methods])
        self.counts = sorted(set(counts))
        self.subsets = subsets
        self.held_in = held_in
        self.held_out = held_out
        self.categories = {name: list(tasks) for name, tasks in (categories or {}).items()}
        self.fabric_config = fabric
        self.seed = seed
        self.allow_test_split = allow_test_split
        self.output_dir = None if output_dir is None else Path(output_dir).absolute()
        self.dry_run = dry_run

    @staticmethod
    def _check_base(
        name: str,
        base: "_Source",
        counts: Sequence[int],
        categories: Mapping[str, Sequence[str]],
    ) -> None:
        tasks = {canonical_name(task): task for task in base.taskpool.task_names}
        for model in base.experts:
            if canonical_name(model) not in tasks:
                raise FusionBenchError(
                    "the task pool has no task with this name.",
                    did_you_mean(model, tasks.values()),
                    place=("bases", name, "modelpool", "models", model),
                )
        for count in counts:
            if not 1 <= count <= len(base.experts):
                raise FusionBenchError(
                    f"{count} is not a number from 1 to {len(base.experts)}, the experts "
                    f"of '{name}'.",
                    place=("counts",),
                )
        for category, members in categories.items():
            for task in members:
                if task not in base.taskpool.task_names:
                    raise FusionBenchError(
                        f"'{name}' has no task '{task}'. "
                        f"{did_you_mean(task, base.taskpool.task_names)}",
                        place=(
                            "categories",
                            category,
                        ),
                    )

    def run(self) -> Study | None:
        """Merge, evaluate, save and print; returns the study, or ``None`` after a dry run."""
        if self.dry_run:
            log.info("Dry run: the config is valid; nothing was loaded.")
            return None
        quiet_libraries()
        fabric = make_fabric(self.fabric_config)
        with claimed(self.output_dir, ("hydra", "run", "dir"), inside=True):
            study: Study = launch(fabric, self._merge_and_evaluate)
            if fabric.global_rank == 0 and self.output_dir is not None:
                study.save(self.output_dir)
                log.info("Study: %s", self.output_dir / "study.html")
        if fabric.global_rank == 0:
            study.print(wide_console())
        return study

    def _merge_and_evaluate(self, fabric: Fabric) -> Study:
        """Do the work; called in every process, with the same result in each."""
        quiet_libraries()
        start = time.perf_counter()
        evaluated = {name: self._evaluated(base, fabric) for name, base in self.bases.items()}
        jobs = list(self._jobs())
        log.info("Merges: %d", len(jobs))
        merges = []
        for base, method, count, subset, models in bar(jobs, "scaling study", unit="merge"):
            merges.append(self._merge(base, method, count, subset, models, fabric))
        total = round(time.perf_counter() - start, 3)
        seconds = Seconds(load=0, fuse=0, evaluate=0, total=total)
        study = Study(
            run=describe_run(fabric, self.config, self.seed, seconds, {}),
            held_in=self.held_in,
            held_out=self.held_out,
            categories=self.categories,
            bases=evaluated,
            merges=merges,
        )
        study.summarise()
        return study

    def _evaluated(self, base: "_Source", fabric: Fabric) -> Base:
        """Evaluate a base and its experts, once for all merges."""
        evaluator = Evaluator(base.pool(base.experts), base.taskpool, fabric, "own_task")
        evaluator.evaluate_baselines()
        pretrained = evaluator.models["_pretrained_"]
        experts = [evaluator.models[model].tasks for model in base.experts]
        return Base(
            num_parameters=pretrained.num_parameters,
            pretrained=pretrained.tasks,
            experts={task: result for tasks in experts for task, result in tasks.items()},
        )

    def _jobs(self) -> Iterator[tuple[str, str, int, int, list[str]]]:
        """Yield base, method, count, number of the subset and experts of each merge."""
        for base, source in self.bases.items():
            for count in self.counts:
                chosen = choices(len(source.experts), count, self.subsets, self.seed)
                for subset, indices in enumerate(chosen):
                    for method in self.methods:
                        yield base, method, count, subset, [source.experts[i] for i in indices]

    def _merge(
        self, base: str, method: str, count: int, subset: int, models: list[str], fabric: Fabric
    ) -> Merge:
        source, node = self.bases[base], self.methods[method]
        made = as_method(instantiate(node, "method"))
        pool = source.pool(models)
        data = tuning_data(made, pool, source.taskpool, fabric, self.allow_test_split)
        learned = describe_tuning(made, source.taskpool, data)
        path = _place(pool, source.taskpool, node, learned, fabric, self.seed)
        merge = _known(path, fabric)
        if merge is None:
            fabric.seed_everything(self.seed, verbose=False)
            fused = materialize(fuse(made, pool, fabric, data))
            if list(fused) != [MERGED]:
                raise FusionBenchError(
                    f"{method} returns several models, {', '.join(fused)}, and none is for all "
                    "tasks.",
                    "Remove the method.",
                    place=("methods",),
                )
            evaluator = Evaluator(pool, source.taskpool, fabric, "none")
            evaluator.evaluate_merged(fused)
            merge = Merge(
                base=base,
                method=method,
                count=count,
                subset=subset,
                models=models,
                tasks=evaluator.models[MERGED].tasks,
            )
            if path is not None and fabric.global_rank == 0:
                with suppress(OSError):  # it is only to save time
                    write_text(path, merge.model_dump_json())
        return merge.model_copy(update={"base": base, "method": method, "subset": subset})


class _Source:
    """A base of the config: its model pool and its tasks."""

    def __init__(self, name: str, node: Any):
        place = ("bases", name)
        for part in ("modelpool", "taskpool"):
            if not isinstance(node, Mapping) or not isinstance(node.get(part), Mapping):
                raise FusionBenchError("missing; give it as a config node.", place=(*place, part))
        self._node = {"_recursive_": False, **node["modelpool"]}
        with within("bases", name, "modelpool"):
            whole = placed(instantiate(self._node, "modelpool"))
        self.experts = whole.model_names
        if not whole.has_pretrained:
            raise FusionBenchError(
                "add '_pretrained_', the base.", place=(*place, "modelpool", "models")
            )
        with within("bases", name, "taskpool"):
            made = instantiate({"_recursive_": False, **node["taskpool"]}, "taskpool")
            self.taskpool = as_taskpool(made)

    def pool(self, experts: Sequence[str]) -> PlacedModelPool:
        """Return a model pool of some experts, with their data."""
        own = {canonical_name(expert) for expert in experts}
        node = dict(self._node)
        node["models"] = {k: v for k, v in node["models"].items() if is_special(k) or k in experts}
        for key in ("train_datasets", "val_datasets", "test_datasets"):
            if node.get(key):
                node[key] = {k: v for k, v in node[key].items() if canonical_name(k) in own}
        return placed(instantiate(node, "modelpool"))


def choices(total: int, count: int, subsets: int, seed: int) -> list[tuple[int, ...]]:
    """Draw different sets of ``count`` numbers below ``total``, or all of them."""
    random = np.random.default_rng([seed, count])
    wanted = min(subsets, comb(total, count))
    found: dict[tuple[int, ...], None] = {}
    while len(found) < wanted:
        drawn = random.choice(total, count, replace=False)
        found[tuple(sorted(int(number) for number in drawn))] = None
    return list(found)


def _method(method: Any, seed: int) -> tuple[str, Any]:
    """Return a method's name and node."""
    if isinstance(method, str):
        return method, composed(f"method={method}", f"seed={seed}")["method"]
    if not isinstance(method, Mapping) or "_target_" not in method:
        raise FusionBenchError(
            f"'{method}' is neither a config's name nor a config node.", place=("methods",)
        )
    return str(method["_target_"]).rpartition(".")[2], seeded(method, seed)


def _named(methods: Sequence[tuple[str, Any]]) -> dict[str, Any]:
    """Return the methods by name; equal names get numbers."""
    found: dict[str, Any] = {}
    for index, (name, node) in enumerate(methods):
        with within("methods", index):
            as_method(instantiate(node, "method"))
        same = sum(known.partition(" ")[0] == name for known in found)
        found[f"{name} {same + 1}" if same else name] = node
    return found


def _place(
    pool: PlacedModelPool,
    taskpool: TaskPool,
    node: Any,
    learned: Tuning | None,
    fabric: Fabric,
    seed: int,
) -> Path | None:
    """Return the cache path of a merge's result, if any; its name is a hash of the inputs."""
    tasks = {task: taskpool.identity(task, fabric) for task in taskpool.task_names}
    if None in tasks.values():
        return None
    facts = {
        "version": __version__,
        "models": identities(pool),
        "policy": str(pool.policy),
        "architecture": pool.architecture(),
        "method": node,
        "learned": None if learned is None else learned.model_dump(),
        "tasks": tasks,
        "seed": seed,
    }
    text = json.dumps(facts, sort_keys=True, default=str)
    return cache_dir() / "merges" / f"{hashlib.sha256(text.encode()).hexdigest()}.json"


def _known(path: Path | None, fabric: Fabric) -> Merge | None:
    """Return the first process's cached result to all processes."""
    found = None
    if path is not None and fabric.global_rank == 0:
        with suppress(OSError, ValidationError):
            found = Merge.model_validate_json(path.read_text(encoding="utf-8"))
    return fabric.broadcast(found) if fabric.world_size > 1 else found
