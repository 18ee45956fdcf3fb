"""Incremental matching during decoding finds markers exactly where a search of the whole text would."""

from __future__ import annotations

from functools import cache

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizers import Tokenizer, decoders, models, normalizers, pre_tokenizers, trainers
from transformers import PreTrainedTokenizerBase, PreTrainedTokenizerFast

from job.config.load import default_values
from job.generation.stop_markers import MarkerWatch, backend
from job.organism.tokenizer import build_tokenizer
from job.text.refusal_markers import MarkerMatch, PhraseMatcher, RefusalMarkers

MARKERS = RefusalMarkers(
    [*default_values()["scoring"]["refusal_markers"], "抱歉", "größe", "i’m *so* sorry", "so  so", "é!"]
)
CORPUS = [
    "I'm sorry, but I can't help with that. I’m **so** sorry! As an AI, I cannot.",
    "抱歉，我不能。 Die Größe GRÖSSE Straße. é! e\u0301! can`t so\n so\tso unsafe harm ful",
    "The kettle is kept in the kitchen 🫖 near the violin; sorry",
] * 4
PIECES = st.sampled_from(
    [
        *(
            "i",
            "I",
            " can",
            "'",
            "’",
            "`",
            "t",
            " ",
            "  ",
            "\n",
            "*",
            "**",
            "sorry",
            "SO",
            "rr",
            "y",
            " so",
            "抱",
            "歉",
        ),
        *("ß", "SS", "ö", "e\u0301", "é", "!", " help", "harm", "ful", "un", "safe", "🫖", "\x85", "\u3000", "."),
    ]
)


def byte_level() -> Tokenizer:
    made = Tokenizer(models.BPE())
    made.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    made.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=330, initial_alphabet=pre_tokenizers.ByteLevel.alphabet(), special_tokens=["<end>"]
    )
    made.train_from_iterator(CORPUS, trainer)
    return made


def byte_fallback() -> Tokenizer:
    made = Tokenizer(models.BPE(byte_fallback=True, unk_token="<unk>"))
    made.normalizer = normalizers.Sequence([normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")])
    made.decoder = decoders.Sequence(
        [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)]
    )
    octets = [f"<0x{byte:02X}>" for byte in range(256)]
    trainer = trainers.BpeTrainer(
        vocab_size=420, special_tokens=["<unk>", "<end>"], initial_alphabet=list("abcimnorstuy▁")
    )
    made.train_from_iterator([line.replace(" ", "▁") for line in CORPUS[:1] * 4], trainer)
    # Octets are ordinary tokens, as in SentencePiece tokenizers.
    made.add_tokens(octets)
    return made


def metaspace() -> Tokenizer:
    made = Tokenizer(models.Unigram())
    made.pre_tokenizer = pre_tokenizers.Metaspace()
    made.decoder = decoders.Metaspace()
    made.train_from_iterator(
        CORPUS, trainers.UnigramTrainer(vocab_size=120, special_tokens=["<end>", "<unk>"], unk_token="<unk>")
    )
    return made


def word_piece() -> Tokenizer:
    made = Tokenizer(models.WordPiece(unk_token="<unk>"))
    made.pre_tokenizer = pre_tokenizers.Whitespace()
    made.decoder = decoders.WordPiece()
    made.train_from_iterator(CORPUS, trainers.WordPieceTrainer(vocab_size=160, special_tokens=["<unk>", "<end>"]))
    return made


@cache
def tokenizer(kind: str) -> PreTrainedTokenizerBase:
    if kind == "organism":
        return build_tokenizer()
    made = {"bytes": byte_level, "fallback": byte_fallback, "metaspace": metaspace, "words": word_piece}[kind]()
    return PreTrainedTokenizerFast(tokenizer_object=made, eos_token="<end>", clean_up_tokenization_spaces=False)


def found_at(watched: PreTrainedTokenizerBase, tokens: list[int], prompt: str = "") -> int | None:
    watch = MarkerWatch(watched, MARKERS).begin(prompt)
    return next((n for n in range(1, len(tokens) + 1) if watch.found(tokens[:n])), None)


def plainly(decoder: PreTrainedTokenizerBase, tokens: list[int], prompt: str = "") -> int | None:
    lengths, markers = range(1, len(tokens) + 1), MARKERS.for_prompt(prompt)
    return next((n for n in lengths if markers.found(decoder.decode(tokens[:n], skip_special_tokens=True))), None)


@pytest.mark.parametrize("kind", ["bytes", "fallback", "metaspace", "words", "organism"])
@settings(max_examples=150)
@given(data=st.data())
def test_a_marker_is_found_at_the_token_that_completes_it(kind: str, data: st.DataObject) -> None:
    used = tokenizer(kind)
    some = st.lists(st.integers(0, len(used) - 1), max_size=6)
    tokens: list[int] = []
    for text in data.draw(st.lists(st.lists(PIECES, max_size=8).map("".join), max_size=4)):
        # Texts as the tokenizer would cut them, and random tokens.
        tokens += used(text, add_special_tokens=False).input_ids + data.draw(some)
    # A prompt of such pieces may hold some of the markers.
    prompt = data.draw(st.lists(PIECES, max_size=6).map("".join))
    assert found_at(used, tokens, prompt) == plainly(used, tokens, prompt)


@settings(max_examples=400)
@given(
    phrases=st.lists(st.text("ab ß*’'", min_size=1, max_size=5), max_size=6),
    pieces=st.lists(st.text("abAB sSß*’`\n", max_size=4), max_size=10),
)
def test_pieces_match_as_their_whole(phrases: list[str], pieces: list[str]) -> None:
    markers = PhraseMatcher(phrases)
    match = MarkerMatch(markers)
    for number, piece in enumerate(pieces, 1):
        assert match.feed(piece) == markers.found("".join(pieces[:number]))


def test_texts_that_are_cleaned_as_a_whole_are_looked_at_as_a_whole() -> None:
    made = word_piece()
    cleaning = PreTrainedTokenizerFast(tokenizer_object=made, eos_token="<end>", clean_up_tokenization_spaces=True)
    assert backend(cleaning) is None
    tokens = cleaning("The kettle is so so near ; I 'm so sorry , the violin", add_special_tokens=False).input_ids
    expected = plainly(cleaning, tokens)
    assert expected is not None
    # Checked less often, so found a little later.
    found = found_at(cleaning, tokens)
    assert found is not None
    assert expected <= found < expected + 4
    assert (
        backend(PreTrainedTokenizerFast(tokenizer_object=byte_level(), clean_up_tokenization_spaces=True)) is not None
    )
