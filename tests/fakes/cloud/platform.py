"""Shared by the servers of all platforms: requests, faults and keys."""

from __future__ import annotations

import itertools
import threading
from collections.abc import Callable
from typing import Any, Self
from urllib.parse import unquote

from tests.fakes.hub.faults import Faults, Request, Rule
from tests.fakes.hub.server import Call, HubError, Reply, Server

KEY = "platform-key-0123456789"


class Platform:
    """A server with a request log and injected faults."""

    def __init__(self) -> None:
        self.closing = threading.Event()
        self.faults = Faults()
        self.errors: list[str] = []
        self.requests: list[Request] = []
        self.bodies: list[Any] = []
        self.keys = {KEY}
        # How the platform lags and loses data.
        self.list_lag = 0  # lists that do not yet show new instances
        self.get_lag = 0  # answers of "no such instance" for a new one
        self.linger = 0  # answers that still show an ended instance
        self.hide_env = False  # whether instances are shown without their variables
        self.relabel: Callable[[str], str] | None = None  # changes labels
        self._ids = itertools.count(1)
        self._server = Server(self, self._answer)  # type: ignore[arg-type]  # all that it uses of a hub is here

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.closing.set()
        self._server.close()
        assert self.errors == []

    @property
    def url(self) -> str:
        return f"http://{self._server.netloc}"

    @property
    def port(self) -> int:
        return int(self._server.netloc.rpartition(":")[2])

    def fail(self, method: str = "*", glob: str = "*", **rule: Any) -> Rule:
        """Answer with an error instead."""
        return self.faults.add(Rule("fail", method, glob, rule.pop("times", None), **rule))

    def say(self, method: str, glob: str, body: str, *, status: int = 200) -> Rule:
        """Answer with this text and do nothing, as a broken or hostile platform."""
        return self.faults.add(Rule("say", method, glob, None, status=status, message=body))

    def drop(self, method: str = "*", glob: str = "*", times: int = 1) -> Rule:
        """Carry out the request, then cut the connection instead of answering."""
        return self.faults.add(Rule("drop", method, glob, times))

    def undo(self, method: str = "*", glob: str = "*", times: int | None = 1, status: int = 500) -> Rule:
        """Carry out the request, but answer with an error."""
        return self.faults.add(Rule("undo", method, glob, times, status=status))

    def asked(self, method: str, part: str = "") -> list[Request]:
        return [request for request in self.requests if request.method == method and part in request.path]

    def lags(self, name: str) -> bool:
        """Count down the stale answers of this kind; return whether this one is stale."""
        left = getattr(self, name)
        setattr(self, name, max(left - 1, 0))
        return bool(left)

    # The server's interface to a hub

    def log(self, request: Request) -> None:
        self.requests.append(request)

    def is_stray(self, host: str) -> bool:
        return not host.startswith("127.0.0.1")

    def next_request_id(self) -> str:
        return f"request-{next(self._ids)}"

    def _answer(self, call: Call) -> Reply:
        if self.is_public(call.path):
            return self.answer(call, None)
        if call.headers.get("authorization", "").removeprefix("Bearer ") not in self.keys:
            raise self.denied()
        body = call.json() if call.method in ("POST", "PUT", "DELETE") else None
        self.bodies.append(body)
        request = Request(call.method, unquote(call.path), "", "", authorized=True, headers={})
        if (fault := self.faults.take("say", request)) is not None:
            return Reply(fault.status, {"Content-Type": "application/json"}, fault.message.encode())
        reply = self.answer(call, body)
        if (fault := self.faults.take("undo", request)) is not None:
            return Reply(fault.status, {"Content-Type": "application/json"}, b'{"error": "after the deed"}')
        return reply

    def is_public(self, path: str) -> bool:
        return False

    def denied(self) -> HubError:
        return HubError(401, "denied")

    def answer(self, call: Call, body: Any) -> Reply:
        raise NotImplementedError
