"""Merge models into a folder, entry by entry, so that they may be larger than memory.

MODEL is a folder, a repository of the Hub, a file of weights or a folder with an adapter. Options
of the method are given as key=value, and so is any other setting of 'merge_llm' by its full name.

In place of models, a recipe of mergekit and a folder may be given: recipe.yaml merged. The options
of mergekit-yaml are understood.
"""

from argparse import ArgumentParser, Namespace
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path

EXAMPLES = """
fusion_bench merge first second --out merged
fusion_bench merge first second --base base --method ties --out merged threshold=10
fusion_bench merge owner/first owner/second --base owner/base --out merged --dtype bfloat16
fusion_bench merge recipe.yaml merged
"""


def add_arguments(parser: ArgumentParser) -> None:
    """Add models, method and folder."""
    from fusion_bench.scripts import mergekit

    parser.add_argument(
        "models", nargs="+", metavar="MODEL", help="a model, or key=value; or a recipe"
    )
    parser.add_argument("--out", metavar="DIR", help="the folder to write")
    parser.add_argument("--base", metavar="MODEL", help="the model that they were fine-tuned from")
    parser.add_argument("--method", help="default: simple_average")
    parser.add_argument("--dtype", help="of the merged weights; default: that of the models")
    parser.add_argument("--overwrite", action="store_true", help="replace another model in DIR")
    parser.add_argument("--dry-run", action="store_true", help="only show the plan")
    mergekit.add_arguments(parser)


def run(arguments: Namespace) -> None:
    """Run the config ``merge_llm`` with these models, or with a recipe.

    Raises:
        FusionBenchError: no such method, one that needs a base without one, or a faulty recipe.
    """
    from fusion_bench.scripts import mergekit
    from fusion_bench.scripts.run import run_composed

    of_mergekit = [*mergekit.words(arguments)]
    given, settings = separated(arguments.models, "method")
    recipe = bool(given) and Path(given[0]).suffix in (".yaml", ".yml")
    own = of_recipe(arguments, given) if recipe else of_models(arguments, given)
    words = [
        *own,
        f"overwrite={str(arguments.overwrite).lower()}",
        f"dry_run={str(arguments.dry_run).lower()}",
        *of_mergekit,
        *settings,
    ]
    if arguments.dtype:
        words.append(f"modelpool.policy.dtype={arguments.dtype}")
    run_composed(["--config-name", "merge_llm", *words])


def of_models(arguments: Namespace, given: Sequence[str]) -> list[str]:
    """Return the overrides for models.

    Raises:
        FusionBenchError: no such method, one that needs a base without one, or no folder.
    """
    from fusion_bench.catalog import find
    from fusion_bench.problems import FusionBenchError
    from fusion_bench.recipes import named_after

    method = find(arguments.method or "simple_average", ("methods",))
    if "pretrained" in method.needs and arguments.base is None:
        raise FusionBenchError(
            f"{method.name} needs the model that the others were fine-tuned from.",
            "Add --base MODEL.",
        )
    models = named_after(given)
    if arguments.base is not None:
        models = {"_pretrained_": arguments.base, **models}
    out = folder(arguments.out, models.values())
    return [*pool_words(models, heads=True), f"method={method.name}", out]


def of_recipe(arguments: Namespace, given: Sequence[str]) -> list[str]:
    """Return the overrides for a recipe of mergekit.

    Raises:
        FusionBenchError: mistakes in it, or settings that it makes itself.
    """
    from fusion_bench.problems import Problem, Problems, within
    from fusion_bench.recipes import read_text
    from fusion_bench.scripts.recipes import pool_of
    from fusion_bench.scripts.words import in_grammar

    recipe, *folders = given
    problems = Problems()
    decided = [f"--{key}" for key in ("base", "method") if getattr(arguments, key) is not None]
    for key in decided:
        problems.add([Problem((), f"{key}: the recipe decides it.", "Change the recipe.")])
    if len(folders) + (arguments.out is not None) > 1:
        more = ", ".join(folders[1 - (arguments.out is not None) :])
        problems.add([Problem((), f"'{more}' is one word too many beside a recipe.")])
    problems.raise_all()
    with within("recipe"):
        text = read_text(Path(recipe).expanduser())
    node, models = pool_of(text)
    out = folder(arguments.out or next(iter(folders), None), models)
    # A pool whose models are missing would be refused before the recipe's are put there.
    return [*node_words(node), "modelpool.models={}", f"recipe={in_grammar(recipe)}", out]


def folder(out: str | None, models: Iterable[str]) -> str:
    """Return the override for the folder of the merged model.

    Raises:
        FusionBenchError: there is none, or it is one of the models.
    """
    from fusion_bench.problems import FusionBenchError
    from fusion_bench.scripts.words import in_grammar

    if out is None:
        raise FusionBenchError("there is no folder for the merged model.", "Add --out DIR.")
    path = Path(out).absolute()
    for model in models:
        if path.exists() and path.resolve() == Path(model).resolve():
            reason = f"--out: '{path}' is one of the models."
            raise FusionBenchError(reason, "Choose another folder.")
    return f"merged_model_save_path={in_grammar(str(path))}"


def separated(words: Sequence[str], section: str) -> tuple[list[str], list[str]]:
    """Return the models, and the settings: those without a dot are a section's options.

    Args:
        words: models and ``key=value``.
        section: ``method`` or ``taskpool``; the program's own keys come first.
    """
    from fusion_bench.catalog import PROGRAM, options
    from fusion_bench.command import is_there

    own = {option.name for option in options(PROGRAM)}
    models, settings = [], []
    for word in words:
        key, equals, _ = word.partition("=")
        if not equals or is_there(word):
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
    words = node_words(pool_node(models, heads=heads))
    return [*words, f"modelpool.models={in_grammar(dict(models))}"]


def node_words(node: Mapping[str, object]) -> list[str]:
    """Return the overrides for a pool's node."""
    pool = str(node["_target_"]).rpartition(".")[2]
    more = [f"++modelpool.{key}={own}" for key, own in node.items() if key != "_target_"]
    return [f"modelpool={pool}/_template", *more]
