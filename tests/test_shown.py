import io
import logging
import os
import pty
import subprocess
import sys
import warnings
from collections.abc import Iterator
from pathlib import Path

import pytest

from fusion_bench.report.table import rich_table, wide_console
from fusion_bench.shown import Record, Stream, message, set_up_streams, visible

TOKEN = "hf_" + "a1B2c3D4" * 4
#: Each would do something to a terminal or to a reader.
HOSTILE = {
    "colour": "\x1b[31mred",
    "title": "\x1b]0;title\x07",
    "link": "\x1b]8;;http://x\x1b\\",
    "C1": "\x9b31mred\x85",
    "back": "ab\b\bcd\rfusion_bench: all is well",
    "bell": "\x07\x0b\x0c\x7f\x00",
    "bidi": "\u202egnp.exe\u2066\u2069\u200f",
    "invisible": "\u200b\ufeff\u2060\U000e0041",
    "lines": "a\u2028b\u2029c",
    "surrogate": "a\udc80b\ud800",
    "up": "\x1b[A\x1b[2K",
}


def is_plain(text: str) -> bool:
    return all(c.isprintable() for c in text.replace("\n", "").replace("\t", ""))


@pytest.mark.parametrize("text", HOSTILE.values(), ids=list(HOSTILE))
def test_control_characters_are_written_out(text: str) -> None:
    shown = visible(f"name {text}")
    assert is_plain(shown) and shown.startswith("name ") and visible(shown) == shown


@pytest.mark.parametrize(
    "text",
    ["plain", "naïve – “x”", "名前\u3000漢字", "a\n\tb", "می\u200cخواهم", "👩\u200d🔬", "a\xa0b"],
)
def test_text_stays(text: str) -> None:
    assert visible(text) == text


def test_a_foreign_line_break_forges_no_line() -> None:
    assert message(f"a\r\n[INFO] - fine {TOKEN}") == "a\n  [INFO] - fine ***"


@pytest.fixture
def log(tmp_path: Path) -> Iterator[logging.Logger]:
    before = logging.getLogRecordFactory()
    logging.setLogRecordFactory(Record)
    logger = logging.getLogger("fusion_bench.of_this_test")
    handler = logging.FileHandler(tmp_path / "x.log", encoding="utf-8")
    handler.setFormatter(logging.Formatter("[%(levelname)s] - %(message)s"))
    logger.addHandler(handler)
    yield logger
    logger.removeHandler(handler)
    handler.close()
    logging.setLogRecordFactory(before)


@pytest.mark.parametrize("text", HOSTILE.values(), ids=list(HOSTILE))
def test_logs_hold_plain_text(log: logging.Logger, tmp_path: Path, text: str) -> None:
    log.warning("in %s", text)
    try:
        raise ValueError(f"{text} {TOKEN}\n[INFO] - forged")
    except ValueError:
        log.exception("in the traceback")
    written = (tmp_path / "x.log").read_text(encoding="utf-8")
    assert is_plain(written) and TOKEN not in written and "ValueError: " in written
    assert [line[:9] for line in written.split("\n") if not line.startswith("  ")] == [
        "[WARNING]",
        "[ERROR] -",
        "",
    ]


class Terminal(io.BytesIO):
    def isatty(self) -> bool:
        return True


@pytest.mark.parametrize("place", [io.BytesIO, Terminal])
@pytest.mark.parametrize("text", HOSTILE.values(), ids=list(HOSTILE))
def test_what_libraries_print_is_plain(place: type[io.BytesIO], text: str) -> None:
    out = place()
    stream = Stream(out, "utf-8", by_line=True)
    print(f"of a library: {text}", file=stream)
    stream.write(warnings.formatwarning(text, UserWarning, "x.py", 1))
    stream.writelines([f"argparse: {text}\n", f"a token: {TOKEN}\n"])
    written = out.getvalue().decode()
    assert is_plain(written) and written.count("of a library") == 1 and TOKEN not in written


