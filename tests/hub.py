"""A small stand-in of the Hugging Face Hub on loopback, which the real clients read and write.

It serves a directory tree, `root/models/<owner>/<name>/…` and `root/datasets/<owner>/<name>/…`,
through the part of the Hub's interface that `huggingface_hub`, `transformers` and `datasets` use to
read: repository info, tree listings, paths-info and files. The files may change while it runs: the
commit of a repository is a hash of what it holds at the moment. Whoever has the token that it is
given may create repositories and commit to them, with large files sent beforehand.

    with hub_stand_in(root) as hub:
        subprocess.run([...], env=hub.environment(tmp_path / "cache"))
        assert ("HEAD", "/owner/name/resolve/main/config.json") in hub.requests
"""

import hashlib
import json
import os
import re
import socket
import threading
from base64 import b64decode
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from functools import cache
from http import HTTPStatus
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any
from urllib.parse import parse_qs, unquote, urlsplit

LARGE_FILES = {".bin", ".parquet", ".safetensors"}  # what the Hub keeps outside of git
FLAGS = ("recursive", "expand")
WRITES = re.compile(
    r"/api/(?P<create>repos/create)|/api/(?P<check>validate-yaml)|/lfs/(?P<blob>[0-9a-f]{64})"
    r"|/(?P<lfs>[\w.-]+/[\w.-]+)\.git/info/lfs/objects/batch"
    r"|/api/models/(?P<name>[\w.-]+/[\w.-]+)/(?P<what>preupload/main|commit/main|settings)"
)
API = re.compile(
    r"/api/(?P<kind>models|datasets)/(?P<name>[\w.-]+(/[\w.-]+)?)"
    r"(/(?P<what>revision|tree|paths-info)/(?P<revision>[^/]+)(/(?P<path>.+))?)?"
)
LISTING = re.compile(r"/api/(?P<kind>models|datasets)")
RESOLVE = re.compile(
    r"/((?P<kind>datasets)/)?(?P<name>[\w.-]+(/[\w.-]+)?)/resolve/(?P<revision>[^/]+)/(?P<path>.+)"
)


def client_environment(endpoint: str, cache_dir: Path, *, offline: bool = False) -> dict[str, str]:
    """Return this process's environment, with Hugging Face's clients sent to ``endpoint``.

    No setting of the machine that runs the tests shines through, and nothing is read from or
    written to its cache: all of it lives under ``cache_dir``.
    """
    ours = re.compile(
        r"HF_|HUGGING|HUB_|TRANSFORMERS_|PYTORCH_|DATASETS_|(https?|all|no)_proxy", re.I
    )
    return {key: value for key, value in os.environ.items() if not ours.match(key)} | {
        "HF_ENDPOINT": endpoint,
        "HF_HOME": str(cache_dir),
        "HF_HUB_OFFLINE": str(int(offline)),
        "HF_HUB_DISABLE_TELEMETRY": "1",
        "HF_HUB_DISABLE_UPDATE_CHECK": "1",
        "HF_HUB_DISABLE_XET": "1",
        "DISABLE_SAFETENSORS_CONVERSION": "1",  # it would ask a service beside the Hub
    }


@cache
def _kept() -> socket.socket:
    """A port that is taken, so that no other process can come to listen there."""
    taken = socket.socket()
    taken.bind(("127.0.0.1", 0))
    return taken


def closed_endpoint() -> str:
    """Return the URL of a port on loopback at which nobody listens."""
    return f"http://127.0.0.1:{_kept().getsockname()[1]}"


