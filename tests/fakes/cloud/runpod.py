"""RunPod on the loopback interface."""

from __future__ import annotations

import itertools
import json
import shlex
import threading
from collections.abc import Iterable
from typing import Any
from urllib.parse import unquote

from tests.fakes.cloud.platform import Platform
from tests.fakes.hub.server import Call, HubError, Reply, as_json


def problem(status: int, title: str, detail: str, **more: Any) -> HubError:
    """Return an error in RunPod's format (RFC 9457)."""
    error = HubError(status, title)
    error.body = {"title": title, "status": status, "detail": detail, **more}
    return error


class RunPodServer(Platform):
    """RunPod, version 2: pods, catalogue, logs as server-sent events on a stream that stays open."""

    def __init__(self) -> None:
        super().__init__()
        self.pods: dict[str, dict[str, Any]] = {}
        self.gpus: list[dict[str, Any]] = []
        self.log_lines: list[str] = ["trial 1: done"]
        self.new: set[str] = set()  # rented through the API
        self.ended: set[str] = set()  # ended, but still listed
        self.chatter = False  # whether the log never ends
        self._numbers = itertools.count(1)

    def denied(self) -> HubError:
        return problem(401, "Unauthorized", "invalid bearer token")

    def add_pod(self, id: str, **pod: Any) -> dict[str, Any]:
        gpu = {"id": "NVIDIA H200", "count": 1, "vcpuCount": 16, "memory": 188}
        self.pods[id] = {"id": id, "name": "pod", "status": "RUNNING", "cost": 3.59, "gpu": gpu, **pod}
        return self.pods[id]

    def add_gpu(self, id: str, memory: int, secure: float, community: float, **row: Any) -> None:
        self.gpus.append(
            {
                "id": id,
                "name": id.removeprefix("NVIDIA "),
                "pool": None,
                "manufacturer": "NVIDIA",
                "memory": memory,
                "secure": True,
                "community": True,
                "price": {"secure": secure, "community": community},
                "maxCount": {"secure": 8, "community": 4},
                "availability": "HIGH",
                **row,
            }
        )

    def answer(self, call: Call, body: Any) -> Reply:
        match [part for part in unquote(call.path).split("/") if part]:
            case ["v2", "catalog", "gpus"]:
                assert call.option("include") == "AVAILABILITY"
                assert call.option("product") == "POD"
                return as_json({"gpus": self.gpus})
            case ["v2", "pods"]:
                return as_json({"pods": self._listed()}) if call.method == "GET" else self._create(body)
            case ["v2", "pods", id, *rest] if id in self.pods:
                return self._pod(call.method, id, rest, body)
        raise problem(404, "Not Found", "resource not found")

    def _listed(self) -> list[dict[str, Any]]:
        lagging = self.new if self.lags("list_lag") else set()
        return [self._shown(pod) for id, pod in self.pods.items() if id not in lagging]

    def _shown(self, pod: dict[str, Any]) -> dict[str, Any]:
        return {key: value for key, value in pod.items() if key != "env" or not self.hide_env}

    def _create(self, body: dict[str, Any]) -> Reply:
        unknown = body.keys() - {"name", "image", "args", "disk", "env", "cloud", "gpu", "mounts"}
        if unknown or len(body["mounts"]) != 1 or not isinstance(shlex.split(body["args"]), list):
            raise problem(422, "Unprocessable Entity", "Request validation failed.", errors=sorted(unknown))
        if body["gpu"]["id"] not in [gpu["id"] for gpu in self.gpus if gpu["availability"] != "NONE"]:
            detail = "There are no longer any instances available with the requested specifications."
            raise problem(400, "Bad Request", detail)
        name = self.relabel(body["name"]) if self.relabel is not None else body["name"]
        told = {key: body[key] for key in ("image", "env")}
        pod = self.add_pod(f"pod{next(self._numbers)}", name=name, status="PROVISIONING", **told)
        self.new.add(pod["id"])
        return as_json(self._shown(pod), 201)

    def _pod(self, method: str, id: str, rest: Iterable[str], body: Any) -> Reply:
        match [method, *rest]:
            case ["GET"]:
                if id in self.new and self.lags("get_lag"):
                    raise problem(404, "Not Found", "resource not found")
                pod = self._shown(self.pods[id])
                if id in self.ended and not self.lags("linger"):
                    del self.pods[id]
                return as_json(pod)
            case ["DELETE"]:
                if self.linger:
                    self.ended.add(id)
                else:
                    del self.pods[id]
                return Reply(204)
            case ["POST", "action"]:
                if body["action"] == "stop" and self.pods[id]["status"] == "EXITED":
                    raise problem(409, "Conflict", "not valid for EXITED")
                assert body["action"] == "stop"
                self.pods[id].update(status="EXITED", cost=0.0)
                return as_json(self.pods[id])
            case ["GET", "logs"]:
                return self._stream()
        raise problem(404, "Not Found", "resource not found")

    def _stream(self) -> Reply:
        return OpenStream(b"".join(map(event, self.log_lines)), self.closing, event("again") if self.chatter else b"")


def event(line: str) -> bytes:
    data = json.dumps({"ts": "2026-11-01T12:00:00Z", "source": "container", "line": line})
    return f"id: 2026-11-01T12:00:00Z/1\ndata: {data}\n\n".encode()


class OpenStream(Reply):
    """Events, then silence on an open connection, or the same event for ever."""

    def __init__(self, events: bytes, closing: threading.Event, again: bytes) -> None:
        super().__init__(200, {"Content-Type": "text/event-stream"})
        self._events, self._closing, self._again = events, closing, again

    @property
    def size(self) -> int:
        return 1 << 30  # more than ever comes

    def chunks(self) -> Any:
        yield self._events
        while not self._closing.wait(0.05 if self._again else 30):
            yield self._again
        raise ConnectionAbortedError("the stream ends with the server")
