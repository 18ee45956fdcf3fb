"""Description of a machine: measured, recorded (`--on FILE`) or from the table (`--on 4xRTX4090`)."""

from __future__ import annotations

from pathlib import Path
from typing import Literal

from pydantic import ValidationError

from job.errors import UsageError
from job.preflight.limits import Cpus, Memory
from job.records import Record


class Holder(Record):
    """A process that holds GPU memory.

    Attributes:
        pid: The driver's process id, on the host; may differ in a container.
        name: Its name, None if the id is not known to be valid here.
    """

    pid: int
    name: str | None = None
    used_bytes: int | None = None
    ours: bool = False


class GpuReading(Record):
    """A GPU or MIG slice available to this process.

    Attributes:
        total_bytes: Usable memory.
        ecc_uncorrected: Uncorrected memory errors since the driver was loaded; None if not counted.
        mig: It is a MIG slice, or is divided into slices.
    """

    index: int
    uuid: str = ""
    name: str
    total_bytes: int
    free_bytes: int
    compute_capability: tuple[int, int]
    ecc_uncorrected: int | None = None
    mig: bool = False
    holders: tuple[Holder, ...] = ()

    @property
    def ours_bytes(self) -> int:
        """Memory of this process, as shown by the driver."""
        return sum(holder.used_bytes or 0 for holder in self.holders if holder.ours)

    @property
    def foreign_bytes(self) -> int:
        """Memory held by others, even by invisible processes."""
        return max(self.total_bytes - self.free_bytes - self.ours_bytes, 0)

    @property
    def bf16(self) -> bool:
        """Whether it supports bfloat16 (compute capability 8.0 and later)."""
        return self.compute_capability >= (8, 0)


class DriverReading(Record):
    """The driver and torch's build.

    Attributes:
        cuda_driver: Supported CUDA version: 1000 × major + 10 × minor, e.g. 12080.
        error: Why the installed driver library does not work.
        arch_list: Architectures of torch, e.g. ("sm_80", "sm_90"); () if unknown.
    """

    driver_version: str | None = None
    cuda_driver: int | None = None
    error: str | None = None
    torch_cuda: str | None = None
    arch_list: tuple[str, ...] = ()


class MachineReading(Record):
    """A machine for checks and planner; `source` "table" has unknown driver, memory and CPUs."""

    version: Literal[1] = 1
    source: Literal["measured", "recorded", "table"] = "recorded"
    gpus: tuple[GpuReading, ...] = ()
    driver: DriverReading = DriverReading()
    memory: Memory | None = None
    cpus: Cpus | None = None


def read_reading(path: Path) -> MachineReading:
    """Read a machine reading from JSON. Raises UsageError if it is missing or invalid."""
    try:
        return MachineReading.model_validate_json(path.read_bytes()).model_copy(update={"source": "recorded"})
    except OSError as error:
        raise UsageError(f"cannot read the machine reading {path}: {error.strerror}", remedy="check --on") from error
    except ValidationError as error:
        fault = error.errors()[0]
        where = ".".join(map(str, fault["loc"]))
        raise UsageError(
            f"{path} is not a machine reading: {where} {fault['msg'][0].lower()}{fault['msg'][1:]}", remedy="check --on"
        ) from error
