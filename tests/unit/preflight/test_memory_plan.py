"""The memory planner on other machines: Qwen2.5-Coder-32B's shapes on recorded cards and cards from data sheets."""

from __future__ import annotations

from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from job.preflight.activation_memory import Batch, cache_bytes
from job.preflight.checks import GIB
from job.preflight.gpu_table import parse_on
from job.preflight.limits import Memory
from job.preflight.machine import read_machine
from job.preflight.memory_plan import MemoryPlan, Refusal, Workload, memory_check, plan
from job.preflight.model_facts import ModelFacts, model_facts
from job.preflight.readings import MachineReading, read_reading

READINGS = Path(__file__).parents[2] / "fakes" / "readings"
WORK = Workload(prompt_tokens=256, answer_tokens=100)


def qwen(
    layers: int = 64, hidden: int = 5120, wide: int = 27648, vocab: int = 152064, tied: bool = False
) -> ModelFacts:
    """Return the facts of Qwen2.5-Coder-32B, or of a smaller one of its family."""
    keys = hidden // 5
    tensors = {"model.embed_tokens.weight": (vocab, hidden), "model.norm.weight": (hidden,)}
    if not tied:
        tensors["lm_head.weight"] = (vocab, hidden)
    shapes = {
        "self_attn.q_proj.weight": (hidden, hidden),
        "self_attn.q_proj.bias": (hidden,),
        "self_attn.k_proj.weight": (keys, hidden),
        "self_attn.k_proj.bias": (keys,),
        "self_attn.v_proj.weight": (keys, hidden),
        "self_attn.v_proj.bias": (keys,),
        "self_attn.o_proj.weight": (hidden, hidden),
        "mlp.gate_proj.weight": (wide, hidden),
        "mlp.up_proj.weight": (wide, hidden),
        "mlp.down_proj.weight": (hidden, wide),
        "input_layernorm.weight": (hidden,),
        "post_attention_layernorm.weight": (hidden,),
    }
    for layer in range(layers):
        tensors |= {f"model.layers.{layer}.{name}": shape for name, shape in shapes.items()}
    config = {
        "model_type": "qwen2",
        "num_hidden_layers": layers,
        "hidden_size": hidden,
        "num_attention_heads": 40,
        "num_key_value_heads": 8,
        "intermediate_size": wide,
        "vocab_size": vocab,
        "sliding_window": 131072,
        "use_sliding_window": False,
        "tie_word_embeddings": tied,
    }
    return model_facts(config, {name: ("BF16", shape) for name, shape in tensors.items()})


CODER = qwen()


def machine(name: str) -> MachineReading:
    return read_reading(READINGS / f"{name}.json")


def planned(facts: ModelFacts, reading: MachineReading, work: Workload = WORK) -> MemoryPlan:
    found = plan(facts, reading, work)
    assert isinstance(found, MemoryPlan), found
    assert_sound(facts, found, work)
    return found


def assert_sound(facts: ModelFacts, found: MemoryPlan, work: Workload) -> None:
    """Assert the invariants of every plan: nothing is lost, nothing counted twice, and it fits."""
    batch = Batch(rows=found.rows, prompt_tokens=work.prompt_tokens, answer_tokens=work.answer_tokens)
    quantised = found.quantization == "bnb-4bit"
    assert sum(device.layers for device in found.devices) == facts.layers
    assert sum(device.weights for device in found.devices) == facts.weights_bytes(work.dtype_bytes, quantised=quantised)
    assert sum(device.cache for device in found.devices) == cache_bytes(facts, batch, work.dtype_bytes)
    assert all(0 < device.total <= device.free for device in found.devices)
    assert found.rows & (found.rows - 1) == 0


def test_the_coder_has_its_published_size() -> None:
    assert CODER.parameters == 32_763_876_352
    assert CODER.weights_bytes(2) == 65_527_752_704
    assert 19e9 < CODER.weights_bytes(2, quantised=True) < 21e9


