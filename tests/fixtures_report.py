"""Small reports made from counts."""

from fusion_bench.report import ModelResult, Report, Run, Seconds, TaskInfo, TaskResult


def model(role: str, **correct: int) -> ModelResult:
    return ModelResult(
        role=role,
        weights_sha256="0" * 64,
        num_parameters=1,
        tasks={t: TaskResult.from_counts(n, 50.0, 100) for t, n in correct.items()},
    )


def report(models: dict[str, ModelResult]) -> Report:
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
        tasks={t: TaskInfo(num_classes=2, num_samples=100, fingerprint=t) for t in ("a", "b")},
        models=models,
    )
