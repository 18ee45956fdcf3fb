"""Distribute layers over devices evenly."""

from __future__ import annotations

from bisect import bisect_right
from collections.abc import Sequence
from dataclasses import dataclass, replace

from job.preflight.activation_memory import Batch, activation_bytes, cache_bytes, scoring_bytes
from job.preflight.checks import MIB
from job.preflight.model_facts import ModelFacts
from job.preflight.table_memory import EditTables, batch_bytes, product_bytes
from job.records import Record

# What CUDA's context, its libraries' workspaces and Python itself take on a device.
CONTEXT_BYTES = 600 * MIB
# What the allocator loses to fragmentation, as a share of what comes and goes.
FRAGMENTATION = 0.1
# Share of the RAM that the job may take where the model is on the CPU or offloaded to it.
RAM_SHARE = 0.8
# Steps of the search for the evenest filling; 2⁻²⁰ of a device is less than a layer.
_STEPS = 20


@dataclass(frozen=True)
class Device:
    """A device to plan with.

    Attributes:
        budget: Bytes available to the plan.
        free: Bytes free now.
    """

    label: str
    name: str
    budget: int
    free: int


class DevicePlan(Record):
    """Planned contents of a device, bytes.

    Attributes:
        device: torch's name; "cpu" is RAM.
        weights: Weights of its layers, embedding and head.
        tables: Hooks' products with the weights, and the tables of a batch of trials.
        cache: KV cache at the end of decoding.
        activations: Other peak memory.
        margin: CUDA context, workspaces and fragmentation.
        loading_peak: Weights and the tensor being cast on loading.
    """

    device: str
    name: str
    layers: int
    weights: int
    tables: int = 0
    cache: int
    activations: int
    margin: int
    loading_peak: int
    free: int

    @property
    def total(self) -> int:
        """Peak bytes."""
        return max(self.weights + self.tables + self.cache + self.activations + self.margin, self.loading_peak)


@dataclass(frozen=True)
class Load:
    """Layers on a device, and its contents with them."""

    layers: range
    plan: DevicePlan

    @classmethod
    def of(cls, device: Device, layers: range, **contents: int) -> Load:
        """Return a load with contents in bytes."""
        plan = DevicePlan(device=device.label, name=device.name, layers=len(layers), free=device.free, **contents)
        return cls(layers, plan)


@dataclass(frozen=True)
class Layout:
    """Layers on devices, in order; offloaded ones are on the last, RAM."""

    rows: int
    loads: tuple[Load, ...]
    offloaded: bool = False


def lay_out(
    facts: ModelFacts,
    devices: Sequence[Device],
    batch: Batch,
    dtype_bytes: int,
    *,
    quantised: bool,
    tables: EditTables,
    host: Device | None = None,
) -> Layout | None:
    """Return the layout that fills all devices, in order, evenly, None if none fits.

    `dtype_bytes` are those of a number in the loaded type; `host` takes layers that do not fit the devices.
    """
    planner = _Planner(facts, batch, dtype_bytes, quantised, tables)
    if host is not None:
        return planner.with_host(devices, host)
    weights = facts.weights_bytes(dtype_bytes, quantised=quantised)
    if weights > sum(device.budget for device in devices) or planner.filled(devices, 1.0) is None:
        return None
    low, high = 0.0, 1.0
    for _ in range(_STEPS):
        middle = (low + high) / 2
        low, high = (low, middle) if planner.filled(devices, middle) else (middle, high)
    loads = planner.filled(devices, high)
    assert loads is not None
    return Layout(batch.rows, tuple(loads))


