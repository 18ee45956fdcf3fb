"""The comparison on the real model: its figures by hand, its record, its table and the page it writes."""

from __future__ import annotations

import dataclasses
import subprocess
import sys
import time
from pathlib import Path

import pytest

from benchmarks.real import BEGIN, END, Conditions, PeakMemory, Point, Record, Run, Search, measured, table, written

CONDITIONS = Conditions("inputs", 4, None, 2, 100, ("search.space=wide",))
POINTS = (Point(30.0, 0.5, 0.2), Point(30.0, 1.0, 0.0), Point(90.0, 0.02, 0.5), Point(150.0, 0.0, 1.0))
RUN = Run("this tool", 0, CONDITIONS, POINTS, 140.0, 200.0, 3 * 2**30, 1.5)


def test_figures_by_hand() -> None:
    assert RUN.volume(29) == 0
    # (0.5, 0.2) leaves half of a square from 0.2 up; (1, 0) adds nothing.
    assert RUN.volume(60) == pytest.approx(0.5 * 0.8)
    assert RUN.volume(100) == pytest.approx(0.5 * 0.8 + 0.48 * 0.5)
    assert RUN.volume() == RUN.volume(1e9) == pytest.approx(0.64)  # a KL of 1 dominates nothing
    assert RUN.first_edit() == 90.0
    assert RUN.first_edit(most_kl=0.4) is None
    assert RUN.least_kl() == 0.5
    assert RUN.least_kl(89.0) is None
    fruitless = dataclasses.replace(RUN, points=POINTS[:2])
    assert fruitless.first_edit() is None


def test_a_finished_run_is_found_again_and_only_under_its_conditions(tmp_path: Path) -> None:
    file = tmp_path / "new" / "results.json"
    Record(file).add(RUN, cores=2)
    Record(file).add(dataclasses.replace(RUN, seed=1))
    record = Record(file)
    assert record.find("this tool", 0, CONDITIONS) == RUN
    assert record.find("this tool", 1, CONDITIONS) == dataclasses.replace(RUN, seed=1)
    assert record.find("this tool", 2, CONDITIONS) is None
    assert record.find("heretic 1.4.0", 0, CONDITIONS) is None
    for other in ({"inputs": "others"}, {"trials": 5}, {"tokens": 99}, {"threads": 1}, {"settings": ()}):
        assert record.find("this tool", 0, dataclasses.replace(CONDITIONS, **other)) is None
    assert '"cores": 2' in file.read_text()


def test_the_table_has_medians_and_leaves_out_a_tool_without_runs() -> None:
    slower = dataclasses.replace(RUN, job_s=400.0, points=POINTS[:2])
    lines = table({"this tool": [RUN, slower, RUN], "heretic 1.4.0": []}, [0.5, 2])
    assert lines[0] == "|  | this tool |"
    assert "| minutes to the first edit with ≤ 2 % refusals | 1.5 (2 of 3 runs) |" in lines
    assert "| minutes to the first edit with ≤ 2 % refusals and KL ≤ 0.1 | none |" in lines
    assert "| lowest KL with ≤ 2 % refusals after 2 min | 0.5 (2 of 3 runs) |" in lines
    assert "| hypervolume after 0.5 min | 0.400 |" in lines
    assert "| trials after 2 min | 3 |" in lines
    assert "| minutes of the whole job | 3.3 |" in lines
    assert "| peak memory, GiB | 3.00 |" in lines
    both = table({"this tool": [RUN], "heretic 1.4.0": [slower]}, [])
    assert "| minutes to the first edit with ≤ 2 % refusals | 1.5 | none |" in both
    assert "| seconds a trial | 35.0 | 35.0 |" in both


def test_a_page_keeps_all_but_its_section() -> None:
    first = written("# Results\n\nOthers.\n", ["old"])
    assert first == f"# Results\n\nOthers.\n\n{BEGIN}\nold\n{END}\n"
    assert written(first + "\nAfter.\n", ["new"]) == f"# Results\n\nOthers.\n\n{BEGIN}\nnew\n{END}\n\nAfter.\n"
    assert written("", ["new"]) == f"{BEGIN}\nnew\n{END}\n"


def test_peak_memory_is_that_of_all_processes_together() -> None:
    hold = "import time; held = bytearray(b'x') * (60 << 20); time.sleep(3)"

    def two() -> Search:
        processes = [subprocess.Popen([sys.executable, "-c", hold]) for _ in range(2)]
        for process in processes:
            process.wait()
        return Search(POINTS, 2.0)

    with PeakMemory() as before:  # of the processes started earlier
        time.sleep(0.5)
    run = measured("this tool", 0, CONDITIONS, two)
    assert 120 << 20 < run.peak_bytes - before.bytes < 400 << 20
    assert run.job_s >= 3
    assert (run.points, run.search_s) == (POINTS, 2.0)
    with PeakMemory() as after:
        time.sleep(0.5)
    assert after.bytes < run.peak_bytes - (100 << 20)
