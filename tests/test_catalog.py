"""What ships of names, options and schemas is what the code says; and names that people type."""

import sys
from pathlib import Path

import pytest

from fusion_bench import catalog
from fusion_bench.catalog import find, in_words, near, of_kind, options
from fusion_bench.configs import CONFIG_DIR
from fusion_bench.problems import FusionBenchError

ROOT = Path(__file__).parents[1]


def test_what_ships_is_what_the_tool_writes(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.syspath_prepend(str(ROOT / "tools"))
    from write_catalog import written

    for path, text in written().items():
        assert path.read_text("utf-8") == text, f"run tools/write_catalog.py: {path.name}"


def test_every_config_of_a_method_is_listed_with_its_options() -> None:
    methods = {entry.name: entry for entry in catalog.of_kind("methods")}
    files = (CONFIG_DIR / "method").rglob("[!_]*.yaml")
    assert methods.keys() == {
        path.relative_to(CONFIG_DIR / "method").with_suffix("").as_posix() for path in files
    }
    for entry in methods.values():
        assert entry.summary and entry.cost and (ROOT / "docs" / entry.page).is_file()
        for option in options(entry.target):
            assert option.meaning and option.type != "any", (entry.name, option)


@pytest.mark.parametrize(
    ("typed", "name"),
    [
        ("ties_merging", "ties_merging"),
        ("ties", "ties_merging"),
        ("TIES", "ties_merging"),
        ("dare_ties", "dare/ties_merging"),
        ("dare-ties", "dare/ties_merging"),
        ("linear", "linear/weighted_average"),
        ("slerp", "slerp/slerp"),
        ("fisher", "fisher_merging/clip_fisher_merging"),
        ("tsv", "task_singular_vector/TaskSingularVectorMerging"),
        ("Task Arithmetic", "task_arithmetic"),
        ("wudi", "wudi/wudi"),
        ("iso_cts", "isotropic_merging/iso_cts"),
        ("regmean++", "regmean_plusplus/clip_regmean_plusplus"),
    ],
)
def test_a_name_that_people_type(typed: str, name: str) -> None:
    assert find(typed, ("methods",)).name == name


def test_aliases_lead_somewhere() -> None:
    names = {entry.name for entry in catalog.of_kind("methods")}
    assert set(catalog._ALIASES.values()) <= names


def test_what_may_be_several_is_told_in_three_lines() -> None:
    with pytest.raises(FusionBenchError) as raised:
        find("adamerging", ("methods",))
    head, *lines = str(raised.value).splitlines()
    assert "'adamerging'" in head and "fusion_bench ls methods" in head
    assert len(lines) == 3 and all(line.strip().startswith("adamerging/") for line in lines)


@pytest.mark.parametrize(
    ("typed", "name"),
    [
        ("tise_merging", "ties_merging"),
        ("simple", "simple_average"),
        ("sign", "ties_merging"),
        ("singular", "task_singular_vector/TaskSingularVectorMerging"),
        ("spherical mean", "karcher/karcher"),
        ("breadcrumb", "breadcrumbs/breadcrumbs"),
    ],
)
def test_the_nearest_by_letters_or_meaning(typed: str, name: str) -> None:
    assert name in [entry.name for entry in near(typed, ("methods",))]


def test_types_are_told_in_words() -> None:
    found = {option.name: option for option in options("fusion_bench.method.TiesMergingAlgorithm")}
    assert found["merge_func"].type == "mean, sum or max"
    assert found["merge_func"].choices == ("mean", "sum", "max")
    assert found["remove_keys"].type == "list of texts"
    assert (found["threshold"].type, found["threshold"].default) == (
        "number or mapping or list of numbers",
        20,
    )
    assert found["show_pbar"].choices == (True, False)
    lines = {option.name: option for option in options("fusion_bench.method.LiNeSAlgorithm")}
    assert lines["base_method"].required and lines["base_method"].type == "method node"
    assert lines["beta"].type == "number or null"
    assert in_words({}) == "any"


def test_reading_it_imports_nothing_slow() -> None:
    code = (
        "import sys\nfrom fusion_bench import catalog\n"
        "catalog.find('ties'), catalog.definitions()\n"
        "assert not {'torch', 'hydra', 'pydantic', 'rich'} & sys.modules.keys()"
    )
    import subprocess

    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr


def test_each_method_s_summary_stands_alone() -> None:
    """``fusion_bench ls methods`` shows it out of its table."""
    for entry in of_kind("methods"):
        assert len(entry.summary) <= 70, entry.name
        assert not entry.summary.startswith(("the same", "like ", "after ")), entry.name
