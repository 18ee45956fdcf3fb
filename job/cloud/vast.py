"""Vast.ai's API: https://docs.vast.ai/api-reference (version 0, but for the list of instances)."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from typing import Any
from urllib.parse import quote

from job.cloud.api import Api, CloudError, GoneError
from job.cloud.provider import (
    MARKER,
    PROVISIONING,
    Action,
    Instance,
    MachineNeeds,
    Offer,
    Order,
    State,
    Terms,
    number,
    plain_id,
)

BASE = "https://console.vast.ai"
# The variable that redirects the platform's own client.
BASE_NAME = "VAST_URL"
# States by `actual_status`, of an instance that the owner wants to run under a valid contract. It is also null during
# provisioning, like a missing status: nothing follows from either.
_STATES: dict[str, State] = {
    "created": "starting",
    "loading": "starting",
    "rebooting": "starting",
    "running": "running",
    "frozen": "running",
    "exited": "exited",
    "offline": "lost",
}
# Possible values after the contract is released.
_RELEASED = frozenset({"created", "stopped", "exited", "offline", "unknown"})
_PAGE, _MOST_PAGES = 25, 400
_TAKEN = frozenset({"no_such_ask", "ask_not_available", "not_available", "no_longer_available"})


class Vast:
    """Vast.ai as a market."""

    name = "Vast.ai"
    console = "https://console.vast.ai/instances/"

    def __init__(self, api: Api) -> None:
        self._api = api

    def offers(self, need: MachineNeeds, terms: Terms) -> list[Offer]:
        """Return the offers, cheapest hour first."""
        query: dict[str, Any] = {
            "gpu_name": {"eq": need.vast_name.replace("_", " ")},
            "num_gpus": {"eq": need.count},
            # In thousandths of its own command line's GB.
            "gpu_ram": {"gte": int(need.gpu_gb * 1000)},
            "disk_space": {"gte": need.disk_gb},
            "inet_down": {"gte": terms.min_down},
            "inet_up": {"gte": terms.min_up},
            "reliability": {"gte": terms.min_reliability},
            "external": {"eq": False},
            "rentable": {"eq": True},
            "rented": {"eq": False},
            "order": [["dph_total", "asc"]],
            "type": "bid" if terms.interruptible else "on-demand",
            "limit": terms.limit,
            "allocated_storage": need.disk_gb,
        }
        if terms.verified:
            query["verified"] = {"eq": True}
        if need.min_cuda is not None:
            query["cuda_max_good"] = {"gte": float(need.min_cuda)}
        if terms.most_dollars is not None and not terms.interruptible:
            query["dph_total"] = {"lte": terms.most_dollars}
        found = self._api.call("POST", "/api/v0/bundles/", body=query, what=f"offers of {need.count}x{need.gpu}")
        rows = self._api.rows(found, "offers", "offers")
        offers = [offer for row in rows if (offer := _offer(row, need, terms)) is not None]
        return [offer for offer in offers if terms.most_dollars is None or offer.dollars <= terms.most_dollars]

    def rent(self, offer: Offer, order: Order, env: Mapping[str, str]) -> str | None:
        """Accept an offer; the bid is the offer's price."""
        body: dict[str, Any] = {
            "client_id": "me",
            "image": order.image,
            "disk": offer.need.disk_gb,
            "label": order.label,
            "env": {**env, MARKER: order.label},
            # Every other run type replaces the image's ENTRYPOINT.
            "runtype": "args",
            "args": list(order.command),
            "target_state": "running",
            "cancel_unavail": True,
        }
        if offer.interruptible:
            body["price"] = offer.dollars
        try:
            rented = self._api.call(
                "PUT", f"/api/v0/asks/{_part(offer.id)}/", body=body, what=f"offer {offer.id}", creating=True
            )
        except GoneError:
            return None
        except CloudError as error:
            if error.reason in _TAKEN:
                return None
            raise
        id = plain_id(rented.get("new_contract") or "") if isinstance(rented, Mapping) else None
        if id is None:
            raise CloudError(f"{self.name}'s response names no instance for offer {offer.id}", uncertain=True)
        return id

    def instance(self, id: str) -> Instance:
        """Return an instance's current state."""
        try:
            found = self._api.call(
                "GET", f"/api/v0/instances/{_part(id)}/", params={"owner": "me"}, what=f"instance {id}"
            )
        except GoneError:
            return Instance(id=id, state="gone")
        row = found.get("instances", "missing") if isinstance(found, Mapping) else "missing"
        if not row:  # explicitly: there is no such instance
            return Instance(id=id, state="gone")
        return _instance({**(row if isinstance(row, Mapping) else {}), "id": id})

    def instances(self) -> list[Instance]:
        """Return the account's instances. Raises CloudError if the response is no list: that is not an empty one."""
        params: dict[str, str | int] = {"order_by": json.dumps([{"col": "id", "dir": "asc"}]), "limit": _PAGE}
        instances: list[Instance] = []
        for _ in range(_MOST_PAGES):
            page = self._api.call("GET", "/api/v1/instances/", params=params, what="the list of instances")
            rows = self._api.rows(page, "instances", "instances")
            instances += [_instance(row) for row in rows if plain_id(row.get("id") or "")]
            token = page.get("next_token")
            if not token:
                return instances
            params["after_token"] = str(token)
        raise CloudError(f"{self.name}'s list of instances does not end")

    def end(self, id: str, action: Action) -> bool:
        """Stop or destroy an instance; return False if there is none."""
        path = f"/api/v0/instances/{_part(id)}/"
        try:
            if action == "destroy":
                self._api.call("DELETE", path, body={}, what=f"the end of instance {id}")
            elif action == "stop":
                self._api.call("PUT", path, body={"state": "stopped"}, what=f"the stop of instance {id}")
        except GoneError:
            return False
        return True

    def logs(self, id: str, lines: int) -> str:
        """Return the last lines of a log, which the platform copies to a storage URL."""
        what = f"the log of instance {id}"
        asked = self._api.call(
            "PUT", f"/api/v0/instances/request_logs/{_part(id)}/", body={"tail": str(lines)}, what=what
        )
        address = asked.get("result_url") if isinstance(asked, Mapping) else None
        if not address:
            raise CloudError(f"{self.name} gives no URL for {what}")
        return self._api.hide(self._api.download(str(address), what))

    def cannot_fetch(self, id: str) -> tuple[str, ...]:
        """Return what the API does not offer."""
        return (
            "Vast.ai's API offers no files of an instance; delivered and mirrored files (--upload, --checkpoint) "
            "are already off it",
            f"  from an existing instance: vastai copy C.{id}:/workspace/ local:./workspace/",
        )


