"""Models that classify a text or a pair, or give it a score.

The head of a task is trained first, on the features of the pretrained encoder, and stays as it is
while an encoder is fine-tuned under it: so encoders can be compared and merged.
"""

from collections.abc import Callable, Iterator
from copy import deepcopy
from functools import partial
from typing import TYPE_CHECKING

import torch
from torch import Tensor
from torch.nn.functional import cross_entropy, mse_loss, pad
from torch.optim import AdamW

from fusion_bench.zoo.built import Advance
from fusion_bench.zoo.language import tokenizer
from fusion_bench.zoo.language.models import new_bert
from fusion_bench.zoo.language.names import CLASS_NAMES, SCORED, TASKS
from fusion_bench.zoo.language.recipe import LanguageRecipe
from fusion_bench.zoo.language.tables import rows, target_column, text_columns
from fusion_bench.zoo.language.train import Batch, fit, optimizers, some

if TYPE_CHECKING:
    from transformers import (
        BertForSequenceClassification,
        BertModel,
        PreTrainedModel,
        PreTrainedTokenizerBase,
    )

_TASKS = TASKS["bert-tiny"]
_MASKED = 0.25  # of the words
_PROBE_BATCH = 256
_PROBE_RATE = 1e-2


def new_tokenizer(recipe: LanguageRecipe) -> "PreTrainedTokenizerBase":
    """Return the tokenizer of all models, which knows the words of all tasks."""
    return tokenizer.of_words(
        row[column]
        for task in _TASKS
        for row in rows(task, "train")
        for column in text_columns(task)
    )


def train(
    tokens: "PreTrainedTokenizerBase",
    recipe: LanguageRecipe,
    generator: torch.Generator,
    advance: Advance,
) -> Iterator[tuple[str, "PreTrainedModel"]]:
    """Yield the pretrained model under an empty name, and an expert under that of each task."""
    samples = {task: _first(recipe.samples, encoded(tokens, task)) for task in _TASKS}
    encoder = pretrain(tokens, list(samples.values()), recipe, generator, advance)
    yield "", encoder
    for task in _TASKS:
        expert = with_head(encoder, task)
        probe(expert, samples[task], recipe, generator)
        finetune(expert, samples[task], recipe, generator, partial(advance, task))
        yield task, expert


def encoded(tokens: "PreTrainedTokenizerBase", task: str, split: str = "train") -> Batch:
    """Encode the samples of a task, with their targets as labels."""
    found = rows(task, split)
    texts = ([row[column] for row in found] for column in text_columns(task))
    targets = torch.tensor([row[target_column(task)] for row in found])
    return {**tokens(*texts, padding=True, return_tensors="pt"), "labels": targets}


def pretrain(
    tokens: "PreTrainedTokenizerBase",
    tasks: list[Batch],
    recipe: LanguageRecipe,
    generator: torch.Generator,
    advance: Advance,
) -> "BertModel":
    """Return an encoder that was trained to fill in masked words of all tasks' texts."""
    model = new_bert(tokens, recipe)
    texts = _joined(tasks)

    def loss() -> Tensor:
        batch = some(texts, recipe.pretrain_batch, generator)
        ids = batch["input_ids"]
        hidden = torch.rand(ids.shape, generator=generator) < _MASKED
        hidden &= ids > max(tokens.all_special_ids)
        batch["input_ids"] = ids.masked_fill(hidden, tokens.mask_token_id)
        logits = model(**batch).prediction_logits
        advance("pretraining", len(ids))
        return cross_entropy(logits[hidden], ids[hidden])

    model.train()
    fit(optimizers(model, recipe.pretrain_rate), recipe.pretrain_steps, loss)
    encoder: BertModel = model.bert.eval()
    return encoder


def with_head(encoder: "BertModel", task: str) -> "BertForSequenceClassification":
    """Return a copy of an encoder with an untrained head for a task."""
    from transformers import BertForSequenceClassification

    config = deepcopy(encoder.config)
    names = ("score",) if task == SCORED else CLASS_NAMES[task]
    config.id2label = dict(enumerate(names))
    config.label2id = {name: number for number, name in enumerate(names)}
    config.problem_type = "regression" if task == SCORED else "single_label_classification"
    model = BertForSequenceClassification(config)
    model.bert = deepcopy(encoder)
    return model.eval()


def probe(
    model: "BertForSequenceClassification",
    samples: Batch,
    recipe: LanguageRecipe,
    generator: torch.Generator,
) -> None:
    """Train the head on the features of the encoder."""
    inputs = {name: values for name, values in samples.items() if name != "labels"}
    with torch.no_grad():
        features = model.bert(**inputs).pooler_output

    def loss() -> Tensor:
        drawn = torch.randint(len(features), (_PROBE_BATCH,), generator=generator)
        return _loss(model, model.classifier(features[drawn]), samples["labels"][drawn])

    optimizer = AdamW(model.classifier.parameters(), lr=_PROBE_RATE, weight_decay=0)
    fit([optimizer], recipe.probe_steps, loss)


def finetune(
    model: "BertForSequenceClassification",
    samples: Batch,
    recipe: LanguageRecipe,
    generator: torch.Generator,
    advance: Callable[[int], None],
) -> None:
    """Train the encoder under the head."""

    def loss() -> Tensor:
        batch = some(samples, recipe.finetune_batch, generator)
        labels = batch.pop("labels")
        advance(len(labels))
        return _loss(model, model(**batch).logits, labels)

    model.train()
    optimizer = AdamW(model.bert.parameters(), lr=recipe.finetune_rate, weight_decay=0)
    fit([optimizer], recipe.finetune_steps, loss)
    model.eval()


def _loss(model: "PreTrainedModel", logits: Tensor, labels: Tensor) -> Tensor:
    if model.config.problem_type == "regression":
        return mse_loss(logits[:, 0], labels)
    return cross_entropy(logits, labels)


def _first(count: int, samples: Batch) -> Batch:
    return {name: values[:count] for name, values in samples.items()}


def _joined(tasks: list[Batch]) -> Batch:
    """Return all tasks' texts, padded to the longest; the id of padding is 0."""
    width = max(batch["input_ids"].shape[1] for batch in tasks)
    return {
        name: torch.cat([pad(batch[name], (0, width - batch[name].shape[1])) for batch in tasks])
        for name in ("input_ids", "token_type_ids", "attention_mask")
    }
