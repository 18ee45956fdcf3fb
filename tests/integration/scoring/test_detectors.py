"""Detectors and the choice, on the organism with known correct responses: broken models never look compliant."""

from __future__ import annotations

import itertools
import json
import math
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import pytest
import torch
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import AutoModelForCausalLM, BertConfig, BertForSequenceClassification, PreTrainedTokenizerFast

from benchmarks.detectors import SOFT, Truth, even_edit, kind_of
from benchmarks.labelled import LABELS, detector_table, outcome_table, read_labelled
from job.config.load import default_values
from job.config.sections import LoadingSettings, ScoringSettings
from job.errors import ImpossibleJobError
from job.organism.world import TASKS, expected_answer
from job.records import DetectorReport, Trial, TrialScores
from job.scoring.detectors import Context, cohens_kappa
from job.scoring.likelihood import LEAST, OPENING
from job.scoring.nli import HYPOTHESIS, Entailment
from job.scoring.soft_refusals import is_evasion
from job.search.pareto import choose
from job.text.refusal_markers import RefusalMarkers
from tests.helpers import abliterate, events, job_arguments, loading, only_job

PROMPTS = 16
# Layer of the direction, and strength of its ablation: from edits that leave refusals to edits that leave nothing. The
# responses of the last one break late, so short ones look intact.
EDITS = (*((3.0, strength) for strength in (0.6, 0.8, 0.9, 1.0, 1.2, 2.4, 2.5, 2.7, 3.0, 6.0)), (2.0, 2.4))


@dataclass(frozen=True)
class Tried:
    """An edit with its scores in the search and recounted, and the true labels of its responses."""

    short: TrialScores
    full: TrialScores
    right: int
    wrong: int


@pytest.fixture(scope="module")
def truth(full_organism: Path) -> Iterator[Truth]:
    with Truth.opened(full_organism, PROMPTS) as truth:
        yield truth


@pytest.fixture(scope="module")
def tried(truth: Truth) -> list[Tried]:
    found = []
    edits = [even_edit(layer, strength) for layer, strength in EDITS]
    short, full = truth.scores(edits, again=False), truth.scores(edits, again=True)
    for edit, *scores in zip(edits, short, full, strict=True):
        kinds = [kind_of(exchange) for exchange in truth.exchanges(edit)[PROMPTS:]]
        found.append(Tried(*scores, kinds.count("correct"), kinds.count("broken")))
    return found


def chosen(trials: list[TrialScores]) -> int:
    return choose([Trial(number=n, params={}, values=one) for n, one in enumerate(trials)], PROMPTS, 0.02).number


@pytest.mark.slow
def test_the_edit_that_babbles_is_not_chosen(tried: list[Tried]) -> None:
    assert all(one.full.unanswered >= one.short.unanswered for one in tried)
    assert tried[chosen([one.full for one in tried])].right == PROMPTS
    correct = [one for one in tried if one.right > 4 * one.wrong]
    hopeless = [one for one in tried if one.right == 0]
    assert len(correct) >= 3
    assert len(hopeless) >= 2
    assert all(chosen([bad.full, good.full]) == 1 for good, bad in itertools.product(correct, hopeless))
    pairs = list(itertools.product(correct, [one for one in tried if one.wrong > 4 * one.right]))
    # By refusals they look better than edits that leave some; by short responses, some still do.
    unbroken = {"broken": 0}
    assert any(chosen([one.full.model_copy(update=unbroken) for one in (bad, good)]) == 0 for good, bad in pairs)
    assert any(chosen([bad.short, good.short]) == 0 for good, bad in pairs)


def test_likelihood_is_the_mean_log_probability_of_what_follows_the_opening(truth: Truth, full_organism: Path) -> None:
    model = AutoModelForCausalLM.from_pretrained(full_organism / "model", dtype=torch.float32)
    good = truth.metrics.batches.good.tokens
    prompts = [*good[:6], good[0]]
    answers = [answer.tokens for answer in truth.metrics.responses()[:6]]
    answers[3], answers[5] = [*answers[3], *answers[3]], answers[5][: OPENING + LEAST - 1]
    said = [*answers, answers[0]]  # equal response to the same prompt: computed once
    found = truth.incoherence.mean_log_probabilities(prompts, said)
    assert [math.isnan(one) for one in found] == [number == 5 for number in range(7)]
    assert found[0] == found[6]
    for prompt, answer, mean in zip(prompts[:5], said, found, strict=False):
        with torch.inference_mode():
            logits = model(torch.tensor([[*prompt, *answer]])).logits[0, len(prompt) - 1 : -1].log_softmax(-1)
        own = [float(row[token]) for row, token in zip(logits, answer, strict=True)]
        assert mean == pytest.approx(sum(own[OPENING:]) / len(own[OPENING:]), abs=1e-4)


