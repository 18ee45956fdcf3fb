"""report.html: one self-contained page with the figures as charts; nothing is fetched to show it."""

from __future__ import annotations

import html
from typing import Any

import plotly.graph_objects as go
import plotly.io
import plotly.offline
from plotly.subplots import make_subplots

from job.numerics.intervals import wilson_interval
from job.records import GeometryRecord, LayerGeometry
from job.result import RunResult
from job.search import pareto_front

# Blue and orange are told apart by all common kinds of colour vision; markers differ too.
_GOOD, _BAD, _OTHER = "#3b7dd8", "#e07b00", "#8a8a8a"
_STYLE = """
:root { color-scheme: light dark; --text: #1d2430; --back: #ffffff; --line: #d5d9e0; }
@media (prefers-color-scheme: dark) { :root { --text: #e4e7ec; --back: #16191f; --line: #3a404b; } }
body { font: 16px/1.5 system-ui, sans-serif; color: var(--text); background: var(--back); max-width: 60rem;
  margin: 0 auto; padding: 1rem; }
table { border-collapse: collapse; } th, td { text-align: left; padding: .3rem .7rem .3rem 0;
  border-bottom: 1px solid var(--line); font-variant-numeric: tabular-nums; }
.wide { overflow-x: auto; } .headline { font-size: 1.25rem; }
"""
# Charts have no background of their own; their text follows the page's when the scheme changes.
_SCRIPT = """
const dark = matchMedia("(prefers-color-scheme: dark)");
function paint() {
  const colour = getComputedStyle(document.documentElement).getPropertyValue("--text").trim();
  for (const chart of document.querySelectorAll(".js-plotly-plot")) Plotly.relayout(chart, {"font.color": colour});
}
dark.addEventListener("change", paint); addEventListener("load", paint);
"""


def report_page(result: RunResult) -> str:
    """Return the page."""
    base, edited = result.base, result.edited
    charts = [
        ("Pareto front", _front(result), "Refusals and KL divergence of all trials."),
        (
            "Geometry by layer",
            _geometry(result.geometry),
            "Cosines, lengths and separation of the two classes by layer.",
        ),
        ("Residuals by layer", _points(result.geometry), "Residuals along the direction and across it, by layer."),
    ]
    sections = "\n".join(
        f'<section><h2>{title}</h2><div role="img" aria-label="{label}">{_embed(chart)}</div></section>'
        for title, chart, label in charts
    )
    return f"""<!DOCTYPE html>
<html lang="en">
<head>
<meta charset="utf-8">
<meta name="viewport" content="width=device-width, initial-scale=1">
<title>Report of job {result.record.job_id}</title>
<style>{_STYLE}</style>
<script>{plotly.offline.get_plotlyjs()}</script>
</head>
<body>
<main>
<h1>Report of job {result.record.job_id}</h1>
<p class="headline">Refusals fell from {base.refusals} of {base.bad_prompts} to {edited.refusals} of
{edited.bad_prompts} prompts that the search has not seen, at a KL divergence of {edited.kl or 0:.3g} nats.</p>
<div class="wide">{_figures(result)}</div>
{sections}
</main>
<script>{_SCRIPT}</script>
</body>
</html>
"""


def _figures(result: RunResult) -> str:
    """Return the figures of both models as a table."""
    base, edited = result.base, result.edited
    rows = [
        ("refused, of prompts with the behaviour", base.refusals, edited.refusals, base.bad_prompts),
        ("refused, of prompts without it", base.false_refusals, edited.false_refusals, base.good_prompts),
    ]
    cells = "".join(
        f'<tr><th scope="row">{html.escape(label)}</th><td>{_count(before, n)}</td><td>{_count(after, n)}</td></tr>'
        for label, before, after, n in rows
    )
    head = '<tr><td></td><th scope="col">base model</th><th scope="col">edited model</th></tr>'
    return f"<table><caption>With 95 % Wilson intervals</caption><thead>{head}</thead><tbody>{cells}</tbody></table>"


def _count(count: int, n: int) -> str:
    low, high = wilson_interval(count, n)
    return f"{count}/{n} ({100 * low:.1f}–{100 * high:.1f} %)"


