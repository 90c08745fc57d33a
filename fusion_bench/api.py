"""FusionBench from Python: merge, evaluate, run a config, and read a report.

Each function makes the same spec as the command line, and goes the same way with it: prepare,
preflight, execute.
"""

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import replace
from inspect import signature
from os import PathLike, fspath
from pathlib import Path
from typing import TYPE_CHECKING, TypeAlias, Union, cast, overload

from torch import nn

from fusion_bench import catalog
from fusion_bench.instantiate import SharedObjects, check_part, instantiate, parameters
from fusion_bench.method.contract import FusionMethod
from fusion_bench.method.plain import Runs, as_method, class_name
from fusion_bench.modelpool.kinds import pool_node
from fusion_bench.plan import Plan
from fusion_bench.problems import (
    ConfigError,
    FusionBenchError,
    Place,
    Problem,
    Problems,
    did_you_mean,
    within,
)
from fusion_bench.programs.execute import execute, fused_modules
from fusion_bench.programs.preflight import preflight
from fusion_bench.programs.prepare import Prepared, prepare
from fusion_bench.programs.spec import FusionSpec, Places, Section
from fusion_bench.recipes import named_after, read_text, told_in_recipe
from fusion_bench.redact import secret_keys
from fusion_bench.report import Report
from fusion_bench.scripts.from_python import run_config, section
from fusion_bench.scripts.recipes import Sections, pool_of, sections
from fusion_bench.storage import disk_failures
from fusion_bench.weights import MergePolicy

if TYPE_CHECKING:
    from lightning.fabric import Fabric

    from fusion_bench.programs.pools import ModelPool, TaskPool
    from fusion_bench.report.reproduction import Reproduction
    from fusion_bench.report.scaling import Study

#: A model: a path, a name on the Hub or ``zoo:NAME``, a config node, or a module.
Model: TypeAlias = str | PathLike[str] | Mapping[str, object] | nn.Module
#: Models by name, or a list of them; or a pool: the name of its config, its node, or an object.
Models: TypeAlias = Union[Mapping[str, Model], Sequence[Model], str, "ModelPool"]
#: A method: the name of its config, its node, or an object.
Method: TypeAlias = str | Mapping[str, object] | FusionMethod | Runs
#: Tasks: the name of a task pool's config, its node, or an object; or names of tasks in lm-eval.
Tasks: TypeAlias = Union[str, Sequence[str], Mapping[str, object], "TaskPool"]

_LM_EVAL = "fusion_bench.taskpool.LMEvalHarnessTaskPool"


@overload
def merge(
    models: Models | None = None,
    *,
    base: Model | None = None,
    method: Method | None = None,
    out: None = None,
    recipe: str | PathLike[str] | None = None,
    tokenizer: str | PathLike[str] | Mapping[str, object] | None = None,
    policy: Mapping[str, object] | MergePolicy | None = None,
    seed: int | None = None,
    fabric: "Mapping[str, object] | Fabric | None" = None,
    overwrite: bool = False,
    **options: object,
) -> nn.Module: ...


@overload
def merge(
    models: Models | None = None,
    *,
    base: Model | None = None,
    method: Method | None = None,
    out: str | PathLike[str],
    recipe: str | PathLike[str] | None = None,
    tokenizer: str | PathLike[str] | Mapping[str, object] | None = None,
    policy: Mapping[str, object] | MergePolicy | None = None,
    seed: int | None = None,
    fabric: "Mapping[str, object] | Fabric | None" = None,
    overwrite: bool = False,
    **options: object,
) -> Path: ...


