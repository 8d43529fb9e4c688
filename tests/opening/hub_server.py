"""A hub on this machine: the part of its HTTP interface that huggingface_hub needs to push and to download."""

from __future__ import annotations

import base64
import hashlib
import json
import re
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any
from urllib.parse import unquote, urlparse


@dataclass
class Hub:
    """Repositories by name, each a list of commits (hash, files); every request is recorded.

    Attributes:
        address: ``http://127.0.0.1:<port>``.
        refuses: answer every request so: status and error code; None to answer.
        storage: whether files are redirected to another host, as large ones are.
        xet: whether files are offered through Xet's storage, which is not there.
    """

    address: str = ""
    repositories: dict[str, list[tuple[str, dict[str, bytes]]]] = field(default_factory=dict)
    large: dict[str, bytes] = field(default_factory=dict)
    requests: list[str] = field(default_factory=list)
    refuses: tuple[int, str] | None = None
    storage: bool = False
    xet: bool = False

    def commit(self, name: str, files: dict[str, bytes]) -> str:
        commits = self.repositories.setdefault(name, [])
        kept = {**(commits[-1][1] if commits else {}), **files}
        digest = hashlib.sha1(repr((len(commits), sorted(kept.items()))).encode()).hexdigest()
        commits.append((digest, kept))
        return digest

    def at(self, name: str, revision: str) -> tuple[str, dict[str, bytes]] | None:
        commits = self.repositories.get(name, [])
        return commits[-1] if commits and revision == "main" else next((c for c in commits if c[0] == revision), None)


def _handler(hub: Hub) -> type[BaseHTTPRequestHandler]:
    class Handler(BaseHTTPRequestHandler):
        protocol_version = "HTTP/1.1"

        def log_message(self, *_: Any) -> None:
            pass

        def answer(self, value: Any, code: int = 200, **headers: str) -> None:
            body = value if isinstance(value, bytes) else json.dumps(value).encode()
            self.send_response(code)
            for name, each in headers.items():
                self.send_header(name.replace("_", "-"), each)
            self.send_header("Content-Length", str(len(body)))
            self.end_headers()
            if self.command != "HEAD":
                self.wfile.write(body)

        def missing(self, what: str) -> None:
            self.answer({"error": what}, 404, X_Error_Code=what, X_Error_Message=what)

        def body(self) -> bytes:
            return self.rfile.read(int(self.headers.get("Content-Length") or 0))

        def do_HEAD(self) -> None:
            self.do_GET()

        def do_GET(self) -> None:
            path = unquote(urlparse(self.path).path)
            hub.requests.append(f"{self.command} {path}")
            if hub.refuses is not None:
                code, error = hub.refuses
                self.answer({"error": "denied"}, code, X_Error_Code=error, X_Error_Message="not for everybody")
            elif path.startswith("/large/"):
                self.answer(hub.large[path.rpartition("/")[2]])
            elif match := re.fullmatch(r"/api/models/([^/]+/[^/]+)(?:/(revision|tree)/([^/]+))?", path):
                name, kind, revision = match.groups()
                self.describe(name, kind, revision or "main")
            elif match := re.fullmatch(r"/([^/]+/[^/]+)/resolve/([^/]+)/(.+)", path):
                self.file(*match.groups())
            else:
                self.missing("EntryNotFound")

        def describe(self, name: str, kind: str | None, revision: str) -> None:
            found = hub.at(name, revision)
            if found is None:
                self.missing("RevisionNotFound" if name in hub.repositories else "RepoNotFound")
                return
            digest, files = found
            if kind == "tree":
                self.answer([{"type": "file", "path": path, "size": len(data), "oid": _oid(data)}
                             for path, data in files.items()])  # fmt: skip
                return
            self.answer({"id": name, "sha": digest, "siblings": [{"rfilename": path} for path in files]})

        def file(self, name: str, revision: str, path: str) -> None:
            found = hub.at(name, revision)
            if found is None or path not in found[1]:
                self.missing("RepoNotFound" if found is None else "EntryNotFound")
                return
            content, headers = found[1][path], {"X_Repo_Commit": found[0]}
            if hub.xet:
                headers |= {"X_Xet_Hash": "a" * 64, "Link": f'<{hub.address}/xet-read-token>; rel="xet-auth"'}
            if hub.storage:
                digest = hashlib.sha256(content).hexdigest()
                hub.large[digest] = content
                there = f"{hub.address.replace('127.0.0.1', 'localhost')}/large/{digest}"
                size = str(len(content))
                self.answer(b"", 302, **headers, Location=there, X_Linked_ETag=f'"{digest}"', X_Linked_Size=size)
                return
            self.answer(content, **headers, ETag=f'"{_oid(content)}"')

        def do_POST(self) -> None:
            path, body = unquote(urlparse(self.path).path), self.body()
            hub.requests.append(f"POST {path}")
            if path == "/api/validate-yaml":
                self.answer({"errors": [], "warnings": []})
            elif path == "/api/repos/create":
                asked = json.loads(body)
                name = "/".join(filter(None, (asked.get("organization"), asked["name"])))
                hub.repositories.setdefault(name, [])
                self.answer({"url": f"{hub.address}/{name}", "id": name})
            elif path.endswith("/info/lfs/objects/batch"):
                self.answer(
                    {"transfer": "basic", "objects": [self.upload(each) for each in json.loads(body)["objects"]]}
                )
            elif match := re.fullmatch(r"/api/models/([^/]+/[^/]+)/(preupload|commit)/([^/]+)", path):
                getattr(self, match[2])(match[1], body)
            else:
                self.missing("EntryNotFound")

        def upload(self, asked: dict[str, Any]) -> dict[str, Any]:
            return {**asked, "actions": {"upload": {"href": f"{hub.address}/large/{asked['oid']}"}}}

        def do_PUT(self) -> None:
            hub.requests.append(f"PUT {self.path}")
            hub.large[self.path.rpartition("/")[2]] = self.body()
            self.answer({})

        def preupload(self, name: str, body: bytes) -> None:
            """What is not text goes to large storage, as on the hub."""
            self.answer({"files": [{"path": each["path"], "shouldIgnore": False,
                                    "uploadMode": "regular" if each["path"].endswith(".md") else "lfs"}
                                   for each in json.loads(body)["files"]]})  # fmt: skip

        def commit(self, name: str, body: bytes) -> None:
            files = {}
            for line in map(json.loads, body.splitlines()):
                value = line["value"]
                if line["key"] == "file":
                    files[value["path"]] = base64.b64decode(value["content"])
                elif line["key"] == "lfsFile":
                    files[value["path"]] = hub.large[value["oid"]]
            digest = hub.commit(name, files)
            self.answer({"commitUrl": f"{hub.address}/{name}/commit/{digest}", "commitOid": digest})

    return Handler


def _oid(data: bytes) -> str:
    """The hash that git gives a file."""
    return hashlib.sha1(b"blob %d\0" % len(data) + data).hexdigest()


@contextmanager
def serving() -> Iterator[Hub]:
    """Run a hub on a free port of the loopback interface."""
    hub = Hub()
    server = ThreadingHTTPServer(("127.0.0.1", 0), _handler(hub))
    hub.address = f"http://127.0.0.1:{server.server_port}"
    # the default of half a second would be waited for at the end of every test
    thread = threading.Thread(target=server.serve_forever, args=(0.01,), daemon=True)
    thread.start()
    try:
        yield hub
    finally:
        server.shutdown()
        server.server_close()
        thread.join()