@dataclass
class Hub:
    """A running stand-in: where it is, what it was asked, and what it shall refuse.

    ``token`` is whose bearer may write, ``private`` what only they may read, and ``blobs`` are
    large files, by their hashes. ``ranges`` has the Range header of each of the ``requests``, empty
    where there was none.
    ``closing`` is set when the stand-in ends, so that nobody waits for an answer that stalls.
    """

    root: Path
    endpoint: str
    requests: list[tuple[str, str]] = field(default_factory=list)
    ranges: list[str] = field(default_factory=list)
    failures: list[tuple[re.Pattern[str], int, dict[str, str]]] = field(default_factory=list)
    faults: list["Fault"] = field(default_factory=list)
    closing: threading.Event = field(default_factory=threading.Event)
    token: str | None = None
    private: set[str] = field(default_factory=set)
    blobs: dict[str, bytes] = field(default_factory=dict)

    def environment(self, cache_dir: Path, *, offline: bool = False) -> dict[str, str]:
        """Return the environment of a subprocess whose Hub this is."""
        return client_environment(self.endpoint, cache_dir, offline=offline)

    def downloads(self) -> list[str]:
        """Return the paths of the files that were asked for as a whole."""
        asked = zip(self.requests, self.ranges, strict=True)
        whole = [path for (method, path), span in asked if method == "GET" and not span]
        return [path for path in whole if RESOLVE.fullmatch(path)]

    def headers(self) -> list[str]:
        """Return the paths of the files of which the beginning was asked for."""
        asked = zip(self.requests, self.ranges, strict=True)
        return [path for (_, path), span in asked if span.startswith("bytes=0-")]

    def fail(self, pattern: str, status: int, error_code: str | None = None) -> None:
        """Answer every path in which ``pattern`` is found with ``status``, from now on.

        ``error_code`` is what the Hub says in its X-Error-Code header, `GatedRepo` for one.
        """
        headers = {"X-Error-Code": error_code} if error_code else {}
        self.failures.append((re.compile(pattern), status, headers))

    def spoil(self, fault: "Fault") -> None:
        """Answer badly, from now on; the first fault that fits a request is taken."""
        self.faults.append(fault)

    def fault(self, method: str, path: str) -> "Fault | None":
        """Return what is to go wrong with a request; each time is counted."""
        for fault in self.faults:
            fits = method in fault.methods and fault.path.search(path)
            if fits and (fault.times is None or fault.met < fault.times):
                fault.met += 1
                return fault
        return None


@dataclass
class Fault:
    """An answer that goes wrong.

    Attributes:
        pattern: what is found in the paths that are spoiled.
        how: a number is a status. ``stall`` sends nothing more after the headers, ``silent`` not
            even those, ``trickle`` a byte at a time, ``cut`` the first half, ``longer`` and
            ``shorter`` announce a length that is not the body's, ``flip`` changes the byte ``at``
            which it is told to, by default the middle one, ``etag`` states another hash, and
            ``page`` sends a page for people, as networks do that want a login.
        times: how often, for ever by default.
        methods: whose answers.
        headers: that go with a status.
        met: how often it has happened.
    """

    pattern: str
    how: int | str
    times: int | None = None
    methods: tuple[str, ...] = ("GET", "HEAD", "POST")
    headers: dict[str, str] = field(default_factory=dict)
    at: int | None = None
    met: int = 0

    @property
    def path(self) -> re.Pattern[str]:
        """The pattern, compiled."""
        return re.compile(self.pattern)


@contextmanager
def hub_stand_in(root: Path) -> Iterator[Hub]:
    """Serve the repositories under ``root`` until the context ends."""
    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    server.hub = hub = Hub(root, f"http://127.0.0.1:{server.server_port}")  # type: ignore[attr-defined]
    thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.05})
    thread.start()
    try:
        yield hub
    finally:
        hub.closing.set()
        server.shutdown()
        thread.join()
        server.server_close()


class Repository:
    """The files of one model or dataset, and the commit that they make."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.files = {
            file.relative_to(folder).as_posix(): file.read_bytes()
            for file in sorted(folder.rglob("*"))
            if file.is_file()
        }
        tree = "".join(f"{path} {self.etag(path)}\n" for path in self.files)
        self.commit = hashlib.sha1(tree.encode()).hexdigest()

    def etag(self, path: str) -> str:
        """Return what identifies a file's content: git's blob id, or the SHA-256 of a large one."""
        content = self.files[path]
        if Path(path).suffix in LARGE_FILES:
            return hashlib.sha256(content).hexdigest()
        return hashlib.sha1(b"blob %d\0" % len(content) + content).hexdigest()

    def entry(self, path: str, *, expand: bool = False) -> dict[str, Any]:
        """Return a file or a directory as tree listings describe it."""
        commit = {"id": self.commit, "title": "Upload", "date": "2024-01-01T00:00:00.000Z"}
        extra = {"lastCommit": commit} if expand else {}
        if path not in self.files:
            return {"type": "directory", "path": path, "oid": self.commit, "size": 0, **extra}
        entry = {
            "type": "file",
            "path": path,
            "oid": self.etag(path),
            "size": len(self.files[path]),
        }
        if Path(path).suffix in LARGE_FILES:
            entry["lfs"] = {"oid": self.etag(path), "size": entry["size"], "pointerSize": 134}
        return entry | extra

    def below(self, path: str, *, recursive: bool) -> list[str]:
        """Return the files and directories under a directory, the repository's root if empty."""
        known = {str(parent) for file in self.files for parent in Path(file).parents} - {"."}
        return sorted(
            entry
            for entry in known | set(self.files)
            if (entry.startswith(f"{path}/") or not path)
            and (recursive or str(Path(entry).parent) == (path or "."))
        )

    def info(self, kind: str, name: str) -> dict[str, Any]:
        """Return the description of the repository itself."""
        return {
            "_id": self.commit[:24],
            "id": name,
            "modelId": name,
            "author": name.partition("/")[0],
            "sha": self.commit,
            "lastModified": "2024-01-01T00:00:00.000Z",
            "createdAt": "2024-01-01T00:00:00.000Z",
            "private": False,
            "gated": False,
            "disabled": False,
            "downloads": 0,
            "likes": 0,
            "tags": [kind],
            "siblings": [{"rfilename": p, "size": len(c)} for p, c in self.files.items()],
        }