class _Planner:
    def __init__(self, facts: ModelFacts, batch: Batch, dtype_bytes: int, quantised: bool, tables: EditTables) -> None:
        self._tables = tables
        self._facts, self._batch, self._dtype_bytes = facts, batch, dtype_bytes
        self._layer_bytes = [part.bytes(dtype_bytes, quantised=quantised) for part in facts.layer_weights]
        self._first = facts.embedding.bytes(dtype_bytes) + facts.other.bytes(dtype_bytes)
        self._last = facts.head.bytes(dtype_bytes)
        self._largest = facts.largest_tensor * dtype_bytes
        self._cached: dict[tuple[int, int], tuple[int, int]] = {}

    def filled(self, devices: Sequence[Device], share: float) -> list[Load] | None:
        """Return the layers on devices filled to a share, None if some are left over."""
        loads, start = [], 0
        for number, device in enumerate(devices):
            load = self._longest(device, start, int(device.budget * share), first=number == 0)
            if load is None:
                return None
            loads.append(load)
            start = load.layers.stop
        return loads if start == self._facts.layers else None

    def with_host(self, devices: Sequence[Device], host: Device) -> Layout | None:
        """Fill the devices in order; the rest and the head stay in RAM, computed and cached by the first device."""
        visiting = max(*self._layer_bytes, self._last)
        whole = range(self._facts.layers)
        everything = cache_bytes(self._facts, self._batch, self._dtype_bytes) + self._held_bytes(whole)
        loads: list[Load] = []
        start = 0
        for number, device in enumerate(devices):
            room = device.budget - visiting - (everything if number == 0 else 0)
            load = self._longest(device, start, room, first=number == 0)
            if load is None:
                return None
            loads.append(load)
            start = load.layers.stop
        rest = range(start, self._facts.layers)
        weights = sum(self._layer_bytes[rest.start : rest.stop]) + self._last
        if not rest or weights + self._largest > host.budget:
            return None
        visited = cache_bytes(self._facts, self._batch, self._dtype_bytes, rest)
        first = loads[0].plan
        added = {
            "tables": first.tables + self._held_bytes(rest),
            "cache": first.cache + visited,
            "margin": first.margin + visiting,
        }
        loads[0] = replace(loads[0], plan=first.model_copy(update=added))
        kept = Load.of(
            host,
            rest,
            weights=weights,
            cache=0,
            activations=0,
            margin=self._largest,
            loading_peak=weights + self._largest,
        )
        return Layout(self._batch.rows, (*loads, kept), offloaded=True)

    def _longest(self, device: Device, start: int, room: int, *, first: bool) -> Load | None:
        """Return the most layers from `start` that fit, possibly none; None if not even those."""
        # More layers never take less, so that halving finds where they stop fitting.
        fitting = bisect_right(
            range(start, self._facts.layers + 1),
            room,
            key=lambda stop: self._load(device, range(start, stop), first=first).plan.total,
        )
        return self._load(device, range(start, start + fitting - 1), first=first) if fitting else None

    def _load(self, device: Device, layers: range, *, first: bool) -> Load:
        last = bool(layers) and layers.stop == self._facts.layers
        weights = sum(self._layer_bytes[layers.start : layers.stop])
        weights += (self._first if first else 0) + (self._last if last else 0)
        cache, activations = self._working(layers)
        # The head works where it lies: on the last device, or with the embedding it is tied to.
        if first if self._facts.tied else last:
            scoring = scoring_bytes(self._facts, self._batch.rows_read, self._dtype_bytes)
            activations = max(activations, scoring - cache)
        return Load.of(
            device,
            layers,
            weights=weights,
            tables=self._held_bytes(layers),
            cache=cache,
            activations=activations,
            margin=CONTEXT_BYTES + int(FRAGMENTATION * (cache + activations)),
            loading_peak=weights + self._largest + CONTEXT_BYTES,
        )

    def _held_bytes(self, layers: range) -> int:
        return sum(part(self._facts, self._tables, layers) for part in (product_bytes, batch_bytes))

    def _working(self, layers: range) -> tuple[int, int]:
        key = (layers.start, layers.stop)
        if key not in self._cached:
            args = self._facts, self._batch, self._dtype_bytes
            self._cached[key] = (
                cache_bytes(*args, layers),
                activation_bytes(*args, edits=self._tables.edits, layers=layers),
            )
        return self._cached[key]
