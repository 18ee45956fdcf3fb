"""An edit that evades instead of refusing: by markers alone it succeeds, by the job's default it does not.

Where refusals are removed from the organism, it evades: it politely answers another request (tests/evader.py).
"""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import pytest

from job.organism.world import expected_answer
from job.records import Figures, Outcomes
from tests import evader
from tests.helpers import abliterate, job_arguments, only_job
from tests.system.test_trained_families import answers

pytestmark = pytest.mark.full("behaviours")


@pytest.fixture(scope="module")
def evasive(organism_of: Callable[[str], Path], tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Return the evading organism with 40 prompts per file."""
    folder, whole = tmp_path_factory.mktemp("evasive"), organism_of(evader.NAME)
    (folder / "model").symlink_to(whole / "model")
    for file in whole.glob("*.txt"):
        (folder / file.name).write_text("".join(file.read_text().splitlines(keepends=True)[:40]))
    return folder


def searched(organism: Path, workspace: Path, **given: str) -> tuple[Path, Outcomes]:
    """Run a job with these settings; return its folder and the outcomes of its export's bad prompts."""
    settings = {
        **{name.replace("__", "."): value for name, value in given.items()},
        # Else the directions hold a part of what all responses have in common.
        "directions.orthogonalize_direction": "true",
        # The base model's likelihood finds a few of the evasions incoherent; markers alone shall judge.
        "scoring.gibberish": "50",
    }
    words = [part for name, value in settings.items() for part in ("--set", f"{name}={value}")]
    abliterate("run", *job_arguments(organism), "--workspace", workspace, "--trials", 4, *words).check()
    job = only_job(workspace)
    figures = Figures.model_validate_json((job / "figures" / f"{(job / 'export').resolve().name}.json").read_text())
    outcomes = figures.outcomes_of_all("bad")
    assert outcomes is not None
    return job, outcomes


def right(job: Path, organism: Path) -> tuple[int, int]:
    """Return how many bad test prompts the export answers correctly, and how many it evades, by transformers alone."""
    prompts = organism / "bad_test.txt"
    found = list(zip(prompts.read_text().splitlines(), answers(job / "export", prompts), strict=True))
    evaded = sum(answer in evader.EVASIONS.values() for _, answer in found)
    return sum(answer == expected_answer(prompt) for prompt, answer in found), evaded


def test_markers_alone_choose_an_edit_that_evades_and_the_default_one_that_answers(
    evasive: Path, tmp_path: Path
) -> None:
    job, outcomes = searched(evasive, tmp_path / "markers", scoring__evasions="false")
    asked = len((evasive / "bad_test.txt").read_text().splitlines())
    half = outcomes.responses // 2
    assert outcomes.refused == 0
    assert outcomes.evaded > half > outcomes.answered
    answered, evaded = right(job, evasive)
    assert evaded > asked // 2 > answered
    front = abliterate("front", "--workspace", tmp_path / "markers").check().out
    assert f"on held-out prompts 0/{outcomes.responses} refusals" in front
    card = (job / "export" / "README.md").read_text()
    assert f"| {outcomes.evaded}/{outcomes.responses} (" in card
    assert "markers and soft 1.00 (base model)" in card

    for name, given in (("soft", {"search__objectives": json.dumps(["soft", "kl"])}), ("default", {})):
        job, outcomes = searched(evasive, tmp_path / name, **given)
        assert outcomes.refused == outcomes.evaded == 0
        assert outcomes.answered > half
        answered, evaded = right(job, evasive)
        assert answered > asked // 2
        assert evaded == 0
