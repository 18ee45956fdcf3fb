"""Find prompts that a model declines."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence

import torch

from job.data.prompts import Prompt
from job.generation.forward import RowTrials, shared_prefix
from job.generation.greedy import greedy_answers
from job.generation.kv_cache import common_prefix
from job.generation.stop_markers import MarkerWatch
from job.model.loading import LoadedModel
from job.text.refusal_markers import RefusalMarkers

# Longest judged response in tokens, the search's default.
RESPONSE_TOKENS = 30
_ROWS = 40


def first_prompts(
    loaded: LoadedModel,
    prompts: Sequence[str],
    markers: RefusalMarkers,
    *,
    declined: bool,
    count: int,
    progress: Callable[[int], None] = lambda _: None,
) -> list[str]:
    """Return the first `count` prompts that a model declines or answers; `progress` receives the number so far."""
    found: list[str] = []
    for batch, refused in _judged(loaded, prompts, MarkerWatch(loaded.tokenizer, markers)):
        found += [prompt for prompt, verdict in zip(batch, refused, strict=True) if verdict == declined]
        progress(min(len(found), count))
        if len(found) >= count:
            break
    return found[:count]


def _judged(
    loaded: LoadedModel, prompts: Sequence[str], watch: MarkerWatch
) -> Iterator[tuple[Sequence[str], list[bool]]]:
    tokens = loaded.tokenize([Prompt(user=prompt) for prompt in prompts])
    prefix = common_prefix(tokens)
    shared = shared_prefix(loaded.model, prefix, 1, None) if prefix and loaded.architecture.batching.shared else None
    for start in range(0, len(prompts), _ROWS):
        batch = tokens[start : start + _ROWS]
        rows = RowTrials(torch.zeros(len(batch), dtype=torch.long, device=loaded.device), None, shared)
        asked = prompts[start : start + _ROWS]
        yield asked, _refused(loaded, asked, batch, rows, watch)


def _refused(
    loaded: LoadedModel, prompts: Sequence[str], batch: Sequence[list[int]], rows: RowTrials, watch: MarkerWatch
) -> list[bool]:
    watches = [watch.begin(prompt) for prompt in prompts]
    answers = greedy_answers(
        loaded.model,
        batch,
        limit=RESPONSE_TOKENS,
        end_tokens=loaded.end_tokens,
        decided=lambda index, tokens: watches[index].found(tokens),
        rows=rows,
        batching=loaded.architecture.batching,
    )
    return [
        answer.decided or watch.markers.for_prompt(prompt).is_refusal(loaded.decode(answer.tokens))
        for prompt, answer in zip(prompts, answers, strict=True)
    ]