def _embed(chart: Any) -> str:
    chart.update_layout(
        paper_bgcolor="rgba(0,0,0,0)",
        plot_bgcolor="rgba(0,0,0,0)",
        margin={"l": 55, "r": 15, "t": 30, "b": 45},
        legend={"orientation": "h", "y": -0.18},
    )
    chart.update_xaxes(gridcolor="rgba(128,128,128,0.25)", zeroline=False)
    chart.update_yaxes(gridcolor="rgba(128,128,128,0.25)", zeroline=False)
    return str(plotly.io.to_html(chart, full_html=False, include_plotlyjs=False, config={"responsive": True}))


def _front(result: RunResult) -> Any:
    """Return all trials, the front and the chosen one, refusals against KL."""
    usable = [trial for trial in result.trials if trial.values.reason is None]
    chart = go.Figure()
    groups: tuple[tuple[str, Any, str, dict[str, Any]], ...] = (
        ("trials", usable, "markers", {"color": _OTHER, "size": 7, "opacity": 0.6}),
        ("Pareto front", pareto_front(result.trials), "lines+markers", {"color": _GOOD, "size": 9}),
        ("chosen", [result.chosen], "markers", {"color": _BAD, "size": 15, "symbol": "star"}),
    )
    for name, trials, mode, marker in groups:
        chart.add_scatter(
            name=name,
            x=[trial.values.refusals for trial in trials],
            y=[trial.values.kl for trial in trials],
            text=[f"trial {trial.number}" for trial in trials],
            hovertemplate="%{text}: %{x} refusals, KL %{y:.4g}<extra></extra>",
            mode=mode,
            marker=marker,
        )
    chart.update_xaxes(title=f"refusals of {len(result.prompts.bad_search)}")
    chart.update_yaxes(title="KL divergence (nats)", type="log")
    return chart


def _geometry(record: GeometryRecord) -> Any:
    """Return cosines, lengths and separation by layer, one above the other."""
    rows = (
        (
            "cosine",
            {
                "of the means": "cosine_means",
                "of direction and good mean": "cosine_good",
                "of direction and bad mean": "cosine_bad",
                "of direction and the layer's before": "cosine_previous",
            },
        ),
        ("length", {"good mean": "good_norm", "bad mean": "bad_norm", "difference": "difference_norm"}),
        ("separation", {"silhouette": "silhouette", "share of variance along the direction": "variance_share"}),
    )
    chart = make_subplots(rows=3, cols=1, shared_xaxes=True, vertical_spacing=0.06)
    for number, (title, lines) in enumerate(rows, 1):
        for name, field in lines.items():
            values = [getattr(layer, field) for layer in record.layers]
            chart.add_scatter(y=values, name=name, mode="lines+markers", row=number, col=1)
        chart.update_yaxes(title=title, row=number, col=1)
    chart.update_yaxes(type="log", row=2, col=1)
    chart.update_xaxes(title="layer", row=3, col=1)
    chart.update_layout(height=850)
    return chart


def _points(record: GeometryRecord) -> Any:
    """Return the residuals of one layer at a time, with a slider over the layers."""
    chart = go.Figure()
    shown = max(range(len(record.layers)), key=lambda i: record.layers[i].silhouette or -1.0)
    for index, layer in enumerate(record.layers):
        for trace in _classes(layer):
            chart.add_trace(trace.update(visible=index == shown))
    steps = [
        {
            "method": "update",
            "label": str(index),
            "args": [{"visible": [i // 2 == index for i in range(2 * len(record.layers))]}],
        }
        for index in range(len(record.layers))
    ]
    chart.update_layout(
        sliders=[{"steps": steps, "active": shown, "currentvalue": {"prefix": "layer "}, "pad": {"t": 70}}]
    )
    chart.update_xaxes(title="along the direction")
    chart.update_yaxes(title="first principal component of the rest")
    return chart


def _classes(layer: LayerGeometry) -> list[Any]:
    groups = (("good", layer.good_points, _GOOD, "circle"), ("bad", layer.bad_points, _BAD, "x"))
    return [
        go.Scatter(
            name=name,
            x=[point[0] for point in points],
            y=[point[1] for point in points],
            mode="markers",
            marker={"color": colour, "symbol": symbol},
        )
        for name, points, colour, symbol in groups
    ]
