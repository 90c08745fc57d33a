"""Damaged and crafted files, and what reads them: nothing but the project's own errors may come.

Each ``Kind`` is a strategy that writes files into an empty directory, and the reading of them. The
directory lies in a larger one with a ``secret.safetensors`` and a ``secret.bin`` that no file in it
may reach.
"""

import io
import json
import os
import pickle
import string
import zipfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager, redirect_stdout
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import datasets
import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import torch
import yaml
from fixtures_clip import write_tokenizer
from fixtures_report import synthetic
from hydra import compose, initialize_config_dir
from hydra.core.global_hydra import GlobalHydra
from hypothesis import strategies as st
from omegaconf import OmegaConf, open_dict
from PIL import Image as PILImage
from safetensors.numpy import load as load_arrays
from safetensors.numpy import save as save_arrays
from safetensors.torch import save

from fusion_bench.addresses import Folders
from fusion_bench.configs import CONFIG_DIR
from fusion_bench.instantiate import instantiate
from fusion_bench.modelpool import HFModelPool
from fusion_bench.problems import FusionBenchError
from fusion_bench.programs import CompareProgram
from fusion_bench.report import Report, Scores, markdown
from fusion_bench.report.page import page
from fusion_bench.repository import locate
from fusion_bench.scripts.hydra_patches import set_up_hydra
from fusion_bench.scripts.run import EXPECTED
from fusion_bench.sources import load as load_source
from fusion_bench.taskpool import CLIPVisionModelTaskPool
from fusion_bench.taskpool.datasets import describe
from fusion_bench.taskpool.images.labelled import DatasetPlace, LabelledImages
from fusion_bench.tasks import Task
from fusion_bench.weights import AdapterConfig, open_repository, sha256
from fusion_bench.weights.checkpoint import shards

Files = dict[str, bytes]
#: What a crafted file would do if it were let: the audit hook below sees any of it.
HOSTILE = ("os.system", "posix.system", "subprocess.Popen", "builtins.eval", "builtins.exec")

SECRET = {"secret": torch.tensor([4.0, 2.0])}
TENSORS = {
    "a.weight": torch.arange(6.0).reshape(2, 3),
    "b": torch.ones(4, dtype=torch.bfloat16),
    "c": torch.tensor([1, 2], dtype=torch.int64),
}
BASE = {"model.layer.weight": torch.ones(3, 2), "model.other.weight": torch.zeros(2)}
ADAPTER = {
    "base_model.model.model.layer.lora_A.weight": torch.ones(1, 2),
    "base_model.model.model.layer.lora_B.weight": torch.ones(3, 1),
}
ADAPTER_CONFIG = {
    "peft_type": "LORA",
    "base_model_name_or_path": "no/base",
    "lora_alpha": 2,
    "r": 1,
    "target_modules": ["layer"],
    "alpha_pattern": {},
}
CONFIG = {
    "model_type": "clip_vision_model",
    "architectures": ["CLIPVisionModel"],
    "hidden_size": 8,
    "vocab_size": 10,
}


@dataclass(frozen=True)
class Kind:
    """Files of one kind.

    Attributes:
        name: what the table calls it.
        files: makes them.
        read: reads what is in a directory.
        expected: what it may raise; the command line says no more of these than their message.
    """

    name: str
    files: st.SearchStrategy[Files]
    read: Callable[[Path], object]
    expected: tuple[type[Exception], ...] = (FusionBenchError,)


def _picture(kind: str, **options: Any) -> bytes:
    out = io.BytesIO()
    shades = np.arange(192, dtype=np.uint8).reshape(8, 8, 3)
    PILImage.fromarray(shades).save(out, kind, **options)
    return out.getvalue()


PICTURES = {kind: _picture(kind) for kind in ("PNG", "JPEG", "WEBP", "GIF", "BMP", "TIFF", "EPS")}


# --- watching


class Watch:
    """Sees what a reading does besides: programs started, connections, files where they are not.

    An audit hook cannot be taken away again; it is put in once, and looks only within ``on``.
    """

    def __init__(self) -> None:
        self.seen: list[str] = []
        self._inside: Path | None = None
        self._installed = False

    @contextmanager
    def on(self, directory: Path) -> Iterator[None]:
        """Note, in ``seen``, whatever happens that reading files in ``directory`` must not do."""
        if not self._installed:
            import sys

            sys.addaudithook(self._hook)
            self._installed = True
        self.seen = []
        self._inside = directory
        try:
            yield
        finally:
            self._inside = None

    def _hook(self, event: str, arguments: tuple[Any, ...]) -> None:
        if self._inside is None:
            return
        if event == "shutil.rmtree" and str(arguments[0]).startswith(f"{self._inside}/"):
            return
        if event in _FORBIDDEN or event.startswith(_FAMILIES):
            self.seen.append(f"{event} {arguments!r}"[:300])
        if event == "open" and isinstance(arguments[0], (str, bytes)):
            path, _, flags = arguments
            name = path.decode(errors="replace") if isinstance(path, bytes) else path
            writes = isinstance(flags, int) and flags & 3
            own = os.path.normpath(name).startswith(f"{self._inside}/")
            if ("secret." in name and not own) or name.startswith("/etc/passwd"):
                self.seen.append(f"read {name}")
            ours = (str(self._inside.parent), "/dev/null", os.environ["FUSION_BENCH_CACHE"])
            if writes and not name.startswith(ours):
                self.seen.append(f"wrote {name}")


