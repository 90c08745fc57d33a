"""Which strings a model's token ids mean, as the files of its tokenizer tell."""

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from fnmatch import fnmatch
from pathlib import Path
from typing import Any

from fusion_bench.problems import ConfigError
from fusion_bench.repository import Repository
from fusion_bench.storage import read_json

#: Files that hold a vocabulary, the one that tells most first.
_VOCABULARIES = (
    *("tokenizer.json", "vocab.json", "vocab.txt", "*token*.model", "sentencepiece*.model"),
    *("spiece.model", "spm.model", "tekken.json", "*.tiktoken"),
)
#: Files that may add tokens to it.
_ADDED = ("added_tokens.json", "tokenizer_config.json")
#: No tokenizer's file is as large.
_LARGEST = 500_000_000

#: Token ids to strings.
Tokens = dict[int, str]


class _UnreadError(Exception):
    """A vocabulary in a form that is not known here."""


@dataclass(frozen=True)
class Vocabulary:
    """The file of a tokenizer that holds its vocabulary, and those that add to it.

    Attributes:
        repository: where it is.
        files: the names of the files; of vocabularies every one that is there.
    """

    repository: Repository
    files: tuple[str, ...]
    _read: dict[str, Tokens] = field(default_factory=dict, compare=False, repr=False)

    @classmethod
    def of(cls, repository: Repository) -> "Vocabulary | None":
        """Return a model's; None where no tokenizer lies beside it."""
        found = [f for p in _VOCABULARIES for f in sorted(repository.files) if fnmatch(f, p)]
        return cls(repository, tuple(found)) if found else None

    @property
    def added(self) -> tuple[str, ...]:
        """The files beside it that may add tokens."""
        return tuple(name for name in _ADDED if name in self.repository.files)

    def common(self, other: "Vocabulary") -> str | None:
        """Return the file that tells most of those that another has too."""
        return next((file for file in self.files if file in other.files), None)

    def needed(self) -> list[str]:
        """Return the files that a comparison reads, as far as this one's tell."""
        return [self.files[0], *self.added]

    def fetch(self, name: str) -> Path:
        """Return the place of one of the files, with those beside it that may add tokens."""
        return self.repository.fetch(name, *self.added) / name

    def tokens(self, name: str) -> Tokens:
        """Return what ids mean by one of the files; read once, for it may be large."""
        if name not in self._read:
            self._read[name] = _tokens(self.fetch(name)) | self.additions(name)
        return self._read[name]

    def known(self) -> Tokens:
        """Return what ids mean by the file that tells most; nothing where it cannot be read."""
        try:
            return self.tokens(self.files[0])
        except _UnreadError:
            return {}

    def additions(self, name: str) -> Tokens:
        """Return the tokens that were added later, and take the place of any others."""
        place, tokens = self.fetch(name).parent, Tokens()
        for file in self.added:
            tokens |= _addition(read_json(place / file), file)
        return tokens


@dataclass(frozen=True)
class Comparison:
    """How a model's tokens differ from the reference's.

    Attributes:
        other: the ids that mean other strings, with the model's own and the reference's string.
        own: the ids that only the model has a string for, with that string.
        expected: the ids that only the reference has a string for, likewise.
    """

    other: Mapping[int, tuple[str, str]]
    own: Tokens
    expected: Tokens


def compare_tokens(own: Vocabulary, reference: Vocabulary) -> Comparison | None:
    """Compare what the ids of two tokenizers mean; None where their files cannot be compared.

    Raises:
        ConfigError: a damaged file, or one that is too large for a tokenizer's.
        EnvironmentProblem: a file that could not be fetched.
    """
    name = own.common(reference)
    if name is None:
        return None
    same = _content(own.fetch(name)) == _content(reference.fetch(name))
    try:
        if same and own.additions(name) == reference.additions(name):
            return Comparison({}, {}, {})
        first, second = own.tokens(name), reference.tokens(name)
    except _UnreadError:
        return None
    return Comparison(
        {i: (text, second[i]) for i, text in first.items() if second.get(i, text) != text},
        {i: text for i, text in first.items() if i not in second},
        {i: text for i, text in second.items() if i not in first},
    )


def _content(file: Path) -> bytes:
    if file.stat().st_size > _LARGEST:
        raise ConfigError(f"'{file}' is too large for a tokenizer's file. Fetch it again.")
    return file.read_bytes()


def _tokens(file: Path) -> Tokens:
    """Return what ids mean by the file of a vocabulary."""
    if file.suffix == ".model":
        return dict(enumerate(_pieces(_content(file))))
    if file.suffix == ".txt":
        lines = _content(file).decode(errors="replace").removesuffix("\n").split("\n")
        return {i: line.rstrip("\r") for i, line in enumerate(lines)}
    if file.suffix != ".json":
        raise _UnreadError
    content = read_json(file)
    try:
        return _of_tokenizer(content) if file.name == "tokenizer.json" else _turned(content)
    except (KeyError, TypeError, ValueError, AttributeError) as error:
        raise _UnreadError from error


def _of_tokenizer(content: Any) -> Tokens:
    vocabulary = content["model"]["vocab"]
    if isinstance(vocabulary, Mapping):
        tokens = _turned(vocabulary)
    else:  # a unigram model has pairs of a string and its score
        tokens = {i: _text(piece) for i, (piece, _) in enumerate(vocabulary)}
    added = content.get("added_tokens") or ()
    return tokens | {_index(token["id"]): _text(token["content"]) for token in added}


def _addition(content: Any, file: str) -> Tokens:
    try:
        if file == "added_tokens.json":
            return _turned(content)
        decoder = content.get("added_tokens_decoder") or {}
        return {int(i): _text(token["content"]) for i, token in decoder.items()}
    except (KeyError, TypeError, ValueError, AttributeError) as error:
        raise _UnreadError from error


def _turned(vocabulary: Mapping[str, Any]) -> Tokens:
    return {_index(i): text for text, i in vocabulary.items()}


def _index(value: Any) -> int:
    if not isinstance(value, int):
        raise _UnreadError
    return value


def _text(value: Any) -> str:
    if not isinstance(value, str):
        raise _UnreadError
    return value


def _pieces(content: bytes) -> Iterator[str]:
    """Yield the pieces of a sentencepiece model, which is a message of Protocol Buffers.

    Its first field is repeated: a message whose own first field is the string.
    """
    for number, piece in _fields(content):
        if number == 1:
            text = next((value for inner, value in _fields(piece) if inner == 1), None)
            if text is None:
                raise _UnreadError
            yield text.decode(errors="replace")


def _fields(message: bytes) -> Iterator[tuple[int, bytes]]:
    """Yield the number and the bytes of a message's fields; those of numbers are left empty."""
    at = 0

    def varint() -> int:
        nonlocal at
        value = shift = 0
        while True:
            if at >= len(message) or shift > 63:
                raise _UnreadError
            byte = message[at]
            at += 1
            value |= (byte & 127) << shift
            shift += 7
            if byte < 128:
                return value

    while at < len(message):
        field, kind = divmod(varint(), 8)
        if kind == 0:
            varint()
            yield field, b""
            continue
        size = {1: 8, 5: 4}.get(kind)
        if size is None:
            if kind != 2:
                raise _UnreadError
            size = varint()
        if at + size > len(message):
            raise _UnreadError
        yield field, message[at : at + size]
        at += size
