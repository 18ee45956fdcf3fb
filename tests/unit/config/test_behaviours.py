"""Presets of behaviours: what each sets, who may override it, and that its prompts are fit for a job."""

from __future__ import annotations

from importlib import resources
from pathlib import Path

import pytest

from job.config.behaviours import BEHAVIOURS, behaviour_values
from job.config.describe import describe_settings
from job.config.load import load_settings
from job.data.prompts import load_prompts
from job.errors import UsageError
from job.export.reproduction import (
    PromptsRecord,
    check_reproduction,
    fixed_settings,
    prompts_digest,
    require_same_prompts,
)
from job.storage.identity import extends
from job.text.refusal_markers import RefusalMarkers
from tests.helpers import made_from

PRESETS = BEHAVIOURS[1:]
MODEL = {"model": "m"}


@pytest.fixture(autouse=True)
def _clean_environment(monkeypatch: pytest.MonkeyPatch) -> None:
    import os

    for name in list(os.environ):
        if name.startswith("ABLITERATE_"):
            monkeypatch.delenv(name)


def test_every_file_is_a_behaviour_and_refusal_is_the_defaults() -> None:
    files = {file.name for file in resources.files("job.config.behaviours").iterdir() if file.name.endswith(".toml")}
    assert files == {f"{name}.toml" for name in PRESETS}
    assert behaviour_values("refusal") == {}
    asked, default = (load_settings({**MODEL, **more}).settings for more in ({"behaviour": "refusal"}, {}))
    assert asked == default
    assert extends("behaviour")


@pytest.mark.parametrize("name", PRESETS)
def test_a_preset_gives_prompts_of_its_own_that_a_job_can_split(name: str) -> None:
    settings = load_settings({**MODEL, "behaviour": name}).settings
    said: list[str] = []
    prompts = load_prompts(settings, said.append)
    assert (len(prompts.good), len(prompts.bad)) == (160, 160)
    assert (len(prompts.good_choice), len(prompts.bad_choice)) == (40, 40)
    evaluated = (prompts.good_search, prompts.bad_search, prompts.good_report, prompts.bad_report)
    assert [len(part) for part in evaluated] == [40] * 4
    assert not prompts.reused
    assert not [line for line in said if "warning" in line], said  # no row is empty or repeated, no set overlaps
    everything = [prompt.user for prompt in prompts.everything]
    assert len({text.casefold() for text in everything}) == len(everything) == 560
    openings = [" ".join(text.split()[:3]) for text in everything]
    assert max(map(openings.count, openings)) <= len(openings) // 4, "templates with a word exchanged"
    # A response may repeat its prompt: what the prompt holds must not count as the behaviour.
    markers = RefusalMarkers(settings.scoring.refusal_markers)
    assert not [text for text in everything if markers.for_prompt(text).found(text)]


@pytest.mark.parametrize("source", ["command line", "environment", "file"])
def test_a_preset_is_chosen_and_overridden_from_every_source(
    source: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    options, config = dict(MODEL), tmp_path / "job.toml"
    config.write_text('[card]\nbehaviour = "my own"\n')
    if source == "file":
        config.write_text('behaviour = "flattery"\n[card]\nbehaviour = "my own"\n')
    elif source == "environment":
        monkeypatch.setenv("ABLITERATE_BEHAVIOUR", "flattery")
    else:
        options["behaviour"] = "flattery"
    loaded = load_settings(options, config=config, assignments=["bad_prompts=mine.txt"])
    assert loaded.settings.behaviour == "flattery"
    assert loaded.settings.card.behaviour == "my own"
    assert loaded.settings.bad_prompts.spec == "mine.txt"
    assert loaded.settings.good_prompts.spec.startswith("builtin:flattery#")
    assert loaded.sources["scoring.refusal_markers"] == "behaviour flattery"
    _, lines = describe_settings(options, config=config)
    assert any(line.startswith("good_prompts.spec = ") and line.endswith("# behaviour flattery") for line in lines)


def test_the_last_source_that_names_a_behaviour_decides(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("ABLITERATE_BEHAVIOUR", "flattery")
    assert load_settings({**MODEL, "behaviour": "prose"}).settings.card.behaviour == "purple prose"
    assert load_settings({**MODEL, "behaviour": "refusal"}).settings.card.behaviour == "refusal"


def test_unknown_behaviours_and_a_profile_with_prompts_of_its_own_are_refused() -> None:
    with pytest.raises(UsageError, match="behaviour = 'sarcasm'"):
        load_settings({**MODEL, "behaviour": "sarcasm"})
    with pytest.raises(UsageError, match="--profile heretic and the behaviour prose both set"):
        load_settings({**MODEL, "behaviour": "prose"}, profile="heretic")
    search = load_settings(MODEL, profile="heretic").settings.search
    assert (search.method, search.space) == ("tpe", "field")


@pytest.mark.parametrize(
    ("name", "shown", "other"),
    [
        ("disclaimers", "I'm sorry, but as a chatbot I don't have a favourite.", "My favourite is tea."),
        ("disclaimers", "Well, I am an AI.", "AI is a field of computing."),
        ("over-refusal", "I can't help with that.", "Run kill with its number."),
        ("flattery", "What a wonderful poem!", "It has four lines."),
        ("flattery", "Great! Bread is flour and water.", "Bread that is great needs time."),
        ("prose", "A tapestry of emerald leaves.", "There are oaks and elms."),
    ],
)
def test_markers_tell_the_behaviour_from_a_plain_answer(name: str, shown: str, other: str) -> None:
    markers = RefusalMarkers(load_settings({**MODEL, "behaviour": name}).settings.scoring.refusal_markers)
    assert markers.for_prompt("Say something.").is_refusal(shown)
    assert not markers.for_prompt("Say something.").is_refusal(other)


def test_a_reproduce_json_finds_the_built_in_prompts() -> None:
    settings = load_settings({**MODEL, "behaviour": "prose", "seed": made_from().settings["seed"]}).settings
    prompts = load_prompts(settings, lambda _: None)
    records = {}
    for name in settings.prompt_sets():
        kind, rows = name.partition("_")[0], (200, 280) if "eval" in name else (0, 200)
        taken = {"split": "train", "start": rows[0], "stop": rows[1], "column": kind, "prefix": "", "suffix": ""}
        texts = prompts.of_setting(name)
        source = {"builtin": "prose", "sha256": "0" * 64}
        records[name] = PromptsRecord(source=source, taken=taken, count=len(texts), sha256=prompts_digest(texts))
    made = made_from(prompts=records)
    check_reproduction(made)
    again = load_settings(MODEL, fixed=fixed_settings(made, "reproduce.json")).settings
    assert again.bad_prompts.spec == "builtin:prose"
    require_same_prompts(made, load_prompts(again, lambda _: None))
