"""A picture of a job's result to share: 1200 × 630 pixels, drawn without a browser, from the run folder alone.

It shows counts and the front; it holds no prompt, response, path or host.
"""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

from job.errors import UsageError
from job.report.charts import front_chart
from job.report.plot import Axis, Series
from job.report.run_view import RunResult, RunView
from job.storage.atomic import cannot_write
from job.storage.run_folder import RunFolder
from job.system.extras import require_extra
from job.text.divergence import kl_with_bound

if TYPE_CHECKING:
    from PIL.ImageDraw import ImageDraw

WIDTH, HEIGHT = 1200, 630
_MARGIN = 60
_INK, _GREY, _PAPER, _GRID = "#1b1f24", "#59636e", "#ffffff", "#d1d9e0"
# The report's own colours: trials, front, base model, chosen trial.
_COLOURS = {"trials": "#9aa4af", "Pareto front": "#0969da", "base model": "#1a7f37", "chosen": "#bc4c00"}
# Left, top, right and bottom of the chart.
_CHART = (640, 150, WIDTH - _MARGIN, HEIGHT - 110)


def write_picture(folder: RunFolder, file: Path) -> None:
    """Write the picture as PNG. Raises UsageError for a job without result or without Pillow, MachineError."""
    require_extra("PIL", "the picture")
    view = RunView(folder)
    if view.result is None:
        raise UsageError(f"job {view.record.job_id} has no result yet", remedy="let it finish first")
    from PIL import Image, ImageDraw

    image = Image.new("RGB", (WIDTH, HEIGHT), _PAPER)
    draw = ImageDraw.Draw(image)
    _draw_figures(draw, view, view.result)
    _draw_front(draw, view, view.result)
    try:
        image.save(file, "PNG", optimize=True)
    except OSError as error:
        raise cannot_write(file, error) from error


def _name(view: RunView) -> str:
    """Return the model's name without owner, revision or path."""
    given = str(view.record.settings["model"]).rstrip("/")
    return given.rpartition("/")[2].partition("@")[0]


def _draw_figures(draw: ImageDraw, view: RunView, result: RunResult) -> None:
    base, edited = result.base, result.edited
    _text(draw, (_MARGIN, 50), _name(view), 44, width=WIDTH - 2 * _MARGIN)
    _text(draw, (_MARGIN, 108), "a behaviour removed by directional ablation", 24, _GREY)
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
    top = 180
    for label, figure, size in lines:
        _text(draw, (_MARGIN, top), label, 22, _GREY)
        _text(draw, (_MARGIN, top + 30), figure, size)
        top += 50 + int(1.5 * size)
    _text(draw, (_MARGIN, top - 20), kl_with_bound(edited.kl or 0), 22, _GREY, _CHART[0] - 2 * _MARGIN)
    measured = f"abliteration-job, measured on {result.prompts.report_description}"
    _text(draw, (_MARGIN, HEIGHT - 50), measured, 20, _GREY, WIDTH - 2 * _MARGIN)


def _draw_front(draw: ImageDraw, view: RunView, result: RunResult) -> None:
    chart = front_chart(view.trials, result.chosen, view.searched_base, len(result.prompts.bad_search), view.words)
    left, top, right, bottom = _CHART
    draw.rectangle(_CHART, outline=_GRID)
    for value, text in chart.x.ticks:
        _text(draw, (_across(chart.x, value), bottom + 8), text, 18, _GREY, anchor="ma")
    for value, text in chart.y.ticks:
        place = _up(chart.y, value)
        draw.line((left, place, right, place), fill=_GRID)
        _text(draw, (left - 8, place), text, 18, _GREY, anchor="rm")
    _text(draw, ((left + right) / 2, bottom + 36), chart.x.title, 20, _GREY, anchor="ma")
    _text(draw, (left, top - 12), chart.y.title, 20, _GREY, right - left, anchor="ls")
    for series in chart.series:
        _draw_series(draw, chart.x, chart.y, series)


def _draw_series(draw: ImageDraw, across: Axis, up: Axis, series: Series) -> None:
    places = [(_across(across, x), _up(up, y)) for x, y in series.points if y is not None]
    colour = _COLOURS[series.name]
    if series.kind == "line" and len(places) > 1:
        draw.line(sorted(places), fill=colour, width=3)
    radius = 9 if series.name in ("chosen", "base model") else 4
    for x, y in places:
        draw.ellipse((x - radius, y - radius, x + radius, y + radius), fill=colour)
    if series.name in ("chosen", "base model") and places:
        x, y = places[0]
        near_left = x < (_CHART[0] + _CHART[2]) / 2
        _text(draw, (x + (16 if near_left else -16), y), series.name, 18, colour, anchor="lm" if near_left else "rm")


def _across(axis: Axis, value: float) -> float:
    left, _, right, _ = _CHART
    return left + axis.share(value) * (right - left)


def _up(axis: Axis, value: float) -> float:
    _, top, _, bottom = _CHART
    return bottom - axis.share(value) * (bottom - top)


def _text(
    draw: ImageDraw,
    place: tuple[float, float],
    text: str,
    size: int,
    colour: str = _INK,
    width: int | None = None,
    *,
    anchor: str = "la",
) -> None:
    """Draw a line of text with Pillow's own font, smaller if it would be wider than `width` pixels."""
    from PIL import ImageFont

    font = ImageFont.load_default(size)
    if width is not None and (length := draw.textlength(text, font=font)) > width:
        font = ImageFont.load_default(max(int(size * width / length), 10))
    draw.text(place, text, fill=colour, font=font, anchor=anchor)
