"""A process that has imported what a run imports, and forks one such run after the other.

A cold `fusion_bench` spends six seconds on imports before it works. One server for each process of
the tests pays them once. What runs is the real command line, in a process of its own: its own
directory, environment, streams, signals and exit code.

Hugging Face's libraries read the environment when they are imported. So there are two servers in
one: the first has everything but them, and serves runs whose environment says other things to
them; the second is a fork of it that has imported them too.

Called with two listening sockets' file descriptors: `python warm.py FIRST SECOND`.
"""

import gc
import importlib
import json
import os
import selectors
import signal
import socket
import sys
from pathlib import Path
from typing import Any

#: What no setting of a test changes.
_ANY = (
    *("torch", "torch._dynamo", "torch._inductor.utils", "torch.distributed.fsdp", "sympy"),
    *("numpy", "pandas", "pyarrow.parquet", "pyarrow.dataset", "PIL.Image", "scipy.stats"),
    *("pydantic", "jinja2", "rich.console", "rich.table", "tqdm", "yaml", "hydra", "omegaconf"),
    *("matplotlib.pyplot", "sklearn.datasets", "skimage.data", "tokenizers", "safetensors.torch"),
    *("trio", "multiprocess", "filelock", "xxhash", "platformdirs"),
)
#: What reads Hugging Face's variables, or imports what does.
_READS_ENVIRONMENT = (
    *("huggingface_hub", "datasets", "transformers", "transformers.models.clip.modeling_clip"),
    *("transformers.models.clip.image_processing_pil_clip", "lightning.fabric"),
    *("fusion_bench.scripts.cli", "fusion_bench.scripts.run", "fusion_bench.scripts.hydra_patches"),
    *("fusion_bench.programs", "fusion_bench.method"),
    *("fusion_bench.modelpool", "fusion_bench.taskpool", "fusion_bench.report.page"),
    "fusion_bench.report.leaderboard_files",
)


def _import(names: tuple[str, ...]) -> None:
    for name in names:
        importlib.import_module(name)
    gc.freeze()  # what is there stays; to look through it again would copy its pages in each fork


def _serve(listener: socket.socket) -> dict[str, Any]:
    """Answer requests until the tests end; return in each forked child, with what it shall do."""
    running: dict[int, socket.socket] = {}
    wake, woken = os.pipe2(os.O_CLOEXEC | os.O_NONBLOCK)
    signal.set_wakeup_fd(woken, warn_on_full_buffer=False)
    signal.signal(signal.SIGCHLD, lambda *_: None)
    with selectors.DefaultSelector() as selector:
        selector.register(listener, selectors.EVENT_READ)
        selector.register(wake, selectors.EVENT_READ)
        while True:
            ready = {key.fileobj for key, _ in selector.select()}
            if wake in ready:
                os.read(wake, 4096)
                _report_ended(running)
            if listener in ready:
                connection, _ = listener.accept()
                request = _received(connection)
                if request is None:  # the tests are over
                    sys.exit()
                if pid := os.fork():
                    for stream in request["streams"]:
                        os.close(stream)
                    running[pid] = connection
                    connection.sendall(f"{pid}\n".encode())
                else:
                    signal.set_wakeup_fd(-1)
                    signal.signal(signal.SIGCHLD, signal.SIG_DFL)
                    for other in (*running.values(), connection, listener):
                        other.close()
                    os.close(woken)
                    break
    os.close(wake)
    return request


def _report_ended(running: dict[int, socket.socket]) -> None:
    for pid in list(running):
        ended, status = os.waitpid(pid, os.WNOHANG)
        if ended:
            with running.pop(pid) as connection:
                connection.sendall(f"{os.waitstatus_to_exitcode(status)}\n".encode())


def _received(connection: socket.socket) -> dict[str, Any] | None:
    size, streams, _, _ = socket.recv_fds(connection, 8, 3)
    if not size:
        return None
    body = connection.recv(int.from_bytes(size), socket.MSG_WAITALL)
    return {**json.loads(body), "streams": streams}


def _become(request: dict[str, Any]) -> None:
    """Make of this fork the process that was asked for."""
    for stream, own in zip(request["streams"], (0, 1, 2), strict=True):
        os.dup2(stream, own)
        os.close(stream)
    # What a script starts in the background ignores it; no run is to be started so.
    signal.signal(signal.SIGINT, signal.default_int_handler)
    os.chdir(request["cwd"])
    os.environ.clear()
    os.environ.update(request["env"])
    sys.argv = request["argv"]
    of_user = request["env"].get("PYTHONPATH", "").split(os.pathsep)
    sys.path[0] = request["path"]
    sys.path[1:1] = [place for place in of_user if place and place not in sys.path]


def _run(code: str, name: str) -> None:
    """Run it as the main module; processes that it spawns find it under its file's name."""
    main = sys.modules["__main__"]
    space = vars(main)
    end_run = _end  # which is among what is removed
    for own in [own for own in space if not own.startswith("__")]:
        del space[own]
    main.__file__ = name
    if name == "-c":
        del main.__file__
    status = 0
    try:
        exec(compile(code, name, "exec"), space)
    except SystemExit as end:
        if end.code is not None and not isinstance(end.code, int):
            raise
        status = end.code or 0
    end_run(status, space)


def _end(status: int, space: dict[str, Any]) -> None:
    """End as the interpreter does, but leave the modules alone: undoing them takes two seconds.

    What the run itself has made is undone, so that it may still complain. Where anything else than
    an exit code ends the run, or its output cannot be written, the interpreter does it all.
    """
    import atexit  # names of this module are gone by now
    import gc
    import os
    import sys
    import threading

    threading._shutdown()
    atexit._run_exitfuncs()
    for own in [own for own in space if not own.startswith("__")]:
        del space[own]
    gc.collect()
    try:
        sys.stdout.flush()
        sys.stderr.flush()
    except OSError:
        sys.exit(status)
    os._exit(status & 0xFF)


if __name__ == "__main__":
    first, second = (socket.socket(fileno=int(number)) for number in sys.argv[1:])
    _import(_ANY)
    importlib.import_module("lightning_utilities")
    if os.fork():
        second.close()
        wanted = _serve(first)
    else:
        first.close()
        _import(_READS_ENVIRONMENT)
        wanted = _serve(second)
    _become(wanted)
    if wanted["code"] is None:
        script = wanted["argv"][0]
        _run(Path(script).read_text(encoding="utf-8"), script)
    else:
        _run(wanted["code"], "-c")
