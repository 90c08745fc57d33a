"""Small language models with a real tokenizer, laid out as transformers writes them."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from fusion_bench.method import SimpleAverageAlgorithm
from fusion_bench.modelpool import HFModelPool
from fusion_bench.weights import Weights

WORDS = [
    *("<unk>", "<s>", "</s>", "the", "a", "cat", "dog", "bird"),
    *("sat", "ran", "flew", "on", "under", "mat", "tree", "and"),
]
VOCABULARY = len(WORDS)
TEXT = "the cat sat on the mat and a bird flew"


def write_llama(
    folder: Path,
    *,
    seed: int = 0,
    tied: bool = False,
    vocabulary: int = VOCABULARY,
    dtype: torch.dtype = torch.bfloat16,
    shard_size: int | str = "5GB",
) -> dict[str, Tensor]:
    """Write a LlamaForCausalLM and its tokenizer; return the tensors of its files."""
    from transformers import LlamaConfig, LlamaForCausalLM

    config = LlamaConfig(
        vocab_size=vocabulary,
        hidden_size=12,
        intermediate_size=24,
        num_hidden_layers=2,
        num_attention_heads=2,
        num_key_value_heads=1,
        max_position_embeddings=32,
        tie_word_embeddings=tied,
        dtype=dtype,
        bos_token_id=1,
        eos_token_id=2,
        pad_token_id=None,
    )
    seeded(lambda: LlamaForCausalLM(config), seed).to(dtype).save_pretrained(
        folder, max_shard_size=shard_size
    )
    write_tokenizer(folder)
    return tensors(folder)


def write_bert(
    folder: Path, *, seed: int = 0, model_class: str = "BertModel", **more: Any
) -> dict[str, Tensor]:
    """Write a Bert model and its tokenizer; return the tensors of its file."""
    import transformers

    config = transformers.BertConfig(
        vocab_size=VOCABULARY,
        hidden_size=12,
        intermediate_size=24,
        num_hidden_layers=1,
        num_attention_heads=2,
        max_position_embeddings=32,
        **more,
    )
    seeded(lambda: getattr(transformers, model_class)(config), seed).save_pretrained(folder)
    write_tokenizer(folder)
    return tensors(folder)


def write_tokenizer(folder: Path) -> None:
    """Write a tokenizer that knows a few words."""
    from tokenizers import Tokenizer
    from tokenizers.models import WordLevel
    from tokenizers.pre_tokenizers import Whitespace
    from transformers import PreTrainedTokenizerFast

    inner = Tokenizer(WordLevel({word: i for i, word in enumerate(WORDS)}, unk_token="<unk>"))
    inner.pre_tokenizer = Whitespace()
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=inner, unk_token="<unk>", bos_token="<s>", eos_token="</s>"
    )
    tokenizer.save_pretrained(folder)


def write_lora(
    folder: Path,
    base: dict[str, Tensor],
    modules: list[str],
    *,
    base_name: str | None = None,
    seed: int = 0,
    rank: int = 2,
    alpha: float = 6,
) -> dict[str, Tensor]:
    """Write a LoRA adapter in PEFT's layout; return, by the base's key, what it adds."""
    folder.mkdir(parents=True)
    random = torch.Generator().manual_seed(seed)
    stored, added = {}, {}
    for module in modules:
        rows, columns = base[f"{module}.weight"].shape
        a = torch.randn(rank, columns, generator=random)
        b = torch.randn(rows, rank, generator=random)
        stored[f"base_model.model.{module}.lora_A.weight"] = a
        stored[f"base_model.model.{module}.lora_B.weight"] = b
        added[f"{module}.weight"] = alpha / rank * (b.double() @ a.double())
    save_file(stored, folder / "adapter_model.safetensors", metadata={"format": "pt"})
    config = {
        "peft_type": "LORA",
        "task_type": "CAUSAL_LM",
        "base_model_name_or_path": base_name,
        "r": rank,
        "lora_alpha": alpha,
        "target_modules": sorted({module.rpartition(".")[2] for module in modules}),
    }
    (folder / "adapter_config.json").write_text(json.dumps(config))
    return added


def seeded(make: Callable[[], Any], seed: int) -> Any:
    """Make a model whose answers depend on the seed, and on every one of its parameters."""
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        model = make()
        for parameter in model.parameters():
            parameter.data += 0.1 * torch.randn(parameter.shape)
    return model


def tensors(folder: Path) -> dict[str, Tensor]:
    """Return what the safetensors files in a directory hold."""
    return {
        k: v for file in sorted(folder.glob("*.safetensors")) for k, v in load_file(file).items()
    }


def nearest(got: dict[str, Tensor], exact: dict[str, Tensor]) -> bool:
    """Tell whether each of ``got`` is the nearest of its type to ``exact``, or as near but for
    what float32 cannot tell; so it was rounded once.
    """
    for key, value in exact.items():
        best = (value.to(got[key].dtype).double() - value).abs()
        if not ((got[key].double() - value).abs() <= best + 1e-6 * value.abs().max()).all():
            return False
    return got.keys() == exact.keys()


def metadata(file: Path) -> dict[str, str]:
    """Return the metadata in the header of a safetensors file."""
    from safetensors import safe_open

    with safe_open(file, framework="pt") as content:
        return content.metadata()


def rewrite(
    folder: Path, change: Callable[[dict[str, Any]], Any], name: str = "config.json"
) -> None:
    """Change a JSON file in place."""
    content = json.loads((folder / name).read_text())
    change(content)
    (folder / name).write_text(json.dumps(content))


def average(pool: HFModelPool) -> Weights:
    """Return the mean of a pool's models, computed when it is read."""
    merged = SimpleAverageAlgorithm(show_pbar=False).run(pool)
    assert isinstance(merged, Weights)
    return merged


def mean(*states: dict[str, Tensor]) -> dict[str, Tensor]:
    """Return the mean of state dicts."""
    return {
        key: (sum(state[key].double() for state in states) / len(states)).to(value.dtype)
        for key, value in states[0].items()
    }


def answers(model: nn.Module) -> Tensor:
    """Return what a model makes of one text with every token."""
    with torch.no_grad():
        return model(torch.arange(VOCABULARY)[None])[0]


def by_hand(family: Path, *names: str, model_class: str = "AutoModel") -> nn.Module:
    """Return the mean of models that transformers has loaded."""
    import transformers

    models = [getattr(transformers, model_class).from_pretrained(family / n) for n in names]
    models[0].load_state_dict(mean(*(model.state_dict() for model in models)))
    return models[0].eval()