_FAMILIES = (
    "subprocess.",
    "socket.connect",
    "socket.getaddrinfo",
    "socket.gethostby",
    "socket.sendto",
    "pty.",
)
_FORBIDDEN = {
    "os.system",
    "os.exec",
    "os.posix_spawn",
    "os.spawn",
    "os.fork",
    "os.forkpty",
    "os.startfile",
    "shutil.rmtree",
    "socket.connect",
    "code.__new__",
    "webbrowser.open",
    "ftplib.connect",
    "urllib.Request",
}


def attempt(kind: Kind, files: Files, directory: Path, watch: Watch) -> str:
    """Write the files, read them, and return ``read`` or the name of the error.

    Raises:
        AssertionError: what was read did what no reading does.
        Exception: whatever is unexpected.
    """
    for name, content in files.items():
        file = directory / name
        file.parent.mkdir(parents=True, exist_ok=True)
        if content.startswith(b"-> "):
            file.symlink_to(content[3:].decode())
        else:
            file.write_bytes(content)
    outcome = "read"
    with redirect_stdout(io.StringIO()), watch.on(directory):
        try:
            kind.read(directory)
        except kind.expected as error:
            assert str(error).strip(), "an error without words"
            outcome = type(error).__name__
    assert not watch.seen, watch.seen
    return outcome


def write_secrets(directory: Path) -> None:
    """Write what must not be reached, beside the directory that a case is in."""
    (directory / "secret.safetensors").write_bytes(save(SECRET))
    torch.save(SECRET, directory / "secret.bin")
    (directory / "secret.png").write_bytes(PICTURES["PNG"])


# --- values

_odd_numbers = st.one_of(
    st.integers(-3, 70),
    st.sampled_from([2**31, 2**32, 2**53, 2**63 - 1, 2**63, 2**64 - 1, 2**64, 10**30, -(2**63)]),
    st.floats(),
)
_odd_texts = st.one_of(
    st.sampled_from(
        [
            "",
            ".",
            "..",
            "/",
            "\x00",
            "a\nb",
            "a\x00b",
            "../secret.safetensors",
            "\ud800",
            "F32",
            "${oc.env:HOME}",
            "<script>alert(1)</script>",
            "x" * 300,
        ]
    ),
    st.text(max_size=12),
)
json_values = st.recursive(
    st.one_of(st.none(), st.booleans(), _odd_numbers, _odd_texts),
    lambda inner: st.one_of(
        st.lists(inner, max_size=4), st.dictionaries(_odd_texts, inner, max_size=4)
    ),
    max_leaves=8,
)
_deep = st.sampled_from(
    [b"[" * 100_000, b'{"a":' * 20_000, b"[" * 900 + b"]" * 900, b'{"weight_map":' * 3000]
)


def as_json(value: Any) -> bytes:
    """Return JSON, also of what has no UTF-8."""
    return json.dumps(value, ensure_ascii=True).encode()


@st.composite
def mutated(draw: Any, value: Any, depth: int = 0) -> Any:
    """Change a value of JSON in one or a few places."""
    if depth < 6 and isinstance(value, dict) and value and draw(st.integers(0, 9)) > 0:
        changed = dict(value)
        for _ in range(draw(st.integers(1, 2))):
            key = draw(st.sampled_from(sorted(changed) or [""]))
            what = draw(st.integers(0, 9))
            if what == 0:
                changed.pop(key, None)
            elif what == 1:
                changed[draw(_odd_texts)] = changed.get(key)
            else:
                changed[key] = draw(mutated(changed.get(key), depth + 1))
        return changed
    if depth < 6 and isinstance(value, list) and value and draw(st.integers(0, 9)) > 0:
        items = list(value)
        at = draw(st.integers(0, len(items) - 1))
        what = draw(st.integers(0, 5))
        if what == 0:
            del items[at]
        elif what == 1:
            items.append(items[at])
        else:
            items[at] = draw(mutated(items[at], depth + 1))
        return items
    if isinstance(value, (int, float)) and not isinstance(value, bool) and draw(st.booleans()):
        return draw(_odd_numbers)
    return draw(json_values)


@st.composite
def respelled(draw: Any, value: Any) -> Any:
    """Change one number or text in a value of JSON to another, so that it still has its form."""
    if isinstance(value, dict) and value:
        key = draw(st.sampled_from(sorted(value)))
        return {**value, key: draw(respelled(value[key]))}
    if isinstance(value, list) and value:
        at = draw(st.integers(0, len(value) - 1))
        return [*value[:at], draw(respelled(value[at])), *value[at + 1 :]]
    if isinstance(value, bool) or value is None:
        return value
    if isinstance(value, int):
        return draw(st.integers(-2, 10) | st.sampled_from([2**31, 2**63, 10**30]))
    if isinstance(value, float):
        return draw(st.floats() | st.integers(-2, 10))
    return draw(_odd_texts)


@st.composite
def damaged(draw: Any, content: bytes) -> bytes:
    """Change bytes, cut some off, or put some in."""
    data = bytearray(content)
    for _ in range(draw(st.integers(1, 4))):
        what = draw(st.sampled_from(["flip", "cut", "insert", "double", "zero"]))
        at = draw(st.integers(0, max(0, len(data) - 1)))
        if what == "flip" and data:
            data[at] ^= 1 << draw(st.integers(0, 7))
        elif what == "cut":
            del data[at:]
        elif what == "insert":
            data[at:at] = draw(st.binary(max_size=16))
        elif what == "double":
            data[at:at] = data[at : at + draw(st.integers(1, 64))]
        elif what == "zero" and data:
            data[at : at + 8] = bytes(min(8, len(data) - at))
    return bytes(data)


