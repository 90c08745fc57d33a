"""Run a benchmark in a process that is forked; so are those that it starts.

Words: the folder of the benchmarks, that of `commandline`, and the benchmark with its words.
"""

import os
import runpy
import subprocess
import sys
import tempfile
from collections.abc import Mapping, Sequence
from pathlib import Path
from types import TracebackType

sys.path[:0] = sys.argv[1:3]

import commandline  # noqa: E402
import measure  # noqa: E402

#: Runs a script as a program.
_SCRIPT = """
import runpy, sys
sys.argv = sys.argv[1:]
sys.path.insert(0, {!r})
runpy.run_path(sys.argv[0], run_name="__main__")
"""
_run, _Popen = subprocess.run, subprocess.Popen


def run(
    words: Sequence[str],
    *,
    cwd: str | Path = ".",
    env: Mapping[str, str] | None = None,
    check: bool = False,
    **others: object,
) -> "subprocess.CompletedProcess[str]":
    """Run what ``subprocess.run`` would: Python and the command from the warm process."""
    (program, *rest), place, env = words, Path(cwd).absolute(), env or os.environ
    if program == str(commandline.SCRIPT):
        done = commandline.fusion_bench(*rest, cwd=place, env=env)
    elif program != sys.executable:
        return _run(words, cwd=cwd, env=env, check=check, **others)  # type: ignore[call-overload]
    elif "-c" in rest:
        code, *arguments = rest[rest.index("-c") + 1 :]
        if cwd == Path(measure.__file__).parent:  # which Python would put first
            code = f"import sys; sys.path.insert(0, {str(cwd)!r})\n{code}"
        done = commandline.python(code, *arguments, cwd=place, env=env)
    elif rest[:2] == ["-m", "fusion_bench"]:
        done = commandline.fusion_bench(*rest[2:], cwd=place, env=env)
    else:
        done = commandline.python(_SCRIPT.format(sys.path[0]), *rest, cwd=place, env=env)
    if check and done.returncode:
        print(done.stderr, file=sys.stderr)
        raise subprocess.CalledProcessError(done.returncode, words, done.stdout, done.stderr)
    return done


def watched(command: Sequence[str], accepts: Sequence[int] = (0,)) -> tuple[float, float, str]:
    """Run a command whose memory nobody looks at."""
    with tempfile.TemporaryDirectory() as place:
        done = run(command, cwd=place)
    if done.returncode not in accepts:
        raise measure.CommandError(done.stderr.strip().rpartition("\n")[2])
    return 0.0, 0.0, done.stdout + done.stderr


class Forked:
    """A script as another process, to which pipes lead."""

    def __init__(self, words: Sequence[str]):
        (from_us, to_it), (from_it, to_us) = os.pipe(), os.pipe()
        self._pid = os.fork()
        if self._pid == 0:
            os.dup2(from_us, 0)
            os.dup2(to_us, 1)
            os.closerange(from_us, to_us + 1)
            sys.stdin, sys.stdout = os.fdopen(0), os.fdopen(1, "w")
            sys.argv = list(words[1:])
            try:
                runpy.run_path(sys.argv[0], run_name="__main__")
            finally:
                os._exit(0)
        os.close(from_us)
        os.close(to_us)
        self.stdin, self.stdout = os.fdopen(to_it, "w"), os.fdopen(from_it)

    def __enter__(self) -> "Forked":
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: object, trace: TracebackType | None
    ) -> None:
        os.waitpid(self._pid, 0)


def started(words: Sequence[str], **others: object) -> object:
    """Start what ``subprocess.Popen`` would."""
    if len(words) > 1 and words[1].endswith("recipe_peers.py"):
        return Forked(words)
    return _Popen(words, **others)  # type: ignore[call-overload]


subprocess.run = run  # type: ignore[assignment]
subprocess.Popen = started  # type: ignore[assignment, misc]
measure.watched = watched
sys.argv = sys.argv[3:]
runpy.run_path(sys.argv[0], run_name="__main__")
