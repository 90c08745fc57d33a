"""Options that may have a value of its own for each model."""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace
from typing import get_args, get_type_hints

from fusion_bench.problems import (
    FusionBenchError,
    Place,
    check_between,
    check_one_each,
    did_you_mean,
)

#: A number for all models, a number for each model's name, or a list in the pool's order.
PerModel = float | Mapping[str, float] | Sequence[float]


def per_model_options(cls: type) -> frozenset[str]:
    """Return the names of a class's options that are annotated as ``PerModel``."""
    wanted = set(get_args(PerModel))
    hints = get_type_hints(cls)
    return frozenset(name for name, hint in hints.items() if wanted <= set(get_args(hint)))


def of_each(value: PerModel | None, models: Sequence[str], name: str = "") -> list[float]:
    """Return the value of each model, in the order of ``models``.

    Args:
        value: what was given for an option; ``None`` is 1 for each.
        models: the models' names.
        name: the option, for messages.

    Raises:
        FusionBenchError: an unknown model, a model without a value, or another number of values
            than models.
    """
    found = known(value, models, name)
    return [_there(own, model, name) for own, model in zip(found, models, strict=True)]


def known(value: PerModel | None, models: Sequence[str], name: str) -> list[float | None]:
    """Return the same, with ``None`` for a model that a mapping lacks.

    Raises:
        FusionBenchError: an unknown model, or another number of values than models.
    """
    if isinstance(value, Mapping):
        for own in value:
            refuse_unknown(own, models, (name, own))
        return [value.get(model) for model in models]
    if isinstance(value, Sequence):
        check_one_each(name, value, models)
        return list(value)
    return [1.0 if value is None else value] * len(models)


def refuse_unknown(model: str, models: Sequence[str], place: Place) -> None:
    """Refuse a name that is not among the models'.

    Raises:
        FusionBenchError: it is not.
    """
    if model not in models:
        near = did_you_mean(str(model), models)
        raise FusionBenchError(f"no model to merge is called '{model}'.", near, place=place)


def _there(value: float | None, model: str, name: str) -> float:
    if value is None:
        reason = f"there is no value for the model '{model}'."
        raise FusionBenchError(reason, "Give one for each.", place=(name,))
    return value


def check_each_between(name: str, value: PerModel, least: float, most: float) -> None:
    """Refuse what is not a number from ``least`` to ``most``, for all models or for one.

    Raises:
        ConfigError: there is such a value.
    """
    for inner, number in _numbers(value):
        try:
            check_between(name, number, least, most)
        except FusionBenchError as error:
            problems = error.problems
            error.problems = tuple(replace(own, place=(name, *inner)) for own in problems)
            raise


def _numbers(value: PerModel) -> Iterator[tuple[tuple[str | int, ...], float]]:
    """Yield each number in a value, and its key there."""
    if isinstance(value, Mapping):
        yield from (((model,), number) for model, number in value.items())
    elif isinstance(value, Sequence) and not isinstance(value, str):
        yield from (((index,), number) for index, number in enumerate(value))
    else:
        yield (), value
