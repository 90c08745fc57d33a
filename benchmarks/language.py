"""How long language models take to answer, beside the harness's own class and the bare model.

    python benchmarks/language.py
    python benchmarks/language.py --small                            # to try it out
    python benchmarks/language.py --size 1b --dtype bfloat16 --device cuda

A random Llama is asked questions of four answers that share a context, and documents. The bare
model reads the same tokens in the same batches, and nothing is made of its logits. Before times
are taken, all answers are compared. What is compared is measured in turns.

Then ten coefficients of task arithmetic are searched with the tiny Llamas of the zoo: multiple
choice on validation texts, the winner and the inputs on test texts. Every call of a model is noted
once, and made again without all that surrounds it.
"""

import random
import shutil
import tempfile
from collections.abc import Callable
from functools import wraps
from typing import Any

import measure
import numpy as np
import torch
from lightning.fabric import Fabric
from measure import Record, alternate, rounds_of, summary

from fusion_bench.configs import composed
from fusion_bench.instantiate import instantiate
from fusion_bench.progress import quiet_libraries
from fusion_bench.storage import cache_dir
from fusion_bench.taskpool.language.model import LanguageModel, windows
from fusion_bench.taskpool.language.requests import Likelihood
from fusion_bench.taskpool.loading import BatchLimit, Loading
from fusion_bench.taskpool.task import Evaluation
from fusion_bench.threads import suited_threads
from fusion_bench.tokenizer import TokenizerSource
from fusion_bench.zoo.language import model_path

#: Hidden size, layers, heads, vocabulary.
SIZES = {
    "tiny": (96, 3, 4, 512),
    "small": (512, 8, 8, 8_192),
    "1b": (2048, 16, 32, 128_256),
}
LENGTH = 512


def main() -> None:
    """Make a model and texts, compare the answers, take the times, print the tables."""
    parser = measure.parser(__doc__)
    parser.add_argument("--size", choices=SIZES, default="small")
    parser.add_argument("--dtype", choices=("float32", "bfloat16"), default="float32")
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--questions", type=int, default=64)
    parser.add_argument("--documents", type=int, default=16)
    parser.add_argument("--batch-sizes", default="1,8,32")
    arguments = parser.parse_args()
    rounds = rounds_of(arguments, 3)
    record = Record(arguments, rounds, ["torch", "transformers", "lm_eval"])
    quiet_libraries()
    if arguments.small:
        arguments.size, arguments.questions, arguments.documents = "tiny", 12, 4
        arguments.batch_sizes = "4"
    module = model(arguments.size, getattr(torch, arguments.dtype), arguments.device)
    asked, texts = questions(arguments.questions), documents(arguments.documents)
    sizes = [int(size) for size in arguments.batch_sizes.split(",")]
    for size in sizes:
        record.table(
            f"{arguments.questions} questions of 4 answers, batches of {size}",
            lambda size=size: timed(choosing(module, asked, size, arguments.device), rounds),
        )
    record.table(
        f"{arguments.documents} documents, batches of {max(sizes)}",
        lambda: timed(predicting(module, texts, max(sizes), arguments.device), rounds),
    )
    if not arguments.small and arguments.device == "cpu":
        record.table("ten coefficients are searched", lambda: timed(searching(), rounds))
    record.show()


def timed(works: dict[str, Callable[[], Any]], rounds: int) -> dict[str, Any]:
    """Compare what the first two return, where they return something; take the times of all."""
    (name, ours), (other, theirs), *_ = works.items()
    found, expected = ours(), theirs()
    if expected is not None:
        np.testing.assert_allclose(found, expected, 2e-2, 2e-2, err_msg=f"{name}, {other}")
    return {name: summary(seconds) for name, seconds in alternate(works, rounds).items()}


