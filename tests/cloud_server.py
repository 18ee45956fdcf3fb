"""Rental platforms on the loopback interface, as their documentation describes them."""

from __future__ import annotations

import itertools
import json
import shlex
import threading
from collections.abc import Iterable
from typing import Any, Self
from urllib.parse import unquote

from tests.hub.faults import Faults, Request, Rule
from tests.hub.server import Call, HubError, Reply, Server, as_json

KEY = "platform-key-0123456789"


def problem(status: int, title: str, detail: str, **more: Any) -> HubError:
    """Return an error of RunPod's form (RFC 9457)."""
    error = HubError(status, title)
    error.body = {"title": title, "status": status, "detail": detail, **more}
    return error


class Platform:
    """A server with requests to look at and faults to ask for."""

    def __init__(self) -> None:
        self.closing = threading.Event()
        self.faults = Faults()
        self.errors: list[str] = []
        self.requests: list[Request] = []
        self.bodies: list[Any] = []
        self.keys = {KEY}
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

    def drop(self, method: str = "*", glob: str = "*", times: int = 1) -> Rule:
        """Do what is asked and cut the connection instead of answering."""
        return self.faults.add(Rule("drop", method, glob, times))

    def asked(self, method: str, part: str = "") -> list[Request]:
        return [request for request in self.requests if request.method == method and part in request.path]

    # What the server wants of a hub

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
        return self.answer(call, body)

    def is_public(self, path: str) -> bool:
        return False

    def denied(self) -> HubError:
        return HubError(401, "denied")

    def answer(self, call: Call, body: Any) -> Reply:
        raise NotImplementedError


class VastServer(Platform):
    """Vast.ai: asks, instances, logs by way of a storage."""

    def __init__(self) -> None:
        super().__init__()
        self.instances: dict[int, dict[str, Any]] = {}
        self.asks: dict[int, dict[str, Any]] = {}
        self.log_text = "trial 1: done\n"
        self.log_delay = 1  # how often the storage says "not yet"
        self._numbers = itertools.count(70001)

    def denied(self) -> HubError:
        return HubError(401, "auth_error", success=False, msg="Invalid user key")

    def add_instance(self, number: int, **row: Any) -> dict[str, Any]:
        self.instances[number] = {
            "id": number,
            "actual_status": "running",
            "cur_state": "running",
            "intended_status": "running",
            "label": None,
            "num_gpus": 1,
            "gpu_name": "RTX 4090",
            "dph_total": 0.4125,
            **row,
        }
        return self.instances[number]

    def add_ask(self, number: int, **row: Any) -> None:
        self.asks[number] = {
            "id": number,
            "gpu_name": "RTX 4090",
            "num_gpus": 4,
            "gpu_ram": 24564,
            "disk_space": 900.0,
            "inet_down": 800.0,
            "inet_up": 400.0,
            "inet_down_cost": 0.002,
            "inet_up_cost": 0.003,
            "reliability": 0.995,
            "cuda_max_good": 13.0,
            "verified": True,
            "external": False,
            "rentable": True,
            "rented": False,
            "dph_total": 1.6,
            "min_bid": 0.8,
            "geolocation": "Norway, NO",
            **row,
        }

    def outbid(self, number: int) -> None:
        self.instances[number].update(actual_status="exited", cur_state="stopped", is_bid=True)

    def is_public(self, path: str) -> bool:
        return path.startswith("/storage/")

    def answer(self, call: Call, body: Any) -> Reply:
        match [part for part in unquote(call.path).split("/") if part]:
            case ["storage", _]:
                assert "authorization" not in call.headers
                return self._stored()
            case ["api", "v0", "bundles"]:
                return as_json({"offers": self._offers(body)})
            case ["api", "v0", "asks", number] if call.method == "PUT":
                return self._accept(int(number), body)
            case ["api", "v1", "instances"]:
                wanted = json.loads(call.option("select_filters"))["label"]["eq"]
                rows = [row for row in self.instances.values() if row["label"] == wanted]
                return as_json({"instances": rows, "next_token": None, "total_instances": len(rows)})
            case ["api", "v0", "instances", "request_logs", number] if call.method == "PUT":
                self._row(number)
                return as_json({"success": True, "result_url": f"{self.url}/storage/log?Signature=very-secret"})
            case ["api", "v0", "instances", number]:
                return self._instance(call.method, number, body)
        raise HubError(404, "not_found", success=False, msg="no such path")

    def _stored(self) -> Reply:
        if self.log_delay:
            self.log_delay -= 1
            return Reply(403, body=b"<Error>AccessDenied</Error>")
        return Reply(200, {"Content-Type": "text/plain"}, self.log_text.encode())

    def _row(self, number: str) -> dict[str, Any]:
        if int(number) not in self.instances:
            raise HubError(404, "no_such_instance", success=False, msg=f"Instance {number} not found.")
        return self.instances[int(number)]

    def _instance(self, method: str, number: str, body: Any) -> Reply:
        if method == "GET":
            return as_json({"instances": self.instances.get(int(number))})
        row = self._row(number)
        if method == "DELETE":
            del self.instances[int(number)]
        else:
            row.update(intended_status=body["state"], actual_status="exited", cur_state=body["state"])
        return as_json({"success": True})

    def _offers(self, query: dict[str, Any]) -> list[dict[str, Any]]:
        checks = {
            "eq": lambda a, b: a == b,
            "gte": lambda a, b: a >= b,
            "lte": lambda a, b: a <= b,
        }
        filters = {name: value for name, value in query.items() if isinstance(value, dict)}
        found = [
            row
            for row in self.asks.values()
            if all(checks[op](row[name], value) for name, test in filters.items() for op, value in test.items())
        ]
        (field, direction), *_ = query["order"]
        return sorted(found, key=lambda row: row[field], reverse=direction == "desc")[: query["limit"]]

    def _accept(self, number: int, body: dict[str, Any]) -> Reply:
        ask = self.asks.get(number)
        if ask is None:
            raise HubError(404, "no_such_ask", success=False, msg=f"Instance type by id {number} is not available.")
        if body["runtype"] != "args" or not isinstance(body["args"], list) or not isinstance(body["env"], dict):
            raise HubError(400, "invalid_args", success=False, msg="bad launch mode")
        if "price" in body and body["price"] < ask["min_bid"]:
            raise HubError(400, "bid_too_low", success=False, msg="bid below the minimum")
        contract = next(self._numbers)
        self.add_instance(contract, label=body["label"], is_bid="price" in body, dph_total=body.get("price", 1.6))
        del self.asks[number]
        return as_json({"success": True, "new_contract": contract})


