"""Decides which entries of which models are merged, before any work."""

from collections.abc import Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, fields
from pathlib import Path
from typing import Literal, get_type_hints

import torch
from torch import Tensor

from fusion_bench.problems import (
    FusionBenchError,
    Place,
    Problems,
    check_choice,
    did_you_mean,
    key_of,
)
from fusion_bench.weights.computed import is_computed
from fusion_bench.weights.mapping import Origin, TensorSpec, Weights
from fusion_bench.weights.unlike import Configs, Unlike, no_config

#: The types whose values are plain numbers; narrower ones mean little without scales beside them.
_PLAIN = {torch.float64, torch.float32, torch.bfloat16, torch.float16}


@dataclass(frozen=True)
class MergePolicy:
    """What to do when models differ, and how to compute.

    The *reference* is the pretrained model, or the first model if there is none. The merged model
    has the reference's entries, in the same order.

    Args:
        on_missing: a model lacks an entry of the reference. ``error``; ``base``: the reference's
            values are used; ``skip``: the entry is copied from the reference, not merged.
        on_extra: a model has an entry that the reference lacks. ``error``; ``drop`` leaves it out.
        on_dtype: a model has an entry in another floating-point type than the reference. ``cast``
            merges it in float32 (in float64 if one model has float64) and writes it in the
            reference's type; ``error``. Types below 16 bits are always an error.
        on_vocabulary: a model has another number of rows in its vocabulary. ``error``; ``common``:
            rows that all models have are merged, and the reference's other rows are copied.
        on_config: a model's config differs from the reference's in settings that change the
            computation, such as an activation or rotary embeddings. ``error``; ``warn``.
        on_tokenizer: token ids have other strings in a model than in the reference. ``error``;
            ``warn`` merges their rows anyway.
        on_nonfinite: there is NaN or infinity in an input or in the result. ``error``; ``warn``.
        dtype: the type of merged floating-point entries, such as ``bfloat16``; by default the
            reference's, entry by entry.
        device: the device of the computation.
        place: the policy's own key in the config; not an option.

    Raises:
        FusionBenchError: with each value that is not among the choices.
    """

    on_missing: Literal["error", "base", "skip"] = "error"
    on_extra: Literal["error", "drop"] = "error"
    on_dtype: Literal["error", "cast"] = "cast"
    on_vocabulary: Literal["error", "common"] = "error"
    on_config: Literal["error", "warn"] = "error"
    on_tokenizer: Literal["error", "warn"] = "error"
    on_nonfinite: Literal["error", "warn"] = "error"
    dtype: str | None = None
    device: str = "cpu"
    place: Place = field(default=("policy",), compare=False, repr=False)

    def __post_init__(self) -> None:
        if isinstance(self.dtype, torch.dtype):
            object.__setattr__(self, "dtype", _short(self.dtype))
        hints, problems = get_type_hints(type(self)), Problems()
        for option in self.options():
            if option.startswith("on_"):
                with problems.collect():
                    check_choice(option, getattr(self, option), hints[option])
        with problems.collect():
            _refuse_device(self.device)
        with problems.collect():
            _refuse_dtype(self.dtype)
        problems.raise_all()

    @property
    def torch_dtype(self) -> torch.dtype | None:
        """The merged entries' type as torch knows it."""
        return None if self.dtype is None else getattr(torch, self.dtype)

    @classmethod
    def options(cls) -> list[str]:
        """Return the names of the options."""
        return [own.name for own in fields(cls) if own.compare]

    def typed(self, option: str, value: str) -> str:
        """Return the command-line text that chooses a value."""
        return f"{key_of((*self.place, option))}={value}"


def _refuse_device(name: str) -> None:
    """Refuse a device that does not exist."""
    try:
        torch.empty(0, device=name)
    except (RuntimeError, AssertionError, NotImplementedError) as error:
        here = ["cpu", *(["cuda"] if torch.cuda.is_available() else [])]
        raise FusionBenchError(
            f"'{name}' cannot be used here.", did_you_mean(str(name), here), place=("device",)
        ) from error


def _refuse_dtype(name: str | None) -> None:
    """Refuse what is not a floating-point type."""
    dtype = None if name is None else getattr(torch, str(name), None)
    if name is None or (isinstance(dtype, torch.dtype) and dtype.is_floating_point):
        return
    names = ["float64", "float32", "bfloat16", "float16"]
    hint = did_you_mean(str(name), names)
    raise FusionBenchError(f"'{name}' is not a floating-point type.", hint, place=("dtype",))


@dataclass(frozen=True)
class Aligned:
    """Models with the reference's keys and shapes, except for common rows.

    Attributes:
        reference: the pretrained model or the first one.
        base: the pretrained model, if there is one.
        models: the models to merge, by name.
        copied: entries that are copied from the reference.
        common_rows: the number of common rows of entries with different row counts.
        notes: accepted differences, as sentences for the plan and the report.
        elsewhere: names of entries in the rest of the model that these are a part of.
    """

    reference: Weights
    base: Weights | None
    models: Mapping[str, Weights]
    copied: frozenset[str]
    common_rows: Mapping[str, int]
    notes: tuple[str, ...] = ()
    elsewhere: Collection[str] = ()


