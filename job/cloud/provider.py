"""What the platforms have in common: what is needed, what is offered, and what was rented."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Literal, Protocol

from job.records import Record

Action = Literal["nothing", "stop", "destroy"]
# starting, running: on the way or at work; outbid: halted by the platform and still billing its disk;
# stopped: halted by somebody; exited: its command has ended; lost: its host does not answer; gone: no longer there;
# unknown: the platform names no status, or one that its documentation does not have. Nothing is done to such a one.
State = Literal["starting", "running", "outbid", "stopped", "exited", "lost", "gone", "unknown"]
# Variable that is put into every instance and holds its label: platforms may drop or cut the label itself.
MARKER = "ABLITERATION_LAUNCH"
# Status of one that the platform names no status of yet, by its documentation because it is being provisioned.
PROVISIONING = "provisioning"


class MachineNeeds(Record):
    """A machine that would do, and what the job will take on it.

    Attributes:
        gpu: The card, as in `--on`.
        names: What the platforms call it, as parts of their names, without blanks and in lower case.
        vast_name: What Vast.ai calls it.
        count: Cards.
        gpu_gb: Memory of each at least, in the platforms' GB; a little below what is printed on the card.
        disk_gb: Disk.
        min_cuda: Lowest CUDA version of the driver, None for any.
        work_hours: Hours of the job but for its transfers, None where unknown.
        download_gb: What it fetches.
        upload_gb: What it delivers.
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
    """Under which terms machines are wanted.

    Attributes:
        interruptible: On a bid, or on demand.
        bid: Dollars an hour of a bid; None: a tenth above the lowest that would do.
        most_dollars: Dollars an hour at most.
        min_down: Mb/s from the network at least.
        min_up: Mb/s to the network at least.
        min_reliability: Share of its time a host has been up, 0 to 1.
        verified: Only hosts that the platform has verified, or its own data centres.
        limit: Offers at most.
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
        id: Its number, or what the platform chooses a machine by.
        need: What it is offered for.
        dollars: Price of an hour, storage included where the platform says so.
        interruptible: It is a bid, which others may outbid.
        where: Country, data centre or cloud.
        down: Mb/s, None where the platform does not say.
        up: Mb/s.
        reliability: Share of its time the host has been up.
        down_dollars: Dollars a GB that is fetched.
        up_dollars: Dollars a GB that is sent.
        stock: How many there are, in the platform's words.
    """

    id: str
    need: MachineNeeds
    dollars: float
    interruptible: bool = False
    where: str = ""
    down: float | None = None
    up: float | None = None
    reliability: float | None = None
    down_dollars: float = 0.0
    up_dollars: float = 0.0
    stock: str = ""

    @property
    def hours(self) -> float | None:
        """Hours of the whole job here, transfers at this machine's line; None where unknown."""
        if self.need.work_hours is None:
            return None
        # Lines are shared and hosts measure them at their best.
        seconds = [
            gigabytes * 8000 / (0.6 * rate)
            for gigabytes, rate in ((self.need.download_gb, self.down), (self.need.upload_gb, self.up))
            if rate
        ]
        return self.need.work_hours + sum(seconds) / 3600

    @property
    def job_dollars(self) -> float | None:
        """What the whole job costs here: time and traffic; None where the hours are unknown."""
        traffic = self.need.download_gb * self.down_dollars + self.need.upload_gb * self.up_dollars
        return None if self.hours is None else self.hours * self.dollars + traffic


class Instance(Record):
    """Something that was rented.

    Attributes:
        id: Its id.
        state: What it does.
        status: The same in the platform's words.
        label: The name it was given.
        dollars: Price of an hour now, None where the platform does not say.
        gpu: Its cards.
        marker: Value of the variable `MARKER` in it, "" where the platform shows none.
        image: Its image, "" where the platform does not say.
        note: The platform's explanation of the status.
    """

    id: str
    state: State
    status: str = ""
    label: str = ""
    dollars: float | None = None
    gpu: str = ""
    marker: str = ""
    image: str = ""
    note: str = ""

    @property
    def line(self) -> str:
        """The instance in one line."""
        price = f", ${self.dollars:.3f} an hour" if self.dollars else ""
        return f"{self.id}: {self.state}" + (f" ({self.status})" if self.status else "") + price


class Order(Record):
    """What is to run on a machine.

    Attributes:
        label: A name of its own, by which an instance is found whose creation was not confirmed; also in `MARKER`.
        image: The image, whose ENTRYPOINT stays.
        command: What the ENTRYPOINT is given.
        volume: Id of a network volume for the workspace, where the platform has such.
    """

    label: str
    image: str
    command: tuple[str, ...]
    volume: str | None = None


class Market(Protocol):
    """A rental platform."""

    name: str
    console: str  # where a person sees and ends instances

    def offers(self, need: MachineNeeds, terms: Terms) -> list[Offer]:
        """Return what is offered, in the platform's order.

        Raises:
            CloudError: The platform cannot be asked.
        """

    def rent(self, offer: Offer, order: Order, env: Mapping[str, str]) -> str | None:
        """Rent an offer and return the instance's id, None where somebody was quicker.

        Raises:
            CloudError: The platform refuses; if its `uncertain` is set, it may have rented it.
        """

    def instance(self, id: str) -> Instance:
        """Return an instance as it is now, in state gone where it is not there.

        Raises:
            CloudError: The platform cannot be asked.
        """

    def instances(self) -> list[Instance]:
        """Return all instances of the account.

        Raises:
            CloudError: The platform cannot be asked.
        """

    def end(self, id: str, action: Action) -> bool:
        """Stop or destroy an instance; return False where the platform knows no such instance.

        Raises:
            CloudError: The platform does not do it.
        """

    def logs(self, id: str, lines: int) -> str:
        """Return the last lines that an instance's command has printed.

        Raises:
            CloudError: They cannot be had.
        """

    def cannot_fetch(self, id: str) -> Sequence[str]:
        """Return what the API does not give, and other ways to it, as lines for people."""
