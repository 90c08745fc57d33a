"""Evaluate models on tasks, side by side. Nothing is fused.

MODEL is a folder, a repository of the Hub, zoo:NAME, or a folder with an adapter. Tasks are a pool
that 'fusion_bench ls tasks' lists, or names of tasks in lm-eval. Other settings follow as
key=value, by their full names or by those of the task pool's options.
"""

from argparse import ArgumentParser, Namespace

EXAMPLES = """
fusion_bench evaluate zoo:llama-tiny_sort zoo:llama-tiny_mood --tasks CausalLMEvaluation/zoo
fusion_bench evaluate merged base --tasks arc_easy hellaswag max_samples=500
"""


def add_arguments(parser: ArgumentParser) -> None:
    """Add models and tasks."""
    parser.add_argument("models", nargs="+", metavar="MODEL", help="a model, or key=value")
    parser.add_argument("--tasks", nargs="+", required=True, help="a pool, or tasks of lm-eval")
    parser.add_argument("--fast-dev-run", action="store_true", help="only a batch of each task")
    parser.add_argument("--dry-run", action="store_true", help="only show the plan")


def run(arguments: Namespace) -> None:
    """Run the config ``evaluate`` with these models and tasks.

    Raises:
        FusionBenchError: no model, or one that is not there.
    """
    from fusion_bench.catalog import unambiguous
    from fusion_bench.recipes import named_after
    from fusion_bench.scripts.run import run_composed
    from fusion_bench.scripts.verbs.merge import pool_words, separated
    from fusion_bench.scripts.words import in_grammar

    given, settings = separated(arguments.models, "taskpool")
    names, more = separated(arguments.tasks, "taskpool")
    pool = unambiguous(names[0], ["tasks"]) if len(names) == 1 else None
    tasks = [f"taskpool={pool.name}"] if pool else ["taskpool=LMEvalHarnessTaskPool/_template"]
    if pool is None:
        tasks.append(f"taskpool.tasks={in_grammar(names)}")
    words = [
        *pool_words(named_after(given), heads=False),
        *tasks,
        f"fast_dev_run={str(arguments.fast_dev_run).lower()}",
        f"dry_run={str(arguments.dry_run).lower()}",
    ]
    run_composed(["--config-name", "evaluate", *words, *settings, *more])
