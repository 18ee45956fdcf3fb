"""Status of a job, from its run folder alone; needs no torch."""

from __future__ import annotations

import time
from collections.abc import Iterable
from typing import Any

from job.errors import printable
from job.records import State
from job.report.front import choice_text, others_text, shown_choice, shown_others
from job.report.run_view import RunView
from job.report.tables import aligned, folded
from job.storage.run_folder import RunFolder
from job.text.behaviour import BehaviourWords, words_of
from job.text.durations import duration_text

# The ETA uses the latest trials: rates change when a job moves to another machine.
_RECENT = 20
_EVENTS, _WARNINGS, _FRONT = 5, 5, 10
# States that a job does not leave by itself.
ENDED = frozenset({"finished", "failed"})
_AFTER_SEARCH = ("export", "upload")


def job_status(folder: RunFolder, running: bool | None = None) -> dict[str, Any]:
    """Return a job's status for `abliterate status --json`; `running` None means to use its lock."""
    view = RunView(folder)
    record, state, done = view.record, view.state, len(view.trials)
    held = folder.is_held() if running is None else running
    name, reason = _state(state, held)
    target = view.trials_wanted if record.searches else 1
    eta, eta_total = _etas(view, target - done) if name == "running" else (None, None)
    said = [event for event in view.events if event.get("message")]
    return {
        "job_id": record.job_id,
        "model": record.settings["model"],
        "behaviour": view.settings["card"]["behaviour"],
        "state": name,
        "reason": reason,
        "phase": state.phase if state is not None else None,
        "trials": {
            "done": done,
            "target": target,
            "running": _running(view, target) if name == "running" else 0,
        },
        "path": _path(view),
        "eta_s": eta,
        "eta_total_s": eta_total,
        "best": [
            {
                "number": t.number,
                "params": t.params,
                "values": {"refusals": t.values.refusals, "kl": t.values.kl},
                "objectives": shown_others(t),
                "choice": shown_choice(view, t),
            }
            for t in view.front
        ],
        "why": view.reason,
        "leading": view.chosen.number if view.chosen else None,
        "chosen": state.chosen if state is not None and name == "finished" else None,
        "export": str(folder.export_link) if folder.export_link.exists() else None,
        "uploads": [upload.model_dump() for upload in view.uploads],
        "search_prompts": len(view.prompts.bad_search) if view.prompts else None,
        "received_bytes": view.prompts.received if view.prompts else 0,
        "spent_s": round(view.spent.seconds, 1),
        "cost_usd": _cost(view),
        "events": [{key: event[key] for key in ("time", "event", "message")} for event in said[-_EVENTS:]],
        "warnings": _warnings(view),
    }


def _path(view: RunView) -> dict[str, Any] | None:
    """Return the edits found by gradient: held-out prompts, the kept stages, and why there are none."""
    if view.path is None:
        return None
    stages = [stage.model_dump(include={"steps", "beta", "refusals", "broken", "kl"}) for stage in view.path.stages]
    return {"prompts": view.path.prompts, "stages": stages, "failed": view.path.failed}


def _state(state: State | None, held: bool) -> tuple[str, str | None]:
    if state is None:
        return "new", None
    if held:
        return "running", None
    if state.state == "running":
        return "preempted", "the process was killed or its machine stopped; run the command again to continue"
    return state.state, state.reason


def _cost(view: RunView) -> float | None:
    dollars = view.spent.dollars
    return round(dollars, 2) if dollars or view.record.settings.get("price") is not None else None


def _running(view: RunView, target: int) -> int:
    """Return the number of trials in evaluation: the current batch without stored ones."""
    if view.state is None or view.state.phase != "search":
        return 0
    batch, done = view.record.trials_per_batch, len(view.trials)
    return max(0, min(batch - done % batch, target - done))


def _etas(view: RunView, left: int) -> tuple[float | None, float | None]:
    """Return the seconds until search and job are done, by the search's latest rate or preflight's estimate."""
    hours = view.survey.get("hours") or {}
    search = None if left <= 0 else _rate_eta(view.events, left)
    if not hours:
        return search, None
    phase = view.state.phase if view.state is not None else None
    rest = 0.0 if phase == "upload" else sum(float(hours.get(name, 0.0)) for name in _AFTER_SEARCH)
    if left <= 0:
        return None, round(3600 * rest, 1)
    begun = phase == "search"
    to_search = 0.0 if begun else sum(float(v) for name, v in hours.items() if name not in (*_AFTER_SEARCH, "search"))
    expected = search if search is not None else 3600 * float(hours.get("search", 0.0))
    return search, round(expected + 3600 * (to_search + rest), 1)


