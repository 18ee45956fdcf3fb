"""Random models with the shapes of real ones: each phase's time against the roofline, and its memory.

python -m benchmarks.shapes [SHAPE ...] [--trials K] [--rows N] [--prompts N] [--tokens N] [--layers N]
                            [--device cuda] [--json FILE]

SHAPE: 0.5B, 7B, 32B, MoE, tiny. Default: 0.5B on a CPU and the larger ones on a GPU. Each runs in its own process, in
float32 on a CPU and bfloat16 on a GPU. The phases are the job's own: residuals, mean difference, hooks, the base
model's figures, and K trials in one batch, without disk access. Each trial uses an eighth of --prompts good prompts and
the same number of bad ones. A random model neither refuses nor ends, so every response has full length: the longest
possible trial.

The roofline sums over all forwards the larger of operations and bytes, each divided by the device's measured rate
(benchmarks/roofline.py). Seconds on a CPU are the process' own, with wall-clock seconds beside them. Memory is beyond
what the process held before the model; on a GPU it is what torch allocated.
"""

from __future__ import annotations

import argparse
import multiprocessing
import statistics
from concurrent.futures import ProcessPoolExecutor
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path
from typing import Any

import optuna
import torch
from torch import Tensor
from transformers import PreTrainedTokenizerFast

from benchmarks.measuring import Clock, Memory, machine, write_figures
from benchmarks.phases import GIB, HEAD, Bench
from benchmarks.random_models import SHAPES, Shape, build, filled_tokenizer, prompt_sets, shape
from benchmarks.roofline import Ceilings, measured_ceilings
from job.config.load import default_values
from job.data.prompts import Prompt
from job.directions.residuals import extract_residuals
from job.edits.hooks import Intervention
from job.errors import JobError, MachineError
from job.model.devices import resolve_device
from job.model.loading import LoadedModel
from job.model.rendering import conversations
from job.numerics.ablation import RowNormalization
from job.numerics.basis import Basis, orthonormal_basis
from job.numerics.directions import mean_difference
from job.preflight.estimate import PhaseWork, Rates, Work, estimate
from job.preflight.machine import read_machine
from job.preflight.memory_plan import MemoryPlan, Refusal, Workload, plan
from job.preflight.readings import MachineReading
from job.records import TRIALS_PER_WORKER, EditParameters
from job.scoring.prompt_batches import PromptBatches
from job.scoring.trial_scorer import TrialScorer
from job.search.space import SearchSpace
from job.text.refusal_markers import RefusalMarkers

DEFAULT_SHAPES = {"cpu": ["0.5B"], "cuda": ["7B", "32B", "MoE"]}
MODES: tuple[RowNormalization, ...] = ("none", "full", "column")
# A GPU uses the job's default; a CPU would take most of an hour.
PROMPTS = {"cpu": 128, "cuda": 800}
# Measured batches of trials, after one to warm up; a CPU needs no warm-up and has no time for it.
ROUNDS = {"cpu": 1, "cuda": 3}
SWITCHES = 20


@dataclass(frozen=True)
class Request:
    """What to measure."""

    shape: str
    device: str
    trials: int
    prompts: int
    tokens: int
    rows: int | None = None
    layers: int | None = None


def measure(request: Request) -> dict[str, Any]:
    """Measure one shape, print its table and return the figures, or the reason why it cannot be measured."""
    optuna.logging.set_verbosity(optuna.logging.WARNING)
    device = resolve_device(request.device)
    dtype = torch.bfloat16 if device.type == "cuda" else torch.float32
    tokenizer = filled_tokenizer(SHAPES[request.shape]["vocab_size"])
    sets = prompt_sets(request.prompts)
    lengths = [len(ids) for ids in tokens_of(tokenizer, sets)]
    try:
        wanted = shape(request.shape, tokenizer, dtype, request.layers)
        rows = request.rows or planned_rows(wanted, reading_of(device), max(lengths), request.tokens)
    except JobError as error:
        print(f"\n{request.shape} is left out: {error}", flush=True)
        return {"shape": request.shape, "left_out": str(error)}
    memory, clock = Memory(device), Clock(device)
    ceilings = measured_ceilings(wanted.facts, device, dtype)
    begin = clock.now()
    loaded = build(wanted, tokenizer, device)
    figures: dict[str, Any] = {
        **asdict(request),
        **{"device": str(device), "dtype": loaded.dtype, "rows": rows, "build_s": clock.since(begin).wall},
        **{"parameters": wanted.facts.parameters, "weights_bytes": wanted.weights_bytes},
        **{"prompt_tokens": statistics.mean(lengths), "longest_prompt": max(lengths)},
        **{"ceilings": asdict(ceilings), "machine": machine(device)},
    }
    head(request, figures)
    bench = Bench(wanted, loaded, ceilings, clock, memory)
    basis = directions(bench, sets, rows, rows * (max(lengths) + request.tokens))
    figures["switching"] = switching(bench, basis, request.trials)
    figures["search"] = search(bench, sets, basis, rows, request)
    figures["estimate_s"] = estimated(wanted, ceilings, figures)
    figures["phases"] = bench.phases
    return figures