def _part(id: str) -> str:
    """Return an id as one part of a path."""
    return quote(id, safe="")


def _offer(row: Mapping[str, Any], need: MachineNeeds, terms: Terms) -> Offer | None:
    """Return an offer, None without a number or a price."""
    dollars, id = number(row.get("dph_total")), plain_id(row.get("id") or "")
    if dollars is None or id is None:
        return None
    if terms.interruptible:
        lowest = number(row.get("min_bid")) or dollars
        dollars = round(max(lowest, terms.bid if terms.bid is not None else 1.1 * lowest), 4)
    return Offer(
        id=id,
        need=need,
        dollars=dollars,
        interruptible=terms.interruptible,
        where=str(row.get("geolocation") or ""),
        down=number(row.get("inet_down")),
        up=number(row.get("inet_up")),
        reliability=number(row.get("reliability2")) or number(row.get("reliability")),
        down_dollars=number(row.get("inet_down_cost")) or 0.0,
        up_dollars=number(row.get("inet_up_cost")) or 0.0,
    )


def _instance(row: Mapping[str, Any]) -> Instance:
    status = row.get("actual_status")
    return Instance(
        id=str(row["id"]),
        state=_state(row),
        status=str(status or ("no status" if "actual_status" not in row else PROVISIONING)).strip(),
        label=str(row.get("label") or ""),
        dollars=number(row.get("dph_total")),
        gpu=f"{row.get('num_gpus', '?')}x {row.get('gpu_name', '?')}",
        marker=_marker(row.get("extra_env")),
        image=str(row.get("image_uuid") or ""),
        note=str(row.get("status_msg") or ""),
    )


def _marker(env: Any) -> str:
    """Return our marker variable from an instance's environment (a list of pairs or a table); "" if missing."""
    pairs = env.items() if isinstance(env, Mapping) else env if isinstance(env, list) else ()
    found = [pair[1] for pair in pairs if isinstance(pair, Sequence) and len(pair) == 2 and pair[0] == MARKER]
    return str(found[0]) if found else ""


def _state(row: Mapping[str, Any]) -> State:
    """Return an instance's state from its actual, contract and intended status."""
    values = [row.get(key) for key in ("actual_status", "cur_state", "intended_status")]
    # A non-text value counts as an unknown text.
    actual, contract, wanted = ("?" if value is not None and not isinstance(value, str) else value for value in values)
    if wanted == "stopped":
        return "stopped"
    if contract == "unloaded":  # released by destroy; a running container contradicts it
        return "gone" if actual is None or actual in _RELEASED else "unknown"
    if wanted not in ("running", "frozen") or contract not in ("running", "stopped"):
        return "unknown"
    if actual == "stopped" or (contract == "stopped" and _STATES.get(actual or "") not in (None, "running")):
        # Intended to run without a machine: it was outbid, or its contract ended.
        return "outbid"
    return _STATES.get(actual or "", "unknown") if contract == "running" else "unknown"
