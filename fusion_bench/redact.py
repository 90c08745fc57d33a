"""Keeps tokens and passwords out of configs, logs and messages."""

import logging
import os
import re
from collections.abc import Iterator, Mapping
from typing import Any

_HIDDEN = "***"
#: What tokens of well-known services, and passwords in addresses, look like.
_TOKEN = re.compile(
    r"hf_\w{16,}|gh[a-z]_\w{20,}|github_pat_\w{20,}|glpat-[\w-]{16,}|sk-[\w-]{20,}|xox[a-z]-[\w-]{10,}"
    r"|AKIA[0-9A-Z]{16}|(?<=://)[^/\s:@]*:[^/\s@]+(?=@)|(?<=[?&]token=)[^&\s]+"
    r"|(?<=Signature=)[^&\s]+|(?<=Bearer )[\w.~+/=-]{8,}"
)
_SECRET_KEY = re.compile(
    r"((hf|hub|auth|use_auth|access|api|github|bearer)[_-]?)?token"
    r"|(.*[_-])?(passw(or)?d|secret|api[_-]?key|access[_-]?key|credentials?)",
    re.I,
)
#: Where the Hub's client finds its token.
_TOKEN_VARIABLES = ("HF_TOKEN", "HUGGING_FACE_HUB_TOKEN")


def redacted(text: str) -> str:
    """Return a text with its tokens replaced."""
    for variable in _TOKEN_VARIABLES:
        value = os.environ.get(variable, "").strip()
        if len(value) >= 8:
            text = text.replace(value, _HIDDEN)
    return _TOKEN.sub(_HIDDEN, text)


def secret_keys(node: Any, key: str = "") -> Iterator[str]:
    """Yield the keys of a config with a token or a password in plain text."""
    if isinstance(node, Mapping):
        for name, child in node.items():
            place = f"{key}.{name}" if key else str(name)
            shown = isinstance(child, str) and child and "${" not in child
            word = name == "token" and node.get("kind") == "model_token"  # of a vocabulary
            if shown and not word and _SECRET_KEY.fullmatch(str(name)):
                yield place
            else:
                yield from secret_keys(child, place)
    elif isinstance(node, list | tuple):
        for index, child in enumerate(node):
            yield from secret_keys(child, f"{key}[{index}]")
    elif isinstance(node, str) and redacted(node) != node:
        yield key


class Redacting(logging.Filter):
    """Keeps tokens out of a log's messages and tracebacks."""

    def filter(self, record: logging.LogRecord) -> bool:
        """Redact the record, and always let it pass."""
        record.msg, record.args = redacted(record.getMessage()), None
        if record.exc_info:
            text = logging.Formatter().formatException(record.exc_info)
            record.exc_text, record.exc_info = redacted(text), None
        return True
