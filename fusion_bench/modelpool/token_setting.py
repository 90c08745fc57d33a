"""What a config says of the merged model's tokenizer."""

from collections.abc import Collection, Mapping
from dataclasses import dataclass, field
from difflib import get_close_matches
from typing import Any, Literal

from fusion_bench.command import is_there
from fusion_bench.forms import TOKEN_KEYS, says_of_tokens
from fusion_bench.problems import ConfigError, Problem, Problems, check_choice, did_you_mean, within


@dataclass(frozen=True)
class TokenRow:
    """The row that the config gives a token.

    Attributes:
        model: whose row it is; None for zeros.
        token: of which token of that model.
        token_id: or of which id.
    """

    model: str | None
    token: str | None = None
    token_id: int | None = None


@dataclass(frozen=True)
class TokenSetting:
    """Which tokenizer a merged model gets, and where its rows come from.

    Attributes:
        source: ``base``, ``union``, the name of a model of the pool, or that of a folder or
            repository with a tokenizer.
        base: the model whose row a token gets in a model without it, if it has one; None where
            there is no base.
        tokens: tokens whose row the config chooses; None for one that is only forced.
        forced: tokens of which every model gets the chosen row, or else the row that models
            without the token get.
        multiple: the number of rows is a multiple of it.
    """

    source: str
    base: str | None = None
    tokens: Mapping[str, TokenRow | None] = field(default_factory=dict)
    forced: frozenset[str] = frozenset()
    multiple: int = 1

    @classmethod
    def read(cls, given: Any, models: Collection[str]) -> "TokenSetting | None":
        """Return the setting of a config; None for what names a tokenizer's files.

        Args:
            given: ``base``, ``union``, the name of a model, or a mapping.
            models: the names of the pool's models.

        Raises:
            ConfigError: a mapping with unknown keys or impossible values, or a word that is nearly
                ``union`` or ``base``; places are its own.
        """
        base = "_pretrained_" if "_pretrained_" in models else None
        if isinstance(given, str) and given in ("base", "union", *models):
            return cls(given, base)
        near = isinstance(given, str) and get_close_matches(given, ("union", "base"), cutoff=0.75)
        if near and not is_there(given):
            raise ConfigError(f"'{given}' is no tokenizer.", did_you_mean(given, near))
        if not isinstance(given, Mapping) or not says_of_tokens(given):
            return None
        problems, chosen = Problems(), {}
        for key in given:
            if key not in TOKEN_KEYS:
                hint = did_you_mean(str(key), TOKEN_KEYS)
                problems.append(Problem((str(key),), "there is no such key.", hint))
        multiple, source = given.get("pad_to_multiple_of"), given.get("source")
        if not _is_number(1 if multiple is None else multiple, least=1):
            problems.append(
                Problem(("pad_to_multiple_of",), f"{multiple!r} is no positive number.")
            )
        if not isinstance(source or "union", str):
            remedy = "Give base, union, or the name of a model."
            problems.append(Problem(("source",), f"{source!r} is no tokenizer.", remedy))
        with problems.collect("base"):
            base = base if given.get("base") is None else _model(given["base"], models)
        nodes: Mapping[Any, Any] = {}
        with problems.collect("tokens"):
            nodes = _mapping(given.get("tokens") or {})
        for token, node in nodes.items():
            with problems.collect("tokens", str(token)):
                if not isinstance(token, str):
                    raise ConfigError("a token is a text.", f'Write "{token}" in quotes.')
                chosen[token] = _chosen(_mapping(node), models)
        problems.raise_all()
        return cls(
            source or "union",
            base,
            {token: row for token, (row, _) in chosen.items()},
            frozenset(token for token, (_, force) in chosen.items() if force),
            multiple or 1,
        )


def _chosen(given: Mapping[str, Any], models: Collection[str]) -> tuple[TokenRow | None, bool]:
    """Return the row of a token, and whether all models get it."""
    _refuse_others(given, ("source", "force"))
    force, source = given.get("force", False), given.get("source")
    if not isinstance(force, bool):
        raise ConfigError(f"{force!r} is neither true nor false.", place=("force",))
    if source is None and not force:
        remedy = "Give {here}source, the name of a model or {kind: zero}, or {here}force."
        raise ConfigError("there is neither.", remedy, place=("source",))
    with within("source"):
        return (None if source is None else _row(source, models)), force


def _row(source: Any, models: Collection[str]) -> TokenRow:
    """Return the row that a token's source names."""
    if isinstance(source, str):
        return TokenRow(_model(source, models))
    node = _mapping(source)
    check_choice("kind", node.get("kind"), Literal["model_token", "zero"])
    if node["kind"] == "zero":
        _refuse_others(node, ("kind",))
        return TokenRow(None)
    _refuse_others(node, ("kind", "model", "token", "token_id"))
    with within("model"):
        model = _model(node.get("model"), models)
    token, number = node.get("token"), node.get("token_id")
    if (token is None) == (number is None):
        raise ConfigError("give either token or token_id.", place=("token",))
    if token is not None and not isinstance(token, str):
        raise ConfigError("a token is a text.", f'Write "{token}" in quotes.', place=("token",))
    if number is not None and not _is_number(number, least=0):
        raise ConfigError(f"{number!r} is no id of a token.", place=("token_id",))
    return TokenRow(model, token, number)


def _model(name: Any, models: Collection[str]) -> str:
    if name not in models:
        raise ConfigError(f"'{name}' is not in the pool.", did_you_mean(str(name), models))
    return str(name)


def _mapping(node: Any) -> Mapping[Any, Any]:
    if not isinstance(node, Mapping):
        raise ConfigError(f"{node!r} is no mapping.", "Write it as {key: value}.")
    return node


def _refuse_others(node: Mapping[Any, Any], known: tuple[str, ...]) -> None:
    for key in node:
        if key not in known:
            hint = did_you_mean(str(key), known)
            raise ConfigError("there is no such key.", hint, place=(str(key),))


def _is_number(value: Any, least: int) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and value >= least
