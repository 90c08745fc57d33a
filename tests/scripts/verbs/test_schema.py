"""``fusion_bench schema`` writes what ships, and with ``--allow`` a user's own classes too."""

import json
from pathlib import Path

import pytest
from commandline import fusion_bench

from fusion_bench.configs import CONFIG_DIR


def test_without_more_it_writes_what_ships(tmp_path: Path) -> None:
    done = fusion_bench("schema", "my schema", cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    written = {file.name: file.read_text("utf-8") for file in (tmp_path / "my schema").iterdir()}
    ours = (CONFIG_DIR / "schema").iterdir()
    assert written == {file.name: file.read_text("utf-8") for file in ours}
    address = (tmp_path / "my schema" / "config.json").as_uri()
    assert done.stdout.splitlines()[-1] == f"# yaml-language-server: $schema={address}"


def test_classes_of_ones_own(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "mine_of_schema.py").write_text("class Own:\n    def __init__(self, share): ...")
    monkeypatch.setenv("PYTHONPATH", str(tmp_path))
    done = fusion_bench("schema", "--allow", "mine_of_schema", cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    known = json.loads((tmp_path / "schema" / "config.json").read_text("utf-8"))["definitions"]
    assert known["mine_of_schema.Own"]["needs"] == ["share"]


@pytest.mark.parametrize(
    ("package", "said"),
    [("not_there", "cannot import 'not_there'"), ("a b", "--allow: name packages")],
)
def test_a_package_that_is_not_there(package: str, said: str, tmp_path: Path) -> None:
    done = fusion_bench("schema", "--allow", package, cwd=tmp_path)
    assert done.returncode == 2 and said in done.stderr
    assert list(tmp_path.iterdir()) == []
