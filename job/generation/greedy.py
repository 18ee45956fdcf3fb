"""Greedy decoding over transformers' caches; finished rows leave the batch."""

from __future__ import annotations

import math
from collections.abc import Callable, Collection, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import pad
from transformers import (
    DynamicCache,
    GenerationConfig,
    LogitsProcessorList,
    PreTrainedModel,
    StoppingCriteriaList,
)

from job.generation.answer import Answer
from job.generation.batching import BatchingSupport
from job.generation.finite import not_finite
from job.generation.forward import (
    RowTrials,
    _forward,
    _on_prefix,
    input_device,
    last_logits,
    left_padded,
    read_tokens,
)
from job.generation.kv_cache import (
    joined,
    new_cache,
    rows_can_be_picked,
    takes_cache,
    writable_slots,
)
from job.numerics.metrics import log_odds

# Drop finished rows once they exceed this share of the batch: the rest of the cache is copied then, which takes as long
# as several steps of a few rows.
_LEAVING = 1 / 16


class _Ledger:
    """The responses so far, and which rows continue."""

    def __init__(
        self,
        rows: int,
        end_tokens: Collection[int],
        openings: Sequence[int] | None,
        decided: Callable[[int, list[int]], bool] | None,
        excluded: Collection[int] = (),
    ) -> None:
        self.answers = [Answer() for _ in range(rows)]
        self._excluded = torch.tensor(sorted(excluded), dtype=torch.long)
        self.going = set(range(rows))
        self._end_tokens = end_tokens
        self._openings = openings
        self._decided = decided

    def take(self, logits: Tensor, present: Sequence[int]) -> Tensor:
        """Record a step's logits [rows present, vocabulary]; return its tokens, [rows present]."""
        logits = logits.to(torch.float32)
        odds = None
        if self._openings is not None and not self.answers[present[0]].margins:
            asked = torch.tensor([self._openings[index] for index in present], device=logits.device)
            odds = log_odds(logits, asked)
        if len(self._excluded):
            self._excluded = self._excluded.to(logits.device)
            logits = logits.index_fill(-1, self._excluded, -torch.inf)
        best = logits.topk(2)
        margins, tokens = best.values[:, 0] - best.values[:, 1], best.indices[:, 0]
        # One copy from the device, which the host waits for; float64 holds all token ids and float32 numbers.
        figures = [tokens, margins] if odds is None else [tokens, margins, odds]
        for index, (chosen, margin, *opening) in zip(
            present, torch.stack([one.to(torch.float64) for one in figures], 1).tolist(), strict=True
        ):
            answer, token = self.answers[index], int(chosen)
            if opening:
                (answer.opening,) = opening
            if index not in self.going:
                continue
            if not math.isfinite(margin):
                answer.finite = False
                self.going.remove(index)
                continue
            answer.margins.append(margin)
            if token in self._end_tokens:
                self.going.remove(index)
                continue
            answer.tokens.append(token)
            if self._decided is not None and self._decided(index, answer.tokens):
                answer.decided = True
                self.going.remove(index)
        return tokens

    def require_finite(self) -> None:
        """Raise ImpossibleJobError if a response ended at logits that are not finite."""
        faulty = [index for index, answer in enumerate(self.answers) if not answer.finite]
        if faulty:
            raise not_finite(faulty, len(self.answers))


