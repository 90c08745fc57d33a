"""No library reads an answer from the terminal."""

import os
import subprocess
import sys
from pathlib import Path

import pytest
from commandline import fusion_bench

BEGIN = "import os, sys\nfrom fusion_bench.scripts.process import closed_stdin\n"


def child(code: str, answers: str = "y\n" * 99, close: bool = False) -> list[str]:
    """Run code in a child process, to which a script says yes; return the lines that it printed."""
    command = [sys.executable, "-c", BEGIN + code]
    if close:
        command = ["bash", "-c", 'exec "$@" 0<&-', "bash", *command]
    done = subprocess.run(command, input=answers, capture_output=True, text=True, timeout=100)
    assert done.returncode == 0, done.stderr
    return done.stdout.split("\n")[:-1]


@pytest.mark.parametrize("close", [False, True])
def test_nothing_is_read_from_what_a_script_pipes_in(close: bool) -> None:
    code = """
with closed_stdin():
    try:
        print(input("run the code? "))
    except EOFError:
        print("nobody")
    print(os.read(0, 10), sys.stdin.read() == "")
    print(os.popen("cat").read() == "")
"""
    assert child(code, close=close) == ["run the code? nobody", "b'' True", "True"]


def test_afterwards_the_terminal_is_there_again() -> None:
    code = "with closed_stdin():\n    pass\nprint(input())\nprint(os.read(0, 2))"
    assert child(code, "one\n") == ["one", "b''"]
    assert child("with closed_stdin():\n    pass\nprint(os.read(0, 3))", "one") == ["b'one'"]


def test_a_breakpoint_gets_the_terminal_back() -> None:
    code = "with closed_stdin():\n    answer = 'none'\n    breakpoint()\n    print(answer)"
    assert child(code, "answer = 'mine'\ncontinue\n")[-1] == "(Pdb) (Pdb) mine"


def test_a_debugger_keeps_it() -> None:
    code = "sys.settrace(lambda *_: None)\nwith closed_stdin():\n    print(input())"
    assert child(code, "mine\n") == ["mine"]


def test_a_run_from_the_command_line_is_one(tmp_path: Path) -> None:
    """What a user's own class asks is not answered either."""
    (tmp_path / "asking.py").write_text("class Pool:\n    def __init__(self):\n        input()\n")
    (tmp_path / "ask.yaml").write_text(
        "_target_: fusion_bench.programs.FabricModelFusionProgram\n"
        "method: {_target_: fusion_bench.method.SimpleAverageAlgorithm}\n"
        "modelpool: {_target_: asking.Pool}\n"
    )
    (tmp_path / "answers").write_text("y\n" * 99)
    words = ("--allow=asking", "--config-path", ".", "--config-name", "ask")
    env = {**os.environ, "PYTHONPATH": str(tmp_path), "FUSION_BENCH_CACHE": str(tmp_path / "c")}
    done = fusion_bench(*words, cwd=tmp_path, env=env, stdin=tmp_path / "answers")
    assert done.returncode != 0 and "EOF" in done.stderr
