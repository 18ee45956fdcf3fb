"""The comparison of searches: a whole job on the organism, its record and its table."""

from __future__ import annotations

import dataclasses
import json
import sys
from pathlib import Path

import pytest

from benchmarks.gradient import Cell, main, table

CELL = Cell(
    folder="llama",
    method="gradient",
    trials=24,
    seed=0,
    threads=1,
    settings=(),
    asked=(100, 100),
    refusals=0,
    kl=0.01,
    right=(100, 98),
    same=100,
    broken=2,
    base_broken=1,
    first_edit_s=19.0,
    job_s=27.0,
)


def test_the_table_has_medians_and_ranges_over_seeds() -> None:
    others = [dataclasses.replace(CELL, seed=1, refusals=3, kl=0.03, first_edit_s=None, right=(99, 90))]
    others += [
        dataclasses.replace(CELL, seed=2, refusals=1, kl=0.02, job_s=31.0),
        dataclasses.replace(CELL, method="tpe"),
    ]
    lines = table([CELL, *others])
    assert lines[2] == (
        "| llama | gradient | 24 | 3 | 1 (0 to 3)/100 | 0.02 (0.01 to 0.03) | 100 (99 to 100) | 98 (90 to 98) | 100 "
        "| 2 (base, good: 1) | 2 of 3 jobs | 27 (27 to 31) |"
    )
    assert lines[3].startswith("| llama | tpe | 24 | 1 | 0/100 | 0.01 | 100 | 98 | 100 ")
    assert table([dataclasses.replace(CELL, right=None)])[2].count("| – ") == 2


@pytest.mark.full("real")
def test_a_job_is_measured_once(
    organism: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    file, folder = tmp_path / "new" / "gradient.json", tmp_path / "llama"
    folder.mkdir()
    for name in ("model", *(prompts.name for prompts in organism.glob("*.txt"))):
        (folder / name).symlink_to(organism / name)
    (folder / "organism.json").touch()
    words = [str(folder), "--methods", "tpe:2", "--seeds", "0", "--json", str(file), "--set", "startup_trials=2"]
    monkeypatch.setattr(sys, "argv", ["gradient", *words])
    main()
    (found,) = [Cell.parsed(cell) for cell in json.loads(file.read_text())]
    assert (found.method, found.trials, found.settings) == ("tpe", 2, ("startup_trials=2",))
    assert found.right is not None
    # The organism answers good prompts as its world does, so its own responses are the right ones.
    assert found.same == found.right[0] <= found.asked[0]
    assert found.job_s > 0
    assert len(capsys.readouterr().out.splitlines()) == 4  # the command and the table
    main()
    assert len(capsys.readouterr().out.splitlines()) == 3