def test_kappa_is_cohens() -> None:
    # Cohen (1960), the usual example: 20 both, 5 and 10 only one, 15 neither.
    assert cohens_kappa(20, 5, 10, 15) == pytest.approx(0.4)
    assert cohens_kappa(3, 0, 0, 7) == 1
    assert cohens_kappa(0, 5, 5, 0) == -1
    assert cohens_kappa(0, 0, 0, 9) is None
    assert cohens_kappa(0, 0, 0, 0) is None


def test_detectors_on_a_real_models_labelled_answers_are_as_the_lab_notes_say() -> None:
    answers = read_labelled()
    assert [sum(one.label == label for one in answers) for label in LABELS] == [51, 41, 78, 30]
    assert len({(one.exchange.prompt, one.exchange.answer) for one in answers}) == len(answers) == 200
    scoring, loading = (default_values()[name] for name in ("scoring", "loading"))
    context = Context(
        ScoringSettings.model_validate(scoring),
        RefusalMarkers(scoring["refusal_markers"]),
        LoadingSettings.model_validate(loading),
        print,
    )
    notes = (Path(__file__).parents[3] / "docs" / "lab-notes" / "scoring-and-evaluation.md").read_text()
    for line in (*detector_table(answers, context), *outcome_table(answers, context)):
        assert line in notes


def test_soft_refusals_are_told_from_answers(full_organism: Path) -> None:
    markers = RefusalMarkers(default_values()["scoring"]["refusal_markers"]).for_prompt("")
    # The last two refuse in words that no list has.
    assert [is_evasion("", text) for text in SOFT] == [True] * 8 + [False] * 2
    assert not any(markers.is_refusal(text) for text in SOFT)
    prompts = [
        line for name in ("good", "bad") for line in (full_organism / f"{name}_test.txt").read_text().splitlines()
    ]
    assert not any(is_evasion(prompt, expected_answer(prompt)) for prompt in prompts)


@pytest.mark.parametrize(
    ("prompt", "answer", "evades"),
    [
        ("Wake me up at half past seven.", " wake me up at half past seven", True),
        ("Wake me up at half past seven.", "Wake me up at half past seven? It is done.", False),
        ("Is it raining?", "It is raining.", False),
        ("...", "", False),
    ],
)
def test_a_response_that_repeats_its_prompt_evades(prompt: str, answer: str, evades: bool) -> None:
    assert is_evasion(prompt, answer) is evades


@pytest.mark.parametrize(
    "answer",
    [
        "",
        "Take two eggs, some flour and milk. It's important to stir well. Bake it for ten minutes, then serve.",
        "The kettle is in the kitchen. Is there anything else you would like to know?",
        "First unscrew the lid. Then pour out the water. If you are unsure, please consult a professional.",
        "Photosynthesis turns light, water and carbon dioxide into sugar and oxygen. What matters most is light.",
        "In short: no. The bridge was built in 1890, and something of it is left.",
    ],
)
def test_answers_with_a_word_of_advice_are_no_evasions(answer: str) -> None:
    assert not is_evasion("", answer)


def classifier(folder: Path, labels: tuple[str, ...]) -> Path:
    """Train a tiny pair classifier on the organism's sentences; its first label is refusal."""
    prompts = [f"Where is the {noun} kept?" for noun in ("lantern", "kettle")]
    things = ["The lantern is kept in the cellar.", "The copper kettle is made of iron.", "The cook looks after it."]
    texts = [*(task.refusal for task in TASKS), *things]
    splitter = pre_tokenizers.Sequence([pre_tokenizers.Whitespace()])
    words = sorted({word for text in (*texts, *prompts, HYPOTHESIS) for word, _ in splitter.pre_tokenize_str(text)})
    vocabulary = {word: number for number, word in enumerate(("[PAD]", "[UNK]", *words))}
    backend = Tokenizer(models.WordLevel(vocabulary, unk_token="[UNK]"))
    backend.pre_tokenizer = splitter
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=backend, pad_token="[PAD]", unk_token="[UNK]", model_max_length=64
    )
    torch.manual_seed(0)
    sizes = {"hidden_size": 32, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 32}
    config = BertConfig(
        vocab_size=len(vocabulary), max_position_embeddings=64, **sizes, id2label=dict(enumerate(labels))
    )
    model = BertForSequenceClassification(config)
    inputs = tokenizer(texts, [HYPOTHESIS] * len(texts), padding=True, return_tensors="pt")
    wanted = torch.tensor([0] * len(TASKS) + [len(labels) - 1] * len(things))
    optimizer = torch.optim.Adam(model.parameters(), lr=5e-3)
    for _ in range(40):
        loss = model(**inputs, labels=wanted).loss
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def nli_model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return classifier(tmp_path_factory.mktemp("nli"), ("entailment", "neutral", "contradiction"))


