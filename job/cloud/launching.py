"""Launching a job on a rented machine, and again on another one after that is lost."""

from __future__ import annotations

import os
import secrets
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from pydantic import Field, ValidationError

from job.cloud.account import ACCOUNT_KEYS, Platform
from job.cloud.api import CloudError
from job.cloud.market import Instance, Market, Need, Offer, Order, Terms
from job.errors import JobError, MachineError, UsageError
from job.events import looks_secret
from job.records import Record
from job.workspace import write_atomically

# How long creations that were not confirmed are looked for: lists lag behind.
_LOOKS, _LOOK_SECONDS = 3, 3.0


class Rented(Record):
    """One instance of a launch.

    Attributes:
        id: Its id.
        at: Unix time of its renting.
        dollars: Price of an hour by the offer.
        ended: Unix time of its end, None while it is there as far as is known.
        why: What became of it.
    """

    id: str
    at: float
    dollars: float
    ended: float | None = None
    why: str = ""

    def cost(self, now: float) -> float:
        """Return the dollars of its time, as far as the offer's price tells."""
        return ((self.ended or now) - self.at) / 3600 * self.dollars


class Launch(Record):
    """What was launched; holds no secret, only the names of the variables that do.

    Attributes:
        label: Its name; the instances are called so with their number.
        platform: Where.
        needs: The machines that would do.
        terms: Under which terms.
        image: The image.
        command: What its ENTRYPOINT is given.
        env: Names of the variables that are passed on.
        plain_env: Variables whose values are no secrets.
        volume: Network volume for the workspace.
        instances: What was rented, in order.
    """

    label: str
    platform: Platform
    needs: tuple[Need, ...]
    terms: Terms
    image: str
    command: tuple[str, ...]
    env: tuple[str, ...] = ()
    plain_env: dict[str, str] = Field(default_factory=dict)
    volume: str | None = None
    instances: tuple[Rented, ...] = ()

    @property
    def resumable(self) -> bool:
        """Whether another machine finds what this one has done."""
        return "ABLITERATE_CHECKPOINT" in self.plain_env or any(
            word == "--checkpoint" or word.startswith("--checkpoint=") for word in self.command
        )

    def spent(self, now: float) -> float:
        """Return the dollars of all instances' time, as far as the offers' prices tell."""
        return sum(rented.cost(now) for rented in self.instances)


def new_label() -> str:
    """Return a name that no other launch has."""
    return f"abliterate-{secrets.token_hex(4)}"


def environment(names: Sequence[str], plain: Mapping[str, str], env: Mapping[str, str] | None = None) -> dict[str, str]:
    """Return the variables for the instance: named ones with this process's values, and plain ones.

    Raises:
        UsageError: One is not set, or must not leave this machine.
    """
    env = os.environ if env is None else env
    for name in {*names, *plain} & ACCOUNT_KEYS:
        raise UsageError(
            f"{name} rules your whole account and is not given to a rented machine",
            remedy="leave it out: the platform gives each instance a key of its own",
        )
    for name in plain:
        if looks_secret(name):
            raise UsageError(
                f"the value of {name} does not belong on a command line", remedy=f"set it here and give --env {name}"
            )
    missing = [name for name in names if not env.get(name)]
    if missing:
        raise UsageError(f"not set here: {', '.join(missing)}", remedy="set what --env names")
    return {**{name: env[name] for name in names}, **plain}


def find_offers(market: Market, needs: Sequence[Need], terms: Terms) -> list[Offer]:
    """Return the offers for any of the needs, the cheapest job first, or the cheapest hour where hours are unknown.

    Raises:
        CloudError: The platform cannot be asked.
    """
    found = [offer for need in needs for offer in market.offers(need, terms)]
    return sorted(found, key=lambda offer: (offer.job_dollars is None, offer.job_dollars or 0.0, offer.dollars))


