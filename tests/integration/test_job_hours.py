"""The page of hours and dollars is current, and follows measured rates and the reader's prices."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from job.errors import UsageError
from job.preflight.gpu_table import cards
from tests.job_hours import MODELS, MeasuredRates, main, measured_rates, page, table, taken_over

PAGE = Path(__file__).parents[2] / "docs" / "hours-and-dollars.md"
CEILINGS = {"flops": 6e14, "bandwidth": 4e12}
RESULTS = {"device": "cuda", "results": [{"part": "hooks"}, {"part": "ceilings", "ceilings": CEILINGS}]}


def cells(lines: list[str], model: str, machine: str) -> list[str]:
    """Return the cells of a row but its first two."""
    rows = [[cell.strip() for cell in line.strip("|").split("|")] for line in lines]
    return next(row[2:] for row in rows if row[0].startswith(model) and row[1] == machine)


def test_the_page_is_current() -> None:
    """`python -m tests.job_hours --write docs/hours-and-dollars.md` makes it so."""
    text = PAGE.read_text("utf-8")
    assert text == page(measured_rates(), {})
    assert sum(line.endswith("computed |") for line in text.splitlines()) == len(MODELS) * len(cards())


def test_measured_rates_and_given_prices_change_their_rows_alone() -> None:
    before = PAGE.read_text("utf-8").splitlines()
    known = {"H200": taken_over(RESULTS, "h200", "2026-12-02")}
    assert known["H200"] == MeasuredRates(card="H200", date="2026-12-02", **CEILINGS)
    after = list(table(known, {"H200": 6.2}))
    old, new = (cells(lines, "Llama-3-70B", "1xH200") for lines in (before, after))
    assert (old[1], new[1]) == ("data sheet", "measured 2026-12-02")
    assert float(new[3].split(",")[0]) < float(old[3].split(",")[0])
    assert (old[2], old[6], new[6]) == (new[2], "3.10", "6.20")
    assert float(new[7].split(",")[0]) == pytest.approx(6.2 * float(new[5].split(",")[0]), abs=0.04)
    for line in after:
        assert "1xH200" in line or line in before


def test_results_are_entered_by_command(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    file = tmp_path / "rates.json"
    file.write_text("[]")
    monkeypatch.setattr("tests.job_hours.MEASURED", file)
    (tmp_path / "gpu.json").write_text(json.dumps(RESULTS))
    main(["--add", str(tmp_path / "gpu.json"), "--card", "H200", "--write", str(tmp_path / "page.md")])
    assert measured_rates(file)["H200"].flops == CEILINGS["flops"]
    assert "Measured so far: H200 (" in (tmp_path / "page.md").read_text()
    with pytest.raises(UsageError, match="no ceilings"):
        taken_over({"results": []}, "H200", "2026-12-02")
