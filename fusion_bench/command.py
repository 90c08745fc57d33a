"""Access to the command line as it was typed."""

import re
import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from contextvars import ContextVar
from errno import ENAMETOOLONG
from pathlib import Path

from fusion_bench.problems import FusionBenchError

#: Config groups whose files a run can be made of.
_GROUPS = ("method", "modelpool", "taskpool", "fabric")
_OTHERS = ("dataset", "suite", "launcher", "hydra")
#: What is in a whole config, and in no choice of these groups.
_WHOLE = re.compile(r"^(_target_:.*\bprograms\.|(method|modelpool|taskpool):)", re.MULTILINE)
#: Options whose value is the next word.
_TAKE_A_VALUE = (
    *("--config-path", "-cp", "--config-name", "-cn", "--config-dir", "-cd"),
    *("--cfg", "-c", "--package", "-p", "--info", "-i", "--allow", "--plugins"),
)
_typed: ContextVar[tuple[str, ...] | None] = ContextVar("_typed", default=None)


def typed() -> list[str]:
    """Return the words of this process's command as they were typed, beginning with its name."""
    words = _typed.get()
    return list(sys.argv if words is None else words)


def overrides() -> dict[str, str]:
    """Return the typed config keys, without ``+``, and their values."""
    pairs = (word.lstrip("+").partition("=") for word in typed()[1:])
    return {key: value for key, equals, value in pairs if equals}


def is_there(word: str | Path) -> bool:
    """Tell whether there is such a file or folder; what is too long for a name is none."""
    try:
        return Path(word).exists()
    except OSError as error:
        if error.errno != ENAMETOOLONG:
            raise
        return False


def file_as_options(words: Sequence[str]) -> list[str]:
    """Return the words with Hydra's options in the place of a config file, which has no flag.

    A file of a config group, such as ``config/method/ties_merging.yaml``, is run in the config that
    goes best with it.

    Raises:
        FusionBenchError: a file that is a part of a config, of which no run is made.
    """
    for place, word in enumerate(words):
        if not word.endswith((".yaml", ".yml")) or word.startswith(("-", "~")):
            continue
        if place and words[place - 1] in _TAKE_A_VALUE:
            continue
        file = Path(word)
        if "=" in word and not is_there(file):
            continue
        folder, name, choice = _of_group(file) or (file.parent, file.stem, [])
        options = ["--config-path", str(folder), "--config-name", name, *choice]
        return [*words[:place], *options, *words[place + 1 :]]
    return list(words)


def _of_group(file: Path) -> tuple[Path, str, list[str]] | None:
    """Return folder, config and choice that run a part of a config; ``None`` for a whole one.

    Raises:
        FusionBenchError: a part that no run is made of.
    """
    groups = [above for above in file.absolute().parents if above.name in (*_GROUPS, *_OTHERS)]
    if not groups or not is_there(file) or not file.is_file():
        return None
    text = file.read_text(encoding="utf-8", errors="replace")
    if _WHOLE.search(text):
        return None
    *_, group = groups
    choice = file.absolute().relative_to(group).with_suffix("").as_posix()
    if group.name in _OTHERS:
        if re.search("^defaults:", text, re.MULTILINE):
            return None
        raise FusionBenchError(
            f"'{file}' is a part of a config, a choice of the group '{group.name}'.",
            "Name it in the defaults list of a config, and run that.",
        )
    config = "fabric_model_fusion"
    if group.name.endswith("pool") and not choice.startswith(("CLIP", "Image")):
        config = "merge_llm" if group.name == "modelpool" else "demo_language"
    return group.parent, config, [f"{group.name}={choice}"]


def option(*flags: str) -> list[str]:
    """Return the typed values of an option, given as ``flag value`` or ``flag=value``."""
    words, found = file_as_options(typed()[1:]), []
    for position, word in enumerate(words):
        name, equals, value = word.partition("=")
        if name in flags and (equals or position + 1 < len(words)):
            found.append(value if equals else words[position + 1])
    return found


@contextmanager
def replaced(words: Sequence[str]) -> Iterator[None]:
    """Let libraries read ``words`` instead; this module still returns what was typed."""
    before = sys.argv
    token = _typed.set(tuple(before))
    sys.argv = [before[0], *words]
    try:
        yield
    finally:
        sys.argv = before
        _typed.reset(token)
