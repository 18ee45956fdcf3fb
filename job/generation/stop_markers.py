"""Markers found in answers while they are decoded, token by token, at a cost that does not grow with the answer."""

from __future__ import annotations

from collections.abc import Sequence

from tokenizers import Tokenizer
from tokenizers.decoders import DecodeStream
from transformers import PreTrainedTokenizerBase

from job.text.refusal_markers import MarkerMatch, RefusalMarkers

# How often a whole answer is looked at where its text cannot be had piece by piece.
_ASK_EVERY = 4


class MarkerWatch:
    """Watches answers for markers."""

    def __init__(self, tokenizer: PreTrainedTokenizerBase, markers: RefusalMarkers) -> None:
        """Prepare what all answers share.

        Args:
            tokenizer: What answers are decoded by.
            markers: What is looked for.
        """
        self.markers = markers
        self.backend = backend(tokenizer)
        self.left_out = frozenset(tokenizer.all_special_ids)
        self._tokenizer = tokenizer

    def begin(self) -> AnswerWatch:
        """Return what watches one answer."""
        return AnswerWatch(self)

    def found_in(self, tokens: Sequence[int]) -> bool:
        """Return whether an answer contains a marker, from all of its text."""
        return self.markers.found(str(self._tokenizer.decode(list(tokens), skip_special_tokens=True)))


class AnswerWatch:
    """Tells whether an answer contains a marker, at every token what the whole text so far would tell."""

    def __init__(self, watch: MarkerWatch) -> None:
        self._watch = watch
        self._backend = watch.backend
        self._match = MarkerMatch(watch.markers)
        self._stream = DecodeStream(skip_special_tokens=True)

    def found(self, tokens: Sequence[int]) -> bool:
        """Return whether the answer contains a marker; not asked again once it does.

        Args:
            tokens: The answer so far, one token longer than when it was asked for before.
        """
        if self._backend is None:
            return len(tokens) % _ASK_EVERY == 0 and self._watch.found_in(tokens)
        if tokens[-1] in self._watch.left_out:
            return False
        try:
            piece = self._stream.step(self._backend, tokens[-1])
        except Exception:  # the library has no type of its own for a text that later tokens change
            self._backend = None
            return self._watch.found_in(tokens)
        if piece is None:
            # Part of a character, before which a marker may just have ended.
            return self._watch.found_in(tokens)
        # What is found is looked at again as a whole, so that no answer is judged by a piece that was misread.
        return self._match.feed(piece) and self._watch.found_in(tokens)


def backend(tokenizer: PreTrainedTokenizerBase) -> Tokenizer | None:
    """Return the tokenizer that decodes piece by piece; None where the text is made of more than the pieces."""
    found = getattr(tokenizer, "backend_tokenizer", None)
    if not isinstance(found, Tokenizer):
        return None
    # Spaces before punctuation are then removed from the whole text; never for BPE, unless forced.
    forced = getattr(tokenizer, "clean_up_tokenization_spaces_for_bpe_even_though_it_will_corrupt_output", False)
    cleaned = tokenizer.clean_up_tokenization_spaces and (forced or type(found.model).__name__ != "BPE")
    return None if cleaned else found
