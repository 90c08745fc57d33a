"""Upload a merged model to the Hugging Face Hub, with a complete model card.

The repository is private unless you say otherwise. Only the files of a merged model are sent, and
none that holds what looks like a token.
"""

from argparse import ArgumentParser, Namespace
from pathlib import Path

EXAMPLES = """
fusion_bench push merged owner/name --dry-run
fusion_bench push merged owner/name
fusion_bench push merged owner/name --public
fusion_bench push merged owner/name --report outputs/2026-01-31/12-00-00/report.json
"""


def add_arguments(parser: ArgumentParser) -> None:
    """Add the options."""
    parser.add_argument("folder", type=Path, metavar="DIR", help="the merged model's folder")
    parser.add_argument("repository", metavar="REPO", help="where it goes, as owner/name")
    parser.add_argument("--public", action="store_true", help="let everybody read it")
    parser.add_argument(
        "--overwrite", action="store_true", help="replace what is in the repository"
    )
    parser.add_argument(
        "--report", type=Path, metavar="FILE", help="a report.json whose table goes into the card"
    )
    parser.add_argument(
        "--dry-run", action="store_true", help="show the files and the card, and send nothing"
    )


def run(arguments: Namespace) -> None:
    """Send the model, or show what would be sent.

    Raises:
        FusionBenchError: it cannot be sent.
    """
    from rich.filesize import decimal

    from fusion_bench.programs.sharing import packed, sent
    from fusion_bench.shown import visible

    package = packed(arguments.folder, arguments.repository, arguments.report)
    total = decimal(sum(package.files.values()))
    for name, size in package.files.items():
        print(f"{decimal(size):>10}  {visible(name)}")
    print(f"{total:>10}  in all")
    for note in package.notes:
        print(f"Note: {visible(note)}")
    if arguments.dry_run:
        print(f"\nThe card:\n\n{visible(package.card)}")
        access = "public" if arguments.public else "private"
        print(f"Dry run: nothing was sent to '{package.repository}' ({access}).")
        return
    where = sent(package, public=arguments.public, overwrite=arguments.overwrite)
    print(f"Sent to {where}")