def _texts_of_json(value: Any) -> st.SearchStrategy[bytes]:
    """Return JSON with the value changed, its bytes changed, or something else altogether."""
    return st.one_of(
        mutated(value).map(as_json),
        mutated(value).map(as_json),
        damaged(as_json(value)),
        json_values.map(as_json),
        _deep,
        st.just(as_json(value).replace(b"a", b"\xff", 1)),
    )


# --- (a) safetensors


def with_header(header: bytes, data: bytes) -> bytes:
    """Return a file of a header and data."""
    return len(header).to_bytes(8, "little") + header + data


def _parts(content: bytes) -> tuple[Any, bytes]:
    size = int.from_bytes(content[:8], "little")
    return json.loads(content[8 : 8 + size]), content[8 + size :]


@st.composite
def safetensors_files(draw: Any, tensors: dict[str, torch.Tensor]) -> bytes:
    """Return a safetensors file that is wrong in some way, or not quite."""
    good = save(tensors, metadata={"format": "pt"})
    header, data = _parts(good)
    how = draw(st.integers(0, 9))
    if how == 0:
        return draw(damaged(good))
    if how == 1:
        length = draw(st.sampled_from([0, 1, 7, 100_000_001, 2**31, 2**63, 2**64 - 1, len(good)]))
        return length.to_bytes(8, "little") + good[8:]
    if how == 2:
        return with_header(draw(_texts_of_json(header)), data)
    if how == 3:  # a key twice, which parsers see differently
        name = draw(st.sampled_from(sorted(tensors)))
        entry = draw(mutated(header[name]))
        twice = as_json({name: entry})[1:-1]
        text = as_json(header)
        joined = [b"{" + twice + b"," + text[1:], text[:-1] + b"," + twice + b"}"]
        return with_header(draw(st.sampled_from(joined)), data)
    if how == 4:
        return with_header(as_json(header), draw(st.binary(max_size=64)))
    name = draw(st.sampled_from(sorted(tensors)))
    entry = dict(header[name])
    field = draw(st.sampled_from(["dtype", "shape", "data_offsets"]))
    if field == "dtype":
        entry[field] = draw(
            st.one_of(
                st.sampled_from(
                    ["F64", "F16", "BF16", "I8", "U8", "BOOL", "F8_E4M3", "F4", "U64", "C64", "f32"]
                ),
                json_values,
            )
        )
    else:
        entry[field] = draw(
            st.one_of(st.lists(_odd_numbers, max_size=4), mutated(entry[field]), json_values)
        )
    header[name] = entry
    return with_header(as_json(header), data)


def _read_checkpoint(directory: Path) -> None:
    weights = open_repository(locate(str(directory)))
    for key in weights:
        assert weights[key].shape == weights.spec(key).shape
    sha256(weights)
    assert "secret" not in weights


# --- (b) indexes, configs, adapters, pickles

_shard_names = st.one_of(
    st.sampled_from(
        [
            "one.safetensors",
            "two.safetensors",
            "missing.safetensors",
            "../secret.safetensors",
            "inner/../../secret.safetensors",
            "{root}/secret.safetensors",
            "../../../../../../etc/passwd",
            "/etc/passwd",
            "link.safetensors",
            "inner",
            "inner/three.safetensors",
            "one.safetensors/",
            "./one.safetensors",
            "ONE.safetensors",
            "one.safetensors\x00",
            "one\n.safetensors",
            "../secret.bin",
            "one.bin",
            "model.safetensors.index.json",
            "~/one.safetensors",
            "C:\\secret.safetensors",
            "..\\secret.safetensors",
        ]
    ),
    _odd_texts,
)


@st.composite
def sharded_checkpoints(draw: Any) -> Files:
    """Return shards, and an index that says something else of them."""
    one = {k: v for k, v in TENSORS.items() if k != "c"}
    index: Any = {
        "metadata": {"total_size": 40},
        "weight_map": {**dict.fromkeys(one, "one.safetensors"), "c": "two.safetensors"},
    }
    if draw(st.booleans()):
        names = dict.fromkeys([*TENSORS, "secret"], st.one_of(_shard_names, json_values))
        index["weight_map"] |= draw(st.fixed_dictionaries({}, optional=names))
        text = as_json(index)
    else:
        text = draw(_texts_of_json(index))
    targets = [
        "../secret.safetensors",
        "one.safetensors",
        "inner/three.safetensors",
        "link.safetensors",
        "/etc/passwd",
        "../..",
        "hop.safetensors",
    ]
    return {
        draw(
            st.sampled_from(["model.safetensors.index.json"] * 3 + ["pytorch_model.bin.index.json"])
        ): text,
        "one.safetensors": save(one),
        "two.safetensors": save({"c": TENSORS["c"]}),
        "inner/three.safetensors": save({"c": TENSORS["c"]}),
        "link.safetensors": b"-> " + draw(st.sampled_from(targets)).encode(),
        "hop.safetensors": b"-> inner/out.safetensors",
        "inner/out.safetensors": b"-> ../../secret.safetensors",
    }


def _read_sharded(directory: Path) -> None:
    _read_checkpoint(directory)
    for file in directory.glob("*.index.json"):
        for name in shards(file):
            assert (directory / name).resolve().is_relative_to(directory.resolve())


