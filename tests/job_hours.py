"""The page of expected hours and dollars, computed by the planner for models and GPUs.

`python -m tests.job_hours --write docs/hours-and-dollars.md` writes it. `--price H200=2.50` computes it with your own
price. `--add gpu.json` first takes over the rates that `python -m benchmarks.gpu --json gpu.json` has measured.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Iterator, Mapping, Sequence
from datetime import date
from functools import cache
from pathlib import Path
from typing import Any

import torch

from benchmarks.random_models import shape
from job.config.load import default_values
from job.errors import UsageError
from job.organism.tokenizer import build_tokenizer
from job.preflight.estimate import Hours, PhaseWork, Rates, device_rates, estimate
from job.preflight.gpu_table import Card, cards, find_card, parse_on
from job.preflight.memory_plan import MemoryPlan, Workload, plan
from job.preflight.model_facts import ModelFacts
from job.preflight.planning import DESCENT_STAGES, DISK
from job.records import Record
from job.search.bounds import MOST_FINALISTS
from job.search.method import first_method, planned_trials

MEASURED = Path(__file__).parents[1] / "docs" / "measured-rates.json"
MODELS = {"7B": "Llama-2-7B", "MoE": "Qwen3-30B-A3B", "32B": "Qwen2.5-32B", "70B": "Llama-3-70B"}
COUNTS = (1, 2, 4, 8)
# A line of 400 Mb/s both ways, bytes a second.
LINE = 400e6 / 8
# Prompts of the default sets: 400 + 400 for directions, 100 + 100 to evaluate, halved into search and report.
EXTRACTION, SEARCH, PROMPT_TOKENS = 400, 50, Workload().prompt_tokens // 2


class MeasuredRates(Record):
    """Rates of one card, by `benchmarks.gpu`: operations and bytes a second."""

    card: str
    date: str
    flops: float
    bandwidth: float


def measured_rates(file: Path | None = None) -> dict[str, MeasuredRates]:
    """Return measured rates by the card's name."""
    return {one["card"]: MeasuredRates.model_validate(one) for one in json.loads((file or MEASURED).read_text("utf-8"))}


def taken_over(results: Mapping[str, Any], card: str, day: str) -> MeasuredRates:
    """Return a card's rates from a result of `benchmarks.gpu`. Raises UsageError without them."""
    for part in results["results"]:
        if "ceilings" in part:
            return MeasuredRates(card=find_card(card).name, date=day, **part["ceilings"])
    raise UsageError("these results hold no ceilings", remedy="run benchmarks.gpu with --parts ceilings")


@cache
def facts_of(model: str) -> ModelFacts:
    """Return the facts of a model of `MODELS` in bfloat16."""
    return shape(model, build_tokenizer(), torch.bfloat16, None).facts


def fitting(facts: ModelFacts, card: Card) -> tuple[int, MemoryPlan] | None:
    """Return the fewest cards that hold a model in full precision, and the plan for them."""
    answer_tokens = default_values()["scoring"]["answer_tokens"]
    work = Workload(prompt_tokens=2 * PROMPT_TOKENS, answer_tokens=answer_tokens, quantise=False, offload=False)
    for count in COUNTS:
        found = plan(facts, parse_on(f"{count}x{card.name}"), work)
        if isinstance(found, MemoryPlan):
            return count, found
    return None


def hours_of(facts: ModelFacts, rows: int, flops: float, bandwidth: float) -> Hours:
    """Return the hours of a job with the default settings, one delivery included."""
    values = default_values()
    answer_tokens, held_out = values["scoring"]["answer_tokens"], int(EXTRACTION * values["choice"]["held_out"])
    method = values["search"]["method"]
    size, trials = facts.stored_bytes, planned_trials(values.get("trials"), method)
    work = PhaseWork(
        download_bytes=size,
        weights_bytes=size,
        active_parameters=facts.active_parameters,
        direction_prompts=2 * (EXTRACTION - held_out),
        generated_prompts=SEARCH,
        compared_prompts=SEARCH,
        prompt_tokens=PROMPT_TOKENS,
        answer_tokens=min(answer_tokens / 2, values["scoring"]["search_tokens"]),
        gradient_stages=DESCENT_STAGES if first_method(method) == "gradient" else 0,
        trials=trials,
        finalist_answers=min(MOST_FINALISTS, trials) * (SEARCH + held_out),
        finalist_tokens=answer_tokens / 2,
        rows=rows,
        export_bytes=size,
        upload_bytes=size,
    )
    rates = Rates(download=LINE, upload=LINE, read=DISK, write=DISK, flops=flops, bandwidth=bandwidth)
    return estimate(work, rates)


