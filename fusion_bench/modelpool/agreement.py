"""Whether models that are to be merged into one compute alike, weights aside.

Three things beside the weights tell it: the config, the tokenizer, and how pictures are prepared.
A merged model has the reference's, and those of the others are lost.
"""

import json
import re
import warnings
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any

from fusion_bench.modelpool.tokens import Comparison, Vocabulary, compare_tokens
from fusion_bench.problems import Problem
from fusion_bench.weights import first_of
from fusion_bench.weights.blueprint import without_layers
from fusion_bench.weights.config import Config, decides, deciding, plain

#: How many tokens a model may see, which matters where rotary embeddings are stretched to it.
_LIMITS = ("max_position_embeddings", "n_positions", "max_seq_len", "max_sequence_length")
#: Numbers of which a class of transformers makes a list of that length; nobody's is so large.
_LISTED = re.compile(r"layer|depth|block|label|stage")
_LONGEST_LIST = 10_000
#: The file that says how pictures are prepared.
PREPROCESSOR = "preprocessor_config.json"
#: What decides it.
_PICTURES = (
    *("image_mean", "image_std", "size", "crop_size", "rescale_factor", "resample"),
    *("do_resize", "do_center_crop", "do_rescale", "do_normalize"),
)
#: What is shown of a long value.
_SHOWN = 100


@dataclass(frozen=True)
class Found:
    """What was found to differ.

    Attributes:
        refused: why the models cannot be merged; places are relative to the pool.
        notes: what is merged all the same, in sentences.
    """

    refused: tuple[Problem, ...] = ()
    notes: tuple[str, ...] = ()

    def __add__(self, other: "Found") -> "Found":
        return Found(self.refused + other.refused, self.notes + other.notes)


def compare_configs(
    configs: Mapping[str, Config],
    *,
    warn: bool = False,
    part: str | None = None,
    heads: bool = False,
    layers: bool = True,
) -> Found:
    """Compare models' configs with that of the first, the reference.

    Args:
        configs: by the models' names.
        warn: merge models whatever differs.
        part: the key of the part of a config that is merged, for configs that have it.
        heads: classifiers are merged with their heads, so that the order of classes counts.
        layers: the models are to have the same layers.
    """
    (name, reference), *others = configs.items()
    found: dict[Difference, list[str]] = {}
    for model, config in others:
        other_order = _other_order(config, reference) if heads else []
        for difference in [*other_order, *differences(config, reference, part, layers=layers)]:
            found.setdefault(difference, []).append(model)
    much, notes = [], []
    for each, models in found.items():
        line = f"{', '.join(models)}: '{each.key}' is {each.own}, in {name} {each.expected}"
        if each.much and not warn:
            much.append(line)
        else:
            weighty = ", which changes what it computes" if each.much else ""
            notes.append(f"{line}; the merged model has that of {name}{weighty}.")
    if not much:
        return Found(notes=tuple(notes))
    refusal = Problem(
        ("models",),
        "the configs of these models differ in what decides the computation, and a merged model "
        f"has but one, that of '{name}'.",
        "Use models that were fine-tuned from the same base, or give {here}policy.on_config=warn "
        "to merge them anyway.",
        details=tuple(first_of(much)),
    )
    return Found((refusal,), tuple(notes))


def compare_vocabularies(vocabularies: Mapping[str, Vocabulary], *, warn: bool = False) -> Found:
    """Compare what token ids mean with what they mean to the first, the reference.

    Args:
        vocabularies: by the models' names.
        warn: merge models whatever differs.

    Raises:
        ConfigError: a damaged file.
        EnvironmentProblem: a file that could not be fetched.
    """
    (name, reference), *others = vocabularies.items()
    much, notes = [], []
    for model, vocabulary in others:
        compared = compare_tokens(vocabulary, reference)
        if compared is None:
            notes.append(
                f"{model}: its tokenizer and that of {name} are in files that cannot be compared; "
                "make sure that their ids mean the same."
            )
            continue
        line, further = _told(model, name, compared)
        if line and warn:
            notes.append(f"{line}; their rows are merged all the same.")
        elif line:
            much.append(line)
        notes += further
    if not much:
        return Found(notes=tuple(notes))
    refusal = Problem(
        ("models",),
        "the same token ids mean different strings in these models, so rows of different tokens "
        "would be merged.",
        "Give {here}tokenizer=union to match rows by their tokens, use models with the same "
        "tokenizer, or give {here}policy.on_tokenizer=warn to merge them all the same.",
        details=tuple(first_of(much)),
    )
    return Found((refusal,), tuple(notes))


