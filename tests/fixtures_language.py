"""Tiny random language models, and a tokenizer of a token a letter."""

from collections.abc import Callable
from typing import TYPE_CHECKING, Any

import torch
from fixtures_llm import seeded
from lightning.fabric import Fabric
from torch import nn

from fusion_bench.taskpool.language.model import LanguageModel
from fusion_bench.taskpool.language.requests import Generation, Likelihood
from fusion_bench.taskpool.loading import BatchLimit, Loading
from fusion_bench.taskpool.task import Evaluation
from fusion_bench.tokenizer import TokenizerSource

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerFast

PAD, BOS, EOS = 0, 1, 2
VOCABULARY = 128
CPU = Fabric(accelerator="cpu", devices=1)
LENGTH = 64


def letters(
    *, bos: bool = True, eos: bool = False, chat: bool = False, named: bool = True
) -> "PreTrainedTokenizerFast":
    """Return a tokenizer of ASCII.

    It puts a token in front, or at the end, where asked to. Where these are not ``named`` nobody
    says what they mean, as with ``[CLS]`` and ``[SEP]``.
    """
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors
    from transformers import PreTrainedTokenizerFast

    vocabulary = {chr(i): i for i in range(10, 127)} | {"<pad>": PAD, "<s>": BOS, "</s>": EOS}
    made = Tokenizer(models.WordLevel(vocabulary, unk_token="?"))
    made.pre_tokenizer = pre_tokenizers.Split("", "isolated")
    made.decoder = decoders.Fuse()
    around = f"{'<s> ' * bos}$A{' </s>' * eos}"
    special = [("<s>", BOS), ("</s>", EOS)]
    made.post_processor = processors.TemplateProcessing(single=around, special_tokens=special)
    template = "{% for m in messages %}[{{ m.role }}]{{ m.content }}{% endfor %}[reply]"
    return PreTrainedTokenizerFast(
        tokenizer_object=made,
        bos_token="<s>" if named else None,
        eos_token="</s>" if named else None,
        pad_token="<pad>",
        model_max_length=LENGTH,
        chat_template=template if chat else None,
    )


def tiny(kind: str, seed: int = 0, **more: Any) -> nn.Module:
    """Return a random model, in eval mode, whose answers differ from text to text."""
    import transformers as hf

    sizes: dict[str, dict[str, Any]] = {
        "Llama": {"intermediate_size": 48, "num_key_value_heads": 1},
        "Mistral": {"intermediate_size": 48, "num_key_value_heads": 1, "sliding_window": 24},
        "GPT2": {"n_embd": 24, "n_layer": 2, "n_head": 2, "n_positions": LENGTH},
        "Bloom": {"n_layer": 2, "n_head": 2},
        "T5": {"d_model": 24, "d_kv": 12, "d_ff": 48, "num_layers": 2, "num_heads": 2},
    }
    common: dict[str, Any] = {"vocab_size": VOCABULARY, "hidden_size": 24}
    if kind in ("Llama", "Mistral"):
        common |= {"num_hidden_layers": 2, "num_attention_heads": 2}
        common |= {"max_position_embeddings": LENGTH, "initializer_range": 0.4}
    if kind in ("GPT2", "T5"):
        del common["hidden_size"]
    common |= {"bos_token_id": BOS, "eos_token_id": EOS, "pad_token_id": PAD}
    if kind == "T5":
        common["decoder_start_token_id"] = PAD
    head = {"GPT2": "LMHeadModel", "T5": "ForConditionalGeneration"}.get(kind, "ForCausalLM")
    config = getattr(hf, f"{kind}Config")(**common, **sizes[kind], **more)

    def make() -> nn.Module:
        model = getattr(hf, f"{kind}{head}")(config)
        if kind in (
            "GPT2",
            "Bloom",
            "T5",
        ):  # whose own initialisation gives nearly the same everywhere
            for parameter in model.parameters():
                if parameter.ndim == 2:
                    nn.init.normal_(parameter, std=0.3)
        return model

    return seeded(make, seed).eval()


def asked(
    module: nn.Module,
    *,
    batch_size: int = 8,
    computation: str | None = None,
    tokenizer: Any = None,
    max_length: int | None = None,
    fabric: Fabric = CPU,
) -> LanguageModel:
    """Return a language model that can be asked."""
    source = TokenizerSource(lambda: tokenizer or letters())
    loading = Loading.for_device({"batch_size": batch_size}, fabric)
    how = Evaluation(fabric, loading, BatchLimit(), "model", "asking", computation)
    return LanguageModel(module, source, how, max_length)


@torch.no_grad()
def reference(module: nn.Module, request: Likelihood) -> tuple[float, bool]:
    """Ask for one continuation alone, in float64, without padding."""
    wide: Any = module.double()
    config: Any = wide.config
    wanted = torch.tensor(request.continuation)
    if config.is_encoder_decoder:
        logits = wide(
            input_ids=torch.tensor([request.context]),
            decoder_input_ids=torch.tensor(
                [[config.decoder_start_token_id, *request.continuation[:-1]]]
            ),
        ).logits[0]
    else:
        ids = torch.tensor([request.context + request.continuation[:-1]])
        logits = wide(input_ids=ids, use_cache=False).logits[0, -len(wanted) :]
    module.float()
    values = logits.log_softmax(-1).gather(1, wanted[:, None])
    return float(values.sum()), bool((logits.argmax(-1) == wanted).all())


@torch.no_grad()
def greedy(module: nn.Module, request: Generation) -> list[int]:
    """Write one token after the other, each after all before it, until the end."""
    model: Any = module
    written: list[int] = []
    while len(written) < request.max_new_tokens:
        if model.config.is_encoder_decoder:
            logits = model(
                input_ids=torch.tensor([request.context]),
                decoder_input_ids=torch.tensor([[model.config.decoder_start_token_id, *written]]),
            ).logits
        else:
            ids = torch.tensor([[*request.context, *written]])
            logits = model(input_ids=ids, use_cache=False).logits
        token = int(logits[0, -1].argmax())
        if token == EOS:
            break
        written.append(token)
    return written


def counting(module: nn.Module) -> Callable[[], int]:
    """Return what tells how often the module was called since."""
    calls = [0]

    def count(*_: Any, **__: Any) -> None:
        calls[0] += 1

    module.register_forward_pre_hook(count, with_kwargs=True)
    return lambda: calls[0]