def table(measured: Mapping[str, MeasuredRates], prices: Mapping[str, float]) -> Iterator[str]:
    """Yield the lines of the table; `prices` replace those of the table of cards, dollars an hour and card."""
    yield f"| {' | '.join(_COLUMNS)} |"
    yield "|---" * len(_COLUMNS) + "|"
    for model, name in MODELS.items():
        facts = facts_of(model)
        for card in cards():
            if (found := fitting(facts, card)) is None:
                yield f"| {name} | {card.name} | does not fit on {COUNTS[-1]} | | | | | | | |"
                continue
            count, planned = found
            known, sheet = measured.get(card.name), device_rates(parse_on(card.name))
            flops, bandwidth = (known.flops, known.bandwidth) if known else sheet or (0.0, 0.0)
            hours = hours_of(facts, planned.rows, flops, bandwidth)
            price = count * prices.get(card.name, card.price)
            search = hours.search + hours.residuals + hours.baseline
            transfers = hours.download + hours.upload
            cells = (
                *(f"{name}, {facts.stored_bytes / 1e9:.1f} GB", f"{count}x{card.name}", planned.rows),
                f"measured {known.date}" if known else "data sheet",
                *(f"{hour:.2f}, computed" for hour in (transfers, search, hours.load + hours.export)),
                *(f"{hours.total:.2f}, computed", f"{price:.2f}", f"{hours.total * price:.2f}, computed"),
            )
            yield f"| {' | '.join(map(str, cells))} |"


def page(measured: Mapping[str, MeasuredRates], prices: Mapping[str, float]) -> str:
    """Return the page."""
    known = ", ".join(f"{one.card} ({one.date})" for one in measured.values()) or "no GPU yet"
    values = default_values()
    trials = planned_trials(values.get("trials"), values["search"]["method"])
    lines = [
        _ABOUT.format(
            known=known,
            line=int(LINE * 8 / 1e6),
            disk=int(DISK / 1e6),
            stages=DESCENT_STAGES,
            trials=trials,
            tokens=PROMPT_TOKENS,
        ),
        *table(measured, prices),
    ]
    lines += ["", "| GPU | $ an hour, from | to |", "|---|---|---|"]
    lines += [f"| {card.name} | {card.dollars[0]:.2f} | {card.dollars[1]:.2f} |" for card in cards()]
    return "\n".join(lines) + "\n"


_COLUMNS = (
    *("Model", "Machine", "Rows", "Rates of the GPU", "Transfers, h", "Search, h", "Rest, h", "Job, h"),
    *("$ an hour", "$ a job"),
)
_ABOUT = """# Hours and dollars by model and GPU

How long does a job take, and what does it cost? `abliterate preflight MODEL --on 1xH200` answers for your job.
This page has the same formulas, with the default settings and the network and prompts named below. It is written by
`python -m tests.job_hours --write docs/hours-and-dollars.md`.

- **Computed** is arithmetic. No whole job was timed for this table. Its inputs are below.
- **Rates of the GPU**: "data sheet" assumes 40 % of its FLOP/s and 60 % of its bandwidth. "Measured" uses the rates of
  `python -m benchmarks.gpu`, which `--add gpu.json --card H200` enters here. Measured so far: {known}.
- **Columns**: "Rows" is the batch size. "Transfers" is download and upload. "Search" includes directions and the base
  model's responses. "Rest" is loading and export.
- **Job**: a search by gradient, {trials} trials on 50 + 50 prompts of {tokens} tokens, 640 prompts for the
  directions, up to 8 finalists, one delivery. The descent is assumed to take {stages} of at most 6 stages. "Machine"
  ignores its memory; `preflight` checks it.
- **Network**: {line} Mb/s both ways, an assumption. Twice the rate halves the transfers.
- **Disk**: {disk} MB/s for reading and writing, an assumption.
- **Machine**: the fewest cards out of 1, 2, 4 and 8 that hold the model in bfloat16, by the memory plan.
- **Dollars**: hours times the middle of the price range at the end of this page. These ranges are rough ones of rental
  markets in 2026, kept in `job/preflight/gpu_table.py`. `--price H200=2.50` computes the page with your own.
"""


def main(arguments: Sequence[str] | None = None) -> None:
    """Write or print the page."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--write", type=Path)
    parser.add_argument("--price", action="append", default=[], metavar="CARD=DOLLARS")
    parser.add_argument("--add", type=Path, metavar="FILE.json", help="results of benchmarks.gpu")
    parser.add_argument("--card", help="the card that --add measured, e.g. H200")
    given = parser.parse_args(arguments)
    measured = measured_rates()
    if given.add:
        if not given.card:
            parser.error("--add needs --card")
        rates = taken_over(json.loads(given.add.read_text("utf-8")), given.card, date.today().isoformat())
        measured[rates.card] = rates
        MEASURED.write_text(json.dumps([one.model_dump() for one in measured.values()], indent=1) + "\n")
    pairs = (text.partition("=") for text in given.price)
    text = page(measured, {find_card(card).name: float(dollars) for card, _, dollars in pairs})
    if given.write:
        given.write.write_text(text)
    else:
        print(text)


if __name__ == "__main__":
    main()
