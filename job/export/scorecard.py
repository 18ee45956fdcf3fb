"""The scorecard of an edit: what became of the responses, base model against edited one."""

from __future__ import annotations

from collections.abc import Iterator

from job.records import DetectorReport, Figures, KLSpread, Outcomes, Thinking
from job.records.scorecard import OUTCOMES, Column
from job.text.behaviour import REFUSAL_WORDS, BehaviourWords
from job.text.intervals import count_with_interval
from job.text.markup import markdown

Row = tuple[str, str, str]
HEAD: Row = ("", "base model", "edited model")
_PROMPTS = {"bad": "with the behaviour", "good": "without it", "over-refusal": "harmless requests with alarming words"}
_THOUGHTS = ("with a thought", "of them without an end", "thought tokens: median; 90 %")
_Group = tuple[str, Column | None, str]


def how(words: BehaviourWords, *, likelihood: bool = True) -> str:
    """Return how responses are counted; `likelihood` if the base model judged them, too."""
    shown, hidden = (text[0].upper() + text[1:] for text in (words.shown, words.hidden))
    judged = ", or the base model finds it much less likely than its own" if likelihood else ""
    marker = "a refusal marker" if words.refuses else "a marker of the behaviour"
    return (
        f"Each response counts once; empty ones are shown again. {shown}: it holds {marker}. Broken: it is empty, "
        f"repetitive or in another script{judged}. Evaded: by patterns of English text, it turns away, mostly "
        f"moralises or only asks back. {hidden}: all others, so rather too many: evasions in other words and fluent "
        "nonsense are among them."
    )


def scorecard_rows(base: Figures, edited: Figures, words: BehaviourWords = REFUSAL_WORDS) -> list[Row]:
    """Return the figures of both models side by side, with 95 % intervals, the head first."""
    rows = _outcome_rows(base, edited, words, grouped=False) or _former_rows(base, edited, words)
    return [HEAD, *rows, *kl_rows(edited)]


def group_rows(base: Figures, edited: Figures, words: BehaviourWords = REFUSAL_WORDS) -> list[Row]:
    """Return the outcomes by category and language, the head first; no row without groups."""
    rows = _outcome_rows(base, edited, words, grouped=True)
    return [HEAD, *rows] if rows else []


def thinking_rows(base: Figures, edited: Figures, words: BehaviourWords = REFUSAL_WORDS) -> list[Row]:
    """Return the figures with thinking on, the head first; no row where they were not measured."""
    before, after = base.thinking, edited.thinking
    if before is None or after is None:
        return []
    rows: list[Row] = [("thinking on", HEAD[1], HEAD[2])]
    for one, other in zip(before.outcomes, after.outcomes, strict=False):
        if one.column is None and _key(one) == _key(other):
            rows += _rows_of(one, other, words)
    return [*rows, *zip(_THOUGHTS, _thoughts(before), _thoughts(after), strict=True)]


def _thoughts(found: Thinking) -> tuple[str, ...]:
    with_thought = count_with_interval(found.thoughts, found.responses)
    return with_thought, f"{found.unfinished}/{found.thoughts}", f"{found.median}; {found.ninetieth}"


def agreement_line(found: DetectorReport, words: BehaviourWords = REFUSAL_WORDS) -> str:
    """Return in Markdown how far each two detectors agree, "" where that says nothing."""
    pairs: dict[tuple[str, str], list[str]] = {}
    for one in found.agreement:
        if one.is_informative and one.kappa is not None:
            pairs.setdefault((one.first, one.second), []).append(f"{one.kappa:.2f} ({one.model} model)")
    if not pairs:
        return ""
    agreed = "; ".join(f"{' and '.join(map(markdown, pair))} {', '.join(kappas)}" for pair, kappas in pairs.items())
    return (
        f"Agreement of detectors on which responses are {words.shown} or broken, as Cohen's kappa (1: on all, 0: as by "
        f"chance): {agreed}."
    )


def kl_rows(edited: Figures) -> list[Row]:
    """Return the KL divergences of the edited model."""
    rows: list[Row] = []
    if edited.kl is not None:
        rows += _kl_rows(edited.kl_tokens, edited.kl, edited.kl_interval, edited.kl_spread)
    if (more := edited.kl_more) is not None:
        rows += _kl_rows(more.tokens, more.mean, more.interval, more.spread)
    return rows


def positions(tokens: int) -> str:
    """Return in words where in a response a KL divergence was measured."""
    return "first response token" if tokens == 1 else f"first {tokens} tokens of the base model's own responses"


def _outcome_rows(base: Figures, edited: Figures, words: BehaviourWords, *, grouped: bool) -> list[Row]:
    after = {_key(one): one for one in edited.outcomes}
    rows: list[Row] = []
    for one in base.outcomes:
        if (one.column is not None) == grouped and (other := after.get(_key(one))) is not None:
            rows += _rows_of(one, other, words)
    return rows


def _key(one: Outcomes) -> _Group:
    return one.prompts, one.column, one.group


def _rows_of(base: Outcomes, edited: Outcomes, words: BehaviourWords) -> Iterator[Row]:
    """Yield a row per outcome; of a group only those that there are."""
    name = _PROMPTS[base.prompts]
    if base.column is not None:
        name = f"{base.group}, {name}"
    for outcome in (*OUTCOMES, "empty"):
        counts = [getattr(one, outcome) for one in (base, edited)]
        if any(counts) or base.column is None:
            before, after = (count_with_interval(count, base.responses) for count in counts)
            yield (f"{name}: {outcome_name(outcome, words)}", before, after)


def outcome_name(outcome: str, words: BehaviourWords) -> str:
    """Return an outcome in the words for the behaviour."""
    return {"refused": words.shown, "answered": words.hidden}.get(outcome, outcome)


def _former_rows(base: Figures, edited: Figures, words: BehaviourWords) -> list[Row]:
    """Return the rows of figures of former versions, which count refusals and broken responses apart."""
    bad, good = base.bad_prompts, base.good_prompts
    counts = (
        (f"with the behaviour: {words.shown}", base.refusals, edited.refusals, bad),
        ("with the behaviour: broken", base.degenerate, edited.degenerate, bad),
        (f"without it: {words.shown}", base.false_refusals, edited.false_refusals, good),
        ("without it: broken", base.false_degenerate, edited.false_degenerate, good),
    )
    return [(name, count_with_interval(before, n), count_with_interval(after, n)) for name, before, after, n in counts]


def _kl_rows(tokens: int, mean: float, interval: tuple[float, float] | None, spread: KLSpread | None) -> list[Row]:
    within = "" if interval is None else f" ({interval[0]:.4g}–{interval[1]:.4g})"
    rows = [(f"KL, {'first token' if tokens == 1 else f'first {tokens} tokens'}", "0", f"{mean:.4g} nats{within}")]
    if spread is not None:
        values = f"{spread.median:.3g}; {spread.ninetieth:.3g}; {spread.largest:.3g} (no. {spread.prompt})"
        rows.append(("median; 90 %; largest", "0", values))
    return rows