def compare_pictures(processors: Mapping[str, Config]) -> Found:
    """Compare how models' pictures are prepared with how the first's are, the reference's."""
    (name, reference), *others = processors.items()
    notes = [
        f"{model}: its pictures are prepared with '{key}' {_shown(own[key])}, those of {name} with "
        f"{_shown(reference[key])}; what is evaluated with it may be worse than it is."
        for model, own in others
        for key in _PICTURES
        if key in own and key in reference and _side(own[key]) != _side(reference[key])
    ]
    return Found(notes=tuple(notes))


def _told(model: str, reference: str, compared: Comparison) -> tuple[str, list[str]]:
    """Return in words which ids mean other strings, and which only one of two models has."""
    line, notes = "", []
    if compared.other:
        total = len(compared.other)
        shown = _first(
            f"{i} is {_shown(own)}, in {reference} {_shown(expected)}"
            for i, (own, expected) in sorted(compared.other.items())
        )
        line = f"{model}: {_ids(total)} other strings than in {reference}: {shown}"
    for having, lacking, tokens in (
        (model, reference, compared.own),
        (reference, model, compared.expected),
    ):
        if tokens:
            shown = _first(f"{i} {_shown(text)}" for i, text in sorted(tokens.items()))
            has = "has 1 token that" if len(tokens) == 1 else f"has {len(tokens):,} tokens that"
            notes.append(f"{having}: its tokenizer {has} {lacking} lacks: {shown}.")
    return line, notes


def _ids(total: int) -> str:
    return "1 token id means" if total == 1 else f"{total:,} token ids mean"


def _first(lines: Iterable[str], most: int = 3) -> str:
    known = list(lines)
    return "; ".join(known[:most]) + ("; …" if len(known) > most else "")


def _side(value: Any) -> Any:
    """Return a picture's size as a number where its sides are alike: it is written in many ways."""
    sides = list(value.values()) if isinstance(value, Mapping) else []
    return sides[0] if sides and all(side == sides[0] for side in sides) else value


@dataclass(frozen=True)
class Difference:
    """A key to which two configs give different values.

    Attributes:
        key: where it is, ``vision_config.hidden_act`` for one.
        own: what a model's config says, as JSON.
        expected: what the reference's says.
        much: whether weights that were trained with the one are no good with the other.
    """

    key: str
    own: str
    expected: str
    much: bool


def differences(
    own: Config, reference: Config, part: str | None = None, *, layers: bool = True
) -> list[Difference]:
    """Return what makes two models compute unlike.

    Releases of transformers name the same in different ways and leave out what a class has by
    default. So where two configs differ, both are read by their class first. Those of an
    architecture that transformers does not know are compared as they are, and a key that only one
    of them has counts as little.

    Args:
        own: a model's config.
        reference: that of the model whose config a merged one gets.
        part: the key of the part that is merged, for configs that have it.
        layers: whether their number, and what is listed layer by layer, is compared too.
    """
    own, reference = _named(own, reference), _named(reference, own)
    if _alike(deciding(own), deciding(reference)):
        return []
    completed = _completed(own), _completed(reference)
    known = None not in completed
    parts = [
        _part(full if known and full is not None else config, part)
        for full, config in zip(completed, (own, reference), strict=True)
    ]
    first, second = (deciding(each if layers else without_layers(each)) for each in parts)
    kinds = first.get("model_type"), second.get("model_type")
    if kinds[0] != kinds[1]:
        # One may be inside the other, as a vision encoder is in CLIP.
        first = next((c for c in _inside(first) if c.get("model_type") == kinds[1]), first)
        second = next((c for c in _inside(second) if c.get("model_type") == kinds[0]), second)
    if first.get("model_type") != second.get("model_type"):
        return [_difference("model_type", *kinds, much=None not in kinds)]
    stretched = _stretched(first) or _stretched(second)
    return [*_compared(first, second, "", known, stretched)]


