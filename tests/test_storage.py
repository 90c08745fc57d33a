import errno
import fcntl
import hashlib
import os
import signal
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from errno import ENOSPC
from pathlib import Path

import pytest

from fusion_bench import storage
from fusion_bench.problems import ConfigError, EnvironmentProblem
from fusion_bench.storage import (
    cache_dir,
    check_unclaimed,
    claimed,
    file_sha256,
    read_json,
    whole_directory,
    write_text,
)


def test_the_cache_follows_the_environment(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("FUSION_BENCH_CACHE", str(tmp_path / "here"))
    assert cache_dir() == tmp_path / "here"
    monkeypatch.delenv("FUSION_BENCH_CACHE")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "xdg"))
    assert cache_dir().name == "fusion_bench"


def test_text_replaces_what_was_there(tmp_path: Path) -> None:
    path = tmp_path / "deep" / "file.txt"
    write_text(path, "old")
    write_text(path, "new ü")
    assert path.read_text(encoding="utf-8") == "new ü"
    assert list(path.parent.iterdir()) == [path]
    assert path.stat().st_mode & 0o777 == 0o644


def test_text_that_cannot_be_written_leaves_the_old(tmp_path: Path) -> None:
    path = tmp_path / "file.txt"
    write_text(path, "old")
    with pytest.raises(UnicodeEncodeError):
        write_text(path, "\ud800")
    assert path.read_text() == "old"
    assert list(tmp_path.iterdir()) == [path]


@pytest.mark.processes
def test_what_a_killed_writer_left_is_taken_over(tmp_path: Path) -> None:
    path = tmp_path / "file.txt"
    write_text(path, "old")
    code = """
import os, signal, sys
from pathlib import Path
from fusion_bench.storage import write_text
os.fsync = lambda file: os.kill(os.getpid(), signal.SIGKILL)
write_text(Path(sys.argv[1]), "much longer than what comes after it")
"""
    killed = subprocess.run([sys.executable, "-c", code, str(path)], check=False)
    assert killed.returncode == -signal.SIGKILL
    assert path.read_text() == "old" and len(list(tmp_path.iterdir())) == 2
    write_text(path, "new")
    assert path.read_text() == "new" and list(tmp_path.iterdir()) == [path]


def test_many_write_the_same_file(tmp_path: Path) -> None:
    path = tmp_path / "file.txt"
    texts = [f"{number}" * 9000 for number in range(8)]
    with ThreadPoolExecutor(8) as pool:
        list(pool.map(lambda text: write_text(path, text), texts * 5))
    assert path.read_text() in texts and list(tmp_path.iterdir()) == [path]


def test_a_name_as_long_as_the_disk_takes(tmp_path: Path) -> None:
    path = tmp_path / ("x" * 255)
    write_text(path, "a")
    assert path.read_text() == "a" and list(tmp_path.iterdir()) == [path]