def align(
    models: Mapping[str, Weights],
    base: Weights | None = None,
    policy: MergePolicy | None = None,
    vocabulary: int | None = None,
    configs: Configs = no_config,
) -> Aligned:
    """Compare keys, shapes and types of all models, and resolve allowed differences.

    Args:
        models: name to weights.
        base: the pretrained model; it is called ``_pretrained_`` in messages.
        policy: by default every difference is an error.
        vocabulary: the reference's number of tokens. A first dimension of that size counts as a
            vocabulary; where it is not given, none does.
        configs: gives what a model's config says, for messages.

    Raises:
        FusionBenchError: no models, or differences that the policy does not allow; each is listed.
    """
    if not models:
        raise FusionBenchError("There is nothing to merge: the model pool has no model.")
    policy = policy or MergePolicy()
    name, reference = ("_pretrained_", base) if base is not None else next(iter(models.items()))
    comparison = _Comparison(name, reference, policy, vocabulary, configs)
    aligned = {model: comparison.aligned(model, weights) for model, weights in models.items()}
    comparison.raise_problems()
    copied = {key for key in reference if not reference.spec(key).dtype.is_floating_point}
    copied |= comparison.skipped
    return Aligned(
        *(reference, base, aligned, frozenset(copied), comparison.common_rows),
        notes=tuple(comparison.notes()),
    )


class _Comparison:
    """Compares one model after the other and collects what cannot be merged."""

    def __init__(
        self,
        name: str,
        reference: Weights,
        policy: MergePolicy,
        vocabulary: int | None,
        configs: Configs,
    ):
        self.name = name
        self.reference = reference
        self.policy = policy
        self.vocabulary = vocabulary
        self.skipped: set[str] = set()
        self.common_rows: dict[str, int] = {}
        self.computed: dict[str, dict[str, None]] = {}
        self.cast: dict[tuple[str, str, str], int] = {}  # model and both types: how many entries
        self.unlike = Unlike(name, configs)
        self.fixes: dict[str, None] = {}  # an ordered set
        self.remedies: dict[str, None] = {}

    def aligned(self, model: str, weights: Weights) -> Weights:
        """Return ``weights`` with the reference's keys, if the policy allows."""
        # A file may hold tied entries once or several times.
        tied = {
            key: first
            for key in self.reference
            if key not in weights and (first := self.reference.tied_to(key)) in weights
        }
        missing = [key for key in self.reference if key not in weights and key not in tied]
        extra = [
            key
            for key in weights
            if key not in self.reference and weights.tied_to(key) not in self.reference
        ]
        missing = self._without_computed(model, missing, self.reference)
        extra = self._without_computed(model, extra, weights)
        if missing and self.policy.on_missing == "error":
            self._problem(("on_missing", "base"), model, missing, self.reference, "lacks")
        elif self.policy.on_missing == "skip":
            self.skipped.update(missing)
        if extra and self.policy.on_extra == "error":
            self._problem(("on_extra", "drop"), model, extra, weights, "has an extra")
        for key in self.reference:
            if key in weights:
                self._compare(model, key, weights.spec(key))
        same = all(key in weights for key in self.reference) and len(weights) == len(self.reference)
        return weights if same else _Completed(weights, self.reference, tied)

    def _without_computed(self, model: str, keys: list[str], weights: Weights) -> list[str]:
        """Return the keys without computed entries, which come from the reference or none."""
        computed = {key for key in keys if is_computed(key, weights.spec(key))}
        self.skipped.update(key for key in computed if key in self.reference)
        self.computed.setdefault(model, {}).update(dict.fromkeys(sorted(computed)))
        return [key for key in keys if key not in computed]

    def _compare(self, model: str, key: str, spec: TensorSpec) -> None:
        """Record the differences in an entry."""
        expected = self.reference.spec(key)
        if spec != expected and not self._without_computed(model, [key], self.reference):
            return
        if spec.shape != expected.shape:
            said = f" is {list(spec.shape)}, in {self.name} {list(expected.shape)}"
            if not self._is_vocabulary(spec, expected):
                self._differ(None, model, key, said)
            elif self.policy.on_vocabulary == "error":
                self._differ(("on_vocabulary", "common"), model, key, f"{said}: another vocabulary")
                tokens = key_of((*self.policy.place[:-1], "tokenizer"))
                self.remedies[f"give {tokens}=union to match rows by their tokens"] = None
            else:
                known = self.common_rows.get(key, expected.shape[0])
                self.common_rows[key] = min(known, spec.shape[0])
        if spec.dtype != expected.dtype:
            said = f" is {_short(spec.dtype)}, in {self.name} {_short(expected.dtype)}"
            if not {spec.dtype, expected.dtype} <= _PLAIN:
                self._differ(None, model, key, said)
            elif self.policy.on_dtype == "error":
                self._differ(("on_dtype", "cast"), model, key, said)
            else:
                types = (model, _short(spec.dtype), _short(expected.dtype))
                self.cast[types] = self.cast.get(types, 0) + 1

    def notes(self) -> Iterator[str]:
        """Yield the accepted differences."""
        for (model, own, expected), count in self.cast.items():
            wide = "float64" if "float64" in (own, expected) else "float32"
            entries = "1 entry is" if count == 1 else f"{count} entries are"
            yield (
                f"{model}: {entries} {own}, and {expected} in {self.name}; they are merged in "
                f"{wide} and written in {self.policy.dtype or expected}. "
                f"{self.policy.typed('on_dtype', 'error')} refuses that."
            )
        for model, keys in self.computed.items():
            if keys:
                others = f" and {len(keys) - 1} more" if len(keys) > 1 else ""
                yield (
                    f"{model}: '{next(iter(keys))}'{others} differ from {self.name}, or are only "
                    "in one of the two. Models compute them when they are loaded, so they are "
                    "not merged."
                )

    def _is_vocabulary(self, spec: TensorSpec, expected: TensorSpec) -> bool:
        alike = len(spec.shape) == len(expected.shape) and spec.shape[1:] == expected.shape[1:]
        return alike and expected.shape[:1] == (self.vocabulary,)

    def _differ(self, fix: tuple[str, str] | None, model: str, key: str, said: str) -> None:
        self._problem(fix, model, [key], self.reference, "", said)

    def _problem(
        self,
        fix: tuple[str, str] | None,
        model: str,
        keys: Sequence[str],
        among: Weights,
        before: str,
        behind: str = "",
    ) -> None:
        self.unlike.add(model, keys, among, before, behind)
        if fix is not None:
            self.fixes[self.policy.typed(*fix)] = None

    def raise_problems(self) -> None:
        """Raise how the models differ, what their configs say first.

        Raises:
            FusionBenchError: they do.
        """
        if not self.unlike:
            return
        lines = self.unlike.lines()
        remedy = "Use models that were fine-tuned from the same base"
        if self.unlike.only_deeper():
            remedy = (
                "They differ in depth alone: merge equally many layers of each as slices (the "
                "method stacked_layers; 'slices' in a recipe), use models of one depth"
            )
        if not self.unlike.of_another_kind():
            remedy += "".join(f", {remedy}" for remedy in self.remedies)
            remedy += f", or set {' '.join(self.fixes)}" if self.fixes else ""
        raise FusionBenchError(
            "These models cannot be merged: their weights do not match those of "
            f"'{self.name}'. {remedy}.",
            details=first_of([*lines]),
        )


