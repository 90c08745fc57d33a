"""Write one page over all results below a folder: runs, leaderboards, sweeps, studies.

The page needs no server and no network. Filter and sort the runs, select two to see them side by
side, or more for their leaderboard. Files that cannot be read are listed with the reason.
"""

from argparse import ArgumentParser, Namespace
from pathlib import Path

EXAMPLES = """
fusion_bench index                         all runs below this folder: index.html
fusion_bench index outputs                 outputs/index.html
fusion_bench index multirun --out all.html
"""


def add_arguments(parser: ArgumentParser) -> None:
    """Add the folder and the page."""
    parser.add_argument(
        "folder",
        nargs="?",
        type=Path,
        default=Path(),
        metavar="DIR",
        help=("the folder (default: this one)"),
    )
    parser.add_argument(
        "--out", type=Path, metavar="FILE", help="the page (default: DIR/index.html)"
    )
    parser.add_argument(
        "--overwrite", action="store_true", help="replace a file that is not such a page"
    )


def run(arguments: Namespace) -> None:
    """Write the page and say what is on it.

    Raises:
        FusionBenchError: there is no such folder, nothing is below it, or the file is another's.
    """
    from fusion_bench.problems import ConfigError
    from fusion_bench.report.index import index
    from fusion_bench.report.index_page import check_free, save
    from fusion_bench.storage import disk_failures

    folder: Path = arguments.folder
    file: Path = arguments.out or folder / "index.html"
    if not folder.is_dir():
        raise ConfigError(f"There is no folder '{folder}'.", "Name one that contains runs.")
    with disk_failures():
        check_free(file, overwrite=arguments.overwrite)
        found = index(folder)
        if not (found.runs or found.collections or found.unreadable):
            raise ConfigError(
                f"There is no report.json below '{folder}'.", "Name a folder that contains runs."
            )
        save(found, file, overwrite=arguments.overwrite)
    parts = [_number(len(found.runs), "run")]
    if found.collections:
        parts.append(f"{len(found.collections)} of sweeps, studies and comparisons")
    if found.unreadable:
        parts.append(f"{_number(len(found.unreadable), 'file')} that cannot be read")
    print(f"{file}: {', '.join(parts)}.")


def _number(count: int, word: str) -> str:
    return f"{count:,} {word}" if count == 1 else f"{count:,} {word}s"
