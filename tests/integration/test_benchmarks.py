"""The benchmark of real models' shapes: its arithmetic against torch's counts, and a whole run on a tiny shape."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode
from transformers import AutoModelForCausalLM, AutoTokenizer

from benchmarks.measuring import Memory
from benchmarks.random_models import SHAPES, Shape, build, filled_tokenizer, shape
from benchmarks.roofline import Ceilings, Forward, recorded, roofline, works
from benchmarks.shapes import planned_rows
from benchmarks.widened import widened
from job.directions.residuals import extract_residuals
from job.errors import MachineError
from job.generation.greedy import greedy_answers
from job.model.loading import LoadedModel
from job.model.memory import keep_freed_memory
from job.preflight.estimate import Work
from job.preflight.gpu_table import parse_on
from tests.helpers import Result, alone, run_script

ROOT = Path(__file__).parents[2]
MIB = 2**20
PROMPTS = [[7 + row] * (20 + row) for row in range(6)]


@pytest.fixture(scope="module")
def tiny() -> tuple[Shape, LoadedModel]:
    """Return a tiny model whose attention uses products that torch counts on a CPU."""
    tokenizer = filled_tokenizer(SHAPES["tiny"]["vocab_size"])
    wanted = shape("tiny", tokenizer, torch.float32, None)
    loaded = build(wanted, tokenizer, torch.device("cpu"))
    loaded.model.set_attn_implementation("eager")
    return wanted, loaded


def extraction(loaded: LoadedModel) -> object:
    return extract_residuals(loaded, PROMPTS, 4, lambda _: None)


def answers(loaded: LoadedModel) -> object:
    return greedy_answers(loaded.model, PROMPTS, limit=5, end_tokens=set())


@pytest.mark.parametrize("phase", [extraction, answers])
def test_operations_are_those_that_torch_counts(
    tiny: tuple[Shape, LoadedModel], phase: Callable[[LoadedModel], object]
) -> None:
    wanted, loaded = tiny
    with recorded(loaded.model) as forwards, FlopCounterMode(display=False) as counter:
        phase(loaded)
    found = roofline(works(forwards, wanted.facts, 4), Ceilings(1.0, 1.0))
    # Norms are counted by their weights, rotations not at all.
    assert found.flops == pytest.approx(counter.get_total_flops(), rel=0.01)


def test_forwards_are_noted_as_they_were_run(tiny: tuple[Shape, LoadedModel]) -> None:
    _, loaded = tiny
    with recorded(loaded.model) as forwards:
        extraction(loaded)
        answers(loaded)
    # Residuals need no logits; six rows of responses need them at their last position, five times.
    assert forwards[:2] == [Forward(4, 23, 23, False), Forward(2, 25, 25, False)]
    assert forwards[2:] == [Forward(6, 25, 25, True, 6), *(Forward(6, 1, 25 + i, True, 6) for i in range(1, 5))]
    with recorded(loaded.model) as later:
        pass
    answers(loaded)
    assert later == []


def test_bytes_by_hand(tiny: tuple[Shape, LoadedModel]) -> None:
    facts = tiny[0].facts
    layer = 2 * 64 * 64 + 2 * 64 * 32 + 3 * 64 * 192 + 2 * 64
    head = 64 * 1000
    assert Forward(3, 10, 10, False).bytes(facts, 2) == 2 * (2 * layer)
    # Keys and values of 2 heads of 16 in 2 layers, 3 rows of 12 slots.
    assert Forward(3, 1, 12, True, 3).bytes(facts, 2) == 2 * (2 * layer + head + 2 * 3 * 12 * 2 * 2 * 16)


def test_each_forward_is_bound_by_the_larger_of_its_bounds() -> None:
    found = roofline([Work(flops=100, bytes=10), Work(flops=10, bytes=60)], Ceilings(10.0, 20.0))
    assert (found.flops, found.bytes) == (110, 70)
    assert (found.arithmetic_s, found.memory_s, found.seconds) == (11.0, 3.5, 13.0)


def test_a_model_is_built_in_its_type_and_sane(tiny: tuple[Shape, LoadedModel]) -> None:
    _, loaded = tiny
    half = shape("tiny", loaded.tokenizer, torch.bfloat16, layers=1)
    built = build(half, loaded.tokenizer, torch.device("cpu"))
    weights = sum(parameter.nbytes for parameter in built.model.parameters())
    assert weights == half.weights_bytes
    assert len(built.model.model.layers) == 1
    for model in (loaded.model, built.model):
        assert all(bool(parameter.isfinite().all()) for parameter in model.parameters())
    # Positions matter: with wrong or missing rotations, swapped tokens give the same result.
    first, second = greedy_answers(loaded.model, [[9, 8, 7], [8, 9, 7]], limit=1, end_tokens=set())
    assert first.margins != second.margins
    text = loaded.tokenizer.decode([999, 998])
    assert text == "word999 word998"


@alone
def test_memory_that_comes_and_goes_shows_as_a_peak() -> None:
    keep_freed_memory()
    freed = [torch.ones(20 * MIB // 4) for _ in range(10)]  # in pieces that the allocator keeps
    del freed
    memory = Memory(torch.device("cpu"))
    memory.forget()
    taken = torch.ones(64 * MIB // 4)
    assert memory.held() > 60 * MIB
    del taken
    assert memory.peak() > 60 * MIB
    assert memory.held() < 30 * MIB
    memory.forget()
    assert memory.peak() < 30 * MIB


def benchmark(module: str, *arguments: Any) -> Result:
    """Run a module of benchmarks/ as `python -m` does, in its own process."""
    code = f"import runpy; runpy.run_module('benchmarks.{module}', run_name='__main__', alter_sys=True)"
    return run_script(code, *arguments, cwd=ROOT)


@pytest.mark.full("real")
def test_the_figures_of_a_whole_run_are_consistent(tmp_path: Path) -> None:
    file = tmp_path / "figures" / "shapes.json"
    options = ["--trials", "3", "--prompts", "16", "--tokens", "4", "--rows", "6", "--device", "cpu", "--json", file]
    done = benchmark("shapes", "tiny", *options).check()
    (found,) = json.loads(file.read_text())["shapes"]
    phases = {phase["phase"]: phase for phase in found["phases"]}
    assert set(phases) == {"extraction", "mean difference", "base model's figures", "a trial of 3, batch 1"}
    for name, phase in phases.items():
        assert name in done.out
        assert 0 < phase["share"] < 1.2
        assert phase["seconds"] * phase["share"] == pytest.approx(phase["roofline_s"])
        assert max(phase["arithmetic_s"], phase["memory_s"]) <= phase["roofline_s"] * (1 + 1e-9)
        assert phase["roofline_s"] <= (phase["arithmetic_s"] + phase["memory_s"]) * (1 + 1e-9)
        assert phase["peak_bytes"] >= phase["held_bytes"] > found["weights_bytes"]
    _tokens_are_right(found, phases)
    assert found["search"]["trial_s"] == phases["a trial of 3, batch 1"]["seconds"]
    assert 0.5 < found["search"]["decoded"] <= 1
    assert {one["mode"] for one in found["switching"]} == {"none", "full", "column"}
    for one in found["switching"]:
        assert 0 < one["ms_per_trial"] <= one["most_ms_per_trial"]
        assert one["grown_bytes"] < 4 * MIB
    assert found["estimate_s"]["trial"] > 0


def _tokens_are_right(found: dict[str, Any], phases: dict[str, Any]) -> None:
    """Check that all prompts and responses passed through the model, within the requested batch size."""
    extracted = phases["extraction"]["forwards"]
    assert sum(one["rows"] for one in extracted) == 16
    weights = 2 * (2 * 64 * 64 + 2 * 64 * 32 + 3 * 64 * 192)
    assert phases["extraction"]["flops"] > 2 * weights * 16 * found["prompt_tokens"] * 0.9
    trial = phases["a trial of 3, batch 1"]["forwards"]
    assert max(one["rows"] for one in trial) == 6
    # Both sets of 2 prompts for each of 3 trials, and their prefix at least once per trial and set.
    assert sum(one["positions"] for one in trial if one["tokens"] > 1) >= 2 * 2 * 3


def test_switching_is_timed_in_all_modes(tmp_path: Path) -> None:
    file = tmp_path / "switching.json"
    sizes = ["--family", "gemma2", "--layers", "3", "--width", "32"]
    done = benchmark("switching", *sizes, "--json", file).check()
    found = json.loads(file.read_text())["switching"]
    assert len(found) == 4 * 3
    assert all(0 < one["ms_per_trial"] < 100 for one in found)
    lines = [line.split() for line in done.out.splitlines()]
    assert [f"{one['ms_per_trial']:.2f}" for one in found if one["mode"] == "full"] in [line[1:] for line in lines]


def test_a_shape_that_is_not_known_is_refused(tmp_path: Path) -> None:
    file = tmp_path / "shapes.json"
    done = benchmark("shapes", "huge", "--json", file)
    assert done.code == 2
    assert "no shape huge" in done.err
    assert not file.exists()


def test_rows_are_those_that_the_job_would_plan_and_what_does_not_fit_is_refused() -> None:
    tokenizer = filled_tokenizer(SHAPES["32B"]["vocab_size"])
    wanted = shape("32B", tokenizer, torch.bfloat16, None)
    assert wanted.facts.parameters == pytest.approx(32.8e9, rel=0.01)
    assert planned_rows(wanted, parse_on("H200"), 64, 30) >= 256
    with pytest.raises(MachineError, match=r"61\.0 GiB of weights"):
        planned_rows(wanted, parse_on("RTX4090"), 64, 30)


def test_a_widened_model_says_what_the_smaller_one_says_without_end(random_model_folder: Path, tmp_path: Path) -> None:
    folder = widened(random_model_folder, tmp_path / "large", 96, 5)
    small, large = map(AutoModelForCausalLM.from_pretrained, (random_model_folder, folder))
    assert (large.config.hidden_size, large.config.num_hidden_layers) == (96, 5)
    with torch.inference_mode():
        logits, expected = (model(torch.tensor(PROMPTS[:1])).logits for model in (large, small))
    torch.testing.assert_close(logits, expected, rtol=1e-4, atol=1e-4)
    assert expected.std() > 0.1
    assert large.generation_config.eos_token_id != small.generation_config.eos_token_id
    assert AutoTokenizer.from_pretrained(folder).eos_token_id == large.generation_config.eos_token_id
