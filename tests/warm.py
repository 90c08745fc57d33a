"""A process that has imported what a run imports, and forks one such run after the other.

A cold `fusion_bench` spends six seconds on imports before it works. One server for all processes of
the tests pays them once. What runs is the real command line, in a process of its own: its own
directory, environment, streams, signals and exit code.

Hugging Face's libraries read the environment when they are imported. A run whose environment says
other things to them reads it again.

Called with a listening socket's file descriptor: `python warm.py SOCKET`.
"""

import gc
import importlib
import json
import os
import re
import selectors
import signal
import socket
import sys
from pathlib import Path
from typing import Any

_IMPORTED = (
    *("torch", "torch._dynamo", "torch._inductor.utils", "torch.distributed.fsdp", "sympy"),
    *("numpy", "pandas", "pyarrow.parquet", "pyarrow.dataset", "PIL.Image", "scipy.stats"),
    *("pydantic", "jinja2", "rich.console", "rich.table", "tqdm", "yaml", "hydra", "omegaconf"),
    *("matplotlib.pyplot", "sklearn.datasets", "skimage.data", "tokenizers", "safetensors.torch"),
    *("trio", "multiprocess", "filelock", "xxhash", "platformdirs", "lightning_utilities"),
    *("huggingface_hub", "datasets", "transformers", "transformers.models.clip.modeling_clip"),
    *("transformers.models.clip.image_processing_pil_clip", "lightning.fabric"),
    *("fusion_bench.scripts.cli", "fusion_bench.scripts.run", "fusion_bench.scripts.hydra_patches"),
    *("fusion_bench.programs", "fusion_bench.method"),
    *("fusion_bench.modelpool", "fusion_bench.taskpool", "fusion_bench.report.page"),
    "fusion_bench.report.leaderboard_files",
)
#: What of the environment Hugging Face's libraries read when they are imported.
_READ_AT_IMPORT = re.compile(r"HF_|HUGGING|HUB_|TRANSFORMERS_|DATASETS_", re.I)


def _import() -> None:
    for name in _IMPORTED:
        importlib.import_module(name)
    from transformers.conversion_mapping import get_checkpoint_conversion_mapping

    from fusion_bench.report.page import _environment

    # What else every run makes once, and which depends on nothing.
    get_checkpoint_conversion_mapping("clip")
    templates = _environment()
    for name in templates.list_templates():
        templates.get_template(name)
    gc.freeze()  # what is there stays; to look through it again would copy its pages in each fork


def _read_at_import() -> dict[str, str]:
    return {name: value for name, value in os.environ.items() if _READ_AT_IMPORT.match(name)}


def _read_again() -> None:
    """Read the environment as Hugging Face's libraries would have, had they been imported now.

    They keep what they read as constants of two modules, and here and there a copy.
    """
    import datasets.config
    import huggingface_hub.hf_api
    import huggingface_hub.hf_file_system
    import transformers.utils.hub
    from huggingface_hub import constants
    from huggingface_hub.utils import _http

    before = vars(constants).copy() | {"HF_MODULES_CACHE": transformers.utils.hub.HF_MODULES_CACHE}
    importlib.reload(constants)
    importlib.reload(datasets.config)
    now = vars(constants).copy()
    now["HF_MODULES_CACHE"] = os.getenv("HF_MODULES_CACHE", f"{constants.HF_HOME}/modules")
    for module, space in [(name, vars(module)) for name, module in sys.modules.items()]:
        if module.startswith(("huggingface_hub", "transformers.utils", "transformers.dynamic")):
            for name in before.keys() & space.keys():
                if space[name] is before[name] and not name.startswith("_"):
                    space[name] = now[name]
    origins = _http._HUB_ORIGINS - {_http._url_origin(before["ENDPOINT"])}
    _http._HUB_ORIGINS = origins | {_http._url_origin(constants.ENDPOINT)}
    files = huggingface_hub.hf_file_system.hffs
    for client in (huggingface_hub.hf_api.api, files, files._api):
        client.endpoint = constants.ENDPOINT


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
    os.setpriority(os.PRIO_PROCESS, 0, max(request["niceness"], os.nice(0)))
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
    _import()
    was_read = _read_at_import()
    wanted = _serve(socket.socket(fileno=int(sys.argv[1])))
    _become(wanted)
    if _read_at_import() != was_read:
        _read_again()
    if wanted["code"] is None:
        script = wanted["argv"][0]
        _run(Path(script).read_text(encoding="utf-8"), script)
    else:
        _run(wanted["code"], "-c")
