import pytest

from fusion_bench.forms import rule_problem, says_of_tokens


@pytest.mark.parametrize(
    ("value", "said"),
    [
        ({"gradient": [0, 1]}, "{gradient: [0, 1]}"),
        ([1, {"gradient": [0.5, 1]}], "[1, {gradient: [0.5, 1]}]"),
        ({"a": {"gradient": ["mean", "sum"]}, "b": 1}, "{a: {gradient: [mean, sum]}, b: 1}"),
    ],
)
def test_a_gradient_outside_of_a_rule_is_told_as_one(value: object, said: str) -> None:
    problem = rule_problem("t", value)
    assert problem is not None and f"'{{here}}where=[{{t: {said}}}]'" in problem.remedy
    assert rule_problem("where", [{"t": value}]) is None


def test_other_values_are_no_rules() -> None:
    assert all(rule_problem("t", own) is None for own in (1, "gradient", [1, 2], {"a": 1}, None))


def test_what_is_said_of_tokens_is_known_from_nodes() -> None:
    assert says_of_tokens({"source": "x"}) and says_of_tokens({"sorce": "x"})
    assert not says_of_tokens({"_target_": "x", "sorce": 1}) and not says_of_tokens({})
