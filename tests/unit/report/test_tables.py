"""Lines on narrow terminals."""

from __future__ import annotations

from job.report.tables import folded
from job.storage.progress import shortened


def test_a_long_line_is_continued_with_more_indentation() -> None:
    line = "  trial 3: 0/100 refusals (0.0–3.7 %), KL 0.01546, chosen, exported (merged)"
    parts = folded(line, 40)
    assert len(parts) == 3
    assert all(len(part) <= 40 for part in parts)
    assert (parts[0][:8], parts[1][:5]) == ("  trial ", "    K")
    assert " ".join(" ".join(parts).split()) == line.strip()
    assert folded("short", 40) == ["short"]
    assert folded("", 40) == [""]


def test_a_label_is_cut_before_the_figures_behind_it() -> None:
    label = "the base model's responses and the edit's (tokens; the total is an upper bound)"
    assert shortened(label, 200) == label
    assert shortened(label, 30) == "the base model's responses an…"
    assert shortened(label, -5) == "the base mo…"  # still readable
    assert shortened("trials", 2) == "trials"
