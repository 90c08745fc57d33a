"""Damaged and crafted files, thousands of each kind, and what becomes of those who read them.

What the files are and how they are read is in ``tests/fixtures_fuzz.py``. It may take 4 GiB
of addresses beside what it begins with, and ends if one file keeps it busy for a minute.
"""

import faulthandler
import itertools
import json
import os
import resource
import shutil
import sys
import tempfile
import time
import traceback
from collections import Counter
from pathlib import Path
from typing import Any

from measure import machine

ROOT = Path(__file__).parents[1]
sys.path.insert(0, str(ROOT / "tests"))

os.environ |= {"HF_HUB_OFFLINE": "1", "HF_HUB_DISABLE_TELEMETRY": "1"}

from fixtures_fuzz import KINDS, Files, Watch, attempt, write_secrets  # noqa: E402
from hypothesis import HealthCheck, Phase, given, settings  # noqa: E402
from hypothesis import seed as seeded  # noqa: E402

#: What part of the cases is of a kind; those that draw pictures take long.
SHARES = {
    "safetensors": 6,
    "index of shards": 5,
    "config.json": 4,
    "LoRA adapter": 4,
    "pickled weights": 5,
    "report and answers, shown as a page": 1,
    "report and answers, compared": 1,
    "config": 3,
    "dataset card": 3,
    "metadata file": 3,
    "image bytes": 3,
    "tokenizer files": 3,
}
MEMORY = 4 * 2**30
BUSY = 60


def run(
    count: int | None, seed: int, workdir: Path | None, results: Path, kinds: list[str]
) -> None:
    """Read ``count`` files, 17,100 by default, and write the table.

    Args:
        count: how many cases in all, were all kinds read.
        seed: of the random ones.
        workdir: where they are written; a temporary directory by default.
        results: where the table goes.
        kinds: those to read; the table's other rows stay. By default all.
    """
    shares = {name: share for name, share in SHARES.items() if not kinds or name in kinds}
    addresses = int(Path("/proc/self/statm").read_text().split()[0]) * resource.getpagesize()
    resource.setrlimit(resource.RLIMIT_AS, (addresses + MEMORY, resource.RLIM_INFINITY))
    table: dict[str, Any] = {}
    wrong: list[str] = []
    with tempfile.TemporaryDirectory() as temporary:
        os.environ["FUSION_BENCH_CACHE"] = str(Path(temporary) / "cache")
        place = Path(workdir or temporary)
        place.mkdir(parents=True, exist_ok=True)
        write_secrets(place)
        for name, share in shares.items():
            cases = -(-(count or 17_100) * share // sum(SHARES.values()))
            table[name] = _fuzz(name, cases, seed, place, wrong)
            print(name, table[name], flush=True)
    _write(table, seed, results)
    for text in wrong[:20]:
        print(text)
    if wrong:
        sys.exit(f"{len(wrong)} cases ended otherwise than with an error of the project's own")


def _fuzz(name: str, cases: int, seed: int, place: Path, wrong: list[str]) -> dict[str, Any]:
    kind, watch = KINDS[name], Watch()
    outcomes: Counter[str] = Counter()
    slowest = 0.0
    numbers = itertools.count()

    @seeded(seed)
    @settings(
        max_examples=cases,
        database=None,
        deadline=None,
        phases=[Phase.generate],
        suppress_health_check=list(HealthCheck),
    )
    @given(kind.files)
    def try_all(files: Files) -> None:
        nonlocal slowest
        directory = place / f"case-{next(numbers)}"
        directory.mkdir()
        faulthandler.dump_traceback_later(BUSY, exit=True)
        start = time.perf_counter()
        try:
            outcomes[attempt(kind, files, directory, watch)] += 1
        except Exception:
            outcomes["wrong"] += 1
            shown = {file: content[:2000] for file, content in files.items()}
            wrong.append(f"{name}: {traceback.format_exc()}\n{shown}")
        slowest = max(slowest, time.perf_counter() - start)
        faulthandler.cancel_dump_traceback_later()
        shutil.rmtree(directory)

    try_all()
    total = sum(outcomes.values())
    refused = total - outcomes["read"] - outcomes["wrong"]
    return {
        "cases": total,
        "refused": refused,
        "read, for nothing was wrong": outcomes["read"],
        "ended otherwise": outcomes["wrong"],
        "slowest, s": round(slowest, 1),
    }


def _write(table: dict[str, Any], seed: int, results: Path) -> None:
    where = machine()
    file = results / "faults_fuzz.json"
    known = json.loads(file.read_text())["kinds"] if len(table) < len(SHARES) else {}
    table = {name: (known | table)[name] for name in SHARES if name in known | table}
    cases = sum(row["cases"] for row in table.values())
    content = {"machine": where, "seed": seed, "cases": cases, "kinds": table}
    file.write_text(json.dumps(content, indent=1) + "\n")
    columns = list(next(iter(table.values())))
    lines = [
        f"Measured by `benchmarks/faults.py fuzz` on {where}: {cases:,} cases, seed {seed}.",
        "",
        "| files | " + " | ".join(columns) + " |",
        "| --- |" + " ---: |" * len(columns),
        *(f"| {name} | {' | '.join(map(str, row.values()))} |" for name, row in table.items()),
    ]
    (results / "faults_fuzz.md").write_text("\n".join(lines) + "\n")
