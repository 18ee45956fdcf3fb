"""Seconds per trial, by trials per batch and batch size, and the planned layout's distance from the best one.

python -m benchmarks.trials [ORGANISM] [--random WIDTHxLAYERS] [--repeat N] [--batches 1 4 16] [--norms none full]

ORGANISM is a folder made by `abliterate demo-model`; made if absent. With --random a Llama of that shape with random
weights replaces its model; its responses have full length. --repeat makes prompts that many times longer.
"""

from __future__ import annotations

import argparse
import json
import statistics
import tempfile
import time
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import optuna
import torch
from safetensors import safe_open
from transformers import AutoTokenizer, LlamaConfig, LlamaForCausalLM

from benchmarks.measuring import machine, write_figures
from job.config.load import default_values
from job.config.sections import LoadingSettings
from job.data.prompts import Prompt
from job.directions.residuals import extract_residuals
from job.edits.hooks import Intervention
from job.model.loading import LoadedModel, load_model
from job.numerics.basis import Basis
from job.numerics.directions import mean_difference
from job.organism.folder import write_organism
from job.preflight.machine import read_machine
from job.preflight.memory_plan import MemoryPlan, Workload, plan
from job.preflight.model_facts import model_facts
from job.records import EditParameters
from job.scoring.prompt_batches import PromptBatches
from job.scoring.trial_scorer import TrialScorer
from job.search.space import SearchSpace
from job.text.refusal_markers import RefusalMarkers

# Wall clock and CPU time.
Times = tuple[float, float]
TRIALS, ROWS = 16, (64, 128, 256, 512, 1024)


def main() -> None:
    """Print a table for each norm mode and number of trials per batch."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("organism", nargs="?", type=Path, default=Path("runs/organism"))
    parser.add_argument("--random", metavar="WIDTHxLAYERS")
    parser.add_argument("--repeat", type=int, default=1)
    parser.add_argument("--prompts", type=int, default=100)
    parser.add_argument("--tokens", type=int, default=30)
    parser.add_argument("--trials", type=int, default=TRIALS)
    parser.add_argument("--batches", type=int, nargs="+", default=[1, 4, 16])
    parser.add_argument("--rows", type=int, nargs="+", default=ROWS)
    parser.add_argument("--norms", nargs="+", default=["none", "full"])
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--json", type=Path, default=Path("runs/trials.json"))
    given = parser.parse_args()
    if not (given.organism / "organism.json").exists():
        write_organism(given.organism, arch="llama", size="tiny", seed=0, report=print)
    with tempfile.TemporaryDirectory() as place:
        folder = given.organism / "model"
        if given.random:
            folder = random_model(folder, Path(place), *map(int, given.random.split("x")))
        loaded = load_model(folder, LoadingSettings.model_validate(default_values()["loading"]), print)
        compare(loaded, prompts_of(given.organism, given.repeat), given)


def random_model(organism: Path, folder: Path, width: int, layers: int) -> Path:
    """Write a Llama with random weights and the organism's tokenizer, and return its folder."""
    tokenizer = AutoTokenizer.from_pretrained(organism)
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=8192,
        hidden_size=width,
        intermediate_size=3 * width,
        num_hidden_layers=layers,
        num_attention_heads=width // 64,
        num_key_value_heads=width // 64,
        max_position_embeddings=4096,
        pad_token_id=tokenizer.pad_token_id,
        eos_token_id=tokenizer.eos_token_id,
        bos_token_id=None,
    )
    LlamaForCausalLM(config).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


def prompts_of(organism: Path, repeat: int) -> dict[str, list[Prompt]]:
    """Return the organism's prompt sets, each prompt extended with the following ones."""
    sets = {}
    for name in ("good_train", "bad_train", "good_test", "bad_test"):
        lines = (organism / f"{name}.txt").read_text().splitlines()
        joined = [" ".join((lines + lines)[i : i + repeat]) for i in range(len(lines))]
        sets[name] = [Prompt(user=text) for text in joined]
    return sets