def _configured() -> st.SearchStrategy[Files]:
    hostile = {
        "auto_map": {"AutoConfig": "hostile.Config", "AutoModel": "hostile.Model"},
        "_attn_implementation_internal": "../hostile",
        "quantization_config": {"quant_method": "x"},
        "text_config": {"vocab_size": 5},
    }
    return st.one_of(
        _texts_of_json(CONFIG), _texts_of_json(CONFIG | hostile), _texts_of_json(hostile)
    ).map(
        lambda text: {
            "config.json": text,
            "model.safetensors": save(TENSORS),
            "hostile.py": b"import os\nos.system('true')\n",
        }
    )


def _read_configured(directory: Path) -> None:
    pool = HFModelPool({"_pretrained_": str(directory), "a": str(directory)})
    pool.weights("a")
    pool.vocabulary  # noqa: B018
    pool.architecture()


@st.composite
def adapters(draw: Any) -> Files:
    """Return a base and an adapter, one of whose files is wrong."""
    config, weights = as_json(ADAPTER_CONFIG), save(ADAPTER)
    if draw(st.booleans()):
        config = draw(
            st.one_of(
                _texts_of_json(ADAPTER_CONFIG),
                st.dictionaries(
                    st.sampled_from(["(a+)+$", "(", "layer", ".*", "(x+x+)+y"]), json_values
                ).map(lambda pattern: as_json(ADAPTER_CONFIG | {"alpha_pattern": pattern})),
            )
        )
    else:
        weights = draw(safetensors_files(ADAPTER))
    return {
        "base/model.safetensors": save(BASE),
        "adapter/adapter_config.json": config,
        "adapter/adapter_model.safetensors": weights,
    }


def _read_adapter(directory: Path) -> None:
    AdapterConfig.read(directory / "adapter" / "adapter_config.json")
    pool = HFModelPool({"_pretrained_": str(directory / "base"), "a": str(directory / "adapter")})
    sha256(pool.weights("a"))


class _Call:
    """Unpickling one calls what it names."""

    def __init__(self, target: str, arguments: tuple[Any, ...]):
        module, _, self.name = target.rpartition(".")
        self.module, self.arguments = module, arguments


_CALLS = {
    "os.system": ("true",),
    "posix.system": ("true",),
    "subprocess.Popen": (["true"],),
    "builtins.eval": ("__import__('os').system('true')",),
    "builtins.exec": ("open('/tmp/canary', 'w')",),
    "builtins.getattr": ("", "join"),
    "importlib.import_module": ("this",),
    "pickle.loads": (b"cos\nsystem\n(S'true'\ntR.",),
    "torch.load": ("../secret.bin",),
    "torch.hub.load": ("x", "y"),
    "torch.storage._load_from_bytes": (b"x",),
    "torch._utils._rebuild_tensor_v2": ((), 0, (2,), (1,), False, None),
    "torch.serialization.load": ("../secret.bin",),
    "numpy.core.multiarray._reconstruct": ("x", (0,), b"b"),
    "collections.OrderedDict": ([("a", 1)],),
    "webbrowser.open": ("file:///",),
    "fusion_bench.storage.write_text": ("/tmp/canary", "x"),
    "functools.partial": ("x",),
    "operator.attrgetter": ("__class__",),
    "bdb.Bdb.run": ("x",),
}


@st.composite
def pickles(draw: Any) -> bytes:
    """Return a pickle, put together of opcodes, that calls what it must not."""
    out = io.BytesIO()
    out.write(pickle.PROTO + bytes([2]))
    for _ in range(draw(st.integers(1, 4))):
        target = draw(st.sampled_from(sorted(_CALLS)))
        module, _, name = target.rpartition(".")
        arguments = pickle.dumps(_CALLS[target], protocol=2)[2:-1]
        out.write(pickle.GLOBAL + f"{module}\n{name}\n".encode() + arguments)
        out.write(
            draw(st.sampled_from([pickle.REDUCE, pickle.NEWOBJ, pickle.BUILD, pickle.TUPLE2]))
        )
        if draw(st.booleans()):
            out.write(draw(st.binary(max_size=6)))
    return out.getvalue() + pickle.STOP


def _archive(members: dict[str, bytes]) -> bytes:
    out = io.BytesIO()
    with zipfile.ZipFile(out, "w") as archive:
        for name, content in members.items():
            archive.writestr(name, content)
    return out.getvalue()


def _torch_file(value: Any, *, legacy: bool = False) -> bytes:
    out = io.BytesIO()
    torch.save(value, out, _use_new_zipfile_serialization=not legacy)
    return out.getvalue()


_GOOD_PICKLES = [
    _torch_file(TENSORS),
    _torch_file(TENSORS, legacy=True),
    _torch_file({"state_dict": TENSORS}),
]
_OTHER_PICKLES = [
    {},
    {"a": 1},
    {1: TENSORS["b"]},
    [TENSORS["b"]],
    TENSORS["b"],
    {"state_dict": {}},
    {"a": torch.ones(2).to_sparse()},
    {"a": torch.empty(2**20, device="meta")},
    {"a": torch.quantize_per_tensor(torch.ones(2), 1.0, 0, torch.qint8)},
    {"a": torch.ones(1).expand(2**20)},
    {"a": torch.ones(2, dtype=torch.complex64)},
]


