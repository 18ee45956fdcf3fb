"""Short self-test of a device: arithmetic, memory and speed."""

from __future__ import annotations

import time
from collections.abc import Callable
from typing import TYPE_CHECKING

import psutil

from job.errors import first_line
from job.preflight.checks import GIB, MIB, Check, size
from job.records import Record

if TYPE_CHECKING:
    import torch

# Memory that is written and read back: enough to touch many chips, done in a fraction of a second.
PATTERN_BYTES = {"cuda": 8 * GIB, "cpu": 64 * MIB}
# Without time to measure rates, a CPU's memory is not worth more: a host's pages cost more than the rest of preflight.
_PATTERN_BYTES_WITHOUT_TIME = MIB
# On a CPU the first of several: without units for bfloat16, this alone takes it milliseconds.
_SIDES = {"cuda": 4096, "cpu": 192}
# A shorter product would measure what it takes to begin one. Below that, the side is doubled.
_LONG_ENOUGH = {"cuda": 0.0, "cpu": 2e-3}
# A CPU reads half the bytes in bfloat16; what its arithmetic loses has to be more than that.
_CLEARLY_FASTER = 2.0
_CHUNK_BYTES = 256 * MIB
RATE_SECONDS = 0.4


class Exercise(Record):
    """What a device was found to do.

    Attributes:
        device: E.g. "cuda:0".
        fault: What it did wrong, None if nothing.
        pattern_bytes: Memory that was written and read back.
        flops: Rate of matrix products in bfloat16 (float32 on a CPU), operations a second.
        half_flops: Rate of matrix products in bfloat16 on a CPU; 0 on a GPU.
        bandwidth: Rate of copying within its memory, bytes read and written a second.
    """

    device: str
    fault: str | None = None
    pattern_bytes: int = 0
    flops: float = 0.0
    half_flops: float = 0.0
    bandwidth: float = 0.0

    @property
    def prefers_float32(self) -> bool:
        """Whether it computes much faster in float32 than in bfloat16: a CPU without units for the latter."""
        return 0 < _CLEARLY_FASTER * self.half_flops < self.flops


def exercise(device: str, *, most_bytes: int | None = None, seconds: float = RATE_SECONDS) -> Exercise:
    """Test a device's memory, up to `most_bytes` and a quarter of it, and two rates for `seconds` each.

    With 0 seconds a rate comes from a single step, and a CPU's memory is tested up to 1 MiB.
    """
    import torch

    target = torch.device(device)
    kind = "cuda" if target.type == "cuda" else "cpu"
    try:
        # Beside the pattern stand its copy to compare with and the comparison.
        most = _PATTERN_BYTES_WITHOUT_TIME if kind == "cpu" and seconds == 0 else PATTERN_BYTES[kind]
        budget = min(most_bytes or most, _free(target) // 4)
        fault = _wrong_product(target) or _forgotten_pattern(target, budget)
        flops = _product_rate(target, torch.bfloat16 if kind == "cuda" else torch.float32, seconds)
        half = _product_rate(target, torch.bfloat16, seconds / 4) if kind == "cpu" else 0.0
        bandwidth = _copy_rate(target, min(budget, _CHUNK_BYTES), seconds)
    except (RuntimeError, AssertionError) as error:
        # Errors of the CUDA runtime, of its allocator and of a torch without CUDA: what is looked for.
        return Exercise(device=device, fault=first_line(error))
    finally:
        if kind == "cuda":
            torch.cuda.empty_cache()
    rates = {"flops": flops, "half_flops": half, "bandwidth": bandwidth}
    return Exercise(device=device, fault=fault, pattern_bytes=budget, **rates)


def compute_check(found: Exercise) -> Check:
    """Judge a device's self-test."""
    rates = f"{found.flops / 1e12:.2g} TFLOP/s, {found.bandwidth / 1e9:.3g} GB/s"
    return Check(
        name="gpu.compute",
        status="fail" if found.fault else "ok",
        measured=f"{found.device}: {found.fault or f'right; {size(found.pattern_bytes)} of memory verified; {rates}'}",
        needed="a correct matrix product and memory pattern",
        remedy="choose another host and report this one: the device is broken or in use" if found.fault else "",
    )


def _free(device: torch.device) -> int:
    import torch

    if device.type == "cuda":
        return int(torch.cuda.mem_get_info(device)[0])
    return int(psutil.virtual_memory().available)


def _wrong_product(device: torch.device) -> str | None:
    """Multiply small integers, exact in every summation order and in TF32."""
    import torch

    generator = torch.Generator().manual_seed(0)
    a, b = (torch.randint(-3, 4, (512, 512), generator=generator) for _ in range(2))
    expected = (a.to(torch.float64) @ b.to(torch.float64)).to(torch.float32)
    product = (a.to(device, torch.float32) @ b.to(device, torch.float32)).cpu()
    wrong = int((product != expected).sum())
    return f"{wrong} of {product.numel()} entries of a matrix product are wrong" if wrong else None


def _forgotten_pattern(device: torch.device, budget: int) -> str | None:
    """Fill memory with a position-dependent pattern, before reading any back."""
    import torch

    count = min(_CHUNK_BYTES, budget) // 4
    pattern = torch.arange(count, dtype=torch.int32, device=device) ^ 0x5A5A5A5A
    # Each chunk is filled with its own number mixed in, so that mixed-up addresses show.
    chunks = [pattern ^ number for number in range(budget // (count * 4))]
    wrong = sum(int((chunk != (pattern ^ number)).sum()) for number, chunk in enumerate(chunks))
    return f"{wrong} words of memory lost their value" if wrong else None


def _product_rate(device: torch.device, dtype: torch.dtype, seconds: float) -> float:
    import torch

    kind = "cuda" if device.type == "cuda" else "cpu"
    side = _SIDES[kind]

    def product_time(longest: float) -> float:
        a = torch.ones(side, side, dtype=dtype, device=device)
        return _time_of(lambda: a @ a, device, longest)

    while product_time(0) < _LONG_ENOUGH[kind]:
        side *= 2
    return 2 * side**3 / product_time(seconds)


def _copy_rate(device: torch.device, count: int, seconds: float) -> float:
    import torch

    source = torch.zeros(count, dtype=torch.uint8, device=device)
    target = torch.empty_like(source)
    return 2 * count / _time_of(lambda: target.copy_(source), device, seconds)


def _time_of(action: Callable[[], object], device: torch.device, seconds: float) -> float:
    """Return the seconds that `action` takes at best: other processes slow single repetitions down."""
    import torch

    # Several before each wait, so that waiting for the device does not count as its work.
    at_once = 8 if device.type == "cuda" else 1

    def run() -> float:
        started = time.perf_counter()
        for _ in range(at_once):
            action()
        if device.type == "cuda":
            torch.cuda.synchronize(device)
        return (time.perf_counter() - started) / at_once

    run()
    ends, best = time.perf_counter() + seconds, run()
    while time.perf_counter() < ends:
        best = min(best, run())
    return max(best, 1e-9)
