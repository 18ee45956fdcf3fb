"""Time to switch between batches of trials, in models with many edited modules.

python -m benchmarks.switching [--family llama] [--layers 64] [--width 5120] [--inner 32] [--threads 1] [--device cpu]

A random model in bfloat16 with the given depth and width, whose attention and MLP are narrow: switching edits reads no
weight. Only column-wise edits depend on --inner; the tables of a realistic inner width do not fit beside the others.
Medians of 20 batches of random edits of the wide space, per trial; on a CPU this process' own time.
"""

from __future__ import annotations

import argparse
import statistics
from functools import partial
from pathlib import Path
from typing import Any

import optuna
import torch
from torch import nn
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedModel

from benchmarks.measuring import Clock, machine, write_figures
from job.architectures.structure import discover
from job.edits.hooks import Intervention
from job.numerics.ablation import RowNormalization
from job.numerics.basis import Basis
from job.search.space import SearchSpace

MODES: tuple[RowNormalization, ...] = ("none", "pre", "full", "column")
TOGETHER = (1, 4, 16)
BATCHES = 20


def random_model(family: str, layers: int, width: int, inner: int, device: torch.device) -> PreTrainedModel:
    """Return a random model of a family whose configuration uses Llama's names."""
    sizes = {"hidden_size": width, "num_hidden_layers": layers, "intermediate_size": inner, "vocab_size": 64}
    heads = {"num_attention_heads": 1, "num_key_value_heads": 1, "head_dim": 16}
    config = AutoConfig.for_model(family, **sizes, **heads)
    torch.manual_seed(0)
    model: PreTrainedModel = AutoModelForCausalLM.from_config(config, dtype=torch.bfloat16)
    return model.to(device).eval()  # type: ignore[arg-type]  # as transformers declares it


def switching(model: PreTrainedModel) -> list[dict[str, Any]]:
    """Return a trial's share of switching batches, by mode and batch size, milliseconds."""
    architecture, clock = discover(model), Clock(model.device)
    layers, width = architecture.layer_count, architecture.width
    basis = Basis.single(nn.functional.normalize(torch.randn(layers, width), dim=-1))
    space = SearchSpace("wide", layers)
    study = optuna.create_study(sampler=optuna.samplers.RandomSampler(seed=0))
    edits = [space.edit(study.ask(space.distributions()).params) for _ in range((BATCHES + 1) * max(TOGETHER))]
    found = []
    for mode in MODES:
        with Intervention(model, architecture, basis, mode) as intervention:
            for count in TOGETHER:
                batches = [edits[start * count :][:count] for start in range(BATCHES + 1)]
                intervention.activate(batches[0])  # computed once
                times = [clock.times(partial(intervention.activate, batch)).seconds for batch in batches[1:]]
                milliseconds = 1000 * statistics.median(times) / count
                found.append({"mode": mode, "together": count, "ms_per_trial": milliseconds})
    return found


def main() -> None:
    """Measure, print and write the figures."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--family", default="llama", help="model_type of transformers: llama, gemma2, qwen3 ...")
    parser.add_argument("--layers", type=int, default=64)
    parser.add_argument("--width", type=int, default=5120)
    parser.add_argument("--inner", type=int, default=32, help="width of the MLP")
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--json", type=Path)
    given = parser.parse_args()
    torch.set_num_threads(given.threads)
    optuna.logging.set_verbosity(optuna.logging.WARNING)
    device = torch.device(given.device)
    found = switching(random_model(given.family, given.layers, given.width, given.inner, device))
    print(f"{given.family}, {given.layers} layers of {given.width}: milliseconds a trial")
    print("norms kept " + "".join(f"{f'K = {count}':>9}" for count in TOGETHER))
    for mode in MODES:
        row = [one["ms_per_trial"] for one in found if one["mode"] == mode]
        print(f"{mode:>10} " + "".join(f"{value:9.2f}" for value in row))
    if given.json:
        asked = {name: value for name, value in vars(given).items() if name != "json"}
        write_figures(given.json, {"asked": asked, "machine": machine(device), "switching": found})


if __name__ == "__main__":
    main()
