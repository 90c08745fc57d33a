"""A Hub that refuses, stalls, cuts off and lies, and what becomes of what is read from it.

Each trial is a process of its own with an empty cache, which reads one thing from a stand-in of the
Hub on loopback: the description of a repository, a small file, a header, an index, weights, a
dataset. What it has read is compared with what the stand-in has, byte by byte.
"""

import json
import os
import shutil
from collections.abc import Callable, Iterator
from contextlib import nullcontext
from dataclasses import dataclass, field
from pathlib import Path
from subprocess import TimeoutExpired
from typing import Any

from commandline import python
from fixtures_clip import write_base, write_dataset, write_vision_encoder
from hub import Fault, client_environment, closed_endpoint, hub_stand_in

#: As HF_HUB_DOWNLOAD_TIMEOUT and HF_HUB_ETAG_TIMEOUT; by default both are 10 seconds.
TIMEOUT = 3
#: No process may take longer.
LIMIT = 600
TOKEN = "hf_" + "secretsecret" * 3

READ = """
import hashlib, json, sys, time
from fusion_bench.problems import FusionBenchError
from fusion_bench.repository import locate
from fusion_bench.sources import load

def read(what):
    if what == "description":
        return sorted(locate("owner/one").files)
    if what == "small file":
        return (locate("owner/one").fetch("config.json") / "config.json").read_text()
    if what in ("header", "index"):
        from fusion_bench.weights import open_repository
        weights = open_repository(locate("owner/one" if what == "header" else "owner/sharded"))
        return {key: str(weights.spec(key)) for key in weights}
    if what == "weights":
        from fusion_bench.weights import open_repository, sha256
        return sha256(open_repository(locate("owner/one")))
    if what == "model class":
        from fusion_bench.weights import TensorWeights, sha256
        node = {"_target_": "transformers.CLIPVisionModel.from_pretrained",
                "pretrained_model_name_or_path": "owner/one"}
        return sha256(TensorWeights(load("model", node, "modelpool.models.a").state_dict()))
    node = {"_target_": "datasets.load_dataset", "path": "owner/data", "split": "test"}
    images = load("dataset", node, "taskpool.test_datasets.a")["image"]
    return hashlib.sha256(b"".join(image.tobytes() for image in images)).hexdigest()

begin = time.monotonic()
try:
    result, said, code = read(sys.argv[1]), "", 0
except FusionBenchError as error:
    result, said, code = None, str(error), error.exit_code
seconds = round(time.monotonic() - begin, 1)
print(json.dumps({"result": result, "said": said, "code": code, "seconds": seconds}))
"""

#: What is read, and the paths on the Hub that are spoiled for it.
SUBJECTS = {
    "description": r"^/api/models/owner/one",
    "small file": r"resolve/.*/config\.json",
    "header": r"owner/one/resolve/.*/model\.safetensors",
    "index": r"resolve/.*/model\.safetensors\.index\.json",
    "weights": r"owner/one/resolve/.*/model\.safetensors",
    "model class": r"owner/one/resolve/.*/model\.safetensors",
    "dataset's description": r"^/api/datasets/owner/data",
    "dataset": r"datasets/owner/data/resolve/.*/test-.*\.parquet",
}
READ_WHOLE = "read whole"
WORLD, INPUT = "refused, 3", "refused, 2"


@dataclass(frozen=True)
class Trial:
    """A fault, what is read in spite of it, and what should become of it."""

    fault: str
    subject: str
    expected: tuple[str, ...]
    how: int | str | None = None
    times: int | None = None
    headers: dict[str, str] = field(default_factory=dict)
    prepare: Callable[[Path], None] | None = None
    endpoint: str | None = None
    offline: bool = False


