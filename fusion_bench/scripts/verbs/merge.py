"""Merge models into a folder, entry by entry, so that they may be larger than memory.

MODEL is a folder, a repository of the Hub, a file of weights or a folder with an adapter. Options
of the method are given as key=value, and so is any other setting of 'merge_llm' by its full name.
"""

from argparse import ArgumentParser, Namespace
from collections.abc import Mapping, Sequence
from pathlib import Path

EXAMPLES = """
fusion_bench merge first second --out merged
fusion_bench merge first second --base base --method ties --out merged threshold=10
fusion_bench merge owner/first owner/second --base owner/base --out merged --dtype bfloat16
"""


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
    from fusion_bench.recipes import named_after
    from fusion_bench.scripts.words import in_grammar

    given, settings = separated(arguments.models, "method")
    method = find(arguments.method, ("methods",))
    if "pretrained" in method.needs and arguments.base is None:
        raise FusionBenchError(
            f"{method.name} needs the model that the others were fine-tuned from.",
            "Add --base MODEL.",
        )
    models = named_after(given)
    if arguments.base is not None:
        models = {"_pretrained_": arguments.base, **models}
    out = Path(arguments.out).absolute()
    for model in models.values():
        if out.exists() and out.resolve() == Path(model).resolve():
            raise FusionBenchError(
                f"--out: '{out}' is one of the models.", "Choose another folder."
            )
    words = [
        *pool_words(models, heads=True),
        f"method={method.name}",
        f"merged_model_save_path={in_grammar(str(out))}",
        f"overwrite={str(arguments.overwrite).lower()}",
        f"dry_run={str(arguments.dry_run).lower()}",
        *settings,
    ]
    if arguments.dtype:
        words.append(f"modelpool.policy.dtype={arguments.dtype}")
    run_composed(["--config-name", "merge_llm", *words])


def separated(words: Sequence[str], section: str) -> tuple[list[str], list[str]]:
    """Return the models, and the settings: those without a dot are a section's options.

    Args:
        words: models and ``key=value``.
        section: ``method`` or ``taskpool``; the program's own keys come first.
    """
    from fusion_bench.catalog import PROGRAM, options

    own = {option.name for option in options(PROGRAM)}
    models, settings = [], []
    for word in words:
        key, equals, _ = word.partition("=")
        if not equals or Path(word).exists():
            models.append(word)
        else:
            # With '++' Hydra takes any key, and the nearest of the class's own is told.
            settings.append(f"++{word}" if "." in key or key in own else f"++{section}.{word}")
    return models, settings


def pool_words(models: Mapping[str, str], *, heads: bool) -> list[str]:
    """Return the overrides for a pool of models, of the kind that their config names.

    Args:
        models: name to path or repository.
        heads: whether classifiers of texts have their heads, or a task pool puts them on.

    Raises:
        FusionBenchError: a model that is not there, or whose config cannot be read.
    """
    from fusion_bench.modelpool.kinds import pool_node
    from fusion_bench.problems import FusionBenchError
    from fusion_bench.scripts.words import in_grammar

    if not models:
        raise FusionBenchError("there is no model.", "Name at least one.")
    node = pool_node(models, heads=heads)
    pool = str(node["_target_"]).rpartition(".")[2]
    words = [f"modelpool={pool}/_template", f"modelpool.models={in_grammar(dict(models))}"]
    return words + [f"++modelpool.{key}={own}" for key, own in node.items() if key != "_target_"]
