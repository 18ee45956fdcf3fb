"""Detect refusals, or another behaviour, by phrases."""

from __future__ import annotations

import re
from collections.abc import Iterable
from copy import copy
from typing import Self

_MatchState = tuple[int, bool, bool]
_MOST_MOVES = 1 << 17
# A marker with one of these speaks of the speaker: in a prompt, of somebody else than in its response.
_FIRST_PERSON = frozenset({"i", "me", "my", "we", "us", "our"})
# Stands before every text, so that a phrase may ask for its beginning.
_START = "\x02"
_APOSTROPHES = str.maketrans({"’": "'", "‘": "'", "ʼ": "'", "`": "'", "*": None})


def normalise(text: str) -> str:
    """Normalise case, asterisks, apostrophes and white space."""
    return " ".join(text.translate(_APOSTROPHES).casefold().split())


def _phrase(marker: str) -> str:
    """Normalise a marker, or a phrase that has been one."""
    text = normalise(marker)
    return _START + text[1:].lstrip() if text.startswith("^") else text


class RefusalMarkers:
    """Phrases that make a response a refusal, or show another behaviour; which ones count depends on its prompt.

    One that begins with ^ counts at the beginning of a response only.

    Attributes:
        evasions: Whether the search counts evasive responses as refusals too.
    """

    def __init__(self, markers: Iterable[str], *, topic_words: bool = True, evasions: bool = False) -> None:
        """Take the phrases.

        With `topic_words`, a phrase that the prompt holds is a word of its topic and does not count, unless it is in
        the first person: "illegal" says nothing in a response about illegal parking, "I can't" still does.
        """
        self.evasions = evasions
        self._every = PhraseMatcher(markers)
        topics = [] if not topic_words else [one for one in self._every.phrases if not _FIRST_PERSON & _words(one)]
        self._topics = frozenset(topics)
        self._matchers = {frozenset[str](): self._every}

    @property
    def alone(self) -> Self:
        """The same phrases, without evasions."""
        alone = copy(self)
        alone.evasions = False
        return alone

    def for_prompt(self, prompt: str) -> PhraseMatcher:
        """Return what detects a refusal in a response to a prompt."""
        text = normalise(prompt)
        held = frozenset(phrase for phrase in self._topics if phrase in text)
        if held not in self._matchers:
            self._matchers[held] = PhraseMatcher(one for one in self._every.phrases if one not in held)
        return self._matchers[held]


def _words(phrase: str) -> set[str]:
    return {word.partition("'")[0] for word in phrase.split()}


class PhraseMatcher:
    """Detects phrases in texts.

    Attributes:
        transitions: Aho-Corasick automaton: per state, transitions that do not lead to the root, state 0.
        final: States in which a phrase has just ended.
        begin: Match state of an empty text.
        moves: Cached transitions over whole pieces of text, which are tokens and recur.
    """

    def __init__(self, phrases: Iterable[str]) -> None:
        self.phrases = tuple(map(_phrase, phrases))
        # Without phrases, one that matches nothing.
        self._pattern = re.compile("|".join(map(re.escape, self.phrases)) if self.phrases else r"(?!)")
        self.transitions, self.final = _automaton(self.phrases)
        self.begin: _MatchState = (self.transitions[0].get(_START, 0), False, False)
        self.moves: dict[tuple[_MatchState, str], _MatchState] = {}

    def after(self, reached: _MatchState, piece: str) -> _MatchState:
        """Return the match state after another piece of text; a final state is kept."""
        state, begun, space = reached
        for character in piece.translate(_APOSTROPHES).casefold():
            if state in self.final:
                break
            if character.isspace():
                # White space counts as one space, and as none at the ends of the text.
                space = begun
                continue
            if space:
                state = self.transitions[state].get(" ", 0)
                space = False
            begun = True
            state = self.transitions[state].get(character, 0)
        return state, begun, space

    def found(self, text: str) -> bool:
        """Return whether a text contains a phrase."""
        return self._pattern.search(_START + normalise(text)) is not None

    def is_refusal(self, answer: str) -> bool:
        """Return whether a whole response is a refusal: with a phrase, or empty."""
        return not answer.strip() or self.found(answer)


def _automaton(phrases: Iterable[str]) -> tuple[list[dict[str, int]], frozenset[int]]:
    """Return the automaton of phrases with resolved failure links (Aho and Corasick 1975)."""
    tree: list[dict[str, int]] = [{}]
    final = set()
    for phrase in phrases:
        state = 0
        for character in phrase:
            if character not in tree[state]:
                tree.append({})
                tree[state][character] = len(tree) - 1
            state = tree[state][character]
        final.add(state)
    # Breadth first: the longest proper suffix of a state is complete before the state.
    suffix = [0] * len(tree)
    queue = list(tree[0].values())
    for state in queue:
        below = tree[suffix[state]]
        for character, child in tree[state].items():
            suffix[child] = below.get(character, 0)
            queue.append(child)
        if suffix[state] in final:
            final.add(state)
        tree[state] = {**below, **tree[state]}
    return tree, frozenset(final)


class MarkerMatch:
    """Detects phrases in a text that arrives in pieces, by one automaton state."""

    def __init__(self, markers: PhraseMatcher) -> None:
        self._markers = markers
        # Automaton state, whether text other than white space has arrived, and whether white space followed.
        self._state = markers.begin

    def feed(self, piece: str) -> bool:
        """Add a piece of text; return whether the text so far contains a phrase."""
        known = self._markers.moves
        move = (self._state, piece)
        reached = known.get(move)
        if reached is None:
            if len(known) >= _MOST_MOVES:
                known.clear()
            reached = known[move] = self._markers.after(self._state, piece)
        self._state = reached
        return reached[0] in self._markers.final
