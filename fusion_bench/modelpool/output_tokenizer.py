"""The tokenizer of a merged model, made of those of its inputs."""

import json
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import TYPE_CHECKING, Any, cast

from fusion_bench.pretrained import from_pretrained
from fusion_bench.problems import FusionBenchError
from fusion_bench.storage import read_json, write_text
from fusion_bench.tokenizer import TokenizerSource

if TYPE_CHECKING:
    from tokenizers import AddedToken
    from transformers import PreTrainedTokenizerBase

#: Read and written with a new tokenizer: words, code, and letters of several scripts.
SAMPLE = (
    "The quick brown fox doesn't jump over 13 lazy dogs, does it?",
    "def square(x):\n    return x ** 2  # the area",
    "Größe, naïve café: язык, 数学 🙂",
)
#: Keys of a tokenizer's config that name tokens with a meaning.
_SPECIAL = (
    "bos_token",
    "eos_token",
    "unk_token",
    "sep_token",
    "pad_token",
    "cls_token",
    "mask_token",
)


@dataclass(frozen=True)
class ModelTokens:
    """A model's tokens that have a row.

    Attributes:
        name: what the pool calls it.
        source: its tokenizer.
        rows: how many rows its entries by token have.
    """

    name: str
    source: TokenizerSource
    rows: int

    @property
    def tokenizer(self) -> "PreTrainedTokenizerBase":
        """Its tokenizer, which nobody may change."""
        return self.source.tokenizer

    @cached_property
    def everything(self) -> dict[str, int]:
        """Each token's id, with and without a row."""
        return dict(self.tokenizer.get_vocab())

    @cached_property
    def texts(self) -> dict[int, str]:
        """The token of each id."""
        return {i: token for token, i in self.everything.items()}

    @cached_property
    def ids(self) -> dict[str, int]:
        """The id of each token that has a row, in their order."""
        ordered = sorted(self.everything.items(), key=lambda item: item[1])
        return {token: i for token, i in ordered if i < self.rows}

    @cached_property
    def added(self) -> "dict[str, AddedToken]":
        """Added and special tokens that have a row, with their settings."""
        found: Mapping[int, Any] = self.tokenizer.added_tokens_decoder
        return {str(token.content): token for i, token in sorted(found.items()) if i < self.rows}


@dataclass(frozen=True)
class Made:
    """A new tokenizer.

    Attributes:
        tokenizer: the tokenizer, which nobody may change.
        ids: each token's id, in their order.
        appended: how many tokens of each model were appended, and under '' those that the config
            names and no model has.
        left_out: tokens that were left out, as they have no row.
    """

    tokenizer: "PreTrainedTokenizerBase"
    ids: Mapping[str, int]
    appended: Mapping[str, int] = field(default_factory=dict)
    left_out: Sequence[str] = ()


def make(
    begin: TokenizerSource,
    models: Sequence[ModelTokens],
    tokens: Iterable[str],
    *,
    rows: int | None,
    union: bool,
    template: str | None,
) -> Made:
    """Return a tokenizer that begins with another's ids, unchanged.

    Args:
        begin: the other.
        models: the models, of which ``union`` appends what is new: one by one their ordinary
            tokens in the order of their ids, then their added and special tokens.
        tokens: are appended where they are new, with the settings that the first model has for
            them.
        rows: leave out tokens with ids from there on.
        union: append the models' tokens.
        template: the chat template, in place of its own.

    Raises:
        FusionBenchError: it cannot be cut at ``rows``, or it was not saved as it is.
    """
    with TemporaryDirectory() as folder:
        place = Path(folder)
        begin.tokenizer.save_pretrained(place)
        left_out = [] if rows is None else _cut(place, rows)
        made = _load(place)
    added: dict[str, Any] = {}
    for model in models:
        added = {**model.added, **added}
    appended: dict[str, int] = {}

    def append(name: str, new: Iterable[Any]) -> None:
        before = len(made)
        made.add_tokens(list(new))
        if len(made) > before:
            appended[name] = appended.get(name, 0) + len(made) - before

    if union:
        for model in models:
            known = made.get_vocab()
            append(model.name, (t for t in model.ids if t not in known and t not in added))
        for model in models:
            own = {str(token.content) for token in made.added_tokens_decoder.values()}
            append(model.name, (added[token] for token in model.added if token not in own))
    known = made.get_vocab()
    for token in tokens:
        if token not in known:
            owner = next((model.name for model in models if token in model.ids), "")
            append(owner, [added.get(token, token)])
    if template is not None:
        made.chat_template = template
    ids = dict(sorted(made.get_vocab().items(), key=lambda item: item[1]))
    return Made(made, ids, appended, left_out)


