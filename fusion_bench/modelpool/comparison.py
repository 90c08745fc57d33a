"""What besides their weights decides what models compute: whether it is the same in all."""

from collections.abc import Callable, Collection, Iterable

from fusion_bench.modelpool.agreement import (
    PREPROCESSOR,
    Found,
    compare_configs,
    compare_pictures,
    compare_vocabularies,
)
from fusion_bench.modelpool.output_tokens import OutputTokens
from fusion_bench.modelpool.processor import Processor
from fusion_bench.modelpool.sources import Source
from fusion_bench.modelpool.tokens import Vocabulary
from fusion_bench.problems import FusionBenchError, Problems
from fusion_bench.repository import Repository
from fusion_bench.storage import read_json
from fusion_bench.weights import Config, MergePolicy
from fusion_bench.weights.config import vocabulary


class ModelComparison:
    """Compares configs, tokenizers, and how pictures are prepared, with the reference's.

    Args:
        source: gives how a model is named.
        reference: the model that a merged one is built like.
        policy: what to do where models differ.
        model_class: the class in ``transformers`` that is built.
        part: of a config whose model is merged, where that is not the whole.
        processor: what goes beside a merged model, where that is not the reference's.
        tokens: the merged model's tokenizer, where that is not the reference's.
    """

    def __init__(
        self,
        source: Callable[[str], Source],
        reference: str,
        policy: MergePolicy,
        model_class: str,
        part: str | None,
        processor: Processor | None,
        tokens: OutputTokens | None,
    ):
        self._source = source
        self._reference = reference
        self.policy = policy
        self.model_class = model_class
        self._part = part
        self._processor = processor
        self._tokens = tokens
        self._found: dict[tuple[tuple[str, ...], bool], Found] = {}

    def compare(self, names: Collection[str], layers: bool) -> Found:
        """Compare some models with the reference.

        Args:
            names: the models.
            layers: whether they are to have the same layers.

        Raises:
            FusionBenchError: a damaged file.
        """
        asked = tuple(names), layers
        if asked not in self._found:
            self._found[asked] = self._compared(names, layers)
        return self._found[asked]

    def config(self, name: str) -> Config | None:
        """Return what a model's config says, for the tokens that it gets."""
        config = self._source(name).config()
        if config is None or self._tokens is None:
            return config
        return self._tokens.config(name, config)

    @property
    def _has_tokens(self) -> bool:
        own = self._source(self._reference).config()
        return self._part is None and bool(vocabulary(own))

    def vocabulary(self, folders: Iterable[Repository]) -> Vocabulary | None:
        """Return the tokenizer in the first folder with one; None where models have no tokens."""
        if not self._has_tokens:
            return None
        return next((own for own in map(Vocabulary.of, folders) if own is not None), None)

    def with_preprocessor(self, name: str) -> Repository | None:
        """Return where it is said how a model's pictures are prepared, if it is."""
        folders = self._source(name).companions
        return next((place for place in folders if PREPROCESSOR in place.files), None)

    def _preprocessor(self, name: str) -> Config | None:
        """Return how a model's pictures are prepared; None where it does not say so."""
        if (place := self.with_preprocessor(name)) is None:
            return None
        content = read_json(place.fetch(PREPROCESSOR) / PREPROCESSOR)
        return content if isinstance(content, dict) else None

    def _refuse_untied(self, name: str) -> None:
        """Refuse a model with an output layer of its own where the merged model would have none."""
        if self.policy.on_extra != "error":
            return
        own, reference = (
            (self._source(each).config() or {}).get("tie_word_embeddings")
            for each in (name, self._reference)
        )
        if own is False and reference is True:
            raise FusionBenchError(
                "its output layer is untied (tie_word_embeddings in its config.json), that of "
                f"'{self._reference}' is tied. The merged model would lose it.",
                "Use models with the same setting, or give {above}policy.on_extra=drop to leave it "
                "out.",
                place=("models", name),
            )

    def _compared(self, names: Collection[str], layers: bool) -> Found:
        problems = Problems()
        for name in names:
            with problems.collect():
                self._refuse_untied(name)
        found = Found(tuple(problems))
        configs = {name: config for name in names if (config := self.config(name))}
        if configs:
            warn = self.policy.on_config == "warn"
            heads = self.model_class != "AutoModel"  # of a classifier it takes the backbone
            found += compare_configs(
                configs, warn=warn, part=self._part, heads=heads, layers=layers
            )
        folders = {name: self._source(name).companions for name in names}
        if self._processor is not None and self._has_tokens and (place := self._processor.folder):
            folders[f"the tokenizer of '{place.name}'"] = (place,)
        vocabularies = {name: own for name in folders if (own := self.vocabulary(folders[name]))}
        if vocabularies and not (self._tokens and self._tokens.changes_rows):
            warn = self.policy.on_tokenizer == "warn"
            found += compare_vocabularies(vocabularies, warn=warn)
        pictures = {name: said for name in names if (said := self._preprocessor(name))}
        return found + compare_pictures(pictures) if pictures else found