def trials() -> Iterator[Trial]:
    """Yield every fault with every subject that it can hit."""
    statuses = (429, 500, 502, 503, 504)
    for subject in SUBJECTS:
        for code in statuses:
            yield Trial(f"status {code}, twice", subject, (READ_WHOLE,), code, 2)
            yield Trial(f"status {code}, always", subject, (WORLD,), code)
        for seconds, times, expected in ((1, 2, READ_WHOLE), (3600, None, WORLD)):
            often = "twice" if times else "always"
            yield Trial(
                f"status 429 with Retry-After: {seconds}, {often}",
                subject,
                (expected,),
                429,
                times,
                {"Retry-After": str(seconds)},
            )
        yield Trial("status 401", subject, (INPUT,), 401)
        yield Trial("status 403", subject, (INPUT,), 403)
        yield Trial("gated", subject, (INPUT,), 403, headers={"X-Error-Code": "GatedRepo"})
        yield Trial("status 404", subject, (INPUT,), 404)
        for how, words in BROKEN.items():
            yield Trial(f"{words}, once", subject, (READ_WHOLE,), how, 1)
            yield Trial(f"{words}, always", subject, _expected(how, subject), how)
        yield Trial("host name unknown", subject, (WORLD,), endpoint="http://no-such-host.invalid")
        yield Trial("connection refused", subject, (WORLD,), endpoint=closed_endpoint())
        yield Trial("offline, empty cache", subject, (WORLD,), offline=True)
        yield Trial(
            "offline, all in the cache", subject, (READ_WHOLE,), prepare=_keep, offline=True
        )
        for words, prepare in CACHES.items():
            yield Trial(f"{words}", subject, (READ_WHOLE,), prepare=prepare)
            # What needs no damaged file is still read.
            yield Trial(
                f"{words}, offline",
                subject,
                (WORLD, READ_WHOLE),
                None,
                None,
                {},
                prepare,
                None,
                True,
            )


BROKEN = {
    "silent": "no answer",
    "stall": "stalls in mid-content",
    "trickle": "5 bytes a second",
    "cut": "cut off in mid-content",
    "longer": "announced too long",
    "shorter": "half the content",
    "flip": "a byte changed",
    "etag": "another hash stated",
    "page": "a login page instead",
}


def _expected(how: str, subject: str) -> tuple[str, ...]:
    described = subject in ("description", "dataset's description")
    if how == "etag" and (described or subject == "header"):
        return (READ_WHOLE,)  # no hash is known of these
    if how == "flip" and described:
        return (WORLD, READ_WHOLE)  # nor can all be noticed
    if how == "trickle":
        return (WORLD, READ_WHOLE)  # a short content is soon there
    if subject == "header" and how == "flip":
        return (INPUT, WORLD)
    if subject == "header" and how == "shorter":
        return (INPUT, WORLD, READ_WHOLE)  # the header may be in the first half
    return (WORLD,)


def _keep(cache: Path) -> None:
    """Leave the cache as it is."""


def _blobs(cache: Path) -> list[Path]:
    return [b for b in cache.glob("hub/*/blobs/*") if b.is_file() and ".incomplete" not in b.name]


