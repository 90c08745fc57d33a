"""Models and processors that a task pool is given: where they lie, and how they are read."""

from contextlib import AbstractContextManager
from pathlib import Path
from typing import Any

from fusion_bench.plan import Plan, zoo_step
from fusion_bench.pretrained import from_pretrained
from fusion_bench.problems import FusionBenchError, Place, within
from fusion_bench.repository import Repository, locate
from fusion_bench.sources import load, plain_source, reading, unbuilt
from fusion_bench.weights import weight_files

_IMAGE_PROCESSOR = "preprocessor_config.json"


class Part:
    """A model or a processor as a config gives it: a name, a node or an object.

    Args:
        source: one of these; ``None`` where there is no such part.
        place: of the part in the pool, which is put before that of each problem.
        repositories: those that were found, by name; a pool's parts share them.
    """

    def __init__(self, source: Any, place: Place, repositories: dict[str, Repository]):
        self.source = plain_source(source)
        self._place = place
        self._repositories = repositories

    @property
    def name(self) -> str | None:
        """The name, where the part is given by one."""
        return self.source if isinstance(self.source, str) else None

    @property
    def repository(self) -> Repository:
        """Where a part that has a name lies; looked for once."""
        return self._found(None)

    @property
    def model_files(self) -> list[str]:
        """The files of a model that has a name."""
        return ["config.json", *weight_files(self.repository)]

    def located(self) -> AbstractContextManager[None]:
        """Put the part's place before that of each problem that is raised in the context."""
        return within(*self._place)

    def find(self, plan: Plan, scratch: Path | None) -> Repository | None:
        """Return where the part lies, or note in the plan that the zoo is to be built first.

        ``None`` for the latter, and where the part has no name.
        """
        if self.name is None:
            return None
        if place := unbuilt(self.name):
            plan.add(zoo_step(place))
            return None
        return self._found(scratch)

    def plan_model(self, plan: Plan, scratch: Path | None) -> Repository | None:
        """Note a model's files in the plan; return as ``find``."""
        with self.located():
            repository = self.find(plan, scratch)
            if repository is not None:
                plan.download(repository, *self.model_files)
            return repository

    def plan_image_processor(self, plan: Plan, scratch: Path | None) -> None:
        """Note an image processor's file in the plan.

        Raises:
            FusionBenchError: there is no such file.
        """
        with self.located():
            if self.find(plan, scratch) is not None:
                plan.download(self._with_image_processor(), _IMAGE_PROCESSOR)

    def model(self, reader: type, wrong: str, remedy: str = "", **options: Any) -> Any:
        """Return the model.

        Args:
            reader: the class of transformers that reads it, where it has a name.
            wrong: what it is where it lacks weights; for the message.
            remedy: what then helps.
            options: for ``from_pretrained``.

        Raises:
            FusionBenchError: a model that cannot be read or is not complete.
        """
        with self.located():
            if self.name is None:
                return load("model", self.source)
            with reading("model", self.name):
                place = self.repository.fetch(*self.model_files)
                model, info = from_pretrained(reader, place, output_loading_info=True, **options)
            mismatched = [key for key, *_ in info["mismatched_keys"]]
            if lacking := sorted(info["missing_keys"]) + mismatched:
                raise FusionBenchError(
                    f"'{self.name}' is {wrong}; it lacks '{lacking[0]}'.", remedy
                )
            return model

    def processor(self) -> Any:
        """Return what a node makes, or the object."""
        with self.located():
            return load("processor", self.source)

    def image_processor(self, reader: type, **options: Any) -> Any:
        """Return the image processor; ``reader`` and ``options`` as in ``model``.

        Raises:
            FusionBenchError: one that cannot be read, or there is none.
        """
        if self.name is None:
            return self.processor()
        with self.located():
            repository = self._with_image_processor()
            with reading("processor", self.name):
                place = repository.fetch(_IMAGE_PROCESSOR)
                return from_pretrained(reader, place, model=False, **options)

    def _found(self, scratch: Path | None) -> Repository:
        assert self.name is not None
        if self.name not in self._repositories:
            self._repositories[self.name] = locate(self.name, scratch)
        return self._repositories[self.name]

    def _with_image_processor(self) -> Repository:
        if _IMAGE_PROCESSOR not in self.repository.files:
            raise FusionBenchError(
                f"Cannot read the processor '{self.name}': it has no image processor."
            )
        return self.repository