class Handler(BaseHTTPRequestHandler):
    """Answers one request of a client."""

    protocol_version = "HTTP/1.1"
    fault: Fault | None = None

    def log_message(self, format: str, *args: object) -> None:
        """Keep quiet: tests look at `Hub.requests` instead."""

    def do_HEAD(self) -> None:
        self.answer()

    def do_GET(self) -> None:
        self.answer()

    def do_POST(self) -> None:
        self.answer()

    def do_PUT(self) -> None:
        self.answer()

    def answer(self) -> None:
        hub: Hub = self.server.hub  # type: ignore[attr-defined]
        body = self.rfile.read(int(self.headers.get("Content-Length", 0)))
        url = urlsplit(self.path)
        path = unquote(url.path)
        hub.requests.append((self.command, path))
        hub.ranges.append(self.headers.get("Range", ""))
        for pattern, status, headers in hub.failures:
            if pattern.search(path):
                return self.reply(status, headers)
        self.fault = hub.fault(self.command, path)
        if self.fault and isinstance(self.fault.how, int):
            status, headers, self.fault = self.fault.how, self.fault.headers, None
            return self.reply(status, headers)

        if self.command != "GET" and (match := WRITES.fullmatch(path)):
            return self.write(match.groupdict(), body)
        if match := LISTING.fullmatch(path):
            owner = parse_qs(url.query).get("author", ["*"])[0]
            found = sorted((hub.root / match["kind"]).glob(f"{owner}/*"))
            names = [folder.relative_to(hub.root / match["kind"]).as_posix() for folder in found]
            return self.reply_with_json([{"id": name} for name in names])
        if not (match := API.fullmatch(path) or RESOLVE.fullmatch(path)):
            return self.reply(404)
        asked = match.groupdict()
        kind, name = asked["kind"] or "models", asked["name"]
        folder = hub.root / kind / name
        if not folder.is_dir():
            # The Hub does not tell strangers apart what is private from what is not there.
            return self.reply(401, {"X-Error-Code": "RepoNotFound"})
        if name in hub.private and not self.may_write():
            return self.reply(401, {"X-Error-Code": "RepoNotFound"})
        repository = Repository(folder)
        if (asked["revision"] or "main") not in ("main", repository.commit):
            return self.reply(404, {"X-Error-Code": "RevisionNotFound"})
        if match.re is RESOLVE:
            return self.reply_with_file(repository, asked["path"])
        if asked["what"] in (None, "revision"):
            private = {"private": name in hub.private}
            return self.reply_with_json(repository.info(kind, name) | private)

        # A listing is asked for in the query, paths-info in a form.
        form = parse_qs(body.decode()) or parse_qs(url.query)
        recursive, expand = ("true" in map(str.lower, form.get(flag, [])) for flag in FLAGS)
        inner = (asked["path"] or "").strip("/")
        entries = repository.below(inner, recursive=recursive or asked["what"] == "paths-info")
        if inner and not entries:
            return self.reply(404, {"X-Error-Code": "EntryNotFound"})
        if asked["what"] == "paths-info":
            entries = [entry for entry in entries if entry in form.get("paths", [])]
        self.reply_with_json([repository.entry(entry, expand=expand) for entry in entries])

    def may_write(self) -> bool:
        token: str | None = self.server.hub.token  # type: ignore[attr-defined]
        return token is not None and self.headers.get("Authorization") == f"Bearer {token}"

    def write(self, asked: dict[str, str | None], body: bytes) -> None:
        """Answer a request that changes something, or prepares a change."""
        hub: Hub = self.server.hub  # type: ignore[attr-defined]
        if asked["blob"]:  # by an address that only whoever may write was told
            if hashlib.sha256(body).hexdigest() != asked["blob"]:
                return self.reply(400)
            hub.blobs[asked["blob"]] = body
            return self.reply(200)
        if not self.may_write():
            return self.reply(401)
        lines = [json.loads(line) for line in body.splitlines() if line.strip()]
        if asked["check"]:
            return self.reply_with_json({"errors": [], "warnings": []})
        if asked["create"]:
            name = f"{lines[0]['organization']}/{lines[0]['name']}"
            (hub.root / "models" / name).mkdir(parents=True, exist_ok=True)
            hub.private |= {name} if lines[0].get("visibility") == "private" else set()
            return self.reply_with_json({"url": f"{hub.endpoint}/{name}", "name": name})
        if asked["lfs"]:
            objects = [{"oid": o["oid"], "size": o["size"]} for o in lines[0]["objects"]]
            for each in objects:
                if each["oid"] not in hub.blobs:
                    to = f"{hub.endpoint}/lfs/{each['oid']}"
                    each["actions"] = {"upload": {"href": to, "header": {}}}
            return self.reply_with_json({"transfer": "basic", "objects": objects})
        name, what = str(asked["name"]), asked["what"]
        folder = hub.root / "models" / name
        if what == "settings":
            hub.private -= {name} if lines[0].get("visibility") == "public" else set()
            return self.reply_with_json({})
        if what == "preupload/main":
            large = {
                p: Path(p).suffix in LARGE_FILES for p in (f["path"] for f in lines[0]["files"])
            }
            told = [
                {"path": p, "uploadMode": "lfs" if is_large else "regular", "shouldIgnore": False}
                for p, is_large in large.items()
            ]
            return self.reply_with_json({"files": told})
        for line in lines:
            value = line["value"]
            file = folder / value.get("path", "")
            if line["key"] == "deletedFile":
                file.unlink()
            elif line["key"] in ("file", "lfsFile"):
                file.parent.mkdir(parents=True, exist_ok=True)
                small = line["key"] == "file"
                content = b64decode(value["content"]) if small else hub.blobs[value["oid"]]
                file.write_bytes(content)
        commit = Repository(folder).commit
        url = f"{hub.endpoint}/{name}/commit/{commit}"
        self.reply_with_json({"success": True, "commitOid": commit, "commitUrl": url})

    def reply_with_file(self, repository: Repository, path: str) -> None:
        commit = {"X-Repo-Commit": repository.commit}
        if path not in repository.files:
            return self.reply(404, commit | {"X-Error-Code": "EntryNotFound"})
        content = repository.files[path]
        headers = commit | {"ETag": f'"{repository.etag(path)}"', "Accept-Ranges": "bytes"}
        if not (span := re.fullmatch(r"bytes=(\d+)-(\d*)", self.headers.get("Range", ""))):
            return self.reply(200, headers, content)
        start, end = int(span[1]), min(int(span[2] or len(content)), len(content) - 1)
        if start > end:
            return self.reply(416, {"Content-Range": f"bytes */{len(content)}"})
        headers["Content-Range"] = f"bytes {start}-{end}/{len(content)}"
        self.reply(206, headers, content[start : end + 1])

    def reply_with_json(self, answer: object) -> None:
        self.reply(200, {"Content-Type": "application/json"}, json.dumps(answer).encode())

    def reply(self, status: int, headers: dict[str, str] | None = None, body: bytes = b"") -> None:
        if status >= 400 and not body:
            body = json.dumps({"error": HTTPStatus(status).phrase}).encode()
        how = self.fault.how if self.fault else ""
        closing: threading.Event = self.server.hub.closing  # type: ignore[attr-defined]
        length, middle = len(body), len(body) // 2
        if how in ("silent", "longer", "stall", "trickle", "cut"):
            self.close_connection = True
        if how == "silent":
            closing.wait()
            return
        if how == "page":
            body = b"<html><body>Please log in to this network.</body></html>"
            headers, length = {"Content-Type": "text/html"}, len(body)
        if how == "flip" and body:
            at = middle if self.fault is None or self.fault.at is None else self.fault.at
            body = body[:at] + bytes([body[at] ^ 1]) + body[at + 1 :]
        if how == "shorter":
            body, length = body[:middle], middle
        if how == "longer":
            length += 1000
        if how == "etag":
            headers = (headers or {}) | {"ETag": '"' + "0a" * 32 + '"'}
        self.send_response(status)
        for key, value in (headers or {}).items():
            self.send_header(key, value)
        self.send_header("Content-Length", str(length))
        self.end_headers()
        if self.command == "HEAD":
            return
        if how in ("stall", "cut"):
            body = body[:middle]
        if how == "trickle":
            for position in range(length):
                if closing.wait(0.2):
                    return
                with suppress(OSError):  # the client has given up
                    self.wfile.write(body[position : position + 1])
            return
        self.wfile.write(body)
        if how == "stall":
            self.wfile.flush()
            closing.wait()