def reading_of(device: torch.device) -> MachineReading:
    """Return a reading of this machine with only the measured device."""
    reading = read_machine()
    gpus = reading.gpus[device.index or 0 :][:1] if device.type == "cuda" else ()
    return reading.model_copy(update={"gpus": gpus})


def tokens_of(tokenizer: PreTrainedTokenizerFast, sets: dict[str, list[Prompt]]) -> list[list[int]]:
    """Return the token ids of all prompts."""
    texts = conversations(tokenizer, [prompt for prompts in sets.values() for prompt in prompts])
    ids: list[list[int]] = tokenizer(texts, add_special_tokens=False)["input_ids"]
    return ids


def planned_rows(wanted: Shape, reading: MachineReading, longest: int, answer_tokens: int) -> int:
    """Return the batch size that the job itself would plan; see `planned`."""
    return planned(wanted, reading, longest, answer_tokens).rows


def planned(wanted: Shape, reading: MachineReading, longest: int, answer_tokens: int) -> MemoryPlan:
    """Return the memory that the job itself would plan.

    Raises:
        MachineError: The model does not fit.
    """
    work = Workload(
        prompt_tokens=longest,
        answer_tokens=answer_tokens,
        dtype_bytes=wanted.dtype.itemsize,
        quantise=False,
        offload=False,
    )
    found = plan(wanted.facts, reading, work)
    if isinstance(found, Refusal):
        raise MachineError(found.reason, remedy="choose a smaller shape, or name --rows to try all the same")
    return found


def head(request: Request, figures: dict[str, Any]) -> None:
    """Print the subject and the table head."""
    limits = figures["ceilings"]
    print(
        f"\n{request.shape}{f', {request.layers} layers' if request.layers else ''}: "
        f"{figures['parameters'] / 1e9:.2f} billion weights, {figures['weights_bytes'] / GIB:.2f} GiB in "
        f"{figures['dtype']} on {figures['device']} ({figures['machine']['hardware']}), built in "
        f"{figures['build_s']:.1f} s\n{request.prompts} prompts of {figures['prompt_tokens']:.0f} tokens for "
        f"directions, an eighth of them good and as many bad for a trial, answers of {request.tokens} tokens, "
        f"{request.trials} trials a batch, {figures['rows']} rows a forward\nmeasured ceilings: "
        f"{limits['flops'] / 1e12:.3g} TFLOP/s, {limits['bandwidth'] / 1e9:.3g} GB/s\n{HEAD}"
    )


def directions(bench: Bench, sets: dict[str, list[Prompt]], rows: int, tokens: int) -> Basis:
    """Extract residuals and take the mean difference, as a job does by default."""
    loaded = bench.loaded
    trained = [loaded.tokenize(sets[name]) for name in ("good_train", "bad_train")]

    def extract(prompts: list[list[int]]) -> Tensor:
        return extract_residuals(loaded, prompts, rows, lambda _: None, tokens=tokens)[:, 1:]

    if loaded.device.type == "cuda":
        extract(trained[0][:8])  # load libraries with the first forward
    residuals = bench.phase("extraction", lambda: [extract(prompts) for prompts in trained])
    read = Work(flops=sum(one.numel() for one in residuals), bytes=sum(one.nbytes for one in residuals))
    found: Tensor = bench.phase(
        "mean difference", lambda: mean_difference(*(one.to(loaded.device) for one in residuals)), extra=read
    )
    return orthonormal_basis(found[:, None], torch.ones(len(found), 1))


def some_edits(loaded: LoadedModel, count: int) -> list[EditParameters]:
    """Return random edits of the default search space."""
    space = SearchSpace(default_values()["search"]["space"], loaded.architecture.layer_count)
    study = optuna.create_study(sampler=optuna.samplers.RandomSampler(seed=0))
    return [space.edit(study.ask(space.distributions()).params) for _ in range(count)]


def switching(bench: Bench, basis: Basis, trials: int) -> list[dict[str, Any]]:
    """Time building the hooks, which reads every edited weight, and switching batches."""
    loaded, clock, found = bench.loaded, bench.clock, []
    batches = [some_edits(loaded, trials * (SWITCHES + 1))[i::SWITCHES] for i in range(SWITCHES)]
    for mode in MODES:
        bench.memory.forget()
        begin = clock.now()
        with Intervention(loaded.model, loaded.architecture, basis, mode) as intervention:
            built = clock.since(begin).seconds
            peak = bench.memory.peak()
            intervention.activate(batches[0][:trials])
            before = bench.memory.held()
            times = [
                clock.times(partial(intervention.activate, batch[:trials])).seconds * 1000 / trials for batch in batches
            ]
            grown = bench.memory.held() - before
        one = {"mode": mode, "build_s": built, "build_peak_bytes": peak, "ms_per_trial": statistics.median(times)}
        found.append(one | {"most_ms_per_trial": max(times), "grown_bytes": grown})
        print(
            f"{'switching, norms: ' + mode:>28} {one['ms_per_trial']:.2f} ms a trial (at most {max(times):.2f}) over "
            f"{SWITCHES} batches, {grown / 2**20:+.1f} MiB held; hooks built in {built:.1f} s, "
            f"peak {peak / bench.shape.weights_bytes:.1%} of the model",
            flush=True,
        )
    return found


