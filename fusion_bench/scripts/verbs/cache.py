"""Show what is kept between runs: where, how much, and what for. 'prune' removes what is not used.

Whatever is removed is computed again when it is needed. The folder is FUSION_BENCH_CACHE, if that
is set. Models and datasets of the Hub are kept by its own library: 'hf cache' manages them.
"""

import shutil
import time
from argparse import ArgumentParser, Namespace
from collections.abc import Iterator
from pathlib import Path

EXAMPLES = """
fusion_bench cache
fusion_bench cache prune --dry-run
fusion_bench cache prune --days 7
fusion_bench cache prune --days 0 images
"""
#: The folders, what is in them, and how deep their parts lie that are used and removed as a whole.
PARTS = {
    "zoo": ("built models, with their datasets", 1),
    "images": ("prepared images of evaluated tasks", 1),
    "heads": ("zero-shot heads", None),
    "scores": ("scores of evaluated models, sample by sample", None),
    "requests": ("answers of language models", None),
    "similarity": ("similarities of task vectors", None),
    "facts": ("what libraries told of tokenizers, texts and classes", None),
    "pictures": ("plots of reports", None),
    "merges": ("hashes of merged models in scaling studies", None),
    "file_sha256": ("hashes of checkpoints' files", None),
    "results": ("scores as earlier versions kept them", None),
}


def add_arguments(parser: ArgumentParser) -> None:
    """Add the action, the parts and the age."""
    parser.add_argument("action", nargs="?", choices=["show", "prune"], default="show")
    parser.add_argument(
        "parts", nargs="*", default=[], metavar="PART", help="of the table; default: all"
    )
    parser.add_argument(
        "--days", type=float, default=30, help="remove what was not used for so long; default: 30"
    )
    parser.add_argument("--dry-run", action="store_true", help="only say what would be removed")


def run(arguments: Namespace) -> None:
    """Show or prune.

    Raises:
        FusionBenchError: a part that there is not, or a negative age.
    """
    from fusion_bench.problems import FusionBenchError, did_you_mean
    from fusion_bench.storage import cache_dir

    for part in arguments.parts:
        if part not in PARTS:
            raise FusionBenchError(f"the cache has no part '{part}'.", did_you_mean(part, PARTS))
    if not arguments.days >= 0:
        raise FusionBenchError(f"--days: {arguments.days:g} is negative.")
    root = cache_dir()
    parts = arguments.parts or list(PARTS)
    if arguments.action == "show":
        _show(root, parts)
    else:
        _prune(root, parts, time.time() - 86_400 * arguments.days, arguments.dry_run)


def _show(root: Path, parts: list[str]) -> None:
    from fusion_bench.scripts.verbs.ls import print_table

    sizes = {part: [_size(entry) for entry in _entries(root, part)] for part in parts}
    rows = [(p, str(len(own)), _readable(sum(own)), PARTS[p][0]) for p, own in sizes.items() if own]
    total = sum(map(sum, sizes.values()))
    print(f"{root}: {_readable(total)}" if rows else f"{root}: nothing is kept yet.")
    if rows:
        print_table([("part", "entries", "size", "what"), *rows])


def _prune(root: Path, parts: list[str], before: float, dry_run: bool) -> None:
    """Remove each entry whose files were all last used before a time."""
    removed, freed = 0, 0
    for part in parts:
        for entry in list(_entries(root, part)):
            if _last_used(entry) > before:
                continue
            removed, freed = removed + 1, freed + _size(entry)
            if dry_run:
                print(entry.relative_to(root))
            elif entry.is_dir():
                shutil.rmtree(entry, ignore_errors=True)
            else:
                entry.unlink(missing_ok=True)
    done = "would be removed" if dry_run else "removed"
    print(f"{removed} {'entry' if removed == 1 else 'entries'} {done}: {_readable(freed)}.")


def _entries(root: Path, part: str) -> Iterator[Path]:
    """Yield what of a part is used as a whole: a folder, or a file with others of its name."""
    folder = root / part
    if not folder.is_dir():
        return
    depth = PARTS[part][1]
    for path in sorted(folder.iterdir() if depth else folder.rglob("*")):
        if path.is_symlink() or path.suffix == ".lock":
            continue
        if depth or path.is_file():
            yield path


def _files(entry: Path) -> Iterator[Path]:
    inside = entry.rglob("*") if entry.is_dir() else (entry,)
    return (path for path in inside if path.is_file())


def _size(entry: Path) -> int:
    return sum(path.lstat().st_size for path in _files(entry))


def _last_used(entry: Path) -> float:
    """Return when a file of it was last read or written."""
    found = [path.lstat() for path in _files(entry)] or [entry.lstat()]
    return max(max(each.st_mtime, each.st_atime) for each in found)


def _readable(count: float) -> str:
    for unit in ("bytes", "kB", "MB"):
        if count < 1000:
            return f"{count:.0f} {unit}"
        count /= 1000
    return f"{count:.1f} GB"
