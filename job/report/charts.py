"""Charts of report.html, as HTML that needs plotly.js on its page and no network.

They have no background and inherit the text colour: they suit light and dark pages.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import plotly.graph_objects as go
import plotly.io

from job.records import EditParameters, GeometryRecord, LayerGeometry, Trial
from job.search.pareto import pareto_front

# Contrast of 3:1 with white and the dark page; lines and markers differ as well, for colour-blind readers.
_BLUE, _ORANGE, _GREY, _GREEN = "#3b7dd8", "#cf6c00", "#808080", "#2e8f5b"
_DASHES = ("solid", "dash", "dot", "dashdot")
_SYMBOLS = ("circle", "square", "diamond", "x")
_COLOURS = (_BLUE, _ORANGE, _GREEN, _GREY)
# A divergence of 0 on a logarithmic axis.
_LEAST_KL = 1e-6
# Lines of the geometry: axis title, and field by name.
GEOMETRY = (
    (
        "cosine",
        {
            "of the two means": "cosine_means",
            "of direction and good mean": "cosine_good",
            "of direction and bad mean": "cosine_bad",
            "of direction and the layer's before": "cosine_previous",
        },
    ),
    ("length", {"good mean": "good_norm", "bad mean": "bad_norm", "difference of the means": "difference_norm"}),
    ("separation", {"silhouette": "silhouette", "share of variance along the direction": "variance_share"}),
)
GEOMETRY_FIELDS = {label: field for _, fields in GEOMETRY for label, field in fields.items()}


def usable(trials: Sequence[Trial]) -> list[Trial]:
    """Return the trials plotted in the front chart, in the order of its points."""
    return [trial for trial in trials if trial.values.reason is None]


def front_chart(trials: Sequence[Trial], chosen: Trial | None, asked: int) -> str:
    """Return the chart of refusals against KL: trials, front and chosen one; trace 0 is `usable`."""
    chart = go.Figure()
    groups: tuple[tuple[str, Sequence[Trial], str, dict[str, Any]], ...] = (
        ("trials", usable(trials), "markers", {"color": _GREY, "size": 8, "opacity": 0.7}),
        ("Pareto front", pareto_front(trials), "lines+markers", {"color": _BLUE, "size": 9}),
        ("chosen", [chosen] if chosen else [], "markers", {"color": _ORANGE, "size": 16, "symbol": "star"}),
    )
    for name, points, mode, marker in groups:
        chart.add_scatter(
            name=name,
            x=[trial.values.refusals for trial in points],
            y=[max(trial.values.kl, _LEAST_KL) for trial in points],
            text=[f"trial {t.number}<br>{t.values.refusals} refusals, KL {t.values.kl:.4g}" for t in points],
            hovertemplate="%{text}<extra></extra>",
            mode=mode,
            marker=marker,
        )
    chart.update_xaxes(title=f"refusals of {asked} prompts", range=[-0.04 * asked, 1.04 * asked])
    chart.update_yaxes(title="KL divergence (nats)", type="log", **_log_ticks([t.values.kl for t in usable(trials)]))
    return _embed(chart, "chart-front", 400)


def strengths(edit: EditParameters, layers: int) -> dict[str, list[float]]:
    """Return an edit's strength per component and layer: the strongest of several directions."""
    if edit.layer_strengths is not None:
        return {component: [max(layer) for layer in given] for component, given in edit.layer_strengths.items()}
    peak = edit.model_copy(update={"strengths": (1.0,)})
    return {
        component: [strength for (strength,) in given] for component, given in peak.strengths_by_layer(layers).items()
    }


def strength_chart(edit: EditParameters, layers: int) -> str:
    """Return the chart of an edit's strength by layer and component."""
    chart = go.Figure()
    for (name, values), colour, pattern in zip(
        strengths(edit, layers).items(), (_BLUE, _ORANGE), ("", "/"), strict=False
    ):
        chart.add_bar(
            name=name,
            x=list(range(layers)),
            y=values,
            marker={"color": colour, "pattern": {"shape": pattern}},
            hovertemplate="layer %{x}: %{y:.3f}<extra>" + name + "</extra>",
        )
    chart.update_layout(barmode="group", bargap=0.25)
    chart.update_xaxes(title="layer", **_layer_ticks(layers))
    chart.update_yaxes(title="strength of the ablation", rangemode="tozero")
    return _embed(chart, "chart-strength", 320)


