"""Ctrl-C and SIGTERM, wherever the process stands. Each test starts a small process of its own."""

import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest

DRIVER = """
import hashlib, multiprocessing, os, sys, threading, time
from pathlib import Path
from fusion_bench.progress import kept
from fusion_bench.scripts.process import plain_messages
from fusion_bench.scripts.interrupt import interruptible
from fusion_bench.storage import whole_directory

def ready():
    print("ready", flush=True)

def writing():
    with whole_directory(Path("model")) as place:
        (place / "half").touch()
        ready()
        time.sleep(600)

def in_one_long_operation():
    ready()
    hashlib.pbkdf2_hmac("sha256", b"", b"", 2**31 - 1)

def of_which_something_is_kept():
    with kept(lambda: "It is in the cache."):
        ready()
        time.sleep(600)

def in_one_long_operation_of_which_something_is_kept():
    with kept(lambda: "It is in the cache."):
        in_one_long_operation()

def with_a_thread_that_goes_on():
    threading.Thread(target=time.sleep, args=(600,)).start()
    ready()
    time.sleep(600)

def with_a_child():
    child = multiprocessing.get_context("fork").Process(target=time.sleep, args=(600,))
    child.start()
    Path("child").write_text(str(child.pid))
    ready()
    child.join()

def child_is_ended():
    child = multiprocessing.get_context("fork").Process(target=time.sleep, args=(600,))
    child.start()
    child.terminate()
    child.join()
    print(child.exitcode, flush=True)
    time.sleep(1.5)  # longer than the patience with a process that was told to end

with plain_messages(False), interruptible():
    globals()[sys.argv[1]]()
print("done", flush=True)
"""


def begin(what: str, place: Path, *, ignored: bool = False) -> subprocess.Popen[str]:
    """Start the driver; what a script starts in the background ignores Ctrl-C, and so may this."""
    action = signal.SIG_IGN if ignored else signal.SIG_DFL
    return subprocess.Popen(
        [sys.executable, "-c", DRIVER, what],
        cwd=place,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        preexec_fn=lambda: signal.signal(signal.SIGINT, action),
    )


@pytest.mark.processes
@pytest.mark.parametrize(
    "what",
    ["writing", "in_one_long_operation", "with_a_thread_that_goes_on", "with_a_child"],
)
@pytest.mark.parametrize(("sent", "code"), [(signal.SIGINT, 130), (signal.SIGTERM, 143)])
def test_it_ends_and_leaves_nothing(
    what: str, sent: signal.Signals, code: int, tmp_path: Path
) -> None:
    process = begin(what, tmp_path)
    assert process.stdout and process.stdout.readline() == "ready\n"
    process.send_signal(sent)
    out, err = process.communicate(timeout=60)
    assert (process.returncode, out, err) == (code, "", "")
    if what == "writing":
        assert list(tmp_path.iterdir()) == []
    if what == "with_a_child":
        with pytest.raises(ProcessLookupError):
            os.kill(int((tmp_path / "child").read_text()), 0)


@pytest.mark.processes
@pytest.mark.parametrize(
    "what", ["of_which_something_is_kept", "in_one_long_operation_of_which_something_is_kept"]
)
def test_it_says_once_what_is_kept(what: str, tmp_path: Path) -> None:
    process = begin(what, tmp_path)
    assert process.stdout and process.stdout.readline() == "ready\n"
    process.send_signal(signal.SIGINT)
    out, err = process.communicate(timeout=60)
    told = "fusion_bench: Interrupted. It is in the cache.\n"
    assert (process.returncode, out, err) == (130, "", told)


@pytest.mark.processes
def test_the_end_of_a_child_is_its_own(tmp_path: Path) -> None:
    out, err = begin("child_is_ended", tmp_path).communicate(timeout=60)
    assert (out, err) == (f"{-signal.SIGTERM}\ndone\n", "")


def test_what_ignores_ctrl_c_goes_on_doing_so(tmp_path: Path) -> None:
    process = begin("with_a_thread_that_goes_on", tmp_path, ignored=True)
    assert process.stdout and process.stdout.readline() == "ready\n"
    process.send_signal(signal.SIGINT)
    process.send_signal(signal.SIGTERM)
    assert process.wait(60) == 143
    process.communicate()
