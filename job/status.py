"""Where a job stands, told from its run folder alone; needs no torch."""

from __future__ import annotations

import json
from typing import Any

from job.budget import read_spent
from job.events import read_events
from job.prompts import PromptSets
from job.records import JobRecord
from job.result import job_trials
from job.search import pareto_front
from job.workspace import RunFolder, read_record

# The ETA goes by the latest trials: rates change when a job moves to another machine.
_RECENT = 20


def job_status(folder: RunFolder, running: bool | None = None) -> dict[str, Any]:
    """Return the status of a job (DESIGN section 6).

    Args:
        folder: Its run folder, or what a checkpoint has of it.
        running: Whether a run is at it; None: its lock tells.
    """
    record, state = folder.read_job(), folder.read_state()
    trials = job_trials(folder)
    prompts = read_record(folder.prompts_file, PromptSets) if folder.prompts_file.exists() else None
    held = folder.is_held() if running is None else running
    if state is None:
        name, reason = "new", None
    elif state.state == "running" and not held:
        name, reason = "preempted", "the process ended without a word"
    elif held:
        name, reason = "running", None
    else:
        name, reason = state.state, state.reason
    target = int(record.settings["trials"]) if record.searches else 1
    chosen = state.chosen if state is not None and name == "finished" else None
    exported = folder.export_link.exists()
    return {
        "job_id": record.job_id,
        "state": name,
        "reason": reason,
        "phase": state.phase if state is not None else None,
        "trials": {
            "done": len(trials),
            "target": target,
            "running": _running(folder, len(trials), target) if name == "running" else 0,
        },
        "eta_s": _eta(folder, target - len(trials)) if name == "running" else None,
        "eta_total_s": _eta_total(folder, target - len(trials)) if name == "running" else None,
        "best": [
            {"number": t.number, "params": t.params, "values": {"refusals": t.values.refusals, "kl": t.values.kl}}
            for t in pareto_front(trials)
        ],
        "chosen": chosen,
        "export": str(folder.export_link) if exported else None,
        "uploads": [upload.model_dump() for upload in folder.read_uploads()],
        "search_prompts": len(prompts.bad_search) if prompts else None,
        "received_bytes": prompts.received if prompts else 0,
        "cost_usd": _cost(folder, record),
    }


def _cost(folder: RunFolder, record: JobRecord) -> float | None:
    """Return the dollars that the job has taken, None where no price is known."""
    spent = read_spent(folder.meter_file)
    return round(spent.dollars, 2) if spent.dollars or record.settings.get("price") is not None else None


def _running(folder: RunFolder, done: int, target: int) -> int:
    """Return how many trials are being evaluated: those of the current batch that are not stored."""
    state = folder.read_state()
    if state is None or state.phase != "search":
        return 0
    batch = int(folder.read_job().settings["trials_per_batch"])
    return min(batch - done % batch, target - done)


def _eta(folder: RunFolder, left: int) -> float | None:
    """Return the seconds that the remaining trials will take at the latest rate."""
    times: list[float] = [event["time"] for event in read_events(folder.events_file) if event.get("event") == "trial"]
    recent = times[-_RECENT:]
    if left <= 0 or len(recent) < 2 or recent[-1] <= recent[0]:
        return None
    return round((recent[-1] - recent[0]) / (len(recent) - 1) * left, 1)


def _eta_total(folder: RunFolder, left: int) -> float | None:
    """Return the seconds until the job is done: the search at its latest rate, export and delivery as estimated."""
    search = 0.0 if left <= 0 else _eta(folder, left)
    if search is None or not folder.preflight_file.exists():
        return None
    hours = json.loads(folder.preflight_file.read_text()).get("hours") or {}
    rest = float(hours.get("export", 0.0)) + float(hours.get("upload", 0.0))
    return round(search + 3600 * rest, 1)


def status_text(status: dict[str, Any]) -> str:
    """Return a job's status for people."""
    trials = status["trials"]
    lines = [f"job {status['job_id']}: {status['state']}" + (f" ({status['reason']})" if status["reason"] else "")]
    eta = f", ETA {status['eta_s']:.0f} s" if status["eta_s"] is not None else ""
    if status["eta_total_s"] is not None:
        eta += f", all done in about {status['eta_total_s']:.0f} s"
    if status["cost_usd"] is not None:
        eta += f", ${status['cost_usd']:.2f} so far"
    lines.append(f"trials: {trials['done']} of {trials['target']}{eta}")
    for best in status["best"]:
        mark = "  <- chosen" if best["number"] == status["chosen"] else ""
        values = best["values"]
        counted = f"{values['refusals']}/{status['search_prompts']} refusals"
        lines.append(f"  trial {best['number']}: {counted}, KL {values['kl']:.4g}{mark}")
    if status["export"]:
        lines.append(f"export: {status['export']}")
    lines += [f"upload to {upload['target']}: {upload['state']}" for upload in status["uploads"]]
    return "\n".join(lines)
