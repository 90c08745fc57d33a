"""Merge two language models into a folder, and load it.

python examples/merge_from_python.py
"""

from pathlib import Path
from tempfile import TemporaryDirectory

import torch
from transformers import AutoModelForCausalLM, LlamaConfig, LlamaForCausalLM

import fusion_bench

config = LlamaConfig(
    vocab_size=32, hidden_size=8, intermediate_size=16, num_hidden_layers=2, num_attention_heads=2
)
torch.manual_seed(0)
with TemporaryDirectory() as folder:
    # Models of your own, or of the Hub, are named by their paths alike.
    paths = {name: Path(folder) / name for name in ("base", "code", "chat")}
    for path in paths.values():
        LlamaForCausalLM(config).save_pretrained(path)
    merged = fusion_bench.merge(
        [paths["code"], paths["chat"]],
        base=paths["base"],
        method="ties",
        threshold=50,  # an option of the method
        out=Path(folder) / "merged",
    )
    print("written:", sorted(path.name for path in merged.iterdir()))
    model = AutoModelForCausalLM.from_pretrained(merged)
    print("loads as a", type(model).__name__)

    # Modules and paths may be mixed; without `out` the merged module is returned.
    module = fusion_bench.merge([model, paths["chat"]], method="linear", weights=[0.5, 0.5])
    print("the same class:", type(module) is type(model))
