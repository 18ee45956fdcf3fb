"""Responses with a chain of thought, which the job's other measurements switch off."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from dataclasses import dataclass

from job.data.prompts import Prompt
from job.directions.response_prefix import THOUGHTS
from job.edits.hooks import ActiveEdits
from job.generation.answer import Answer
from job.model.loading import LoadedModel
from job.model.rendering import conversations, thinking_rendering
from job.numerics.statistics import quantile
from job.records import Thinking
from job.scoring.broken import Exchange
from job.scoring.outcomes import count_outcomes
from job.scoring.prompt_batches import PromptBatches
from job.text.refusal_markers import RefusalMarkers

# What ends a chain of thought, by what begins it.
ENDS = {begin: closed.removeprefix(begin) for begin, closed in THOUGHTS.items()}


# Any prompt: whether a template opens a thought does not depend on it.
_PROBE = Prompt(user="Where does rain come from?")


@dataclass(frozen=True)
class Thought:
    """A response's chain of thought in tokens, None without one, and the text after it; "" if it does not end."""

    tokens: int | None
    answer: str
    unfinished: bool = False


@dataclass(frozen=True)
class ThinkingModel:
    """A model whose prompts ask for a chain of thought; `begin` is what opens one in the prompt itself, or ""."""

    loaded: LoadedModel
    begin: str

    @classmethod
    def of(cls, loaded: LoadedModel) -> ThinkingModel | None:
        """Return the model with thinking on; None if its template knows none. Raises ImpossibleJobError."""
        plain = dataclasses.replace(loaded.rendering, options=())
        found = thinking_rendering(loaded.tokenizer, plain)
        asked = found or plain
        (text,) = conversations(loaded.tokenizer, [_PROBE], asked)
        begin = next((begin for begin in THOUGHTS if text.rstrip().endswith(begin)), "")
        if found is None and not begin:
            return None
        open_ended = dataclasses.replace(loaded, rendering=asked, response_prefix="", prefix_tokens=None)
        return cls(open_ended, begin)

    def split(self, response: Answer) -> Thought:
        """Tell a response's thought from its answer."""
        tokens = response.tokens
        text = self._text(tokens)
        begin = self.begin or next((begin for begin in THOUGHTS if text.lstrip().startswith(begin)), "")
        if not begin:
            return Thought(None, self.loaded.decode(tokens))
        if ENDS[begin] not in text:
            return Thought(len(tokens), "", unfinished=True)
        low, high = 0, len(tokens)  # the thought's end is within the first `high` tokens, not within the first `low`
        while high - low > 1:
            middle = (low + high) // 2
            low, high = (low, middle) if ENDS[begin] in self._text(tokens[:middle]) else (middle, high)
        return Thought(high, self.loaded.decode(tokens[high:]))

    def _text(self, tokens: Sequence[int]) -> str:
        return str(self.loaded.tokenizer.decode(list(tokens), skip_special_tokens=False))


def measure_thinking(
    batches: PromptBatches, markers: RefusalMarkers, limit: int, edits: ActiveEdits | None = None
) -> Thinking | None:
    """Judge responses of up to `limit` tokens with thinking on, under edit 0 if edits are active.

    None if the model's template knows no thinking. `batches` are those without thinking. Raises ImpossibleJobError.
    """
    model = ThinkingModel.of(batches.loaded)
    if model is None:
        return None
    asked = PromptBatches.of(model.loaded, batches.good.prompts, batches.bad.prompts, 1)
    asked = dataclasses.replace(asked, row_limit=batches.row_limit)
    answers = asked.row_limit.fit(lambda rows: asked.responses(asked.everything, limit, rows, edits))
    thoughts = [model.split(answer) for answer in answers]
    exchanges = [
        Exchange(prompt.user, thought.answer, groups=prompt.groups)
        for prompt, thought in zip([*asked.good.prompts, *asked.bad.prompts], thoughts, strict=True)
    ]
    refused = [markers.for_prompt(one.prompt).is_refusal(one.answer) for one in exchanges]
    lengths = [thought.tokens for thought in thoughts if thought.tokens is not None]
    good = len(asked.good)
    return Thinking(
        limit=limit,
        responses=len(answers),
        thoughts=len(lengths),
        unfinished=sum(thought.unfinished for thought in thoughts),
        median=round(quantile(lengths, 0.5)) if lengths else 0,
        ninetieth=round(quantile(lengths, 0.9)) if lengths else 0,
        outcomes=(
            *count_outcomes("bad", exchanges[good:], refused[good:]),
            *count_outcomes("good", exchanges[:good], refused[:good]),
        ),
    )
