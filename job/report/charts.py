"""Charts of report.html: the trials, the path of the gradient, an edit's strengths and the geometry of directions."""

from __future__ import annotations

from collections.abc import Sequence

from job.records import EditParameters, GeometryRecord, LayerGeometry, Trial
from job.records.edit_path import EditPath
from job.report.plot import Axis, Chart, Series, layer_axis, linear_axis, log_axis
from job.search.pareto import pareto_front
from job.text.behaviour import REFUSAL_WORDS, BehaviourWords

# Looks of page.css.
_BLUE, _ORANGE, _GREEN, _GREY = range(4)
_KL = "KL divergence (nats)"
# A linear axis of KL ends at this multiple of the front's largest: trials beyond would flatten the rest.
_LINEAR_TOP = 2.5
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
    """Return the trials plotted in the front chart."""
    return [trial for trial in trials if trial.values.reason is None]


def front_chart(
    trials: Sequence[Trial],
    chosen: Trial | None,
    base: int | None,
    asked: int,
    words: BehaviourWords = REFUSAL_WORDS,
    *,
    linear: bool = False,
) -> Chart:
    """Return the chart of unanswered prompts, of `asked`, against KL.

    `base` is the base model's count, None if unknown. A linear axis leaves out trials far above the front.
    """
    shown, front = usable(trials), pareto_front(trials)
    if linear:
        shown = [trial for trial in shown if trial.values.kl <= linear_top(trials)]
    series = [_trials("trials", "dots", _GREY, shown, words), _trials("Pareto front", "line", _BLUE, front, words)]
    if base is not None:
        label = f"base model: {base} of {asked}"
        series.append(Series("base model", "diamond", _GREEN, [(base, 0.0)], [label], "base model"))
    if chosen is not None:
        series.append(_trials("chosen", "star", _ORANGE, [chosen], words, f"chosen: trial {chosen.number}"))
    points = [(x, y or 0.0) for one in series for x, y in one.points]
    broken = any(trial.values.broken for trial in shown)
    across = linear_axis(
        f"{words.shown}{' or broken' if broken else ''}, of {asked} prompts", [x for x, _ in points], whole=True
    )
    kl = [y for _, y in points]
    up = linear_axis(_KL, [0.0, *kl]) if linear else log_axis(_KL, kl)
    return Chart("chart-front-linear" if linear else "chart-front", across, up, tuple(series), height=420)


def linear_top(trials: Sequence[Trial]) -> float:
    """Return the largest KL on the linear axis."""
    return _LINEAR_TOP * max((trial.values.kl for trial in pareto_front(trials)), default=0.0)


def _trials(name: str, kind: str, look: int, trials: Sequence[Trial], words: BehaviourWords, label: str = "") -> Series:
    points = [(float(trial.values.unanswered), trial.values.kl) for trial in trials]
    return Series(name, kind, look, points, [_tip(trial, words) for trial in trials], label, [t.number for t in trials])  # type: ignore[arg-type]


def _tip(trial: Trial, words: BehaviourWords) -> str:
    broken = f", {trial.values.broken} broken" if trial.values.broken else ""
    others = "".join(f", {name} {score}" for name, score in trial.values.others.items())
    projected = " (projected)" if trial.values.projected_from else ""
    shown = f"{trial.values.refusals} {words.shown}{broken}{projected}"
    return f"trial {trial.number}: {shown}{others}, KL {trial.values.kl:.4g}"


def path_charts(path: EditPath, words: BehaviourWords = REFUSAL_WORDS) -> list[Chart]:
    """Return charts of responses with the behaviour and KL at the ends of the gradient's stages."""
    ticks = tuple((float(stage), str(stage)) for stage in range(1, len(path.stages) + 1))
    across = Axis("stage", 0.7, len(path.stages) + 0.3, ticks)
    unanswered = [float(stage.refusals + stage.broken) for stage in path.stages]
    kl = [stage.kl for stage in path.stages]
    axes = (
        (
            "refusals",
            unanswered,
            linear_axis(f"{words.shown} or broken, of {path.prompts}", [0.0, *unanswered], whole=True),
        ),
        ("kl", kl, log_axis(_KL, kl)),
    )
    return [
        Chart(
            f"chart-path-{name}",
            across,
            up,
            (Series(name, "line", _BLUE, _numbered(values, 1), [f"stage {i}: {v:.4g}" for i, v in _stages(values)]),),
            height=300,
        )
        for name, values, up in axes
    ]


def _stages(values: Sequence[float]) -> list[tuple[int, float]]:
    return list(enumerate(values, 1))


def _numbered(values: Sequence[float | None], first: int = 0) -> list[tuple[float, float | None]]:
    return [(float(index), value) for index, value in enumerate(values, first)]


def strengths(edit: EditParameters, layers: int) -> dict[str, list[float]]:
    """Return an edit's strength per component and layer: the strongest of several directions."""
    if edit.layer_strengths is not None:
        return {component: [max(layer) for layer in given] for component, given in edit.layer_strengths.items()}
    peak = edit.model_copy(update={"strengths": (1.0,)})
    return {
        component: [strength for (strength,) in given] for component, given in peak.strengths_by_layer(layers).items()
    }


def strength_chart(edit: EditParameters, layers: int) -> Chart:
    """Return the chart of an edit's strength by layer and component, with a line at 1."""
    found = strengths(edit, layers)
    series = tuple(
        Series(name, "bars", look, _numbered(values), [f"layer {i}, {name}: {v:.3f}" for i, v in enumerate(values)])
        for look, (name, values) in enumerate(found.items())
    )
    top = max(1.0, *(value for values in found.values() for value in values)) * 1.08
    up = linear_axis("strength of the ablation", [0.0, top], padded=False)
    return Chart("chart-strength", layer_axis(layers), up, series, ((1.0, "1: the whole direction"),))


def geometry_charts(record: GeometryRecord) -> list[Chart]:
    """Return charts of cosines, norms and separation by layer."""
    return [
        _lines(record.layers, title, fields, f"chart-geometry-{number}")
        for number, (title, fields) in enumerate(GEOMETRY)
    ]


def _lines(layers: Sequence[LayerGeometry], title: str, fields: dict[str, str], name: str) -> Chart:
    series = []
    for look, (label, field) in enumerate(fields.items()):
        values: list[float | None] = [getattr(layer, field) for layer in layers]
        tips = [f"layer {i}, {label}: {'–' if value is None else f'{value:.3g}'}" for i, value in enumerate(values)]
        series.append(Series(label, "line", look, _numbered(values), tips))
    known = [y for one in series for _, y in one.points if y is not None]
    return Chart(name, layer_axis(len(layers)), linear_axis(title, known), tuple(series))


def best_layer(record: GeometryRecord) -> int:
    """Return the layer with the largest separation of the classes."""
    return max(range(len(record.layers)), key=lambda index: record.layers[index].silhouette or -1.0)


def points_chart(layer: LayerGeometry, number: int) -> Chart:
    """Return the chart of the residuals of a layer's sampled prompts."""
    good, bad = ([(point[0], point[1]) for point in points] for points in (layer.good_points, layer.bad_points))
    both = good + bad
    return Chart(
        f"chart-points-{number}",
        linear_axis("along the direction", [x for x, _ in both]),
        linear_axis("across: main component of the rest", [y for _, y in both]),
        (Series("good", "dots", _BLUE, good), Series("bad", "crosses", _ORANGE, bad)),
        height=400,
    )
