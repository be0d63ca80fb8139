"""A small server that speaks the hub's upload protocol as far as one commit needs it; it keeps what it is sent.

Endpoints as huggingface_hub calls them: validate-yaml, repos/create, preupload, LFS batch, the upload itself, commit.
"""

from __future__ import annotations

import base64
import json
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

TOKEN = "hf_" + "testtoken" * 3


@dataclass
class Hub:
    """What was sent; `refuse` makes the server answer every creation of a repository with this status."""

    url: str = ""
    created: dict[str, Any] = field(default_factory=dict)
    blobs: dict[str, bytes] = field(default_factory=dict)  # by sha256
    files: dict[str, bytes] = field(default_factory=dict)  # of the last commit
    summary: str = ""
    commits: list[tuple[str, set[str]]] = field(default_factory=list)  # summary and names, in order
    tokens: set[str] = field(default_factory=set)
    refuse: int = 0


def _handler(hub: Hub) -> type[BaseHTTPRequestHandler]:
    class Handler(BaseHTTPRequestHandler):
        protocol_version = "HTTP/1.1"

        def log_message(self, *_: Any) -> None:
            pass

        def _body(self) -> bytes:
            if self.headers.get("Transfer-Encoding") == "chunked":
                parts = []
                while size := int(self.rfile.readline(), 16):
                    parts.append(self.rfile.read(size))
                    self.rfile.readline()
                self.rfile.readline()
                return b"".join(parts)
            return self.rfile.read(int(self.headers.get("Content-Length", 0)))

        def _answer(self, data: Any, status: int = 200) -> None:
            content = json.dumps(data).encode()
            self.send_response(status)
            self.send_header("Content-Type", "application/json")
            self.send_header("Content-Length", str(len(content)))
            self.end_headers()
            self.wfile.write(content)

        def do_PUT(self) -> None:
            hub.blobs[self.path.removeprefix("/upload/")] = self._body()
            self._answer({})

        def do_POST(self) -> None:
            body = self._body()
            path = self.path.partition("?")[0]
            hub.tokens.add(self.headers.get("Authorization", ""))
            if path == "/api/validate-yaml":
                ok = json.loads(body)["content"].startswith("---\n")
                self._answer({"errors": [] if ok else [{"message": "no metadata"}], "warnings": []}, 200 if ok else 400)
            elif path == "/api/repos/create":
                if hub.refuse:
                    self._answer({"error": "You don't have the rights"}, hub.refuse)
                    return
                hub.created = json.loads(body)
                self._answer({"url": f"{hub.url}/{hub.created.get('organization', 'me')}/{hub.created['name']}"})
            elif "/preupload/" in path:
                files = json.loads(body)["files"]
                self._answer({"files": [
                    {"path": each["path"], "shouldIgnore": False, "oid": None,
                     "uploadMode": "lfs" if each["path"].endswith(".safetensors") else "regular"} for each in files
                ]})  # fmt: skip
            elif path.endswith("/info/lfs/objects/batch"):
                objects = json.loads(body)["objects"]
                self._answer({"transfer": "basic", "objects": [
                    {**each, "actions": {"upload": {"href": f"{hub.url}/upload/{each['oid']}"}}} for each in objects
                ]})  # fmt: skip
            elif "/commit/" in path:
                hub.files = {}
                for line in body.decode().splitlines():
                    item = json.loads(line)
                    value = item["value"]
                    if item["key"] == "header":
                        hub.summary = value["summary"]
                    elif item["key"] == "file":
                        hub.files[value["path"]] = base64.b64decode(value["content"])
                    elif item["key"] == "lfsFile":
                        hub.files[value["path"]] = hub.blobs[value["oid"]]
                hub.commits.append((hub.summary, set(hub.files)))
                self._answer(
                    {"commitUrl": f"{hub.url}/me/demo/commit/abc", "commitOid": "0" * 40, "pullRequestUrl": None}
                )
            else:
                self._answer({"error": f"unknown {path}"}, 404)

        def do_GET(self) -> None:
            self._answer({"error": f"unknown {self.path}"}, 404)

    return Handler


@contextmanager
def serve_hub() -> Iterator[Hub]:
    """Run the server on a free port of this machine."""
    hub = Hub()
    server = ThreadingHTTPServer(("127.0.0.1", 0), _handler(hub))
    hub.url = f"http://127.0.0.1:{server.server_address[1]}"
    thread = threading.Thread(target=server.serve_forever, daemon=True)
    thread.start()
    try:
        yield hub
    finally:
        server.shutdown()
        server.server_close()
        thread.join()
