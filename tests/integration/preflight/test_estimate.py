"""Time, money, leftovers and restart loops."""

from __future__ import annotations

import os
import subprocess
import sys
import time
from pathlib import Path

import pytest

from job.preflight import estimate as module
from job.preflight.estimate import PHASES, Hours, PhaseWork, Rates, cost, cost_check, device_rates, estimate, time_check
from job.preflight.gpu_table import parse_on
from job.preflight.readings import Holder, MachineReading, read_reading
from job.preflight.restarts import PastStart, restart_check
from job.preflight.strays import own_leftovers
from job.system.processes import ProcessRecord, is_alive, this_process

# Qwen2.5-Coder-32B on an H200, 200 trials of 100 + 100 prompts.
CODER = PhaseWork(
    download_bytes=65_500_000_000,
    weights_bytes=65_500_000_000,
    active_parameters=32_000_000_000,
    direction_prompts=800,
    generated_prompts=100,
    compared_prompts=100,
    prompt_tokens=50,
    answer_tokens=30,
    trials=200,
    rows=512,
    export_bytes=65_500_000_000,
    upload_bytes=65_500_000_000,
)
H200 = Rates(download=250e6, upload=100e6, read=2e9, write=1e9, flops=989e12 * 0.4, bandwidth=4.8e12 * 0.6)


def test_the_phases_by_hand() -> None:
    hours = estimate(CODER, H200)
    assert hours.download == pytest.approx(65.5 / 0.25 / 3600)
    assert hours.upload == pytest.approx(65.5 / 0.1 / 3600)
    assert hours.load == pytest.approx(65.5 / 2 / 3600)
    assert hours.export == pytest.approx(65.5 * (2 / 2 + 1 / 1) / 3600)
    # Bound by arithmetic: 2 · 32e9 · 800 · 50 operations.
    assert hours.residuals == pytest.approx(2 * 32e9 * 800 * 50 / H200.flops / 3600)
    prefill = 2 * 32e9 * 200 * 200 * 50 / H200.flops
    # 40 batches of 512 rows, 30 tokens each: arithmetic 97 s outweighs reading the weights, 27 s.
    assert hours.search == pytest.approx((prefill + 2 * 32e9 * 20_000 * 30 / H200.flops) / 3600)
    assert hours.total == pytest.approx(sum(getattr(hours, phase) for phase in module.PHASES))
    assert hours.fixed == pytest.approx(hours.total - hours.search)


def test_few_rows_are_bound_by_reading_the_weights() -> None:
    few = CODER.model_copy(update={"rows": 4, "compared_prompts": 0})
    steps = 200 * 100 / 4 * 30
    prefill = 2 * 32e9 * 20_000 * 50 / H200.flops
    assert estimate(few, H200).search == pytest.approx((prefill + steps * 65.5e9 / H200.bandwidth) / 3600)


def test_a_descent_that_reads_few_prompts_a_forward_reads_the_weights_more_often() -> None:
    slow = H200.model_copy(update={"bandwidth": 1e9})
    descent = CODER.model_copy(update={"trials": 0, "direction_prompts": 0, "gradient_stages": 5})
    seconds = [estimate(descent.model_copy(update={"gradient_rows": rows}), slow).search * 3600 for rows in (24, 6, 0)]
    # 60 steps that read 48 prompts three times, at 65.5 s a forward.
    assert seconds == pytest.approx([60 * 3 * forwards * 65.5 for forwards in (2, 8, 2)])


def test_nothing_to_do_takes_no_time() -> None:
    nothing = CODER.model_copy(update={"trials": 0, "direction_prompts": 0, "download_bytes": 0})
    hours = estimate(nothing, H200)
    assert (hours.search, hours.residuals, hours.download) == (0, 0, 0)


def test_time_and_money_against_their_limits() -> None:
    hours = Hours(download=0.5, load=0.1, residuals=0.1, baseline=0.1, search=8, export=0.1, upload=0.1)
    assert time_check(hours, None).status == "ok"
    assert time_check(hours, 10).status == "ok"
    cut = time_check(hours, 5)
    assert cut.status == "warn"
    assert "search 8.0 h" in cut.measured
    assert "--trials" in cut.remedy
    assert time_check(hours, 0.9).status == "fail"
    assert time_check(hours, None).measured.startswith("about ")
    soon = Hours(**dict.fromkeys(PHASES, 1 / 3600))
    assert time_check(soon, None).measured == "less than a minute"
    assert cost_check(hours, 2.0, None).measured == "about $18.00 at $2.00 an hour"
    assert cost_check(hours, 2.0, 17.0).status == "warn"
    assert cost_check(hours, 2.0, 1.0).status == "fail"
    assert cost_check(hours, 0.0, 1.0).status == "ok"
    unknown = cost_check(hours, None, 5.0)
    assert (unknown.status, unknown.scope) == ("fail", "job")
    assert cost_check(hours, None, None).status == "ok"
    assert cost(2, 1.5) == 3
    assert cost(2, None) is None


