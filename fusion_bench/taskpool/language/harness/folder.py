"""The YAML files of tasks, read as data: what a name stands for, and which tasks a group has."""

import hashlib
import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cache
from pathlib import Path
from typing import Any

import yaml

from fusion_bench.problems import FusionBenchError, did_you_mean
from fusion_bench.taskpool.language.harness.library import as_ours, tasks_folder

#: What a group's file says of the group itself; all else is for its tasks.
_OF_GROUPS = ("group", "group_alias", "task", "aggregate_metric_list", "metadata")
#: What says where a task belongs, which is no part of it.
_OF_TASKS = ("tag", "group", "task_list")
#: Where its data lie, which are known by their content.
_OF_DATA = ("dataset_path", "dataset_name", "dataset_kwargs")
#: Of a stranger's file.
_BYTES = 2**20
_VALUES = 20_000
_NAMED = re.compile(rb"^[\"']?(class|group|task)[\"']?:[ \t]*[\"']?([^\s\"'#\[]+)", re.M)
_TAG = re.compile(rb"^(?:[\"']?tag[\"']?:|[ \t]*-)[ \t]*[\"']?([^\"'\n]*?)[\"']?[ \t]*$", re.M)


class Code(str):
    """What ``!function`` names, which nobody has looked up.

    Attributes:
        folder: where its module lies.
    """

    folder: Path

    @property
    def is_shipped(self) -> bool:
        """Whether a file of the harness's own names it."""
        return self.folder.is_relative_to(tasks_folder().resolve())


@dataclass(frozen=True)
class Definition:
    """A task as its files define it.

    Attributes:
        name: as the harness calls it.
        config: its keys, as data.
        at: the folder of its file.
        users: the folder that the user names, with the file or a group that changes it; None for
            what is the harness's own.
    """

    name: str
    config: Mapping[str, Any]
    at: Path
    users: Path | None

    @property
    def digest(self) -> str:
        """The hash of what the task does with its data, and of the code beside a user's task."""
        own = {key: value for key, value in self.config.items() if key not in _OF_DATA}
        found = hashlib.sha256(repr(own).encode())
        for path in sorted(self.users.rglob("*.py")) if self.users is not None else ():
            found.update(path.read_bytes())
        return found.hexdigest()


class TaskFiles:
    """The harness's own tasks, and those in a user's folders.

    Args:
        folders: the user's; what is in them comes before the harness's own of the same name.
        metadata: given to each task, beside its own.
        trusted: whether the folders' files may include others from anywhere.
    """

    def __init__(
        self,
        folders: Sequence[Path] = (),
        metadata: Mapping[str, Any] | None = None,
        trusted: bool = False,
    ):
        self._metadata = dict(metadata or {})
        self._broken: dict[Path, str] = {}
        self._users: dict[str, Definition] = {}
        for folder in folders:
            self._read(folder, trusted)

    def find(self, name: str) -> list[Definition]:
        """Return the task of a name, or those of a group or a tag.

        Raises:
            FusionBenchError: there is none, or its files cannot be read.
        """
        return list(self._find(name, {}, None))

    def _find(
        self, name: str, changes: Mapping[str, Any], users: Path | None
    ) -> Iterator[Definition]:
        """Yield tasks with what a group changes of them; ``users`` is the group's folder."""
        found = self._file(name)
        if found is None:
            tagged = self._tagged(name)
            if not tagged:
                raise self._unknown(name)
            for own in tagged:
                yield from self._find(own, changes, users)
            return
        found = replace(found, users=found.users or users)
        if "group" in found.config and "class" not in found.config:
            yield from self._members(name, found, changes)
        else:
            yield self._task(name, found, {**found.config, **changes})

    def _file(self, name: str) -> Definition | None:
        if name in self._users:
            return self._users[name]
        path = _shipped().get(name)
        return None if path is None else Definition(name, read(path), path.parent, None)

    def _task(self, name: str, of: Definition, config: Mapping[str, Any]) -> Definition:
        own = config.get("metadata")
        own = own if isinstance(own, Mapping) else {} if own is None else {"version": own}
        kept = {key: value for key, value in config.items() if key not in _OF_TASKS}
        whole = {**kept, "task": name, "metadata": {**own, **self._metadata}}
        return Definition(name, whole, of.at, of.users)

    def _members(
        self, name: str, group: Definition, changes: Mapping[str, Any]
    ) -> Iterator[Definition]:
        """Yield a group's tasks; what its file says of all of them goes before their own keys."""
        common = {k: v for k, v in group.config.items() if k not in (*_OF_GROUPS, *_OF_TASKS)}
        common.update(changes)
        members = group.config.get("task") or []
        for member in [members] if isinstance(members, str) else members:
            if not isinstance(member, str | Mapping):
                raise FusionBenchError(f"the group '{name}' has a task {member!r}.")
            own = {"task": member} if isinstance(member, str) else dict(member)
            inner = own.get("group", own.get("task"))
            more = {**common, **{k: v for k, v in own.items() if k not in ("group", "task")}}
            if not isinstance(inner, str):
                raise FusionBenchError(f"the group '{name}' has a task {member!r}.")
            if self._file(inner) is not None or self._tagged(inner):
                yield from self._find(inner, more, group.users)
            elif "group" in own:
                inline = Definition(inner, own, group.at, group.users)
                yield from self._members(f"{name}.{inner}", inline, common)
            elif isinstance(member, Mapping):
                yield self._task(f"{name}.{inner}", group, more)
            else:
                raise self._unknown(inner)

    def _tagged(self, name: str) -> list[str]:
        own = [k for k, v in self._users.items() if name in _listed(v.config.get("tag"))]
        return sorted({*own, *_shipped_tagged(name)})

    def _read(self, folder: Path, trusted: bool) -> None:
        if not folder.is_dir():
            raise FusionBenchError(f"'{folder}' is no folder.", place=("include_path",))
        root = folder.resolve()
        for path in sorted(folder.rglob("*.yaml")):
            try:
                config = read(path, None if trusted else root)
            except FusionBenchError as error:
                self._broken[path] = error.problems[0].reason
                continue
            name = config.get("task" if "class" in config or "group" not in config else "group")
            if isinstance(name, str):
                self._users.setdefault(name, Definition(name, config, path.parent, root))

    def _unknown(self, name: str) -> FusionBenchError:
        broken = [f"'{path}': {reason}" for path, reason in self._broken.items()]
        listed = "'lm-eval ls tasks' lists those of the harness."
        hint = did_you_mean(name, [*self._users, *_shipped()], listed)
        if broken:
            hint += " Some files cannot be read:"
        return FusionBenchError(f"there is no task or group '{name}'.", hint, details=broken)


