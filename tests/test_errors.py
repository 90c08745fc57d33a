from fusion_bench.errors import did_you_mean


def test_the_nearest_name_is_suggested() -> None:
    assert did_you_mean("precison", ["precision", "devices"]) == "Did you mean 'precision'?"


def test_all_are_listed_where_none_is_near() -> None:
    assert did_you_mean("x", ["b", "a"]) == "Known: a, b."


def test_nothing_is_said_where_there_is_nothing() -> None:
    assert did_you_mean("x", []) == ""
