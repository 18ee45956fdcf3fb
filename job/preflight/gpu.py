"""GPU checks, which judge a `MachineReading` without accessing the machine."""

from __future__ import annotations

import re
from collections.abc import Sequence

from job.preflight.checks import MIB, Check, size
from job.preflight.readings import DriverReading, GpuReading, MachineReading

# Oldest driver of each major CUDA version (CUDA release notes, minor version compatibility).
OLDEST_DRIVERS = {11: 450, 12: 525, 13: 580}
# What an idle card may hold: the driver's own, a display, the context of this very check.
IDLE_BYTES = 600 * MIB
# A share that others hold of a card above which nothing should be started on it.
FOREIGN_SHARE = 0.1
# Difference of the used shares of two cards that tells of one being filled while others idle.
UNEVEN_SHARE = 0.5
_BLACKWELL, _HOPPER = (10, 0), (9, 0)


def gpu_checks(reading: MachineReading) -> list[Check]:
    """Return the checks that apply to a machine."""
    if not reading.gpus:
        return [gpu_present(reading)]
    checks = [gpu_present(reading)]
    # Of a card that was looked up nothing is known but what it is.
    if reading.source != "table":
        checks += [driver(reading.driver), architecture(reading)]
    checks.append(bf16(reading.gpus))
    for gpu in reading.gpus:
        checks += [holders(gpu), ecc(gpu)]
    if any(gpu.mig for gpu in reading.gpus):
        checks.append(mig(reading.gpus))
    if len(reading.gpus) > 1:
        checks.append(balance(reading.gpus))
    return checks


def gpu_present(reading: MachineReading) -> Check:
    """Report the GPUs; an installed driver that does not work fails."""
    error = reading.driver.error
    found = ", ".join(f"{gpu.name} ({size(gpu.total_bytes)})" for gpu in reading.gpus)
    return Check(
        name="gpu.present",
        status="fail" if error else "ok",
        measured=error or found or "no GPU: the job runs on the CPU",
        needed="a working driver, if there is a GPU",
        remedy="restart the instance or choose another: the host's driver is broken or incompatible" if error else "",
    )


def driver(reading: DriverReading) -> Check:
    """Compare the driver's CUDA version with torch's."""
    shown = reading.driver_version or "unknown version"
    measured = (
        f"driver {shown}, CUDA {_cuda(reading.cuda_driver)}; torch built for CUDA {reading.torch_cuda or '(none)'}"
    )
    if reading.torch_cuda is None:
        return Check(
            name="gpu.driver",
            status="fail",
            measured=measured,
            needed="a torch built for CUDA",
            remedy="install torch from PyPI or the CUDA index, or hide the GPU with CUDA_VISIBLE_DEVICES=",
        )
    major = int(reading.torch_cuda.split(".")[0])
    oldest = OLDEST_DRIVERS.get(major)
    needed = f"a driver for CUDA {major}" + (f", {oldest} or newer" if oldest else "")
    # The library's own number decides where there is one: it knows of compatibility packages.
    if reading.cuda_driver is not None:
        fits = reading.cuda_driver // 1000 >= major
    else:
        fits = oldest is None or reading.driver_version is None or int(reading.driver_version.split(".")[0]) >= oldest
    return Check(
        name="gpu.driver",
        status="ok" if fits else "fail",
        measured=measured,
        needed=needed,
        remedy="" if fits else f"choose a host with a newer driver (Vast.ai: cuda_max_good>={major}.0)",
    )


def _cuda(version: int | None) -> str:
    return "unknown" if version is None else f"{version // 1000}.{version % 1000 // 10}"


def architecture(reading: MachineReading) -> Check:
    """Compare the cards with the architectures that torch was built for."""
    lacking = [gpu for gpu in reading.gpus if not _is_built_for(gpu.compute_capability, reading.driver)]
    names = ", ".join(dict.fromkeys(f"{gpu.name} (sm_{_number(gpu.compute_capability)})" for gpu in reading.gpus))
    built = " ".join(reading.driver.arch_list) or f"CUDA {reading.driver.torch_cuda or '(none)'}"
    return Check(
        name="gpu.architecture",
        status="fail" if lacking else "ok",
        measured=f"{names}; torch built for {built}",
        needed="a torch built for this GPU; Blackwell needs CUDA 12.8 or newer",
        remedy="use an image with a torch built for this GPU, or another GPU" if lacking else "",
    )


def _number(capability: tuple[int, int]) -> int:
    return capability[0] * 10 + capability[1]


