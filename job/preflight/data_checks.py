"""The checks of the prompts: enough of them, and none in two sets."""

from __future__ import annotations

from job.data.prompts import PromptSets, overlaps
from job.preflight.checks import Check

_FEW_PROMPTS = 20


def data_checks(prompts: PromptSets) -> list[Check]:
    """Return a check of every set, and one of what they have in common."""
    counts = {
        "good_prompts": len(prompts.good),
        "bad_prompts": len(prompts.bad),
        "good_eval_prompts": len(prompts.good_search) + len(prompts.good_report),
        "bad_eval_prompts": len(prompts.bad_search) + len(prompts.bad_report),
        "helpfulness_prompts": len(prompts.helpfulness),
        "unhelpfulness_prompts": len(prompts.unhelpfulness),
        "capability_prompts": len(prompts.capability),
    }
    checks = []
    for name, source in prompts.sources.items():
        count = counts.get(name, _FEW_PROMPTS)
        commit = f", commit {prompts.commits[name][:12]}" if name in prompts.commits else ""
        few = count < _FEW_PROMPTS
        checks.append(
            Check(
                name=f"data.{name}",
                status="warn" if few else "ok",
                measured=f"{source}{commit}: {count} prompts",
                needed=f"{_FEW_PROMPTS} prompts",
                remedy="directions and figures from so few are rough; give more" if few else "",
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