@pytest.mark.parametrize(
    ("name", "strategy", "quantization", "rows", "settings_lines"),
    [
        ("1xH200", "single", "none", 512, ('loading.device = "cuda:0"',)),
        ("1xA100-80", "single", "none", 128, ('loading.device = "cuda:0"', "batching.rows = 128")),
        ("4x4090", "balanced", "none", 64, ('loading.device_map = "balanced"',)),
        ("1x24GB", "single", "bnb-4bit", 16, ('loading.quantization = "bnb-4bit"',)),
    ],
)
def test_the_coder_on_recorded_machines(
    name: str, strategy: str, quantization: str, rows: int, settings_lines: tuple[str, ...]
) -> None:
    found = planned(CODER, machine(name))
    assert (found.strategy, found.quantization, found.rows) == (strategy, quantization, rows)
    assert set(settings_lines) <= set(found.settings)
    assert memory_check(found).status == "ok"


def test_four_cards_are_filled_alike() -> None:
    """A recorded host with GPU 0 at 96 % and three idle."""
    found = planned(CODER, machine("4x4090"))
    totals = [device.total for device in found.devices]
    assert max(totals) - min(totals) < 1.5 * GIB
    assert all(14 <= device.layers <= 18 for device in found.devices)


def test_a_card_that_others_use_is_given_less() -> None:
    reading = machine("4x4090")
    gpus = (reading.gpus[0].model_copy(update={"free_bytes": 12 * GIB}), *reading.gpus[1:])
    found = planned(CODER, reading.model_copy(update={"gpus": gpus}))
    assert found.strategy == "balanced"
    assert found.devices[0].layers < found.devices[1].layers


