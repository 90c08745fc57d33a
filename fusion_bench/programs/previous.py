"""Finds earlier results: the report of the same run, and cached similarities."""

import hashlib
import json
from collections.abc import Iterable, Mapping
from concurrent.futures import ThreadPoolExecutor, as_completed
from contextlib import ExitStack, suppress
from dataclasses import dataclass
from pathlib import Path

import torch
from pydantic import ValidationError

from fusion_bench import __version__
from fusion_bench.problems import FusionBenchError
from fusion_bench.programs.environment import config_sha256
from fusion_bench.programs.fusing import TuningData, describe_data
from fusion_bench.programs.pools import PlacedModelPool, TaskPool
from fusion_bench.progress import step
from fusion_bench.report import Report, Scores, Similarity
from fusion_bench.storage import cache_dir, file_sha256, write_text
from fusion_bench.trust import users_code
from fusion_bench.weights import Inputs, Weights, align, sha256
from fusion_bench.weights.similarity import similarity


def identities(modelpool: PlacedModelPool) -> dict[str, str]:
    """Return a hash of each model: its weights, by files or values, and what else decides."""
    names = [*(["_pretrained_"] if modelpool.has_pretrained else []), *modelpool.model_names]
    opened = {name: modelpool.weights(name) for name in names}  # a mistake shows before any work
    hashes = _hashed(file for weights in opened.values() for file in weights.files)
    return {
        name: _identity(own, modelpool.architecture(name), hashes) for name, own in opened.items()
    }


def _hashed(files: Iterable[Path]) -> dict[Path, str]:
    """Return the hashes of files; those that are not known yet are found several at once."""
    sizes = {file: file.stat().st_size for file in files}
    with (
        step("checksums of the models", sum(sizes.values()), "B") as work,
        ThreadPoolExecutor(torch.get_num_threads()) as pool,  # hashing lets other threads run
        ExitStack() as ended,
    ):
        ended.callback(pool.shutdown, wait=False, cancel_futures=True)  # where it ends early
        hashed = {pool.submit(file_sha256, file): file for file in sizes}
        for done in as_completed(hashed):
            work.advance(sizes[hashed[done]])
        return {file: done.result() for done, file in hashed.items()}


def _identity(weights: Weights, architecture: str | None, hashes: Mapping[Path, str]) -> str:
    beside = {file.with_name("adapter_config.json") for file in weights.files}
    own = [file_sha256(file) for file in beside if file.is_file()]
    own += [hashes[file] for file in weights.files]
    files = sorted(own) or [sha256(weights)]
    return hashlib.sha256(json.dumps([architecture, files]).encode()).hexdigest()


@dataclass(frozen=True)
class Previous:
    """An earlier report of a run with the same config."""

    report: Report
    scores: Scores

    @classmethod
    def find(cls, reports: Iterable[Path], config: Mapping[str, object]) -> "Previous | None":
        """Return it, if it is complete and of this version."""
        for path in reports:
            with suppress(FusionBenchError):
                report = Report.load(path)
                run = report.run
                same = (run.version, run.config_sha256) == (__version__, config_sha256(config))
                if same and users_code(config).items() <= run.packages.items():
                    scores = Scores.load(path, report) if report.tasks else Scores()
                    return cls(report, scores)
        return None

    def still_true(
        self,
        inputs: Mapping[str, str],
        taskpool: TaskPool | None,
        data: TuningData = None,
        searched: TuningData = None,
    ) -> tuple[Report, Scores] | None:
        """Return it, unless a model or a dataset has changed."""
        run = self.report.run
        same = run.inputs == dict(inputs)
        for used, now in ((run.tuning, data), (run.search, searched)):
            same = same and (used.tasks if used else {}) == describe_data(now or {})
        for task, known in self.report.tasks.items():
            assert taskpool is not None  # the config is the same
            same = same and dict(taskpool.describe(task).identity) == known.identity
        return (self.report, self.scores) if same else None


def known_similarity(modelpool: PlacedModelPool, inputs: Mapping[str, str]) -> Similarity | None:
    """Return the similarity of the pool's task vectors, cached if possible.

    ``None`` where there is no pretrained model, or where the models cannot be aligned.
    """
    if not modelpool.has_pretrained:
        return None
    key = hashlib.sha256(json.dumps([__version__, dict(inputs)]).encode()).hexdigest()
    path = cache_dir() / "similarity" / f"{key}.json"
    with suppress(OSError, ValidationError):
        return Similarity.model_validate_json(path.read_text(encoding="utf-8"))
    models = {name: modelpool.weights(name) for name in modelpool.model_names}
    base, policy = modelpool.weights("_pretrained_"), modelpool.policy
    try:
        aligned = align(models, base, policy, modelpool.vocabulary)
    except FusionBenchError:  # models of several architectures, which an ensemble takes
        return None
    parts = similarity(Inputs(aligned, policy, True, False, True))
    found = Similarity(
        models=list(models),
        parts=[part.name for part in parts],
        norms=[part.norms for part in parts],
        cosines=[part.cosines for part in parts],
    )
    with suppress(OSError):  # it is only to save time
        write_text(path, found.model_dump_json())
    return found
