"""What a plan tells of a pool's models; of no weight more than its shape is read."""

from collections.abc import Callable, Collection
from dataclasses import dataclass

from fusion_bench.modelpool.agreement import PREPROCESSOR
from fusion_bench.modelpool.comparison import ModelComparison
from fusion_bench.modelpool.opened import OpenedModels
from fusion_bench.modelpool.output_tokens import OutputTokens
from fusion_bench.modelpool.sources import Sources
from fusion_bench.plan import Plan
from fusion_bench.problems import Problems
from fusion_bench.weights import Regrouped, Weights


@dataclass(frozen=True)
class ModelPlan:
    """Looks for the models, and at what can be told of them.

    Args:
        sources: how they are named.
        reference: the model that a merged one is built like.
        opened: the models.
        weights: gives a model's weights as the pool has them.
        tokens: the merged model's tokenizer, where that is not the reference's.
        comparison: compares the models with the reference.
    """

    sources: Sources
    reference: str
    opened: OpenedModels
    weights: Callable[[str], Weights]
    tokens: OutputTokens | None
    comparison: ModelComparison

    def add_to(self, plan: Plan) -> None:
        """Add the models that are found, files to download, notes and problems."""
        known = []
        for name in self.sources:
            with plan.collect("models", name):
                if self.sources[name].plan(plan):
                    known.append(name)
        known = [name for name in known if self._can_be_read(name, known)]
        if self.tokens is not None and not self._knows_tokens(plan, self.tokens, known):
            known = []
        self._open(plan, known)
        for name in known if self.reference in known else ():
            with plan.collect("models", name):
                if own := self.comparison.vocabulary(self.opened.source(name).companions):
                    plan.download(own.repository, *own.needed())
                if place := self.comparison.with_preprocessor(name):
                    plan.download(place, PREPROCESSOR)

    def _open(self, plan: Plan, known: Collection[str]) -> None:
        """Open models whose headers can be read, the reference first."""
        told = {problem.reason for problem in plan.problems}
        again = Problems()  # what others tell of the reference that they are compared with
        for name in sorted(known, key=lambda name: name != self.reference):
            with again.collect():
                if name == self.reference or self.reference in plan.weights:
                    plan.weights[name] = weights = self.weights(name)
                    if isinstance(weights, Regrouped) and name != self.reference:
                        plan.note(
                            f"{name}: its weights are stored in another layout than those of "
                            f"'{self.reference}'. {weights.described()}"
                        )
                elif self.opened.base(name) is None:
                    # There is nothing to compare it with, but it can be damaged.
                    self.opened.open(self.opened.source(name))
        plan.problems.add(problem for problem in again if problem.reason not in told)

    def _can_be_read(self, name: str, known: Collection[str]) -> bool:
        """Tell whether a model's header can be read, and those of what it stands on."""
        if name not in known:
            return False
        base = self.opened.base(name)
        return base is None or not base.named.name or self._can_be_read(base.named.name, known)

    def _knows_tokens(self, plan: Plan, tokens: OutputTokens, known: Collection[str]) -> bool:
        """Note what the output tokenizer is; tell whether rows are known, as all models count."""
        if len(known) < len(self.sources):
            return False
        before = len(plan.problems)
        with plan.collect():
            plan.note(*tokens.notes)
        return len(plan.problems) == before
