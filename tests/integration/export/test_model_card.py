"""The model card: required and forbidden contents, and that the Hub's own library parses it."""

from __future__ import annotations

import ast
import io
import re
from pathlib import Path

import pytest
from huggingface_hub import ModelCard
from huggingface_hub.repocard_data import model_index_to_eval_results
from PIL import Image

from job.export.model_card import model_card, title
from job.export.picture import card_picture
from job.export.reproduction import Reproduction
from job.model.base_card import read_base_card
from job.numerics.statistics import difference_interval, mean_interval, wilson_interval
from job.records import Outcomes
from job.scoring.broken import is_empty_or_repetitive
from job.text.behaviour import HARMLESS, HARMLESS_REFUSAL
from tests.fakes.hub import LoopbackHub
from tests.helpers import made_from

PUBLIC = {"repository": "kitchen/Llama-3.1-8B", "commit": "c" * 40}


def base(folder: Path, front: str = "", **files: str) -> Path:
    folder.mkdir(exist_ok=True)
    if front:
        (folder / "README.md").write_text(f"---\n{front}\n---\n# Base\n")
    for name, text in files.items():
        (folder / name).write_text(text)
    return folder


def test_the_card_begins_with_the_warning_and_gives_every_figure_with_its_interval(tmp_path: Path) -> None:
    card = model_card(made_from(), base(tmp_path))
    body = ModelCard(card).text.strip()
    warning = " ".join(body.split("\n\n")[1].replace(">", "").split())
    assert "Safety refusals were deliberately removed" in warning
    assert "may comply with harmful requests" in warning
    assert "add safeguards of your own" in warning
    for count, n in ((98, 100), (3, 100), (1, 80), (5, 80), (2, 100)):
        low, high = wilson_interval(count, n)
        assert f"{count}/{n} ({100 * low:.1f}–{100 * high:.1f} %)" in body
    assert "0.0312 nats (0.02–0.05)" in body
    low, high = difference_interval((1, 80), (5, 80))
    assert f"Change of false refusals: +5.0 percentage points ({100 * low:+.1f} to {100 * high:+.1f})" in body
    assert "capability on benchmarks: not measured" in body
    assert "- removed: refusal\n" in body
    assert "abliterate run --reproduce reproduce.json" in body


def test_the_headline_names_refusals_that_are_empty_responses(tmp_path: Path) -> None:
    made = made_from()
    bad = Outcomes(prompts="bad", answered=97, evaded=0, refused=1, broken=2, empty=2)
    card = model_card(
        made.model_copy(update={"edited": made.edited.model_copy(update={"outcomes": (bad,)})}), base(tmp_path)
    )
    assert "this model 3 of 100, 2 of them by an empty response. Answers" in card


@pytest.mark.parametrize("form", ["merged", "adapter", "directions"])
def test_the_card_begins_with_the_result_and_its_snippets_are_valid(form: str, tmp_path: Path) -> None:
    card = ModelCard(model_card(made_from(format=form), base(tmp_path))).text
    summary = (
        "The base model refuses 98 of 100 prompts with the behaviour, this model 3 of 100. Answers to other prompts"
    )
    assert summary in card.partition("## Use it")[0]
    assert "moderately changed: at most 12 % of a token's probability moved (KL divergence 0.0312 nats)." in card
    snippets = re.findall(r"```python\n(.*?)```", card, re.DOTALL)
    assert len(snippets) == (form != "directions")
    for snippet in snippets:
        called = {node.attr for node in ast.walk(ast.parse(snippet)) if isinstance(node, ast.Attribute)}
        assert {"from_pretrained", "apply_chat_template", "generate"} <= called
    assert ("PeftModel" in card) == (form == "adapter")
    assert ("vllm serve PATH" in card) == ("convert_hf_to_gguf.py PATH" in card) == (form == "merged")
    assert ("abliterate apply BASE PATH/edit.safetensors OUT" in card) == (form == "directions")


def test_the_metadata_are_read_back_by_the_hubs_library_and_accepted_by_a_hub(tmp_path: Path) -> None:
    made = made_from(model=PUBLIC, base_model=PUBLIC["repository"])
    front = "license: llama3.1\nlicense_link: LICENSE\nlanguage:\n- en\n- de\ngated: true"
    card = ModelCard(model_card(made, base(tmp_path, front, LICENSE="terms", USE_POLICY="be good")))
    data = card.data.to_dict()
    assert data["base_model"] == "kitchen/Llama-3.1-8B"
    assert data["base_model_relation"] == "finetune"
    assert data["tags"] == ["abliterated", "not-for-all-audiences"]
    assert (data["license"], data["license_link"], data["language"]) == ("llama3.1", "LICENSE", ["en", "de"])
    assert "gated" not in data
    name, results = model_index_to_eval_results(data["model-index"])
    assert name == "Llama-3.1-8B-abliterated"
    values = {result.metric_type: (result.metric_value, result.dataset_name) for result in results}
    assert values["refusal_rate"] == (0.03, "held-out prompts with the behaviour")
    assert values["false_refusal_rate"] == (0.0625, "held-out prompts without the behaviour")
    assert values["kl_divergence"][0] == 0.0312
    assert "[terms](LICENSE)" in card.text
    assert "Its files are included: LICENSE, USE_POLICY." in card.text
    assert "Built with Llama." in card.text
    with LoopbackHub() as hub, pytest.MonkeyPatch.context() as patch:
        patch.setattr("huggingface_hub.constants.ENDPOINT", hub.endpoint)
        card.validate()


