"""How long a job will take and what it will cost: arithmetic on what is known before it starts."""

from __future__ import annotations

import math

from job.preflight.checks import Check, Status
from job.preflight.gpu_table import card_of
from job.preflight.readings import MachineReading
from job.records import Record

# Shares of a card's data sheet that long matrix products and reads of the weights reach in practice.
FLOPS_SHARE = 0.4
BANDWIDTH_SHARE = 0.6
PHASES = ("download", "load", "residuals", "baseline", "search", "export", "upload")


class PhaseWork(Record):
    """What a job does.

    Attributes:
        download_bytes: What is fetched and not yet there.
        weights_bytes: The weights as loaded: read once for every forward.
        active_parameters: Weights that each token is multiplied with.
        direction_prompts: Prompts whose residuals are taken.
        generated_prompts: Prompts a trial answers.
        compared_prompts: Prompts of which a trial only compares the first token.
        prompt_tokens: Mean tokens of a prompt.
        answer_tokens: Mean tokens of an answer.
        trials: Trials still to be done.
        rows: Rows of a forward, all trials together.
        export_bytes: What the export writes.
        upload_bytes: What is uploaded, to all targets together.
    """

    download_bytes: int = 0
    weights_bytes: int
    active_parameters: int
    direction_prompts: int
    generated_prompts: int
    compared_prompts: int
    prompt_tokens: float
    answer_tokens: float
    trials: int
    rows: int
    export_bytes: int
    upload_bytes: int = 0


class Rates(Record):
    """What the machine does a second; bytes but for flops, which are operations.

    Attributes:
        download: Line inwards.
        upload: Line outwards.
        read: Disk.
        write: Disk.
        flops: Matrix products in the model's type.
        bandwidth: Memory of the device.
    """

    download: float
    upload: float
    read: float
    write: float
    flops: float
    bandwidth: float


class Work(Record):
    """What something costs at least.

    Attributes:
        flops: Operations.
        bytes: What is read from the device's memory.
    """

    flops: float
    bytes: float

    def seconds(self, flops: float, bandwidth: float) -> float:
        """Return how long it takes at so many operations and bytes a second: it is bound by one of them."""
        return max(self.flops / flops, self.bytes / bandwidth)


class Hours(Record):
    """Hours of each phase."""

    download: float
    load: float
    residuals: float
    baseline: float
    search: float
    export: float
    upload: float

    @property
    def total(self) -> float:
        """Hours of the whole job."""
        return float(sum(getattr(self, phase) for phase in PHASES))

    @property
    def fixed(self) -> float:
        """Hours that no limit on time can cut short: all but the search."""
        return self.total - self.search


def device_rates(reading: MachineReading) -> tuple[float, float] | None:
    """Return operations and bytes a second that a machine's first card reaches in practice, None if unknown.

    Layers on several cards work one after the other, so more cards make no forward faster.
    """
    card = card_of(reading.gpus[0]) if reading.gpus else None
    return None if card is None else (card.tflops * 1e12 * FLOPS_SHARE, card.bandwidth * 1e9 * BANDWIDTH_SHARE)


def estimate(task: PhaseWork, rates: Rates) -> Hours:
    """Return how long each phase will take."""
    trial = task.generated_prompts + task.compared_prompts
    search = _answers(task, rates, task.trials * task.generated_prompts)
    search += _prefill(task, rates, task.trials * task.compared_prompts)
    seconds = Hours(
        download=task.download_bytes / rates.download,
        load=task.weights_bytes / min(rates.read, rates.bandwidth),
        residuals=_prefill(task, rates, task.direction_prompts),
        # The unedited model answers once what a trial does, on the search split and on the reported one.
        baseline=2 * _answers(task, rates, trial),
        search=search,
        # Each shard is read, edited and written; the written one is read again to verify it.
        export=task.export_bytes * (2 / rates.read + 1 / rates.write),
        upload=task.upload_bytes / rates.upload,
    )
    return Hours(**{phase: getattr(seconds, phase) / 3600 for phase in PHASES})


def _prefill(task: PhaseWork, rates: Rates, prompts: int) -> float:
    """Return the seconds of reading prompts: each forward is bound by arithmetic or by reading the weights."""
    return _forwards(task, math.ceil(prompts / task.rows), prompts * task.prompt_tokens, rates)


def _answers(task: PhaseWork, rates: Rates, prompts: int) -> float:
    """Return the seconds of reading prompts and answering them, a token of every row at a time."""
    steps = math.ceil(prompts / task.rows) * task.answer_tokens
    return _prefill(task, rates, prompts) + _forwards(task, steps, prompts * task.answer_tokens, rates)


def _forwards(task: PhaseWork, forwards: float, tokens: float, rates: Rates) -> float:
    """Return the seconds of so many forwards that take so many tokens together."""
    work = Work(flops=2 * task.active_parameters * tokens, bytes=forwards * task.weights_bytes)
    return work.seconds(rates.flops, rates.bandwidth)


def cost(hours: float, price: float | None) -> float | None:
    """Return what so many hours cost at a price an hour, dollars; None without a price."""
    return None if price is None else hours * price


def time_check(hours: Hours, most_hours: float | None) -> Check:
    """Compare the estimate with the hours allowed; a search cut short is exported all the same."""
    parts = ", ".join(f"{phase} {_duration(getattr(hours, phase))}" for phase in PHASES if getattr(hours, phase))
    status, remedy = _verdict(hours.total, hours.fixed, most_hours, "--max-hours")
    return Check(
        name="estimate.time",
        status=status,
        measured=f"about {_duration(hours.total)}: {parts}",
        needed="any time" if most_hours is None else f"{_duration(most_hours)} at most",
        remedy=remedy,
    )


def cost_check(hours: Hours, price: float | None, most_dollars: float | None) -> Check:
    """Compare the estimate with the dollars allowed; without a price a limit cannot be kept."""
    if price is None:
        return Check(
            name="estimate.cost",
            status="ok" if most_dollars is None else "fail",
            measured="the price of an hour is not known",
            needed="any cost" if most_dollars is None else f"${most_dollars:.2f} at most",
            remedy="" if most_dollars is None else "give --price",
            scope="job",
        )
    limit = None if most_dollars is None else (most_dollars / price if price > 0 else math.inf)
    status, remedy = _verdict(hours.total, hours.fixed, limit, "--max-cost")
    return Check(
        name="estimate.cost",
        status=status,
        measured=f"about ${hours.total * price:.2f} at ${price:.2f} an hour",
        needed="any cost" if most_dollars is None else f"${most_dollars:.2f} at most",
        remedy=remedy,
    )


def _verdict(total: float, fixed: float, most: float | None, option: str) -> tuple[Status, str]:
    if most is None or total <= most:
        return "ok", ""
    if fixed >= most:
        return "fail", f"what comes before and after the search takes longer: raise {option} or choose a faster machine"
    return "warn", f"the search will be cut short and its best exported: raise {option} or lower --trials"


def _duration(hours: float) -> str:
    """Return hours for people: "42 s", "13 min", "2.5 h"."""
    seconds = hours * 3600
    if seconds < 90:
        return f"{seconds:.0f} s"
    return f"{seconds / 60:.0f} min" if hours < 1.5 else f"{hours:.1f} h"
