"""A judge behind a real address, whose verdicts are a rule of what it is asked."""

import json
import threading
from collections.abc import Callable
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any


class JudgeServer:
    """Answers chat completions with ``text(content)`` of the last message, without log-probs.

    ``refuses`` are fields of a request that it answers with status 400. ``asked`` holds the
    requests' bodies.
    """

    def __init__(self, text: Callable[[str], str], refuses: tuple[str, ...] = ()):
        self.asked: list[dict[str, Any]] = []
        judge = self

        class Handler(BaseHTTPRequestHandler):
            protocol_version = "HTTP/1.1"

            def do_POST(self) -> None:
                body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
                judge.asked.append(body)
                refused = [name for name in refuses if name in body]
                message = {"role": "assistant", "content": text(body["messages"][-1]["content"])}
                answer = {
                    "choices": [{"message": message, "finish_reason": "stop", "logprobs": None}],
                    "usage": {"prompt_tokens": 10, "completion_tokens": 1},
                }
                if refused:
                    answer = {"error": {"message": f"no {', '.join(refused)} here"}}
                content = json.dumps(answer).encode()
                self.send_response(400 if refused else 200)
                self.send_header("Content-Type", "application/json")
                self.send_header("Content-Length", str(len(content)))
                self.end_headers()
                self.wfile.write(content)

            def log_message(self, *about: Any) -> None:
                pass

        self.server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self.server.daemon_threads = True
        self.url = f"http://127.0.0.1:{self.server.server_port}/v1"
        threading.Thread(target=self.server.serve_forever, daemon=True).start()

    def close(self) -> None:
        self.server.shutdown()
        self.server.server_close()
