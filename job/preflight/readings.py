"""What a machine is, as values: measured, recorded (`--on FILE`) or looked up (`--on 4xRTX4090`)."""

from __future__ import annotations

from pathlib import Path
from typing import Literal

from pydantic import ValidationError

from job.errors import UsageError
from job.preflight.limits import Cpus, Memory
from job.records import Record


class Holder(Record):
    """A process that holds memory of a GPU.

    Attributes:
        pid: Its process id as the driver tells it: the host's, which need not be ours in a container.
        name: Its name, None where the id is not known to be one of ours.
        used_bytes: What it holds, None where the driver does not tell.
        ours: It is this process.
    """

    pid: int
    name: str | None = None
    used_bytes: int | None = None
    ours: bool = False


class GpuReading(Record):
    """One GPU, or one MIG slice of it, that this process may use.

    Attributes:
        index: Its number among those (as in cuda:N).
        uuid: The driver's name for it.
        name: Its product name.
        total_bytes: Memory that programs can have altogether.
        free_bytes: Memory that is free now.
        compute_capability: Major and minor.
        ecc_uncorrected: Uncorrected memory errors since the driver was loaded; None where it does not count them.
        mig: It is, or is cut into, MIG slices.
        holders: Processes that hold its memory, as far as the driver shows them.
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
        """What this process itself holds, as far as the driver shows it."""
        return sum(holder.used_bytes or 0 for holder in self.holders if holder.ours)

    @property
    def foreign_bytes(self) -> int:
        """What others hold, also those whose processes cannot be seen."""
        return max(self.total_bytes - self.free_bytes - self.ours_bytes, 0)

    @property
    def bf16(self) -> bool:
        """Whether it computes in bfloat16 (from compute capability 8.0 on)."""
        return self.compute_capability >= (8, 0)


class DriverReading(Record):
    """The driver and the torch build that has to work with it.

    Attributes:
        driver_version: E.g. "570.124.06".
        cuda_driver: What the driver supports: 1000 × major + 10 × minor, e.g. 12080.
        error: Why the driver's library is there but does not work.
        torch_cuda: CUDA version torch was built for, None for a build without CUDA.
        arch_list: Architectures torch was built for, e.g. ("sm_80", "sm_90"); () where it does not tell.
    """

    driver_version: str | None = None
    cuda_driver: int | None = None
    error: str | None = None
    torch_cuda: str | None = None
    arch_list: tuple[str, ...] = ()


class MachineReading(Record):
    """All that the checks and the planner need to know of a machine.

    Attributes:
        source: measured or recorded; table: looked up, so that nothing is known of its driver and its RAM.
        memory: None where unknown.
        cpus: None where unknown.
    """

    version: Literal[1] = 1
    source: Literal["measured", "recorded", "table"] = "recorded"
    gpus: tuple[GpuReading, ...] = ()
    driver: DriverReading = DriverReading()
    memory: Memory | None = None
    cpus: Cpus | None = None


def read_reading(path: Path) -> MachineReading:
    """Return a reading from a JSON file.

    Raises:
        UsageError: The file is not there or holds none.
    """
    try:
        return MachineReading.model_validate_json(path.read_bytes()).model_copy(update={"source": "recorded"})
    except OSError as error:
        raise UsageError(f"cannot read the machine reading {path}: {error.strerror}", remedy="check --on") from error
    except ValidationError as error:
        fault = error.errors()[0]
        where = ".".join(map(str, fault["loc"]))
        raise UsageError(
            f"{path} is no machine reading: {where} {fault['msg'][0].lower()}{fault['msg'][1:]}", remedy="check --on"
        ) from error