def merge(
    models: Models | None = None,
    *,
    base: Model | None = None,
    method: Method | None = None,
    out: str | PathLike[str] | None = None,
    recipe: str | PathLike[str] | None = None,
    tokenizer: str | PathLike[str] | Mapping[str, object] | None = None,
    policy: Mapping[str, object] | MergePolicy | None = None,
    seed: int | None = None,
    fabric: "Mapping[str, object] | Fabric | None" = None,
    overwrite: bool = False,
    **options: object,
) -> nn.Module | Path:
    """Merge models into one, or what a recipe of mergekit says.

    With ``out`` the merged weights are written entry by entry, so that models may be larger than
    memory; beside them are the config, the tokenizer, and a card with the recipe. Without it the
    merged model is returned as a module.

    Args:
        models: by name, or a list; each is a path, a name on the Hub, ``zoo:NAME``, or a module,
            and they may be mixed. Or a model pool: the name of its config, its node, or an object.
        base: the pretrained model that they were fine-tuned from, which many methods need.
        method: its name, such as ``ties``, its config node, or an object; by default
            ``simple_average``.
        out: the directory for the merged model.
        recipe: a YAML file of mergekit, in place of models, base and method.
        tokenizer: whose tokenizer and processor files go beside it; by default the base's, or else
            the first model's. ``union``, ``base``, the name of a model or a mapping match rows by
            their tokens, as in ``HFModelPool``.
        policy: what to do where models differ; keys as in ``MergePolicy``.
        seed: seeds every random number generator.
        fabric: ``lightning.Fabric``, or its arguments; by default one process on the best device.
        overwrite: replace another model at ``out``.
        **options: of the method; the arguments of its class.

    Returns:
        ``out``, or without it the merged module, on the CPU and in eval mode.

    Raises:
        FusionBenchError: with all problems, each at the name of its argument. Of options, it is
            raised before any model is looked for.

    Example:
        >>> import fusion_bench
        >>> from torch import nn
        >>> merged = fusion_bench.merge([nn.Linear(4, 2), nn.Linear(4, 2)], method="average")
        >>> type(merged).__name__
        'Linear'
    """
    with _by_argument(
        {("merged_model_save_path",): ("out",), ("models", "_pretrained_"): ("base",)}
    ):
        parts = None
        node: Section
        pool: Section
        if recipe is not None:
            decided = {"models": models, "base": base, "method": method}
            parts = _of_recipe(recipe, decided, tokenizer, policy, seed, options)
            node = _with_options("method", parts.method, options, merge)
            pool = parts.modelpool
        else:
            method = "simple_average" if method is None else method
            node, pool = _of_models(models, base, method, tokenizer, policy, seed, options)
        named = Places(method=() if isinstance(method, str) else ("method",), modelpool=())
        spec = FusionSpec(
            method=node,
            modelpool=pool,
            fabric=fabric,
            seed=seed,
            baselines="none",
            merged_model_save_path=None if out is None else fspath(out),
            overwrite=overwrite,
            similarity=False,
            recipe=None if parts is None else parts.recipe,
            places=named if parts is None else Places(),
        )
        with told_in_recipe({} if parts is None else parts.places, "recipe"):
            prepared, plan = _planned(spec)
            if out is not None:
                execute(prepared, plan)
                return Path(out)
            merged = fused_modules(prepared, plan)
        if len(merged) > 1:
            raise ConfigError(
                f"missing; the method makes several models ({', '.join(merged)}).",
                "Give a directory for them.",
                place=("out",),
            )
        return next(iter(merged.values()))


def evaluate(
    model: Model | Mapping[str, Model],
    tasks: Tasks,
    *,
    tokenizer: str | PathLike[str] | None = None,
    output_dir: str | PathLike[str] | None = None,
    seed: int | None = None,
    fast_dev_run: bool = False,
    fabric: "Mapping[str, object] | Fabric | None" = None,
    overwrite: bool = False,
    **options: object,
) -> Report:
    """Evaluate a model, or several side by side.

    Args:
        model: a path, a name on the Hub, ``zoo:NAME``, a config node, or a module; or several of
            these by name.
        tasks: a task pool: the name of its config, such as ``CLIPVisionModelTaskPool/zoo``, its
            node, or an object; or the names of tasks in lm-eval.
        tokenizer: where the tokenizer or the processor is, for a model that has none beside it.
        output_dir: the directory for the report and the config; without it nothing is written.
        seed: seeds every random number generator.
        fast_dev_run: evaluate only the first batch of each task.
        fabric: ``lightning.Fabric``, or its arguments; by default one process on the best device.
        overwrite: replace another run's report in ``output_dir``.
        **options: of the task pool; the arguments of its class, such as ``max_samples``.

    Returns:
        The report. A model without a name is called after the last part of its path, or ``model``.

    Raises:
        FusionBenchError: with all problems, each at the name of its argument.
    """
    several = isinstance(model, Mapping) and not ("_target_" in model or "path" in model)
    with _by_argument({("models", 0): ("model",), ("models",): ("model",)}):
        models = _named(cast(Mapping[str, Model], model) if several else [model])
    own: dict[Place, Place] = {("tasks", name): (name,) for name in options}
    own |= {("models", name): ("model", name) if several else ("model",) for name in models}
    with _by_argument({**own, ("models",): ("model",)}):
        taskpool, place = _taskpool(tasks, options)
        pool = pool_node(models, heads=False)
        spec = FusionSpec(
            method=None,
            modelpool=_completed(pool, models, tokenizer, None),
            taskpool=taskpool,
            fabric=fabric,
            output_dir=None if output_dir is None else Path(output_dir).absolute(),
            seed=seed,
            baselines="all_tasks",
            overwrite=overwrite,
            similarity=False,
            fast_dev_run=fast_dev_run,
            places=Places(modelpool=(), taskpool=place),
        )
        return execute(*_planned(spec), prints=False)


