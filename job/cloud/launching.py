"""Launching a job on a rented machine, and again on another one after that is lost."""

from __future__ import annotations

import os
import re
import secrets
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

from pydantic import Field, ValidationError

from job.cloud.api import CloudError
from job.cloud.credentials import ACCOUNT_KEYS, Platform
from job.cloud.ownership import Pending, claim
from job.cloud.provider import Instance, MachineNeeds, Market, Offer, Order, Terms
from job.cloud.termination import Termination
from job.errors import MachineError, UsageError
from job.records import Record
from job.storage.atomic import write_atomically
from job.text.redaction import holds_secret, looks_secret

# How long a creation that was not confirmed is looked for before another offer is taken: lists lag behind.
LOOK_SECONDS = 120.0
_PAUSE_SECONDS = 5.0
# One that was not found then is still looked for during a watch, for so long and so often.
_PENDING_SECONDS, _PENDING_PAUSE = 3600.0, 60.0
# For so long a new instance that nobody else's label or image speaks for may be one whose creation was not confirmed.
_DOUBT_SECONDS = 86400.0
BY_HAND = "destroyed by hand"
# How long another machine waits for the end of the last one; after that its end is insisted on beside.
ENDING_SECONDS = 300.0


class Rented(Record):
    """One instance of a launch.

    Attributes:
        id: Its id.
        at: Unix time of its renting.
        dollars: Price of an hour by the offer.
        ended: Unix time of its end, None while it is there as far as is known.
        why: What became of it.
        ending: Why it is being destroyed, "" while it is not; until it is seen to be gone.
        sure: It is this launch's for certain; one that only seems to be is never destroyed by itself.
        seen: The platform has shown it, so that "no such instance" means that it is gone.
    """

    id: str
    at: float
    dollars: float
    ended: float | None = None
    why: str = ""
    ending: str = ""
    sure: bool = True
    seen: bool = False

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
        instances: What was rented, in order; the last is the one that counts.
        pending: Creations whose answer is not known.
        checkpoint: Where its job is mirrored, by its settings; None: by the words of the command.
    """

    # What is rented with; secrets in it were refused.
    VERBATIM = frozenset({"label", "image", "command", "plain_env", "checkpoint"})

    label: str
    platform: Platform
    needs: tuple[MachineNeeds, ...]
    terms: Terms
    image: str
    command: tuple[str, ...]
    env: tuple[str, ...] = ()
    plain_env: dict[str, str] = Field(default_factory=dict)
    volume: str | None = None
    instances: tuple[Rented, ...] = ()
    pending: tuple[Pending, ...] = ()
    checkpoint: str | None = None

    @property
    def resumable(self) -> bool:
        """Whether another machine finds what this one has done: a folder is only there where a volume is."""
        place = self.checkpoint or self._checkpoint_word
        if place is None:
            return False
        return not place.startswith("file:") or (self.volume is not None and place.startswith("file:///workspace/"))

    @property
    def _checkpoint_word(self) -> str | None:
        for word, following in zip(self.command, (*self.command[1:], ""), strict=True):
            if word == "--checkpoint":
                return following
            if word.startswith("--checkpoint="):
                return word.partition("=")[2]
        return self.plain_env.get("ABLITERATE_CHECKPOINT")

    @property
    def left(self) -> tuple[Rented, ...]:
        """What is not known to have ended."""
        return tuple(rented for rented in self.instances if rented.ended is None)

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
    for name, value in plain.items():
        if (looks_secret(name) and not _is_count(name, value)) or holds_secret(value):
            raise UsageError(
                f"the value of {name} does not belong on a command line: it looks like a secret",
                remedy=f"set it here and give --env {name}, or keep it as a secret of the platform",
            )
    missing = [name for name in names if not env.get(name)]
    if missing:
        raise UsageError(f"not set here: {', '.join(missing)}", remedy="set what --env names")
    return {**{name: env[name] for name in names}, **plain}


def _is_count(name: str, value: str) -> bool:
    """Return whether a variable says how many tokens there are, and holds none."""
    return "TOKENS" in name.upper() and re.fullmatch(r"\d{1,6}", value) is not None


def find_offers(market: Market, needs: Sequence[MachineNeeds], terms: Terms) -> list[Offer]:
    """Return the offers for any of the needs, the cheapest job first, or the cheapest hour where hours are unknown.

    Raises:
        CloudError: The platform cannot be asked.
    """
    found = [offer for need in needs for offer in market.offers(need, terms)]
    return sorted(found, key=lambda offer: (offer.job_dollars is None, offer.job_dollars or 0.0, offer.dollars))


@dataclass
class Launcher:
    """Rents machines for one launch, keeps its record, and destroys what it has rented until that is gone.

    Attributes:
        market: Where.
        launch: What; replaced by every change.
        file: Where the record is kept.
        say: Told what happens.
        every: Seconds between two looks.
        look_seconds: How long a creation that was not confirmed is looked for.
        ending_seconds: How long another machine waits for the end of the last one.
        notice: Told of the best offer before the first machine is rented.
        here: Ids of what this process has rented, and so has watched from its beginning.
    """

    market: Market
    launch: Launch
    file: Path
    say: Callable[[str], None]
    every: float = 30.0
    look_seconds: float = LOOK_SECONDS
    ending_seconds: float = ENDING_SECONDS
    notice: Callable[[Offer], None] | None = None
    here: set[str] = field(default_factory=set)
    _endings: dict[str, Termination] = field(default_factory=dict, repr=False)
    _looked: float = field(default=0.0, repr=False)

    def rent(self, wait_minutes: float = 0.0) -> str:
        """Rent the best offer that can be had and return the instance's id.

        Args:
            wait_minutes: How long to wait for one.

        Raises:
            CloudError: The platform refuses.
            MachineError: There is none, or nobody knows what was rented.
        """
        env = environment(self.launch.env, self.launch.plain_env)
        self._keep()
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
            self.say(f"nothing is offered; looking again in {self.every:.0f} s")
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
        """Rent an offer; what is asked for is written down first, so that nothing is forgotten whatever happens."""
        launch = self.launch
        before = tuple(instance.id for instance in self.market.instances())
        asked = Pending(label=self._next_label, at=time.time(), offer=offer.id, dollars=offer.dollars, before=before)
        order = Order(label=asked.label, image=launch.image, command=launch.command, volume=launch.volume)
        self._keep(pending=(*launch.pending, asked))
        try:
            rented = self.market.rent(offer, order, env)
        except CloudError as error:
            if not error.uncertain:
                self._keep(pending=launch.pending)
                raise
            self.say(f"{error}; looking whether it was rented all the same")
            return self._look_for(asked)
        if rented is None:
            self._keep(pending=launch.pending)
            self.say(f"offer {offer.id} is taken")
            return None
        self._record(asked, rented)
        self.here.add(rented)
        self.say(
            f"rented {self.market.name} instance {rented}: {offer.need.count}x{offer.need.gpu}, "
            f"${offer.dollars:.3f} an hour"
        )
        return rented

    def _look_for(self, asked: Pending) -> str | None:
        """Return the instance of a creation that was not confirmed, None where it has not appeared in time.

        Raises:
            CloudError: The platform cannot be asked, so that nobody knows: no other machine may be rented.
            MachineError: There are several that it may be.
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
            self._record(asked, likely[0].id, sure=False)
            self.say(
                f"instance {likely[0].id} is new and seems to be this launch's; it is followed, and not destroyed by "
                f"itself: look at {self.market.console}"
            )
            return likely[0].id
        self.say(
            f"offer {asked.offer}: nothing was rented in {self.look_seconds:.0f} s; a watch of {self.launch.label} "
            "goes on looking, and destroys what appears late"
        )
        return None

    def _claims(self, asked: Pending) -> tuple[list[Instance], list[Instance]]:
        """Return the instances that are a pending creation's for certain, and those that seem to be."""
        others = _recorded(self.file.parent)
        claims = [
            (claim(instance, asked, launch=self.launch.label, image=self.launch.image, others=others), instance)
            for instance in self.market.instances()
        ]
        sure = [instance for how, instance in claims if how == "sure"]
        return sure, [instance for how, instance in claims if how == "likely"]

    def _take_up(self, asked: Pending, found: Sequence[Instance]) -> None:
        """Record what was found of a pending creation; whatever is more than one machine is destroyed."""
        needed = bool(found) and self._needed()
        for instance in found:
            self._record(asked, instance.id, dollars=instance.dollars, ending="" if needed else "it was rented twice")
            said = "it is now" if needed else "it is destroyed, since there is another"
            self.saw(instance.id)
            self.say(f"instance {instance.id} was rented for this launch and not recorded; {said}")
            needed = False
        self.press_on()

    def _needed(self) -> bool:
        """Return whether the launch has no machine; one that is not shown gives way to one that is."""
        if not self.launch.instances or self._replaced(self.launch.instances[-1]):
            return True
        last = self.launch.instances[-1]
        if self.market.instance(last.id).state != "gone":
            return False
        self._change(last.model_copy(update={"ending": "gone"}))
        return True

    def adopt(self) -> None:
        """Take up what was rented for this launch and not recorded, because renting was cut off.

        Raises:
            CloudError: The platform cannot be asked.
        """
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
        """Look now and then for creations that were not confirmed; what appears late is one machine too many."""
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
        """Destroy the instance and rent another for the same command; return its id.

        Raises:
            JobError: There is none, or the platform refuses.
        """
        self.close(why)
        return self.rent(wait_minutes)

    def close(self, why: str) -> None:
        """Destroy the latest instance; where that takes long, `press_on` and `finish` go on with it."""
        last = self.launch.instances[-1]
        if last.ended is not None:
            return
        self._change(last.model_copy(update={"ending": why}))
        self._gone(self._ending(last).insist(self.ending_seconds), last.id)

    def press_on(self) -> None:
        """Ask again for the ends that are due; return at once."""
        for rented in self.launch.left:
            if rented.ending:
                self._gone(self._ending(rented).press(), rented.id)

    def finish(self) -> None:
        """Return when all that is to be destroyed is gone."""
        while any(rented.ending for rented in self.launch.left):
            self.press_on()
            time.sleep(min(self.every, 0.5))

    def destroy(self, ids: Sequence[str]) -> None:
        """Destroy instances of this launch, and return when all are gone."""
        for rented in self.launch.left:
            if rented.id in ids:
                self._change(rented.model_copy(update={"ending": rented.ending or BY_HAND}))
        self.finish()

    def _ending(self, rented: Rented) -> Termination:
        fresh = Termination(
            self.market,
            rented.id,
            self.say,
            rented=rented.at,
            seen=rented.seen,
            pause=min(self.every, 5.0),
            longest=min(2 * self.every, 60.0),
        )
        return self._endings.setdefault(rented.id, fresh)

    def _gone(self, gone: bool, id: str) -> None:
        rented = next(rented for rented in self.launch.instances if rented.id == id)
        if gone and rented.ended is None:
            self._change(rented.model_copy(update={"ended": time.time(), "why": rented.ending, "ending": ""}))
            self.say(f"destroyed instance {id}: {rented.ending}")

    def saw(self, id: str) -> None:
        """Note that the platform has shown an instance."""
        for rented in self.launch.left:
            if rented.id == id and not rented.seen:
                self._change(rented.model_copy(update={"seen": True}))
                self._ending(rented).seen = True

    def note_end(self, why: str, id: str | None = None) -> None:
        """Record that an instance, the latest by default, has ended by itself."""
        for rented in self.launch.left:
            if rented.id == (id or self.launch.instances[-1].id):
                self._change(rented.model_copy(update={"ended": time.time(), "why": why, "ending": ""}))

    def _record(
        self, asked: Pending, id: str, *, dollars: float | None = None, ending: str = "", sure: bool = True
    ) -> None:
        """Record an instance of a creation; one that is to be destroyed at once goes before the one that counts."""
        new = Rented(
            id=id, at=asked.at or time.time(), dollars=asked.dollars or dollars or 0.0, ending=ending, sure=sure
        )
        former = self.launch.instances
        instances = (*former[:-1], new, *former[-1:]) if ending else (*former, new)
        pending = tuple(other for other in self.launch.pending if other.label != asked.label)
        self._keep(instances=instances, pending=pending)

    def _change(self, changed: Rented) -> None:
        self._keep(instances=tuple(changed if rented.id == changed.id else rented for rented in self.launch.instances))

    def _keep(self, **changes: tuple[Rented, ...] | tuple[Pending, ...]) -> None:
        self.launch = self.launch.model_copy(update=changes)
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
    for file, launch in _launches(folder):
        ids = [rented.id for rented in launch.instances]
        if launch.platform == platform and name in (launch.label, *ids):
            return launch, file
    return None


def _launches(folder: Path) -> Iterator[tuple[Path, Launch]]:
    for file in sorted(folder.glob("*.json")):
        try:
            yield file, Launch.model_validate_json(file.read_bytes())
        except (OSError, ValidationError):
            continue  # no record, or one of another version


def _recorded(folder: Path) -> frozenset[str]:
    """Return the ids of all instances that any launch has recorded."""
    return frozenset(rented.id for _, launch in _launches(folder) for rented in launch.instances)


def describe(instance: Instance) -> str:
    """Return an instance with its cards in one line."""
    return f"{instance.line}, {instance.gpu}" if instance.gpu else instance.line