def read(path: Path, root: Path | None = None, including: tuple[Path, ...] = ()) -> dict[str, Any]:
    """Return what a task's file holds, with the files that it includes; nothing in it is run.

    Args:
        path: the file.
        root: the folder that it and what it includes must be in, for files of strangers, which may
            not be large either.
        including: the files that it is included by.

    Raises:
        FusionBenchError: it cannot be read, or is not to be.
    """
    real = path.resolve()
    if root is not None and not real.is_relative_to(root):
        raise FusionBenchError(f"'{path}' lies outside of '{root}'.", "Put it into the folder.")
    if real in including:
        raise FusionBenchError(f"'{path}' includes itself.")
    try:
        content = real.read_bytes()
        if root is not None and len(content) > _BYTES:
            raise FusionBenchError(f"'{path}' is larger than 1 MiB.")
        config = yaml.load(content, _loader(real.parent))
    except (OSError, yaml.YAMLError, ValueError, RecursionError) as error:
        what = " ".join(str(error).split())
        raise FusionBenchError(f"'{path}' cannot be read: {what}.") from error
    if not isinstance(config, dict):
        raise FusionBenchError(f"'{path}' holds no keys.")
    if root is not None:
        _refuse_many(path, config)
    included: dict[str, Any] = {}
    for name in _listed(config.pop("include", None)):
        inner = read(real.parent / name, root, (*including, real))
        included.update({key: value for key, value in inner.items() if key != "task_list"})
    return {**included, **config}


def _loader(folder: Path) -> Any:
    base: Any = getattr(yaml, "CSafeLoader", yaml.SafeLoader)

    class Loader(base):
        """Makes plain data of a file, and notes of code."""

    def note(loader: Any, node: Any) -> Code:
        code = Code(loader.construct_scalar(node))
        code.folder = folder
        return code

    Loader.add_constructor("!function", note)
    return Loader


def _refuse_many(path: Path, config: Any) -> None:
    """Refuse what aliases expand to more than any task has."""
    left, parts = _VALUES, [config]
    while parts:
        part = parts.pop()
        left -= 1
        if left < 0:
            raise FusionBenchError(f"'{path}' has more than {_VALUES} values.")
        if isinstance(part, dict):
            parts += part.values()
        elif isinstance(part, list):
            parts += part


def _listed(value: Any) -> list[str]:
    found = value if isinstance(value, list) else [value]
    return [own for own in found if isinstance(own, str)]


@cache
def _shipped() -> dict[str, Path]:
    """Return the names of the harness's tasks and groups; its 14,000 files are not parsed."""
    found: dict[str, Path] = {}
    for path in sorted(tasks_folder().rglob("*.yaml")):
        named = dict(reversed(_NAMED.findall(path.read_bytes())))
        name = named.get(b"task" if b"class" in named or b"group" not in named else b"group")
        if name is not None:
            found.setdefault(name.decode(), path)
    return found


@cache
def _shipped_tagged(name: str) -> list[str]:
    """Return the harness's tasks with a tag; it parses its files where some mention the name."""
    return sorted(_tags().get(name, ())) if name.encode() in _mentioned() else []


@cache
def _mentioned() -> frozenset[bytes]:
    """Return what stands where tags do, in any of the harness's files, which are not parsed."""
    files = (path for path in tasks_folder().rglob("*yaml") if path.is_file())
    return frozenset(word for path in files for word in _TAG.findall(path.read_bytes()))


@cache
def _tags() -> dict[str, set[str]]:
    """Return the harness's tags with their tasks, from all of its files, which takes seconds."""
    from lm_eval.tasks._index import Kind, TaskIndex

    with as_ours():
        entries = TaskIndex.build([tasks_folder()])
    return {name: entry.tags for name, entry in entries.items() if entry.kind is Kind.TAG}
