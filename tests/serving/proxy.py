"""A proxy in front of a real server, which does to its answers what networks and servers do."""

import json
import threading
from collections.abc import Callable
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

import httpx


class Proxy:
    """Passes every request on to ``target()``; ``faults`` names what happens to completions.

    Each request for a completion takes the next fault: ``""`` none, a number such as ``429`` that
    status, ``html`` a page in place of JSON, ``short`` one choice too few, ``drop`` the connection
    closed without an answer, ``hang`` no answer before the proxy is closed. ``always`` is what
    happens once they are used up. ``asked`` holds the requests' bodies.
    """

    def __init__(self, target: Callable[[], str]):
        self.target, self.faults, self.always = target, list[str](), ""
        self.asked: list[dict[str, Any]] = []
        self.closed = threading.Event()
        self._lock = threading.Lock()
        proxy = self

        class Handler(BaseHTTPRequestHandler):
            protocol_version = "HTTP/1.1"

            def do_GET(self) -> None:
                proxy.pass_on(self, b"")

            def do_POST(self) -> None:
                body = self.rfile.read(int(self.headers["Content-Length"]))
                fault = proxy.next_fault(body) if self.path.endswith("/completions") else ""
                if fault in ("drop", "hang"):
                    if fault == "hang":
                        proxy.closed.wait()
                    self.close_connection = True
                elif fault.isdigit():
                    proxy.answer(self, int(fault), b'{"error": {"message": "later, please"}}')
                elif fault == "html":
                    proxy.answer(self, 200, b"<html>busy</html>")
                else:
                    proxy.pass_on(self, body, short=fault == "short")

            def log_message(self, *about: Any) -> None:
                pass

        self.server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self.server.daemon_threads = True
        self.url = f"http://127.0.0.1:{self.server.server_port}"
        threading.Thread(target=self.server.serve_forever, daemon=True).start()

    def next_fault(self, body: bytes) -> str:
        with self._lock:
            self.asked.append(json.loads(body))
            return self.faults.pop(0) if self.faults else self.always

    def pass_on(self, handler: Any, body: bytes, short: bool = False) -> None:
        headers = {
            name: value
            for name, value in handler.headers.items()
            if name.lower() in ("authorization", "content-type")
        }
        try:
            found = httpx.request(
                handler.command, self.target() + handler.path, content=body, headers=headers,
                timeout=600,
            )  # fmt: skip
        except httpx.TransportError:
            handler.close_connection = True
            return
        content = found.content
        if short:
            values = found.json()
            content = json.dumps({**values, "choices": values["choices"][:-1]}).encode()
        self.answer(handler, found.status_code, content)

    def answer(self, handler: Any, status: int, content: bytes) -> None:
        try:
            handler.send_response(status)
            handler.send_header("Content-Type", "application/json")
            handler.send_header("Content-Length", str(len(content)))
            if status == 429:
                handler.send_header("Retry-After", "0.2")
            handler.end_headers()
            handler.wfile.write(content)
        except OSError:
            handler.close_connection = True  # whoever asked has gone

    def close(self) -> None:
        self.closed.set()
        self.server.shutdown()
        self.server.server_close()
