"""Checks of the prompts: enough of them, and none in two sets."""

from __future__ import annotations

from dataclasses import dataclass

from job.data.prompts import PromptSets, load_prompts, overlaps
from job.preflight.checks import Check, attempt
from job.preflight.inputs import PreflightInputs

_FEW_PROMPTS = 20


@dataclass(frozen=True)
class DataFindings:
    """Findings on the prompts; None if they cannot be read."""

    checks: tuple[Check, ...]
    prompts: PromptSets | None = None


def examine_data(inputs: PreflightInputs) -> DataFindings:
    """Read the prompts unless an earlier start has, and check them."""
    earlier = inputs.earlier.prompts
    prompts = attempt("data", lambda: earlier or load_prompts(inputs.settings, lambda _: None))
    if isinstance(prompts, Check):
        return DataFindings((prompts,))
    return DataFindings(tuple(data_checks(prompts)), prompts)


def data_checks(prompts: PromptSets) -> list[Check]:
    """Return a check per set, and one for overlaps."""
    counts = {
        "good_prompts": len(prompts.of_setting("good_prompts")),
        "bad_prompts": len(prompts.of_setting("bad_prompts")),
        "good_eval_prompts": len(prompts.good_search) + len(prompts.good_report),
        "bad_eval_prompts": len(prompts.bad_search) + len(prompts.bad_report),
        "helpfulness_prompts": len(prompts.helpfulness),
        "unhelpfulness_prompts": len(prompts.unhelpfulness),
        "capability_prompts": len(prompts.capability),
    }
    kept = {"good_prompts": len(prompts.good_choice), "bad_prompts": len(prompts.bad_choice)}
    checks = []
    for name, source in prompts.sources.items():
        count = counts.get(name, _FEW_PROMPTS)
        commit = f", commit {prompts.commits[name][:12]}" if name in prompts.commits else ""
        few, skipped = count < _FEW_PROMPTS, prompts.skipped.get(name, "")
        remedies = ["give more prompts: directions and figures from this few are imprecise"] if few else []
        remedies += ["check whether those rows are meant to be prompts"] if skipped else []
        checks.append(
            Check(
                name=f"data.{name}",
                status="warn" if remedies else "ok",
                measured=f"{source}{commit}: {count} prompts"
                + (f", {kept[name]} of them for the choice" if kept.get(name) else "")
                + (skipped and f"; {skipped}"),
                needed=f"{_FEW_PROMPTS} prompts, and every row a prompt",
                remedy="; ".join(remedies),
            )
        )
    common = overlaps(prompts)
    checks.append(
        Check(
            name="data.overlap",
            status="warn" if common else "ok",
            measured="; ".join(common) or "no prompt is in two sets",
            needed="sets without common prompts",
            remedy="use other rows for evaluation" if common else "",
        )
    )
    return checks