def run(
    config: str | PathLike[str] | Mapping[str, object],
    *,
    output_dir: str | PathLike[str] | None = None,
    **overrides: object,
) -> "Report | Study | Reproduction | None":
    """Run a config, as ``fusion_bench FILE`` does.

    Args:
        config: a YAML file, the name of a config of ours, or a config as a mapping of plain values.
        output_dir: the directory for the report and the config; without it nothing is written.
        **overrides: keys of the config: ``seed=1``, ``method="ties"``, ``method={"threshold": 10}``
            or ``**{"method.threshold": 10}``. A mapping changes the keys that it has; a name, a
            mapping with ``_target_`` or an object replaces the section.

    Returns:
        What the program returns: a report, a study, or the figures of a reproduction; ``None``
        after a dry run.

    Raises:
        FusionBenchError: with all problems of the config.
    """
    return run_config(config, output_dir, overrides)


def load_report(path: str | PathLike[str]) -> Report:
    """Read a report.

    Args:
        path: a ``report.json``, or the output directory that it is in.

    Raises:
        FusionBenchError: there is none.

    Example:
        ``fusion_bench.load_report("outputs/run").to_pandas()``
    """
    place = Path(path)
    with within("path"):
        return Report.load(place / "report.json" if place.is_dir() else place)


def _planned(spec: FusionSpec) -> tuple[Prepared, Plan]:
    """Make the objects of a run and check them; nothing large is read."""
    Problems(
        Problem((key,), "looks like a token, and configs are saved.")
        for key in secret_keys(spec.config)
    ).raise_all()
    prepared = prepare(spec, SharedObjects())
    return prepared, preflight(prepared)


@contextmanager
def _by_argument(places: Mapping[Place, Place]) -> Iterator[None]:
    """Give problems the names of the function's arguments, in place of keys of the config."""
    try:
        with disk_failures():
            yield
    except FusionBenchError as error:
        own = (replace(p, place=_argument(p.place, places)) for p in error.problems)
        error.problems = tuple(dict.fromkeys(own))
        raise


def _argument(place: Place, places: Mapping[Place, Place]) -> Place:
    if place[-1:] == ("tokenizer",):  # each task asks for the models' one
        return ("tokenizer",)
    for length in range(len(place), 0, -1):
        if (own := places.get(place[:length])) is not None:
            return (*own, *place[length:])
    return place


def _of_models(
    models: Models | None,
    base: Model | None,
    method: Method,
    tokenizer: str | PathLike[str] | Mapping[str, object] | None,
    policy: Mapping[str, object] | MergePolicy | None,
    seed: int | None,
    options: Mapping[str, object],
) -> tuple[Section, Section]:
    """Return method and pool for models."""
    node, place = _method(method, options, seed)
    with within(*place):
        made = as_method(instantiate(node, "method"))
    if made.needs.split is not None:
        raise ConfigError(
            f"{class_name(made)} learns from data, and 'merge' has none.",
            "Use 'fusion_bench.run' with a config that has a task pool.",
            place=("method",),
        )
    if models is None:
        raise ConfigError("missing.", "Give models, or a recipe.", place=("models",))
    pool = _pool(models, base, tokenizer, policy)
    if made.needs.base and isinstance(pool, Mapping) and "_pretrained_" not in pool["models"]:
        raise ConfigError(
            f"missing; {class_name(made)} needs the pretrained model.", place=("base",)
        )
    return node, pool


def _of_recipe(
    recipe: str | PathLike[str],
    others: Mapping[str, object],
    tokenizer: str | PathLike[str] | Mapping[str, object] | None,
    policy: Mapping[str, object] | MergePolicy | None,
    seed: int | None,
    options: Mapping[str, object],
) -> Sections:
    """Return method, pool and text of a recipe; refuse what it decides itself."""
    file = fspath(recipe)
    with within("recipe"):
        text = read_text(Path(file).expanduser())
    kind, _ = pool_of(text)
    if isinstance(policy, MergePolicy):
        policy = {name: getattr(policy, name) for name in MergePolicy.options()}
    made = sections(file, _completed(kind, {}, tokenizer, policy), seed)
    decided = [name for name, own in others.items() if own is not None]
    if tokenizer is not None and made.decides("modelpool.tokenizer"):
        decided.append("tokenizer")
    decided += [name for name in options if made.decides(f"method.{name}")]
    Problems(
        Problem((name,), "the recipe decides it.", "Leave it out, or change the recipe.")
        for name in decided
    ).raise_all()
    return made


def _method(
    method: Method, options: Mapping[str, object], seed: int | None
) -> tuple[Section, Place]:
    """Return a method's node or object, and the place of its options."""
    with within("method"):
        if isinstance(method, type):
            raise ConfigError(f"{method.__name__} is a class.", f"Give '{method.__name__}(…)'.")
        check_part(None if isinstance(method, str) else method, "method")
    node: Section = method
    if isinstance(method, str):
        with within("method"):
            node = section("method", method, seed)
    return _with_options("method", node, options, merge), () if isinstance(method, str) else (
        "method",
    )