def check_saved(
    folder: Path, made: "PreTrainedTokenizerBase", donor: "PreTrainedTokenizerBase", rows: int
) -> list[str]:
    """Encode and decode a sample text with a saved tokenizer, and with that which it began with.

    Args:
        folder: where it was saved.
        made: what was saved.
        donor: the tokenizer that it began with.
        rows: how many rows the merged model has.

    Returns:
        What differs, in sentences.

    Raises:
        FusionBenchError: it reads otherwise than before it was saved, gives ids without a row, or
            loses text that the other keeps.
    """
    saved, notes, counts = _load(folder), [], [0, 0]
    if saved.get_vocab() != made.get_vocab():
        raise _changed("it has other tokens")
    for text in SAMPLE:
        ids, before = saved.encode(text), donor.encode(text)
        if ids != made.encode(text):
            raise _changed(f"it reads {text!r} otherwise")
        if max(ids, default=0) >= rows:
            token = saved.convert_ids_to_tokens(max(ids))
            raise FusionBenchError(
                f"this tokenizer puts {token!r} (id {max(ids)}) into texts, for which there is no "
                f"row: there are {rows}.",
                "Give {here}tokenizer=union, or the name of a model whose tokenizer has rows.",
                place=("tokenizer",),
            )
        counts = [counts[0] + len(before), counts[1] + len(ids)]
        decoded, expected = _decoded(saved, ids), _decoded(donor, before)
        if _letters(decoded) != _letters(text) == _letters(expected):
            raise FusionBenchError(
                f"the merged tokenizer makes {decoded!r} of {text!r}.",
                "Give another {here}tokenizer: the tokens of these models do not go together.",
                place=("tokenizer",),
            )
        if decoded != expected:
            notes.append(f"Of {text!r} the merged tokenizer makes {decoded!r}, not {expected!r}.")
    if counts[0] != counts[1]:
        notes.append(
            f"A sample text has {counts[1]} tokens; by the tokenizer that the merged one begins "
            f"with it has {counts[0]}."
        )
    return notes


def _changed(what: str) -> FusionBenchError:
    return FusionBenchError(
        f"the merged tokenizer is another when it is read from its files: {what}.",
        "Give another {here}tokenizer.",
        place=("tokenizer",),
    )


def _load(folder: Path) -> "PreTrainedTokenizerBase":
    from transformers import AutoTokenizer

    return cast("PreTrainedTokenizerBase", from_pretrained(AutoTokenizer, folder, model=False))


def _decoded(tokenizer: "PreTrainedTokenizerBase", ids: list[int]) -> str:
    return str(tokenizer.decode(ids, skip_special_tokens=True))


def _letters(text: str) -> str:
    return "".join(text.split())


def _cut(folder: Path, rows: int) -> list[str]:
    """Leave out of a saved tokenizer what has ids from ``rows`` on; return these tokens.

    Raises:
        FusionBenchError: they are in a file of another kind.
    """
    file = folder / "tokenizer.json"
    if not file.exists():
        over = [token for token, i in _load(folder).get_vocab().items() if i >= rows]
        if not over:
            return []
        raise FusionBenchError(
            f"its tokenizer has {len(over)} tokens without a row, and has no tokenizer.json that "
            f"could be written without them: {over[0]!r}.",
            "Give {here}tokenizer=union, which keeps them.",
            place=("tokenizer",),
        )
    content = read_json(file)
    vocabulary = content["model"]["vocab"]
    added = content.get("added_tokens") or []
    unigram = isinstance(vocabulary, list)  # pairs of a token and its score, by their ids
    pairs = (
        enumerate(token for token, _ in vocabulary)
        if unigram
        else ((i, token) for token, i in vocabulary.items())
    )
    ids = {token: i for i, token in pairs} | {each["content"]: each["id"] for each in added}
    out = {token: i for token, i in ids.items() if i >= rows}
    if not out:
        return []
    content["added_tokens"] = [each for each in added if each["content"] not in out]
    kept = vocabulary[:rows] if unigram else {t: i for t, i in vocabulary.items() if i < rows}
    content["model"]["vocab"] = kept
    if "merges" in content["model"]:
        content["model"]["merges"] = [
            merge for merge in content["model"]["merges"] if _is_possible(merge, kept)
        ]
    write_text(file, json.dumps(content, ensure_ascii=False))
    _forget(folder / "tokenizer_config.json", out)
    return sorted(out, key=lambda token: out[token])


def _is_possible(merge: Any, vocabulary: Mapping[str, int]) -> bool:
    parts = merge.split(" ") if isinstance(merge, str) else merge
    return all(token in vocabulary for token in (*parts, "".join(parts)))


def _forget(file: Path, tokens: Mapping[str, int]) -> None:
    """Take tokens out of a tokenizer's config: read with them, they would be appended again."""
    config = read_json(file) if file.exists() else {}
    config.pop("added_tokens_decoder", None)
    for key in list(config):
        value = config[key]
        if key in _SPECIAL and _content(value) in tokens:
            del config[key]
        elif isinstance(value, list):
            config[key] = [each for each in value if _content(each) not in tokens]
        elif isinstance(value, dict):
            config[key] = {k: v for k, v in value.items() if _content(v) not in tokens}
    write_text(file, json.dumps(config, ensure_ascii=False, indent=2))


def _content(token: Any) -> Any:
    """Return the text of a token in a config, which may stand there with its settings."""
    found = token.get("content") if isinstance(token, dict) else token
    return found if isinstance(found, str) else None