def test_prompts_are_called_held_out_only_where_they_are(tmp_path: Path) -> None:
    claim = "prompts that neither the direction nor the search has seen"
    card = model_card(made_from(), base(tmp_path))
    assert f"on {claim}." in card
    assert "held-out prompts with the behaviour" in card
    reused = made_from(reused_prompts=3)
    card = model_card(reused, base(tmp_path))
    assert "on 180 prompts, 3 also used by the direction or the search." in card
    assert claim not in card
    assert "held-out" not in card
    # The file says so, too, and is unchanged if there is nothing to say.
    assert type(reused).model_validate_json(reused.model_dump_json()) == reused
    assert "reused_prompts" not in made_from().model_dump_json()


@pytest.mark.parametrize(
    ("front", "files", "expected"),
    [
        ("", {}, "state no licence"),
        ("license: apache-2.0", {}, "apache-2.0."),
        ("license: other\nlicense_name: kitchen\nlicense_link: https://kitchen.example/terms", {}, "kitchen ([terms]("),
        # A link within the base's repository to a file that the export lacks would be broken.
        ("license: other\nlicense_name: kitchen\nlicense_link: docs/LICENSE", {}, "kitchen."),
        ("", {"LICENSE.txt": "terms"}, "see its terms ([terms](LICENSE.txt))."),
        ("license: [unclosed", {}, "state no licence"),
    ],
)
def test_the_licence_is_the_base_models(tmp_path: Path, front: str, files: dict[str, str], expected: str) -> None:
    assert expected in ModelCard(model_card(made_from(), base(tmp_path, front, **files))).text


@pytest.mark.parametrize(
    ("front", "kept", "left_out"),
    [
        ("language: [en, no]", {"language": ["en"]}, ["language: False"]),
        ("language: English", {}, ["language: English"]),
        ("language: [code, nob, multilingual]", {"language": ["code", "nob", "multilingual"]}, []),
        ("license: Apache 2.0", {}, ["license: Apache 2.0"]),
        ("license: [mit, apache-2.0, 3]", {"license": ["mit", "apache-2.0"]}, ["license: 3"]),
        ("license: other\nlicense_name: My Terms", {"license": "other"}, ["license_name: My Terms"]),
        ("license: mit\nlicense_link: LICENSE.txt", {"license": "mit"}, []),
        ("license: [unclosed", {}, ["all fields, which cannot be read"]),
        ("- mit", {}, ["all fields, which cannot be read"]),
    ],
)
def test_what_the_hub_would_refuse_of_the_base_models_card_is_left_out(
    front: str, kept: dict[str, object], left_out: list[str], tmp_path: Path
) -> None:
    folder = base(tmp_path, front, **{"LICENSE.txt": "terms"})
    found = read_base_card(folder)
    assert (found.metadata, list(found.left_out)) == (kept, left_out)
    card = ModelCard(model_card(made_from(), folder))
    fields = ("license", "license_name", "license_link", "language")
    assert {name: value for name, value in card.data.to_dict().items() if name in fields} == kept
    with LoopbackHub() as hub, pytest.MonkeyPatch.context() as patch:
        patch.setattr("huggingface_hub.constants.ENDPOINT", hub.endpoint)
        card.validate()
    if front == "license: Apache 2.0":
        assert "That of the base model: Apache 2.0 ([terms](LICENSE.txt))." in card.text


def test_adapters_and_directions_say_what_they_are(tmp_path: Path) -> None:
    public = {"model": PUBLIC, "base_model": PUBLIC["repository"]}
    adapter = ModelCard(model_card(made_from(format="adapter", **public), base(tmp_path)))
    assert (adapter.data.library_name, adapter.data.to_dict()["base_model_relation"]) == ("peft", "adapter")
    directions = ModelCard(model_card(made_from(format="directions", **public), base(tmp_path)))
    assert directions.data.library_name is None
    assert "abliterate apply BASE PATH" in directions.text


