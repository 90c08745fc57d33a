from pathlib import Path

import pytest

from fusion_bench.errors import ConfigError, FusionBenchError, WorldError
from fusion_bench.plan import Plan, Step
from fusion_bench.repository import Repository


def failing(plan: Plan, error: FusionBenchError, key: str = "") -> None:
    with plan.noting(key):
        raise error


def test_every_problem_is_raised_at_once_under_its_key() -> None:
    plan = Plan()
    plan.raise_problems()  # there are none
    failing(plan, FusionBenchError("There is no 'x': look."), "modelpool.models.a")
    failing(plan, FusionBenchError("method.t: 2 is not between 0 and 1."), "method")
    failing(plan, FusionBenchError("search.space.s: the list is empty."), "method")
    failing(plan, FusionBenchError("search.space.s: the list is empty."), "search")  # told before
    with pytest.raises(ConfigError) as caught:
        plan.raise_problems()
    assert str(caught.value).splitlines() == [
        "modelpool.models.a: There is no 'x': look.",
        "method.t: 2 is not between 0 and 1.",
        "search.space.s: the list is empty.",
    ]


def test_what_may_pass_is_told_from_what_must_be_mended() -> None:
    plan = Plan()
    failing(plan, WorldError("The Hub is down."), "modelpool.models.a")
    with pytest.raises(WorldError, match=r"^modelpool\.models\.a: The Hub is down\.$"):
        plan.raise_problems()
    failing(plan, ConfigError("seed: 'x' is not a whole number."))
    with pytest.raises(ConfigError, match="Hub is down"):
        plan.raise_problems()


def test_downloads_are_summed_by_repository_and_counted_once(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(Repository, "has", lambda self, *files: files == ("here",))
    repository = Repository("o/a", frozenset({"x", "y", "here"}), sizes={"x": 3, "y": 4, "here": 9})
    unknown = Repository("o/b", frozenset({"x"}))
    plan, other = Plan(), Plan()
    plan.download(repository, "x", "here")
    other.download(repository, "x", "y")
    other.download(unknown, "x")
    other.add(Step("download", "o/data", 5, Path("/cache"), "HF_HOME"))
    plan.take(other)
    plan.take(other)
    assert plan.downloads() == {"o/a": 7, "o/b": None, "o/data": 5}
    assert len(plan.steps) == 1
