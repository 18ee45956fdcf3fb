"""RunPod's API, version 2: https://docs.runpod.io/api-reference-v2."""

from __future__ import annotations

import json
import re
import shlex
from collections.abc import Iterable, Mapping
from typing import Any
from urllib.parse import quote

from job.cloud.api import Api, CloudError, GoneError
from job.cloud.provider import MARKER, Action, Instance, MachineNeeds, Offer, Order, State, Terms, number, plain_id
from job.text.names import letters_and_digits

BASE = "https://api.runpod.io"
# The variable that redirects the platform's own client.
BASE_NAME = "RUNPOD_API_BASE_URL"
# Documented states of version 2; "RESTARTING" and others of former versions count as unknown.
_STATES: dict[str, State] = {
    "PROVISIONING": "starting",
    "STARTING": "starting",
    "RUNNING": "running",
    "EXITED": "stopped",
    "ERROR": "lost",
    "TERMINATED": "gone",
}
# The container's disk; the workspace is on a mount that survives a stop.
_CONTAINER_GB = 20
_SMALLEST_MOUNT_GB = 10
_QUIET_SECONDS = 3.0


class RunPod:
    """RunPod as a market."""

    name = "RunPod"
    console = "https://console.runpod.io/pods"

    def __init__(self, api: Api) -> None:
        self._api = api

    def offers(self, need: MachineNeeds, terms: Terms) -> list[Offer]:
        """Return the stock. Version 2 has no interruptible pods, and reports no network speed or reliability."""
        if terms.interruptible:
            raise CloudError(
                "version 2 of RunPod's API rents no interruptible machines", remedy="leave out --bid, or use vast"
            )
        found = []
        for cloud in ("SECURE",) if terms.verified else ("SECURE", "COMMUNITY"):
            params: dict[str, str | int] = {
                "include": "AVAILABILITY",
                "product": "POD",
                "count": need.count,
                "cloud": cloud,
            }
            if need.min_cuda is not None:
                params["minCudaVersion"] = need.min_cuda
            what = f"offers of {need.count}x{need.gpu}"
            listed = self._api.call("GET", "/v2/catalog/gpus", params=params, what=what)
            rows = [row for row in self._api.rows(listed, "gpus", "GPUs") if _fits(row, need, cloud)]
            found += [offer for row in rows if (offer := _offer(row, need, cloud)) is not None]
        affordable = [offer for offer in found if terms.most_dollars is None or offer.dollars <= terms.most_dollars]
        return sorted(affordable, key=lambda offer: offer.dollars)[: terms.limit]

    def rent(self, offer: Offer, order: Order, env: Mapping[str, str]) -> str | None:
        """Create a pod."""
        cloud, _, gpu = offer.id.partition("/")
        compute: dict[str, Any] = {"id": gpu, "count": offer.need.count}
        if offer.need.min_cuda is not None:
            compute["minCudaVersion"] = offer.need.min_cuda
        if order.volume is not None:
            mounts: dict[str, Any] = {"network": [{"volumeId": order.volume, "path": "/workspace"}]}
        else:
            mounts = {"persistent": {"size": max(offer.need.disk_gb, _SMALLEST_MOUNT_GB), "path": "/workspace"}}
        body = {
            "name": order.label,
            "image": order.image,
            "args": shlex.join(order.command),
            "disk": _CONTAINER_GB,
            "env": {**env, MARKER: order.label},
            "cloud": cloud,
            "gpu": compute,
            "mounts": mounts,
        }
        try:
            pod = self._api.call("POST", "/v2/pods", body=body, what=f"a pod with {gpu}", creating=True)
        except CloudError as error:
            # 400 means either "none is free" or a broken rule; only the text distinguishes them.
            if error.status == 400 and re.search(
                r"no longer|availab|capacity|could not be placed|instances", str(error)
            ):
                return None
            raise
        id = plain_id(pod.get("id") or "") if isinstance(pod, Mapping) else None
        if id is None:
            raise CloudError(f"{self.name}'s response names no pod", uncertain=True)
        return id

    def instance(self, id: str) -> Instance:
        """Return a pod's current state."""
        try:
            pod = self._api.call("GET", f"/v2/pods/{quote(id, safe='')}", what=f"pod {id}")
        except GoneError:
            return Instance(id=id, state="gone")
        return _instance({**(pod if isinstance(pod, Mapping) else {}), "id": id})

    def instances(self) -> list[Instance]:
        """Return the account's pods. Raises CloudError if the response is no list: that is not an empty one."""
        found = self._api.call("GET", "/v2/pods", what="the list of pods")
        return [_instance(pod) for pod in self._api.rows(found, "pods", "pods") if plain_id(pod.get("id") or "")]

    def end(self, id: str, action: Action) -> bool:
        """Stop or terminate a pod; return False if there is none."""
        path = f"/v2/pods/{quote(id, safe='')}"
        try:
            if action == "destroy":
                self._api.call("DELETE", path, what=f"the end of pod {id}")
            elif action == "stop":
                self._api.call("POST", f"{path}/action", body={"action": "stop"}, what=f"the stop of pod {id}")
        except GoneError:
            return False
        except CloudError as error:
            # Invalid in the pod's current state: a stop of a stopped one.
            if error.status != 409 or action != "stop" or self.instance(id).state not in ("stopped", "gone"):
                raise
        return True

    def logs(self, id: str, lines: int) -> str:
        """Return the last lines of a pod's log, an open stream."""
        params: dict[str, str | int] = {"source": "container", "tail": min(lines, 5000)}
        path = f"/v2/pods/{quote(id, safe='')}/logs"
        stream = self._api.lines(path, params, what=f"the log of pod {id}", quiet=_QUIET_SECONDS)
        return self._api.hide("".join(line + "\n" for line in _log_lines(stream)))

    def cannot_fetch(self, id: str) -> tuple[str, ...]:
        """Return what the API does not offer."""
        return (
            "RunPod's API offers no files of a pod; delivered and mirrored files (--upload, --checkpoint) are "
            "already off it",
            f"  from a running pod, in a shell on pod {id}: runpodctl send /workspace/JOB_ID",
            "  to read the volume of a stopped pod, start the pod again; a network volume can be read from any pod",
        )