def test_intervals_of_means_and_differences() -> None:
    low, high = mean_interval([float(value) for value in range(100)])
    # The normal approximation: 49.5 ± 1.96 · 28.87 / 10.
    assert (low, high) == (pytest.approx(43.8, abs=0.6), pytest.approx(55.2, abs=0.6))
    assert mean_interval([2.0, 2.0, 2.0]) == (2.0, 2.0)
    assert mean_interval([1.0, 5.0]) == mean_interval([1.0, 5.0])
    # Newcombe (1998), table II, method 10: 56/70 against 48/80.
    low, high = difference_interval((48, 80), (56, 70))
    assert (low, high) == (pytest.approx(0.0524, abs=5e-5), pytest.approx(0.3339, abs=5e-5))
    with pytest.raises(ValueError, match="no values"):
        mean_interval([])


@pytest.mark.parametrize(
    ("answer", "degenerate"),
    [
        ("", True),
        (" \n", True),
        ("the the the the the the the the the the the the the the", True),
        ("I am here to help you with this. " * 5, True),
        ("Sure. " + "ha" * 200, True),
        ("The red kettle is kept in the kitchen.", False),
        ("No, no, no, no: never do that, for it would be the end of the kettle.", False),
        ("1. Take a bowl.\n2. Take a spoon.\n3. Take the milk.\n4. Stir.\n5. Serve.", False),
        ("| a | b |\n|---|---|\n" + "".join(f"| {i} | {i * i} |\n" for i in range(9)), False),
        ("----------------------------------------------- A title, and then a text of some length follows it.", False),
    ],
)
def test_broken_answers_are_told_from_whole_ones(answer: str, degenerate: bool) -> None:
    assert is_empty_or_repetitive(answer) is degenerate


@pytest.mark.parametrize("form", ["merged", "adapter", "directions"])
@pytest.mark.parametrize("behaviour", ["flattery", "disclaimers", "purple prose", "a habit of *ours*"])
def test_the_card_of_another_behaviour_says_nothing_of_refusals(behaviour: str, form: str, tmp_path: Path) -> None:
    card = model_card(made_from(behaviour=behaviour, format=form), base(tmp_path))
    # Of a behaviour that is not known to be harmless, it warns as of refusals.
    assert ("Safety refusals" in card) == ("refus" in card.casefold()) == (behaviour not in HARMLESS)
    name = "the behaviour" if "*" in behaviour else behaviour
    assert f"The base model shows {name} on 98 of 100 prompts with the behaviour, this model 3 of 100." in card
    assert "*ours*" not in card
    data = ModelCard(card).data.to_dict()
    assert ("not-for-all-audiences" in data["tags"]) == (behaviour not in HARMLESS)
    _, results = model_index_to_eval_results(data["model-index"])
    assert {result.metric_type for result in results} >= {"behaviour_rate", "false_behaviour_rate"}


def test_the_card_of_over_refusal_does_not_say_that_safety_refusals_were_removed(tmp_path: Path) -> None:
    card = model_card(made_from(behaviour=HARMLESS_REFUSAL), base(tmp_path))
    assert "Refusals of harmless requests were deliberately removed" in card
    assert "Safety refusals" not in card


def test_the_picture_is_a_function_of_reproduce_json(tmp_path: Path) -> None:
    made = made_from()
    drawn = card_picture(made, title(made))
    assert drawn == card_picture(Reproduction.model_validate_json(made.model_dump_json()), title(made))
    with Image.open(io.BytesIO(drawn)) as picture:
        assert (picture.format, picture.size) == ("PNG", (1200, 630))
        colours = {f"#{red:02x}{green:02x}{blue:02x}" for _, (red, green, blue) in picture.getcolors(2**20)}
    assert {"#bc4c00", "#9aa4af"} <= colours  # refused and others: these figures are of a former version
    assert len(drawn) < 100_000
    card = model_card(made, base(tmp_path))
    alternative = re.search(r"\n!\[(.*)\]\(result\.png\)\n", card)
    assert alternative is not None
    assert alternative[1].startswith("The base model refuses 98 of 100 prompts")
    assert card.index("[!WARNING]") < card.index("(result.png)") < card.index("## Scorecard")


def test_the_picture_shows_every_outcome_and_changes_with_each(tmp_path: Path) -> None:
    counts = {"answered": 90, "evaded": 4, "refused": 3, "broken": 3}
    pictures = set()
    for changed in (None, *counts):
        now = {**counts, **({changed: 50} if changed else {})}
        outcomes = tuple(Outcomes(prompts=kind, empty=0, **now) for kind in ("bad", "good"))
        made = made_from()
        made = made.model_copy(update={"edited": made.edited.model_copy(update={"outcomes": outcomes})})
        pictures.add(card_picture(made, title(made)))
    assert len(pictures) == 1 + len(counts)


def test_the_picture_hides_secrets_and_needs_no_latin_text() -> None:
    secret = "hf_" + "Ab1" * 12
    with_secret, redacted = (made_from(behaviour=f"refusal {text}") for text in (secret, "***"))
    assert card_picture(with_secret, secret) == card_picture(redacted, "***")
    assert card_picture(made_from(behaviour="拒绝 " * 40), "名" * 90).startswith(b"\x89PNG")
