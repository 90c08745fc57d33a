"""Which model was trained for which task."""

from collections.abc import Mapping, Sequence

from fusion_bench.problems import FusionBenchError, did_you_mean
from fusion_bench.programs.pools import TaskPool
from fusion_bench.tasks import canonical_name


def owners(taskpool: TaskPool, models: Sequence[str]) -> dict[str, str | None]:
    """Return each task's model: the one that the config names, or the one of the same name.

    An owner that is none of ``models``, which may be a part of a pool's, counts as none.
    """
    by_name = {canonical_name(model): model for model in models}
    found = {}
    for task, named in taskpool.owners().items():
        owner = by_name.get(canonical_name(task)) if named is None else named
        found[task] = owner if owner in models else None
    return found


def check_owners(taskpool: TaskPool, models: Sequence[str]) -> None:
    """Refuse owners that are no models; places are relative to the task pool.

    Raises:
        FusionBenchError: there is one.
    """
    for task, owner in taskpool.owners().items():
        if owner is not None and owner not in models:
            raise FusionBenchError(
                f"the model pool has no model '{owner}'.",
                did_you_mean(owner, models),
                place=("tasks", task, "owner"),
            )


def ownership_hint(owned: Mapping[str, str | None], models: Sequence[str]) -> str | None:
    """Return what to tell if there are both tasks and models that fit no other by name."""
    tasks = [task for task, owner in owned.items() if owner is None]
    alone = [model for model in models if model not in owned.values()]
    if not tasks or not alone:
        return None
    return (
        f"No task has the name of {', '.join(map(repr, alone))}, and no model that of "
        f"{', '.join(map(repr, tasks))}. If a model was trained for one of these tasks, name it: "
        f"'taskpool.tasks.{tasks[0]}.owner={alone[0]}'."
    )
