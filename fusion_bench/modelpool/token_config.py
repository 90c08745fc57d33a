"""A model's config for another tokenizer: the number of its tokens, and their ids."""

import re
from collections.abc import Callable
from typing import Any

from fusion_bench.weights import Config

#: Keys whose values are ids of tokens.
_IDS = re.compile(
    r"\w+_token_(id|index)s?|(begin_)?suppress_tokens|bad_words_ids|forced_decoder_ids"
)


def for_tokens(
    config: Config, old: int | None, new: int, moved: Callable[[str, int], int | None]
) -> dict[str, Any]:
    """Return a config, at any depth, with another number of tokens and their new ids.

    Args:
        config: the content of a ``config.json`` or ``generation_config.json``.
        old: the number of tokens; each ``vocab_size`` that is the same becomes ``new``.
        new: the new number.
        moved: returns the new id for a key and an id; None where there is none.
    """

    def changed(key: str, value: Any) -> Any:
        if isinstance(value, dict):
            return {name: changed(name, own) for name, own in value.items()}
        if key == "vocab_size" and value == old:
            return new
        return _ids(key, value) if _IDS.fullmatch(str(key)) else value

    def _ids(key: str, value: Any) -> Any:
        if isinstance(value, list):
            known = [_ids(key, own) for own in value]
            return [own for own in known if own is not None and own != []]
        plain = isinstance(value, int) and not isinstance(value, bool) and value >= 0
        return moved(key, value) if plain else value

    return {key: changed(key, value) for key, value in config.items()}
