"""The real command line, run as a person runs it, and other code in a process of its own.

Processes are forked from a warm one, unless a test is about a cold start. ``warm.py`` says how.
"""

import atexit
import json
import os
import select
import signal
import socket
import subprocess
import sys
import tempfile
import threading
from collections.abc import Callable, Iterable, Mapping, Sequence
from functools import cache
from pathlib import Path

SCRIPT = Path(sys.executable).parent / "fusion_bench"
REPOSITORY = Path(__file__).parents[1]
#: The variable with the warm process's address.
SERVER = "FUSION_BENCH_TESTS_SERVER"
#: In which it is started: of before any test.
_ENVIRONMENT = dict(os.environ)
#: Held so that threads start only one.
_STARTING = threading.Lock()
#: Runs the command line once for each list of words in a file, and puts there what came of it.
#: What is set up of Hydra stays, so it is set up once; so do the config files that were read.
_COMPOSE = """
import contextlib, functools, io, json, sys
from hydra.core.global_hydra import GlobalHydra
from fusion_bench.scripts import checked, hydra_patches
from fusion_bench.scripts.cli import main
from fusion_bench.scripts.shared_files import SharedRepository

read = {}
def repository(search_path):
    made = SharedRepository(search_path)
    made._read = read
    return made

checked.SharedRepository = repository
hydra_patches.set_up_hydra = functools.cache(hydra_patches.set_up_hydra)
path, printed = sys.argv[1], []
for words in json.load(open(path)):
    sys.argv[1:] = [*words, "--cfg", "job"]
    out, code = io.StringIO(), 0
    with contextlib.redirect_stdout(out), contextlib.redirect_stderr(out):
        try:
            main()
        except SystemExit as end:
            code = end.code or 0
    GlobalHydra.instance().clear()
    printed.append([code, out.getvalue()])
json.dump(printed, open(path, "w"))
"""


def fusion_bench(
    *arguments: str,
    cwd: Path,
    env: Mapping[str, str] | None = None,
    timeout: float = 300,
    stdout: Path | None = None,
    stderr: Path | None = None,
    stdin: Path = Path(os.devnull),
    begun: Callable[[int], None] = lambda pid: None,
    at_once: bool = False,
) -> subprocess.CompletedProcess[str]:
    """Run the command in ``cwd``; ``env`` is the whole environment, by default this one.

    What goes to a file of the caller's, ``stdout`` or ``stderr``, is not returned. ``begun`` is
    called with the process's id. What is to run ``at_once`` is done before other tests.
    """
    environment = {k: v for k, v in (env or os.environ).items() if k != "HYDRA_FULL_ERROR"}
    command = [str(SCRIPT), *arguments]
    to = (stdout, stderr)
    where = (str(SCRIPT.parent), cwd, environment)
    return _warm(command, None, *where, timeout, to, stdin, begun, 0 if at_once else os.nice(0))


def python(
    code: str,
    *arguments: str,
    cwd: Path | None = None,
    env: Mapping[str, str] | None = None,
    timeout: float = 300,
) -> subprocess.CompletedProcess[str]:
    """Run code as ``python -c`` does."""
    return _warm(["-c", *arguments], code, "", cwd or Path.cwd(), dict(env or os.environ), timeout)


def compose(commands: Iterable[Sequence[str]], cwd: Path) -> list[tuple[int, str]]:
    """Return the exit code and the output of ``--cfg job`` for each command's words.

    One process does it for all, which takes a fifth of the time.
    """
    with tempfile.NamedTemporaryFile("w+") as file:
        json.dump([list(words) for words in commands], file)
        file.flush()
        done = python(_COMPOSE, file.name, cwd=cwd)
        assert done.returncode == 0, done.stderr
        return [(code, text) for code, text in json.loads(Path(file.name).read_text())]


def _warm(
    argv: list[str],
    code: str | None,
    path: str,
    cwd: Path,
    env: Mapping[str, str],
    timeout: float,
    to: tuple[Path | None, Path | None] = (None, None),
    stdin: Path = Path(os.devnull),
    begun: Callable[[int], None] = lambda pid: None,
    niceness: int | None = None,
) -> subprocess.CompletedProcess[str]:
    if niceness is None:
        niceness = os.nice(0)
    request = {"argv": argv, "code": code, "path": path, "cwd": str(cwd), "env": dict(env)}
    body = json.dumps(request | {"niceness": niceness}).encode()
    with (
        to[0].open("wb") if to[0] else tempfile.TemporaryFile() as out,
        to[1].open("wb") if to[1] else tempfile.TemporaryFile() as err,
        stdin.open("rb") as answers,
        socket.socket(socket.AF_UNIX) as connection,
    ):
        with _STARTING:
            server = _server()
        connection.connect(server)
        streams = [answers.fileno(), out.fileno(), err.fileno()]
        socket.send_fds(connection, [len(body).to_bytes(8)], streams)
        connection.sendall(body)
        answer = connection.makefile("r")
        pid = int(answer.readline())
        begun(pid)
        connection.settimeout(timeout)
        try:
            code_of_end = int(answer.readline())
        except TimeoutError:
            os.kill(pid, signal.SIGKILL)
            raise subprocess.TimeoutExpired(argv, timeout) from None
        texts = []
        for stream, own in zip((out, err), to, strict=True):
            if own:
                texts.append("")
                continue
            stream.seek(0)
            texts.append(stream.read().decode().replace("\r\n", "\n").replace("\r", "\n"))
    return subprocess.CompletedProcess(argv, code_of_end, *texts)


def serve(at_once: bool = False) -> str:
    """Return the address of the warm process, for all processes of the tests.

    It is started here when something is asked of it, which waits for it then, or at once.
    """
    directory = tempfile.TemporaryDirectory(prefix="warm-")
    listener = socket.socket(socket.AF_UNIX)
    address = f"{directory.name}/socket"
    listener.bind(address)
    listener.listen(8)
    started: list[subprocess.Popen[bytes]] = []

    def start() -> None:
        if not at_once:
            select.select([listener], [], [])
        number = listener.fileno()
        command = [sys.executable, str(Path(__file__).with_name("warm.py")), str(number)]
        nothing = subprocess.DEVNULL
        process = subprocess.Popen(command, pass_fds=[number], env=_ENVIRONMENT, stdin=nothing)
        started.append(process)
        listener.close()

    def end() -> None:
        for process in started:
            with socket.socket(socket.AF_UNIX) as connection:
                connection.connect(address)
            process.wait(30)
        directory.cleanup()

    threading.Thread(target=start, daemon=True).start()
    atexit.register(end)
    return address


@cache
def _server() -> str:
    """Return the address that the process that began the tests has told, or else its own."""
    return os.environ.get(SERVER) or serve()
