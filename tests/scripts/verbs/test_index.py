from pathlib import Path

from commandline import fusion_bench
from fixtures_report import synthetic


def test_the_command_writes_the_page_and_says_what_is_on_it(tmp_path: Path) -> None:
    found, _ = synthetic({"a": 3}, samples=20)
    found.save(tmp_path / "outputs" / "one" / "report.json")
    (tmp_path / "outputs" / "two").mkdir()
    (tmp_path / "outputs" / "two" / "report.json").write_text("{", encoding="utf-8")
    done = fusion_bench("index", "outputs", cwd=tmp_path)
    assert (done.returncode, done.stderr) == (0, "")
    assert done.stdout == "outputs/index.html: 1 run, 1 file that cannot be read.\n"
    assert "one" in (tmp_path / "outputs" / "index.html").read_text(encoding="utf-8")
    done = fusion_bench("index", "--out", "all.html", cwd=tmp_path)
    assert done.returncode == 0 and (tmp_path / "all.html").is_file()


def test_mistakes_are_told_in_a_line(tmp_path: Path) -> None:
    (tmp_path / "index.html").write_text("mine", encoding="utf-8")
    for words, message in {
        ("nowhere",): "There is no folder 'nowhere'. Name one that contains runs.",
        (): "'index.html' exists and was not written by 'fusion_bench index'. Choose another "
        "file with --out, or add --overwrite to replace it.",
        ("--overwrite",): "There is no report.json below '.'. Name a folder that contains runs.",
    }.items():
        done = fusion_bench("index", *words, cwd=tmp_path)
        assert (done.returncode, done.stdout) == (2, "")
        assert done.stderr == f"fusion_bench: {message}\n"
    assert (tmp_path / "index.html").read_text(encoding="utf-8") == "mine"
