"""The devices of this machine."""

from __future__ import annotations

import platform
import re
from collections import Counter
from pathlib import Path

import torch

from job.errors import MachineError

_CPUS = Path("/proc/cpuinfo")


def resolve_device(name: str) -> torch.device:
    """Return the device of a setting. Raises MachineError if this machine lacks it."""
    if name == "auto":
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    device = torch.device(name)
    count = {
        "cuda": torch.cuda.device_count(),
        "mps": int(torch.backends.mps.is_available()),
    }.get(device.type, 1)
    if (device.index or 0) >= count:
        raise MachineError(f"this machine has no device {name}", remedy="choose another loading.device")
    return device


def hardware(device: torch.device) -> str:
    """Describe the hardware that computes on a device."""
    if device.type == "cuda":
        names = Counter(torch.cuda.get_device_name(index) for index in range(torch.cuda.device_count()))
        return ", ".join(f"{count} × {name}" for name, count in names.items())
    return f"{device_kind(device)}, {torch.get_num_threads()} threads"


def device_kind(device: torch.device) -> str:
    """Return the kind of a device, regardless of its number or cores."""
    if device.type == "cuda":
        return torch.cuda.get_device_name(device)
    models = re.findall(r"^model name\s*:\s*(.+)$", _CPUS.read_text(), re.MULTILINE) if _CPUS.exists() else []
    return models[0].strip() if models else platform.processor() or platform.machine()
