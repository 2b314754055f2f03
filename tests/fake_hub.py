"""As much of the hub's HTTP interface as huggingface_hub needs to make repositories and commit."""

import base64
import json
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any


class FakeHub:
    """What was asked of the server and what it keeps.

    ``repositories`` maps ``type/org/name`` to its visibility and its files; while ``broken`` is
    set, commits are refused with that status.
    """

    def __init__(self, address: str):
        self.address = address
        self.repositories: dict[str, dict[str, Any]] = {}
        self.requests: list[str] = []
        self.tokens: set[str] = set()
        self.broken = 0

    def create(self, body: dict[str, Any]) -> tuple[int, dict[str, Any]]:
        kind = body.get("type", "model")
        name = f"{kind}/{body['organization']}/{body['name']}"
        answer = {"url": self._page(name)}
        if name in self.repositories:
            return 409, answer
        self.repositories[name] = {"visibility": body.get("visibility"), "files": {}, "commits": 0}
        return 200, answer

    def commit(self, name: str, lines: bytes) -> tuple[int, dict[str, Any]]:
        if self.broken:
            return self.broken, {"error": "the server is on fire"}
        repository = self.repositories[name]
        for line in lines.splitlines():
            item = json.loads(line)
            if item["key"] == "file":
                content = base64.b64decode(item["value"]["content"])
                repository["files"][item["value"]["path"]] = content
        repository["commits"] += 1
        oid = f"{repository['commits']:040x}"
        return 200, {"commitUrl": f"{self._page(name)}/commit/{oid}", "commitOid": oid}

    def _page(self, name: str) -> str:
        kind, _, rest = name.partition("/")
        return f"{self.address}/{rest}" if kind == "model" else f"{self.address}/{kind}s/{rest}"


@contextmanager
def fake_hub() -> Iterator[FakeHub]:
    """A server on a free port of this machine."""

    class Handler(BaseHTTPRequestHandler):
        def do_POST(self) -> None:
            body = self.rfile.read(int(self.headers.get("Content-Length", 0)))
            path = self.path.split("?")[0]
            hub.requests.append(path)
            hub.tokens.add(self.headers.get("Authorization", ""))
            parts = path.strip("/").split("/")
            if path == "/api/repos/create":
                status, answer = hub.create(json.loads(body))
            elif path == "/api/validate-yaml":
                status, answer = 200, {"errors": [], "warnings": []}
            elif parts[-2:-1] == ["preupload"]:
                names = [file["path"] for file in json.loads(body)["files"]]
                modes = [{"path": n, "uploadMode": "regular", "shouldIgnore": False} for n in names]
                status, answer = 200, {"files": modes}
            elif parts[-2:-1] == ["commit"]:
                status, answer = hub.commit("/".join([parts[1][:-1], *parts[2:4]]), body)
            else:
                status, answer = 404, {"error": f"no {path}"}
            self._answer(status, answer)

        def do_GET(self) -> None:
            hub.requests.append(self.path)
            self._answer(404, {"error": f"no {self.path}"})

        def _answer(self, status: int, answer: dict[str, Any]) -> None:
            content = json.dumps(answer).encode()
            self.send_response(status)
            self.send_header("Content-Type", "application/json")
            self.send_header("Content-Length", str(len(content)))
            self.end_headers()
            self.wfile.write(content)

        def log_message(self, *arguments: object) -> None:
            pass

    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    hub = FakeHub(f"http://127.0.0.1:{server.server_port}")
    thread = threading.Thread(target=server.serve_forever)
    thread.start()
    try:
        yield hub
    finally:
        server.shutdown()
        server.server_close()
        thread.join()
