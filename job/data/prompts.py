"""Prompt sets: read once, cleaned, split and stored in the run folder."""

from __future__ import annotations

import random
from collections.abc import Callable, Container, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Literal

from pydantic import Field

from job.config.schema import Settings
from job.config.sections import PromptSettings
from job.data.columns import RowText
from job.data.sources import Pin, Source, TextReader, parse_source, resolve_commit
from job.errors import ImpossibleJobError
from job.records import Record
from job.system.hub_client import count_traffic, received_bytes

# A longer text is a document; max_characters truncates it where documents are intended.
MOST_CHARACTERS = 100_000
# Note for rows that are kept but repaired.
_REPAIRED = "with a lone surrogate, replaced by U+FFFD"
# Rows listed per kind.
_PLACES = 5
# Prompts of an extraction set that the choice takes at least, and of how many.
_LEAST_HELD_OUT, _LEAST_TO_SPLIT = 20, 100


class Prompt(Record):
    """A prompt as the model sees it; `system` is None without a system prompt.

    `category` and `language` are those of its row, by which a scorecard counts responses.
    """

    VERBATIM = frozenset({"user", "system"})
    user: str
    system: str | None = None
    category: str | None = Field(None, exclude_if=lambda name: name is None)
    language: str | None = Field(None, exclude_if=lambda name: name is None)

    @property
    def groups(self) -> dict[str, str]:
        """The groups of the prompt, by column."""
        found = {"category": self.category, "language": self.language}
        return {column: name for column, name in found.items() if name is not None}


class PromptSets(Record):
    """prompts.json: all prompts of a job.

    Attributes:
        good_choice: Good prompts that only the choice uses: taken from the extraction set, or empty.
        bad_choice: Bad prompts of the same kind.
        helpfulness: Instructions; empty unless directions are orthogonalised against helpfulness.
        unhelpfulness: Web text; empty unless directions are orthogonalised against helpfulness.
        capability: Prompts of a capability to preserve; empty unless given.
        over_refusal: Harmless requests that a model may refuse, for the scorecard; empty unless given.
        text: Plain texts, never rendered as prompts; empty unless cross-entropy is an objective.
        sources: Description of each setting's source.
        commits: Commit of every Hub dataset, by setting.
        public: Settings that name public Hub datasets.
        skipped: Dropped or repaired rows of each setting: number, reason and places.
    """

    # Models must see prompts unchanged: altered ones would give other directions and metrics.
    VERBATIM = frozenset(
        {
            "good",
            "bad",
            "good_search",
            "bad_search",
            "good_report",
            "bad_report",
            "good_choice",
            "bad_choice",
            "helpfulness",
            "unhelpfulness",
            "capability",
            "over_refusal",
            "text",
        }
    )
    version: Literal[1] = 1
    good: tuple[Prompt, ...]
    bad: tuple[Prompt, ...]
    good_search: tuple[Prompt, ...]
    bad_search: tuple[Prompt, ...]
    good_report: tuple[Prompt, ...]
    bad_report: tuple[Prompt, ...]
    good_choice: tuple[Prompt, ...] = ()
    bad_choice: tuple[Prompt, ...] = ()
    helpfulness: tuple[Prompt, ...] = ()
    unhelpfulness: tuple[Prompt, ...] = ()
    capability: tuple[Prompt, ...] = ()
    over_refusal: tuple[Prompt, ...] = Field((), exclude_if=lambda prompts: not prompts)
    text: tuple[Prompt, ...] = Field((), exclude_if=lambda texts: not texts)
    sources: dict[str, str]
    commits: dict[str, str]
    public: tuple[str, ...] = ()
    skipped: dict[str, str] = Field(default_factory=dict)
    received: int = 0

    @property
    def everything(self) -> tuple[Prompt, ...]:
        """All prompts of the model."""
        evaluated = (*self.good_search, *self.bad_search, *self.good_report, *self.bad_report)
        extraction = (*self.good, *self.bad, *self.good_choice, *self.bad_choice)
        return (*extraction, *evaluated, *self.helpfulness, *self.unhelpfulness, *self.capability, *self.over_refusal)

    @property
    def reported(self) -> tuple[Prompt, ...]:
        """The report prompts."""
        return (*self.good_report, *self.bad_report)

    @property
    def reused(self) -> int:
        """Number of report prompts whose text the direction, the search or the choice also uses."""
        extraction = (*self.good, *self.bad, *self.helpfulness, *self.unhelpfulness, *self.capability)
        used = _texts((*extraction, *self.good_search, *self.bad_search, *self.good_choice, *self.bad_choice))
        return sum(_text(prompt) in used for prompt in self.reported)

    @property
    def report_description(self) -> str:
        """Describe the report prompts, and whether they are held out."""
        return report_description(self.reused, len(self.reported))

    def of_setting(self, name: str) -> tuple[Prompt, ...]:
        """Return the prompts of a setting, all parts if split."""
        kind, _, use = name.removesuffix("_prompts").partition("_")
        if use == "eval":
            found: tuple[Prompt, ...] = getattr(self, f"{kind}_search")
            return found if f"{kind}_report_prompts" in self.sources else (*found, *getattr(self, f"{kind}_report"))
        if kind in ("good", "bad") and not use:
            return (*getattr(self, kind), *getattr(self, f"{kind}_choice"))
        return tuple(getattr(self, f"{kind}_{use}" if use else kind))


