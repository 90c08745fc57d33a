"""Timeouts, retries and integrity checks for the Hub.

``huggingface_hub`` retries requests for files and their metadata, and resumes downloads. But some
of its requests have no timeout or no retry, and it does not compare content with the Hub's hash.
"""

import hashlib
import itertools
import logging
import re
import time
from collections.abc import Callable, Iterable, Iterator
from functools import cache
from pathlib import Path
from traceback import walk_tb
from typing import TYPE_CHECKING, TypeVar

from fusion_bench.problems import chain
from fusion_bench.storage import file_sha256

if TYPE_CHECKING:
    from httpx2 import Request, Response

T = TypeVar("T")

log = logging.getLogger(__name__)

#: For how many seconds after its first failure a source is asked again; no attempt begins later.
PATIENCE = 30.0
#: Likewise, where one can go on without an answer.
BRIEFLY = 2.0
#: A body must come with as many bytes a second, averaged over three times HF_HUB_DOWNLOAD_TIMEOUT.
LEAST_PACE = 1024
_WAITS = (0.5, 1.0, 2.0, 4.0, 8.0)
#: Statuses of which the next answer may be another. 416 comes of a file that was announced longer
#: than it is, and ends with a whole new download.
_PASSING = (408, 416, 425, 429)
#: Where no page for people is.
_FILES = re.compile(r"/api/|/resolve/.*(?<!\.html)$")
#: Packages that the Hub's client lets parse an answer.
_PARSERS = ("json", "httpx2", "datetime", "_strptime")


class DamagedError(OSError):
    """A file in the Hub's cache has the wrong hash and was deleted."""


def patiently(call: Callable[[], T], *, briefly: bool = False) -> T:
    """Call ``call``, and retry while the network or the Hub fails.

    Waits grow from half a second to eight; ``Retry-After`` is respected.

    Args:
        call: a request to the Hub that may be repeated.
        briefly: for ``BRIEFLY`` instead of ``PATIENCE``.

    Raises:
        Exception: the last attempt's, or one that a retry would not fix.
    """
    from huggingface_hub import is_offline_mode

    _set_limits()
    if is_offline_mode():
        return call()
    end = None
    for usual in itertools.chain(_WAITS, itertools.repeat(_WAITS[-1])):
        try:
            return call()
        except Exception as error:
            now = time.monotonic()
            end = end or now + (BRIEFLY if briefly else PATIENCE)
            wait = max(usual, asked_to_wait(error) or 0)
            if not may_pass(error) or now + wait > end:
                raise
            reason = " ".join(str(error).split()) or type(error).__name__
            log.debug("Asking the Hub again in %g seconds: %s", wait, reason)
            time.sleep(wait)
    raise AssertionError("the waits have no end")


def refuse_damaged(blobs: Iterable[Path]) -> None:
    """Delete files of the Hub's cache whose content does not match the hash in their names.

    They are named by git's blob id, or by the SHA-256 of a large file. A large file is hashed once,
    and its hash is cached. Files with other names, such as running downloads, are left.

    Raises:
        DamagedError: there was such a file.
    """
    damaged = [blob for blob in blobs if _is_damaged(blob)]
    for blob in damaged:
        blob.unlink(missing_ok=True)
    if damaged:
        raise DamagedError(f"The content of '{damaged[0]}' was not of the hash in its name.")


def blobs_of(kind: str, name: str) -> list[Path]:
    """Return all files that the Hub's cache has of a ``model``, ``dataset`` or ``processor``."""
    from huggingface_hub import constants
    from huggingface_hub.file_download import repo_folder_name

    repo_type = "dataset" if kind == "dataset" else "model"
    folder = Path(constants.HF_HUB_CACHE) / repo_folder_name(repo_id=name, repo_type=repo_type)
    return sorted(folder.glob("blobs/*"))


def blob_of(file: Path) -> Path:
    """Return the blob of a snapshot file in the Hub's cache."""
    return file.parent / file.readlink() if file.is_symlink() else file


def status(error: BaseException) -> int | None:
    """Return the Hub's HTTP error status, if it answered."""
    from huggingface_hub.errors import HfHubHTTPError

    found = [e.response.status_code for e in chain(error) if isinstance(e, HfHubHTTPError)]
    return found[0] if found else None


def asked_to_wait(error: BaseException) -> float | None:
    """Return the seconds of the Hub's ``Retry-After``."""
    from huggingface_hub.errors import HfHubHTTPError

    for e in chain(error):
        if isinstance(e, HfHubHTTPError) and (wait := _retry_after(e.response)) is not None:
            return wait
    return None


