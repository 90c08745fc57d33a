"""Reports made from counts, and from random answers."""

from collections.abc import Mapping, Sequence

import numpy as np

from fusion_bench.report import (
    Answers,
    ModelResult,
    Report,
    Run,
    Seconds,
    Similarity,
    TaskAnswers,
    TaskInfo,
    TaskResult,
    compare_contenders,
    summarise,
)


def model(role: str, **correct: int) -> ModelResult:
    return ModelResult(
        role=role,
        weights_sha256="0" * 64,
        num_parameters=1,
        tasks={t: TaskResult.from_counts(n, 50.0, 100) for t, n in correct.items()},
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
        tasks={t: TaskInfo(num_classes=2, num_samples=100, fingerprint=t) for t in tasks},
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
) -> tuple[Report, Answers]:
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
    answers = Answers()
    models: dict[str, ModelResult] = {}
    labels = {t: random.integers(0, n, samples, dtype=np.int32) for t, n in tasks.items()}
    where = np.arange(samples, dtype=np.int32)
    for name, (role, share, evaluated) in plan.items():
        results = {}
        for task in evaluated:
            other = random.integers(0, tasks[task], samples, dtype=np.int32)
            predictions = np.where(random.random(samples) < share, labels[task], other)
            right = int((predictions == labels[task]).sum())
            answers.add(task, name, TaskAnswers(where, labels[task], {name: predictions}))
            results[task] = TaskResult.from_counts(right, 0.5 * samples, samples)
        models[name] = ModelResult(
            role=role, weights_sha256="ab" * 32, num_parameters=12_345, tasks=results
        )
    summarise(models, {task: task for task in tasks if individual})
    found = report(models)
    found.tasks = {
        task: TaskInfo(
            num_classes=number,
            num_samples=samples,
            fingerprint="f" * 16,
            class_names=[f"{task} {i}" for i in range(number)] if per_class else None,
        )
        for task, number in tasks.items()
    }
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
    found.comparisons = compare_contenders(found, answers)
    return found, answers