def _pickle_files() -> st.SearchStrategy[Files]:
    inner = st.one_of(pickles(), st.sampled_from(_GOOD_PICKLES).flatmap(damaged))
    zipped = pickles().map(
        lambda content: _archive(
            {"archive/data.pkl": content, "archive/version": b"3\n", "archive/byteorder": b"little"}
        )
    )
    other = st.sampled_from(_OTHER_PICKLES).map(_torch_file)
    return st.one_of(inner, inner, zipped, other).map(lambda c: {"pytorch_model.bin": c})


# --- (c) reports

_REPORT, _SCORES = synthetic({"a": 3, "b": 14}, samples=20, per_class=True, merged=("merged", "m2"))
_REPORT_JSON = json.loads(_REPORT.model_dump_json())
#: A run of the first schema, and its predictions.
_EARLIER = Path(__file__).parent / "report" / "schema_1" / "small"
_EARLIER_JSON = json.loads((_EARLIER / "report.json").read_text())
_EARLIER_ARRAYS = load_arrays((_EARLIER / "report.answers.safetensors").read_bytes())
_SMALL_PARTS = {
    name: _REPORT_JSON[name] for name in ("tasks", "models", "comparisons", "similarity")
}


def _saved_arrays() -> dict[str, np.ndarray[Any, Any]]:
    with TemporaryDirectory() as place:
        _SCORES.save(Path(place) / "report.json")
        return dict(load_arrays(Scores.path(Path(place) / "report.json").read_bytes()))


_ARRAYS = _saved_arrays()


@st.composite
def score_files(draw: Any, good: dict[str, np.ndarray[Any, Any]]) -> bytes:
    """Return scores that are no scores, or do not fit the report."""
    if draw(st.integers(0, 3)) == 0:
        return draw(damaged(save_arrays(good)))
    arrays = dict(good)
    for _ in range(draw(st.integers(1, 3))):
        name = draw(st.sampled_from(sorted(arrays)))
        kind = draw(st.sampled_from(["drop", "rename", "dtype", "shape", "values", "short"]))
        array = arrays[name]
        if kind == "drop":
            del arrays[name]
            if not arrays:
                break
        elif kind == "rename":
            parts = [
                draw(
                    st.sampled_from(
                        ["samples", "labels", "predictions", "statistics", "a", "b", "%00", ""]
                    )
                )
            ]
            parts += draw(st.lists(st.text(string.printable, max_size=5), max_size=3))
            arrays["/".join(parts)] = arrays.pop(name)
        elif kind == "dtype":
            dtype = draw(st.sampled_from(["float32", "int8", "int64", "bool", "uint16", "float16"]))
            arrays[name] = array.astype(dtype)
        elif kind == "shape":
            arrays[name] = array[..., None] if draw(st.booleans()) else np.zeros((), np.int32)
        elif kind == "values":
            value = draw(st.sampled_from([-1, 3, 14, 2**31 - 1, -(2**31)]))
            arrays[name] = np.full(array.shape, value, np.int32)
        else:
            arrays[name] = array[: draw(st.integers(0, 3))] if array.ndim else array
    return save_arrays({k: np.ascontiguousarray(v) for k, v in arrays.items()})


@st.composite
def runs(draw: Any) -> Files:
    """Return a run's two files, of this or the first schema, one or both of them wrong."""
    earlier = draw(st.booleans())
    good, arrays = (_EARLIER_JSON, _EARLIER_ARRAYS) if earlier else (_REPORT_JSON, _ARRAYS)
    name = "answers" if earlier else "scores"
    report, scores = as_json(good), save_arrays(arrays)
    which = draw(st.integers(0, 2))
    if which != 1:
        part = draw(st.sampled_from([*sorted(_SMALL_PARTS), "run", "all"]))
        if part == "all":
            report = draw(_texts_of_json(good))
        elif draw(st.booleans()):
            report = as_json(good | {part: draw(respelled(good[part]))})
        else:
            report = as_json(good | {part: draw(mutated(good[part]))})
    if which != 0:
        scores = draw(score_files(arrays))
    return {
        "one/report.json": report,
        f"one/report.{name}.safetensors": scores,
        "two/report.json": as_json(good),
        f"two/report.{name}.safetensors": save_arrays(arrays),
    }


def _read_run(directory: Path) -> None:
    report = Report.load(directory / "one" / "report.json")
    scores = Scores.load(directory / "one" / "report.json", report)
    html = page(report, scores)
    assert "<script>alert" not in html
    markdown(report)


def _read_comparison(directory: Path) -> None:
    CompareProgram(
        [str(directory / "one"), str(directory / "two")],
        strict=False,
        output_dir=directory / "out",
    ).run()


# --- (d) configs

_TARGETS = [
    *sorted(HOSTILE),
    "builtins.open",
    "builtins.dict",
    "builtins.getattr",
    "pathlib.Path",
    "pickle.loads",
    "torch.load",
    "torch.float32",
    "functools.partial",
    "hydra.utils.get_method",
    "hydra.utils.instantiate",
    "importlib.import_module",
    "fusion_bench.scripts.cli.main",
    "fusion_bench.scripts.cli.hydra",
    "fusion_bench.storage.write_text",
    "fusion_bench.method.torch.load",
    "fusion_bench.method.SimpleAverageAlgorithm",
    "fusion_bench.method.TaskArithmeticAlgorithm.run",
    "fusion_bench.modelpool.HFModelPool",
    "fusion_bench.modelpool.CLIPVisionModelPool",
    "fusion_bench.taskpool.CLIPVisionModelTaskPool",
    "fusion_bench.programs.FabricModelFusionProgram",
    "fusion_bench.programs.CompareProgram",
    "transformers.AutoModel",
    "lightning.fabric.strategies.DDPStrategy",
    "",
    "..",
    "x" * 200,
]
_ARGUMENTS = [["true"], "true", ["../secret.bin"], {"path": "os.system"}, "canary"]
_INTERPOLATIONS = [
    "${oc.env:HOME}",
    "${oc.env:HF_TOKEN}",
    "${oc.decode:'{_target_: os.system}'}",
    "${method}",
    "${.a}",
    "${..b}",
    "${${a}}",
    "${",
    "${a",
    "${x:y}",
    "${hydra:runtime.cwd}",
    "${oc.select:a,${b}}",
    "???",
]
_texts_of_config = st.sampled_from(_INTERPOLATIONS) | _odd_texts.filter(str.isprintable)


