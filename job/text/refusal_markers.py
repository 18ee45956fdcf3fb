"""Refusals, told by phrases that they contain."""

from __future__ import annotations

import re
from collections.abc import Iterable

_MatchState = tuple[int, bool, bool]
_MOST_MOVES = 1 << 17
_APOSTROPHES = str.maketrans({"’": "'", "‘": "'", "ʼ": "'", "`": "'", "*": None})


def normalise(text: str) -> str:
    """Return text without regard to case, asterisks, kinds of apostrophes and amounts of white space."""
    return " ".join(text.translate(_APOSTROPHES).casefold().split())


class RefusalMarkers:
    """Tells refusals by phrases that they contain.

    Attributes:
        phrases: The phrases, normalised.
        transitions: An Aho-Corasick automaton over them: for each state, the next one for every character that
            does not lead back to state 0, where nothing has been matched.
        final: The states in which a phrase has just ended.
        moves: What pieces of text lead to, as far as it has been asked for; pieces are tokens, and come again.
    """

    def __init__(self, markers: Iterable[str]) -> None:
        self.phrases = tuple(normalise(marker) for marker in markers)
        self._pattern = re.compile("|".join(map(re.escape, self.phrases)))
        self.transitions, self.final = _automaton(self.phrases)
        self.moves: dict[tuple[_MatchState, str], _MatchState] = {}

    def after(self, reached: _MatchState, piece: str) -> _MatchState:
        """Return the state of a match after a further piece of text; one in which a phrase has ended is kept."""
        state, begun, space = reached
        for character in piece.translate(_APOSTROPHES).casefold():
            if state in self.final:
                break
            if character.isspace():
                # Any amount of it is one space, and none at the ends of the text.
                space = begun
                continue
            if space:
                state = self.transitions[state].get(" ", 0)
                space = False
            begun = True
            state = self.transitions[state].get(character, 0)
        return state, begun, space

    def found(self, text: str) -> bool:
        """Return whether a text contains a marker."""
        return self._pattern.search(normalise(text)) is not None

    def is_refusal(self, answer: str) -> bool:
        """Return whether a whole answer is a refusal: it contains a marker, or it is empty."""
        return not answer.strip() or self.found(answer)


def _automaton(phrases: Iterable[str]) -> tuple[list[dict[str, int]], frozenset[int]]:
    """Return the Aho-Corasick automaton of phrases (Aho and Corasick 1975), with its failure links worked in."""
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
    # Breadth first, a state's longest proper suffix that is a state too is complete before the state is come to.
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
    """Looks for markers in a text that comes in pieces; what it has seen is one state of their automaton."""

    def __init__(self, markers: RefusalMarkers) -> None:
        self._markers = markers
        # The automaton's state, whether anything but white space has come, and whether white space came after it.
        self._state: _MatchState = (0, False, False)

    def feed(self, piece: str) -> bool:
        """Take the next piece of the text and return whether a marker has been found so far, as if in the whole."""
        known = self._markers.moves
        move = (self._state, piece)
        reached = known.get(move)
        if reached is None:
            if len(known) >= _MOST_MOVES:
                known.clear()
            reached = known[move] = self._markers.after(self._state, piece)
        self._state = reached
        return reached[0] in self._markers.final