def model(size: str, dtype: torch.dtype, device: str) -> Any:
    """Return a random Llama."""
    from transformers import LlamaConfig, LlamaForCausalLM

    hidden, layers, heads, vocabulary = SIZES[size]
    config = LlamaConfig(
        vocab_size=vocabulary,
        hidden_size=hidden,
        intermediate_size=hidden * 5 // 2 // 16 * 16,
        num_hidden_layers=layers,
        num_attention_heads=heads,
        num_key_value_heads=max(1, heads // 4),
        max_position_embeddings=LENGTH,
        bos_token_id=1,
        eos_token_id=2,
        pad_token_id=0,
    )
    torch.manual_seed(0)
    return LlamaForCausalLM(config).to(device, dtype).eval()


def tokenizer() -> Any:
    """Return a tokenizer of a token a letter."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    vocabulary = {chr(i): i for i in range(10, 127)} | {"<pad>": 0, "<s>": 1, "</s>": 2}
    made = Tokenizer(models.WordLevel(vocabulary, unk_token="?"))
    made.pre_tokenizer = pre_tokenizers.Split("", "isolated")
    made.decoder = decoders.Fuse()
    names = {"bos_token": "<s>", "eos_token": "</s>", "pad_token": "<pad>"}
    return PreTrainedTokenizerFast(tokenizer_object=made, model_max_length=LENGTH, **names)


def questions(count: int) -> list[tuple[str, list[str]]]:
    """Return contexts of 60 to 160 letters, with four answers of 2 to 24 each."""
    drawn = random.Random(0)
    return [
        (text(drawn, 60, 160) + ":", [f" {text(drawn, 2, 24)}" for _ in range(4)])
        for _ in range(count)
    ]


def documents(count: int) -> list[str]:
    """Return documents of 200 to 900 letters."""
    drawn = random.Random(1)
    return [text(drawn, 200, 900) for _ in range(count)]


def text(drawn: random.Random, least: int, most: int) -> str:
    """Return random letters."""
    return "".join(drawn.choice("abcdefgh") for _ in range(drawn.randint(least, most)))


def language_model(module: Any, batch_size: int, device: str) -> LanguageModel:
    """Return our class around the model; nothing is kept."""
    fabric = Fabric(accelerator="cuda" if device != "cpu" else "cpu", devices=1)
    loading = Loading.for_device({"batch_size": batch_size}, fabric)
    how = Evaluation(fabric, loading, BatchLimit(), "model", "asking")
    made = tokenizer()
    return LanguageModel(module, TokenizerSource(lambda: made), how)


def choosing(
    module: Any, asked: list[tuple[str, list[str]]], batch_size: int, device: str
) -> dict[str, Callable[[], Any]]:
    """Return what answers the questions."""
    from lm_eval.api.instance import Instance
    from lm_eval.models.huggingface import HFLM

    pairs = [(context, answer) for context, answers in asked for answer in answers]
    ours = language_model(module, batch_size, device)
    theirs = HFLM(pretrained=module, tokenizer=tokenizer(), batch_size=batch_size)
    requests = [Instance("loglikelihood", {}, pair, i) for i, pair in enumerate(pairs)]
    likelihoods = ours.encoder.likelihoods(pairs)
    together = [_joined(likelihoods[i : i + 4]) for i in range(0, len(likelihoods), 4)]

    return {
        "FusionBench": lambda: ours.log_likelihoods(ours.encoder.likelihoods(pairs))[0],
        "the harness's HFLM": lambda: [
            value for value, _ in theirs.loglikelihood(requests, disable_tqdm=True)
        ],
        "the bare model, contexts shared": lambda: bare(module, together, batch_size, device),
        "the bare model, each answer alone": lambda: bare(
            module,
            [(own.context + own.continuation[:-1], len(own.continuation)) for own in likelihoods],
            batch_size,
            device,
        ),
    }


def predicting(
    module: Any, texts: list[str], batch_size: int, device: str
) -> dict[str, Callable[[], Any]]:
    """Return what predicts the documents."""
    from lm_eval.api.instance import Instance
    from lm_eval.models.huggingface import HFLM

    ours = language_model(module, batch_size, device)
    theirs = HFLM(pretrained=module, tokenizer=tokenizer(), batch_size=batch_size)
    requests = [Instance("loglikelihood_rolling", {}, (t,), i) for i, t in enumerate(texts)]

    def split() -> list[list[Likelihood]]:
        return [windows(ours.encoder.document(own)[0], 1, LENGTH, LENGTH) for own in texts]

    def predict() -> list[float]:
        parts = split()
        found, _ = ours.log_likelihoods([own for part in parts for own in part])
        ends = np.cumsum([len(part) for part in parts])
        return [float(own.sum()) for own in np.split(found, ends[:-1])]

    read = [
        (own.context + own.continuation[:-1], len(own.continuation))
        for part in split()
        for own in part
    ]
    return {
        "FusionBench": predict,
        "the harness's HFLM": lambda: theirs.loglikelihood_rolling(requests, disable_tqdm=True),
        "the bare model": lambda: bare(module, read, batch_size, device),
    }


def searching() -> dict[str, Callable[[], Any]]:
    """Return a search, anew and known, and its calls of models alone."""
    config = composed(
        "+search._target_=fusion_bench.programs.GridSearch",
        f"+search.space.scaling_factor={[round(0.1 * i, 1) for i in range(1, 11)]}",
        "method=task_arithmetic",
        "modelpool=CausalLMPool/zoo",
        "taskpool=CausalLMEvaluation/zoo_choices",
    )

    def run() -> None:
        with tempfile.TemporaryDirectory() as place:
            instantiate(config, output_dir=place).run()

    def anew() -> None:
        for kept in ("scores", "requests"):
            shutil.rmtree(cache_dir() / kept, ignore_errors=True)
        run()

    from transformers import LlamaForCausalLM

    place = model_path("llama-tiny")  # built now, so that training is not noted
    calls: list[dict[str, Any]] = []
    forward = LlamaForCausalLM.forward

    @wraps(forward)
    def noted(module: Any, **given: Any) -> Any:
        calls.append(given)
        return forward(module, **given)

    LlamaForCausalLM.forward = noted
    anew()
    LlamaForCausalLM.forward = forward
    model = LlamaForCausalLM.from_pretrained(place).eval()

    @torch.inference_mode()
    def replay() -> None:
        with suited_threads(1):
            for given in calls:
                model(**given)

    return {"FusionBench": anew, "its calls of models alone": replay, "FusionBench again": run}


def _joined(asked: list[Likelihood]) -> tuple[tuple[int, ...], int]:
    """Return a context with all its answers as one text, and how many logits they need."""
    answers = tuple(token for own in asked for token in own.continuation[:-1])
    return asked[0].context + answers, 1 + len(answers)


@torch.inference_mode()
def bare(
    module: Any, rows: list[tuple[tuple[int, ...], int]], batch_size: int, device: str
) -> list[float]:
    """Read tokens, the longest first, and keep the logits that are needed; return one of each."""
    ordered = sorted(rows, key=lambda row: -len(row[0]))
    found = []
    for i in range(0, len(ordered), batch_size):
        part = ordered[i : i + batch_size]
        width = len(part[0][0])
        ids = torch.tensor([[*own, *[0] * (width - len(own))] for own, _ in part], device=device)
        keep = width - min(len(own) - count for own, count in part)
        logits = module(input_ids=ids, use_cache=False, logits_to_keep=keep).logits
        found += logits[:, -1, 0].tolist()
    return found


if __name__ == "__main__":
    main()