class _Completed(Weights):
    """A model with the reference's keys; missing entries are tied or taken from the reference."""

    def __init__(self, weights: Weights, reference: Weights, tied: Mapping[str, str]):
        self._weights = weights
        self._reference = reference
        self._tied = tied

    @property
    def files(self) -> tuple[Path, ...]:
        """The files of both."""
        return (*self._weights.files, *self._reference.files)

    def __getitem__(self, key: str) -> Tensor:
        return self._of(key)[self._tied.get(key, key)]

    def __iter__(self) -> Iterator[str]:
        return iter(self._reference)

    def __len__(self) -> int:
        return len(self._reference)

    def spec(self, key: str) -> TensorSpec:
        """Return shape and dtype of the model's entry, or else of the reference's."""
        return self._of(key).spec(self._tied.get(key, key))

    def tied_to(self, key: str) -> str:
        """Return the key that the model ties this one to, or else the reference."""
        return self._of(key).tied_to(self._tied.get(key, key))

    def read(self, key: str, start: int, stop: int) -> Tensor:
        """Return elements of the model's entry, or else of the reference's."""
        return self._of(key).read(self._tied.get(key, key), start, stop)

    def origins(self, key: str) -> tuple[Origin, ...]:
        """Return those of the model's entry, or else of the reference's."""
        return self._of(key).origins(self._tied.get(key, key))

    def _of(self, key: str) -> Weights:
        if key not in self._reference:
            raise KeyError(key)
        there = key in self._weights or key in self._tied
        return self._weights if there else self._reference


def first_of(lines: Collection[str], most: int = 50) -> list[str]:
    """Return lines, the first of them where there are many."""
    shown = list(lines)[:most]
    if len(lines) > most:
        shown.append(f"… and {len(lines) - most} more")
    return shown


def shortened(lines: Collection[str]) -> str:
    """Return indented lines, the first of them where there are many."""
    return "\n  ".join(first_of(lines))


def _short(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")