def _is_built_for(capability: tuple[int, int], reading: DriverReading) -> bool:
    if not reading.arch_list:
        # Torch does not tell before a device works; the age of the toolkit does.
        if reading.torch_cuda is None:
            return False
        version = tuple(int(part) for part in reading.torch_cuda.split(".")[:2])
        return version >= ((12, 8) if capability >= _BLACKWELL else (11, 8) if capability >= _HOPPER else (11, 0))
    for name in reading.arch_list:
        match = re.fullmatch(r"(sm|compute)_(\d+)(\d)([af]?)", name)
        if match is None:
            continue
        built = int(match[2]), int(match[3])
        # Machine code runs on later cards of its major version, code for all on every later one, and
        # what is marked "a" on that very card alone.
        same_family = built[0] == capability[0] and built <= capability
        if built == capability or (not match[4] and (same_family or (match[1] == "compute" and built <= capability))):
            return True
    return False


def bf16(gpus: Sequence[GpuReading]) -> Check:
    """Report whether all cards support bfloat16; otherwise the job falls back to float16."""
    lacking = [gpu for gpu in gpus if not gpu.bf16]
    capabilities = ", ".join(dict.fromkeys(f"{gpu.name}: {'.'.join(map(str, gpu.compute_capability))}" for gpu in gpus))
    return Check(
        name="gpu.bf16",
        status="warn" if lacking else "ok",
        measured=f"compute capability {capabilities}",
        needed="8.0 for bfloat16",
        remedy="choose an Ampere or newer GPU: float16 will be tried, which overflows on some models"
        if lacking
        else "",
    )


def holders(gpu: GpuReading) -> Check:
    """Report the memory of a card held by others, even by invisible processes."""
    foreign = gpu.foreign_bytes
    seen = [holder for holder in gpu.holders if not holder.ours]
    if foreign <= IDLE_BYTES:
        status, remedy = "ok", ""
    else:
        status = "fail" if foreign > FOREIGN_SHARE * gpu.total_bytes else "warn"
        remedy = (
            "end them if they are yours, wait with --wait-for-gpu, or choose other GPUs with CUDA_VISIBLE_DEVICES"
            if seen
            else "wait with --wait-for-gpu or choose another host: processes outside this container use the GPU"
        )
    who = ", ".join(_described(holder.pid, holder.name, holder.used_bytes) for holder in seen)
    return Check(
        name="gpu.holders",
        status=status,
        measured=f"GPU {gpu.index}: {size(gpu.free_bytes)} of {size(gpu.total_bytes)} free, others hold {size(foreign)}"
        + (f" ({who})" if who else ""),
        needed=f"others hold at most {size(IDLE_BYTES)}",
        remedy=remedy,
    )


def _described(pid: int, name: str | None, used: int | None) -> str:
    return f"process {pid}" + (f" {name}" if name else "") + (f" {size(used)}" if used is not None else "")


def ecc(gpu: GpuReading) -> Check:
    """Report whether a card's memory has had uncorrected errors since its driver was loaded."""
    bad = bool(gpu.ecc_uncorrected)
    counted = "not counted" if gpu.ecc_uncorrected is None else str(gpu.ecc_uncorrected)
    return Check(
        name="gpu.ecc",
        status="fail" if bad else "ok",
        measured=f"GPU {gpu.index}: uncorrected memory errors: {counted}",
        needed="none",
        remedy="choose another host and report this one: its results cannot be trusted" if bad else "",
    )


def mig(gpus: Sequence[GpuReading]) -> Check:
    """Report MIG: a process gets one slice, whatever the card's size."""
    sliced = [gpu for gpu in gpus if gpu.mig]
    return Check(
        name="gpu.mig",
        status="warn",
        measured=f"MIG is on: {', '.join(f'{gpu.name} {size(gpu.total_bytes)}' for gpu in sliced)}",
        needed="whole GPUs",
        remedy="plan for the memory of one slice, which is all that a process can use, or choose a host without MIG",
    )


def balance(gpus: Sequence[GpuReading]) -> Check:
    """Report whether one card is filled while others idle."""
    used = [1 - gpu.free_bytes / gpu.total_bytes for gpu in gpus]
    uneven = max(used) - min(used) > UNEVEN_SHARE
    idle = [gpu.index for gpu, share in zip(gpus, used, strict=True) if share < max(used) - UNEVEN_SHARE]
    return Check(
        name="gpu.balance",
        status="warn" if uneven else "ok",
        measured="used: " + ", ".join(f"GPU {g.index} {share:.0%}" for g, share in zip(gpus, used, strict=True)),
        needed=f"no GPU full while others are idle (difference under {UNEVEN_SHARE:.0%})",
        remedy=f"use the free ones: CUDA_VISIBLE_DEVICES={','.join(map(str, idle))}, or loading.device_map=balanced"
        if uneven
        else "",
    )