def search(bench: Bench, sets: dict[str, list[Prompt]], basis: Basis, rows: int, request: Request) -> dict[str, Any]:
    """Measure the base model and batches of trials as the search evaluates them."""
    loaded = bench.loaded
    kind, count = loaded.device.type, request.trials
    markers = RefusalMarkers(default_values()["scoring"]["refusal_markers"])
    good, bad = sets["good_test"], sets["bad_test"]
    batches = PromptBatches.of(loaded, good, bad, rows, report=print)
    measure = partial(TrialScorer.measured, batches, markers, request.tokens)
    scorer = bench.phase("base model's figures", measure)
    held = []
    with Intervention(loaded.model, loaded.architecture, basis, "none") as intervention:
        edits = [some_edits(loaded, count * (ROUNDS[kind] + 1))[i * count :][:count] for i in range(ROUNDS[kind] + 1)]
        if kind == "cuda":
            scorer.scores(intervention, edits[0], rows)
        for number, batch in enumerate(edits[1:], 1):
            name = f"a trial of {count}, batch {number}"
            bench.phase(name, partial(scorer.scores, intervention, batch, rows), share=count)
            held.append(bench.memory.held())
    measured = [phase for phase in bench.phases if phase["phase"].startswith("a trial")]
    steps = sum(one["rows"] for one in measured[0]["forwards"] if one["tokens"] == 1)
    middle = sorted(measured, key=lambda phase: phase["seconds"])[len(measured) // 2]
    return {
        "trial_s": middle["seconds"],
        "share": middle["share"],
        "peak_of_model": max(phase["peak_of_model"] for phase in measured),
        "grown_bytes": held[-1] - held[0],
        # 1 where every response has full length.
        "decoded": steps / max(count * len(bad) * (request.tokens - 1), 1),
    }


def estimated(wanted: Shape, ceilings: Ceilings, figures: dict[str, Any]) -> dict[str, float]:
    """Return preflight's estimate from these ceilings in seconds; print it beside the measurement."""
    prompts = figures["prompts"]
    task = PhaseWork(
        weights_bytes=wanted.weights_bytes,
        active_parameters=wanted.facts.active_parameters,
        direction_prompts=prompts,
        generated_prompts=max(prompts // 8, 1),
        compared_prompts=max(prompts // 8, 1),
        prompt_tokens=figures["prompt_tokens"],
        answer_tokens=figures["tokens"],
        trials=figures["trials"],
        rows=figures["rows"],
        export_bytes=0,
    )
    rates = Rates(download=1, upload=1, read=1, write=1, flops=ceilings.flops, bandwidth=ceilings.bandwidth)
    hours = estimate(task, rates)
    found = {"extraction": hours.residuals * 3600, "trial": hours.search * 3600 / figures["trials"]}
    print(
        "preflight's estimate with these ceilings: "
        f"extraction {found['extraction']:.2f} s, a trial {found['trial']:.2f} s"
    )
    print(
        f"a trial {figures['search']['trial_s']:.2f} s amortised, {figures['search']['share']:.1%} of the roofline; "
        f"peak of the search {figures['search']['peak_of_model']:.1%} of the model"
    )
    return found


def main() -> None:
    """Print the tables."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("shapes", nargs="*", metavar="SHAPE", help=", ".join(SHAPES))
    parser.add_argument("--trials", type=int, default=TRIALS_PER_WORKER, help="trials of a batch")
    parser.add_argument("--rows", type=int, help="rows of a forward; unset: as the job would plan")
    parser.add_argument(
        "--prompts", type=int, help="for directions, an eighth each to evaluate with; unset: 800 or 128"
    )
    parser.add_argument("--tokens", type=int, default=default_values()["scoring"]["search_tokens"])
    parser.add_argument("--layers", type=int, help="cut the model to so many layers")
    parser.add_argument("--device", default="auto")
    parser.add_argument("--json", type=Path, default=Path("runs/shapes.json"))
    given = parser.parse_args()
    unknown = set(given.shapes) - set(SHAPES)
    if unknown:
        parser.error(f"no shape {', '.join(sorted(unknown))}: choose from {', '.join(SHAPES)}")
    kind = resolve_device(given.device).type
    prompts = given.prompts or PROMPTS[kind]
    found = []
    for name in given.shapes or DEFAULT_SHAPES[kind]:
        request = Request(name, given.device, given.trials, prompts, given.tokens, given.rows, given.layers)
        # In its own process, so that memory is this model's alone.
        context = multiprocessing.get_context("spawn")
        with ProcessPoolExecutor(1, mp_context=context) as process:
            found.append(process.submit(measure, request).result())
    write_figures(given.json, {"shapes": found})


if __name__ == "__main__":
    main()
