"""The space around a path of edits."""

from __future__ import annotations

import math

import pytest
from optuna.distributions import FloatDistribution
from pydantic import ValidationError

from job.records import EditParameters
from job.records.edit_path import EditPath, PathStage
from job.search.path import POSITION, SCALES, PathSpace


def stage(attention: float, mlp: float) -> PathStage:
    logits = {"attention": ((attention,), (0.0,)), "mlp": ((mlp,), (-40.0,))}
    return PathStage(beta=3.0, steps=12, logits=logits, refusals=1, kl=0.1)  # type: ignore[arg-type]


def path(directions: str | None = "1" * 64) -> EditPath:
    return EditPath(
        key="k",
        largest=1.5,
        prompts=20,
        stages=(stage(2.0, -2.0), stage(1.0, -3.0), stage(0, -4.0)),
        scales=SCALES,
        directions=directions,
    )


def params(position: float, attention: float = 1.0, mlp: float = 1.0) -> dict[str, float]:
    return {POSITION: position, "attention.scale": attention, "mlp.scale": mlp}


def test_an_edit_between_two_stages_interpolates_logits_and_scales_strengths() -> None:
    edit = PathSpace(path()).edit(params(0.25, 0.8, 1.1))
    assert edit.layer_strengths is not None
    assert edit.layer_strengths["attention"][0][0] == pytest.approx(1.5 * 0.8 / (1 + math.exp(-1.75)))
    assert edit.layer_strengths["mlp"][0][0] == pytest.approx(1.5 * 1.1 / (1 + math.exp(2.25)))
    assert 0 < edit.layer_strengths["mlp"][1][0] < 1e-16
    assert edit.directions is not None
    assert (edit.directions.sha256, edit.directions.position) == ("1" * 64, 0.25)
    assert PathSpace(path(None)).edit(params(2.0)).directions is None


def test_the_known_points_are_the_stages_as_they_ended_the_gentlest_first() -> None:
    space = PathSpace(path())
    ranges = space.distributions()
    points = space.known_points()
    assert [point[POSITION] for point in points] == [2.0, 1.0, 0.0, 2.0]
    assert [point["mlp.scale"] for point in points] == [1.0, 1.0, 1.0, 2.0]
    assert all(ranges[name]._contains(value) for point in points for name, value in point.items())
    assert all(point.keys() == ranges.keys() for point in points)
    strengths = space.edit(points[0]).layer_strengths
    assert strengths is not None
    assert strengths["attention"][0] == (0.75,)


def test_strengths_are_at_most_the_largest() -> None:
    strengths = PathSpace(path()).edit(params(0.0, 2.0, 2.0)).layer_strengths
    assert strengths is not None
    assert strengths["attention"][0] == (1.5,)  # 2.64 without the bound
    assert strengths["mlp"][0][0] == pytest.approx(3.0 / (1 + math.exp(2.0)))


def test_a_path_of_a_former_version_keeps_its_range() -> None:
    former = path().model_dump(exclude={"scales"})
    space = PathSpace(EditPath.model_validate(former))
    assert space.distributions()["mlp.scale"] == FloatDistribution(0.4, 1.2)
    assert [point["mlp.scale"] for point in space.known_points()] == [1.0, 1.0, 1.0]
    strengths = space.edit(params(0.0, 1.2)).layer_strengths
    assert strengths is not None
    assert strengths["attention"][0][0] == pytest.approx(1.8 / (1 + math.exp(-2.0)))


@pytest.mark.parametrize("scales", [(0.0, 2.0), (-1.0, 2.0), (0.4, math.inf), (0.4,)])
def test_a_range_of_scales_that_is_none_is_refused(scales: tuple[float, ...]) -> None:
    with pytest.raises(ValidationError):
        EditPath.model_validate({**path().model_dump(), "scales": scales})


@pytest.mark.parametrize(
    "wrong",
    [
        {"layer_strengths": None, "directions": {"sha256": "1" * 64, "position": 0}},
        {"layer_strengths": {"mlp": [[1.0]]}},
        {"layer_strengths": {"mlp": [[1.0]], "attention": [[1.0], [1.0]]}},
        {"layer_strengths": {"mlp": [[1.0]], "attention": [[1.0, 0.5]]}},
        {"layer_strengths": {"mlp": [[math.inf]], "attention": [[1.0]]}},
        {"layer_strengths": {"mlp": [[1.0]], "attention": [[1.0]]}, "direction_index": 1.0},
        {"layer_strengths": {"mlp": [[1.0]], "attention": [[1.0]]}, "strengths": (1.0, 0.5)},
        {"layer_strengths": {"mlp": [[1.0]], "attention": [[1.0]]}, "directions": {"sha256": "x", "position": 0}},
    ],
)
def test_strengths_that_contradict_one_another_are_refused(wrong: dict[str, object]) -> None:
    with pytest.raises(ValidationError):
        EditParameters.model_validate({"direction_index": None, "kernels": {}, **wrong})


def test_an_edit_by_kernels_is_written_as_it_was_before_there_were_others() -> None:
    kernel = {"max_weight": 1.0, "max_weight_position": 2.0, "min_weight": 0.5, "min_weight_distance": 2.0}
    edit = EditParameters.model_validate({"direction_index": 1.5, "kernels": {"mlp": kernel}, "strengths": [1, 0.5]})
    assert set(edit.model_dump()) == {"direction_index", "kernels", "strengths"}
    assert edit.strengths_by_layer(2) == {"mlp": ((0.5, 0.25), (0.75, 0.375))}


def test_strengths_are_asked_of_layers_that_the_edit_has() -> None:
    edit = PathSpace(path()).edit(params(0.0))
    assert len(edit.strengths_by_layer(2)["mlp"]) == 2
    with pytest.raises(ValueError, match="for 2 layers"):
        edit.strengths_by_layer(3)
