"""Estimate a job's time and cost before it starts."""

from __future__ import annotations

import math

from job.gradient.recipe import Recipe
from job.preflight.checks import Check, Status
from job.preflight.gpu_table import card_of
from job.preflight.readings import MachineReading
from job.records import Record

# Shares of a card's data sheet that long matrix products and reads of the weights reach in practice.
FLOPS_SHARE = 0.4
BANDWIDTH_SHARE = 0.6
# Below this many hours, what the estimate leaves out takes longer: starting, checks and reports.
_SOON = 30 / 3600
PHASES = ("download", "load", "residuals", "baseline", "search", "export", "upload")


class PhaseWork(Record):
    """Work of a job.

    Attributes:
        weights_bytes: Loaded weights, read once per forward.
        active_parameters: Weights multiplied with each token.
        direction_prompts: Prompts for residuals.
        generated_prompts: Prompts that a trial answers.
        compared_prompts: Prompts whose first response token a trial compares.
        gradient_stages: Stages of the descent before the search; 0 without one.
        gradient_rows: Prompts per forward of the descent; 0: the whole minibatch in one forward.
        finalist_answers: Responses of all finalists together, each of `finalist_tokens` tokens.
    """

    download_bytes: int = 0
    weights_bytes: int
    active_parameters: int
    direction_prompts: int
    generated_prompts: int
    compared_prompts: int
    gradient_stages: int = 0
    gradient_rows: int = 0
    prompt_tokens: float
    answer_tokens: float
    trials: int
    finalist_answers: int = 0
    finalist_tokens: float = 0.0
    rows: int
    export_bytes: int
    upload_bytes: int = 0


class Rates(Record):
    """Rates of a machine per second, in bytes; `flops` in operations of matrix products in the model's type.

    `bandwidth` is that of the device's memory; `read` and `write` are the disk's.
    """

    download: float
    upload: float
    read: float
    write: float
    flops: float
    bandwidth: float


class Work(Record):
    """Lower bounds for a computation's arithmetic operations and memory traffic in bytes."""

    flops: float
    bytes: float

    def seconds(self, flops: float, bandwidth: float) -> float:
        """Return the seconds at given rates: the larger of arithmetic and memory time."""
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
        """Hours that no time limit can shorten: all except the search."""
        return self.total - self.search


def device_rates(reading: MachineReading) -> tuple[float, float] | None:
    """Return practical operations and bytes per second of one card; layers on several cards run in sequence."""
    card = card_of(reading.gpus[0]) if reading.gpus else None
    return None if card is None else (card.tflops * 1e12 * FLOPS_SHARE, card.bandwidth * 1e9 * BANDWIDTH_SHARE)


def estimate(task: PhaseWork, rates: Rates) -> Hours:
    """Return the duration of each phase."""
    trial = task.generated_prompts + task.compared_prompts
    search = _answers(task, rates, task.trials * task.generated_prompts)
    search += _prefill(task, rates, task.trials * task.compared_prompts) + _descent(task, rates)
    if task.finalist_answers:
        full = task.model_copy(update={"answer_tokens": task.finalist_tokens})
        search += _answers(full, rates, task.finalist_answers)
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


def _descent(task: PhaseWork, rates: Rates) -> float:
    """Return the seconds of the descent: a step reads prompts of both kinds, forward, again and backward.

    With frozen weights a backward takes the operations of one forward.
    """
    recipe = Recipe()
    read = task.model_copy(
        update={"rows": task.gradient_rows or recipe.batch, "prompt_tokens": task.prompt_tokens + recipe.kl_tokens}
    )
    step = 3 * _prefill(read, rates, 2 * recipe.batch)
    # A stage ends with targets and scores for the prompts of the directions.
    return task.gradient_stages * (recipe.steps * step + _answers(task, rates, task.direction_prompts))


def _prefill(task: PhaseWork, rates: Rates, prompts: int) -> float:
    """Return the seconds of prefilling: each forward is bound by arithmetic or by reading weights."""
    return _forwards(task, math.ceil(prompts / task.rows), prompts * task.prompt_tokens, rates)


def _answers(task: PhaseWork, rates: Rates, prompts: int) -> float:
    steps = math.ceil(prompts / task.rows) * task.answer_tokens
    return _prefill(task, rates, prompts) + _forwards(task, steps, prompts * task.answer_tokens, rates)


def _forwards(task: PhaseWork, forwards: float, tokens: float, rates: Rates) -> float:
    work = Work(flops=2 * task.active_parameters * tokens, bytes=forwards * task.weights_bytes)
    return work.seconds(rates.flops, rates.bandwidth)


def cost(hours: float, price: float | None) -> float | None:
    """Return the dollars of some hours at a price per hour; None without a price."""
    return None if price is None else hours * price


def time_check(hours: Hours, most_hours: float | None) -> Check:
    """Compare the estimate with the time limit; a shortened search is still exported."""
    parts = ", ".join(f"{phase} {_duration(getattr(hours, phase))}" for phase in PHASES if getattr(hours, phase))
    status, remedy = _verdict(hours.total, hours.fixed, most_hours, "--max-hours")
    return Check(
        name="estimate.time",
        status=status,
        measured="less than a minute" if hours.total < _SOON else f"about {_duration(hours.total)}: {parts}",
        needed="any time" if most_hours is None else f"{_duration(most_hours)} at most",
        remedy=remedy,
    )


def cost_check(hours: Hours, price: float | None, most_dollars: float | None) -> Check:
    """Compare the estimate with the cost limit, which needs a price."""
    if price is None:
        return Check(
            name="estimate.cost",
            status="ok" if most_dollars is None else "fail",
            measured="the price per hour is unknown",
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
        return "fail", f"raise {option} or choose a faster machine: the phases around the search alone take longer"
    return "warn", f"raise {option} or lower --trials: the search will be cut short and its best trial exported"


def _duration(hours: float) -> str:
    seconds = hours * 3600
    if seconds < 90:
        return f"{seconds:.0f} s"
    return f"{seconds / 60:.0f} min" if hours < 1.5 else f"{hours:.1f} h"
