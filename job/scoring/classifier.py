"""Sequence classification of responses by a local model, in batches of one fixed size."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Self

import torch
from transformers import (
    AutoConfig,
    AutoModelForSequenceClassification,
    AutoTokenizer,
    PreTrainedConfig,
    PreTrainedModel,
    PreTrainedTokenizerBase,
)

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
        self.labels = _labels_of(model.config)
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
        _read_config(name, folder, setting)
        with _explained(name, setting):
            tokenizer = AutoTokenizer.from_pretrained(folder, local_files_only=True)
            model, info = AutoModelForSequenceClassification.from_pretrained(
                folder, local_files_only=True, use_safetensors=True, dtype="auto", output_loading_info=True
            )
            if missing := sorted(info["missing_keys"]):
                raise ValueError(f"its files lack {missing[0]}, which would be random")
        return cls(name, model.eval().to(resolve_device(settings.device)), tokenizer)

    def numbers(self, labels: Sequence[str]) -> list[int]:
        """Return the numbers of labels that count; by default the only label, or the second of two.

        Raises ImpossibleJobError.
        """
        return counted_labels(self.name, self.labels, labels)

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


def labels_before_download(name: str, setting: str, say: Callable[[str], None], cache: Path | None) -> dict[str, int]:
    """Return a classifier's labels with their numbers from its descriptive files; JobError if it is none."""
    source = parse_model(name)
    folder = fetch_model(source, list_model(source, None, say), say, weights=False, cache=cache)
    return _labels_of(_read_config(name, folder, setting))


def counted_labels(name: str, labels: Mapping[str, int], asked: Sequence[str]) -> list[int]:
    """Return the numbers of the labels that count; by default the only label, or the second of two.

    Raises ImpossibleJobError.
    """
    if not asked and len(labels) <= 2:
        return [len(labels) - 1]
    unknown = [label.casefold() for label in asked if label.casefold() not in labels]
    if unknown or not asked:
        wrong = f"none is {unknown[0]}" if unknown else "none is chosen"
        raise ImpossibleJobError(
            f"the labels of {name} are {', '.join(labels)}, and {wrong}",
            remedy="set scoring.classifier_labels to those that count",
        )
    return [labels[label.casefold()] for label in asked]


def _labels_of(config: PreTrainedConfig) -> dict[str, int]:
    """Return the number of each label, in lower case."""
    return {str(label).casefold(): int(number) for number, label in config.id2label.items()}


def _read_config(name: str, folder: Path, setting: str) -> PreTrainedConfig:
    with _explained(name, setting):
        config: PreTrainedConfig = AutoConfig.from_pretrained(folder, local_files_only=True)
        classes = config.architectures or []
        if classes and not any("SequenceClassification" in one for one in classes):
            raise ValueError(f"config.json names {', '.join(classes)}")
    return config


@contextmanager
def _explained(name: str, setting: str) -> Iterator[None]:
    """Raise ImpossibleJobError for what transformers raises while it reads a model that is no classifier."""
    try:
        yield
    except (OSError, ValueError, KeyError) as error:
        raise ImpossibleJobError(
            f"{name} cannot be loaded as a classifier: {first_line(error)}",
            remedy=f"choose a model for sequence classification as {setting}",
        ) from error
