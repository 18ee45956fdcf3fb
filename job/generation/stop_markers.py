"""Detect markers during decoding, at constant cost per token."""

from __future__ import annotations

from collections.abc import Sequence

from tokenizers import Tokenizer
from tokenizers.decoders import DecodeStream
from transformers import PreTrainedTokenizerBase

from job.text.refusal_markers import MarkerMatch, PhraseMatcher, RefusalMarkers

# Tokens between checks of the whole response where text cannot be decoded incrementally.
_ASK_EVERY = 4


class MarkerWatch:
    """Watches responses for markers."""

    def __init__(self, tokenizer: PreTrainedTokenizerBase, markers: RefusalMarkers) -> None:
        self.markers = markers
        self.backend = backend(tokenizer)
        self.left_out = frozenset(tokenizer.all_special_ids)
        self._tokenizer = tokenizer

    def begin(self, prompt: str) -> AnswerWatch:
        """Return a watch for one response to a prompt."""
        return AnswerWatch(self, self.markers.for_prompt(prompt))

    def text(self, tokens: Sequence[int]) -> str:
        """Return the text of a response."""
        return str(self._tokenizer.decode(list(tokens), skip_special_tokens=True))


class AnswerWatch:
    """Detects a marker in one response, token by token, exactly as in its whole text."""

    def __init__(self, watch: MarkerWatch, markers: PhraseMatcher) -> None:
        self._watch, self._markers = watch, markers
        self._backend = watch.backend
        self._match = MarkerMatch(markers)
        self._stream = DecodeStream(skip_special_tokens=True)

    def found(self, tokens: Sequence[int]) -> bool:
        """Return whether the response contains a marker; `tokens` grows by one per call, until it does."""
        if self._backend is None:
            return len(tokens) % _ASK_EVERY == 0 and self.found_in(tokens)
        if tokens[-1] in self._watch.left_out:
            return False
        try:
            piece = self._stream.step(self._backend, tokens[-1])
        except Exception:  # the library has no error type for text that later tokens change
            self._backend = None
            return self.found_in(tokens)
        if piece is None:
            # Part of a character, before which a marker may just have ended.
            return self.found_in(tokens)
        # Confirm on the whole text, in case a piece was decoded differently.
        return self._match.feed(piece) and self.found_in(tokens)

    def found_in(self, tokens: Sequence[int]) -> bool:
        """Return whether a whole response contains a marker."""
        return self._markers.found(self._watch.text(tokens))


def backend(tokenizer: PreTrainedTokenizerBase) -> Tokenizer | None:
    """Return the tokenizer that decodes incrementally; None if pieces do not concatenate to the text."""
    found = getattr(tokenizer, "backend_tokenizer", None)
    if not isinstance(found, Tokenizer):
        return None
    # Whole text loses spaces before punctuation then; never for BPE, unless forced.
    forced = getattr(tokenizer, "clean_up_tokenization_spaces_for_bpe_even_though_it_will_corrupt_output", False)
    cleaned = tokenizer.clean_up_tokenization_spaces and (forced or type(found.model).__name__ != "BPE")
    return None if cleaned else found