@st.composite
def _nodes(draw: Any) -> Any:
    node: dict[Any, Any] = {}
    if draw(st.integers(0, 3)):
        node["_target_"] = draw(st.sampled_from(_TARGETS))
    for key in draw(
        st.lists(
            st.sampled_from(
                [
                    "_args_",
                    "_partial_",
                    "_recursive_",
                    "_convert_",
                    "models",
                    "path",
                    "a",
                    "weights",
                ]
            ),
            max_size=3,
        )
    ):
        node[key] = draw(st.sampled_from(_ARGUMENTS) | st.booleans() | _texts_of_config)
    return node


_trees = st.recursive(
    _nodes() | _texts_of_config | st.integers(-3, 3) | st.floats() | st.none() | st.booleans(),
    lambda inner: (
        st.lists(inner, max_size=3)
        | st.dictionaries(
            st.sampled_from(["method", "modelpool", "taskpool", "fabric", "models", "a", "b"]),
            inner,
            max_size=3,
        )
    ),
    max_leaves=6,
)


@cache
def _project_nodes() -> list[Any]:
    """Return the nodes of the methods that the project brings."""
    nodes = [
        yaml.safe_load(file.read_text(encoding="utf-8"))
        for file in sorted((CONFIG_DIR / "method").rglob("*.yaml"))
    ]
    return [node for node in nodes if isinstance(node, dict) and "_target_" in node]


_HYDRA_PARTS: dict[str, Any] = {
    "callbacks": {"a": {"_target_": "os.system"}},
    "job_logging": {"handlers": {"x": {"class": "os.system"}}},
    "hydra_logging": {"formatters": {"x": {"()": "os.system"}}},
    "launcher": {"_target_": "hydra_plugins.x.X", "setup": ["true"]},
    "sweeper": {"_target_": "subprocess.Popen"},
    "searchpath": ["pkg://this", "file:///tmp"],
    "job": {"env_set": {"LD_PRELOAD": "x"}, "chdir": True},
    "run": {"dir": "../../out"},
}


@st.composite
def configs(draw: Any) -> Files:
    """Return a config as a stranger's YAML."""
    how = draw(st.integers(0, 9))
    if how == 0:
        return {"stranger.yaml": draw(st.sampled_from(_YAML_TEXTS) | st.binary(max_size=60))}
    if how <= 2:
        node = draw(st.sampled_from(_project_nodes()))
        tree: Any = {"method": draw(mutated(node))}
    else:
        tree = {"method": draw(_trees)}
    if draw(st.booleans()):
        tree |= {"modelpool": draw(_trees), "_target_": draw(st.sampled_from(_TARGETS))}
    if draw(st.integers(0, 4)) == 0:
        part = draw(st.sampled_from(sorted(_HYDRA_PARTS)))
        tree["hydra"] = {part: draw(st.just(_HYDRA_PARTS[part]) | mutated(_HYDRA_PARTS[part]))}
    if draw(st.integers(0, 4)) == 0:
        tree["defaults"] = draw(
            st.lists(
                st.sampled_from(["_self_", "/method: slerp", "../../x", {"a": "b"}]), max_size=2
            )
        )
    try:
        text = yaml.safe_dump(tree, allow_unicode=True, sort_keys=False).encode()
    except (yaml.YAMLError, UnicodeEncodeError):
        text = as_json(tree)
    return {"stranger.yaml": text}


_YAML_TEXTS = [
    b"method: !!python/object/apply:os.system ['true']",
    b"method: !!python/name:os.system",
    b"method: " + b"[" * 3000,
    b"method: " + b"{a: " * 3000,
    b"a: &a [x, x]\nb: &b [*a, *a, *a]\nc: [*b, *b]",
    b"&a [*a]",
    b"a: &a {b: *a}",
    b"- 1",
    b"x",
    b"",
    b"\xff\xfe",
    b"a: 1\na: 2",
    b"? [a, b]\n: c",
    b"1: 2\nnull: 3\ntrue: 4",
    b"--- a\n--- b",
    b"%YAML 9.9\n---\na: b",
    b"# @package _global_\nhydra: null",
    b"# @package hydra.callbacks\na: {_target_: os.system}",
    b"method: 2001-01-01",
    b"method: !!binary x",
    b"method: !!set {a, b}",
]


def _read_config(directory: Path) -> None:
    GlobalHydra.instance().clear()
    with initialize_config_dir(str(directory), version_base="1.3"):
        config = compose("stranger", return_hydra_config=True)
    with open_dict(config):
        config.pop("hydra", None)
    settings: Any = OmegaConf.to_container(config, resolve=True, throw_on_missing=True)
    for key, node in settings.items():
        if isinstance(node, dict):
            instantiate(node, str(key))
    if "_target_" in settings:
        instantiate(settings)


