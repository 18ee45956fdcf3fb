"""Residuals of a job's prompts: extracted once, within memory, and cached in the run folder."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from job.data.prompts import Prompt, PromptSets
from job.directions.residuals import (
    ResidualsTask,
    batches,
    digest,
    extract_residuals,
    read_tensors,
    write_tensors,
)
from job.edits.hooks import ActiveEdits
from job.errors import ImpossibleJobError, MachineError
from job.generation.finite import named, rows_not_finite
from job.generation.forward import read_tokens
from job.model.device_faults import Shortage, halving, within_memory
from job.model.loading import LoadedModel
from job.numerics.directions import winsorize
from job.records import JobRecord
from job.storage.events import Events
from job.storage.run_folder import RunFolder

# Returns the results of tasks, evaluated by the given function and by other processes.
Evaluate = Callable[[Sequence[Any], Callable[[Any], Any]], list[Any]]


@dataclass(frozen=True)
class PromptResiduals:
    """Residuals of all prompt sets, each extracted on first use.

    Attributes:
        tokens: Token ids of each prompt, by prompt set.
        forward_tokens: Tokens per forward, padding included.
        quantile: Winsorisation quantile; 1 disables it.
        evaluate: Shares forwards with other processes; None without any.
    """

    folder: RunFolder
    record: JobRecord
    model: LoadedModel
    tokens: Mapping[str, list[list[int]]]
    rows: int
    forward_tokens: int
    quantile: float
    events: Events
    evaluate: Evaluate | None = None

    def keys(self) -> dict[str, str]:
        """Return the cache key of each prompt set's residuals."""
        return {name: self._key(name, None) for name in self.tokens}

    def _key(self, name: str, edit: str | None) -> str:
        # Token ids represent prompts, template and prefixes.
        return digest(
            {
                "model": self.record.identity["model"],
                "commit": self.record.model_commit,
                "dtype": self.model.dtype,
                "versions": self.record.versions,
                "batching": [self.rows, self.forward_tokens],
                "tokens": self.tokens[name],
                "edit": edit,
            }
        )

    def of(
        self, name: str, *, edits: ActiveEdits | None = None, edit: str | None = None, label: str | None = None
    ) -> Tensor:
        """Return winsorised residuals of the layers' outputs, [n, layers, d], on the model's device if they fit.

        Edit 0 of `edits` is active, under the cache key `edit`; `label` names the file, by default after the prompt
        set. Raises ImpossibleJobError if a residual is not finite.
        """
        label, key = label or name, self._key(name, edit)
        file = self.folder.path / "residuals" / f"{label}-{key[:16]}.safetensors"
        cached = read_tensors(file, key)
        if cached is not None:
            residuals = cached["residuals"]
        else:
            residuals = self._extracted(label, self.tokens[name], edits)
            try:
                write_tensors(file, key, {"residuals": residuals})
            except MachineError as error:
                # Only a cache for later starts: this one has the residuals.
                self.events.say(f"warning: residuals are not stored: {error.line}")
        if rows := rows_not_finite(residuals):
            raise ImpossibleJobError(
                f"residuals of {len(rows)} of {len(residuals)} {label} prompts are not finite in {self.model.dtype} "
                f"(rows {named(rows)})",
                remedy="try --set loading.dtypes='[\"float32\"]'",
            )
        return self._near_model(residuals[:, 1:])

    def _extracted(self, label: str, tokens: Sequence[list[int]], edits: ActiveEdits | None) -> Tensor:
        """Return residuals, [n, layers + 1, d], by smaller forwards if memory runs out."""

        def extract(rows: int) -> Tensor:
            with self.events.progress(f"{label} residuals", len(tokens)) as advance:
                token_limit = max(self.forward_tokens * rows // self.rows, 1)
                if self.evaluate is not None and edits is None:
                    return self._extract_in_workers(tokens, rows, token_limit, advance)
                return extract_residuals(self.model, tokens, rows, advance, tokens=token_limit, edits=edits)

        return halving(self.rows, extract, self.events.say)[0]

    def _extract_in_workers(
        self, tokens: Sequence[list[int]], rows: int, token_limit: int, advance: Callable[[int], None]
    ) -> Tensor:
        assert self.evaluate is not None
        lengths, padded = [len(one) for one in tokens], self.model.architecture.batching.padded
        forwards = list(batches(lengths, rows, token_limit, padded=padded))

        def extract(task: ResidualsTask) -> Tensor:
            residuals = task.extract(self.model)
            advance(len(residuals))
            return residuals

        parts = self.evaluate([ResidualsTask(tuple(tuple(tokens[i]) for i in chosen)) for chosen in forwards], extract)
        residuals = torch.empty(len(tokens), *parts[0].shape[1:])
        for chosen, part in zip(forwards, parts, strict=True):
            residuals[chosen] = part
        return residuals

    def _near_model(self, residuals: Tensor) -> Tensor:
        """Winsorise residuals on the model's device, on the CPU where its memory does not suffice."""
        winsorized = within_memory(lambda: winsorize(residuals.to(self.model.device), self.quantile))
        return winsorize(residuals, self.quantile) if isinstance(winsorized, Shortage) else winsorized


def direction_prompts(prompts: PromptSets) -> dict[str, Sequence[Prompt]]:
    """Return the prompt sets that directions are computed from, by name."""
    references = ("helpfulness", "unhelpfulness", "capability")
    return {
        "good": prompts.good,
        "bad": prompts.bad,
        **{name: prompts_of_set for name in references if (prompts_of_set := getattr(prompts, name))},
    }


def tokens_of_forward(model: LoadedModel, prompts: Sequence[Prompt], rows: int, answer_tokens: int) -> int:
    """Return the planned tokens of a forward of `rows` rows: the longest prompt with its response."""
    planned, limit = rows * (max(map(len, model.tokenize(prompts))) + answer_tokens), read_tokens(model.model)
    return planned if limit is None else min(planned, limit)
