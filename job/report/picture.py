"""A picture of a job's result to share: 1200 × 630 pixels, drawn without a browser, from the run folder alone.

It shows counts and the front; it holds no prompt, response, path or host.
"""

from __future__ import annotations

from pathlib import Path

from job.errors import UsageError
from job.export.canvas import Canvas
from job.export.picture import GREY, GRID, HEIGHT, INK, MARGIN, PAPER, WIDTH, footer, heading
from job.report.charts import front_chart
from job.report.plot import Axis, Series
from job.report.run_view import RunResult, RunView
from job.storage.atomic import cannot_write, write_atomically
from job.storage.run_folder import RunFolder
from job.text.divergence import kl_with_bound

# The report's own colours: trials, front, base model, chosen trial.
_COLOURS = {"trials": "#9aa4af", "Pareto front": "#0969da", "base model": "#1a7f37", "chosen": "#bc4c00"}
# Left, top, right and bottom of the chart.
_CHART = (640, 184, WIDTH - MARGIN, HEIGHT - 110)


def write_picture(folder: RunFolder, file: Path) -> None:
    """Write the picture as PNG. Raises UsageError for a job without result, or MachineError."""
    view = RunView(folder)
    if view.result is None:
        raise UsageError(f"job {view.record.job_id} has no result yet", remedy="let it finish first")
    canvas = Canvas(WIDTH, HEIGHT, PAPER)
    _draw_figures(canvas, view, view.result)
    _draw_front(canvas, view, view.result)
    try:
        write_atomically(file, canvas.png())
    except OSError as error:
        raise cannot_write(file, error) from error


def _name(view: RunView) -> str:
    """Return the model's name without owner, revision or path."""
    given = str(view.record.settings["model"]).rstrip("/")
    return given.rpartition("/")[2].partition("@")[0]


def _draw_figures(canvas: Canvas, view: RunView, result: RunResult) -> None:
    base, edited = result.base, result.edited
    heading(canvas, _name(view), str(view.record.settings.get("card", {}).get("behaviour", "refusal")))
    lines = (
        (
            f"prompts with the behaviour, {view.words.shown}",
            f"{base.refusals} to {edited.refusals} of {edited.bad_prompts}",
            54,
        ),
        (
            f"other prompts, {view.words.shown}",
            f"{base.false_refusals} to {edited.false_refusals} of {edited.good_prompts}",
            40,
        ),
        ("change of other responses", f"KL {edited.kl or 0:.3g} nats", 40),
    )
    top, width = 180, _CHART[0] - 2 * MARGIN
    for label, figure, size in lines:
        canvas.text((MARGIN, top), label, 22, GREY, width=width)
        canvas.text((MARGIN, top + 30), figure, size, INK, width=width)
        top += 50 + int(1.5 * size)
    canvas.text((MARGIN, top - 20), kl_with_bound(edited.kl or 0), 22, GREY, width=width)
    footer(canvas, result.prompts.report_description)


def _draw_front(canvas: Canvas, view: RunView, result: RunResult) -> None:
    chart = front_chart(view.compared, result.chosen, view.searched_base, len(result.prompts.bad_search), view.words)
    left, top, right, bottom = _CHART
    canvas.frame(_CHART, GRID)
    for value, text in chart.x.ticks:
        canvas.text((_across(chart.x, value), bottom + 8), text, 18, GREY, anchor="middle")
    for value, text in chart.y.ticks:
        place = _up(chart.y, value)
        canvas.box((left, place, right, place + 1), GRID)
        canvas.text((left - 8, place - 11), text, 18, GREY, anchor="right")
    canvas.text(((left + right) // 2, bottom + 34), chart.x.title, 20, GREY, width=right - left, anchor="middle")
    canvas.text((left, top - 34), chart.y.title, 20, GREY, width=right - left)
    for series in chart.series:
        _draw_series(canvas, chart.x, chart.y, series)


def _draw_series(canvas: Canvas, across: Axis, up: Axis, series: Series) -> None:
    places = [(_across(across, x), _up(up, y)) for x, y in series.points if y is not None]
    colour = _COLOURS[series.name]
    if series.kind == "line":
        canvas.line(sorted(places), 3, colour)
    named = series.name in ("chosen", "base model")
    for place in places:
        canvas.dot(place, 9 if named else 4, colour)
    if named and places:
        x, y = places[0]
        if x < (_CHART[0] + _CHART[2]) / 2:
            canvas.text((x + 16, y - 11), series.name, 18, colour)
        else:
            canvas.text((x - 16, y - 11), series.name, 18, colour, anchor="right")


def _across(axis: Axis, value: float) -> int:
    left, _, right, _ = _CHART
    return round(left + axis.share(value) * (right - left))


def _up(axis: Axis, value: float) -> int:
    _, top, _, bottom = _CHART
    return round(bottom - axis.share(value) * (bottom - top))