def compare(loaded: LoadedModel, sets: dict[str, list[Prompt]], given: argparse.Namespace) -> None:
    """Measure all layouts in turn, for several rounds, and print the medians."""
    residuals = [
        extract_residuals(loaded, loaded.tokenize(sets[name][:64]), 64, lambda _: None)[:, 1:]
        for name in ("good_train", "bad_train")
    ]
    basis = Basis.single(mean_difference(*residuals))
    markers = RefusalMarkers(default_values()["scoring"]["refusal_markers"])
    good, bad = sets["good_test"][: given.prompts], sets["bad_test"][: given.prompts]
    scorer = TrialScorer.measured(PromptBatches.of(loaded, good, bad, 64), markers, given.tokens)
    edits = random_edits(loaded, given.trials)
    longest = max(map(len, loaded.tokenize([*good, *bad])))
    rule = rows_by_rule(loaded, longest, given.tokens)
    parameters = sum(parameter.numel() for parameter in loaded.model.parameters())
    asked = f"{len(good)} + {len(bad)} prompts of at most {longest} tokens"
    print(f"{parameters / 1e6:.1f} M parameters, {asked}, ", end="")
    print(f"answers of at most {given.tokens}; the rule: {rule} rows. Seconds a trial, and the processor's:")
    print(f"{'norms':>5} {'K':>3} {'switch ms':>9} {''.join(f'{rows:>14}' for rows in given.rows)}   rule/best")
    layouts: list[dict[str, Any]] = []
    for mode in given.norms:
        with Intervention(loaded.model, loaded.architecture, basis, mode) as intervention:
            scorer.scores(intervention, edits[:1], 64)  # warm-up
            for k in given.batches:
                batches = [edits[i : i + k] for i in range(0, len(edits), k)]
                switch = seconds(partial(each, batches, intervention.activate))
                # Larger batches are not filled.
                found: dict[int, list[Times]] = {rows: [] for rows in given.rows if rows < 2 * k * given.prompts}
                for _ in range(given.rounds):
                    for rows, times in found.items():
                        score = partial(scorer.scores, intervention, rows=rows)
                        times.append(seconds(partial(each, batches, score)))
                switching = 1000 * switch[0] / len(edits)
                medians = {
                    rows: [statistics.median(one) / len(edits) for one in zip(*times, strict=True)]
                    for rows, times in found.items()
                }
                print(f"{mode:>5} {k:>3} {switching:9.2f} {line(medians, rule)}", flush=True)
                about = {"norms": mode, "k": k, "switch_ms": switching}
                layouts += [
                    {**about, "rows": rows, "trial_s": wall, "processor_s": processor}
                    for rows, (wall, processor) in medians.items()
                ]
    write_figures(given.json, {"machine": machine(loaded.device), "rule": rule, "layouts": layouts})


def each(batches: Sequence[Sequence[EditParameters]], work: Callable[[Sequence[EditParameters]], object]) -> None:
    """Run `work` on every batch."""
    for batch in batches:
        work(batch)


def line(medians: dict[int, list[float]], rule: int) -> str:
    """Return a table row: the times of all layouts, and the ratio of the planned one to the best."""
    shown = "".join(f"{wall:8.3f}/{processor:5.3f}" for wall, processor in medians.values())
    chosen = medians[max((rows for rows in medians if rows <= rule), default=min(medians))]
    ratios = [chosen[which] / min(times[which] for times in medians.values()) for which in (0, 1)]
    return f"{shown}   {ratios[0]:.2f}/{ratios[1]:.2f}"


def seconds(work: Callable[[], object]) -> Times:
    """Return wall-clock and CPU time of `work`."""
    begin, begin_cpu = time.perf_counter(), time.process_time()
    work()
    return time.perf_counter() - begin, time.process_time() - begin_cpu


def random_edits(loaded: LoadedModel, count: int) -> list[EditParameters]:
    """Return random edits of the search space."""
    space = SearchSpace("wide", loaded.architecture.layer_count)
    optuna.logging.set_verbosity(optuna.logging.WARNING)
    study = optuna.create_study(sampler=optuna.samplers.RandomSampler(seed=0))
    return [space.edit(study.ask(space.distributions()).params) for _ in range(count)]


def rows_by_rule(loaded: LoadedModel, prompt_tokens: int, answer_tokens: int) -> int:
    """Return the batch size that preflight plans for a model on this machine's CPU."""
    tensors = {}
    for file in loaded.folder.glob("*.safetensors"):
        with safe_open(file, framework="pt") as stored:
            for name in stored.keys():  # noqa: SIM118 - no mapping
                part = stored.get_slice(name)
                tensors[name] = (part.get_dtype(), tuple(part.get_shape()))
    facts = model_facts(json.loads((loaded.folder / "config.json").read_text()), tensors)
    work = Workload(prompt_tokens=prompt_tokens, answer_tokens=answer_tokens, dtype_bytes=4)
    found = plan(facts, read_machine().model_copy(update={"gpus": ()}), work)
    assert isinstance(found, MemoryPlan), found.reason
    return found.rows


if __name__ == "__main__":
    main()
