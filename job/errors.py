"""Expected failures: each is a type with an exit code, says what happened and what to do about it."""

from __future__ import annotations


class JobError(Exception):
    """A failure with a message for the user instead of a traceback.

    Attributes:
        exit_code: What the process ends with.
        remedy: What the user can do; "" where the message says it all.
    """

    exit_code = 1

    def __init__(self, what: str, *, remedy: str = "") -> None:
        super().__init__(what)
        self.remedy = remedy

    @property
    def line(self) -> str:
        """The failure and its remedy in one line."""
        text = f"{self} — {self.remedy}" if self.remedy else str(self)
        return " ".join(text.split())


class UsageError(JobError):
    """Bad usage or settings."""

    exit_code = 2


class ImpossibleJobError(JobError):
    """This job cannot succeed on any machine: model, data or architecture."""

    exit_code = 3


class UnsupportedArchitectureError(ImpossibleJobError):
    """The model's family cannot be edited completely, so it is not edited at all.

    Attributes:
        reason: Why, without naming the family.
    """

    def __init__(self, model_type: str, reason: str) -> None:
        super().__init__(
            f"models of type {model_type!r} are not supported: {reason}",
            remedy="choose a model of a supported family (`abliterate inspect MODEL` tells)",
        )
        self.reason = reason


class QuantisedSourceError(UnsupportedArchitectureError):
    """The model's files are quantised in a way that cannot be undone, so that its weights cannot be edited.

    Attributes:
        reason: Why, with the remedy.
    """

    def __init__(self, method: str, detail: str = "") -> None:
        more = f": {detail}" if detail else ""
        what = f"files quantised with {method} cannot be edited{more}"
        remedy = "use the unquantised model that they were made from"
        ImpossibleJobError.__init__(self, what, remedy=remedy)
        self.reason = f"{what} - {remedy}"


class HeldError(JobError):
    """Another run holds this job.

    Attributes:
        elsewhere: It runs on another machine, so that this one is not needed for the job.
    """

    exit_code = 4

    def __init__(self, what: str, *, remedy: str = "", elsewhere: bool = False) -> None:
        super().__init__(what, remedy=remedy)
        self.elsewhere = elsewhere


class GateError(JobError):
    """The result misses a gate: it is exported, and not delivered."""

    exit_code = 5


class DeliveryError(JobError):
    """A target failed for good; the local result is kept."""

    exit_code = 6


class MachineError(JobError):
    """This machine cannot do the job, another may: disk, memory, permissions."""

    exit_code = 76


class AcceleratorFaultError(MachineError):
    """The device failed in a way after which this process cannot use it any more."""


class RestartNeeded(Exception):  # noqa: N818 - a request, not an error
    """The job has to go on in a fresh process: the device cannot be used in this one any more."""


class ExportMismatchError(JobError):
    """What was written is not what was measured."""


class Stopped(BaseException):
    """The user or the platform asked the run to stop; the same command continues it.

    It is not an `Exception`, so that no handler of those can swallow it.
    """

    exit_code = 75
