"""Reports made from counts, and from random answers."""

from collections.abc import Mapping, Sequence

import numpy as np

from fusion_bench.report import (
    ModelResult,
    Report,
    Run,
    Scores,
    Seconds,
    Similarity,
    TaskInfo,
    TaskResult,
    Value,
    compare_contenders,
    metric_info,
    summarise,
)
from fusion_bench.results import ACCURACY, LOSS, SampleScores

#: What image classification measures.
ACCURACY_AND_LOSS = [metric_info(ACCURACY), metric_info(LOSS)]


def result(right: int, samples: int = 100, loss: float = 0.5) -> TaskResult:
    share = right / samples
    error = (share * (1 - share) / samples) ** 0.5
    return TaskResult(
        num_samples=samples,
        metrics={"accuracy": Value(value=share, stderr=error), "loss": Value(value=loss)},
    )


def model(role: str, **correct: int) -> ModelResult:
    return ModelResult(
        role=role,
        identity="0" * 64,
        num_parameters=1,
        tasks={task: result(right) for task, right in correct.items()},
    )


def task_info(
    task: str,
    owner: str | None = None,
    num_classes: int = 2,
    samples: int = 100,
    fingerprint: str | None = None,
    classes: list[str] | None = None,
) -> TaskInfo:
    return TaskInfo(
        kind="image_classification",
        main="accuracy",
        metrics=ACCURACY_AND_LOSS,
        num_samples=samples,
        identity={
            "dataset": fingerprint or task,
            "classes, prompts or text tower": None,
            "image preprocessing": None,
        },
        owner=owner,
        num_classes=num_classes,
        classes=classes,
    )


def report(models: dict[str, ModelResult]) -> Report:
    tasks = dict.fromkeys(["a", "b", *(task for own in models.values() for task in own.tasks)])
    return Report(
        run=Run(
            version="0",
            created_at="2026-01-01T00:00:00+00:00",
            command=["fusion_bench"],
            config={"method": {"_target_": "fusion_bench.method.SimpleAverageAlgorithm"}},
            config_sha256="0" * 64,
            seed=None,
            precision="32-true",
            device="cpu",
            world_size=1,
            packages={},
            seconds=Seconds(load=1, fuse=2, evaluate=3, total=6),
        ),
        tasks={t: task_info(t, t if t in models else None) for t in tasks},
        models=models,
    )


def synthetic(
    tasks: Mapping[str, int],
    *,
    samples: int = 200,
    merged: Sequence[str] = ("merged",),
    pretrained: bool = True,
    individual: bool = True,
    full: bool = False,
    per_class: bool = False,
    parts: int = 3,
) -> tuple[Report, Scores]:
    """Return a report with random answers: a model a task, and merged ones.

    Args:
        tasks: their names and numbers of classes; models bear the same names.
        samples: of each task.
        merged: the merged models; ``merged/<task>`` is evaluated on that task alone.
        pretrained: whether there is a pretrained model.
        individual: whether the individual models are evaluated.
        full: evaluate each model on every task.
        per_class: name the classes.
        parts: of the network; without any there is no similarity.
    """
    random = np.random.default_rng(0)
    plan: dict[str, tuple[str, float, list[str]]] = {}  # role, how often right, tasks
    if pretrained:
        plan["_pretrained_"] = ("pretrained", 0.5, list(tasks))
    if individual:
        plan |= {t: ("individual", 0.9, list(tasks) if full else [t]) for t in tasks}
    for name in merged:
        own = name.removeprefix("merged/")
        plan[name] = ("merged", 0.7, [own] if own in tasks and not full else list(tasks))
    scores = Scores()
    models: dict[str, ModelResult] = {}
    labels = {t: random.integers(0, n, samples, dtype=np.int32) for t, n in tasks.items()}
    where = np.arange(samples, dtype=np.int32)
    for name, (role, share, evaluated) in plan.items():
        results = {}
        for task in evaluated:
            other = random.integers(0, tasks[task], samples, dtype=np.int32)
            predictions = np.where(random.random(samples) < share, labels[task], other)
            losses = np.full(samples, 0.5)
            own = SampleScores.classified(where, labels[task], predictions, losses)
            scores.add(task, name, own)
            results[task] = TaskResult.of(own, [ACCURACY, LOSS])
        models[name] = ModelResult(
            role=role, identity="ab" * 32, num_parameters=12_345, tasks=results
        )
    infos = {
        task: task_info(
            task,
            task if individual else None,
            number,
            samples,
            "f" * 16,
            [f"{task} {i}" for i in range(number)] if per_class else None,
        )
        for task, number in tasks.items()
    }
    summarise(models, infos)
    found = report(models)
    found.tasks = infos
    scores.metrics = {task: [ACCURACY, LOSS] for task in tasks}
    if parts:
        vectors = random.normal(size=(parts + 1, len(tasks), 64)) + 0.2
        norms = np.linalg.norm(vectors, axis=2)
        cosines = (vectors / norms[:, :, None]) @ (vectors / norms[:, :, None]).transpose(0, 2, 1)
        found.similarity = Similarity(
            models=list(tasks),
            parts=["all", "before the blocks", *(f"block {i}" for i in range(parts - 1))],
            norms=norms.tolist(),
            cosines=cosines.tolist(),
        )
    sources = {t: f"owner/clip-vit-base-patch32_{t}" for t in tasks}
    found.run.config["modelpool"] = {"models": {"_pretrained_": "owner/clip", **sources}}
    found.comparisons = compare_contenders(found, scores)
    return found, scores