# --- (e) data sets

#: What no card, metadata file or row may have opened.
ADDRESSES = [
    "http://127.0.0.1:9/x.png",
    "https://localhost:9/x.csv",
    "hf://datasets/owner/name/x.parquet",
    "reference://x::http://127.0.0.1:9/refs.json",
    "reference::http://127.0.0.1:9/refs.json",
    "simplecache::http://127.0.0.1:9/x.png",
    "zip://x.png::http://127.0.0.1:9/x.zip",
    "zip://*::{data}/x.zip",
    "s3://bucket/x.png",
    "gs://bucket/x.png",
    "memory://x.png",
    "file://{root}/secret.png",
    "local://{root}/secret.png",
    "data:image/png;base64,AA==",
    "{root}/secret.png",
    "../secret.png",
    "../../secret.png",
    "{data}/../../secret.png",
    "/etc/passwd",
    "/dev/zero",
    "/dev/stdin",
    "~/secret.png",
    "\\\\127.0.0.1\\x.png",
    "//127.0.0.1/x.png",
    "a\x00.png",
    "cat.png",
    "{data}/cat.png",
    "",
]
_addresses = st.sampled_from(ADDRESSES) | _odd_texts
_ROWS = {"image": [{"bytes": PICTURES["PNG"], "path": None}] * 2, "label": [0, 1]}
_FEATURES = datasets.Features(
    {"image": datasets.Image(), "label": datasets.ClassLabel(names=["cat", "dog"])}
)
_CARD = {
    "license": "mit",
    "dataset_info": {
        "features": _FEATURES._to_yaml_list(),
        "splits": [{"name": "train", "num_bytes": 100, "num_examples": 2}],
        "download_size": 100,
        "dataset_size": 100,
    },
    "configs": [
        {
            "config_name": "default",
            "data_files": [{"split": "train", "path": "train.parquet"}],
            "default": True,
        }
    ],
}


def _parquet(rows: dict[str, Any]) -> bytes:
    """Return a table whose rows hold pictures, or name them; none of these is read."""
    out = io.BytesIO()
    whole = datasets.Dataset.from_dict(rows, features=_FEATURES).data.table
    pq.write_table(whole.replace_schema_metadata(_FEATURES.arrow_schema.metadata), out)
    return out.getvalue()


_PARQUET = _parquet(_ROWS)


@st.composite
def cards(draw: Any) -> Files:
    """Return a good table and a card that says something else of it."""
    card: Any = _CARD
    if draw(st.integers(0, 2)) == 0:
        named = draw(
            st.one_of(
                _addresses,
                st.lists(_addresses, max_size=3),
                _addresses.map(lambda name: [{"split": "train", "path": name}]),
                _addresses.map(
                    lambda name: [
                        {"split": "train", "path": ["train.parquet"]},
                        {"split": "test", "path": [name]},
                    ]
                ),
            )
        )
        key = draw(st.sampled_from(["data_files", "data_files", "data_dir", "metadata_filenames"]))
        card = card | {"configs": [card["configs"][0] | {key: named}]}
        text = as_json(card)
    else:
        text = draw(
            _texts_of_json(card) | st.sampled_from(_YAML_TEXTS) | respelled(card).map(as_json)
        )
    files = {"data/train.parquet": _PARQUET}
    which = draw(st.integers(0, 3))
    if which == 0:
        files["data/.huggingface.yaml"] = text
    elif which == 1:
        infos = {"default": card["dataset_info"]}
        files["data/dataset_infos.json"] = draw(_texts_of_json(infos))
    else:
        files["data/README.md"] = b"---\n" + text + b"\n---\n# Data\n"
    return files


@st.composite
def metadata_files(draw: Any) -> Files:
    """Return a folder of pictures, and a file that names others beside."""
    files = {f"data/{name}.png": PICTURES["PNG"] for name in ("cat", "dog")}
    rows: Any = [{"file_name": f"{name}.png", "label": n} for n, name in enumerate(("cat", "dog"))]
    if draw(st.booleans()):
        rows[draw(st.integers(0, 1))]["file_name"] = draw(_addresses)
    else:
        rows = draw(mutated(rows))
    kind = draw(st.sampled_from(["csv", "jsonl", "jsonl", "parquet"]))
    lines = rows if isinstance(rows, list) else [rows]
    if kind == "csv":
        named = [line for line in lines if isinstance(line, dict)]
        text = "file_name,label\n" + "".join(
            f"{line.get('file_name')},{line.get('label')}\n" for line in named
        )
        content = text.encode(errors="surrogatepass")
    elif kind == "jsonl":
        content = b"\n".join(map(as_json, lines))
    elif draw(st.booleans()):
        kind, name = "parquet", draw(_addresses)
        held = [{"bytes": None, "path": name.encode(errors="replace").decode()}, _ROWS["image"][0]]
        return {"data/train.parquet": _parquet({"image": held, "label": [0, 1]})}
    else:
        out = io.BytesIO()
        pq.write_table(pa.table({"file_name": ["cat.png", "dog.png"], "label": [0, 1]}), out)
        content = draw(damaged(out.getvalue()))
    if draw(st.integers(0, 3)) == 0:
        content = draw(damaged(content))
    return files | {f"data/metadata.{kind}": content}


