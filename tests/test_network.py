"""What is asked again, for how long, and what content is let in."""

import hashlib
import json
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import httpx2
import huggingface_hub.constants as constants
import pytest
import torch
from hub import Fault, Hub, hub_stand_in
from huggingface_hub import HfApi, get_session
from huggingface_hub.errors import HfHubHTTPError
from safetensors.torch import save_file

from fusion_bench import network, sources
from fusion_bench.network import DamagedError, patiently, refuse_damaged
from fusion_bench.problems import ConfigError, EnvironmentProblem
from fusion_bench.repository import locate
from fusion_bench.weights import open_repository, sha256

NAME, WEIGHTS = "owner/name", r"resolve/.*/model\.safetensors"


@pytest.fixture
def hub(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Hub]:
    model = tmp_path / "models" / NAME
    model.mkdir(parents=True)
    (model / "config.json").write_text(json.dumps({"words": "x" * 200}))
    save_file({"a": torch.arange(500.0)}, model / "model.safetensors")
    with hub_stand_in(tmp_path) as running:
        template = running.endpoint + "/{repo_id}/resolve/{revision}/{filename}"
        monkeypatch.setattr(constants, "ENDPOINT", running.endpoint)
        monkeypatch.setattr(constants, "HUGGINGFACE_CO_URL_TEMPLATE", template)
        monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path / "cache"))
        yield running


@pytest.fixture
def no_waits(monkeypatch: pytest.MonkeyPatch) -> None:
    """Let the Hub's client ask again at once."""
    monkeypatch.setattr(time, "sleep", lambda seconds: None)


def fetched(file: str = "model.safetensors") -> bytes:
    return (locate(NAME).fetch(file) / file).read_bytes()


def on_hub(hub: Hub, file: str = "model.safetensors") -> bytes:
    return (hub.root / "models" / NAME / file).read_bytes()


def blobs(hub: Hub) -> list[Path]:
    return [blob for blob in (hub.root / "cache").glob("*/blobs/*") if blob.is_file()]


# --- asking again


def failing(times: int, error: Callable[[], Exception]) -> tuple[Callable[[], str], list[float]]:
    """Return what fails some times before it returns, and the list of when it was called."""
    calls: list[float] = []

    def call() -> str:
        calls.append(time.monotonic())
        if len(calls) <= times:
            raise error()
        return "answer"

    return call, calls


def refused(status: int, **headers: str) -> HfHubHTTPError:
    request = httpx2.Request("GET", "http://hub.invalid/api/models/a")
    response = httpx2.Response(status, headers=headers, request=request)
    return HfHubHTTPError(f"status {status}", response=response)


@pytest.mark.parametrize(
    "error",
    [
        *(lambda code=code: refused(code) for code in (408, 429, 500, 502, 503, 504)),
        lambda: httpx2.ConnectError("x"),
        lambda: httpx2.ReadTimeout("x"),
        lambda: httpx2.RemoteProtocolError("x"),
        lambda: OSError("Consistency check failed: x"),
        lambda: DamagedError("x"),
    ],
)
def test_what_may_pass_is_asked_again(error: Callable[[], Exception]) -> None:
    call, calls = failing(2, error)
    assert patiently(call) == "answer" and len(calls) == 3


@pytest.mark.parametrize(
    "error",
    [
        *(lambda code=code: refused(code) for code in (400, 401, 403, 404)),
        lambda: OSError("No space left on device"),
        lambda: ValueError("x"),
        lambda: ConfigError("x"),
    ],
)
def test_what_stays_is_asked_once(error: Callable[[], Exception]) -> None:
    call, calls = failing(9, error)
    with pytest.raises(type(error())):
        patiently(call)
    assert len(calls) == 1


def test_patience_ends(monkeypatch: pytest.MonkeyPatch) -> None:
    clock = [0.0]
    monkeypatch.setattr(network, "PATIENCE", 30.0)
    monkeypatch.setattr(network, "_WAITS", (0.5, 1.0, 2.0, 4.0, 8.0))
    monkeypatch.setattr(time, "monotonic", lambda: clock[0])
    monkeypatch.setattr(time, "sleep", lambda seconds: clock.__setitem__(0, clock[0] + seconds))
    call, calls = failing(99, lambda: refused(503))
    with pytest.raises(HfHubHTTPError):
        patiently(call)
    assert calls == [0, 0.5, 1.5, 3.5, 7.5, 15.5, 23.5]
    clock[0], (call, calls) = 0.0, failing(99, lambda: refused(429, **{"Retry-After": "20"}))
    with pytest.raises(HfHubHTTPError):
        patiently(call)
    assert calls == [0, 20]


# --- what is read through a Hub that fails


@pytest.mark.usefixtures("no_waits")
@pytest.mark.parametrize("how", [429, 500, 503, "cut", "longer", "shorter", "flip", "page"])
@pytest.mark.parametrize("file", ["config.json", "model.safetensors"])
def test_a_file_comes_whole_in_the_end(how: int | str, file: str, hub: Hub) -> None:
    hub.spoil(Fault(rf"resolve/.*/{file}", how, times=2, methods=("GET",)))
    assert fetched(file) == on_hub(hub, file)
    assert hub.faults[0].met == 2 or how in ("shorter", "longer")


@pytest.mark.usefixtures("no_waits")
@pytest.mark.parametrize("how", [500, "cut", "shorter", "page"])
def test_headers_and_descriptions_come_in_the_end(how: int | str, hub: Hub) -> None:
    hub.spoil(Fault(WEIGHTS, how, times=1))
    hub.spoil(Fault("/api/models/", how, times=1))
    assert dict(open_repository(locate(NAME)))["a"].tolist() == list(range(500))


