"""A method of one's own, from three written files to a report, outside of any checkout."""

import re
import sys
from pathlib import Path
from typing import Any

import pytest
import yaml
from commandline import fusion_bench, python

from fusion_bench.problems import FusionBenchError
from fusion_bench.report import Report
from fusion_bench.scripts import verbs

PLUGIN = ("--plugins", "soft_ties.py")


@pytest.fixture
def place(tmp_path: Path, program_config: dict[str, Any], monkeypatch: pytest.MonkeyPatch) -> Path:
    """Write a new method, and `small.yaml` with small models."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("FUSION_BENCH_CACHE", str(tmp_path / "cache"))
    del program_config["method"]
    defaults = [{"method": "simple_average"}, "_self_"]
    config = {"defaults": defaults, **program_config, "baselines": "none"}
    Path("small.yaml").write_text(yaml.safe_dump(config))
    verbs.run("new", ["method", "soft_ties"])
    return tmp_path


def reports(place: Path) -> list[Report]:
    return [Report.load(path) for path in sorted(place.glob("**/report.json"))]


def test_its_test_passes_at_once(place: Path, capsys: pytest.CaptureFixture[str]) -> None:
    code = "import pytest, sys; sys.exit(pytest.main(sys.argv[1:]))"
    done = python(code, "-q", "-p", "no:cacheprovider", "test_soft_ties.py", cwd=place)
    assert done.returncode == 0 and "2 passed" in done.stdout, done.stdout
    written = {file.relative_to(place).as_posix() for file in place.rglob("*soft_ties*")}
    assert {name for name in written if "__pycache__" not in name} == {
        "soft_ties.py",
        "method/soft_ties.yaml",
        "test_soft_ties.py",
    }


def test_what_it_prints_runs(place: Path, capsys: pytest.CaptureFixture[str]) -> None:
    verbs.run("new", ["method", "harder_ties", "--dir", "more"])
    printed = capsys.readouterr().out
    (words,) = re.findall(r"fusion_bench (.*)", printed)
    assert words == "--plugins more/harder_ties.py method=harder_ties"
    done = fusion_bench("small.yaml", *words.split(), "method.scaling_factor=0.5", cwd=place)
    assert done.returncode == 0, done.stderr
    (report,) = reports(place)
    assert report.run.config["method"] == {
        "_target_": "harder_ties.HarderTies",
        "scaling_factor": 0.5,
    }
    assert report.run.packages["harder_ties"].startswith("sha256:")


def test_a_run_is_repeated_with_the_same_flag(place: Path) -> None:
    done = fusion_bench("small.yaml", *PLUGIN, "method=soft_ties", cwd=place)
    assert done.returncode == 0, done.stderr
    (config,) = place.glob("outputs/*/*/config.yaml")
    again = fusion_bench(str(config), "hydra.run.dir=again", cwd=place)
    assert again.returncode == 2
    assert "--plugins path/to/soft_ties.py" in again.stderr
    again = fusion_bench(str(config), *PLUGIN, "hydra.run.dir=again", cwd=place)
    assert again.returncode == 0, again.stderr
    first, second = (report.models["merged"].tasks for report in reports(place))
    assert first == second


def test_changed_code_is_run_and_not_remembered(place: Path) -> None:
    words = ("small.yaml", *PLUGIN, "method=soft_ties", "hydra.run.dir=here")
    assert fusion_bench(*words, cwd=place).returncode == 0
    before = reports(place)[0].run.packages["soft_ties"]
    same = fusion_bench(*words, cwd=place)
    assert same.returncode == 0 and "Fused" not in same.stdout, same.stdout
    module = place / "soft_ties.py"
    module.write_text(module.read_text().replace("return base + ", "return base - "))
    changed = fusion_bench(*words, cwd=place)
    assert changed.returncode == 0 and "Fused" in changed.stdout, changed.stdout
    assert reports(place)[0].run.packages["soft_ties"] != before


# The launchers that start other processes are tried with it in scripts/test_sweep.py.
def test_a_sweep_has_it_too(place: Path) -> None:
    done = fusion_bench("small.yaml", *PLUGIN, "-m", "method=simple_average,soft_ties", cwd=place)
    assert done.returncode == 0, done.stderr
    own = [report.run.packages.get("soft_ties") for report in reports(place)]
    assert len(own) == 2 and own.count(None) == 1


def test_an_installed_package_brings_its_configs(
    place: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    package, made = place / "site" / "soft_package", place / "site" / "soft_package-1.dist-info"
    (package / "configs" / "method").mkdir(parents=True)
    (package / "__init__.py").write_text((place / "soft_ties.py").read_text())
    (package / "configs" / "__init__.py").touch()
    target = "_target_: soft_package.SoftTies\nscaling_factor: 0.5\n"
    (package / "configs" / "method" / "softest.yaml").write_text(target)
    made.mkdir()
    (made / "METADATA").write_text("Metadata-Version: 2.1\nName: soft-package\nVersion: 1\n")
    (made / "entry_points.txt").write_text(
        "[fusion_bench.allow]\nsoft = soft_package\n"
        "[fusion_bench.configs]\nsoft = soft_package.configs\n"
    )
    monkeypatch.setenv("PYTHONPATH", f"{place / 'site'}:{':'.join(sys.path)}")
    done = fusion_bench("small.yaml", "method=softest", cwd=place)
    assert done.returncode == 0, done.stderr
    (report,) = reports(place)
    assert report.run.config["method"]["scaling_factor"] == 0.5


@pytest.mark.parametrize(
    ("name", "better"),
    [
        ("SoftTies", "soft_ties"),
        ("soft-ties", "soft_ties"),
        ("2soft", "soft"),
        ("class", "class_merging"),
        ("../x", "x"),
        ("simple_average", "my_simple_average"),
        ("numpy", "my_numpy"),
    ],
)
def test_names_that_do_not_serve(
    name: str, better: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    with pytest.raises(FusionBenchError, match=f"Try '{better}'"):
        verbs.run("new", ["method", name])
    assert not list(tmp_path.iterdir())
    verbs.run("new", ["method", better])


def test_nothing_is_overwritten(place: Path) -> None:
    (place / "soft_ties.py").unlink()
    before = {file: file.read_text() for file in place.rglob("*soft_ties*")}
    with pytest.raises(FusionBenchError, match=r"method/soft_ties.yaml' is there already"):
        verbs.run("new", ["method", "soft_ties"])
    assert {file: file.read_text() for file in place.rglob("*soft_ties*")} == before
