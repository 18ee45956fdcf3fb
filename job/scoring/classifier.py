"""Sequence classification of responses by a local model, in batches of one fixed size."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Self

import torch
from transformers import AutoModelForSequenceClassification, AutoTokenizer, PreTrainedModel, PreTrainedTokenizerBase

from job.config.sections import LoadingSettings
from job.errors import ImpossibleJobError, first_line
from job.model.devices import resolve_device
from job.model.files import fetch_model, list_model, parse_model
from job.model.loading import quieten_transformers

_ROWS = 16
_MOST_TOKENS = 512


class TextClassifier:
    """A classifier of texts, or of pairs of a text and a hypothesis.

    Attributes:
        name: The model, as given.
        labels: Number of each label, in lower case.
    """

    def __init__(self, name: str, model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase) -> None:
        self.name = name
        self.labels = {str(label).casefold(): int(number) for number, label in model.config.id2label.items()}
        self._model = model
        self._tokenizer = tokenizer
        # Each label has a share of its own then.
        self._independent = len(self.labels) == 1 or model.config.problem_type == "multi_label_classification"

    @classmethod
    def loaded(
        cls,
        name: str,
        setting: str,
        settings: LoadingSettings,
        say: Callable[[str], None],
        commit: str | None = None,
    ) -> Self:
        """Load a classifier from a folder or NAME[@REVISION] on the Hub; JobError if there is none.

        `setting` names it in errors; `commit` is the pinned one. Code that comes with a model is never run.
        """
        source = parse_model(name)
        folder = fetch_model(source, list_model(source, commit, say), say)
        quieten_transformers()
        try:
            tokenizer = AutoTokenizer.from_pretrained(folder, local_files_only=True)
            model = AutoModelForSequenceClassification.from_pretrained(
                folder, local_files_only=True, use_safetensors=True, dtype="auto"
            )
        except (OSError, ValueError, KeyError) as error:
            raise ImpossibleJobError(
                f"{name} cannot be loaded as a classifier: {first_line(error)}",
                remedy=f"choose a model for sequence classification as {setting}",
            ) from error
        return cls(name, model.eval().to(resolve_device(settings.device)), tokenizer)

    def numbers(self, labels: Sequence[str]) -> list[int]:
        """Return the numbers of labels that count; by default the only label, or the second of two.

        Raises ImpossibleJobError.
        """
        asked = [label.casefold() for label in labels]
        if not asked and len(self.labels) <= 2:
            return [len(self.labels) - 1]
        unknown = [label for label in asked if label not in self.labels]
        if unknown or not asked:
            wrong = f"none is {unknown[0]}" if unknown else "none is chosen"
            raise ImpossibleJobError(
                f"the labels of {self.name} are {', '.join(self.labels)}, and {wrong}",
                remedy="set scoring.classifier_labels to those that count",
            )
        return [self.labels[label] for label in asked]

    @torch.inference_mode()
    def shares(
        self,
        texts: Sequence[str],
        wanted: Sequence[int],
        *,
        among: Sequence[int] | None = None,
        hypothesis: str | None = None,
    ) -> list[float]:
        """Return each text's probability of the wanted labels, of those `among`; for independent ones the largest."""
        shares: list[float] = []
        for start in range(0, len(texts), _ROWS):
            batch = list(texts[start : start + _ROWS])
            inputs = self._tokenizer(
                batch,
                None if hypothesis is None else [hypothesis] * len(batch),
                padding=True,
                truncation=True if hypothesis is None else "only_first",
                max_length=min(_MOST_TOKENS, self._tokenizer.model_max_length),
                return_tensors="pt",
            ).to(self._model.device)
            logits = self._model(**inputs).logits.float()
            if self._independent:
                shares += logits[:, list(wanted)].sigmoid().amax(-1).tolist()
                continue
            candidates = list(self.labels.values()) if among is None else list(among)
            places = [candidates.index(label) for label in wanted]
            # Rounding may make a sum of shares larger than 1.
            shares += logits[:, candidates].softmax(-1)[:, places].sum(-1).clamp(max=1).tolist()
        return shares