@pytest.mark.usefixtures("no_waits")
@pytest.mark.parametrize(
    ("how", "words"),
    [
        (503, r"\(status 503\)\. Try again later"),
        ("cut", "the connection to the Hub broke"),
        ("flip", "what came was damaged: its hash"),
        ("etag", "what came was damaged: its hash"),
        ("page", "networks send it that want a login"),
    ],
)
def test_what_does_not_pass_is_said_in_a_line(how: int | str, words: str, hub: Hub) -> None:
    hub.spoil(Fault("resolve/", how))
    for file in ("config.json", "model.safetensors"):
        with pytest.raises(EnvironmentProblem, match=rf"Cannot read the model '{NAME}': .*{words}"):
            fetched(file)
    assert not blobs(hub)


def test_a_hub_that_wants_to_be_left_alone_is_not_waited_for(hub: Hub) -> None:
    hub.spoil(Fault(WEIGHTS, 429, headers={"Retry-After": "3600"}))
    with pytest.raises(
        EnvironmentProblem, match=r"status 429\)\. It asks to wait for 3600 seconds"
    ):
        fetched()


@pytest.mark.parametrize(("how", "words"), [("silent", "timed out"), ("trickle", "too slowly")])
def test_nobody_waits_for_ever(
    how: str, words: str, hub: Hub, monkeypatch: pytest.MonkeyPatch
) -> None:
    for limit in ("HF_HUB_DOWNLOAD_TIMEOUT", "HF_HUB_ETAG_TIMEOUT"):
        monkeypatch.setattr(constants, limit, 0.25)
    monkeypatch.setattr(network, "PATIENCE", 0.01)
    hub.spoil(Fault("/api/models/", how))  # for this the client has no limit of its own
    with pytest.raises(EnvironmentProblem, match=words):
        locate(NAME)


def test_an_answer_that_is_no_answer(hub: Hub) -> None:
    hub.spoil(Fault("/api/models/", "shorter"))
    with pytest.raises(EnvironmentProblem, match="an answer cannot be understood"):
        locate(NAME)


def test_a_hub_that_fails_is_done_without_where_all_is_here(hub: Hub) -> None:
    before = sha256(open_repository(locate(NAME)))
    hub.fail("/api/|resolve", 503)
    assert sha256(open_repository(locate(NAME))) == before


def test_the_address_is_told_without_its_password(
    hub: Hub, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(constants, "ENDPOINT", "http://user:password@no-such-host.invalid")
    with pytest.raises(
        EnvironmentProblem, match=r"the Hub \(http://no-such-host\.invalid\) cannot"
    ):
        locate(NAME)


# --- what lies in the cache


@pytest.mark.parametrize("file", ["config.json", "model.safetensors"])
@pytest.mark.parametrize("damage", [lambda b: b[:50], lambda b: b[:-1] + b"?", lambda b: b""])
def test_a_damaged_copy_is_fetched_again(
    damage: Callable[[bytes], bytes], file: str, hub: Hub, monkeypatch: pytest.MonkeyPatch
) -> None:
    fetched(file)
    (blob,) = blobs(hub)
    blob.write_bytes(damage(blob.read_bytes()))
    with monkeypatch.context() as offline:
        offline.setattr(sources, "_hub_answers", lambda endpoint, minute: False)
        with pytest.raises(EnvironmentProblem, match="its copy in the local cache was damaged"):
            fetched(file)
    assert fetched(file) == on_hub(hub, file)


def test_a_link_without_its_file_is_fetched_again(hub: Hub) -> None:
    fetched()
    (blob,) = blobs(hub)
    blob.unlink()
    assert fetched() == on_hub(hub)


def test_names_of_blobs(tmp_path: Path) -> None:
    content = b"content"
    names = [
        hashlib.sha256(content).hexdigest(),
        hashlib.sha1(b"blob 7\0" + content).hexdigest(),
        hashlib.sha1(content).hexdigest(),  # as a mirror may state it
        "0a" * 32 + ".1234.incomplete",
    ]
    for name in names:
        (tmp_path / name).write_bytes(content)
    refuse_damaged(sorted(tmp_path.iterdir()))
    wrong = [tmp_path / ("0a" * length) for length in (20, 32)]
    for blob in wrong:
        blob.write_bytes(content)
        with pytest.raises(DamagedError):
            refuse_damaged(tmp_path.iterdir())
    assert sorted(file.name for file in tmp_path.iterdir()) == sorted(names)


def test_a_large_file_is_hashed_once(hub: Hub, monkeypatch: pytest.MonkeyPatch) -> None:
    fetched()
    hashed: list[Any] = []
    monkeypatch.setattr(hashlib, "file_digest", lambda *arguments: hashed.append(arguments))
    fetched()
    assert not hashed


def test_limits_reach_requests_that_have_none(hub: Hub) -> None:
    patiently(lambda: HfApi(endpoint=hub.endpoint).model_info(NAME))
    for method, given, most in (
        ("GET", None, 10),
        ("GET", 60, 60),
        ("HEAD", 60, 10),
        ("PUT", None, None),
    ):
        request = get_session().build_request(method, hub.endpoint, timeout=given)
        for hook in get_session().event_hooks["request"]:
            hook(request)
        assert request.extensions["timeout"]["read"] == most