class RunPodServer(Platform):
    """RunPod, version 2: pods, catalogue, logs as server-sent events on a stream that stays open."""

    def __init__(self) -> None:
        super().__init__()
        self.pods: dict[str, dict[str, Any]] = {}
        self.gpus: list[dict[str, Any]] = []
        self.log_lines: list[str] = ["trial 1: done"]
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
                return as_json({"pods": list(self.pods.values())}) if call.method == "GET" else self._create(body)
            case ["v2", "pods", id, *rest] if id in self.pods:
                return self._pod(call.method, id, rest, body)
        raise problem(404, "Not Found", "resource not found")

    def _create(self, body: dict[str, Any]) -> Reply:
        unknown = body.keys() - {"name", "image", "args", "disk", "env", "cloud", "gpu", "mounts"}
        if unknown or len(body["mounts"]) != 1 or not isinstance(shlex.split(body["args"]), list):
            raise problem(422, "Unprocessable Entity", "Request validation failed.", errors=sorted(unknown))
        if body["gpu"]["id"] not in [gpu["id"] for gpu in self.gpus if gpu["availability"] != "NONE"]:
            detail = "There are no longer any instances available with the requested specifications."
            raise problem(400, "Bad Request", detail)
        pod = self.add_pod(f"pod{next(self._numbers)}", name=body["name"], status="PROVISIONING")
        return as_json(pod, 201)

    def _pod(self, method: str, id: str, rest: Iterable[str], body: Any) -> Reply:
        match [method, *rest]:
            case ["GET"]:
                return as_json(self.pods[id])
            case ["DELETE"]:
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
        events = []
        for line in self.log_lines:
            data = json.dumps({"ts": "2026-11-01T12:00:00Z", "source": "container", "line": line})
            events.append(f"id: 2026-11-01T12:00:00Z/1\ndata: {data}\n\n")
        return OpenStream("".join(events).encode(), self.closing)


class OpenStream(Reply):
    """Events, and then silence on an open line."""

    def __init__(self, events: bytes, closing: threading.Event) -> None:
        super().__init__(200, {"Content-Type": "text/event-stream"})
        self._events, self._closing = events, closing

    @property
    def size(self) -> int:
        return len(self._events) + 1

    def chunks(self) -> Any:
        yield self._events
        self._closing.wait(30)
        raise ConnectionAbortedError("the stream ends with the server")
