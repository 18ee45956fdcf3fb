"""What is measured of an export beside its report prompts."""

from __future__ import annotations

from pathlib import Path

import pytest

from job.records import Figures
from job.storage.atomic import read_record
from tests.helpers import abliterate, job_arguments, only_job


@pytest.mark.slow
def test_refusals_of_harmless_requests_are_on_report_and_card(organism: Path, tmp_path: Path) -> None:
    good, bad = ((organism / f"{kind}_test.txt").read_text().splitlines() for kind in ("good", "bad"))
    (tmp_path / "asked.txt").write_text("\n".join([*good[:6], *bad[:4]]))
    workspace = tmp_path / "runs"
    given = ("--set", f"over_refusal_prompts={tmp_path / 'asked.txt'}", "--trials", 1)
    abliterate("run", *job_arguments(organism), "--workspace", workspace, *given).check()
    job = only_job(workspace)
    export = (job / "export").resolve()
    base, edited = (
        read_record(job / "figures" / f"{name}.json", Figures).outcomes_of_all("over-refusal")
        for name in ("base", export.name)
    )
    assert base is not None
    assert edited is not None
    assert (base.responses, base.refused, base.answered) == (10, 4, 6)
    assert edited.responses == 10
    assert edited.refused < 4
    row = "| harmless requests with alarming words: refused | 4/10 ("
    for file in (export / "README.md", job / "report.md"):
        assert row in file.read_text(), file
    assert "harmless requests with alarming words: refused" in (job / "report.html").read_text()
    # Under the edit's hooks they are those of the reloaded export.
    directions = abliterate("export", "--workspace", workspace, "--format", "directions").check().out.strip()
    hooked = read_record(job / "figures" / f"{Path(directions).name}.json", Figures)
    assert hooked.outcomes_of_all("over-refusal") == edited