def _read_data(directory: Path) -> None:
    data = directory / "data"
    for file in data.iterdir():
        content = file.read_bytes()
        if file.suffix != ".parquet":
            filled = content.replace(b"{root}", str(directory.parent).encode())
            file.write_bytes(filled.replace(b"{data}", str(data).encode()))
    node = {
        "_target_": "datasets.load_dataset",
        "path": str(data),
        "split": "train",
        "cache_dir": str(directory / "cache"),
    }
    describe(node)
    loaded = load_source("dataset", node, "data")
    task = Task.from_mapping({"class_names": ["cat", "dog"]})
    images = LabelledImages("t", loaded, task, DatasetPlace(("data",)), Folders.of(node))
    for index in range(min(2, len(images))):
        images.image(index)


@st.composite
def pictures(draw: Any) -> Files:
    """Return the bytes of a picture, some of them wrong."""
    good = PICTURES[draw(st.sampled_from(sorted(PICTURES)))]
    if draw(st.integers(0, 5)) == 0:
        return {"picture": draw(st.sampled_from(sorted(PICTURES.values())).map(lambda p: p[:40])
                                | st.binary(max_size=80))}  # fmt: skip
    return {"picture": draw(damaged(good))}


def _read_picture(directory: Path) -> None:
    rows = {"image": [{"bytes": (directory / "picture").read_bytes()}], "label": [0]}
    data = datasets.Dataset.from_dict(rows, features=_FEATURES)
    LabelledImages("t", data, Task()).image(0)


# --- (f) tokenizers


def _tokenizer_files() -> Files:
    with TemporaryDirectory() as folder:
        write_tokenizer(Path(folder))
        return {file.name: file.read_bytes() for file in Path(folder).iterdir()}


_TOKENIZER = _tokenizer_files()
_CLAIMS = {
    "auto_map": {"AutoTokenizer": ["hostile.Tokenizer", None]},
    "tokenizer_class": "HostileTokenizer",
    "vocab_file": "../secret.bin",
    "tokenizer_file": "http://127.0.0.1:9/tokenizer.json",
    "name_or_path": "http://127.0.0.1:9/",
    "processor_class": "hostile.Processor",
    "chat_template": "{{ ''.__class__.__mro__ }}",
    "add_prefix_space": "x",
    "model_max_length": 10**30,
    "pad_token": {"__type": "AddedToken", "content": "!"},
    "extra_special_tokens": {"a": "<a>"},
    "added_tokens_decoder": {"0": {"content": "<x>"}, "-1": {"content": "y"}},
}


@st.composite
def tokenizers(draw: Any) -> Files:
    """Return a tokenizer's files, one of which is wrong or claims what it may not."""
    files = dict(_TOKENIZER)
    name = draw(st.sampled_from(sorted(files)))
    how = draw(st.integers(0, 5))
    if how == 0:
        del files[name]
    elif how == 1:
        files[name] = draw(damaged(files[name]))
    elif how == 2 and name.endswith(".json"):
        files[name] = draw(_texts_of_json(json.loads(files[name])))
    elif how == 3:
        files["tokenizer.json"] = draw(_texts_of_json(_BACKEND))
    elif how == 4:
        files["special_tokens_map.json"] = draw(
            _texts_of_json({"pad_token": "!", "bos_token": "a"})
        )
    else:
        claims = draw(
            st.lists(st.sampled_from(sorted(_CLAIMS)), min_size=1, max_size=4).map(
                lambda keys: {key: _CLAIMS[key] for key in keys}
            )
        )
        said = json.loads(files["tokenizer_config.json"]) | claims
        files["tokenizer_config.json"] = draw(
            st.just(as_json(said)) | mutated(said).map(as_json) | respelled(said).map(as_json)
        )
    code = {"hostile.py": b"import os\nos.system('true')\n"}
    return {f"model/{name}": content for name, content in {**files, **code}.items()}


_BACKEND = {
    "version": "1.0",
    "truncation": None,
    "padding": None,
    "added_tokens": [{"id": 0, "content": "a", "special": True}],
    "normalizer": {"type": "Replace", "pattern": {"Regex": "(x+x+)+y"}, "content": " "},
    "pre_tokenizer": {"type": "ByteLevel", "add_prefix_space": False, "trim_offsets": True},
    "post_processor": None,
    "decoder": {"type": "ByteLevel"},
    "model": {"type": "BPE", "vocab": {"a": 0, "b": 1, "ab": 2}, "merges": [["a", "b"]]},
}


def _read_tokenizer(directory: Path) -> None:
    place = str(directory / "model")
    node = {"_target_": "datasets.load_from_disk", "dataset_path": "none"}
    pool = CLIPVisionModelTaskPool({"t": node}, clip_model=place, processor=place)
    _ = pool._classifiers._tokenizer


set_up_hydra()
KINDS = {
    kind.name: kind
    for kind in (
        Kind(
            "safetensors",
            safetensors_files(TENSORS).map(lambda content: {"model.safetensors": content}),
            _read_checkpoint,
        ),
        Kind("index of shards", sharded_checkpoints(), _read_sharded),
        Kind("config.json", _configured(), _read_configured),
        Kind("LoRA adapter", adapters(), _read_adapter),
        Kind("pickled weights", _pickle_files(), _read_checkpoint),
        Kind("report and scores, shown as a page", runs(), _read_run),
        Kind("report and scores, compared", runs(), _read_comparison),
        Kind("config", configs(), _read_config, EXPECTED),
        Kind("dataset card", cards(), _read_data),
        Kind("metadata file", metadata_files(), _read_data),
        Kind("image bytes", pictures(), _read_picture),
        Kind("tokenizer files", tokenizers(), _read_tokenizer),
    )
}
