"""Launch a job on a rented machine, and on another one after a loss."""

from __future__ import annotations

import os
import re
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field

from job.cloud.api import CloudError
from job.cloud.credentials import ACCOUNT_KEYS
from job.cloud.destroying import ENDING_SECONDS, Destroyer
from job.cloud.launch_records import Launch, LaunchFile, Rented, recorded_ids
from job.cloud.ownership import Pending, claim
from job.cloud.provider import Instance, MachineNeeds, Market, Offer, Order, Terms
from job.errors import MachineError, UsageError
from job.text.redaction import holds_secret, looks_secret

# Time to look for an unconfirmed creation before taking another offer: lists lag behind.
LOOK_SECONDS = 120.0
_PAUSE_SECONDS = 5.0
# Time and interval to keep looking for it during a watch.
_PENDING_SECONDS, _PENDING_PAUSE = 3600.0, 60.0
# Time in which a new instance without a foreign label or image may be an unconfirmed creation.
_DOUBT_SECONDS = 86400.0


def environment(names: Sequence[str], plain: Mapping[str, str], env: Mapping[str, str] | None = None) -> dict[str, str]:
    """Return the instance's variables. Raises UsageError if one is not set, or must not leave this machine."""
    env = os.environ if env is None else env
    for name in {*names, *plain} & ACCOUNT_KEYS:
        raise UsageError(
            f"{name} controls your whole account and is not passed to a rented machine",
            remedy="leave it out: the platform gives each instance a key of its own",
        )
    for name, value in plain.items():
        if (looks_secret(name) and not _is_count(name, value)) or holds_secret(value):
            raise UsageError(
                f"the value of {name} looks like a secret, which does not belong on a command line",
                remedy=f"set the variable here and give --env {name}, or keep it as a secret of the platform",
            )
    missing = [name for name in names if not env.get(name)]
    if missing:
        raise UsageError(f"not set on this computer: {', '.join(missing)}", remedy="set the variables that --env names")
    return {**{name: env[name] for name in names}, **plain}


def _is_count(name: str, value: str) -> bool:
    """Return whether a variable holds a number of tokens, not a token."""
    return "TOKENS" in name.upper() and re.fullmatch(r"\d{1,6}", value) is not None


def find_offers(market: Market, needs: Sequence[MachineNeeds], terms: Terms) -> list[Offer]:
    """Return all needs' offers by the job's cost, or by the hour's if unknown. Raises CloudError."""
    found = [offer for need in needs for offer in market.offers(need, terms)]
    return sorted(found, key=lambda offer: (offer.job_dollars is None, offer.job_dollars or 0.0, offer.dollars))


