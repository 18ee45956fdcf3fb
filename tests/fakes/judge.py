"""A judge model behind an OpenAI-compatible endpoint on loopback."""

from __future__ import annotations

import json
import threading
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any, Self


class Endpoint(ThreadingHTTPServer):
    """Judges responses with "Go away" as 9 of 10; `failures` are answered first."""

    daemon_threads = True

    def __init__(self) -> None:
        super().__init__(("127.0.0.1", 0), _Handler)
        self.asked: list[dict[str, Any]] = []
        self.keys: list[str | None] = []
        self.failures: list[tuple[int, str]] = []
        self.reply = "<think>1 or 2?</think> {number}"

    def __enter__(self) -> Self:
        threading.Thread(target=self.serve_forever, args=(0.01,), daemon=True).start()
        return self

    def __exit__(self, *_: object) -> None:
        self.shutdown()
        self.server_close()

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.server_address[1]}/v1/"


class _Handler(BaseHTTPRequestHandler):
    server: Endpoint

    def do_POST(self) -> None:
        body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
        self.server.asked.append(body)
        self.server.keys.append(self.headers.get("Authorization"))
        status, text = self.server.failures.pop(0) if self.server.failures else (200, "")
        if status == 200 and not text:
            number = 9 if "Go away" in body["messages"][0]["content"] else 0
            said = self.server.reply.format(number=number)
            text = json.dumps({"choices": [{"message": {"role": "assistant", "content": said}}]})
        assert self.path == "/v1/chat/completions"
        self.send_response(status)
        self.end_headers()
        self.wfile.write(text.encode())

    def log_message(self, *_: object) -> None:
        return