def _taskpool(tasks: Tasks, options: Mapping[str, object]) -> tuple[Section, Place]:
    """Return a task pool's node or object, and its place."""
    node: Section = tasks
    place: Place = ("tasks",)
    with within("tasks"):
        if isinstance(tasks, str) and _is_config(tasks):
            node = section("taskpool", tasks)
        elif isinstance(tasks, Sequence):
            named = tasks if isinstance(tasks, str) else list(tasks)
            node, place = {"_target_": _LM_EVAL, "tasks": named}, ()
        else:
            check_part(tasks, "taskpool")
    return _with_options("tasks", node, options, evaluate), place


def _is_config(tasks: str) -> bool:
    """Tell the name of a task pool's config from names of lm-eval's tasks."""
    return "/" in tasks or catalog.unambiguous(tasks, ("tasks",)) is not None


def _with_options(
    argument: str, node: Section, options: Mapping[str, object], function: Callable[..., object]
) -> Section:
    """Return a node with options; a misspelt one may be an argument of the function too."""
    if not options:
        return node
    if not isinstance(node, Mapping):
        reason = f"'{argument}' is an object, which has its options already."
        raise ConfigError(reason, "Give them to its class.", place=(next(iter(options)),))
    target = str(node.get("_target_"))
    known = parameters(target)
    own = [name for name in signature(function).parameters if name != "options"]
    Problems(
        Problem(
            (name,),
            f"{target.rpartition('.')[2]} takes no such option.",
            did_you_mean(name, [*known, *own]),
        )
        for name in options
        if known and name not in known
    ).raise_all()
    return {**node, **options}


def _pool(
    models: Models,
    base: Model | None,
    tokenizer: str | PathLike[str] | Mapping[str, object] | None,
    policy: Mapping[str, object] | MergePolicy | None,
) -> Section:
    """Return the node of a model pool, or the pool that was given as an object."""
    if isinstance(models, str):
        with within("models"):
            node = section("modelpool", models)
    elif isinstance(models, Mapping) and "_target_" in models:
        node = dict(models)
    elif isinstance(models, Mapping | Sequence):
        named = _named(models)
        if base is not None:
            named = {"_pretrained_": _checked(base, "base"), **named}
        return _completed(pool_node(named, heads=True), named, tokenizer, policy)
    else:
        for name, given in (("base", base), ("tokenizer", tokenizer), ("policy", policy)):
            if given is not None:
                reason = "'models' is an object, which has its own."
                raise ConfigError(reason, "Give it to its class.", place=(name,))
        return models
    own = node.get("models")
    named = dict(own) if isinstance(own, Mapping) else {}
    if base is not None:
        named["_pretrained_"] = _checked(base, "base")
    return _completed(node, named, tokenizer, policy)


def _completed(
    node: Mapping[str, object],
    models: Mapping[str, object],
    tokenizer: str | PathLike[str] | Mapping[str, object] | None,
    policy: Mapping[str, object] | MergePolicy | None,
) -> dict[str, object]:
    """Return a pool's node with the models, and with what else is given."""
    made = {**node, "_recursive_": False, "models": models}
    if tokenizer is not None:
        takes = parameters(str(node["_target_"]))
        given = tokenizer if isinstance(tokenizer, Mapping) else fspath(tokenizer)
        made["tokenizer" if "tokenizer" in takes else "processor"] = given
    if policy is not None:
        made["policy"] = policy
    return made


def _named(models: Mapping[str, Model] | Sequence[Model]) -> dict[str, Model]:
    """Return models by name; those of a list are named after the last part of their path."""
    if not models:
        raise ConfigError("there is none.", "Name at least one.", place=("models",))
    if isinstance(models, Mapping):
        return {str(name): _checked(own, "models", str(name)) for name, own in models.items()}
    found = [_checked(model, "models", number) for number, model in enumerate(models)]
    with within("models"):
        after = named_after([model for model in found if isinstance(model, str)])
    names = {path: name for name, path in after.items()}
    alone = len(found) == 1
    return {
        names[model] if isinstance(model, str) else "model" if alone else f"model_{number}": model
        for number, model in enumerate(found, 1)
    }


def _checked(model: object, *place: str | int) -> Model:
    """Return a model, its path as text.

    Raises:
        ConfigError: it is none.
    """
    if isinstance(model, PathLike):
        return str(fspath(model))
    if isinstance(model, str | Mapping | nn.Module):
        return model
    raise ConfigError(
        f"a value of type {type(model).__name__} is no model.",
        "Give a path, a name on the Hub, a config node or a module.",
        place=place,
    )
