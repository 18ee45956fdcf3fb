"""Where trials were computed, in the report."""

from __future__ import annotations

from job.report.results import machines

LOADED = {"event": "loaded", "hardware": "2 × NVIDIA H100"}


def trial(number: int) -> dict[str, object]:
    return {"event": "trial", "number": number}


def worker(hardware: str) -> dict[str, object]:
    return {"event": "worker_started", "hardware": hardware}


def test_trials_are_named_with_the_machine_that_computed_them() -> None:
    events = [LOADED, worker("NVIDIA H100"), trial(0), trial(1), {"event": "loaded", "hardware": "CPU"}, trial(2)]
    assert machines(events) == (("2 × NVIDIA H100", "0–1"), ("CPU", "2"))


def test_workers_of_another_kind_are_named_once_from_their_first_trial_on() -> None:
    events = [LOADED, trial(0), worker("NVIDIA L4"), worker("NVIDIA L4"), trial(1), LOADED, trial(2)]
    mixed = "2 × NVIDIA H100 and NVIDIA L4"
    assert machines(events) == (("2 × NVIDIA H100", "0"), (mixed, "1"), ("2 × NVIDIA H100", "2"))
