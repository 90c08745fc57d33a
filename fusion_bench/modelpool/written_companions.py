"""What is written beside merged weights: config, tokenizer and processor files."""

import json
import re
from collections.abc import Callable
from copy import deepcopy
from dataclasses import dataclass
from pathlib import Path

from fusion_bench.modelpool.directory import copy_files, processor_files
from fusion_bench.modelpool.output_tokens import OutputTokens
from fusion_bench.modelpool.processor import Processor
from fusion_bench.modelpool.sources import Source
from fusion_bench.storage import read_json, write_text
from fusion_bench.weights import Model


@dataclass(frozen=True)
class WrittenCompanions:
    """The reference's files, with what is other in a merged model.

    Args:
        reference: gives how the reference is named.
        vocabulary: gives how many tokens its config is to tell; ``None`` where it tells none.
        processor: what a merged model gets in place of the reference's.
        tokens: the merged model's tokenizer, where that is not the reference's.
        model_class: the class in ``transformers`` that is built.
        dtype: of the merged weights, where that is not the reference's.
    """

    reference: Callable[[], Source]
    vocabulary: Callable[[], object]
    processor: Processor | None
    tokens: OutputTokens | None
    model_class: str
    dtype: str | None

    def write(self, model: Model | None, directory: Path) -> None:
        """Write them into a directory.

        Args:
            model: one with a config of its own, in place of the reference's.
            directory: where they go.
        """
        reference = self.reference()
        others = model is not None and model.companions not in ((), reference.companions)
        reference.write_companions(directory, processors=self.processor is None and not others)
        if model is not None and others and self.processor is None:
            for place in reversed(model.companions):
                copy_files(place, processor_files(place), directory)
        if self.processor is not None:
            self.processor.write(directory)
        if self.tokens is not None:
            self.tokens.write(directory)
        file = directory / "config.json"
        if model is not None and model.config is not None:
            write_text(file, json.dumps(dict(model.config), indent=2) + "\n")
        if file.exists():
            self._correct(file, None if model else self.vocabulary())

    def _correct(self, file: Path, tokens: object) -> None:
        """Have a config tell what the merged weights are."""
        config = read_json(file)
        before = deepcopy(config)
        if self.dtype is not None:
            config.pop("torch_dtype", None)
            config["dtype"] = self.dtype
        named = config.get("architectures") or []
        if self.model_class == "AutoModel" and re.search("For|Head", json.dumps(named)):
            del config["architectures"]  # a classifier's, of which this is the backbone
        if tokens is not None and "vocab_size" in config:  # an adapter may have added some
            config["vocab_size"] = tokens
        if config != before:
            write_text(file, json.dumps(config, indent=2) + "\n")
