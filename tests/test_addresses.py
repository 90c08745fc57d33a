"""Whoever names an address that may not be opened: it is refused, and nobody is asked for it."""

import contextlib
import io
import json
import os
import zipfile
from collections.abc import Iterator
from http.server import SimpleHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from threading import Thread
from typing import Any

import datasets
import numpy as np
import pytest
import yaml
from commandline import python
from fixtures_fuzz import Watch
from fsspec.registry import _registry
from hub import Hub, hub_stand_in
from PIL import Image as PILImage

from fusion_bench.addresses import AddressError, Folders, fence
from fusion_bench.instantiate import check
from fusion_bench.problems import ConfigError, FusionBenchError
from fusion_bench.sources import load
from fusion_bench.taskpool.datasets import describe
from fusion_bench.taskpool.images.labelled import DatasetPlace, LabelledImages
from fusion_bench.tasks import Task

WATCH = Watch()
EVIL = "http://127.0.0.1:9"
REFERENCE = f"reference://x.parquet::{EVIL}/refs.json"
PICTURE = io.BytesIO()
PILImage.fromarray(np.arange(48, dtype=np.uint8).reshape(4, 4, 3)).save(PICTURE, "PNG")
PNG = PICTURE.getvalue()
FEATURES = datasets.Features(
    {"image": datasets.Image(), "label": datasets.ClassLabel(names=["cat", "dog"])}
)


