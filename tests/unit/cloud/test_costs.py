"""The tables of docs/costs.md match the code."""

from __future__ import annotations

from pathlib import Path

import pytest

from job.preflight.estimate import PhaseWork, Rates, device_rates, estimate
from job.preflight.gpu_table import find_card, parse_on

ROWS = [
    [cell.strip() for cell in line.strip("|").split("|")]
    for line in (Path(__file__).parents[3] / "docs" / "costs.md").read_text("utf-8").splitlines()
    if line.startswith(("| 7B", "| 32B", "| 70B"))
]
PARAMETERS = {"7B": 7.6e9, "32B": 32.8e9, "70B": 70.6e9}


@pytest.mark.parametrize("row", ROWS, ids=lambda row: f"{row[0].split(',')[0]} on {row[1]}")
def test_the_table_of_jobs(row: list[str]) -> None:
    model, machine, rows, *stated = row
    name, gigabytes = model.removesuffix(" GB").split(", ")
    size = int(float(gigabytes) * 1e9)
    task = PhaseWork(
        download_bytes=size,
        weights_bytes=size,
        active_parameters=int(PARAMETERS[name]),
        direction_prompts=800,
        generated_prompts=50,
        compared_prompts=50,
        prompt_tokens=40,
        answer_tokens=50,
        trials=200,
        rows=int(rows),
        export_bytes=size,
        upload_bytes=size,
    )
    reading = parse_on(machine)
    found = device_rates(reading)
    assert found is not None
    line = 400e6 / 8
    hours = estimate(task, Rates(download=line, upload=line, read=1e9, write=5e8, flops=found[0], bandwidth=found[1]))
    price = find_card(reading.gpus[0].name).price * len(reading.gpus)
    assert stated == [
        f"{hours.download + hours.upload:.2f}",
        f"{hours.search + hours.residuals + hours.baseline:.2f}",
        f"{hours.load + hours.export:.2f}",
        f"{hours.total:.1f}",
        f"{price:.2f}",
        f"{hours.total * price:.2f}",
    ]


def test_there_is_a_table() -> None:
    assert len(ROWS) == 9