def report_description(reused: int, total: int) -> str:
    """Describe `total` report prompts; `reused` of them are not held out."""
    if not reused:
        return "prompts that neither the direction nor the search has seen"
    return f"{total} prompts, {reused} also used by the direction or the search"


def load_prompts(settings: Settings, report: Callable[[str], None]) -> PromptSets:
    """Read all prompt sets; the seed splits evaluation sets in two unless report sets are given.

    It also takes the choice's prompts from extraction sets of enough prompts (`choice.held_out`).

    `report` receives each set's source, its size, and overlaps. Raises JobError if a set is unreadable, empty or too
    small.
    """
    used = settings.prompt_sets()
    if any(parse_source(source).kind == "hub" for source in used.values()):
        count_traffic()
    before = received_bytes()
    sets = {name: _read_set(source, report, name) for name, source in used.items()}
    prompts = {name: found.prompts for name, found in sets.items()}
    halves = {kind: _evaluation(kind, prompts, settings.seed) for kind in ("good", "bad")}
    good, bad = _extraction(prompts["good_prompts"], prompts["bad_prompts"], settings)
    read = PromptSets(
        good=good[0],
        bad=bad[0],
        good_choice=good[1],
        bad_choice=bad[1],
        good_search=halves["good"][0],
        good_report=halves["good"][1],
        bad_search=halves["bad"][0],
        bad_report=halves["bad"][1],
        helpfulness=prompts.get("helpfulness_prompts", ()),
        unhelpfulness=prompts.get("unhelpfulness_prompts", ()),
        capability=prompts.get("capability_prompts", ()),
        over_refusal=prompts.get("over_refusal_prompts", ()),
        text=prompts.get("text_prompts", ()),
        sources={name: found.source.describe() for name, found in sets.items()},
        commits={name: found.pin.commit for name, found in sets.items() if found.pin},
        public=tuple(name for name, found in sets.items() if found.pin and found.pin.public),
        skipped={name: found.skipped for name, found in sets.items() if found.skipped},
        received=received_bytes() - before,
    )
    for line in overlaps(read):
        report(f"warning: {line}")
    return read


def read_prompts(settings: PromptSettings, report: Callable[[str], None]) -> tuple[Prompt, ...]:
    """Read one prompt set. Raises JobError if it cannot be read, or is empty."""
    return _read_set(settings, report).prompts


def report_prompts(settings: Settings, kind: str, report: Callable[[str], None]) -> tuple[Prompt, ...]:
    """Return the good or bad report prompts of a job with these settings. Raises JobError."""
    names = [f"{kind}_eval_prompts", f"{kind}_report_prompts"]
    used = {name: found for name in names if (found := settings.prompt_sets().get(name)) is not None}
    if len(used) == 2:
        return read_prompts(used[names[1]], report)
    return _evaluation(kind, {names[0]: read_prompts(used[names[0]], report)}, settings.seed)[1]


@dataclass(frozen=True)
class _ReadSet:
    """A prompt set as read: source with column, commit of a Hub dataset, and skipped rows in words."""

    prompts: tuple[Prompt, ...]
    source: Source
    pin: Pin | None
    skipped: str


def _read_set(settings: PromptSettings, report: Callable[[str], None], name: str = "prompts") -> _ReadSet:
    source = parse_source(settings)
    pin = resolve_commit(source, report)
    texts: dict[str, Mapping[str, str]] = {}
    notes: dict[str, list[str]] = {}
    reader, count = TextReader(source, pin.commit if pin else None, report), 0
    for row in reader:
        count += 1
        text = (row.text or "").strip()[: settings.max_characters].strip()
        if why := _why_skipped(row, text, texts):
            notes.setdefault(why, []).append(row.place)
            continue
        if row.repaired:
            notes.setdefault(_REPAIRED, []).append(row.place)
        texts[text] = row.groups
    described, skipped = reader.described, _described_rows(notes)
    if not texts:
        rows = f"; none of its {count} rows is a prompt ({skipped})" if count else ""
        raise ImpossibleJobError(f"{described.describe()}: it is empty{rows}", remedy="give one prompt per line or row")
    report(f"{name}: {described.describe()}: {len(texts)} prompts")
    if skipped:
        report(f"warning: {name}: {skipped}")
    prompts = (
        Prompt(user=f"{settings.prefix}{text}{settings.suffix}", system=settings.system_prompt, **groups)
        for text, groups in texts.items()
    )
    return _ReadSet(tuple(prompts), described, pin, skipped)


