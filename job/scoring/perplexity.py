"""Cross-entropy on plain text."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from job.config.sections import PromptSettings
from job.data.sources import parse_source, read_texts, resolve_commit
from job.directions.residuals import batches
from job.generation.forward import last_logits
from job.model.device_faults import halving
from job.model.loading import LoadedModel

# Web text like that of training sets, streamed: 100 rows take about 2 MB.
DEFAULT_TEXT = "allenai/c4:en#validation[:100]/text"
TEXT_TOKENS = 512
# Tokens per forward, and positions whose logits are converted to float32 at once.
_FORWARD_TOKENS, _SLICE = 4096, 128


@dataclass(frozen=True)
class Passage:
    """A tokenized text to predict.

    `first` is the index of the first predicted token, at least 1; earlier tokens are given.
    """

    tokens: list[int]
    first: int = 1

    @property
    def count(self) -> int:
        """Number of predicted tokens."""
        return len(self.tokens) - self.first


def plain_texts(spec: str, report: Callable[[str], None]) -> tuple[list[str], str]:
    """Return the non-blank texts of a SPEC, and its description. Raises JobError if it cannot be read."""
    source = parse_source(PromptSettings(spec=spec))
    pin = resolve_commit(source, report)
    texts = [text for text in read_texts(source, pin.commit if pin else None, report) if text.strip()]
    return texts, source.describe()


def passages_of(loaded: LoadedModel, texts: Sequence[str], most: int = TEXT_TOKENS) -> list[Passage]:
    """Tokenize texts as documents of at most `most` tokens; without a beginning token, the first one is given."""
    return [Passage(loaded.tokenizer(text)["input_ids"][:most]) for text in texts]


def cross_entropies(
    loaded: LoadedModel, passages: Sequence[Passage], rows: int, report: Callable[[str], None]
) -> list[float]:
    """Return each passage's cross-entropy, summed over predicted tokens, nats. Raises MachineError."""

    def measured(size: int) -> list[float]:
        found = [0.0] * len(passages)
        budget = max(_FORWARD_TOKENS * size // rows, 1)
        lengths = [len(passage.tokens) for passage in passages]
        for chosen in batches(lengths, size, budget, padded=loaded.architecture.batching.padded):
            chunk = [passages[index] for index in chosen]
            width = max(len(passage.tokens) for passage in chunk)
            logits = last_logits(loaded.model, [passage.tokens for passage in chunk], width)
            for index, passage, own in zip(chosen, chunk, logits, strict=True):
                found[index] = _cross_entropy(own[-len(passage.tokens) :], passage)
        return found

    return halving(rows, measured, report)[0]


@torch.inference_mode()
def _cross_entropy(logits: Tensor, passage: Passage) -> float:
    """Return a passage's cross-entropy from the logits at all its tokens, [t, vocabulary]."""
    targets = torch.tensor(passage.tokens[passage.first :], device=logits.device)
    predictions = logits[passage.first - 1 : -1]
    total = 0.0
    for start in range(0, len(targets), _SLICE):
        part = predictions[start : start + _SLICE].to(torch.float32)
        losses = nn.functional.cross_entropy(part, targets[start : start + _SLICE], reduction="none")
        total += float(losses.to("cpu", torch.float64).sum())
    return total
