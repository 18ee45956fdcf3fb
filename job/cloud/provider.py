"""Types shared by platforms: needs, offers and instances."""

from __future__ import annotations

import math
import re
from collections.abc import Mapping, Sequence
from typing import Annotated, Any, Literal, Protocol

from pydantic import AfterValidator

from job.errors import one_line
from job.records import Record

Action = Literal["nothing", "stop", "destroy"]
# starting, running: as expected; outbid: halted by the platform, its disk still billed; stopped: halted by someone;
# exited: its command has ended; lost: its host is unreachable; gone: does not exist; unknown: without a documented
# status, and never acted upon.
State = Literal["starting", "running", "outbid", "stopped", "exited", "lost", "gone", "unknown"]
# Variable with the label in every instance: platforms may drop or truncate the label itself.
MARKER = "ABLITERATION_LAUNCH"
# A platform's words, shown in a terminal.
Words = Annotated[str, AfterValidator(one_line)]
_ID = re.compile(r"[A-Za-z0-9_-]{1,100}")
# Without a status yet; by the platform's documentation it is being provisioned.
PROVISIONING = "provisioning"


def number(value: Any) -> float | None:
    """Return a platform's number, None if it is missing, no number or not finite."""
    if isinstance(value, bool) or not isinstance(value, int | float | str):
        return None
    try:
        found = float(value)
    except (ValueError, OverflowError):
        return None
    return found if math.isfinite(found) else None


def plain_id(value: Any) -> str | None:
    """Return an instance's id, None for what is none: ids become parts of URLs, file names and commands."""
    text = str(value)
    return text if _ID.fullmatch(text) else None


class MachineNeeds(Record):
    """A suitable machine, and the job's expected use of it.

    Attributes:
        names: Parts of the platforms' names for it, lower case without blanks.
        gpu_gb: Least memory per card, in the platforms' GB; slightly below the nominal size.
        min_cuda: Lowest CUDA version of the driver, None for any.
        work_hours: Hours of the job without transfers, None if unknown.
    """

    gpu: str
    names: tuple[str, ...]
    vast_name: str
    count: int
    gpu_gb: float
    disk_gb: int
    min_cuda: str | None = None
    work_hours: float | None = None
    download_gb: float = 0.0
    upload_gb: float = 0.0


class Terms(Record):
    """Rental terms.

    Attributes:
        interruptible: On a bid instead of on demand.
        bid: Dollars per hour; None: a tenth above the lowest sufficient bid.
        min_down: Least download speed, Mb/s.
        min_up: Least upload speed, Mb/s.
        min_reliability: Least uptime of a host, 0 to 1.
        verified: Only verified hosts or the platform's own data centres.
    """

    interruptible: bool = False
    bid: float | None = None
    most_dollars: float | None = None
    min_down: float = 100.0
    min_up: float = 0.0
    min_reliability: float = 0.98
    verified: bool = True
    limit: int = 20


class Offer(Record):
    """A machine that can be rented now.

    Attributes:
        id: Its number, or the platform's selector.
        dollars: Price per hour, with storage where the platform states it.
        interruptible: A bid, which others may outbid.
        down: Download speed, Mb/s, None if unknown.
        up: Upload speed, Mb/s, None if unknown.
    """

    id: Words
    need: MachineNeeds
    dollars: float
    interruptible: bool = False
    where: Words = ""
    down: float | None = None
    up: float | None = None
    reliability: float | None = None
    down_dollars: float = 0.0
    up_dollars: float = 0.0
    stock: Words = ""

    @property
    def hours(self) -> float | None:
        """Hours of the whole job here with transfers, None if unknown."""
        if self.need.work_hours is None:
            return None
        # Lines are shared, and hosts report their best speed.
        seconds = [
            gigabytes * 8000 / (0.6 * rate)
            for gigabytes, rate in ((self.need.download_gb, self.down), (self.need.upload_gb, self.up))
            if rate
        ]
        return self.need.work_hours + sum(seconds) / 3600

    @property
    def job_dollars(self) -> float | None:
        """Cost of the whole job here with traffic, None if the hours are unknown."""
        traffic = self.need.download_gb * self.down_dollars + self.need.upload_gb * self.up_dollars
        return None if self.hours is None else self.hours * self.dollars + traffic


class Instance(Record):
    """A rented instance.

    Attributes:
        status: Its state in the platform's words.
        dollars: Current price per hour, None if unknown.
        marker: Value of the variable `MARKER`, or "".
    """

    id: str
    state: State
    status: Words = ""
    label: Words = ""
    dollars: float | None = None
    gpu: Words = ""
    marker: str = ""
    image: str = ""
    note: Words = ""

    @property
    def line(self) -> str:
        """The instance in one line."""
        price = f", ${self.dollars:.3f} an hour" if self.dollars else ""
        return f"{self.id}: {self.state}" + (f" ({self.status})" if self.status else "") + price


class Order(Record):
    """A container to run on a machine.

    Attributes:
        label: Unique label by which an unconfirmed creation is found; also in `MARKER`.
        volume: Id of a network volume for the workspace, if supported.
    """

    label: str
    image: str
    command: tuple[str, ...]
    volume: str | None = None


class Market(Protocol):
    """A rental platform. All methods raise CloudError if it is unreachable or refuses."""

    name: str
    console: str  # where people see and end instances

    def offers(self, need: MachineNeeds, terms: Terms) -> list[Offer]:
        """Return the offers, in the platform's order."""

    def rent(self, offer: Offer, order: Order, env: Mapping[str, str]) -> str | None:
        """Rent an offer; return the id, None if it was taken. After an `uncertain` CloudError it may be rented."""

    def instance(self, id: str) -> Instance:
        """Return an instance's current state, `gone` if it does not exist."""

    def instances(self) -> list[Instance]:
        """Return all instances of the account."""

    def end(self, id: str, action: Action) -> bool:
        """Stop or destroy an instance; return False if the platform does not know it."""

    def logs(self, id: str, lines: int) -> str:
        """Return the last lines of an instance's output."""

    def cannot_fetch(self, id: str) -> Sequence[str]:
        """Return what the API does not offer, and alternatives, as lines for people."""
