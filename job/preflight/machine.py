"""Read the machine: combines driver, NVML, kernel and torch."""

from __future__ import annotations

import ast
import importlib.util
from pathlib import Path

from job.preflight import cuda, nvml
from job.preflight.limits import read_cpus, read_memory
from job.preflight.readings import DriverReading, GpuReading, MachineReading


def read_machine(*, torch_architectures: bool = False, cuda_library: str = cuda.LIBRARY) -> MachineReading:
    """Return this machine's hardware and free resources; `torch_architectures` imports torch."""
    reading = cuda.read_cuda(cuda_library)
    gpus = []
    with nvml.nvml_session():
        version = nvml.driver_version()
        for index, device in enumerate(reading.devices):
            found = nvml.read_device(device.uuid)
            free = found.free_bytes
            if free is None:
                free = cuda.free_bytes(index, cuda_library)
            total = min(device.total_bytes, found.total_bytes or device.total_bytes)
            gpus.append(
                GpuReading(
                    index=index,
                    uuid=device.uuid,
                    name=device.name,
                    total_bytes=total,
                    free_bytes=min(total if free is None else free, total),
                    compute_capability=device.compute_capability,
                    ecc_uncorrected=found.ecc_uncorrected,
                    mig=found.mig,
                    holders=found.holders,
                )
            )
    driver = DriverReading(
        driver_version=version,
        cuda_driver=reading.version,
        error=reading.error,
        torch_cuda=torch_cuda_version(),
        arch_list=_torch_architectures() if torch_architectures else (),
    )
    return MachineReading(source="measured", gpus=tuple(gpus), driver=driver, memory=read_memory(), cpus=read_cpus())


def torch_cuda_version() -> str | None:
    """Return the CUDA version of torch, read from its files without importing it."""
    spec = importlib.util.find_spec("torch")
    if spec is None or spec.origin is None:
        return None
    try:
        tree = ast.parse((Path(spec.origin).parent / "version.py").read_text())
    except (OSError, SyntaxError):
        return None
    for node in tree.body:
        if not isinstance(node, ast.Assign | ast.AnnAssign):
            continue
        targets = node.targets if isinstance(node, ast.Assign) else [node.target]
        named = [target.id for target in targets if isinstance(target, ast.Name)]
        if named == ["cuda"] and isinstance(node.value, ast.Constant):
            return str(node.value.value) if node.value.value else None
    return None


def _torch_architectures() -> tuple[str, ...]:
    import torch

    # Empty where torch finds no usable device, whatever it was built for.
    return tuple(torch.cuda.get_arch_list()) if torch.cuda.is_available() else ()
