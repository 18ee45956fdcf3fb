"""Expected failures: types with an exit code, a message and a remedy."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager

# What Rust raises where it did not expect a value: tokenizers and safetensors are written in it. No module exports it.
_PANIC = "PanicException"


def printable(text: str) -> str:
    """Replace control and invisible characters by spaces; line feeds and tabs stay."""
    return "".join(char if char.isprintable() or char in "\n\t" else " " for char in text)


def one_line(text: object) -> str:
    """Return a text on one line, without control characters."""
    return " ".join(printable(str(text)).split())


def in_one_line(error: BaseException, most: int = 200) -> str:
    """Return an error's message in one line of at most `most` characters; its type if it has none."""
    return (one_line(error) or type(error).__name__)[:most]


def first_line(error: BaseException) -> str:
    """Return the first line of an error's message; its type if it has none."""
    return (str(error).strip() or type(error).__name__).splitlines()[0]


class JobError(Exception):
    """A failure with a message for the user instead of a traceback; `remedy` may be ""."""

    exit_code = 1

    def __init__(self, what: str, *, remedy: str = "") -> None:
        super().__init__(what)
        self.remedy = remedy

    @property
    def line(self) -> str:
        """The failure and its remedy in one line, whatever names of files and messages of others they quote."""
        return one_line(f"{self} — {self.remedy}" if self.remedy else self)


class UsageError(JobError):
    """Bad usage or settings."""

    exit_code = 2


class ImpossibleJobError(JobError):
    """This job cannot succeed on any machine: model, data or architecture."""

    exit_code = 3


class UnsupportedArchitectureError(ImpossibleJobError):
    """The model's family cannot be edited completely, so it is not edited at all; `reason` does not name it."""

    def __init__(self, model_type: str, reason: str) -> None:
        super().__init__(
            f"models of type {model_type!r} are not supported: {reason}",
            remedy="choose a model of a supported family (`abliterate inspect MODEL` tells); "
            "a damaged config.json causes this message, too",
        )
        self.reason = reason


class UnbuildableModelError(UnsupportedArchitectureError):
    """transformers knows the model's family but cannot build the model from its configuration."""

    def __init__(self, model_type: str, why: str) -> None:
        ImpossibleJobError.__init__(
            self,
            f"transformers cannot build a model of type {model_type!r} from its configuration ({why})",
            remedy="correct the model's config.json, or obtain an undamaged copy",
        )
        self.reason = f"transformers cannot build it from its configuration ({why})"


class QuantisedSourceError(UnsupportedArchitectureError):
    """The model's files are quantised irreversibly, so their weights cannot be edited."""

    def __init__(self, method: str, detail: str = "") -> None:
        more = f": {detail}" if detail else ""
        what = f"files quantised with {method} cannot be edited{more}"
        remedy = "use the unquantised original of the model"
        ImpossibleJobError.__init__(self, what, remedy=remedy)
        self.reason = f"{what} - {remedy}"


class HeldError(JobError):
    """Another run holds this job; `elsewhere` if on another machine, so that this one is not needed."""

    exit_code = 4

    def __init__(self, what: str, *, remedy: str = "", elsewhere: bool = False) -> None:
        super().__init__(what, remedy=remedy)
        self.elsewhere = elsewhere


class GateError(JobError):
    """The result misses a gate: exported, but not delivered."""

    exit_code = 5


class DeliveryError(JobError):
    """A target failed for good; the local result is kept."""

    exit_code = 6


class MachineError(JobError):
    """This machine cannot do the job, another may: disk, memory, permissions."""

    exit_code = 76


class MemoryShortageError(MachineError):
    """Memory does not suffice even for the least."""


class DamagedError(MachineError):
    """A file of the run folder is damaged: this machine's copy cannot be used, a mirror's can."""


class AcceleratorFaultError(MachineError):
    """The device failed; this process can no longer use it."""


class RestartNeeded(Exception):  # noqa: N818 - a request, not an error
    """The job must continue in a fresh process: the device is unusable in this one."""


class ExportMismatchError(JobError):
    """An export differs from the measured edit."""


class Stopped(BaseException):
    """The user or the platform asked the run to stop; the same command continues it.

    Not an `Exception`, so that no handler of those swallows it.
    """

    exit_code = 75


@contextmanager
def explaining(explain: Callable[[BaseException], JobError]) -> Iterator[None]:
    """Turn exceptions within the block into a JobError; those that are one pass unchanged."""
    try:
        yield
    except JobError:
        raise
    except BaseException as error:
        if not isinstance(error, Exception) and type(error).__name__ != _PANIC:
            raise
        raise explain(error) from error


def refusing(model_type: str, what: str) -> AbstractContextManager[None]:
    """Turn exceptions of a family's own code within the block into an UnsupportedArchitectureError."""
    return explaining(lambda error: UnsupportedArchitectureError(model_type, f"{what} ({in_one_line(error)})"))