@dataclass
class Launcher:
    """Rents machines for one launch, and recovers unconfirmed rentals.

    Attributes:
        look_seconds: Time to look for an unconfirmed creation.
        ending_seconds: Time that a replacement waits for the end of the last instance.
        here: Ids rented by this process, hence watched from their start.
    """

    market: Market
    record: LaunchFile
    say: Callable[[str], None]
    every: float = 30.0
    look_seconds: float = LOOK_SECONDS
    ending_seconds: float = ENDING_SECONDS
    notice: Callable[[Offer], None] | None = None
    here: set[str] = field(default_factory=set)
    destroyer: Destroyer = field(init=False, repr=False)
    _looked: float = field(default=0.0, repr=False)

    def __post_init__(self) -> None:
        self.destroyer = Destroyer(self.market, self.record, self.say, self.every)

    @property
    def launch(self) -> Launch:
        """The launch in its record."""
        return self.record.launch

    def rent(self, wait_minutes: float = 0.0) -> str:
        """Rent the best offer within `wait_minutes`; return the instance's id. Raises CloudError or MachineError."""
        env = environment(self.launch.env, self.launch.plain_env)
        self.record.update()
        deadline = time.monotonic() + 60 * wait_minutes
        while True:
            for offer in find_offers(self.market, self.launch.needs, self.launch.terms):
                if self.notice is not None:
                    self.notice(offer)
                    self.notice = None
                rented = self._take(offer, env)
                if rented is not None:
                    return rented
            if time.monotonic() >= deadline:
                raise MachineError(
                    "no machine is offered under these terms",
                    remedy="wait with --wait, or relax --max-price, --min-down, --min-reliability",
                )
            self.say(f"no machine is offered; asking again in {self.every:.0f} s")
            time.sleep(min(self.every, max(deadline - time.monotonic(), 0.0)))
            self.look_for_late_ones()
            if self.launch.instances and not self._replaced(self.launch.instances[-1]):
                return self.launch.instances[-1].id

    @staticmethod
    def _replaced(rented: Rented) -> bool:
        return rented.ended is not None or bool(rented.ending)

    @property
    def _next_label(self) -> str:
        return f"{self.launch.label}-{len(self.launch.instances) + len(self.launch.pending) + 1}"

    def _take(self, offer: Offer, env: Mapping[str, str]) -> str | None:
        """Rent an offer, recording the request first so that nothing is forgotten."""
        launch = self.launch
        before = tuple(instance.id for instance in self.market.instances())
        asked = Pending(label=self._next_label, at=time.time(), offer=offer.id, dollars=offer.dollars, before=before)
        order = Order(label=asked.label, image=launch.image, command=launch.command, volume=launch.volume)
        self.record.update(pending=(*launch.pending, asked))
        try:
            rented = self.market.rent(offer, order, env)
            if rented in before:  # destroying it later would destroy another machine of the account
                raise CloudError(f"{self.market.name} names instance {rented}, which is not new", uncertain=True)
        except CloudError as error:
            if not error.uncertain:
                self.record.update(pending=launch.pending)
                raise
            self.say(f"{error}; checking whether the machine was rented anyway")
            return self._look_for(asked)
        if rented is None:
            self.record.update(pending=launch.pending)
            self.say(f"offer {offer.id} is taken")
            return None
        self.record.add(asked, rented)
        self.here.add(rented)
        self.say(
            f"rented {self.market.name} instance {rented}: {offer.need.count}x{offer.need.gpu}, "
            f"${offer.dollars:.3f} an hour"
        )
        return rented

    def _look_for(self, asked: Pending) -> str | None:
        """Return the instance of an unconfirmed creation, None if it does not appear in time.

        Raises CloudError if the platform is unreachable, and MachineError if several instances may be it.
        """
        deadline = time.monotonic() + self.look_seconds
        while True:
            late = time.monotonic() >= deadline
            try:
                sure, likely = self._claims(asked)
            except CloudError as error:
                if late or not error.passing:
                    raise
                sure, likely = [], []
            if sure or late:
                break
            time.sleep(min(self.every, _PAUSE_SECONDS))
        if sure:
            self._take_up(asked, sure)
            self.here.add(sure[0].id)
            return sure[0].id
        if len(likely) > 1:
            ids = ", ".join(instance.id for instance in likely)
            raise MachineError(
                f"one of the instances {ids} may have been rented for {asked.label}, and {self.market.name} does not "
                "say which: nothing else is rented",
                remedy=f"look at {self.market.console}",
            )
        if likely:
            self.record.add(asked, likely[0].id, sure=False)
            self.say(
                f"instance {likely[0].id} is new and probably belongs to this launch; it is watched but not "
                f"destroyed automatically: check {self.market.console}"
            )
            return likely[0].id
        self.say(
            f"offer {asked.offer}: nothing was rented in {self.look_seconds:.0f} s; a watch of {self.launch.label} "
            "goes on looking, and destroys what appears late"
        )
        return None

    def _claims(self, asked: Pending) -> tuple[list[Instance], list[Instance]]:
        """Return a pending creation's certain and likely instances."""
        others = recorded_ids(self.record.path.parent)
        claims = [
            (claim(instance, asked, launch=self.launch.label, image=self.launch.image, others=others), instance)
            for instance in self.market.instances()
        ]
        sure = [instance for how, instance in claims if how == "sure"]
        return sure, [instance for how, instance in claims if how == "likely"]

    def _take_up(self, asked: Pending, found: Sequence[Instance]) -> None:
        """Record a pending creation's instances; surplus ones are destroyed."""
        needed = bool(found) and self._needed()
        for instance in found:
            self.record.add(
                asked, instance.id, dollars=instance.dollars, ending="" if needed else "this launch rented two machines"
            )
            said = "it is recorded now" if needed else "it is destroyed, because the launch has another machine"
            self.destroyer.saw(instance.id)
            self.say(f"instance {instance.id} was rented for this launch but not recorded; {said}")
            needed = False
        self.destroyer.press_on()

    def _needed(self) -> bool:
        """Return whether the launch has no machine; an unlisted one is replaced by a listed one."""
        if not self.launch.instances or self._replaced(self.launch.instances[-1]):
            return True
        last = self.launch.instances[-1]
        if self.market.instance(last.id).state != "gone":
            return False
        self.record.change(last, ending="gone")
        return True

    def adopt(self) -> None:
        """Adopt rentals of this launch that were interrupted before being recorded. Raises CloudError."""
        for asked in (*self.launch.pending, Pending(label=self._next_label)):
            sure, likely = self._claims(asked)
            self._take_up(asked, sure)
            if likely and not sure and time.time() - asked.at < _DOUBT_SECONDS:
                ids = ", ".join(instance.id for instance in likely)
                self.say(
                    f"the creation of {asked.label} was not confirmed, and of these instances one may be it: {ids}. "
                    f"They are left alone and MAY BILL ON: look at {self.market.console}"
                )

    def look_for_late_ones(self) -> None:
        """Look periodically for unconfirmed creations; late ones are surplus."""
        recent = [asked for asked in self.launch.pending if time.time() - asked.at < _PENDING_SECONDS]
        if not recent or time.monotonic() < self._looked + min(_PENDING_PAUSE, 10 * self.every):
            return
        self._looked = time.monotonic()
        try:
            for asked in recent:
                self._take_up(asked, self._claims(asked)[0])
        except CloudError as error:
            self.say(error.line)

    def replace(self, why: str, wait_minutes: float) -> str:
        """Destroy the instance and rent another for the same command; return its id. Raises JobError."""
        self.destroyer.close(why, self.ending_seconds)
        return self.rent(wait_minutes)


def describe(instance: Instance) -> str:
    """Format an instance with its cards in one line."""
    return f"{instance.line}, {instance.gpu}" if instance.gpu else instance.line
