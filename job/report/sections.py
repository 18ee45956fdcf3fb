"""Texts of report.html."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from pathlib import Path

from job.records import KeptAnswer
from job.report.run_view import RunView
from job.text.divergence import kl_in_words


def title(story: RunView) -> str:
    """Return the model and what changed."""
    model, base, edited = model_name(story), story.base, story.edited
    if base is None or edited is None:
        return f"{model}: no edit yet"
    return f"{model}: refusals {base.refusals} → {edited.refusals} of {edited.bad_prompts}"


def model_name(story: RunView) -> str:
    """Return the model as people call it: its repository, or the last two parts of its folder."""
    return "/".join(Path(story.record.settings["model"]).parts[-2:])


def state(story: RunView) -> str:
    """Return the job's latest state, or ""."""
    return story.state.state if story.state is not None else ""


def checks(story: RunView) -> str:
    """Return the outcome of the latest preflight in a line."""
    counts = Counter(check["status"] for check in story.checks)
    if counts["ok"] == len(story.checks):
        return f"All {len(story.checks)} checks were in order"
    return f"{len(story.checks)} checks: " + ", ".join(f"{counts[name]} {name}" for name in ("ok", "warn", "fail"))


def headline(story: RunView) -> str:
    """Return the result in a sentence."""
    base, edited, state = story.base, story.edited, story.state
    if base is None or edited is None:
        done = f"{len(story.trials)} of {story.trials_wanted} trials are done"
        if state is not None and state.state == "failed":
            return f"The job failed in the phase {state.phase or 'before the first'}: {state.reason}. {done}."
        return f"There is no result yet: {done}."
    return (
        f"On {report_prompts(story)}, refusals {'fell' if edited.refusals < base.refusals else 'went'} from "
        f"{base.refusals} to {edited.refusals} of {edited.bad_prompts}. Responses to ordinary prompts are "
        f"{kl_in_words(edited.kl or 0)}: KL divergence {edited.kl or 0:.3g} nats."
    )


def chosen(story: RunView) -> str:
    """Return which trial is chosen and why."""
    trial = story.chosen
    assert trial is not None
    if story.reason is not None:
        return f"Trial {trial.number} is the best by all prompts of search and choice: {story.reason}."
    return f"Trial {trial.number} has the lowest divergence among those with about the fewest refusals."


def report_prompts(story: RunView) -> str:
    """Describe the prompts of the figures."""
    return story.prompts.report_description if story.prompts is not None else "the report prompts"


def peaks(strengths: Mapping[str, Sequence[float]]) -> str:
    """Describe where each component's edit is strong and where it does nothing."""
    return "; ".join(f"{component} {_spread(weights)}" for component, weights in strengths.items())


def _spread(weights: Sequence[float]) -> str:
    least, most = min(weights), max(weights)
    if most - least < 0.005:
        return f"by {most:.2f} in every layer"
    untouched = sum(weight == 0 for weight in weights)
    rest = f"untouched in {untouched} of {len(weights)}" if untouched else f"least by {least:.2f}"
    return f"most in layer {weights.index(most)}, by {most:.2f}, {rest}"


def newly_answered(before: Sequence[KeptAnswer], after: Sequence[KeptAnswer]) -> int:
    """Return how many responses were refusals before and are none after."""
    return sum(one.refused and not other.refused for one, other in zip(before, after, strict=True))


def provenance(story: RunView) -> dict[str, str]:
    """Return the terms of a definition list of what the result comes from."""
    record = story.record
    commit = f" at commit {record.model_commit}" if record.model_commit else ""
    ran = "; ".join(f"trials {numbers} on {hardware}" for hardware, numbers in story.machines)
    items = {
        "Model": f"{record.settings['model']}{commit}",
        "Loaded in": record.resolution.dtype if record.resolution else "not loaded yet",
        "Directions": str(record.identity["directions"]["method"]),
        "Search": f"seed {record.identity['seed']}, {record.startup_trials or 'no'} start-up trials",
        "Computed on": ran or "nothing was searched",
        "Export": story.export or "none yet",
        "Delivered to": "; ".join(f"{one.target}: {one.state}" for one in story.uploads) or "nowhere",
        "Versions": ", ".join(f"{name} {version}" for name, version in record.versions.items()),
    }
    if story.prompts is not None:
        commits = story.prompts.commits
        for name, source in story.prompts.sources.items():
            items[name.replace("_", " ")] = source + (f", commit {commits[name]}" if name in commits else "")
    return items