def broke_off(error: BaseException) -> str | None:
    """Return the network failure, if the network failed and not the Hub."""
    import httpx2
    from huggingface_hub.errors import FileMetadataError

    broken = (httpx2.TimeoutException, httpx2.NetworkError, httpx2.RemoteProtocolError)
    for e in chain(error):
        if isinstance(e, broken):
            return " ".join(str(e).split()).rstrip(".") or type(e).__name__
        if isinstance(e, FileMetadataError) or "Consistency check failed" in str(e):
            return "what came is not what was asked for"
        if _is_garbled(e):
            return "an answer cannot be understood"
    return None


def may_pass(error: BaseException) -> bool:
    """Return whether a retry may succeed."""
    code = status(error)
    if code is not None:
        return code >= 500 or code in _PASSING
    return isinstance(error, DamagedError) or broke_off(error) is not None


def _is_garbled(error: BaseException) -> bool:
    """Return whether the Hub's client failed to parse an answer.

    It has no exception for that. It uses none of these for anything else, but for names and models'
    configs that are no such.
    """
    from huggingface_hub.errors import HFValidationError, StrictDataclassError

    of_us = (HFValidationError, StrictDataclassError)
    if not isinstance(error, (ValueError, LookupError, TypeError, AttributeError)):
        return False
    if isinstance(error, (OSError, *of_us)):
        return False
    modules = [frame.f_globals.get("__name__", "") for frame, _ in walk_tb(error.__traceback__)]
    inner = next((m for m in reversed(modules) if m.partition(".")[0] not in _PARSERS), "")
    return inner.startswith("huggingface_hub.") and inner != "huggingface_hub.dataclasses"


def _is_damaged(blob: Path) -> bool:
    if not blob.is_file():
        return False
    if re.fullmatch("[0-9a-f]{64}", blob.name):
        return file_sha256(blob) != blob.name
    if re.fullmatch("[0-9a-f]{40}", blob.name):
        content = blob.read_bytes()
        prefix = b"blob %d\0" % len(content)
        # A mirror may state the plain hash of the content.
        known = (hashlib.sha1(part + content).hexdigest() for part in (prefix, b""))
        return blob.name not in known
    return False


def _retry_after(response: "Response") -> float | None:
    from huggingface_hub.utils import parse_ratelimit_headers

    limits = parse_ratelimit_headers(response.headers)
    if limits is not None and limits.remaining == 0:
        return float(limits.reset_in_seconds)
    value = response.headers.get("Retry-After", "").strip()
    return float(value) if value.isdecimal() else None


@cache
def _set_limits() -> None:
    """Set timeouts of the Hub's client for all users, also with a custom factory."""
    from huggingface_hub import set_client_factory
    from huggingface_hub.utils import _http

    make = _http._GLOBAL_CLIENT_FACTORY

    def limited() -> object:
        client = make()
        hooks = client.event_hooks
        client.event_hooks = {
            "request": [*hooks.get("request", []), _limit],
            "response": [*hooks.get("response", []), _watch],
        }
        return client

    set_client_factory(limited)  # type: ignore[arg-type]


def _limit(request: "Request") -> None:
    """Set a timeout for reading requests."""
    from huggingface_hub import constants

    if request.method in ("GET", "HEAD") or "/paths-info/" in request.url.path:
        limits = request.extensions.get("timeout") or {}
        most = max(constants.HF_HUB_DOWNLOAD_TIMEOUT, constants.HF_HUB_ETAG_TIMEOUT)
        for what in ("connect", "read", "write", "pool"):
            # For a file's metadata the client asks six times, and would wait a minute each time.
            if limits.get(what) is None or request.method == "HEAD":
                limits[what] = min(limits.get(what) or most, most)
        request.extensions["timeout"] = limits


def _watch(response: "Response") -> None:
    """Refuse an answer that arrives too slowly."""
    from httpx2 import ReadTimeout, RemoteProtocolError, SyncByteStream
    from huggingface_hub import constants
    from huggingface_hub.utils import hf_raise_for_status

    if response.status_code >= 400 and (_retry_after(response) or 0) > PATIENCE:
        hf_raise_for_status(response)  # the client would sleep that long
    path, kind = response.request.url.path, response.headers.get("Content-Type", "")
    if response.is_success and kind.startswith("text/html") and _FILES.search(path):
        raise RemoteProtocolError("A page came instead, as networks send it that want a login")
    window = 3 * constants.HF_HUB_DOWNLOAD_TIMEOUT
    stream = response.stream

    class Paced(SyncByteStream):
        def __iter__(self) -> Iterator[bytes]:
            begin, received = time.monotonic(), 0
            for part in stream:  # type: ignore[union-attr]
                received += len(part)
                if (seconds := time.monotonic() - begin) > window:
                    if received < LEAST_PACE * seconds:
                        raise ReadTimeout("The content comes too slowly.", request=response.request)
                    begin, received = time.monotonic(), 0
                yield part

        def close(self) -> None:
            stream.close()  # type: ignore[union-attr]

    response.stream = Paced()
