"""The arguments that an object was made with, so that a report of it can be made again."""

from collections.abc import Callable, Mapping
from dataclasses import fields, is_dataclass
from functools import wraps
from inspect import signature
from typing import Any, Concatenate, ParamSpec, TypeVar

P = ParamSpec("P")
S = TypeVar("S")

_KEPT = "_given_arguments"


def keeps_arguments(init: Callable[Concatenate[S, P], None]) -> Callable[Concatenate[S, P], None]:
    """Decorate an ``__init__``: the object keeps its arguments for ``arguments_of``.

    Not where a subclass calls it, whose own arguments are others.
    """
    own = signature(init)

    @wraps(init)
    def keeping(self: S, /, *args: P.args, **kwargs: P.kwargs) -> None:
        init(self, *args, **kwargs)
        if type(self).__init__ is keeping:
            _, *given = own.bind(self, *args, **kwargs).arguments.items()
            vars(self)[_KEPT] = {name: _copied(value) for name, value in given}

    return keeping


def arguments_of(made: object) -> dict[str, Any] | None:
    """Return the arguments that make the same object again; ``None`` where they are not known.

    Those of a dataclass are its fields. Those of another class are known if its ``__init__`` keeps
    them, or if it takes none.
    """
    if (kept := getattr(made, "__dict__", {}).get(_KEPT)) is not None:
        return dict(kept)
    try:
        taken = [*signature(type(made)).parameters]
    except ValueError:  # some builtins do not tell their signature
        return None
    if is_dataclass(made) and set(taken) == {field.name for field in fields(made) if field.init}:
        return {name: getattr(made, name) for name in taken}
    return None if taken or not hasattr(made, "__dict__") else {}


def _copied(value: Any) -> Any:
    """Return a value that stays as it was when a caller changes his mapping or list."""
    if isinstance(value, Mapping):
        return {name: _copied(inner) for name, inner in value.items()}
    return [_copied(inner) for inner in value] if isinstance(value, list | tuple) else value