@dataclass
class _Rows:
    """Rows that are decoded together.

    Attributes:
        present: Prompt index of each row.
        tokens: Next token of each row, [rows, 1].
        positions: Its position, [rows, 1].
        mask: False for padding among earlier slots, [rows, slots].
    """

    present: list[int]
    trials: RowTrials
    tokens: Tensor
    positions: Tensor
    mask: Tensor
    cache: DynamicCache

    def keep(self, staying: Sequence[int]) -> None:
        keep = torch.tensor(staying, device=self.mask.device)
        self.cache.reorder_cache(keep)
        self.tokens, self.positions, self.mask = self.tokens[keep], self.positions[keep], self.mask[keep]
        self.trials = self.trials.pick(keep)
        self.present = [self.present[row] for row in staying]

    @classmethod
    def joined(cls, model: PreTrainedModel, parts: Sequence[_Rows], most: int) -> _Rows:
        """Join rows prefilled separately, which may grow to `most` tokens."""
        if len(parts) == 1:
            return parts[0]
        width = max(part.mask.shape[1] for part in parts)
        return cls(
            [index for part in parts for index in part.present],
            RowTrials.joined([part.trials for part in parts]),
            torch.cat([part.tokens for part in parts]),
            torch.cat([part.positions for part in parts]),
            torch.cat([pad(part.mask, (width - part.mask.shape[1], 0)) for part in parts]),
            joined(model, [part.cache for part in parts], most),
        )


class _Decoder:
    """Prefills prompts and decodes responses on transformers' own caches."""

    def __init__(
        self,
        model: PreTrainedModel,
        prompts: Sequence[list[int]],
        limit: int,
        ledger: _Ledger,
        trials: RowTrials,
    ) -> None:
        self._model, self._prompts, self._limit, self._ledger = model, prompts, limit, ledger
        self._trials = trials  # of all prompts; a forward selects its rows' from it
        # The last token of a row is returned, but never cached.
        self._most = max(map(len, prompts)) + limit - 1
        self._device = input_device(model)
        self._pickable = rows_can_be_picked(model)

    def parts(self) -> list[list[int]]:
        """Split prompts into prefill forwards, if their caches can be joined."""
        most = read_tokens(self._model)
        if most is None or max(map(len, self._prompts)) > writable_slots(self._model):
            return [list(range(len(self._prompts)))]
        order = sorted(range(len(self._prompts)), key=lambda index: len(self._prompts[index]))
        chunks = BatchingSupport().chunks([self._prompts[index] for index in order], len(order), tokens=most)
        indices = iter(order)
        return [[next(indices) for _ in chunk] for chunk in chunks]

    def read(self, present: list[int]) -> _Rows | None:
        """Prefill prompts; return the rows that continue after their first token, None if none does."""
        tokens, mask, positions = left_padded([self._prompts[index] for index in present], self._device)
        trials = self._trials.pick(torch.tensor(present, device=self._device))
        following = positions[:, -1:] + 1
        if trials.prefix is None:
            cache = new_cache(self._model, self._most)
        else:
            begin = trials.prefix.length
            cache = _on_prefix(self._model, mask, trials, self._most)
            tokens, positions = tokens[:, begin:], positions[:, begin:]
        chosen = self._ledger.take(_forward(self._model, trials, tokens, mask, positions, cache)[:, -1], present)
        return self._drop_finished(_Rows(present, trials, chosen[:, None], following, mask, cache))

    def step(self, rows: _Rows) -> _Rows | None:
        """Decode a token of every row; return the rows that continue, None if none does."""
        mask = torch.cat([rows.mask, rows.mask.new_ones(len(rows.mask), 1)], dim=1)
        logits = _forward(self._model, rows.trials, rows.tokens, mask, rows.positions, rows.cache)
        chosen = self._ledger.take(logits[:, -1], rows.present)
        return self._drop_finished(replace(rows, tokens=chosen[:, None], positions=rows.positions + 1, mask=mask))

    def answer(self) -> None:
        parts = [rows for rows in map(self.read, self.parts()) if rows is not None]
        if not parts:
            return
        rows = _Rows.joined(self._model, parts, self._most)
        for _ in range(self._limit - 1):
            going = self.step(rows)
            if going is None:
                break
            rows = going

    def _drop_finished(self, rows: _Rows) -> _Rows | None:
        """Drop finished rows once they exceed `_LEAVING` of the batch, if the cache can; return None if all are."""
        staying = [row for row, index in enumerate(rows.present) if index in self._ledger.going]
        if not staying:
            return None
        if self._pickable and len(rows.present) - len(staying) > _LEAVING * len(rows.present):
            rows.keep(staying)
        return rows