@dataclass
class Launcher:
    """Rents machines for one launch, and keeps its record.

    Attributes:
        market: Where.
        launch: What; replaced by every change.
        file: Where the record is kept.
        say: Told what happens.
        every: Seconds between two looks.
    """

    market: Market
    launch: Launch
    file: Path
    say: Callable[[str], None]
    every: float = 30.0

    def rent(self, wait_minutes: float = 0.0) -> str:
        """Rent the best offer that can be had and return the instance's id.

        Args:
            wait_minutes: How long to wait for one.

        Raises:
            CloudError: The platform refuses.
            MachineError: There is none.
        """
        env = environment(self.launch.env, self.launch.plain_env)
        # Written first: were this process ended while it rents, `adopt` would find the instance by the label.
        self._keep(instances=self.launch.instances)
        deadline = time.monotonic() + 60 * wait_minutes
        while True:
            for offer in find_offers(self.market, self.launch.needs, self.launch.terms):
                rented = self._take(offer, env)
                if rented is not None:
                    return rented
            if time.monotonic() >= deadline:
                raise MachineError(
                    "no machine is offered under these terms",
                    remedy="wait with --wait, or relax --max-price, --min-down, --min-reliability",
                )
            self.say(f"nothing is offered; looking again in {self.every:.0f} s")
            time.sleep(min(self.every, max(deadline - time.monotonic(), 0.0)))

    @property
    def _next_label(self) -> str:
        return f"{self.launch.label}-{len(self.launch.instances) + 1}"

    def adopt(self) -> None:
        """Take up an instance that was rented for this launch and not recorded, because renting was cut off.

        Raises:
            CloudError: The platform cannot be asked.
        """
        for instance in self.market.labelled(self._next_label):
            if instance.state != "gone":
                new = Rented(id=instance.id, at=time.time(), dollars=instance.dollars or 0.0)
                self._keep(instances=(*self.launch.instances, new))
                self.say(f"instance {instance.id} was rented for this launch and not recorded; it is now")
                return

    def _take(self, offer: Offer, env: Mapping[str, str]) -> str | None:
        launch = self.launch
        order = Order(
            label=self._next_label,
            image=launch.image,
            command=launch.command,
            volume=launch.volume,
        )
        try:
            rented = self.market.rent(offer, order, env)
        except CloudError as error:
            if not error.uncertain:
                raise
            self.say(f"{error}; looking whether it was rented all the same")
            rented = self._look_for(order.label)
        if rented is None:
            self.say(f"offer {offer.id} is taken")
            return None
        new = Rented(id=rented, at=time.time(), dollars=offer.dollars)
        self._keep(instances=(*launch.instances, new))
        self.say(
            f"rented {self.market.name} instance {rented}: {offer.need.count}x{offer.need.gpu}, "
            f"${offer.dollars:.3f} an hour"
        )
        return rented

    def _look_for(self, label: str) -> str | None:
        for look in range(_LOOKS):
            found = [instance for instance in self.market.labelled(label) if instance.state != "gone"]
            if found:
                return found[0].id
            if look + 1 < _LOOKS:
                time.sleep(min(self.every, _LOOK_SECONDS))
        return None

    def replace(self, why: str, wait_minutes: float) -> str:
        """Destroy the instance and rent another for the same command; return its id.

        Raises:
            JobError: There is none, or the platform refuses.
        """
        self.close(why)
        return self.rent(wait_minutes)

    def close(self, why: str) -> None:
        """Destroy the latest instance; where that fails say so and go on."""
        *others, last = self.launch.instances
        try:
            self.market.end(last.id, "destroy")
            self.say(f"destroyed instance {last.id}: {why}")
        except JobError as error:
            self.say(f"INSTANCE {last.id} COULD NOT BE DESTROYED and bills on: {error.line}")
            return
        self._keep(instances=(*others, last.model_copy(update={"ended": time.time(), "why": why})))

    def note_end(self, why: str) -> None:
        """Record that the latest instance has ended by itself."""
        *others, last = self.launch.instances
        if last.ended is None:
            self._keep(instances=(*others, last.model_copy(update={"ended": time.time(), "why": why})))

    def _keep(self, *, instances: tuple[Rented, ...]) -> None:
        self.launch = self.launch.model_copy(update={"instances": instances})
        self.file.parent.mkdir(parents=True, exist_ok=True)
        write_atomically(self.file, (self.launch.model_dump_json(indent=2) + "\n").encode())


def records_folder(env: Mapping[str, str] | None = None) -> Path:
    """Return where records of launches are kept: $ABLITERATION_LAUNCHES, or below the user's state."""
    env = os.environ if env is None else env
    if env.get("ABLITERATION_LAUNCHES"):
        return Path(env["ABLITERATION_LAUNCHES"])
    return Path(env.get("XDG_STATE_HOME") or Path.home() / ".local" / "state") / "abliterate" / "launches"


def find_launch(folder: Path, name: str, platform: Platform) -> tuple[Launch, Path] | None:
    """Return the launch of that label, or the one that an instance of that id belongs to, with its file."""
    for file in sorted(folder.glob("*.json")):
        try:
            launch = Launch.model_validate_json(file.read_bytes())
        except (OSError, ValidationError):
            continue
        ids = [rented.id for rented in launch.instances]
        if launch.platform == platform and name in (launch.label, *ids):
            return launch, file
    return None


def describe(instance: Instance) -> str:
    """Return an instance with its cards in one line."""
    return f"{instance.line}, {instance.gpu}" if instance.gpu else instance.line