@pytest.fixture(autouse=True)
def no_request(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Give 'datasets' a cache of its own; see to it that nobody connects to anything."""
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr(datasets.config, "DOWNLOADED_DATASETS_PATH", str(tmp_path / "downloads"))
    monkeypatch.setattr(datasets.config, "HF_UPDATE_DOWNLOAD_COUNTS", False)
    with WATCH.on(tmp_path):
        yield
    asked = [event for event in WATCH.seen if event.startswith("socket")]
    assert not [event for event in asked if "family=1," not in event]  # between our processes


def loads(path: Path | str, **more: Any) -> dict[str, Any]:
    return {"_target_": "datasets.load_dataset", "path": str(path), "split": "train", **more}


def read(node: dict[str, Any], **task: Any) -> list[Any]:
    """Do with a data set what a run does, and return its pictures."""
    describe(node)
    data = load("dataset", node, "data")
    images = LabelledImages(
        "t", data, Task.from_mapping(task), DatasetPlace(("data",)), Folders.of(node)
    )
    return [images.image(index) for index in range(len(images))]


def refusal(node: dict[str, Any], **task: Any) -> str:
    with pytest.raises(FusionBenchError) as error:
        read(node, **task)
    assert error.value.exit_code == 2
    return str(error.value)


def table(path: Path, *images: dict[str, Any]) -> Path:
    """Write a parquet file whose rows hold pictures, or name them."""
    path.parent.mkdir(parents=True, exist_ok=True)
    columns = {"image": list(images), "label": [index % 2 for index in range(len(images))]}
    # Dataset.to_parquet would read, and hold, what is named.
    whole = datasets.Dataset.from_dict(columns, features=FEATURES).data.table
    import pyarrow.parquet

    pyarrow.parquet.write_table(
        whole.replace_schema_metadata(FEATURES.arrow_schema.metadata), str(path)
    )
    return path


def folder(root: Path, **cards: Any) -> Path:
    """Write a good data set, with its cards."""
    table(root / "train.parquet", {"bytes": PNG, "path": None}, {"bytes": PNG, "path": "x.png"})
    for name, said in cards.items():
        text = yaml.safe_dump(said)
        if name == "README":
            (root / "README.md").write_text(f"---\n{text}---\n# Data\n")
        else:
            (root / ".huggingface.yaml").write_text(text)
    return root


def configs(data_files: Any, **more: Any) -> dict[str, Any]:
    return {"configs": [{"config_name": "default", "data_files": data_files, **more}]}


# --- what the config names

CHAINS = [
    REFERENCE,
    f"simplecache::{EVIL}/x.parquet",
    f"filecache::{EVIL}/x.parquet",
    f"zip://x.parquet::{EVIL}/x.zip",
    "reference::/tmp/refs.json",
    "zip://train.parquet::train.zip",
]
SCHEMES = [
    "s3://bucket/x.parquet",
    "gs://bucket/x.parquet",
    "memory://x.parquet",
    "ftp://127.0.0.1/x.parquet",
    "sftp://127.0.0.1/x.parquet",
    "smb://127.0.0.1/x.parquet",
    "github://owner:repo@/x.parquet",
    "git://x.parquet",
    "jlab://127.0.0.1/x",
    "dbfs://x",
    "webhdfs://127.0.0.1/x",
    "file:///tmp/x.parquet",
    "local:///tmp/x.parquet",
    "data:text/csv;base64,YQ==",
    "Reference://x",
    "HTTP://127.0.0.1:9/x.csv",
]


@pytest.mark.parametrize("address", CHAINS + SCHEMES)
def test_of_a_config(address: str) -> None:
    for node, key in (
        (loads("parquet", data_files=address), "data_files"),
        (loads("parquet", data_files={"train": [address]}), "data_files.train[0]"),
        (loads("parquet", data_dir=address), "data_dir"),
        (loads(address), "path"),
        ({"_target_": "datasets.load_from_disk", "dataset_path": address}, "dataset_path"),
    ):
        with pytest.raises(ConfigError, match="not supported") as error:
            check(node, "data")
        assert f"{key}: '{address}'" in str(error.value)
        with pytest.raises(FusionBenchError, match="not supported"):  # a dry run
            describe(node)
        with pytest.raises(FusionBenchError, match=r"not supported|no such directory"):
            load("dataset", node, "data")


def test_of_any_other_key() -> None:
    for key in ("revision", "name", "cache_dir", "anything"):
        with pytest.raises(ConfigError, match="not supported"):
            check(loads("csv", data_files="x.csv", **{key: REFERENCE}), "data")
    check(loads("csv", data_files="x.csv", sep="::"), "data")


@pytest.mark.parametrize(
    ("target", "key"),
    [
        ("transformers.AutoModel.from_pretrained", "pretrained_model_name_or_path"),
        ("transformers.AutoModel.from_pretrained", "config"),
    ],
)
def test_of_a_config_beside_data(target: str, key: str) -> None:
    given = {"pretrained_model_name_or_path": "owner/name"} if "transformers" in target else {}
    with pytest.raises(ConfigError, match=rf"{key}: .* is a chain of addresses"):
        check({"_target_": target, **given, key: REFERENCE}, "x")


def test_an_address_that_the_user_names_is_read(tmp_path: Path) -> None:
    with served(folder(tmp_path / "web")) as (address, asked):
        node = loads("parquet", data_files={"train": f"{address}/train.parquet"})
        assert len(read(node)) == 2
        assert any("train.parquet" in path for path in asked)
    WATCH.seen.clear()  # these were meant


def test_what_it_holds_names_no_other(tmp_path: Path) -> None:
    with served(tmp_path / "web") as (address, asked):
        picture = {"bytes": None, "path": f"{address}/x.png"}
        table(tmp_path / "web" / "train.parquet", picture)
        (tmp_path / "web" / "x.png").write_bytes(PNG)
        text = refusal(loads("parquet", data_files={"train": f"{address}/train.parquet"}))
        assert "sample 0" in text and "x.png" in text
        assert not any("x.png" in path for path in asked)
    WATCH.seen.clear()


class served:  # noqa: N801
    """Serve a folder on loopback; tell its address and what it is asked for."""

    def __init__(self, root: Path):
        root.mkdir(parents=True, exist_ok=True)
        asked = self.asked = []  # type: list[str]

        class Handler(SimpleHTTPRequestHandler):
            def __init__(self, *args: Any):
                super().__init__(*args, directory=str(root))

            def log_message(self, format: str, *args: object) -> None:
                asked.append(self.path)

        self.server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)

    def __enter__(self) -> tuple[str, list[str]]:
        Thread(target=self.server.serve_forever, args=(0.05,), daemon=True).start()
        return f"http://127.0.0.1:{self.server.server_port}", self.asked

    def __exit__(self, *_: object) -> None:
        self.server.shutdown()
        self.server.server_close()


# --- what a card names


@pytest.mark.parametrize("card", ["README", "yaml"])
@pytest.mark.parametrize(
    "named",
    [
        REFERENCE,
        [{"split": "train", "path": [REFERENCE]}],
        [{"split": "train", "path": "train.parquet"}, {"split": "test", "path": f"{EVIL}/x.csv"}],
        "hf://datasets/owner/name/x.parquet",
        "s3://bucket/x.parquet",
        "file:///etc/passwd",
        "data:text/csv,a",
        "/etc/passwd",
        "../other/train.parquet",
        "zip://train.parquet::train.zip",
        "reference::refs.json",
    ],
)
def test_of_a_card(tmp_path: Path, card: str, named: Any) -> None:
    folder(tmp_path / "other")
    node = loads(folder(tmp_path / "data", **{card: configs(named)}))
    text = refusal(node)
    assert "A card may name only files in its own folder" in text and "configs[0]" in text
    with pytest.raises(AddressError):  # without a look ahead
        load("dataset", node, "data")


@pytest.mark.parametrize("data_dir", [f"{EVIL}", "../other", "/etc", REFERENCE])
def test_of_a_cards_directory(tmp_path: Path, data_dir: str) -> None:
    folder(tmp_path / "other")
    said = {"configs": [{"config_name": "default", "data_dir": data_dir}]}
    assert "A card may name" in refusal(loads(folder(tmp_path / "data", README=said)))


@pytest.mark.parametrize("text", ["---\na: [\n---\n", "---\n\x00\n---\n", "---\n" + "[" * 5000])
def test_a_card_that_is_none(tmp_path: Path, text: str) -> None:
    data = folder(tmp_path / "data")
    (data / ".huggingface.yaml").write_text(text.replace("---", ""))
    assert ".huggingface.yaml" in refusal(loads(data))


def test_a_card_that_leads_elsewhere(tmp_path: Path) -> None:
    data = folder(tmp_path / "data")
    (tmp_path / "notes").write_text("---\nsecret: 1\n---\n")
    (data / "README.md").symlink_to("../notes")
    assert "is a link that leads out" in refusal(loads(data))


def test_a_good_card(tmp_path: Path) -> None:
    said = {"license_link": "https://example.org", **configs("*.parquet", description="a :: b")}
    assert len(read(loads(folder(tmp_path / "data", README=said)))) == 2


@pytest.fixture(scope="module")
def hub(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Hub]:
    root = tmp_path_factory.mktemp("hub")
    outside = table(root / "outside.parquet", {"bytes": PNG, "path": None})
    for name, named in {
        "good": "*.parquet",
        "reference": REFERENCE,
        "http": f"{EVIL}/x.parquet",
        "absolute": str(outside),
    }.items():
        folder(root / "datasets" / "o" / name, README=configs(named))
    pictures = root / "datasets" / "o" / "pictures"
    pictures.mkdir()
    (pictures / "cat.png").write_bytes(PNG)
    (pictures / "metadata.csv").write_text("file_name,label\ncat.png,0\n")
    with hub_stand_in(root) as running:
        yield running


READ_ALL = """
import sys
from fusion_bench.addresses import Folders
from fusion_bench.problems import FusionBenchError
from fusion_bench.sources import load
from fusion_bench.taskpool.datasets import describe
from fusion_bench.taskpool.images.labelled import DatasetPlace, LabelledImages
from fusion_bench.tasks import Task

asked = []
def hook(event, arguments):
    if event == "socket.connect" and arguments[1][1] == 9:
        asked.append(arguments)
sys.addaudithook(hook)
for name in sys.argv[1:]:
    node = {"_target_": "datasets.load_dataset", "path": f"o/{name}", "split": "train"}
    told = []
    looks = lambda: describe(node), lambda: load("dataset", node, "x")
    for look in looks[name in ("good", "pictures"):]:
        try:
            found = look()
        except FusionBenchError as error:
            told.append("refused")
            assert error.exit_code == 2
        else:
            told.append("read")
    if told[-1] == "read":
        task = Task.from_mapping({"class_names": ["cat", "dog"]})
        images = LabelledImages("t", found, task, DatasetPlace(("x",)), Folders.of(node))
        [images.image(index) for index in range(len(images))]
    print(name, *told)
print("asked", len(asked))
"""


def test_of_a_card_on_the_hub(hub: Hub, tmp_path: Path) -> None:
    good = ["good", "pictures"]
    bad = ["reference", "http", "absolute"]
    run = python(READ_ALL, *good, *bad, cwd=tmp_path, env=hub.environment(tmp_path / "hf"))
    assert run.returncode == 0, run.stderr
    lines = run.stdout.splitlines()
    assert lines == [
        *(f"{name} read" for name in good),
        *(f"{name} refused refused" for name in bad),
        "asked 0",
    ]
    WATCH.seen.clear()


# --- what rows and metadata name


@pytest.mark.parametrize(
    "path",
    [
        f"{EVIL}/x.png",
        "https://localhost/x.png",
        "hf://datasets/owner/name/x.png",
        REFERENCE,
        f"simplecache::{EVIL}/x.png",
        f"zip://x.png::{EVIL}/x.zip",
        f"zip://x.png::zip://y.zip::{EVIL}/x.zip",
        "s3://bucket/x.png",
        "file:///etc/hostname",
        "data:image/png;base64,AA==",
        "/etc/hostname",
        "/dev/zero",
        "../secret.png",
        "{root}/secret.png",
        "{data}/../secret.png",
        "{data}/pipe.png",
        "{data}/endless.png",
        "{data}/none.png",
        "zip://x.png::{root}/secret.zip",
        "zip://none.png::{data}/x.zip",
        "zip://x.png::{data}/secret.zip",
        "{data}",
        "",
        "a\x00b",
    ],
)
def test_of_a_row(tmp_path: Path, path: str) -> None:
    data = tmp_path / "data"
    path = path.format(root=tmp_path, data=data)
    table(data / "train.parquet", {"bytes": None, "path": path})
    (tmp_path / "secret.png").write_bytes(PNG)
    os.mkfifo(data / "pipe.png")
    (data / "endless.png").symlink_to("/dev/zero")
    for file in (tmp_path / "secret.zip", data / "x.zip"):
        with zipfile.ZipFile(file, "w") as archive:
            archive.writestr("x.png", PNG)
    (data / "secret.zip").symlink_to("../secret.zip")
    text = refusal(loads("parquet", data_files={"train": str(data / "train.parquet")}))
    assert "data: sample 0" in text and "holds no readable image" in text


def test_what_tells_data_apart_looks_at_no_other_file(tmp_path: Path) -> None:
    secret = tmp_path / "secret.png"
    secret.write_bytes(PNG)
    data = tmp_path / "data"
    node = loads("parquet", data_files={"train": str(data / "train.parquet")})
    table(data / "train.parquet", {"bytes": None, "path": str(secret)})
    images = LabelledImages(
        "t", load("dataset", node, "x"), Task(), DatasetPlace(("x",)), Folders.of(node)
    )
    WATCH.seen.clear()
    before = images.fingerprint
    assert not any(event.startswith("read") for event in WATCH.seen)
    secret.write_bytes(b"other")
    del images.fingerprint
    assert images.fingerprint == before


def test_a_row_without_a_picture(tmp_path: Path) -> None:
    table(tmp_path / "data" / "train.parquet", {"bytes": None, "path": "x"}, {"bytes": PNG})
    import pyarrow as pa
    import pyarrow.parquet as pq

    file = tmp_path / "data" / "train.parquet"
    rows = pq.read_table(file)
    empty = pa.array([{"bytes": None, "path": None}, None], rows.schema.field("image").type)
    pq.write_table(rows.set_column(0, "image", empty), file)
    assert "sample 0" in refusal(loads(tmp_path / "data"))


def test_pictures_that_lie_in_the_folder(tmp_path: Path) -> None:
    data = tmp_path / "data"
    for name in ("cat", "dog"):
        (data / name).mkdir(parents=True)
        (data / name / "1.png").write_bytes(PNG)
    # Folders of links are common; nothing of a picture leaves the machine.
    (tmp_path / "other.png").write_bytes(PNG)
    (data / "dog" / "2.png").symlink_to("../../other.png")
    assert len(read(loads(data))) == 3


def test_pictures_in_an_archive(tmp_path: Path) -> None:
    (tmp_path / "data").mkdir()
    with zipfile.ZipFile(tmp_path / "data" / "train.zip", "w") as archive:
        archive.writestr("a/cat.png", PNG)
        archive.writestr("metadata.csv", "file_name,label\na/cat.png,0\n")
    (image,) = read(loads(tmp_path / "data"), class_names=["cat"])
    assert image.size == (4, 4)


@pytest.mark.parametrize("kind", ["csv", "jsonl"])
@pytest.mark.parametrize(
    "name",
    [f"{EVIL}/x.png", REFERENCE, "../secret.png", "{root}/secret.png", "file://{root}/secret.png"],
)
def test_of_a_metadata_file(tmp_path: Path, name: str, kind: str) -> None:
    data = tmp_path / "data"
    data.mkdir()
    (tmp_path / "secret.png").write_bytes(PNG)
    (data / "cat.png").write_bytes(PNG)
    name = name.format(root=tmp_path)
    row = json.dumps({"file_name": name, "label": 0})
    text = f"file_name,label\n{name},0\n" if kind == "csv" else row
    (data / f"metadata.{kind}").write_text(text)
    assert "data" in refusal(loads(data), class_names=["cat"])


@pytest.mark.parametrize("text", ["null", " null\n{}", '{"file_name": "cat.png"}\nnull\n'])
def test_a_line_at_which_pyarrow_crashes(tmp_path: Path, text: str) -> None:
    data = tmp_path / "data"
    data.mkdir()
    (data / "cat.png").write_bytes(PNG)
    (data / "metadata.jsonl").write_text(text)
    assert "metadata.jsonl' is 'null'" in refusal(loads(data))


def test_a_column_of_labels_opens_nothing(tmp_path: Path) -> None:
    table(tmp_path / "data" / "train.parquet", {"bytes": None, "path": f"{EVIL}/x.png"})
    refusal(loads(tmp_path / "data"), label_column="image", class_names=["a"])


# --- files that are not the data set's


def test_a_table_that_leads_elsewhere(tmp_path: Path) -> None:
    other = table(tmp_path / "other" / "train.parquet", {"bytes": PNG})
    (tmp_path / "data").mkdir()
    (tmp_path / "data" / "train.parquet").symlink_to(other)
    text = refusal(loads(tmp_path / "data"))
    assert "leads out" in text and "data_files" in text
    # What the message advises
    assert len(read(loads("parquet", data_files={"train": str(other)}))) == 1
    named = loads("parquet", data_files={"train": str(tmp_path / "data" / "train.parquet")})
    assert len(read(named)) == 1


def saved(folder: Path) -> Path:
    columns = {"image": [{"bytes": PNG}], "label": [0]}
    datasets.Dataset.from_dict(columns, features=FEATURES).save_to_disk(folder)
    return folder


@pytest.mark.parametrize("how", ["above", "absolute", "linked"])
def test_a_saved_data_set_that_leads_elsewhere(tmp_path: Path, how: str) -> None:
    data, other = saved(tmp_path / "data"), saved(tmp_path / "other")
    state = json.loads((data / "state.json").read_text())
    file = state["_data_files"][0]["filename"]
    names = {"above": f"../other/{file}", "absolute": str(other / file), "linked": "x.arrow"}
    (data / "x.arrow").symlink_to(other / file)
    state["_data_files"] = [{"filename": names[how]}]
    (data / "state.json").write_text(json.dumps(state))
    node = {"_target_": "datasets.load_from_disk", "dataset_path": str(data)}
    assert "the dataset's folder" in refusal(node)


def test_a_saved_data_set_and_its_format(tmp_path: Path) -> None:
    data = saved(tmp_path / "data")
    state = json.loads((data / "state.json").read_text())
    (data / "state.json").write_text(json.dumps(state | {"_format_type": "numpy"}))
    assert len(read({"_target_": "datasets.load_from_disk", "dataset_path": str(data)})) == 1


def test_what_a_config_names(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    folder(tmp_path / "data")
    places = [tmp_path / name for name in ("private.png", "data/inner.png", "data/deep/x.png")]
    places[2].parent.mkdir()
    for place in places:
        place.write_bytes(PNG)

    def held(node: dict[str, Any]) -> list[str]:
        found = []
        for place in places:
            with contextlib.suppress(AddressError):
                Folders.of(node).picture(str(place))
                found.append(place.name)
        return found

    assert held(loads("owner/name")) == held(loads("mnist")) == held(loads("parquet")) == []
    assert held(loads("owner/name", data_files="*.parquet")) == []
    within = ["inner.png", "x.png"]
    for named in ("data/train.parquet", "data/*.parquet", str(tmp_path / "data" / "*")):
        assert held(loads("parquet", data_files=named)) == within
    assert held(loads("imagefolder", data_dir="data")) == held(loads("data")) == within
    assert held(loads("data", data_files="train.parquet")) == within
    assert held(loads("owner/name", data_files=str(tmp_path / "data" / "*.parquet"))) == within
    assert held(loads("owner/name", data_files="~nobody/x.csv")) == []
    assert held({"_target_": "datasets.load_from_disk", "dataset_path": "data"}) == within
    assert held({"_target_": "mine.load"}) == ["private.png", *within]


# --- the fence


def test_the_fence_leaves_nothing_behind(tmp_path: Path) -> None:
    import fsspec

    fsspec.get_filesystem_class("memory")
    before = dict(_registry)
    with pytest.raises(AddressError), fence(loads(folder(tmp_path / "data"))):
        assert _registry != before
        fsspec.open("memory://x").open()
    assert _registry == before


def test_several_processes(tmp_path: Path) -> None:
    pictures = [{"bytes": PNG, "path": None}] * 4
    for part in "ab":
        table(tmp_path / "data" / f"train-{part}.parquet", *pictures)
    assert len(read(loads(tmp_path / "data", num_proc=2))) == 8
