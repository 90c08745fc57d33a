"""Problems name true places, and become text once."""

import math
import pickle

import pytest
from hypothesis import given
from hypothesis import strategies as st

from fusion_bench.problems import (
    ConfigError,
    EnvironmentProblem,
    FusionBenchError,
    Place,
    Problem,
    Problems,
    ResultError,
    check_between,
    did_you_mean,
    error_of,
    key_of,
    text_of,
    within,
)


def test_each_caller_puts_its_own_part_in_front() -> None:
    problems = Problems()
    with problems.collect("method"), within("base_method"):
        check_between("threshold", 200, 0, 100)
    with problems.collect("search"), within("space", "t", 1):
        raise ConfigError("is no number.")
    with problems.collect("modelpool", "models", "a"):
        raise EnvironmentProblem("The disk is full.")
    with pytest.raises(ConfigError) as caught:
        problems.raise_all()
    assert str(caught.value).splitlines() == [
        "method.base_method.threshold: 200 is not a number from 0 to 100.",
        "search.space.t[1]: is no number.",
        "modelpool.models.a: The disk is full.",
    ]


def test_what_names_no_key_may_stay_without() -> None:
    with pytest.raises(ConfigError, match=r"^method\.t: no\.$"), within("method", keyed_only=True):
        raise ConfigError("no.", place=("t",))
    with pytest.raises(ConfigError, match=r"^damaged\.$"), within("method", keyed_only=True):
        raise ConfigError("damaged.")


def test_nothing_is_raised_where_nothing_is_wrong() -> None:
    problems = Problems()
    with problems.collect("method"):
        pass
    problems.raise_all()


def test_other_errors_are_not_collected() -> None:
    problems = Problems()
    with pytest.raises(ZeroDivisionError), problems.collect("method"):
        raise ZeroDivisionError
    assert not problems


@pytest.mark.parametrize(
    ("kinds", "raised", "code"),
    [
        ((ConfigError,), ConfigError, 2),
        ((FusionBenchError,), ConfigError, 2),
        ((EnvironmentProblem, EnvironmentProblem), EnvironmentProblem, 3),
        ((ResultError,), ResultError, 1),
        ((EnvironmentProblem, ConfigError), ConfigError, 2),
        ((EnvironmentProblem, ResultError), ConfigError, 2),
    ],
)
def test_the_exit_code_tells_whose_fault_it_is(
    kinds: tuple[type[FusionBenchError], ...], raised: type[FusionBenchError], code: int
) -> None:
    problems = Problems()
    for number, kind in enumerate(kinds):
        with problems.collect():
            raise kind(f"{number}.")
    with pytest.raises(raised) as caught:
        problems.raise_all()
    assert type(caught.value) is raised and caught.value.exit_code == code


def test_a_problem_is_told_once() -> None:
    problems = Problems()
    for _ in range(2):
        with problems.collect("search"):
            raise ConfigError("is empty.", place=("space",))
    assert text_of(problems) == "search.space: is empty."


def test_what_has_one_cause_is_one_line() -> None:
    lost = [
        Problem(("models", name), f"Cannot read '{name}':", "the Hub is down.", "world")
        for name in ("a", "b", "c")
    ]
    assert text_of(lost) == (
        "models.a: Cannot read 'a': the Hub is down. The same applies to: models.b, models.c."
    )
    empty = [Problem((key,), "is empty.") for key in ("bases", "counts")]
    assert text_of(empty) == "bases: is empty.\ncounts: is empty."


def test_a_remedy_names_keys_beside_its_own() -> None:
    problem = Problem(("weights",), "They add up to zero.", "Give {here}normalize=false.")
    assert text_of([problem]) == "weights: They add up to zero. Give normalize=false."
    nested = problem.inside("method", "base_method")
    assert text_of([nested]).endswith("Give method.base_method.normalize=false.")


def test_details_stand_below() -> None:
    problem = Problem((), "They differ.", details=("a: 1", "b: 2"))
    assert text_of([problem]) == "They differ.\n  a: 1\n  b: 2"


def test_an_error_is_the_same_in_another_process() -> None:
    error = EnvironmentProblem("is full.", "Free some.", place=("output_dir",), details=("x",))
    there = pickle.loads(pickle.dumps(error))
    assert type(there) is EnvironmentProblem and there.problems == error.problems


PLACES = st.lists(st.text("abc_", min_size=1) | st.integers(0, 9), max_size=4).map(tuple)


@given(PLACES, PLACES)
def test_a_place_seen_from_further_out_ends_as_before(outer: Place, inner: Place) -> None:
    problem = Problem(inner, "no.").inside(*outer)
    assert problem.place == outer + inner
    assert problem.key.endswith(key_of(inner))
    error = error_of([Problem(inner, "no.")])
    with pytest.raises(FusionBenchError), within(*outer):
        raise error
    assert error.problems == (problem,)


def test_the_nearest_name_is_suggested() -> None:
    assert did_you_mean("precison", ["precision", "devices"]) == "Did you mean 'precision'?"


def test_all_are_listed_where_none_is_near() -> None:
    assert did_you_mean("x", ["b", "a"]) == "Known: a, b."


def test_nothing_is_said_where_there_is_nothing() -> None:
    assert did_you_mean("x", []) == ""


def test_a_number_without_an_upper_limit() -> None:
    for value, said in ((0, "0 is less than 1."), ("x", "'x' is not a number.")):
        with pytest.raises(ConfigError, match=f"^batch_size: {said}$"):
            check_between("batch_size", value, 1, math.inf)  # type: ignore[arg-type]
