"""Vast.ai on the loopback interface."""

from __future__ import annotations

import itertools
from typing import Any
from urllib.parse import unquote

from tests.fakes.cloud.platform import Platform
from tests.fakes.hub.server import Call, HubError, Reply, as_json


class VastServer(Platform):
    """Vast.ai: asks, instances, and logs through a storage."""

    def __init__(self) -> None:
        super().__init__()
        self.instances: dict[int, dict[str, Any]] = {}
        self.asks: dict[int, dict[str, Any]] = {}
        self.log_text = "trial 1: done\n"
        self.new: set[int] = set()  # rented through the API
        self.ended: set[int] = set()  # ended, but still listed
        self.log_delay = 1  # number of "not yet" answers by the storage
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
                return self._listed(int(call.option("limit")), call.option("after_token"))
            case ["api", "v0", "instances", "request_logs", number] if call.method == "PUT":
                self._row(number)
                return as_json({"success": True, "result_url": f"{self.url}/storage/log?Signature=very-secret"})
            case ["api", "v0", "instances", number]:
                return self._instance(call.method, number, body)
        raise HubError(404, "not_found", success=False, msg="no such path")

    def _listed(self, limit: int, token: str) -> Reply:
        if not 1 <= limit <= 25:
            raise HubError(400, "invalid_args", success=False, msg="limit is 1 to 25")
        lagging = self.new if self.lags("list_lag") else set()
        rows = [self._shown(row) for number, row in sorted(self.instances.items()) if number not in lagging]
        start = int(token or 0)
        following = str(start + limit) if len(rows) > start + limit else None
        page = rows[start : start + limit]
        return as_json({"instances": page, "next_token": following, "total_instances": len(rows)})

    def _shown(self, row: dict[str, Any]) -> dict[str, Any]:
        return {key: value for key, value in row.items() if key != "extra_env" or not self.hide_env}

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
            if int(number) in self.new and self.lags("get_lag"):
                return as_json({"instances": None})
            found = self.instances.get(int(number))
            if int(number) in self.ended and not self.lags("linger"):
                self.instances.pop(int(number), None)
            return as_json({"instances": self._shown(found) if found is not None else None})
        if int(number) in self.new and self.lags("get_lag"):
            raise HubError(404, "no_such_instance", success=False, msg=f"Instance {number} not found.")
        row = self._row(number)
        if method == "DELETE" and self.linger:
            self.ended.add(int(number))
        elif method == "DELETE":
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
        label = self.relabel(body["label"]) if self.relabel is not None else body["label"]
        told = {"image_uuid": body["image"], "extra_env": [list(pair) for pair in body["env"].items()]}
        dollars = body.get("price", 1.6)
        self.add_instance(contract, label=label, is_bid="price" in body, dph_total=dollars, **told)
        self.new.add(contract)
        del self.asks[number]
        return as_json({"success": True, "new_contract": contract})
