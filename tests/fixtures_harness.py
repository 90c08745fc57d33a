"""A tiny model with a byte tokenizer, and tasks for lm-eval with local data."""

import json
from collections.abc import Mapping
from contextlib import chdir
from pathlib import Path
from typing import Any

import torch
import yaml
from torch import nn

from fusion_bench.taskpool import LMEvalHarnessTaskPool

#: A chat template with a role for the system.
CHAT = (
    "{% for m in messages %}<{{ m['role'] }}>{{ m['content'] }}\n{% endfor %}"
    "{% if add_generation_prompt %}<assistant>{% endif %}"
)
QUESTIONS = [
    {"question": f"{a} and {b}", "options": [str(a), str(a + b), "no"], "right": (a + b) % 3}
    for a, b in [(1, 2), (3, 5), (2, 2), (7, 1), (4, 4), (9, 3), (5, 6)]
]
TEXTS = [
    {"text": "A cat sat on a mat."},
    {"text": "Dogs run. " * 12},
    {"text": "Birds fly over the sea,\nand back."},
]


def byte_tokenizer(*, bos: bool = False, chat: str | None = None) -> Any:
    """Return a tokenizer of bytes, with an end of texts, and a beginning where it is wanted."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors
    from transformers import PreTrainedTokenizerFast

    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    vocabulary = {"<s>": 0, "</s>": 1} | {char: i + 2 for i, char in enumerate(alphabet)}
    inner = Tokenizer(models.BPE(vocab=vocabulary, merges=[]))
    inner.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    inner.decoder = decoders.ByteLevel()
    if bos:
        inner.post_processor = processors.TemplateProcessing(
            single="<s> $A", special_tokens=[("<s>", 0)]
        )
    made = PreTrainedTokenizerFast(tokenizer_object=inner, bos_token="<s>", eos_token="</s>")
    made.chat_template = chat
    return made


def tiny_llama(seed: int = 0, length: int = 512) -> nn.Module:
    """Return a random model, whose answers differ from text to text."""
    from transformers import LlamaConfig, LlamaForCausalLM

    config = LlamaConfig(
        vocab_size=258,
        hidden_size=16,
        intermediate_size=32,
        num_hidden_layers=2,
        num_attention_heads=2,
        max_position_embeddings=length,
        bos_token_id=0,
        eos_token_id=1,
        pad_token_id=None,
    )
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        model = LlamaForCausalLM(config)
        for parameter in model.parameters():
            parameter.data += 0.3 * torch.randn(parameter.shape)
    return model.eval()


def write_task(folder: Path, name: str, **config: Any) -> None:
    """Write a task's file."""
    content = {"task": name, "metadata": {"version": 1.0}, **config}
    (folder / f"{name}.yaml").write_text(yaml.safe_dump(content, sort_keys=False))


def write_rows(path: Path, rows: list[dict[str, Any]]) -> None:
    """Write a file of JSON lines."""
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))


def from_file(name: str, **more: str) -> dict[str, Any]:
    """Return what a task says of data in a file beside it."""
    files = {"test": name, **more}
    splits = {"test_split": "test"} | ({"training_split": "train"} if "train" in more else {})
    return {"dataset_path": "json", "dataset_kwargs": {"data_files": files}, **splits}


QUESTION = {"doc_to_text": "Q: {{question}}?\nA:", "doc_to_target": "right"}
CHOICE: Mapping[str, Any] = {
    "output_type": "multiple_choice",
    **QUESTION,
    "doc_to_choice": "options",
}
WRITTEN: Mapping[str, Any] = {
    "output_type": "generate_until",
    "doc_to_text": "Q: {{question}}?\nA:",
    "doc_to_target": "{{options[right]}}",
}


def metrics(*names: str) -> list[dict[str, Any]]:
    """Return a list of metrics as a task has it."""
    return [{"metric": name} for name in names]


def own_pool(names: Any, folder: Path, tokenizer: Any, **options: Any) -> LMEvalHarnessTaskPool:
    """Return a pool over a folder of tasks."""
    options = {"cache": False, **options}
    return LMEvalHarnessTaskPool(names, include_path=str(folder), tokenizer=tokenizer, **options)


def by_harness(
    model: nn.Module, tokenizer: Any, names: list[str], folder: Path, **options: Any
) -> Any:
    """Return the harness's own results and records of tasks, by its own class of models."""
    from lm_eval.evaluator import simple_evaluate
    from lm_eval.models.huggingface import HFLM
    from lm_eval.tasks import TaskManager

    with chdir(folder):  # where it looks for data
        return simple_evaluate(
            HFLM(pretrained=model, tokenizer=tokenizer, batch_size=3),
            tasks=names,
            task_manager=TaskManager(include_path=str(folder), include_defaults=False),
            bootstrap_iters=0,
            log_samples=True,
            **options,
        )


def write_tasks(folder: Path) -> None:
    """Write tasks of every kind, and a group of two."""
    write_rows(folder / "data" / "questions.jsonl", QUESTIONS)
    write_rows(folder / "data" / "shots.jsonl", QUESTIONS[::-1])
    write_rows(folder / "data" / "texts.jsonl", TEXTS)
    asked = from_file("data/questions.jsonl")
    shown = from_file("data/questions.jsonl", train="data/shots.jsonl")
    norm = metrics("acc", "acc_norm", "brier_score", "f1", "mcc")
    write_task(folder, "choice", **asked, **CHOICE, metric_list=norm[:3])
    write_task(folder, "shots", **shown, **CHOICE, num_fewshot=2, metric_list=metrics("acc"))
    write_task(
        folder,
        "listed",
        **asked,
        **{**CHOICE, "doc_to_choice": ["one", "two", "three"]},
        metric_list=metrics("acc", "acc_bytes"),
    )
    write_task(folder, "mutual", **asked, **CHOICE, metric_list=metrics("acc", "acc_mutual_info"))
    binary = {**CHOICE, "doc_to_choice": ["no", "yes"], "doc_to_target": "{{right % 2}}"}
    write_task(folder, "binary", **asked, **binary, metric_list=metrics("f1", "mcc", "acc"))
    write_task(
        folder,
        "likely",
        **asked,
        output_type="loglikelihood",
        doc_to_text="{{question}}",
        doc_to_target=" {{options[1]}}",
        metric_list=metrics("perplexity", "acc"),
    )
    write_task(
        folder,
        "rolling",
        **from_file("data/texts.jsonl"),
        output_type="loglikelihood_rolling",
        doc_to_text="",
        doc_to_target="{{text}}",
        metric_list=metrics("word_perplexity", "byte_perplexity", "bits_per_byte"),
    )
    written = {"until": ["\n"], "max_gen_toks": 4, "do_sample": False}
    write_task(
        folder,
        "written",
        **asked,
        **WRITTEN,
        generation_kwargs=written,
        metric_list=metrics("exact_match", "bleu"),
    )
    write_task(
        folder,
        "filtered",
        **asked,
        **WRITTEN,
        generation_kwargs={**written, "until": ["e", "\n"]},
        metric_list=[{"metric": "exact_match", "ignore_case": True}],
        filter_list=[
            {
                "name": "number",
                "filter": [
                    {"function": "regex", "regex_pattern": "(\\w)"},
                    {"function": "take_first"},
                ],
            },
            {"name": "loose", "filter": [{"function": "lowercase"}, {"function": "take_first"}]},
        ],
    )
    (folder / "both.yaml").write_text(
        yaml.safe_dump({"group": "both", "task": ["choice", "written"]})
    )