def test_bars_move_on_a_terminal_and_nowhere_else() -> None:
    for place, kept in ((Terminal(), True), (io.BytesIO(), False)):
        stream = Stream(place, "utf-8", by_line=True)
        for text in ("\r 50% \x1b[31mx", "\x1b[A\x1b[A", "\x1b[Ax"):
            stream.write(text)
        if kept:
            assert place.getvalue() == b"\r 50% x\x1b[A\x1b[A\\x1b[Ax"
        else:
            assert place.getvalue() == b"\\r 50% x\\x1b[A\\x1b[A\\x1b[Ax"


def test_our_tables_have_colours_and_their_cells_have_none(monkeypatch: pytest.MonkeyPatch) -> None:
    out = Terminal()
    monkeypatch.setenv("TERM", "xterm")
    monkeypatch.setattr(sys, "stdout", Stream(out, "utf-8", by_line=True))
    cells = [[f"{text}", "1.0"] for text in HOSTILE.values()]
    console = wide_console()
    console.width = 100
    console.print(rich_table(["name", "x\x1b[2J"], cells, bold_last=True))
    written = out.getvalue().decode()
    assert "\x1b[1m" in written  # the last line is bold
    assert is_plain(written.replace("\x1b[1m", "").replace("\x1b[0m", ""))


LOST = """
import logging, sys
from fusion_bench.shown import set_up_streams
set_up_streams()
logging.basicConfig(stream=sys.stdout, level=logging.INFO)
for number in range(2000):
    print("a line of some length, so that buffers are full", number)
    logging.info("line %d", number)
    if len(sys.argv) > 1:
        print("on the other", file=sys.stderr)
sys.stdout.flush()
open("done", "w").close()
sys.exit(7)
"""


@pytest.mark.parametrize(
    ("behind", "told"),
    [
        ("| head -1", ""),
        ("> /dev/full", "Standard output is closed or full (No space left on device)"),
        (">&-", ""),
        (">&- 2>&-", ""),
        ("both > /dev/full 2> /dev/full", ""),
        ("both 2>&1 | head -1", ""),
    ],
)
def test_work_goes_on_without_a_terminal(tmp_path: Path, behind: str, told: str) -> None:
    if not Path("/dev/full").exists():
        pytest.skip("this system has none")
    (tmp_path / "lost.py").write_text(LOST)
    script = f"{sys.executable} lost.py {behind}; exit ${{PIPESTATUS[0]}}"
    done = subprocess.run(["bash", "-c", script], cwd=tmp_path, capture_output=True, text=True)
    assert (tmp_path / "done").exists()
    assert done.returncode == 7
    assert told in done.stderr and "Traceback" not in done.stderr
    assert done.stderr.count("\n") <= 1


def test_a_terminal_that_was_hung_up(tmp_path: Path) -> None:
    (tmp_path / "lost.py").write_text(LOST)
    ours, theirs = pty.openpty()
    with subprocess.Popen(
        [sys.executable, "lost.py", "both"], cwd=tmp_path, stdout=theirs, stderr=theirs
    ) as process:
        os.close(theirs)
        os.read(ours, 100)
        os.close(ours)
        assert process.wait(60) == 7
    assert (tmp_path / "done").exists()


def test_streams_are_set_up_once(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "stdout", io.TextIOWrapper(io.BytesIO(), "ascii"))
    monkeypatch.setattr(sys, "stderr", None)
    before = logging.getLogRecordFactory()
    try:
        set_up_streams()
        first = sys.stdout
        set_up_streams()
        assert sys.stdout is first and isinstance(first, Stream)
        print("– of another encoding")
        assert first.buffer.getvalue() == b"\\u2013 of another encoding\n"  # type: ignore[attr-defined]
        print("nobody reads it", file=sys.stderr)
    finally:
        logging.setLogRecordFactory(before)