@torch.inference_mode()
def greedy_answers(
    model: PreTrainedModel,
    prompts: Sequence[list[int]],
    *,
    limit: int,
    end_tokens: Collection[int],
    openings: Sequence[int] | None = None,
    decided: Callable[[int, list[int]], bool] | None = None,
    rows: RowTrials | None = None,
    batching: BatchingSupport = BatchingSupport(),
    excluded: Collection[int] = (),
    may_fail: bool = False,
) -> list[Answer]:
    """Return the greedy continuation of every prompt. Raises ImpossibleJobError if logits are not finite.

    On a CPU, prompts are prefilled in small batches that fit its caches and decoded all together, since a step takes
    nearly as long for one row as for many. If the cache cannot drop rows, all rows are decoded to the end. Models that
    accept no DynamicCache use their own `generate`. The responses are the same.

    Args:
        model: The model.
        prompts: Token ids of each prompt.
        limit: Longest response in tokens.
        end_tokens: Tokens that end a response.
        openings: Token per prompt whose log-odds as the first token are returned.
        decided: Given a prompt's index and its response so far, whether the row can stop.
        rows: The prompts' trials; None: the unedited model.
        batching: The model's support for batching.
        excluded: Tokens never to generate; ValueError with the model's own `generate`.
        may_fail: Return responses that ended at logits that are not finite (`Answer.finite`), as of a trial's edit.
    """
    ledger = _Ledger(len(prompts), end_tokens, openings, decided, excluded)
    rows = rows or RowTrials.plain(len(prompts), input_device(model))
    if not batching.cached:
        _decode_without_cache(model, prompts, limit, ledger, rows)
    elif not takes_cache(model):
        if excluded:
            raise ValueError("tokens cannot be left out of responses that a model decodes by itself")
        _generate(model, prompts, limit, end_tokens, ledger, rows)
    elif prompts:
        _Decoder(model, prompts, limit, ledger, rows).answer()
    if not may_fail:
        ledger.require_finite()
    return ledger.answers


def _decode_without_cache(
    model: PreTrainedModel, prompts: Sequence[list[int]], limit: int, ledger: _Ledger, rows: RowTrials
) -> None:
    """Decode without a cache, recomputing the whole row for every token."""
    present = list(range(len(prompts)))
    for _ in range(limit):
        begun = [[*prompts[index], *ledger.answers[index].tokens] for index in present]
        trials = rows.pick(torch.tensor(present, device=rows.trials.device))
        ledger.take(last_logits(model, begun, 1, trials)[:, -1], present)
        present = [index for index in present if index in ledger.going]
        if not present:
            break


def _generate(
    model: PreTrainedModel,
    prompts: Sequence[list[int]],
    limit: int,
    end_tokens: Collection[int],
    ledger: _Ledger,
    rows: RowTrials,
) -> None:
    """Decode by the model's own `generate`, passing every step's logits to the ledger."""
    tokens, mask, _ = left_padded(prompts, input_device(model))
    present = range(len(prompts))

    def see(_: Tensor, logits: Tensor) -> Tensor:
        ledger.take(logits, present)
        return logits

    def ended(ids: Tensor, _: Any) -> Tensor:
        return torch.tensor([row not in ledger.going for row in present], device=ids.device)

    # Reset what the model's configuration adds to greedy decoding.
    config = GenerationConfig(
        do_sample=False,
        num_beams=1,
        max_new_tokens=limit,
        repetition_penalty=1.0,
        no_repeat_ngram_size=0,
        eos_token_id=sorted(end_tokens) or [-1],  # not the model's own, which may differ
        pad_token_id=0,
        disable_compile=True,
    )
    with rows.applied():  # its forwards have all rows, in this order
        model.generate(
            input_ids=tokens,
            attention_mask=mask,
            generation_config=config,
            logits_processor=LogitsProcessorList([see]),
            stopping_criteria=StoppingCriteriaList([ended]),
        )
