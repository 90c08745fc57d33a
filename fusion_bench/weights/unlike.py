"""How models differ that cannot be merged, in few lines for people to read."""

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence

from fusion_bench.weights.config import Config
from fusion_bench.weights.folding import folded

#: So many entries of one kind are told each by itself.
_FEW = 3
#: What configs call the sizes of a model, the kind of the model first.
_DEPTHS = ("num_hidden_layers", "num_layers", "n_layer", "n_layers", "num_decoder_layers")
_SIZES = (
    *("model_type", *_DEPTHS, "hidden_size", "d_model", "n_embd", "intermediate_size", "d_ff"),
    *("num_attention_heads", "num_key_value_heads", "head_dim", "num_experts"),
    *("num_local_experts", "vocab_size", "tie_word_embeddings"),
)
#: A key of a config, what a model's says and what the reference's.
Size = tuple[str, object, object]
#: A model's config by its name in messages.
Configs = Callable[[str], Config | None]


class Unlike:
    """What differs in the entries of models, gathered by model and kind.

    Args:
        name: what the reference is called.
        configs: gives what the models' configs say.
    """

    def __init__(self, name: str, configs: Configs):
        self.name = name
        self._configs = configs
        self._kinds: dict[tuple[str, str, str], tuple[list[str], Iterable[str]]] = {}

    def __bool__(self) -> bool:
        return bool(self._kinds)

    def add(
        self, model: str, keys: Sequence[str], among: Iterable[str], before: str, behind: str = ""
    ) -> None:
        """Note that entries of a model differ.

        Args:
            model: its name.
            keys: the entries.
            among: all entries that there are.
            before: what is said before the entries, ``has an extra``.
            behind: what is said of them, ``is [3], in base [2]``.
        """
        found, _ = self._kinds.setdefault((model, before, behind), ([], among))
        found += keys

    def lines(self) -> Iterator[str]:
        """Yield what the configs say first, then the entries, as patterns where they are many."""
        found = self._sizes()
        for model, sizes in found.items():
            yield from (f"{model}: {key} is {own}, in {self.name} {at}" for key, own, at in sizes)
            if _of_another_kind(sizes):
                of_model = [keys for (own, *_), (keys, _) in self._kinds.items() if own == model]
                number = sum(map(len, of_model))
                yield f"{model}: so {number} tensors differ, such as '{of_model[0][0]}'"
        for (model, before, behind), (keys, among) in self._kinds.items():
            if _of_another_kind(found.get(model, ())):
                continue
            begun = f"{model}: {before} ".replace(":  ", ": ")
            if len(keys) <= _FEW:
                yield from (f"{begun}'{key}'{behind}" for key in keys)
            else:
                few = begun.replace(" an ", " ")
                yield f"{few}{folded(keys, among)}{behind.replace(' is ', ': ', 1)}"

    def only_deeper(self) -> bool:
        """Tell whether the configs differ in the number of layers alone."""
        sizes = self._sizes()
        keys = {key for own in sizes.values() for key, *_ in own}
        differing = {model for model, *_ in self._kinds}
        return bool(keys) and keys <= {*_DEPTHS} and differing == {*sizes}

    def of_another_kind(self) -> bool:
        """Tell whether models have another architecture or width, so that no policy helps."""
        return any(map(_of_another_kind, self._sizes().values()))

    def _sizes(self) -> dict[str, list[Size]]:
        """Return which sizes differ, by model."""
        expected = self._configs(self.name) or {}
        found: dict[str, list[Size]] = {}
        for model in dict.fromkeys(model for model, *_ in self._kinds):
            own = _of_kind(self._configs(model) or {}, expected)
            reference = _of_kind(expected, own)
            there = [key for key in _SIZES if key in own and key in reference]
            differing = [
                (key, own[key], reference[key]) for key in there if own[key] != reference[key]
            ]
            if differing:
                found[model] = differing[:1] if differing[0][0] == "model_type" else differing
        return found


def _of_kind(config: Config, other: Config) -> Config:
    """Return a config, or the part of it that is of the other's kind, as an encoder in CLIP."""
    parts = (own for own in config.values() if isinstance(own, Mapping))
    kind = other.get("model_type")
    if kind is None or config.get("model_type") == kind:
        return config
    return next((own for own in parts if own.get("model_type") == kind), config)


def _of_another_kind(sizes: Iterable[Size]) -> bool:
    return not {key for key, *_ in sizes} <= {*_DEPTHS, "vocab_size", "tie_word_embeddings"}


def no_config(_name: str) -> None:
    """Return nothing, as of models of which weights alone are known."""
    return None
