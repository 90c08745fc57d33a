"""What follows from a method's module and page is written by a command."""

import json
import runpy
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import yaml

ROOT = Path(__file__).parents[1]
MODULE = '''
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

from fusion_bench.method.base import TensorwiseAlgorithm


@dataclass(eq=False)
class CoolMerging(TensorwiseAlgorithm):
    """The pretrained model, cooled."""

    needs_pretrained = True

    weights: Sequence[float]
    factor: float = 0.3
    how: Literal["all", "some"] = "all"
    keys: Sequence[str] = ()
    seed: int | None = None
'''
YAML = """\
# yaml-language-server: $schema=../schema/method.json
_target_: fusion_bench.method.CoolMerging
weights: ???
factor: 0.3
how: all # or some
keys: []
seed: ${oc.select:seed,null}
"""


def files(root: Path) -> dict[str, list[str]]:
    return {
        path.relative_to(root).as_posix(): path.read_text("utf-8").splitlines()
        for path in root.rglob("*")
        if path.is_file() and path.suffix not in (".png", ".pyc")
    }


def test_all_but_module_test_and_page_is_written(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name in ("benchmarks/results", "config", "docs", "fusion_bench", "tools"):
        shutil.copytree(ROOT / name, tmp_path / name)  # with what Python has compiled
    for name in ("mkdocs.yml", "pyproject.toml"):
        shutil.copy(ROOT / name, tmp_path)
    (tmp_path / "fusion_bench/method/cool.py").write_text(MODULE)
    (tmp_path / "docs/methods/cool.md").write_text("# Cool\n")
    before = files(tmp_path)
    tool = tmp_path / "tools" / "add_method.py"
    monkeypatch.setattr(sys, "argv", [str(tool), "cool"])
    runpy.run_path(str(tool), run_name="__main__")
    after = files(tmp_path)
    # The second time there is nothing to do; the catalogue, which takes long, is of the same files.
    monkeypatch.setattr(subprocess, "run", lambda command, **_: command)
    runpy.run_path(str(tool), run_name="__main__")
    assert files(tmp_path) == after
    assert after.pop("config/method/cool.yaml") == YAML.splitlines()
    catalog = json.loads("\n".join(after["config/catalog.json"]))
    (entry,) = (entry for entry in catalog["methods"] if entry["name"] == "cool")
    assert entry["summary"] == "the pretrained model, cooled"
    schemas = json.loads("\n".join(after["config/schema/config.json"]))
    assert "factor" in schemas["definitions"]["fusion_bench.method.CoolMerging"]["properties"]
    for name in [name for name in before if name.startswith("config/") and name.endswith(".json")]:
        del before[name], after[name]
    added = {}
    for name in before:
        rest = iter(after[name])
        lines = [next((line for line in rest if line == old), None) for old in before[name]]
        assert None not in lines, f"{name} has lost a line"
        if after[name] != before[name]:
            added[name] = [line for line in after[name] if "ool" in line and line not in lines]
    assert after.keys() == before.keys()
    assert added == {
        "benchmarks/results/choose.md": [
            "| [`cool`](methods/cool.md) | the pretrained model, cooled | pretrained | low |"
            " – | – |"
        ],
        "docs/methods/index.md": [
            "| [Cool](cool.md) | `cool` | yes | no | the pretrained model, cooled |"
        ],
        "docs/reference.md": ["::: fusion_bench.method.CoolMerging"],
        "fusion_bench/method/__init__.py": [
            "from fusion_bench.method.cool import CoolMerging",
            '    "CoolMerging",',
        ],
        "mkdocs.yml": ["          - Cool: methods/cool.md"],
    }
    lines = after["fusion_bench/method/__init__.py"]
    place = lines.index('    "CoolMerging",')
    assert lines[place - 1 : place + 2 : 2] == [
        '    "ConsensusTaskArithmetic",',
        '    "DareSimpleAverage",',
    ]
    nav = yaml.safe_load((tmp_path / "mkdocs.yml").read_text("utf-8"))["nav"]
    methods = next(part["Methods"] for part in nav if "Methods" in part)
    vectors = next(part["Task vectors"] for part in methods if "Task vectors" in part)
    assert vectors[-1] == {"Cool": "methods/cool.md"}