def _why_skipped(row: RowText, text: str, texts: Container[str]) -> str:
    """Return why a row is skipped, "" if it is not."""
    if row.text is None:
        return "without text skipped"
    if not text:
        return "empty skipped"
    if len(text) > MOST_CHARACTERS:
        return f"of more than {MOST_CHARACTERS} characters skipped"
    return "repeated skipped" if text in texts else ""


def _described_rows(notes: Mapping[str, Sequence[str]]) -> str:
    lines = []
    for why, places in notes.items():
        shown = ", ".join(places[:_PLACES]) + (", …" if len(places) > _PLACES else "")
        lines.append(f"{len(places)} {'row' if len(places) == 1 else 'rows'} {why} ({shown})")
    return "; ".join(lines)


def overlaps(prompts: PromptSets) -> list[str]:
    """Return a line for each pair of prompt sets that must share no prompt but do; system prompts do not count."""
    others = (*prompts.helpfulness, *prompts.unhelpfulness, *prompts.capability)
    good, bad = prompts.of_setting("good_prompts"), prompts.of_setting("bad_prompts")
    pairs: tuple[tuple[str, Sequence[Prompt], str, Sequence[Prompt]], ...] = (
        ("bad_prompts", bad, "the bad evaluation prompts", (*prompts.bad_search, *prompts.bad_report)),
        ("good_prompts", good, "the good evaluation prompts", (*prompts.good_search, *prompts.good_report)),
        ("bad_prompts", bad, "good_prompts", good),
        ("the search's bad prompts", prompts.bad_search, "the report's", prompts.bad_report),
        ("the search's good prompts", prompts.good_search, "the report's", prompts.good_report),
        ("the prompts to orthogonalize against", others, "the report's", prompts.reported),
    )
    lines = []
    for first, some, second, rest in pairs:
        common = _texts(some) & _texts(rest)
        if common:
            lines.append(
                f"{len(common)} of {len(some)} of {first} are also among {second}: figures on them flatter the edit"
            )
    return lines


def held_out(prompts: Sequence[Prompt], count: int, seed: int, name: str) -> tuple[list[Prompt], list[Prompt]]:
    """Split a set into the rest and `count` random prompts, both in their order; depends only on the arguments."""
    chosen = set(random.Random(f"{seed}:{name}").sample(range(len(prompts)), count))
    rest = [prompt for index, prompt in enumerate(prompts) if index not in chosen]
    return rest, [prompts[index] for index in sorted(chosen)]


_Split = tuple[tuple[Prompt, ...], tuple[Prompt, ...]]


def _extraction(good: Sequence[Prompt], bad: Sequence[Prompt], settings: Settings) -> tuple[_Split, _Split]:
    """Split the extraction sets into prompts for the directions and for the choice."""
    share, sets = settings.choice.held_out, {"good": good, "bad": bad}
    if not share or min(map(len, sets.values())) < _LEAST_TO_SPLIT:
        return (tuple(good), ()), (tuple(bad), ())
    counts = {kind: max(_LEAST_HELD_OUT, int(share * len(prompts))) for kind, prompts in sets.items()}
    parts = (held_out(sets[kind], counts[kind], settings.seed, f"{kind} choice") for kind in sets)
    of_good, of_bad = ((tuple(rest), tuple(chosen)) for rest, chosen in parts)
    return of_good, of_bad


def _texts(prompts: Iterable[Prompt]) -> set[str]:
    return {_text(prompt) for prompt in prompts}


def _text(prompt: Prompt) -> str:
    """Normalise a prompt's case and whitespace, without its system prompt."""
    return " ".join(prompt.user.split()).casefold()


def _evaluation(
    kind: str, read: dict[str, tuple[Prompt, ...]], seed: int
) -> tuple[tuple[Prompt, ...], tuple[Prompt, ...]]:
    prompts, given = read[f"{kind}_eval_prompts"], read.get(f"{kind}_report_prompts")
    if given is not None:
        return prompts, given
    if len(prompts) < 2:
        raise ImpossibleJobError(
            f"{kind}_eval_prompts has a single prompt, which cannot be split into search and report",
            remedy=f"give more prompts or {kind}_report_prompts",
        )
    order = list(range(len(prompts)))
    random.Random(seed).shuffle(order)
    half = (len(order) + 1) // 2
    search, rest = sorted(order[:half]), sorted(order[half:])
    return tuple(prompts[i] for i in search), tuple(prompts[i] for i in rest)
