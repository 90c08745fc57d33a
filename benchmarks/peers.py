"""Other programs' merges, in a process and an environment of theirs: one merge a line of input.

A line is `merge`, or `save FILE` to write a result that is in memory. The answer are the seconds.

python peers.py fusionbench MODEL…          # FusionBench's SimpleAverageAlgorithm, in memory
python peers.py mergekit MODEL… OUTPUT      # mergekit's linear merge, to disk
"""

import os
import sys
import time
from pathlib import Path


def fusionbench(*models: str):
    """Return what averages CLIP vision encoders into a module."""
    from omegaconf import OmegaConf

    from fusion_bench.method import SimpleAverageAlgorithm
    from fusion_bench.modelpool import CLIPVisionModelPool

    def merge():
        named = {f"m{number}": model for number, model in enumerate(models)}
        return SimpleAverageAlgorithm().run(CLIPVisionModelPool(OmegaConf.create(named)))

    return merge


def mergekit(*arguments: str):
    """Return what averages language models into a directory, until it is on the disk."""
    from mergekit.config import MergeConfiguration
    from mergekit.merge import run_merge
    from mergekit.options import MergeOptions

    *models, output = arguments
    config = MergeConfiguration.model_validate(
        {
            "merge_method": "linear",
            "models": [{"model": model, "parameters": {"weight": 1.0}} for model in models],
            "dtype": "float32",  # as the others calculate; in bfloat16 the result is another
            "out_dtype": "bfloat16",
        }
    )

    def merge() -> None:
        options = MergeOptions(copy_tokenizer=False, quiet=True, lazy_unpickle=True)
        run_merge(config, output, options)
        for file in Path(output).iterdir():
            descriptor = os.open(file, os.O_RDONLY)
            os.fsync(descriptor)
            os.close(descriptor)

    return merge


if __name__ == "__main__":
    say = os.fdopen(os.dup(1), "w")  # the libraries may print what they like elsewhere
    os.dup2(2, 1)
    work = {"fusionbench": fusionbench, "mergekit": mergekit}[sys.argv[1]](*sys.argv[2:])
    for line in sys.stdin:
        start = time.perf_counter()
        made = work()
        seconds = time.perf_counter() - start
        if line.startswith("save "):
            from safetensors.torch import save_file

            tensors = {key: tensor.contiguous() for key, tensor in made.state_dict().items()}
            save_file(tensors, line.split(maxsplit=1)[1].strip())
        del made
        print(seconds, file=say, flush=True)
