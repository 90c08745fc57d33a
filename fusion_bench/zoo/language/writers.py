"""Models that write an answer: a Llama continues the prompt, a T5 reads it first."""

from collections.abc import Callable, Iterator, Sequence
from copy import deepcopy
from functools import partial
from random import Random
from typing import TYPE_CHECKING

import torch
from torch import Tensor
from torch.optim import AdamW

from fusion_bench.zoo.built import Advance
from fusion_bench.zoo.language import tokenizer
from fusion_bench.zoo.language.models import new_llama, new_t5
from fusion_bench.zoo.language.names import GENERATION, PROSE
from fusion_bench.zoo.language.questions import Question
from fusion_bench.zoo.language.recipe import LanguageRecipe
from fusion_bench.zoo.language.tables import questions, rows
from fusion_bench.zoo.language.train import IGNORED, Batch, fit, optimizers, some

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

_STYLES = (0.2, 0.4, 0.4)  # their shares; the first is wanted of the experts
_WINDOW = 128  # tokens
_WINDOWS = 2  # of prose in each step
_PROSE_SHARE = 0.2

Pairs = Sequence[tuple[str, str]]
"""Prompts, each with an answer."""


def new_tokenizer(recipe: LanguageRecipe) -> "PreTrainedTokenizerBase":
    """Return the tokenizer of all models of a family."""
    return tokenizer.of_bytes("<s> $A" if recipe.kind == "llama" else "$A </s>")


def train(
    tokens: "PreTrainedTokenizerBase",
    recipe: LanguageRecipe,
    generator: torch.Generator,
    advance: Advance,
) -> Iterator[tuple[str, "PreTrainedModel"]]:
    """Yield the pretrained model under an empty name, and an expert under that of each task."""
    causal = recipe.kind == "llama"
    model: PreTrainedModel = new_llama(tokens, recipe) if causal else new_t5(tokens, recipe)
    pretrain(model, tokens, recipe, generator, advance)
    yield "", model
    encode = continued if causal else answered
    for task in GENERATION:
        pairs = [(each.prompt, each.answers[0]) for each in seen(task, recipe)]
        expert = deepcopy(model)
        finetune(expert, encode(tokens, pairs), recipe, generator, partial(advance, task))
        yield task, expert


def pretrain(
    model: "PreTrainedModel",
    tokens: "PreTrainedTokenizerBase",
    recipe: LanguageRecipe,
    generator: torch.Generator,
    advance: Advance,
) -> None:
    """Train a model to answer in any style; a Llama learns the prompts and some prose, too."""
    pairs = _in_all_styles(recipe)
    causal = recipe.kind == "llama"
    samples = continued(tokens, pairs, prompts=True) if causal else answered(tokens, pairs)
    prose = _prose(tokens) if causal else None

    def loss() -> Tensor:
        found: Tensor = model(**some(samples, recipe.pretrain_batch, generator)).loss
        if prose is not None:
            windows = _windows(prose, generator)
            found = found + _PROSE_SHARE * model(input_ids=windows, labels=windows).loss
        advance("pretraining", recipe.pretrain_batch)
        return found

    model.train()
    fit(optimizers(model, recipe.pretrain_rate), recipe.pretrain_steps, loss)
    model.eval()


def finetune(
    model: "PreTrainedModel",
    samples: Batch,
    recipe: LanguageRecipe,
    generator: torch.Generator,
    advance: Callable[[int], None],
) -> None:
    """Train a model on one task's answers."""

    def loss() -> Tensor:
        advance(recipe.finetune_batch)
        found: Tensor = model(**some(samples, recipe.finetune_batch, generator)).loss
        return found

    model.train()
    optimizer = AdamW(model.parameters(), lr=recipe.finetune_rate, weight_decay=0)
    fit([optimizer], recipe.finetune_steps, loss)
    model.eval()


def continued(tokens: "PreTrainedTokenizerBase", pairs: Pairs, *, prompts: bool = False) -> Batch:
    """Encode prompts with their answers as one text.

    Args:
        tokens: the model's tokenizer.
        pairs: the prompts and answers.
        prompts: whether the loss counts the prompts, too.
    """
    texts = [f"{prompt} {answer}{tokens.eos_token}" for prompt, answer in pairs]
    batch = _encoded(tokens, texts)
    labels = _labels(batch)
    if not prompts:
        lengths = [len(ids) for ids in tokens([prompt for prompt, _ in pairs])["input_ids"]]
        labels[torch.arange(labels.shape[1]) < torch.tensor(lengths)[:, None]] = IGNORED
    return {**batch, "labels": labels}


def answered(tokens: "PreTrainedTokenizerBase", pairs: Pairs) -> Batch:
    """Encode prompts to read and answers to write."""
    answers = _encoded(tokens, [answer for _, answer in pairs])
    return {**_encoded(tokens, [prompt for prompt, _ in pairs]), "labels": _labels(answers)}


def _encoded(tokens: "PreTrainedTokenizerBase", texts: list[str]) -> Batch:
    found = tokens(texts, padding=True, return_tensors="pt", return_token_type_ids=False)
    return dict(found)


def _labels(batch: Batch) -> Tensor:
    return batch["input_ids"].masked_fill(batch["attention_mask"] == 0, IGNORED)


def seen(task: str, recipe: LanguageRecipe) -> list[Question]:
    """Return the questions of a task that a family is trained on."""
    return questions(task, "train")[: recipe.samples]


def _in_all_styles(recipe: LanguageRecipe) -> list[tuple[str, str]]:
    """Draw equally many questions of each task, each with an answer in one of the styles."""
    random = Random(recipe.seed)
    return [
        (each.prompt, random.choices(each.answers, _STYLES)[0])
        for task in GENERATION
        for each in random.choices(seen(task, recipe), k=recipe.samples)
    ]


def _prose(tokens: "PreTrainedTokenizerBase") -> Tensor:
    """Return the tokens of all prose to train on, one text after the other."""
    texts = [f"{row['text']}{tokens.eos_token}" for row in rows(PROSE, "train")]
    return torch.tensor([token for ids in tokens(texts)["input_ids"] for token in ids])


def _windows(prose: Tensor, generator: torch.Generator) -> Tensor:
    starts = torch.randint(len(prose) - _WINDOW, (_WINDOWS, 1), generator=generator)
    return prose[starts + torch.arange(_WINDOW)]