def geometry_charts(record: GeometryRecord) -> str:
    """Return charts of cosines, norms and separation by layer."""
    return "".join(
        _lines(record.layers, title, fields, f"chart-geometry-{number}")
        for number, (title, fields) in enumerate(GEOMETRY)
    )


def _lines(layers: Sequence[LayerGeometry], title: str, fields: dict[str, str], name: str) -> str:
    chart = go.Figure()
    for (label, field), colour, dash, symbol in zip(fields.items(), _COLOURS, _DASHES, _SYMBOLS, strict=False):
        chart.add_scatter(
            name=label,
            y=[getattr(layer, field) for layer in layers],
            mode="lines+markers",
            line={"color": colour, "dash": dash},
            marker={"color": colour, "symbol": symbol, "size": 7},
            hovertemplate="layer %{x}: %{y:.3g}<extra>" + label + "</extra>",
        )
    chart.update_xaxes(title="layer", **_layer_ticks(len(layers)))
    chart.update_yaxes(title=title)
    return _embed(chart, name, 320)


def best_layer(record: GeometryRecord) -> int:
    """Return the layer with the largest separation of the classes."""
    return max(range(len(record.layers)), key=lambda index: record.layers[index].silhouette or -1.0)


def points_chart(record: GeometryRecord) -> str:
    """Return the chart of the residuals, one layer visible: two traces per layer, good and bad."""
    chart, shown = go.Figure(), best_layer(record)
    for index, layer in enumerate(record.layers):
        groups = (("good", layer.good_points, _BLUE, "circle"), ("bad", layer.bad_points, _ORANGE, "x"))
        for name, points, colour, symbol in groups:
            chart.add_scatter(
                name=name,
                x=[round(point[0], 4) for point in points],
                y=[round(point[1], 4) for point in points],
                mode="markers",
                marker={"color": colour, "symbol": symbol},
                visible=index == shown,
                hovertemplate="along %{x:.3g}, across %{y:.3g}<extra>" + name + "</extra>",
            )
    chart.update_xaxes(title="along the direction")
    chart.update_yaxes(title="across: main component of the rest")
    return _embed(chart, "chart-points", 400)


def _log_ticks(values: Sequence[float]) -> dict[str, Any]:
    shown = [max(value, _LEAST_KL) for value in values]
    several = bool(shown) and max(shown) > 30 * min(shown)
    return {"exponentformat": "none", "tickformat": "~g", **({"dtick": 1} if several else {})}


def _layer_ticks(layers: int) -> dict[str, Any]:
    return {"dtick": max(1, round(layers / 12)), "tick0": 0}


def _embed(chart: Any, name: str, height: int) -> str:
    chart.update_layout(
        template="none",
        paper_bgcolor="rgba(0,0,0,0)",
        plot_bgcolor="rgba(0,0,0,0)",
        height=height,
        margin={"l": 60, "r": 10, "t": 10, "b": 45},
        legend={"orientation": "h", "x": 0, "y": 1.02, "yanchor": "bottom"},
        hovermode="closest",
        dragmode=False,
        font={"size": 13, "family": "system-ui, sans-serif"},
    )
    # With a fixed range, swipes over a chart scroll the page.
    axis = {"gridcolor": "rgba(128,128,128,0.3)", "zeroline": False, "fixedrange": True, "automargin": True}
    chart.update_xaxes(**axis)
    chart.update_yaxes(**axis)
    return str(
        plotly.io.to_html(
            chart,
            full_html=False,
            include_plotlyjs=False,
            div_id=name,
            default_height=f"{height}px",
            config={"responsive": True, "displayModeBar": False},
        )
    )
