"""Which model was trained for which task."""

from collections.abc import Mapping, Sequence

from fusion_bench.problems import FusionBenchError, Place, did_you_mean, within
from fusion_bench.programs.pools import TaskPool
from fusion_bench.tasks import canonical_name


def owners(taskpool: TaskPool, models: Sequence[str], place: Place) -> dict[str, str | None]:
    """Return each task's model: the one that the config names, or the one of the same name.

    Args:
        taskpool: names the tasks, and owners where they have other names.
        models: the names of the model pool's models.
        place: the task pool's, for messages.

    Raises:
        FusionBenchError: an owner that is no model of the pool.
    """
    by_name = {canonical_name(model): model for model in models}
    found = {}
    for task, owner in taskpool.owners().items():
        if owner is not None and owner not in models:
            with within(*place, "tasks", task):
                raise FusionBenchError(
                    f"the model pool has no model '{owner}'.",
                    did_you_mean(owner, models),
                    place=("owner",),
                )
        found[task] = owner or by_name.get(canonical_name(task))
    return found


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
