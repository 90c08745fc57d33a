"""Short names for models, by the ends of their paths."""

import re
from collections import Counter
from collections.abc import Collection
from pathlib import PurePosixPath

from fusion_bench.problems import ConfigError


def named_after(paths: Collection[str]) -> dict[str, str]:
    """Return paths or Hub names by the shortest end of each that no other has.

    Raises:
        ConfigError: the same path twice.
    """
    if len(set(paths)) < len(paths):
        raise ConfigError("the same model twice.", "Remove one.")
    plain = {path: re.sub(r"@[^+]*", "", path.removeprefix("zoo:")) for path in paths}
    shared = Counter(plain.values())
    parts = {
        path: PurePosixPath(name if shared[name] == 1 else path.removeprefix("zoo:")).parts
        for path, name in plain.items()
    }
    named: dict[str, str] = {}
    for path, own in parts.items():
        others = [other for key, other in parts.items() if key != path]
        count = next(
            (n for n in range(1, len(own)) if all(own[-n:] != other[-n:] for other in others)),
            len(own),
        )
        name = "-".join(part.strip("/") for part in own[-count:] if part.strip("/"))
        # Underscores around a name have a meaning, and other signs Hydra cannot take.
        named[re.sub(r"[^\w.-]+", "-", name).strip("_-") or "model"] = path
    return named
