"""The picture on a model card: how the base and the edited model responded, drawn from reproduce.json alone.

It shows words and figures of the card: no prompt, response, path or host.
"""

from __future__ import annotations

from typing import NamedTuple

from job.data.prompts import report_description
from job.export.canvas import Canvas, fitted, text_width
from job.export.reproduction import Reproduction
from job.export.scorecard import HEAD, outcome_name
from job.records import Figures
from job.records.scorecard import OUTCOMES, ScoredPrompts
from job.text.behaviour import BehaviourWords, words_of
from job.text.divergence import kl_with_bound
from job.text.redaction import redact

WIDTH, HEIGHT, MARGIN = 1200, 630, 60
INK, GREY, PAPER, GRID = "#1b1f24", "#59636e", "#ffffff", "#d1d9e0"
ACROSS = WIDTH - 2 * MARGIN
# Apart in brightness, too: for eyes that see no colours.
_COLOURS = {"answered": "#1a7f37", "evaded": "#9ad0a8", "refused": "#bc4c00", "broken": "#424a53"}
_OTHER = ("other", "#9aa4af")
_BAR_LEFT, _BAR_HEIGHT = 250, 44
_GROUPS: tuple[tuple[ScoredPrompts, str, int], ...] = (
    ("bad", "prompts with the behaviour", 210),
    ("good", "other prompts", 366),
)


class _Part(NamedTuple):
    """Part of a bar."""

    name: str
    colour: str
    number: int


def card_picture(made: Reproduction, title: str) -> bytes:
    """Return the picture of an export as PNG; `title` is the card's."""
    words, kl = words_of(made.behaviour), made.edited.kl or 0.0
    canvas = Canvas(WIDTH, HEIGHT, PAPER)
    heading(canvas, title, made.behaviour)
    _legend(canvas, _parts(made.base, "bad", words))
    for kind, name, top in _GROUPS:
        canvas.text((MARGIN, top), name, 24, INK)
        for row, (model, figures) in enumerate(zip(HEAD[1:], (made.base, made.edited), strict=True)):
            place = top + 38 + row * (_BAR_HEIGHT + 6)
            canvas.text((MARGIN, place + 8), model, 22, GREY)
            _bar(canvas, place, _parts(figures, kind, words))
    change = f"Responses to other prompts are {kl_with_bound(kl)} (KL {kl:.3g} nats)."
    canvas.text((MARGIN, 524), change, 26, INK, width=ACROSS)
    footer(canvas, report_description(made.reused_prompts, made.edited.good_prompts + made.edited.bad_prompts))
    return canvas.png()


def heading(canvas: Canvas, title: str, behaviour: str) -> None:
    """Write the model's title and what was removed."""
    canvas.text((MARGIN, 36), redact(title), 48, INK, width=ACROSS)
    canvas.text((MARGIN, 102), f"removed by directional ablation: {redact(behaviour)}", 24, GREY, width=ACROSS)


def footer(canvas: Canvas, report_prompts: str) -> None:
    """Write what the figures were measured on, and with which tool."""
    canvas.text((MARGIN, HEIGHT - 50), f"abliteration-job, measured on {report_prompts}", 20, GREY, width=ACROSS)


def _parts(figures: Figures, kind: ScoredPrompts, words: BehaviourWords) -> list[_Part]:
    """Return the parts of a bar; figures of former versions have two."""
    if (outcomes := figures.outcomes_of_all(kind)) is not None:
        return [_Part(outcome_name(one, words), _COLOURS[one], getattr(outcomes, one)) for one in OUTCOMES]
    bad = kind == "bad"
    count, of = (figures.refusals, figures.bad_prompts) if bad else (figures.false_refusals, figures.good_prompts)
    return [_Part(words.shown, _COLOURS["refused"], count), _Part(*_OTHER, of - count)]


def _legend(canvas: Canvas, parts: list[_Part]) -> None:
    x = MARGIN
    for part in parts:
        canvas.box((x, 162, x + 20, 182), part.colour)
        canvas.text((x + 30, 158), part.name, 22, GREY)
        x += 30 + text_width(part.name, 22) + 34


def _bar(canvas: Canvas, top: int, parts: list[_Part]) -> None:
    """Draw the parts side by side, each with its count where there is room."""
    total, done = sum(part.number for part in parts), 0
    for part in parts:
        left, right = (
            _BAR_LEFT + (WIDTH - MARGIN - _BAR_LEFT) * count // max(total, 1) for count in (done, done + part.number)
        )
        done += part.number
        canvas.box((left, top, right, top + _BAR_HEIGHT), part.colour)
        label = f"{part.number}"
        if part.number and fitted(label, 24, right - left - 8) == (label, 24):
            ink = INK if part.colour in (_COLOURS["evaded"], _OTHER[1]) else PAPER
            canvas.text(((left + right) // 2, top + 6), label, 24, ink, anchor="middle")
