"""What methods that make another form of model ask of a pool."""

from contextlib import AbstractContextManager

from fusion_bench.method.contract import ModelPool
from fusion_bench.problems import within


def base_of(pool: ModelPool) -> str:
    """Return the name of the pretrained model, or else of the first."""
    return "_pretrained_" if pool.has_pretrained else pool.model_names[0]


def located(pool: ModelPool, *model: str) -> AbstractContextManager[None]:
    """Say of a problem that it is the pool's, or one of its models', and not the method's."""
    place = [*pool.policy.place[:-1], *(("models", *model) if model else ())]
    return within(*place, whole=True)