def _other_order(own: Config, reference: Config) -> list[Difference]:
    """Return what differs where two classifiers have the same classes in another order."""
    names, expected = own.get("id2label"), reference.get("id2label")
    if not isinstance(names, Mapping) or not isinstance(expected, Mapping) or names == expected:
        return []
    if sorted(map(str, names.values())) != sorted(map(str, expected.values())):
        return []
    return [_difference("id2label", names, expected, much=True)]


def holds(outer: Config, inner: Config) -> bool:
    """Tell whether a model of the one kind has one of the other inside."""
    kind = inner.get("model_type")
    return kind is not None and any(part.get("model_type") == kind for part in _inside(outer))


def _named(config: Config, other: Config) -> Config:
    """Return a config with its kind, for which the other's is taken where it names none."""
    if "model_type" in config or "model_type" not in other:
        return config
    return {**config, "model_type": other["model_type"]}


def _compared(
    own: Config, reference: Config, place: str, known: bool, stretched: bool
) -> Iterator[Difference]:
    """Yield what differs; ``known`` tells that a class has added what it has by default."""
    for key in {**reference, **own}:
        first, second = own.get(key), reference.get(key)
        much = decides(key) == "much" or (stretched and key in _LIMITS)
        if isinstance(first, Mapping) and isinstance(second, Mapping) and not much:
            yield from _compared(first, second, f"{place}{key}.", known, stretched)
        elif _alike(_given(first), _given(second)):
            continue
        elif key in own and key in reference:
            yield _difference(f"{place}{key}", first, second, much)
        elif (first or second) and (much or not known):  # the class makes nothing of any others
            yield _difference(f"{place}{key}", first, second, much=False)


def _difference(key: str, own: Any, reference: Any, much: bool) -> Difference:
    return Difference(_shown(key)[1:-1], _shown(own), _shown(reference), much)


def _shown(value: Any) -> str:
    text = "not given" if value is None else json.dumps(value, default=str)
    return text if len(text) <= _SHOWN else f"{text[:_SHOWN]}…"


def _alike(one: Any, other: Any) -> bool:
    return one == other or json.dumps(one) == json.dumps(other)  # NaN is not itself


def _given(value: Any) -> Any:
    """Return a value without what is null in it."""
    if not isinstance(value, Mapping):
        return value
    return {key: own for key, own in value.items() if own is not None}


def _part(config: Config, key: str | None) -> Config:
    part = config.get(key) if key is not None else None
    return part if isinstance(part, Mapping) else config


def _inside(config: Config) -> Iterator[dict[str, Any]]:
    yield from (value for value in config.values() if isinstance(value, dict))


def _stretched(config: Config) -> bool:
    """Tell whether rotary embeddings depend on how many tokens there may be."""
    if config.get("rope_type", config.get("type")) in ("dynamic", "longrope", "su"):
        return True
    return any(_stretched(part) for part in _inside(config))


def _completed(config: Config) -> dict[str, Any] | None:
    """Return a config with what its class has by default; None where transformers knows none."""
    kind = config.get("model_type")
    if not isinstance(kind, str) or _enormous(config):
        return None
    from transformers.models.auto.configuration_auto import CONFIG_MAPPING

    if kind not in CONFIG_MAPPING:
        return None
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # of old names, which are what it is read for
            return plain(CONFIG_MAPPING[kind].from_dict(plain(config)).to_dict())
    except Exception:  # each class fails in its own way over what a stranger wrote
        return None


def _enormous(config: Config) -> bool:
    """Tell whether a class would make lists of the config that fill the memory."""
    return any(
        _enormous(value)
        if isinstance(value, Mapping)
        else isinstance(value, int) and value > _LONGEST_LIST and bool(_LISTED.search(key))
        for key, value in config.items()
    )