def test_a_full_disk_leaves_the_old(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "file.txt"
    write_text(path, "old")

    def full(*_: object) -> int:
        raise OSError(ENOSPC, "No space left on device")

    monkeypatch.setattr(os, "write", full)
    with pytest.raises(OSError, match="No space left"):
        write_text(path, "new")
    assert path.read_text() == "old" and list(tmp_path.iterdir()) == [path]


def test_a_directory_appears_whole(tmp_path: Path) -> None:
    path = tmp_path / "model"
    with whole_directory(path) as fresh:
        (fresh / "a").write_text("1")
        assert not path.exists()
    assert (path / "a").read_text() == "1"
    assert list(tmp_path.iterdir()) == [path]


def test_a_directory_that_fails_leaves_the_old(tmp_path: Path) -> None:
    path = tmp_path / "model"
    with whole_directory(path) as fresh:
        (fresh / "a").write_text("old")
    with pytest.raises(RuntimeError), whole_directory(path) as fresh:
        (fresh / "a").write_text("new")
        raise RuntimeError
    assert (path / "a").read_text() == "old"
    assert list(tmp_path.iterdir()) == [path]


def test_a_directory_replaces_the_old_one_as_a_whole(tmp_path: Path) -> None:
    path = tmp_path / "model"
    for name in ("a", "b"):
        with whole_directory(path) as fresh:
            (fresh / name).touch()
    assert [p.name for p in path.iterdir()] == ["b"]
    assert list(tmp_path.iterdir()) == [path]


def test_a_directory_may_have_any_name(tmp_path: Path) -> None:
    for name in ("[a-z]*", "a b", ".hidden", "ü", "x" * 200):
        with whole_directory(tmp_path / name) as fresh:
            (fresh / "a").touch()
        assert (tmp_path / name / "a").exists()
    assert len(list(tmp_path.iterdir())) == 5


def test_parents_are_made(tmp_path: Path) -> None:
    with whole_directory(tmp_path / "a" / "b"):
        pass
    assert (tmp_path / "a" / "b").is_dir()


def test_others_may_read_a_directory_that_appeared(tmp_path: Path) -> None:
    (tmp_path / "plain").mkdir()
    with whole_directory(tmp_path / "model"):
        pass
    assert (tmp_path / "model").stat().st_mode == (tmp_path / "plain").stat().st_mode


def test_where_names_cannot_be_exchanged_the_old_one_is_moved_away(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(storage, "_exchange", lambda one, other: False)
    test_a_directory_replaces_the_old_one_as_a_whole(tmp_path)


# --- killed writers

WRITE = """
import os, signal, sys
from pathlib import Path
import shutil
from fusion_bench import storage
from fusion_bench.problems import ConfigError

path, moment = Path(sys.argv[1]), int(sys.argv[2])
count = 0

def killed_at(module, name):
    real = getattr(module, name)
    def step(*args, **options):
        global count
        for _ in range(2):  # before it and after it
            count += 1
            if count == moment:
                os.kill(os.getpid(), signal.SIGKILL)
            if _ == 0:
                result = real(*args, **options)
        return result
    setattr(module, name, step)

for name in ("mkdir", "open", "fsync", "rename", "replace", "unlink", "rmdir", "close"):
    killed_at(os, name)
killed_at(storage, "_exchange")
with storage.whole_directory(path) as fresh:
    for name in ("a", "b"):
        (fresh / name).write_text("new")
print(count)
"""


def write_new(path: Path, moment: int) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-c", WRITE, str(path), str(moment)], capture_output=True, text=True
    )


def content(path: Path) -> dict[str, str]:
    return {file.name: file.read_text() for file in path.iterdir()}


OLD, NEW = {"a": "old", "c": "old"}, {"a": "new", "b": "new"}


def write_old(path: Path) -> None:
    with whole_directory(path) as fresh:
        for name, text in OLD.items():
            (fresh / name).write_text(text)


@pytest.mark.parametrize("there", [True, False])
def test_killed_at_any_moment_there_is_the_old_directory_or_the_new(
    there: bool, tmp_path: Path
) -> None:
    whole = write_new(tmp_path / "whole", 0)
    moments = int(whole.stdout)
    assert moments > 20, whole.stderr
    seen = []
    for moment in range(1, moments + 1, 3):
        path = tmp_path / str(moment) / "model"
        path.parent.mkdir()
        if there:
            write_old(path)
        assert write_new(path, moment).returncode == -signal.SIGKILL
        seen.append(content(path) if path.exists() else None)
        with whole_directory(path) as fresh:
            (fresh / "later").write_text("1")
        assert list(path.parent.iterdir()) == [path], moment
    assert all(state in ((OLD if there else None), NEW) for state in seen)
    assert seen[0] == (OLD if there else None) and seen[-1] == NEW


def test_the_scratch_of_a_writer_that_lives_is_left_alone(tmp_path: Path) -> None:
    path = tmp_path / "model"
    with whole_directory(path) as first:
        (first / "a").write_text("first")
        with whole_directory(path) as second:
            (second / "a").write_text("second")
        assert content(path) == {"a": "second"}
        assert content(first) == {"a": "first"}
    assert content(path) == {"a": "first"}
    assert list(tmp_path.iterdir()) == [path]


@pytest.mark.processes
def test_the_scratch_of_another_process_that_lives_is_left_alone(tmp_path: Path) -> None:
    path = tmp_path / "model"
    code = """
import sys
from concurrent.futures import ThreadPoolExecutor
from errno import ENOSPC
from pathlib import Path
from fusion_bench.storage import whole_directory
with whole_directory(Path(sys.argv[1])) as fresh:
    (fresh / "a").write_text("other")
    print(flush=True)
    sys.stdin.readline()
"""
    with subprocess.Popen(
        [sys.executable, "-c", code, str(path)],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
    ) as process:
        assert process.stdout and process.stdout.readline()
        write_old(path)
        assert content(path) == OLD and len(list(tmp_path.iterdir())) == 2
        process.communicate("\n", timeout=30)
    assert process.returncode == 0
    assert content(path) == {"a": "other"}
    assert list(tmp_path.iterdir()) == [path]


def test_what_is_no_leftover_is_left_alone(tmp_path: Path) -> None:
    others = [tmp_path / ".model-mine", tmp_path / ".other-abcdefgh", tmp_path / ".model-abcdefgh"]
    for other in others:
        other.mkdir()
        (other / "file").touch()
    write_old(tmp_path / "model")
    assert all((other / "file").exists() for other in others)


# --- digests of files


@pytest.fixture
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("FUSION_BENCH_CACHE", str(tmp_path / "cache"))
    return tmp_path / "cache" / "file_sha256"


@pytest.mark.parametrize("text", [b"", b"abc", b"x" * 3 * 10**6])
def test_a_digest_is_hashlibs(text: bytes, tmp_path: Path, cache: Path) -> None:
    file = tmp_path / "file"
    file.write_bytes(text)
    for _ in range(2):
        assert file_sha256(file) == hashlib.sha256(text).hexdigest()


def test_a_digest_is_remembered(
    tmp_path: Path, cache: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    file, link = tmp_path / "file", tmp_path / "link"
    file.write_text("a")
    link.symlink_to(file)
    expected = file_sha256(file)
    assert len(list(cache.iterdir())) == 1
    monkeypatch.setattr(hashlib, "file_digest", None)
    assert file_sha256(file) == file_sha256(link) == expected


def test_a_changed_file_has_another_digest(tmp_path: Path, cache: Path) -> None:
    file = tmp_path / "file"
    file.write_text("a")
    before = file_sha256(file)
    file.write_text("longer")
    assert file_sha256(file) == hashlib.sha256(b"longer").hexdigest()
    file.write_text("a")
    os.utime(file, ns=(1, 1))
    assert file_sha256(file) == before
    file.write_text("b")
    os.utime(file, ns=(2, 2))
    assert file_sha256(file) == hashlib.sha256(b"b").hexdigest()
    (tmp_path / "other").write_text("c")
    os.utime(tmp_path / "other", ns=(2, 2))
    (tmp_path / "other").replace(file)
    assert file_sha256(file) == hashlib.sha256(b"c").hexdigest()


def test_the_name_of_a_file_of_the_hubs_cache_is_not_believed(tmp_path: Path, cache: Path) -> None:
    (tmp_path / "blobs").mkdir()
    blob, link = tmp_path / "blobs" / ("0a" * 32), tmp_path / "model.safetensors"
    blob.touch()
    link.symlink_to(blob)
    assert file_sha256(link) == hashlib.sha256().hexdigest()


def test_a_cache_that_cannot_be_written_is_no_error(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "file").write_text("a")
    monkeypatch.setenv("FUSION_BENCH_CACHE", str(tmp_path / "file" / "cache"))
    assert file_sha256(tmp_path / "file") == hashlib.sha256(b"a").hexdigest()


@pytest.mark.parametrize(
    "content", [b"[" + b"[]," * 2_500_001, b"[" + b"0," * 5_000_001], ids=range(2)
)
def test_json_of_more_values_than_any_has_is_not_read(tmp_path: Path, content: bytes) -> None:
    (tmp_path / "a.json").write_bytes(content)
    with pytest.raises(ConfigError, match="has more than 5,000,000 values"):
        read_json(tmp_path / "a.json")


def test_json_larger_than_any_is_not_read(tmp_path: Path) -> None:
    with (tmp_path / "a.json").open("wb") as file:
        file.truncate(2**40)
    with pytest.raises(ConfigError, match="has 1048576 MiB; no more than 128 MiB"):
        read_json(tmp_path / "a.json")


@pytest.mark.timeout(10)
def test_json_in_a_pipe_is_not_waited_for(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "a.json")
    with pytest.raises(ConfigError, match="is not a regular file"):
        read_json(tmp_path / "a.json")


@pytest.mark.parametrize(
    "content", [b"9" * 5000, b"[" * 10**6, b'{"a": ' * 10**5, b"\xff", b""], ids=range(5)
)
def test_json_that_is_none(tmp_path: Path, content: bytes) -> None:
    (tmp_path / "a.json").write_bytes(content)
    with pytest.raises(ConfigError, match="is not valid JSON"):
        read_json(tmp_path / "a.json")


def test_a_place_is_claimed_by_one(tmp_path: Path) -> None:
    for inside in (True, False):
        place = tmp_path / "place"
        with claimed(place, ("some", "key"), inside=inside):
            again = claimed(place, ("some", "key"), inside=inside)
            with (
                pytest.raises(EnvironmentProblem, match=r"some\.key: .*in use .*process \d+"),
                again,
            ):
                raise AssertionError
            with pytest.raises(EnvironmentProblem, match=r"some\.key: .*in use"):
                check_unclaimed(place, ("some", "key"), inside=inside)
        check_unclaimed(place, ("some", "key"), inside=inside)
        with claimed(place, ("some", "key"), inside=inside), claimed(tmp_path / "other", ("x",)):
            pass
        assert not [path for path in tmp_path.rglob("*") if path.is_file()]


HOLD = """
import sys, time
from pathlib import Path
from fusion_bench.storage import claimed
with claimed(Path(sys.argv[1]), ("some", "key")):
    print("held", flush=True)
    time.sleep(600)
"""


@pytest.mark.processes
def test_a_killed_run_claims_nothing(tmp_path: Path) -> None:
    place = tmp_path / "place"
    command = [sys.executable, "-c", HOLD, str(place)]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as holder:
        assert holder.stdout is not None and holder.stdout.readline() == "held\n"
        with pytest.raises(EnvironmentProblem, match=f"process {holder.pid} on "):
            check_unclaimed(place, ("some", "key"))
        holder.kill()
        holder.wait()
    assert [path.name for path in tmp_path.iterdir()] == [".place.claimed"]
    with claimed(place, ("some", "key")):
        pass
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("rank", ["RANK", "LOCAL_RANK", "NODE_RANK", "SLURM_PROCID"])
def test_processes_of_one_run_claim_once(
    tmp_path: Path, rank: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    with claimed(tmp_path / "x", ("key",)):
        monkeypatch.setenv(rank, "1")
        check_unclaimed(tmp_path / "x", ("key",))
        with claimed(tmp_path / "x", ("key",)):
            pass
        monkeypatch.setenv(rank, "0")
        with pytest.raises(EnvironmentProblem):
            check_unclaimed(tmp_path / "x", ("key",))


def test_a_file_system_without_locks(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    def refused(*_: object) -> None:
        raise OSError(errno.ENOLCK, "No locks available")

    monkeypatch.setattr(fcntl, "flock", refused)
    with claimed(tmp_path / "x", ("key",)):
        assert "cannot be locked (No locks available)" in caplog.text
