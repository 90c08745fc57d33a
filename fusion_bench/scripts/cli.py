"""The command line: verbs for people, and everything that Hydra understands."""

import os
import sys
from pathlib import Path

from fusion_bench import __version__
from fusion_bench.command import file_as_options, is_there, typed
from fusion_bench.problems import FusionBenchError, did_you_mean
from fusion_bench.scripts import verbs
from fusion_bench.scripts.lightning_alone import import_fabric_alone
from fusion_bench.scripts.process import leave_working_directory, plain_messages
from fusion_bench.shown import set_up_streams


def main() -> None:
    """Run the command line; what went wrong is said in a message and by the exit code.

    With ``HYDRA_FULL_ERROR=1`` it prints the traceback, which is otherwise only in the log.
    """
    if "_ARGCOMPLETE" in os.environ:  # a shell asks what comes next
        from fusion_bench.scripts.completion import complete

        complete()
    if "OMP_WAIT_POLICY" not in os.environ:
        # OpenMP's threads spin while they wait. Beside a busy neighbour that takes three times as
        # long; so few turns cost nothing on an idle machine. It is read when torch is imported.
        os.environ.setdefault("GOMP_SPINCOUNT", "10000")
    show_traceback = os.environ.get("HYDRA_FULL_ERROR") == "1"
    set_up_streams()
    words = typed()[1:]
    with plain_messages(show_traceback):
        if words in (["--help"], ["-h"], ["help"]):
            print(verbs.page())
        elif words in (["--version"], ["-V"]):
            print(f"fusion_bench {__version__}")
        else:
            leave_working_directory()
            import_fabric_alone()
            sys.exit(_run(words, show_traceback))


def _run(words: list[str], show_traceback: bool) -> int | None:
    from fusion_bench.scripts.interrupt import interruptible
    from fusion_bench.trust import take_options

    words = take_options(words)
    with interruptible():
        if words and words[0] in verbs.VERBS:
            return verbs.run(words[0], words[1:])
        if words:
            _check_first(words[0])
        from fusion_bench.scripts.run import run_composed

        run_composed(file_as_options(words), show_traceback)
        return None


def _check_first(word: str) -> None:
    """Refuse a first word that is neither a verb, nor a file, nor anything of Hydra's.

    Raises:
        FusionBenchError: a mistyped verb, or a file that is not there.
    """
    if "=" in word or word.startswith(("-", "~", "+")):
        return
    path = Path(word)
    if path.suffix not in (".yaml", ".yml"):
        near = did_you_mean(word.lower(), verbs.VERBS)
        raise FusionBenchError(
            f"There is no verb '{word}'.", f"{near} 'fusion_bench --help' explains each."
        )
    if not is_there(path) or not path.is_file():
        what = "is a folder" if is_there(path) else "is not there"
        raise FusionBenchError(f"'{word}' {what}.", "Name a YAML file.")
    if path.suffix == ".yml":
        raise FusionBenchError(
            f"'{word}': configs are composed of .yaml files.",
            f"Rename it to '{path.with_suffix('.yaml')}'.",
        )


if __name__ == "__main__":
    main()
