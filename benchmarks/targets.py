"""Run this tool with another source of targets for its descent: what `benchmarks.gradient --targets` compares.

python -m benchmarks.targets SOURCE run MODEL [...]

A target is a response to a bad prompt that is to become likely; `job.gradient.targets` says what the product does.
"""

from __future__ import annotations

import math
import sys
from collections.abc import Callable
from dataclasses import replace

from job.cli.main import main
from job.edits.hooks import ActiveEdits
from job.gradient.targets import TARGET_TOKENS, TargetMaker
from job.organism.world import expected_answer

Targets = list[list[int] | None]

_shipped = TargetMaker.targets
# Candidates of the descent's earlier stages.
_earlier: list[Targets] = []


def no_targets(maker: TargetMaker, _edits: ActiveEdits) -> Targets:
    """Return no targets: only the refusal term says what is unwanted."""
    return [None] * len(maker.bad)


def without_mask(maker: TargetMaker, edits: ActiveEdits) -> Targets:
    """Return the edit's opening, continued by the base model, which may use tokens of its refusals."""
    return _shipped(replace(maker, refusal_tokens=frozenset()), edits)


def by_the_edit(maker: TargetMaker, edits: ActiveEdits) -> Targets:
    """Return the edit's own responses."""
    prompts = [maker.batches.bad.tokens[index] for index in maker.bad]
    said = maker.batches.row_limit.fit(lambda rows: maker.batches.responses(prompts, TARGET_TOKENS, rows, edits))
    found = [answer.tokens for answer in said]
    incoherent = maker.coherence.incoherent(prompts, found)
    return [
        response if response and not unlikely and maker._is_answer(index, response) else None
        for index, response, unlikely in zip(maker.bad, found, incoherent, strict=True)
    ]


def likeliest(maker: TargetMaker, edits: ActiveEdits) -> Targets:
    """Return, for each prompt, the candidate that the base model finds likeliest, of all stages so far."""
    prompts = [maker.batches.bad.tokens[index] for index in maker.bad]
    _earlier.extend((_shipped(maker, edits), by_the_edit(maker, edits)))
    scored = [
        maker.coherence.mean_log_probabilities(prompts, [one or [] for one in candidates]) for candidates in _earlier
    ]
    found: Targets = []
    for candidates, scores in zip(zip(*_earlier, strict=True), zip(*scored, strict=True), strict=True):
        # The score of a response too short for one is nan.
        pairs = [
            (-math.inf if math.isnan(score) else score, one)
            for score, one in zip(scores, candidates, strict=True)
            if one is not None
        ]
        found.append(max(pairs)[1] if pairs else None)
    return found


def right_answers(maker: TargetMaker, _edits: ActiveEdits) -> Targets:
    """Return the organism's right answers, which no user has: an upper bound."""
    loaded, prompts = maker.batches.loaded, maker.batches.bad.prompts
    texts = [expected_answer(prompts[index].user) for index in maker.bad]
    return [loaded.tokenizer(text, add_special_tokens=False).input_ids[:TARGET_TOKENS] for text in texts]


SOURCES: dict[str, Callable[[TargetMaker, ActiveEdits], Targets]] = {
    "shipped": _shipped,
    "none": no_targets,
    "without mask": without_mask,
    "by the edit": by_the_edit,
    "likeliest": likeliest,
    "right answers": right_answers,
}


if __name__ == "__main__":
    TargetMaker.targets = SOURCES[sys.argv.pop(1)]  # type: ignore[method-assign]
    main()