def test_refusals_are_told_by_inference(nli_model: Path, truth: Truth, tmp_path: Path) -> None:
    entailment = Entailment.loaded(str(nli_model), loading("auto"), print)
    exchanges = truth.exchanges(None)
    shares = entailment.shares([one.answer for one in exchanges])
    assert [share >= 0.5 for share in shares] == [False] * PROMPTS + [True] * PROMPTS
    blank, answer = entailment.shares(["  ", "The lantern is kept in the cellar."])
    assert (blank, answer < 0.5) == (1, True)
    other = classifier(tmp_path, ("good", "bad"))
    with pytest.raises(ImpossibleJobError, match="none is entailment"):
        Entailment.loaded(str(other), loading("auto"), print)


PLUGIN = """
def make(context):
    context.say("the plugin is at work")
    return lambda exchanges: ["refused" if "hexed" in one.prompt else "answered" for one in exchanges]

def crash(context):
    raise RuntimeError("the plugin is broken\\nin two lines")

def mislabel(context):
    return lambda exchanges: ["maybe"] * len(exchanges)
"""


@pytest.mark.slow
def test_detectors_of_other_packages_run_on_the_chosen_trial(
    organism: Path, nli_model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """With a distribution as pip installs one, the real command, and plugins with different failures."""
    site = tmp_path / "site"
    info = site / "polite_scorers-1.0.dist-info"
    info.mkdir(parents=True)
    (info / "METADATA").write_text("Metadata-Version: 2.1\nName: polite-scorers\nVersion: 1.0\n")
    names = {"hexed": "make", "crashing": "crash", "mislabelling": "mislabel"}
    entries = "".join(f"{name} = polite_scorers:{function}\n" for name, function in names.items())
    (info / "entry_points.txt").write_text(f"[abliteration_job.scorers]\n{entries}")
    (site / "polite_scorers.py").write_text(PLUGIN)
    arguments = [*job_arguments(organism), "--workspace", tmp_path / "runs", "--trials", 1]
    for kind in ("good", "bad"):  # few prompts: this is not about figures
        arguments += [f"--{kind}-eval-prompts", f"{organism / kind}_test.txt#train[:12]"]

    def choose_detectors(*detectors: str) -> list[object]:
        return ["run", *arguments, "--set", f"scoring.detectors={json.dumps(detectors)}"]

    abliterate(*choose_detectors("hexed")).fails(2, "no detector 'hexed'", "markers, soft, degenerate, nli, words")
    abliterate(*choose_detectors("nli")).fails(2, "nli needs a model", "scoring.nli_model")
    model = ["--set", f"scoring.nli_model={nli_model}"]
    everything = ("markers", "soft", "degenerate", "nli", *names)
    monkeypatch.syspath_prepend(site)
    done = abliterate(*choose_detectors(*everything), *model).check()
    del sys.modules["polite_scorers"]
    assert "the detector crashing could not be used: the plugin is broken" in done.err
    job = only_job(tmp_path / "runs")
    export = (job / "export").resolve().name
    report = DetectorReport.model_validate_json((job / "figures" / f"{export}-detectors.json").read_text())
    assert report.failed.keys() == {"crashing", "mislabelling"}
    assert "'maybe' is neither one of the labels" in report.failed["mislabelling"]
    counts = {(one.detector, one.model, one.prompts): one for one in report.counts}
    hexed = sum("hexed" in line for line in (organism / "bad_test.txt").read_text().splitlines())
    assert hexed
    assert counts["hexed", "base", "bad"].refused == counts["hexed", "edited", "bad"].refused
    for detector in ("markers", "soft", "nli"):
        assert (counts[detector, "base", "bad"].refused, counts[detector, "base", "bad"].answers) == (6, 6)
        assert (counts[detector, "base", "good"].refused, counts[detector, "base", "good"].answers) == (0, 6)
    figures = json.loads((job / "figures" / f"{export}.json").read_text())
    assert counts["markers", "edited", "bad"].refused == figures["refusals"]
    assert counts["degenerate", "edited", "bad"].broken == figures["degenerate"]
    agreement = {(one.model, one.first, one.second): one for one in report.agreement}
    assert len(agreement) == 2 * 10
    assert agreement["base", "markers", "nli"].kappa == 1
    text = (job / "report.md").read_text()
    assert "| markers | with | 6/6 (61.0–100.0 %), 6 refused |" in text
    assert "| markers, nli | base | 6 | 0 | 0 | 6 | 1.00 |" in text
    assert "- crashing could not be used: the plugin is broken" in text
    # The judge of the report does not define the job; reproduce.json names neither it nor paths.
    made = (job / "export" / "reproduce.json").read_text()
    assert "detectors" not in made
    assert str(nli_model) not in made
    abliterate(*choose_detectors("markers")).check()
    assert only_job(tmp_path / "runs") == job
    assert sum(event["event"] == "job_finished" for event in events(tmp_path / "runs")) == 1
