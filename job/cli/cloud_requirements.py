"""A job's needs of a rented machine: from cards, or from the output of `abliterate preflight --json`."""

from __future__ import annotations

import json
import re
import shlex
from pathlib import Path
from typing import Any

from job.cloud.provider import MachineNeeds
from job.errors import UsageError
from job.preflight.gpu_table import MIN_CUDA, Card, cards, find_card, parse_on
from job.text.decoding import decoded

# Phases of an estimate that depend on the rented machine's network.
_DOWN, _UP = "download", "upload"
# Bytes per second assumed by preflight for other machines (`job.preflight.planning.LINE`, whose module imports torch).
PLANNED_LINE = 12e6


def need_of_cards(text: str, disk_gb: int, hours: float | None = None) -> MachineNeeds:
    """Return the need for cards as in `--on 4xRTX4090`. Raises UsageError for unknown cards."""
    reading = parse_on(text)
    return _need(find_card(reading.gpus[0].name), len(reading.gpus), disk_gb).model_copy(update={"work_hours": hours})


def need_of_survey(path: Path) -> MachineNeeds:
    """Return the need in a file of `abliterate preflight ... --on MACHINE --json`. Raises UsageError."""
    survey = _read(path)
    failed = [check["name"] for check in survey.get("checks", []) if check.get("status") == "fail"]
    if failed and not survey.get("ok"):
        raise UsageError(
            f"{path}: preflight found that the job cannot run there: {', '.join(failed)}", remedy="see its checks"
        )
    if not survey.get("offers"):
        raise UsageError(
            f"{path} does not describe a machine to rent",
            remedy="make it with `abliterate preflight MODEL --on 4xRTX4090 --json`",
        )
    query = _query(survey["offers"])
    try:
        card = _card_of_offer(query["gpu_name"], float(query["gpu_ram"]))
        need = _need(card, int(query["num_gpus"]), int(query["disk_space"]))
    except (KeyError, ValueError) as error:
        raise UsageError(f"{path}: its query of offers cannot be read ({error})", remedy="make it again") from None
    hours = survey.get("hours")
    if not hours:
        return need
    # The estimate assumed a slow line; its bytes are evaluated anew for each offer.
    gigabytes = {phase: hours[phase] * 3600 * PLANNED_LINE / 1e9 for phase in (_DOWN, _UP)}
    work = sum(value for phase, value in hours.items() if phase not in gigabytes)
    return need.model_copy(update={"work_hours": work, "download_gb": gigabytes[_DOWN], "upload_gb": gigabytes[_UP]})


def _read(path: Path) -> dict[str, Any]:
    try:
        survey = json.loads(decoded(path.read_bytes()))
    except OSError as error:
        raise UsageError(f"cannot read {path}: {error.strerror}", remedy="check --preflight") from error
    except ValueError as error:
        raise UsageError(f"{path} holds no JSON", remedy="make it with `abliterate preflight ... --json`") from error
    if not isinstance(survey, dict):
        raise UsageError(f"{path} holds no survey", remedy="make it with `abliterate preflight ... --json`")
    return survey


def _query(command: str) -> dict[str, str]:
    """Parse the terms of a command that lists offers, by field."""
    words = shlex.split(command)
    terms = [match for word in words for match in re.finditer(r"(\w+)(?:>=|=)(\S+)", word)]
    return {match[1]: match[2] for match in terms}


def _card_of_offer(name: str, gigabytes: float) -> Card:
    """Return the card with a name on Vast.ai, where two sizes may share one."""
    fitting = [card for card in cards() if card.offer == name]
    if not fitting:
        raise ValueError(f"unknown GPU {name}")
    return min(fitting, key=lambda card: abs(_memory(card) - gigabytes))


def _memory(card: Card) -> float:
    # As preflight requests it: platforms state slightly different sizes than programs can use.
    return int(card.gib * 0.95)


def _need(card: Card, count: int, disk_gb: int) -> MachineNeeds:
    family = re.sub(r"[^a-z0-9]", "", card.name.split("-")[0].lower())
    return MachineNeeds(
        gpu=card.name,
        names=(family,),
        vast_name=card.offer,
        count=count,
        gpu_gb=_memory(card),
        disk_gb=disk_gb,
        min_cuda=MIN_CUDA,
    )
