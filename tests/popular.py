"""Which machine published models take, from their sizes in tests/popular_models.toml and the job's own planner.

`python -m tests.popular --write docs/models.md` writes the page. No weights are read.
"""

from __future__ import annotations

import functools
import json
import tempfile
import tomllib
from collections.abc import Callable, Mapping
from fractions import Fraction
from pathlib import Path
from typing import Any, Literal

import torch
from transformers import AutoConfig, AutoModelForCausalLM

from job.config.load import default_values
from job.preflight.estimate import PhaseWork, Rates, device_rates, estimate
from job.preflight.gpu_table import parse_on
from job.preflight.memory_plan import MemoryPlan, Workload, cheapest, plan
from job.preflight.model_facts import ModelFacts, model_facts
from job.preflight.planning import DESCENT_STAGES
from job.proof.truth_test import inspection
from job.search.bounds import MOST_FINALISTS
from job.search.method import planned_trials
from job.text.durations import duration_text
from tests.generated import write_or_print

MODELS = Path(__file__).with_name("popular_models.toml")
# Those of the default prompt sets: to find the direction, and to judge a trial.
DIRECTION_PROMPTS, SEARCH_PROMPTS, CHOICE_PROMPTS = 640, 50, 80
GB = 1e9
Method = Literal["gradient", "tpe"]
METHODS: tuple[Method, ...] = ("gradient", "tpe")

_INTRODUCTION = """# Popular models

**Which machine does a model take, and for how long?** The table gives memory and time by the job's own planner.
Nothing in it was measured: [Tested on](tested.md) lists what has run. `abliterate preflight MODEL --on 1xRTX4090` plans
your job, with your prompts and the files' real sizes.

"""
_END = """
All families of the table are supported.

- **Writers**: modules that write into the residual stream; all are edited. `abliterate inspect` found them in one
  model of each family. The experts of a layer are one writer.
- **Memory**: weights alone. Rows in flight, hooks and a margin come on top; the machine has room for them. bitsandbytes
  replaces linear layers alone, so experts stay in bfloat16. The files of gpt-oss are quantised already and are
  dequantised to bfloat16.
- **Machine**: the cheapest set of cards in the planner's table that holds the model, in bfloat16 and with
  `--quantization bnb-4bit`. `abliterate preflight` names prices.
- **Search**: by gradient with {few} trials around the descent, which is the default, and by TPE with {many} trials.
  It includes directions and the base model's responses, with the sizes of the default prompt sets. Prompts have
  {prompt} tokens, responses {tokens}. Rates are those of data sheets, reduced as for preflight. Downloading,
  writing and uploading the model are not included. The memory of the descent's steps is not counted in the column
  of machines.

A row stands here only if a public source states all its sizes. Each name links to it.
Written by `python -m tests.popular --write docs/models.md`.
"""


@functools.cache
def sizes() -> tuple[dict[str, str], list[dict[str, Any]]]:
    """Return the sources by key, and the models."""
    found = tomllib.loads(MODELS.read_text())
    return found["sources"], found["models"]


def facts_of(config: Mapping[str, Any]) -> ModelFacts:
    """Return what determines memory and speed; allocates nothing."""
    described = AutoConfig.for_model(**config)
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(described, dtype=torch.bfloat16)
    tensors = {name: ("BF16", tuple(tensor.shape)) for name, tensor in model.state_dict().items()}
    return model_facts(json.loads(described.to_json_string()), tensors)


@functools.cache
def writers_per_layer(family: str) -> Fraction:
    """Return the residual writers per layer that `abliterate inspect` finds in a family's first model of the list.

    Raises:
        ValueError: It is not supported.
    """
    config = next(model["config"] for model in sizes()[1] if model["config"]["model_type"] == family)
    with tempfile.TemporaryDirectory() as folder:
        (Path(folder) / "config.json").write_text(AutoConfig.for_model(**config).to_json_string())
        found = inspection(Path(folder))
    if not found["supported"]:
        raise ValueError(f"{family}: {found['reason']}")
    return Fraction(len(found["writers"]), found["layers"])


def machine(facts: ModelFacts, work: Workload, quantised: bool) -> str:
    """Return the cheapest set of cards, or a dash."""
    found = cheapest(facts, work, quantised)
    return "–" if found is None else f"{found[1]}x{found[0].name}"


def search_time(facts: ModelFacts, work: Workload, on: str, method: Method) -> str:
    """Return the time of the stages that the cards determine, in words."""
    reading = parse_on(on)
    planned, rates = plan(facts, reading, work), device_rates(reading)
    if not isinstance(planned, MemoryPlan) or rates is None:
        raise ValueError(f"the planner finds no room on {on}")
    tokens = default_values()["scoring"]
    task = PhaseWork(
        weights_bytes=facts.weights_bytes(2),
        active_parameters=facts.active_parameters,
        direction_prompts=DIRECTION_PROMPTS,
        generated_prompts=SEARCH_PROMPTS,
        compared_prompts=SEARCH_PROMPTS,
        prompt_tokens=work.prompt_tokens / 2,
        answer_tokens=min(work.answer_tokens / 2, tokens["search_tokens"]),
        trials=planned_trials(None, method),
        gradient_stages=DESCENT_STAGES if method == "gradient" else 0,
        finalist_answers=MOST_FINALISTS * (SEARCH_PROMPTS + CHOICE_PROMPTS),
        finalist_tokens=work.answer_tokens / 2,
        rows=planned.rows,
        export_bytes=0,
    )
    flops, bandwidth = rates
    hours = estimate(task, Rates(download=1, upload=1, read=1, write=1, flops=flops, bandwidth=bandwidth))
    return duration_text(3600 * (hours.residuals + hours.baseline + hours.search))


def row(model: Mapping[str, Any], source: str, writers: Callable[[str], Fraction]) -> str:
    """Return a model's row; `writers` returns a family's writers per layer."""
    config, facts = model["config"], facts_of(model["config"])
    work = Workload(answer_tokens=default_values()["scoring"]["answer_tokens"])
    layers, plain = config["num_hidden_layers"], not model.get("quantised_files")
    full = machine(facts, work, quantised=False)
    cells = (
        f"[{model['name']}]({source})",
        f"`{config['model_type']}`",
        f"{writers(config['model_type']) * layers} in {layers} layers",
        f"{facts.parameters / 1e9:.1f}",
        f"{facts.weights_bytes(2) / GB:.1f}",
        f"{facts.weights_bytes(2, quantised=True) / GB:.1f}" if plain else "–",
        full,
        machine(facts, work, quantised=True) if plain else "–",
        *("–" if full == "–" else search_time(facts, work, full, method) for method in METHODS),
    )
    return f"| {' | '.join(cells)} |"


def page(writers: Callable[[str], Fraction] = writers_per_layer) -> str:
    """Return the page."""
    sources, models = sizes()
    heads = (
        *("Model", "Family", "Writers", "10⁹ weights", "GB in bfloat16", "GB in 4 bits"),
        *("Machine", "Machine in 4 bits", "Search by gradient", "Search by TPE"),
    )
    table = [f"| {' | '.join(heads)} |", "|---" * len(heads) + "|"]
    table += [row(model, sources[model["source"]], writers) for model in models]
    scoring = default_values()["scoring"]
    end = _END.format(
        few=planned_trials(None, "gradient"),
        many=planned_trials(None, "tpe"),
        prompt=Workload().prompt_tokens // 2,
        tokens=min(scoring["answer_tokens"] // 2, scoring["search_tokens"]),
    )
    return _INTRODUCTION + "\n".join(table) + "\n" + end


if __name__ == "__main__":
    write_or_print(page())
