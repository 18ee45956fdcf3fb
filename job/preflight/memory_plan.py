"""Plan a model's memory on a machine, before any download.

It is a deterministic rule: equal machines get equal plans, and rows are powers of two. Preference: full precision on
one device, on several, 4-bit, then offloading to RAM, which is slow.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Literal

from job.preflight.activation_memory import Batch
from job.preflight.checks import GIB, Check, size
from job.preflight.device_map import RAM_SHARE, Device, DevicePlan, Layout, lay_out
from job.preflight.gpu import IDLE_BYTES
from job.preflight.gpu_table import Card, cards
from job.preflight.gradient_memory import GradientPlan
from job.preflight.model_facts import ModelFacts
from job.preflight.readings import MachineReading
from job.preflight.table_memory import EditTables
from job.records import LARGE_BYTES, READ_TOKENS, Record

Strategy = Literal["single", "balanced", "offload"]
Quantization = Literal["none", "bnb-4bit"]

# Rows beyond these gain nothing in throughput, so that even small models are not given more.
MOST_ROWS = {"cpu": 512, "cuda": 1024}
# On a CPU, where rows beyond a few gain little as well (measured, docs/lab-notes/batch-size.md), a large model's cache
# and activations take no more than this share of its weights.
CPU_SHARE = 0.25
# With fewer rows a trial takes too many forwards: the next strategy is better.
FEWEST_ROWS = 4
# A forward that waits for layers from RAM is not made slower by more rows, but its cache takes their room.
OFFLOAD_ROWS = 64
# What Python, torch and the job itself take of the RAM.
HOST_BYTES = 3 * GIB
COUNTS = (1, 2, 4, 8)
# The device maps with which accelerate spreads the layers.
DEVICE_MAPS = {"single": "single", "balanced": "balanced", "offload": "auto"}


class Workload(Record):
    """The workload to plan for.

    Attributes:
        prompt_tokens: Tokens of the longest prompt with chat template.
        dtype_bytes: Bytes per number in the loaded type.
        tables: What determines the memory of the hooks on the residual writers.
        processes: Processes that each hold the model in RAM without a GPU.
    """

    prompt_tokens: int = 256
    answer_tokens: int = 100
    dtype_bytes: int = 2
    most_rows: int | None = None
    tables: EditTables = EditTables()
    quantise: bool = True
    offload: bool = True
    processes: int = 1


class MemoryPlan(Record):
    """A plan that fits.

    Attributes:
        strategy: single: one device; balanced: several; offload: some layers stay in RAM.
        host_bytes: RAM for loading and running.
        settings: The plan as lines of TOML.
        dtype: The type to load it in, where the device decides that and not the files.
        gradient: The descent's memory, None without a descent.
    """

    strategy: Strategy
    quantization: Quantization
    rows: int
    devices: tuple[DevicePlan, ...]
    host_bytes: int
    settings: tuple[str, ...]
    dtype: Literal["float32"] | None = None
    gradient: GradientPlan | None = None


class Refusal(Record):
    """No plan fits; `would_do` are the cheapest sufficient sets of cards, as for `--on`, full precision first."""

    reason: str
    would_do: tuple[str, ...]


def plan(facts: ModelFacts, reading: MachineReading, work: Workload) -> MemoryPlan | Refusal:
    """Return a plan, or why none fits."""
    devices = _devices(reading, work.processes)
    quantisations = [False, True] if _can_quantise(facts, reading, work) else [False]
    for fewest in (FEWEST_ROWS, 1):
        for quantised in quantisations:
            found = _best_single(facts, devices, work, quantised, fewest)
            if found is None and len(devices) > 1:
                found = _most_rows(facts, devices, work, quantised, fewest)
            if found is not None:
                return _described(facts, reading, work, found, quantised)
    if work.offload and reading.gpus and reading.memory is not None:
        offloaded = _offloaded(facts, devices, reading.memory.available, work)
        if offloaded is not None:
            return _described(facts, reading, work, offloaded, quantised=False)
    return _refusal(facts, devices, work)


def _can_quantise(facts: ModelFacts, reading: MachineReading, work: Workload) -> bool:
    return work.quantise and bool(reading.gpus) and facts.quantisation is None


def _devices(reading: MachineReading, processes: int) -> list[Device]:
    """Return the devices with plannable memory; RAM is divided among processes."""
    if not reading.gpus:
        memory = reading.memory
        share, available = (int(RAM_SHARE * memory.total), memory.available) if memory else (0, 0)
        # The same share for like machines, unless something else has taken it.
        return [Device("cpu", "RAM", min(share, available) // processes, available // processes)]
    devices = []
    for gpu in reading.gpus:
        # An idle card's free memory varies a little from start to start; the plan must not.
        steady = gpu.total_bytes - IDLE_BYTES
        budget = steady if gpu.free_bytes >= steady else gpu.free_bytes
        devices.append(Device(f"cuda:{gpu.index}", gpu.name, budget, gpu.free_bytes))
    return devices


def _row_counts(devices: Sequence[Device], work: Workload, fewest: int) -> list[int]:
    """Return powers of two from the most useful rows down to the fewest."""
    most = MOST_ROWS["cpu" if devices[0].label == "cpu" else "cuda"]
    if work.most_rows is not None:
        most = max(min(most, work.most_rows), 1)
    highest = most.bit_length() - 1
    return [1 << power for power in range(highest, -1, -1) if 1 << power >= min(fewest, 1 << highest)]


def _best_single(
    facts: ModelFacts, devices: Sequence[Device], work: Workload, quantised: bool, fewest: int
) -> Layout | None:
    """Return the layout on the single device with the most rows, the first of equals."""
    found = [_most_rows(facts, [device], work, quantised, fewest) for device in devices]
    return max((layout for layout in found if layout), key=lambda layout: layout.rows, default=None)


def _most_rows(
    facts: ModelFacts, devices: Sequence[Device], work: Workload, quantised: bool, fewest: int
) -> Layout | None:
    for rows in _row_counts(devices, work, fewest):
        layout = _laid_out(facts, devices, work, rows, quantised)
        if layout is not None and (rows <= FEWEST_ROWS or not _takes_too_much(layout)):
            return layout
    return None


def _takes_too_much(layout: Layout) -> bool:
    """Return whether a large model on a CPU gets more memory besides weights than it benefits from."""
    first = layout.loads[0].plan
    large = first.device == "cpu" and first.weights >= LARGE_BYTES
    return large and first.cache + first.activations > CPU_SHARE * first.weights


def _laid_out(
    facts: ModelFacts,
    devices: Sequence[Device],
    work: Workload,
    rows: int,
    quantised: bool,
    host: Device | None = None,
) -> Layout | None:
    batch = Batch(
        rows=rows,
        prompt_tokens=work.prompt_tokens,
        answer_tokens=work.answer_tokens,
        read_tokens=READ_TOKENS.get(devices[0].label.partition(":")[0]),
    )
    return lay_out(facts, devices, batch, work.dtype_bytes, quantised=quantised, tables=work.tables, host=host)


def _offloaded(facts: ModelFacts, devices: Sequence[Device], ram: int, work: Workload) -> Layout | None:
    host = Device("cpu", "RAM", int(RAM_SHARE * ram), ram)
    limited = work.model_copy(update={"most_rows": min(work.most_rows or OFFLOAD_ROWS, OFFLOAD_ROWS)})
    for rows in _row_counts(devices, limited, 1):
        layout = _laid_out(facts, devices, limited, rows, quantised=False, host=host)
        if layout is not None:
            return layout
    return None


def _described(
    facts: ModelFacts, reading: MachineReading, work: Workload, layout: Layout, quantised: bool
) -> MemoryPlan:
    strategy: Strategy = "offload" if layout.offloaded else "single" if len(layout.loads) == 1 else "balanced"
    quantization: Quantization = "bnb-4bit" if quantised else "none"
    on_cpu = [load for load in layout.loads if load.plan.device == "cpu"]
    # On its way to a GPU each tensor passes through RAM, as stored and as cast.
    passing = 2 * facts.largest_tensor * work.dtype_bytes if reading.gpus else 0
    return MemoryPlan(
        strategy=strategy,
        quantization=quantization,
        rows=layout.rows,
        devices=tuple(load.plan for load in layout.loads),
        host_bytes=sum(load.plan.total for load in on_cpu) + passing + HOST_BYTES,
        settings=_settings(strategy, quantization, layout),
    )


def _settings(strategy: Strategy, quantization: Quantization, layout: Layout) -> tuple[str, ...]:
    placed = [f'loading.device_map = "{DEVICE_MAPS[strategy]}"']
    if strategy == "single":
        placed.append(f'loading.device = "{layout.loads[0].plan.device}"')
    return (*placed, f'loading.quantization = "{quantization}"', f"batching.rows = {layout.rows}")


def differences(found: MemoryPlan, device_map: object, quantization: Quantization) -> tuple[str, ...]:
    """Return the options that a job needs for a plan, where its own would not fit."""
    wanted = []
    if found.strategy != "single" and device_map == "single":
        wanted.append(f"--set loading.device_map={DEVICE_MAPS[found.strategy]}")
    if found.quantization != "none" and quantization == "none":
        wanted.append(f"--set loading.quantization={found.quantization}")
    return tuple(wanted)


def _refusal(facts: ModelFacts, devices: Sequence[Device], work: Workload) -> Refusal:
    full, free = facts.weights_bytes(work.dtype_bytes), sum(device.free for device in devices)
    reason = f"{size(full)} of weights"
    if work.quantise and facts.quantisation is None:
        reason += f" ({size(facts.weights_bytes(work.dtype_bytes, quantised=True))} in 4-bit)"
    reason += f", cache and activations do not fit into {size(free)} free on {len(devices)} device(s)"
    if devices[0].label == "cpu" and work.processes > 1:
        reason += f", the share of each of {work.processes} workers"
    named = []
    for quantised in (False, True) if work.quantise and facts.quantisation is None else (False,):
        found = cheapest(facts, work, quantised)
        if found is not None:
            card, count = found
            text = f"{count}x{card.name}" + (" in 4-bit" if quantised else "")
            named.append(f"{text} (roughly ${count * card.dollars[0]:.2f}–{count * card.dollars[1]:.2f} an hour)")
    return Refusal(reason=reason, would_do=tuple(named))


def cheapest(facts: ModelFacts, work: Workload, quantised: bool) -> tuple[Card, int] | None:
    """Return the cheapest set of cards that fits the model with a useful number of rows."""
    sets = sorted(((card, count) for card in cards() for count in COUNTS), key=lambda s: (s[0].price * s[1], s[1]))
    rows = min(FEWEST_ROWS, work.most_rows or FEWEST_ROWS)
    for card, count in sets:
        budget = card.total_bytes - IDLE_BYTES
        devices = [Device(f"cuda:{index}", card.name, budget, card.total_bytes) for index in range(count)]
        if _laid_out(facts, devices, work, rows, quantised) is not None:
            return card, count
    return None


def memory_check(found: MemoryPlan | Refusal, wanted: tuple[str, ...] = ()) -> Check:
    """Return the plan as a check; `wanted` are options that the job lacks for it (`differences`)."""
    if isinstance(found, Refusal):
        return Check(
            name="gpu.memory",
            status="fail",
            measured=found.reason,
            needed="a plan that fits",
            remedy=f"choose {' or '.join(found.would_do)}"
            if found.would_do
            else "no set of GPUs in the table is large enough",
        )
    slow = found.strategy == "offload"
    remedy = "choose more GPU memory: layers fetched from RAM make every forward pass many times slower" if slow else ""
    if wanted:
        remedy = f"the current settings do not fit: add {' '.join(wanted)}" + (f"; {remedy}" if remedy else "")
    held = ", ".join(f"{device.device} {size(device.total)} of {size(device.free)}" for device in found.devices)
    kind = "4-bit" if found.quantization == "bnb-4bit" else "full precision"
    return Check(
        name="gpu.memory",
        status="fail" if wanted else "warn" if slow else "ok",
        measured=f"{found.strategy}, {kind}, {found.rows} rows: {held}",
        needed="weights, hooks' tables, cache, activations and a margin within the free memory",
        remedy=remedy,
    )
