"""ls, show and cp."""

import re
from pathlib import Path

import pytest
import yaml
from commandline import compose

from fusion_bench.catalog import GROUPS, KINDS, entries, of_kind, text_of
from fusion_bench.scripts import verbs
from fusion_bench.scripts.verbs.cp import copied

#: Whatever can be copied; a model alone cannot.
COPIED = [
    entry
    for kind in ("methods", "models", "tasks", "configs")
    for entry in of_kind(kind)
    if entry.target or kind != "models"
]


def printed(capsys: pytest.CaptureFixture[str], verb: str, *words: str) -> str:
    assert not verbs.run(verb, words)
    return capsys.readouterr().out


def test_without_a_kind_it_counts(capsys: pytest.CaptureFixture[str]) -> None:
    lines = printed(capsys, "ls").splitlines()
    counts = {line.split()[2]: int(line.split()[3]) for line in lines}
    assert counts == {kind: sum(1 for _ in of_kind(kind)) for kind in KINDS}


@pytest.mark.parametrize("kind", KINDS)
def test_each_entry_is_a_line(kind: str, capsys: pytest.CaptureFixture[str]) -> None:
    lines = printed(capsys, "ls", kind).splitlines()
    assert [line.split()[0] for line in lines] == [e.name for e in entries() if e.kind == kind]


def test_a_word_is_searched_in_name_summary_and_paper(capsys: pytest.CaptureFixture[str]) -> None:
    found = printed(capsys, "ls", "methods", "Yadav")
    (line,) = found.splitlines()
    assert line.startswith("ties_merging ") and "https://arxiv.org/abs/2306.01708" in line
    assert verbs.run("ls", ["methods", "no such thing"]) == 1
    assert "No methods with 'no such thing'" in capsys.readouterr().err


def test_what_is_shown_of_a_method(capsys: pytest.CaptureFixture[str]) -> None:
    text = printed(capsys, "show", "TIES")
    for part in (
        "use    fusion_bench method=ties_merging\n",
        "page   docs/methods/ties_merging.md\n",
        "\n  threshold: number or mapping or list of numbers; default 20\n",
        "\n  merge_func: mean, sum or max; default mean\n",
        "percentage above 1",
        "\n  _target_: fusion_bench.method.TiesMergingAlgorithm\n",
    ):
        assert part in text
    assert "base_method: method node; required" in printed(capsys, "show", "lines/lines")


def test_everything_can_be_shown(capsys: pytest.CaptureFixture[str]) -> None:
    for entry in entries():
        assert printed(capsys, "show", entry.name)


def test_a_copy_says_what_the_original_does(tmp_path: Path) -> None:
    for entry in COPIED:
        text = copied(entry, tmp_path)
        assert text.startswith("# yaml-language-server: $schema=")
        if entry.kind == "configs":
            assert text.endswith(text_of(entry))
            continue
        copy, original = yaml.safe_load(text), yaml.safe_load(text_of(entry)) or {}
        group = GROUPS[entry.kind]
        assert copy.pop("defaults")[1:] == [{f"override /{group}": entry.name}, "_self_"]
        values = {key: own for key, own in original.items() if key not in ("defaults", "_target_")}
        assert copy == ({group: values} if values and entry.kind == "methods" else {}), entry.name


# Of each kind the first two, and the methods that refer to something outside of their own file.
# Each copy is composed as a user runs it; of the originals many at once.
def test_a_copy_runs_as_the_original_does(tmp_path: Path) -> None:
    chosen = [
        entry
        for kind in ("methods", "models", "tasks", "configs")
        for number, entry in enumerate(e for e in COPIED if e.kind == kind)
        if number < 2 or (kind == "methods" and re.search(r"defaults:|\$\{", text_of(entry)))
    ]
    commands: list[list[str]] = []
    #: Each command's place among these, and under which key of what it composes.
    together: dict[tuple[str, int], list[str]] = {}
    where = []
    for number, entry in enumerate(chosen):
        file = tmp_path / f"{number}.yaml"
        verbs.run("cp", [entry.name, str(file), "--kind", entry.kind])
        commands.append([str(file)])
        folder, _, name = entry.name.rpartition("/")
        if entry.kind != "configs":
            group = GROUPS[entry.kind]
            base = yaml.safe_load(file.read_text())["defaults"][0]
            at = (base, number // 10)
            words = together.setdefault(at, ["--config-name", base])
            words.append(f"+{group}@n{number}.{group}={entry.name}")
            where.append((at, group))
        elif folder:
            path = Path(verbs.__file__).parents[3] / "config" / folder
            where.append(((entry.name, -1), ""))
            together[entry.name, -1] = ["--config-path", str(path), "--config-name", name]
        else:
            where.append(((entry.name, -1), ""))
            together[entry.name, -1] = ["--config-name", name]
    found = compose([*commands, *together.values()], tmp_path)
    assert all(code == 0 for code, _ in found), [text for code, text in found if code]
    configs = [yaml.load(text, yaml.CSafeLoader) for _, text in found]
    originals = dict(zip(together, configs[len(commands) :], strict=True))
    for number, (at, group) in enumerate(where):
        original = {key: own for key, own in originals[at].items() if not re.match(r"n\d+$", key)}
        if group:
            original[group] = originals[at][f"n{number}"][group]
        assert configs[number] == original, chosen[number].name


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["ties", "my.txt"], "is no YAML"),
        (["ties", "there.yaml"], "is there already. Add --overwrite"),
        (["zoo:clip-tiny", "my.yaml"], "is one model"),
        (["nothing_like_it", "my.yaml"], "There is no config or model 'nothing_like_it'"),
        (["gpt-2_glue", "my.yaml"], "one of models and of tasks. Say which: '--kind models'"),
    ],
)
def test_what_cannot_be_copied(
    words: list[str], message: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    Path("there.yaml").write_text("a: 1")
    with pytest.raises(Exception, match=message):
        verbs.run("cp", words)
    assert [path.name for path in tmp_path.iterdir()] == ["there.yaml"]
    assert Path("there.yaml").read_text() == "a: 1"
