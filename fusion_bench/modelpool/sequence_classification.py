"""Classifiers of texts that were fine-tuned from one pretrained model."""

from collections.abc import Mapping
from typing import Any

from fusion_bench.arguments import keeps_arguments
from fusion_bench.modelpool.huggingface import HFModelPool
from fusion_bench.weights import MergePolicy


class SequenceClassificationModelPool(HFModelPool):
    """Named classifiers of texts, of which the base models are merged, and not the heads.

    A task pool puts each task's head on the merged model. Embedding models are merged likewise.

    Args:
        models: as in ``HFModelPool``; a model with a head is seen without it.
        tokenizer: ``union``, ``base`` or a model's name, or more of it as in ``HFModelPool``: all
            models are seen by the tokens of that tokenizer. Or where the merged model's tokenizer
            files come from, while the rows stay as they are; by default the reference model, which
            is the pretrained one or else the first.
        policy: as in ``HFModelPool``.
        max_shard_size: of a merged model's files.
        train_datasets: as in ``HFModelPool``.
        val_datasets: likewise.
        test_datasets: likewise.
        chat_template: as in ``HFModelPool``.
    """

    @keeps_arguments
    def __init__(
        self,
        models: Mapping[str, Any],
        tokenizer: Any = None,
        policy: Mapping[str, Any] | MergePolicy | None = None,
        max_shard_size: int | str = "5GB",
        train_datasets: Mapping[str, Any] | None = None,
        val_datasets: Mapping[str, Any] | None = None,
        test_datasets: Mapping[str, Any] | None = None,
        chat_template: str | None = None,
    ):
        super().__init__(
            models,
            "AutoModel",
            None,
            policy,
            max_shard_size,
            train_datasets,
            val_datasets,
            test_datasets,
            tokenizer,
            chat_template,
        )