def _fits(row: Mapping[str, Any], need: MachineNeeds, cloud: str) -> bool:
    """Return whether a kind of GPU meets the need, and is in stock."""
    side = cloud.lower()
    memory = number(row.get("memory")) or 0.0
    return (
        any(name in letters_and_digits(str(row.get("id", ""))) for name in need.names)
        and bool(row.get(side))
        and need.count <= (number(_table(row.get("maxCount")).get(side)) or 0)
        # No less than needed, and not the other size of the card.
        and need.gpu_gb <= memory < 1.35 * need.gpu_gb
        and row.get("availability") in ("LOW", "MEDIUM", "HIGH")
    )


def _offer(row: Mapping[str, Any], need: MachineNeeds, cloud: str) -> Offer | None:
    """Return an offer, None without a price."""
    dollars = number(_table(row.get("price")).get(cloud.lower()))
    if dollars is None:
        return None
    return Offer(
        id=f"{cloud}/{row['id']}",
        need=need,
        dollars=round(dollars * need.count, 4),
        where=cloud.lower(),
        stock=str(row.get("availability", "")).lower(),
    )


def _instance(pod: Mapping[str, Any]) -> Instance:
    status = str(pod.get("status") or "").upper()
    gpu, env = _table(pod.get("gpu")), _table(pod.get("env"))
    return Instance(
        id=str(pod["id"]),
        state=_STATES.get(status, "unknown"),
        status=status.lower() or "no status",
        label=str(pod.get("name") or ""),
        dollars=number(pod.get("cost")) or None,
        gpu=f"{gpu.get('count', '?')}x {gpu.get('id', '?')}",
        marker=str(env.get(MARKER) or ""),
        image=str(pod.get("image") or ""),
    )


def _table(value: Any) -> Mapping[str, Any]:
    return value if isinstance(value, Mapping) else {}


def _log_lines(stream: Iterable[str]) -> list[str]:
    """Return a log's lines from server-sent events."""
    found = []
    for line in stream:
        if not line.startswith("data:"):
            continue
        text = line.removeprefix("data:").strip()
        try:
            event = json.loads(text)
        except ValueError:
            event = {"line": text}
        found.append(str(event.get("line", text)) if isinstance(event, dict) else text)
    return found
