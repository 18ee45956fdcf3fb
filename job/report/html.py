"""report.html: one self-contained page; its content policy forbids network access."""

from __future__ import annotations

from job.export import benchmarks, model_card, scorecard
from job.report import charts, sections, tables
from job.report.run_view import RunView
from job.text.divergence import kl_in_words, kl_scale, moved_share
from job.text.durations import duration_text
from job.text.intervals import interval_text
from job.text.templates import template


def report_page(story: RunView, *, private: bool = False) -> str:
    """Return the page; `private` includes responses to bad prompts."""
    return template("job.report", "page.html").render(
        story=story,
        private=private,
        charts=charts,
        tables=tables,
        texts=sections,
        card_texts=model_card,
        benchmark_texts=benchmarks,
        scorecard=scorecard,
        interval_text=interval_text,
        kl_in_words=kl_in_words,
        kl_scale=kl_scale,
        moved_share=moved_share,
        duration_text=duration_text,
    )
