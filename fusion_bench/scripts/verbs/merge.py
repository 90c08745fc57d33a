"""Merge models into a folder, entry by entry, so that they may be larger than memory.

MODEL is a folder, a repository of the Hub, a file of weights or a folder with an adapter. Options
of the method are given as key=value, and so is any other setting of 'merge_llm' by its full name.
"""

import json
from argparse import ArgumentParser, Namespace
from collections.abc import Sequence
from pathlib import Path

EXAMPLES = """
fusion_bench merge first second --out merged
fusion_bench merge first second --base base --method ties --out merged threshold=10
fusion_bench merge owner/first owner/second --base owner/base --out merged --dtype bfloat16
"""
#: What the name of a model's class in transformers ends with, and the pool of such models.
_POOLS = {
    "ForCausalLM": "CausalLMPool",
    "LMHeadModel": "CausalLMPool",
    "ForConditionalGeneration": "Seq2SeqLMPool",
    "ForSequenceClassification": "SequenceClassificationModelPool",
    "CLIPVisionModel": "CLIPVisionModelPool",
    "CLIPVisionModelWithProjection": "CLIPVisionModelPool",
    "CLIPModel": "CLIPVisionModelPool",
}


def add_arguments(parser: ArgumentParser) -> None:
    """Add models, method and folder."""
    parser.add_argument("models", nargs="+", metavar="MODEL", help="a model, or key=value")
    parser.add_argument("--out", required=True, metavar="DIR", help="the folder to write")
    parser.add_argument("--base", metavar="MODEL", help="the model that they were fine-tuned from")
    parser.add_argument("--method", default="simple_average", help="default: simple_average")
    parser.add_argument("--dtype", help="of the merged weights; default: that of the models")
    parser.add_argument("--overwrite", action="store_true", help="replace another model in DIR")
    parser.add_argument("--dry-run", action="store_true", help="only show the plan")


def run(arguments: Namespace) -> None:
    """Run the config ``merge_llm`` with these models.

    Raises:
        FusionBenchError: no such method, or one that needs a base without one.
    """
    from fusion_bench.catalog import find
    from fusion_bench.problems import FusionBenchError
    from fusion_bench.scripts.run import run_composed
    from fusion_bench.scripts.words import in_grammar, named_after

    given = [word for word in arguments.models if "=" not in word or Path(word).exists()]
    options = [word for word in arguments.models if word not in given]
    method = find(arguments.method, ("methods",))
    if "pretrained" in method.needs and arguments.base is None:
        raise FusionBenchError(
            f"{method.name} needs the model that the others were fine-tuned from.",
            "Add --base MODEL.",
        )
    models = named_after(given)
    if arguments.base is not None:
        models = {"_pretrained_": arguments.base, **models}
    words = [
        f"modelpool={pool_of(list(models.values()))}/_template",
        f"method={method.name}",
        f"modelpool.models={in_grammar(models)}",
        f"merged_model_save_path={in_grammar(str(Path(arguments.out).absolute()))}",
        f"overwrite={str(arguments.overwrite).lower()}",
        f"dry_run={str(arguments.dry_run).lower()}",
        *map(_setting, options),
    ]
    if arguments.dtype:
        words.append(f"modelpool.policy.dtype={arguments.dtype}")
    run_composed(["--config-name", "merge_llm", *words])


def _setting(word: str) -> str:
    """Return an override: a key without a dot is the program's, or else the method's."""
    from fusion_bench.catalog import PROGRAM, options

    key = word.partition("=")[0]
    own = "." in key or key in {option.name for option in options(PROGRAM)}
    return word if own else f"method.{word}"


def pool_of(models: Sequence[str]) -> str:
    """Return the pool for the kind of model that the first folder's config names.

    Without one on this machine, models are taken for causal language models.
    """
    for model in models:
        file = Path(model) / "config.json"
        if file.is_file():
            try:
                classes = json.loads(file.read_text(encoding="utf-8")).get("architectures")
            except (ValueError, AttributeError):
                continue  # the run tells what is wrong with it
            named = str((classes or [""])[0])
            return next(
                (pool for end, pool in _POOLS.items() if named.endswith(end)), "HFModelPool"
            )
    return "CausalLMPool"
