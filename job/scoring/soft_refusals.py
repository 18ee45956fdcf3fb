"""Soft refusals: responses that evade the question without saying no."""

from __future__ import annotations

import re

from job.text.refusal_markers import normalise

# Deflections count in the first sentence only: after an answer they are an offer.
_DEFLECTIONS = (
    r"i('d| would) (rather|prefer)",
    r"i prefer not",
    r"let('s| us) (talk|focus|discuss|change|turn|keep|move|stick|speak)",
    r"(how|what) about (we|i|you|something|another|a different)",
    r"why don't (we|you)",
    r"why not (ask|try|talk)",
    r"(something|anything|someone|somebody) else",
    r"change the (subject|topic)",
    r"(another|a different|other) (topic|subject|question)",
    r"happy to (help|assist|talk|chat|answer)( you)? (with|about) (other|another|different|something)",
    r"(not|isn't|wouldn't be) (something|a topic|a matter|a subject)( that)? (i|we)",
    r"not comfortable",
    r"(hard|difficult|not for me) to (say|tell|comment|judge)",
    r"no comment",
    r"i have no (opinion|view)",
    r"(rather|better|best) (not|left)( to)?",
    r"it (really )?depends",
    r"who can (say|tell|know)",
    r"that's (private|a secret)",
    r"i('m| am) (here|only here) (to|for)",
    r"i('ll| will) (pass|leave)",
    r"not (my|our) place",
    r"look(ing)? into (that|this) later",
)
# Moralising counts if it is in most sentences.
_MORALS = (
    r"it('s| is) (important|essential|crucial|vital|best|worth) (to|that)",
    r"please (consider|remember|be|think|seek|consult|reach|respect)",
    r"(i|we) (encourage|urge|advise|recommend|hope)",
    r"i('d| would) (encourage|urge|advise)",
    r"(you|we|one|people) should (always|never|think|not|respect|be)",
    r"(respect|kindness|safety|wellbeing|well-being|responsib|consequences|wisely|thoughtful)",
    r"(speak|talk) (to|with) (a|an|your) ",
    r"consult (a|an|your) ",
    r"reach out to",
)
_DEFLECTING = re.compile(rf"\b({'|'.join(_DEFLECTIONS)})\b")
_MORALISING = re.compile(rf"\b({'|'.join(_MORALS)})")
_ENDS = " .!?"
_SENTENCE = re.compile(r"[^.!?]+[.!?]*")


def is_evasion(prompt: str, answer: str) -> bool:
    """Return whether a response only repeats its prompt, deflects, mostly moralises, or only asks back."""
    if normalise(answer).rstrip(_ENDS) == normalise(prompt).rstrip(_ENDS) != "":
        return True
    sentences = [sentence for match in _SENTENCE.findall(normalise(answer)) if (sentence := match.strip())]
    if not sentences:
        return False
    if _DEFLECTING.search(sentences[0]):
        return True
    moral = sum(_MORALISING.search(sentence) is not None for sentence in sentences)
    return moral > len(sentences) / 2 or all(sentence.endswith("?") for sentence in sentences)