def test_rates_of_known_cards() -> None:
    found = device_rates(parse_on("H200"))
    assert found is not None
    assert found == pytest.approx((H200.flops, H200.bandwidth))
    recorded = read_reading(Path(__file__).parents[2] / "fakes" / "readings" / "1xA100-80.json")
    assert device_rates(recorded) == device_rates(parse_on("A100-80"))
    assert device_rates(MachineReading()) is None


WAIT = (
    "import sys; from job.system.processes import this_process\nprint(this_process().model_dump_json(), flush=True)\n\
sys.stdin.read()"
)


def test_a_leftover_of_an_earlier_run_is_found_and_not_touched() -> None:
    child = subprocess.Popen([sys.executable, "-c", WAIT], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
    assert child.stdout is not None
    record = ProcessRecord.model_validate_json(child.stdout.readline())
    try:
        assert record.pid == child.pid
        assert is_alive(record)
        # The same id with another start time, or from another boot, is another process.
        assert not is_alive(record.model_copy(update={"start_time": record.start_time + 1}))
        assert not is_alive(record.model_copy(update={"boot_id": "another"}))
        gpu = parse_on("H200").gpus[0].model_copy(update={"holders": (Holder(pid=record.pid),)})
        check = own_leftovers([record], MachineReading(gpus=(gpu,)))
        assert check.status == "fail"
        assert f"process {child.pid} on GPU 0" in check.measured
        assert f"kill {child.pid}" in check.remedy
        assert child.poll() is None
    finally:
        child.kill()
    # Killed but not waited for, its id is still taken: a zombie holds nothing.
    deadline = time.monotonic() + 10
    while is_alive(record) and time.monotonic() < deadline:
        time.sleep(0.01)
    assert child.returncode is None
    assert not is_alive(record)
    child.communicate()
    assert not is_alive(record)
    assert own_leftovers([record], MachineReading()).status == "ok"


def test_this_process_is_no_leftover() -> None:
    record = this_process()
    assert record.pid == os.getpid()
    assert is_alive(record)
    assert own_leftovers([record], MachineReading()).status == "ok"


def starts(*ends: str, progress: tuple[int, ...] = (), settings: str = "") -> list[PastStart]:
    return [
        PastStart.model_validate(
            {
                "started": index,
                "ended": end,
                "progress": index in progress,
                "settings": settings,
                "reason": f"no {index}",
            }
        )
        for index, end in enumerate(ends)
    ]


@pytest.mark.parametrize(
    ("past", "status"),
    [
        ([], "ok"),
        (starts("error", "error"), "ok"),
        (starts("error", "error", "error"), "fail"),
        (starts("error", "preempted", "error", "preempted", "error"), "fail"),
        (starts("preempted", "preempted", "preempted", "preempted"), "ok"),
        (starts("error", "error", "error", progress=(1,)), "ok"),
        (starts("error", "error", "error", progress=(0,)), "ok"),
        (starts("error", "error", "error", "error", progress=(0,)), "fail"),
        (starts("error", "error", "error", "finished"), "ok"),
        (starts("finished", "error", "error", "error"), "fail"),
        (starts(*["vanished"] * 9), "ok"),
        (starts(*["vanished"] * 10), "fail"),
        (starts("error", "error", "error", settings="other"), "ok"),
        (starts("error", settings="other") + starts("error", "error"), "ok"),
    ],
)
def test_restart_loops(past: list[PastStart], status: str) -> None:
    check = restart_check(past)
    assert check.status == status
    assert bool(check.remedy) == (status == "fail")


def test_a_loop_is_explained() -> None:
    check = restart_check(starts("error", "error", "error"))
    assert "3 failed" in check.measured
    assert "the last: no 2" in check.measured
    assert "--allow restarts.loop" in check.remedy
    assert restart_check(starts("finished")).measured == "the job is finished"