def _truncate(cache: Path) -> None:
    shutil.rmtree(cache / "datasets", ignore_errors=True)
    for blob in _blobs(cache):
        os.truncate(blob, blob.stat().st_size // 2)


def _spoil(cache: Path) -> None:
    shutil.rmtree(cache / "datasets", ignore_errors=True)
    for blob in _blobs(cache):
        content = bytearray(blob.read_bytes())
        content[len(content) // 2] ^= 1
        blob.write_bytes(content)


def _lose_blobs(cache: Path) -> None:
    shutil.rmtree(cache / "datasets", ignore_errors=True)
    for blob in _blobs(cache):
        blob.unlink()


def _lose_snapshots(cache: Path) -> None:
    shutil.rmtree(cache / "datasets", ignore_errors=True)
    for snapshots in cache.glob("hub/*/snapshots"):
        shutil.rmtree(snapshots)


CACHES = {
    "cache: files halved": _truncate,
    "cache: a byte changed in each file": _spoil,
    "cache: links without files": _lose_blobs,
    "cache: files without links": _lose_snapshots,
}


def write_repositories(root: Path) -> None:
    """Write a model in one file, one in shards, and a dataset."""
    from fusion_bench.weights import TensorWeights, write_checkpoint

    base = write_base(root / "base", weights="safetensors")
    vision = {
        key.removeprefix("vision_model."): value
        for key, value in base.items()
        if key.startswith("vision_model.") and value.is_floating_point()
    }
    one = root / "models" / "owner" / "one"
    write_vision_encoder(one, vision)
    sharded = root / "models" / "owner" / "sharded"
    sharded.mkdir(parents=True)
    shutil.copy(one / "config.json", sharded)
    write_checkpoint(TensorWeights(vision), sharded, max_shard_size=20_000)
    place, names = root / "datasets" / "owner" / "data", ["cat", "dog"]
    write_dataset(place, names, splits={"test": 9}, seed=1, info=True)


def attempt(trial: Trial, root: Path, warm: Path, cache: Path) -> dict[str, Any]:
    """Run one trial over the repositories at ``root``; return what became of it.

    ``warm`` is a cache that holds all of them, and ``cache`` where an empty one may lie.
    """
    if trial.prepare is not None:
        shutil.copytree(warm, cache, symlinks=True, dirs_exist_ok=True)
        trial.prepare(cache / "huggingface")
    with hub_stand_in(root) if trial.endpoint is None else nullcontext() as hub:
        if hub is not None and trial.how is not None:
            at = 12 if trial.subject == "header" and trial.how == "flip" else None
            hub.spoil(
                Fault(SUBJECTS[trial.subject], trial.how, trial.times, headers=trial.headers, at=at)
            )
        endpoint = trial.endpoint or hub.endpoint
        environment = client_environment(endpoint, cache / "huggingface", offline=trial.offline) | {
            "FUSION_BENCH_CACHE": str(cache / "own"),
            "HF_HUB_DOWNLOAD_TIMEOUT": str(TIMEOUT),
            "HF_HUB_ETAG_TIMEOUT": str(TIMEOUT),
            "HF_TOKEN": TOKEN,
            "OMP_NUM_THREADS": "1",
        }
        try:
            process = python(READ, trial.subject, env=environment, timeout=LIMIT)
        except TimeoutExpired:
            return {"outcome": "hung", "seconds": LIMIT, "said": ""}
        again = sum(f.met for f in hub.faults) if hub is not None else 0
    if process.returncode:
        return {"outcome": "traceback", "seconds": 0, "said": process.stderr[-4000:]}
    answer = json.loads(process.stdout.splitlines()[-1])
    said = answer["said"].replace(endpoint, "https://huggingface.co")
    outcome = READ_WHOLE if not answer["code"] else f"refused, {answer['code']}"
    if TOKEN in process.stdout + process.stderr:
        outcome = "told the token"
    if answer["code"] and ("\n" in said or not said):
        outcome = "not one line"
    return {
        "outcome": outcome,
        "seconds": answer["seconds"],
        "failed answers": again,
        "said": said,
        "result": answer["result"],
    }


def fill(root: Path, warm: Path) -> None:
    """Read everything once, so that there is a cache that holds all of it."""
    with hub_stand_in(root) as hub:
        environment = hub.environment(warm / "huggingface") | {
            "FUSION_BENCH_CACHE": str(warm / "own")
        }
        whole = READ + "\nfrom fusion_bench.weights import open_repository\n"
        whole += "open_repository(locate('owner/sharded')).files"
        for code, subject in [*((READ, subject) for subject in SUBJECTS), (whole, "index")]:
            done = python(code, subject, env=environment)
            assert done.returncode == 0, done.stderr
    # The caches are copied to other places, and what is remembered of a file is not.
    shutil.rmtree(warm / "own", ignore_errors=True)