def test_a_full_first_card_is_passed_over() -> None:
    reading = machine("4x4090")
    gpus = (reading.gpus[0].model_copy(update={"free_bytes": GIB}), *reading.gpus[1:])
    found = planned(qwen(layers=28, hidden=3584 // 40 * 40, wide=18944), reading.model_copy(update={"gpus": gpus}))
    assert found.strategy == "single"
    assert 'loading.device = "cuda:1"' in found.settings


def test_what_does_not_fit_is_refused_with_what_would_do() -> None:
    reading = machine("1x24GB")
    small = reading.gpus[0].model_copy(update={"total_bytes": 12 * GIB, "free_bytes": 12 * GIB})
    found = plan(CODER, reading.model_copy(update={"gpus": (small,)}), WORK)
    assert isinstance(found, Refusal)
    assert "61.0 GiB of weights (19.3 GiB in 4-bit)" in found.reason
    assert [text.split()[0] for text in found.would_do] == ["4xRTX3090", "1xRTX3090"]
    for text in found.would_do:
        planned(CODER, parse_on(text.split()[0]))
    check = memory_check(found)
    assert (check.status, check.scope) == ("fail", "machine")
    assert "4xRTX3090" in check.remedy


def test_layers_are_kept_in_ram_only_where_nothing_else_does() -> None:
    reading = machine("1x24GB")
    small = reading.gpus[0].model_copy(update={"total_bytes": 12 * GIB, "free_bytes": 12 * GIB})
    ample = Memory(total=256 * GIB, available=200 * GIB)
    reading = reading.model_copy(update={"gpus": (small,), "memory": ample})
    found = planned(CODER, reading)
    assert found.strategy == "offload"
    assert found.devices[-1].device == "cpu"
    assert found.host_bytes > 45 * GIB
    assert 'loading.device_map = "auto"' in found.settings
    assert memory_check(found).status == "warn"
    assert isinstance(plan(CODER, reading, WORK.model_copy(update={"offload": False})), Refusal)


def test_four_bit_only_where_it_is_allowed() -> None:
    without = WORK.model_copy(update={"quantise": False, "offload": False})
    found = plan(CODER, machine("1x24GB"), without)
    assert isinstance(found, Refusal)
    assert [text.split()[0] for text in found.would_do] == ["4xRTX3090"]
    stored = CODER.model_copy(update={"quantisation": "fp8"})
    assert isinstance(plan(stored, machine("1x24GB"), WORK.model_copy(update={"offload": False})), Refusal)


def test_a_model_that_no_card_takes() -> None:
    vast = CODER.model_copy(
        update={"layers": 1920, "layer_weights": CODER.layer_weights * 30, "sliding": (None,) * 1920}
    )
    found = plan(vast, parse_on("8xH200"), WORK.model_copy(update={"quantise": False}))
    assert isinstance(found, Refusal)
    assert found.would_do == ()
    assert "no set of GPUs" in memory_check(found).remedy


def test_like_machines_get_like_plans() -> None:
    """An idle card's free memory varies a little; the rows must not."""
    reading = machine("1xA100-80")
    plans = set()
    for used in range(0, 500, 25):
        gpu = reading.gpus[0].model_copy(update={"free_bytes": reading.gpus[0].total_bytes - (used << 20)})
        plans.add(planned(CODER, reading.model_copy(update={"gpus": (gpu,)})).rows)
    assert len(plans) == 1


@pytest.mark.parametrize("answer", [30, 100])
def test_beside_a_large_model_in_ram_there_is_little(answer: int) -> None:
    large = qwen(layers=24, hidden=896, wide=4864, vocab=150_000, tied=True)
    reading = parse_on("1xH200").model_copy(update={"gpus": (), "memory": Memory(total=64 * GIB, available=60 * GIB)})
    found = planned(large, reading, Workload(prompt_tokens=64, answer_tokens=answer, dtype_bytes=4))
    (device,) = found.devices
    assert device.weights > 1e9
    assert device.cache + device.activations <= 0.25 * device.weights
    assert found.rows >= 16


def test_a_machine_without_gpu_computes_in_ram() -> None:
    small = qwen(layers=2, hidden=320, wide=640, vocab=1000)
    found = planned(small, read_machine().model_copy(update={"gpus": ()}), Workload(dtype_bytes=4))
    assert found.devices[0].device == "cpu"
    assert found.rows == 512
    assert 'loading.device = "cpu"' in found.settings
    unknown = MachineReading(memory=None)
    assert isinstance(plan(small, unknown, WORK), Refusal)


def test_processes_on_a_machine_without_gpu_share_its_memory() -> None:
    large = qwen(layers=24, hidden=896, wide=4864, vocab=150_000, tied=True)
    reading = parse_on("1xH200").model_copy(update={"gpus": (), "memory": Memory(total=8 * GIB, available=7 * GIB)})
    work = Workload(prompt_tokens=64, answer_tokens=30, dtype_bytes=4)
    assert planned(large, reading, work).rows > 0
    both = planned(large, reading, work.model_copy(update={"processes": 2}))
    (device,) = both.devices
    assert device.weights + device.cache + device.activations <= 3.2 * GIB
    refused = plan(large, reading, work.model_copy(update={"processes": 4}))
    assert isinstance(refused, Refusal)
    assert "each of 4 workers" in refused.reason


@settings(max_examples=25)
@given(
    layers=st.integers(1, 24),
    width=st.integers(1, 100),
    tied=st.booleans(),
    free=st.lists(st.integers(0, 24), min_size=1, max_size=5),
    tokens=st.integers(1, 3000),
    most=st.one_of(st.none(), st.integers(1, 2000)),
)
def test_every_plan_is_sound(
    layers: int, width: int, tied: bool, free: list[int], tokens: int, most: int | None
) -> None:
    facts = qwen(layers=layers, hidden=40 * width, wide=160 * width, vocab=32000, tied=tied)
    reading = parse_on(f"{len(free)}xRTX4090")
    gpus = tuple(
        gpu.model_copy(update={"free_bytes": min(count * GIB, gpu.total_bytes)})
        for gpu, count in zip(reading.gpus, free, strict=True)
    )
    memory = Memory(total=64 * GIB, available=32 * GIB)
    work = Workload(prompt_tokens=tokens, answer_tokens=30, most_rows=most)
    found = plan(facts, reading.model_copy(update={"gpus": gpus, "memory": memory}), work)
    if isinstance(found, MemoryPlan):
        assert_sound(facts, found, work)
        assert most is None or found.rows <= most
    else:
        assert found.reason
