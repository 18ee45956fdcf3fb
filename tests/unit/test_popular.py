"""The page of popular models is what the planner says today."""

from __future__ import annotations

import re
from fractions import Fraction
from pathlib import Path

from tests import popular

PAGE = Path(__file__).parents[2] / "docs/models.md"


def test_the_page_is_current() -> None:
    """`python -m tests.popular --write docs/models.md` makes it so, and inspects the first model of each family."""
    stated = re.findall(r"\| `(\w+)` \| (\d+) in (\d+) layers", PAGE.read_text())
    writers = {family: Fraction(int(count), int(layers)) for family, count, layers in stated}
    assert popular.page(writers.__getitem__) == PAGE.read_text()


def test_every_model_has_a_source() -> None:
    sources, models = popular.sizes()
    assert {model["source"] for model in models} == set(sources)
    assert all(address.startswith("https://") for address in sources.values())


def test_sizes_are_those_that_the_models_are_named_for() -> None:
    """A slip in a source's numbers would show as another number of weights."""
    for model in popular.sizes()[1]:
        named = float(re.findall(r"(\d+(?:\.\d+)?)[Bb]\b", model["name"])[0])
        assert abs(popular.facts_of(model["config"]).parameters / 1e9 / named - 1) < 0.06, model["name"]
