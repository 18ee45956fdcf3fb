"""Jobs about another behaviour than refusals: what they say, and that every preset runs from end to end."""

from __future__ import annotations

import json
import re
import shutil
from pathlib import Path

import pytest

from job.config.behaviours import BEHAVIOURS
from tests.helpers import abliterate, only_job

# The organism has none of these behaviours, and says such words whatever it is asked.
WORDS = '["glass", "light", "bell"]'


def shown(page: str) -> str:
    """Return what a page shows, without markup, style and names of elements."""
    return re.sub(r"<[^>]*>", " ", re.sub(r"<(style|script)\b.*?</\1>", " ", page, flags=re.DOTALL))


def test_report_front_and_status_speak_of_the_behaviour(finished: Path, tmp_path: Path) -> None:
    workspace = tmp_path / "runs"
    shutil.copytree(finished, workspace, symlinks=True)
    job = only_job(workspace)
    record = json.loads((job / "job.json").read_text())
    record["settings"]["card"]["behaviour"] = "flattery"
    (job / "job.json").write_text(json.dumps(record))
    for command, words in (("report", "with flattery"), ("front", "flattery ("), ("status", "flattery,")):
        ended = abliterate(command, "--workspace", workspace)
        assert ended.code == 0, ended.err
        said = ended.out.partition("last events")[0]  # events are kept as they were said
        assert words in said
        assert "refus" not in said.casefold(), command
    page = shown((job / "report.html").read_text())
    assert "Flattery on other prompts" in page
    assert "refus" not in page.casefold()
    values = json.loads(abliterate("status", "--json", "--workspace", workspace).out)["best"][0]["values"]
    assert values.keys() == {"refusals", "kl"}


@pytest.mark.full("behaviours")
@pytest.mark.parametrize("name", BEHAVIOURS[1:])
def test_a_preset_runs_from_end_to_end(name: str, organism: Path, tmp_path: Path) -> None:
    words = [str(organism / "model"), "--behaviour", name, "--trials", "4", "--workspace", str(tmp_path)]
    ended = abliterate("run", *words, "--set", f"scoring.refusal_markers={WORDS}", "--set", "search.method=tpe")
    assert ended.code == 0, ended.err
    job = only_job(tmp_path)
    said = "\n".join(json.loads(line).get("message") or "" for line in (job / "events.jsonl").read_text().splitlines())
    card, report = (job / "export" / "README.md").read_text(), (job / "report.md").read_text()
    assert f"built-in prompts {name}, sha256 " in card
    if name != "over-refusal":
        for text in (ended.out, ended.err, said, card, report, shown((job / "report.html").read_text())):
            assert "refus" not in text.casefold()
    again = abliterate(
        *("run", str(organism / "model"), "--reproduce", job / "export" / "reproduce.json"),
        *("--workspace", tmp_path / "again"),
    )
    assert again.code == 0, again.err  # the file names the built-in prompts
