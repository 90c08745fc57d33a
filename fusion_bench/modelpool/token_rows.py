"""Where each row of an output tokenizer's tokens comes from, in each model."""

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Literal

import numpy as np
from numpy.typing import NDArray

from fusion_bench.modelpool.output_tokenizer import ModelTokens
from fusion_bench.modelpool.token_setting import TokenRow, TokenSetting
from fusion_bench.problems import FusionBenchError, Problems, did_you_mean, within

#: How a token got its row in models without it.
How = Literal["chosen", "only", "base", "mean", "zero"]
#: A model's name, and the row there.
At = tuple[str, int]


@dataclass(frozen=True)
class TokenRows:
    """The rows of all models.

    Attributes:
        own: by model, for each output id the model's own row, or -1.
        fill: for ids that some model has no row of its own for, the rows whose mean it gets; those
            that are in neither belong to no token.
        how: the same tokens by how they got their row.
    """

    own: Mapping[str, NDArray[np.int64]]
    fill: Mapping[int, tuple[At, ...]]
    how: Mapping[How, Sequence[str]]


def find_rows(
    setting: TokenSetting,
    models: Sequence[ModelTokens],
    model: Callable[[str], ModelTokens],
    ids: Mapping[str, int],
    size: int,
) -> TokenRows:
    """Return where the rows of all output tokens come from; tokens are matched by their text.

    A model has its own row for a token that it knows. Else, or where it is forced, the row is: the
    one that the setting chooses; that of the only model with the token; the base's; the mean of
    those that have it; zeros.

    Args:
        setting: chooses rows, and names the base.
        models: whose rows are wanted.
        model: returns any model of the pool.
        ids: the output tokens' ids.
        size: how many rows there are, at least one more than the largest id.

    Raises:
        FusionBenchError: chosen rows that are not there; the places are in the setting.
    """
    own = {each.name: np.full(size, -1, dtype=np.int64) for each in models}
    fill: dict[int, tuple[At, ...]] = {}
    how: dict[How, list[str]] = {}
    problems = Problems()
    for token, i in ids.items():
        owners = {each.name: each.ids[token] for each in models if token in each.ids}
        if token not in setting.forced:
            for name, row in owners.items():
                own[name][i] = row
            if len(owners) == len(models):
                continue
        with problems.collect():
            kind, fill[i] = _row(token, owners, setting, model)
            how.setdefault(kind, []).append(token)
    problems.raise_all()
    return TokenRows(own, fill, how)


def _row(
    token: str,
    owners: Mapping[str, int],
    setting: TokenSetting,
    model: Callable[[str], ModelTokens],
) -> tuple[How, tuple[At, ...]]:
    """Return the row of a token in models without it."""
    if (wanted := setting.tokens.get(token)) is not None:
        with within("tokens", token, "source"):
            return "chosen", _chosen(token, wanted, model)
    if len(owners) == 1:
        return "only", tuple(owners.items())
    if setting.base is not None and setting.base in owners:
        return "base", ((setting.base, owners[setting.base]),)
    return ("mean" if owners else "zero"), tuple(owners.items())


def _chosen(token: str, wanted: TokenRow, model: Callable[[str], ModelTokens]) -> tuple[At, ...]:
    if wanted.model is None:
        return ()
    found = model(wanted.model)
    if wanted.token_id is not None:
        if wanted.token_id >= found.rows:
            reason = f"'{found.name}' has {found.rows} rows, none for the id {wanted.token_id}."
            raise FusionBenchError(reason, "Give an id that it has.", place=("token_id",))
        return ((found.name, wanted.token_id),)
    text = token if wanted.token is None else wanted.token
    if text not in found.ids:
        near = did_you_mean(text, found.ids)
        raise FusionBenchError(
            f"'{found.name}' has no row for the token {text!r}.",
            f"Name a model that has it, or another token of this one. {near}",
            place=() if wanted.token is None else ("token",),
        )
    return ((found.name, found.ids[text]),)


def rows_told(rows: TokenRows, setting: TokenSetting) -> Iterator[str]:
    """Yield what a plan says of rows that some model has none of its own for."""
    words: Mapping[How, str] = {
        "only": "that of the only model with the token",
        "base": f"that of '{setting.base}'",
        "mean": "the mean of the models with the token",
        "chosen": "the one that 'tokens' names",
        "zero": "zeros",
    }
    if rows.fill:
        each = ", ".join(
            f"{words[kind]} ({len(rows.how[kind])})" for kind in words if kind in rows.how
        )
        tokens = "1 token is" if len(rows.fill) == 1 else f"{len(rows.fill):,} tokens are"
        yield f"{tokens} not in all models; their rows there: {each}."
    if zero := rows.how.get("zero"):
        shown = ", ".join(map(repr, zero[:3])) + (", …" if len(zero) > 3 else "")
        yield f"No model has a row for {shown}; without a source in 'tokens' it is zeros."