def _rate_eta(events: Iterable[dict[str, Any]], left: int) -> float | None:
    times: list[float] = []
    for event in events:
        if event.get("event") == "search_started":
            times = [event["time"]]  # a batch's time precedes its trials, which are reported together
        elif event.get("event") == "trial":
            times.append(event["time"])
    recent = times[-_RECENT - 1 :]
    if len(recent) < 2 or recent[-1] <= recent[0]:
        return None
    return round((recent[-1] - recent[0]) / (len(recent) - 1) * left, 1)


def _warnings(view: RunView) -> list[str]:
    found = [f"preflight: {check['status']}: {check['name']}: {check['measured']}" for check in view.bad_checks]
    events = view.events
    starts = [index for index, event in enumerate(events) if event.get("event") == "job_started"]
    latest = events[starts[-1] :] if starts else events
    messages = (str(event.get("message", "")) for event in latest)
    found += [message.removeprefix("warning: ") for message in messages if message.startswith("warning: ")]
    return list(dict.fromkeys(found))


def is_settled(status: dict[str, Any]) -> bool:
    """Return whether a job has ended, so that its status changes only when restarted."""
    return status["state"] in ENDED


def status_text(status: dict[str, Any], width: int | None = None) -> str:
    """Format a job's status for people, folded to `width` columns unless None."""
    reason = f" ({status['reason']})" if status["reason"] else ""
    lines = [f"job {status['job_id']}: {status['state']}{reason}"]
    if status["phase"] and status["state"] != "finished":
        lines.append(f"phase: {status['phase']}")
    trials = status["trials"]
    at_work = f", {trials['running']} running" if trials["running"] else ""
    lines += _path_lines(status["path"], words_of(status["behaviour"]))
    lines.append(f"trials: {trials['done']} of {trials['target']}{at_work}")
    lines += _time_lines(status)
    lines += _front_lines(status)
    if status["export"]:
        lines.append(f"export: {status['export']}")
    lines += [f"upload to {upload['target']}: {upload['state']}" for upload in status["uploads"]]
    if status["warnings"]:
        lines.append("warnings:")
        lines += [f"  {line}" for line in status["warnings"][-_WARNINGS:]]
    if status["events"]:
        lines.append("last events:")
        lines += [f"  {_clock(event['time'])}  {event['message']}" for event in status["events"]]
    lines = [printable(line) for line in lines]  # others may be able to write to a checkpoint
    return "\n".join(lines if width is None else (part for line in lines for part in folded(line, width)))


def _path_lines(path: dict[str, Any] | None, words: BehaviourWords) -> list[str]:
    if path is None:
        return []
    if path["failed"] is not None:
        return [f"edits by gradient: none: {path['failed']}"]
    last, count = path["stages"][-1], len(path["stages"])
    found = f"{count} stage{'s' * (count > 1)}, {last['steps']} steps"
    scores = f"{last['refusals'] + last['broken']}/{path['prompts']} {words.shown} or broken, KL {last['kl']:.3g}"
    return [f"edits by gradient: {found}; the last one, on held-out prompts: {scores}"]


def _time_lines(status: dict[str, Any]) -> list[str]:
    lines = []
    if status["eta_s"] is not None:
        lines.append(f"ETA of the search: {duration_text(status['eta_s'])}")
    if status["eta_total_s"] is not None:
        lines.append(f"all done in about {duration_text(status['eta_total_s'])}")
    if status["spent_s"]:
        cost = f", ${status['cost_usd']:.2f}" if status["cost_usd"] is not None else ""
        took = "took" if status["state"] == "finished" else "so far"
        lines.append(f"{took}: {duration_text(status['spent_s'])}{cost}")
    return lines


def _front_lines(status: dict[str, Any]) -> list[str]:
    words = words_of(status["behaviour"])
    lines = ["front:"] if status["best"] else []
    shown = [best for place, best in enumerate(status["best"]) if place < _FRONT or best["number"] == status["leading"]]
    marked = {status["leading"]: " <- best so far", status["chosen"]: " <- chosen"}
    width = max((len(str(best["values"]["refusals"])) for best in shown), default=0)
    lines += aligned(
        [
            [
                f"  trial {best['number']}:",
                f"{best['values']['refusals']:>{width}}/{status['search_prompts']} {words.counted},",
                f"{others_text(best['objectives'])}KL {best['values']['kl']:.4g}{choice_text(best['choice'])}",
                marked.get(best["number"], ""),
            ]
            for best in shown
        ]
    )
    if left := len(status["best"]) - len(shown):
        lines.append(f"  and {left} more: abliterate front")
    if status["why"]:
        lines.append(f"best by all prompts: trial {status['leading']}: {status['why']}")
    return lines


def _clock(seconds: float) -> str:
    return time.strftime("%H:%M:%S", time.localtime(seconds))
