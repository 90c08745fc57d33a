"""The YAML language server that editors start, spoken to as an editor does."""

import json
import os
import subprocess
from collections.abc import Mapping
from pathlib import Path
from types import TracebackType
from typing import Any

#: The package and version that npm fetches.
PACKAGE = "yaml-language-server@1.25.0"
Json = Any


class LanguageServer:
    """A running server; diagnostics, completions and hover texts of a text at a path.

    Args:
        command: starts it; it talks over its standard streams.
        settings: as in an editor's settings, below ``yaml``.
        folder: that is open in the editor.
    """

    def __init__(self, command: list[str], settings: Mapping[str, Json], folder: Path):
        self._settings, self._folder, self._asked, self._version = settings, folder, 0, 0
        self._process = subprocess.Popen(
            command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL
        )
        self._found: dict[str, list[Json]] = {}

    def __enter__(self) -> "LanguageServer":
        root = {"uri": self._folder.as_uri(), "name": self._folder.name}
        able = {
            "textDocument": {
                "hover": {"contentFormat": ["markdown"]},
                "completion": {"completionItem": {"documentationFormat": ["markdown"]}},
            },
            "workspace": {"configuration": True, "workspaceFolders": True},
        }
        about = {
            "processId": os.getpid(),
            "rootUri": root["uri"],
            "workspaceFolders": [root],
            "capabilities": able,
        }
        self._ask("initialize", about)
        self._tell("initialized", {})
        self._tell("workspace/didChangeConfiguration", {"settings": {"yaml": self._settings}})
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        self._process.terminate()
        self._process.wait()
        for stream in (self._process.stdin, self._process.stdout):
            assert stream is not None
            stream.close()

    def diagnostics(self, texts: Mapping[Path, str]) -> dict[Path, list[tuple[int, str]]]:
        """Return the line, counted from 1, and the message of each that is wrong, by file."""
        for path, text in texts.items():
            self._open(path, text)
        while not self._found.keys() >= {path.as_uri() for path in texts}:
            self._take()
        return {
            path: sorted(
                (each["range"]["start"]["line"] + 1, each["message"])
                for each in self._found[path.as_uri()]
            )
            for path in texts
        }

    def completions(self, path: Path, text: str) -> list[Json]:
        """Return what is offered where ``text`` has a ``|``."""
        answer = self._ask("textDocument/completion", self._at(path, text))
        return answer["items"] if isinstance(answer, dict) else answer or []

    def hover(self, path: Path, text: str) -> str:
        """Return what is shown of the word where ``text`` has a ``|``."""
        answer = self._ask("textDocument/hover", self._at(path, text))
        return "" if answer is None else answer["contents"]["value"]

    def _at(self, path: Path, text: str) -> Json:
        before, _, after = text.partition("|")
        self._open(path, before + after)
        line, column = before.count("\n"), len(before.rpartition("\n")[2])
        return {
            "textDocument": {"uri": path.as_uri()},
            "position": {"line": line, "character": column},
        }

    def _open(self, path: Path, text: str) -> None:
        self._version += 1
        self._found.pop(path.as_uri(), None)
        item = {"uri": path.as_uri(), "languageId": "yaml", "version": self._version, "text": text}
        self._tell("textDocument/didOpen", {"textDocument": item})

    def _ask(self, method: str, about: Json) -> Json:
        self._asked += 1
        number = self._asked
        self._send({"id": number, "method": method, "params": about})
        while True:
            answer = self._take()
            if answer.get("id") == number and "method" not in answer:
                assert "error" not in answer, answer["error"]
                return answer["result"]

    def _tell(self, method: str, about: Json) -> None:
        self._send({"method": method, "params": about})

    def _send(self, content: Json) -> None:
        body = json.dumps({"jsonrpc": "2.0", **content}).encode()
        assert self._process.stdin is not None
        self._process.stdin.write(b"Content-Length: %d\r\n\r\n" % len(body) + body)
        self._process.stdin.flush()

    def _take(self) -> Json:
        """Read one message; answer what the server asks, keep the diagnostics."""
        assert self._process.stdout is not None
        length = 0
        while line := self._process.stdout.readline().strip():
            name, _, value = line.partition(b":")
            length = int(value) if name.lower() == b"content-length" else length
        assert length, "the server has ended"
        message = json.loads(self._process.stdout.read(length))
        if message.get("method") == "textDocument/publishDiagnostics":
            self._found[message["params"]["uri"]] = message["params"]["diagnostics"]
        elif "id" in message and "method" in message:
            result: Json = None
            if message["method"] == "workspace/configuration":
                sections = [item.get("section") for item in message["params"]["items"]]
                result = [self._settings if name == "yaml" else None for name in sections]
            self._send({"id": message["id"], "result": result})
        return message
