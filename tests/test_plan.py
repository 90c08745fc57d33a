from pathlib import Path

import pytest

from fusion_bench.plan import Plan, Step
from fusion_bench.problems import ConfigError
from fusion_bench.repository import Repository


def test_what_a_part_says_stands_where_the_part_does() -> None:
    plan, pool = Plan(), Plan()
    with pool.collect("models", "a"):
        raise ConfigError("There is no 'x': look.")
    plan.take(pool, "modelpool")
    plan.take(pool, "modelpool")
    with pytest.raises(ConfigError, match=r"^modelpool\.models\.a: There is no 'x': look\.$"):
        plan.problems.raise_all()


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
