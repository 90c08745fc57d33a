"""Which model was trained for which task: by name, as the config says, or a hint."""

import logging
from typing import Any

import pytest

from fusion_bench.instantiate import instantiate
from fusion_bench.problems import FusionBenchError
from fusion_bench.programs.owners import ownership_hint
from fusion_bench.report import Report

HINT = (
    "No task has the name of 'alpha', and no model that of 'a'. If a model was trained for one of "
    "these tasks, name it: 'taskpool.tasks.a.owner=alpha'."
)


@pytest.fixture
def renamed(program_config: dict[str, Any]) -> dict[str, Any]:
    """Return a run whose first model has another name than its task."""
    models = program_config["modelpool"]["models"]
    program_config["modelpool"]["models"] = {{"a": "alpha"}.get(n, n): m for n, m in models.items()}
    return program_config


def run(config: dict[str, Any], owner: object = None, **changes: Any) -> Report:
    own = {} if owner is None else {"owner": owner}
    tasks = config["taskpool"].get("tasks") or {}
    taskpool = config["taskpool"] | {"tasks": {**tasks, "a": {**tasks.get("a", {}), **own}}}
    found: Report = instantiate({**config, "taskpool": taskpool, **changes}).run()
    return found


def test_the_config_names_the_owner(
    renamed: dict[str, Any], caplog: pytest.LogCaptureFixture
) -> None:
    report = run(renamed, owner="alpha")
    assert report.tasks["a"].owner == "alpha" and report.tasks["b"].owner == "b"
    assert list(report.models["alpha"].tasks) == ["a"]
    assert report.models["alpha"].tasks["a"].main.normalized == 1
    relations = {n: [r.relation for r in m.tasks.values()] for n, m in report.models.items()}
    assert relations == {
        "_pretrained_": ["other", "other"],
        "alpha": ["own"],
        "b": ["own"],
        "merged": ["own", "own"],
    }
    assert report.run.notes == [] and "No task has" not in caplog.text


def test_names_that_fit_nothing_get_a_hint(
    renamed: dict[str, Any], caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.INFO)
    report = run(renamed)
    assert report.tasks["a"].owner is None
    assert report.models["merged"].tasks["a"].relation == "held_out"
    assert report.models["alpha"].tasks == {} and report.models["alpha"].num_parameters > 0
    assert report.run.notes == [HINT] and HINT in caplog.messages
    assert "'alpha' is not evaluated: it has no task of its own." in caplog.messages


@pytest.mark.parametrize("dry_run", [False, True])
def test_an_owner_that_is_not_there_is_refused(renamed: dict[str, Any], dry_run: bool) -> None:
    with pytest.raises(FusionBenchError) as caught:
        run(renamed, owner="alfa", dry_run=dry_run)
    assert str(caught.value) == (
        "taskpool.tasks.a.owner: the model pool has no model 'alfa'. Did you mean 'alpha'?"
    )
    with pytest.raises(FusionBenchError, match="7 is not a model's name"):
        run(renamed, owner=7, dry_run=dry_run)


def test_no_hint_where_one_side_is_complete() -> None:
    assert ownership_hint({"a": "a"}, ["a", "more"]) is None
    assert ownership_hint({"a": "a", "new": None}, ["a"]) is None
    assert ownership_hint({}, ["a"]) is None
