"""Published figures, as data files with their sources."""

from collections.abc import Iterator
from pathlib import Path
from typing import Annotated

import yaml
from pydantic import BaseModel, ConfigDict, Field, ValidationError, model_validator

from fusion_bench.problems import FusionBenchError, did_you_mean

_DIRECTORY = Path(__file__).parent / "references"
#: What stands beside the methods in published tables, and needs none.
BASELINES = ("pretrained", "individual")
AVERAGE = "average"

Percent = Annotated[float, Field(ge=0, le=100)]


class _Strict(BaseModel):
    model_config = ConfigDict(extra="forbid")


class Row(_Strict):
    """The published figures of a method, in percent.

    Attributes:
        overrides: the command-line arguments of the run.
        accuracy: one value per task, in the order of the reference's tasks.
        average: the mean over the tasks.
        tolerance: in percentage points; by default the reference's.
    """

    overrides: list[str] = []
    accuracy: list[Percent] | None = None
    average: Percent | None = None
    tolerance: Annotated[float, Field(ge=0)] | None = None

    @model_validator(mode="after")
    def _says_something(self) -> "Row":
        if self.accuracy is None and self.average is None:
            raise ValueError("it has neither 'accuracy' nor 'average'")
        return self


class Reference(_Strict):
    """A table of published figures, and how to reproduce them.

    Attributes:
        source: who published them.
        link: where, if they are on the web.
        checkpoints: the models.
        modelpool: the name of the model pool's config.
        taskpool: the name of the task pool's config.
        overrides: of all rows, as on the command line.
        tasks: in the order of the figures.
        tolerance: the maximum difference of a figure, in percentage points.
        average_tolerance: the maximum difference of an average, by default ``tolerance``.
        rows: a method's name to its figures; ``pretrained`` and ``individual`` are the baselines.
    """

    source: str
    link: str | None = None
    checkpoints: str
    modelpool: str
    taskpool: str
    overrides: list[str] = []
    tasks: Annotated[list[str], Field(min_length=1)]
    tolerance: Annotated[float, Field(ge=0)]
    average_tolerance: Annotated[float, Field(ge=0)] | None = None
    rows: Annotated[dict[str, Row], Field(min_length=1)]

    @model_validator(mode="after")
    def _rows_fit(self) -> "Reference":
        for name, row in self.rows.items():
            if row.accuracy is not None and len(row.accuracy) != len(self.tasks):
                raise ValueError(
                    f"rows.{name}.accuracy: {len(row.accuracy)} numbers for {len(self.tasks)} tasks"
                )
            if (name in BASELINES) == bool(row.overrides):
                wanted = "takes none" if name in BASELINES else "missing; name the method"
                raise ValueError(f"rows.{name}.overrides: {wanted}")
        return self

    def figures(self, name: str) -> Iterator[tuple[str, float, float]]:
        """Yield a row's columns, each with the published value and the tolerance."""
        row = self.rows[name]
        tolerance = self.tolerance if row.tolerance is None else row.tolerance
        for task, published in zip(self.tasks, row.accuracy or [], strict=False):
            yield task, published, tolerance
        if row.average is not None:
            if row.tolerance is None and self.average_tolerance is not None:
                tolerance = self.average_tolerance
            yield AVERAGE, row.average, tolerance

    @classmethod
    def load(cls, name: str) -> "Reference":
        """Read a reference of ours by its name, or a file.

        Raises:
            FusionBenchError: there is none, or it does not fit the schema.
        """
        path = Path(name) if Path(name).suffix else _DIRECTORY / f"{name}.yaml"
        if not path.is_file():
            known = [file.stem for file in _DIRECTORY.glob("*.yaml")]
            raise FusionBenchError(
                f"there is no '{name}'.",
                f"{did_you_mean(name, known)} Name your own file by its path, with '.yaml'.",
                place=("reference",),
            )
        try:
            return cls.model_validate(yaml.safe_load(path.read_text(encoding="utf-8")))
        except yaml.YAMLError as error:
            place = " ".join(str(error).split())
            raise FusionBenchError(
                f"'{name}' is not valid YAML: {place}", place=("reference",)
            ) from error
        except ValidationError as error:
            raise FusionBenchError(f"'{name}': {_problems(error)}", place=("reference",)) from error


def _problems(error: ValidationError) -> str:
    found = []
    for problem in error.errors():
        place = ".".join(map(str, problem["loc"]))
        message = problem["msg"].removeprefix("Value error, ")
        found.append(f"{place}: {message}" if place else message)
    return "; ".join(found)
