"""An edited model against its base model: equal by hooks, by files and in plain transformers."""

from __future__ import annotations

import importlib.util
import json
import math
import random
import shutil
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from job.evaluate.result import Share, TextComparison, comparison_text
from job.model.loading import load_model
from job.numerics.statistics import mean_interval, ratio_interval
from job.organism.world import expected_answer
from job.records import FORCED_TOKENS
from job.scoring.lm_eval import QUICK_TASKS
from job.scoring.perplexity import Passage, cross_entropies, passages_of
from tests.helpers import abliterate, loading, only_job


def plain_cross_entropy(model: Any, tokens: list[int], first: int) -> float:
    """Return plain transformers' cross-entropy of one text, without padding."""
    with torch.no_grad():
        logits = model(torch.tensor([tokens])).logits[0].double().log_softmax(-1)
    return -sum(float(logits[at - 1, tokens[at]]) for at in range(first, len(tokens)))


def test_cross_entropy_is_the_models_own_whatever_shares_a_forward(random_model_folder: Path) -> None:
    loaded = load_model(random_model_folder, loading("float32"), lambda _: None)
    source = random.Random(0)
    passages = [
        Passage([source.randrange(5, 60) for _ in range(length)], first)
        for length, first in ((2, 1), (9, 1), (40, 7), (90, 89), (90, 1), (3, 3))
    ]
    expected = [plain_cross_entropy(loaded.model, passage.tokens, passage.first) for passage in passages]
    for rows in (1, 4, 32):
        found = cross_entropies(loaded, passages, rows, lambda _: None)
        assert found == pytest.approx(expected, abs=1e-3)
    assert [passage.count for passage in passages] == [1, 8, 33, 1, 89, 0]
    cut = passages_of(loaded, ["Where is the red kettle kept?", "the"], most=4)
    assert [len(passage.tokens) for passage in cut] == [4, 1]


def test_intervals_of_ratios_and_what_cannot_be_paired() -> None:
    assert ratio_interval([2.0, 4.0, 6.0], [1, 2, 3]) == (2.0, 2.0)
    source = random.Random(1)
    parts, wholes = [source.gauss(2, 1) for _ in range(200)], [1.0] * 200
    low, high = ratio_interval(parts, wholes)
    mean = math.fsum(parts) / 200
    assert high - mean == pytest.approx(1.96 / math.sqrt(200), rel=0.25)
    assert mean - low == pytest.approx(1.96 / math.sqrt(200), rel=0.25)
    with pytest.raises(ValueError, match="no interval"):
        ratio_interval([1.0], [])
    found = TextComparison.of("some", ([2.0, 2.0], [1, 1]), ([3.0, 3.0], [2, 2]))
    assert (found.change, found.change_interval) == (None, None)
    assert found.edited.cross_entropy == 1.5
    assert found.base.perplexity == pytest.approx(math.exp(2))


def few(organism: Path, tmp_path: Path) -> list[str]:
    """Return options with a few of the organism's prompts and a plain text."""
    for kind in ("good", "bad"):
        lines = (organism / f"{kind}_test.txt").read_text().splitlines()[:16]
        (tmp_path / f"{kind}.txt").write_text("\n".join(lines))
    text = [expected_answer(line) for line in (organism / "good_train.txt").read_text().splitlines()[:12]]
    (tmp_path / "text.txt").write_text("\n".join(text))
    prompts = ["--good-prompts", str(tmp_path / "good.txt"), "--bad-prompts", str(tmp_path / "bad.txt")]
    return [*prompts, "--text", str(tmp_path / "text.txt")]


@pytest.mark.slow
def test_a_trial_and_its_export_come_to_the_same(organism: Path, finished: Path, tmp_path: Path) -> None:
    workspace = tmp_path / "runs"
    shutil.copytree(finished, workspace, symlinks=True)
    options, job = few(organism, tmp_path), only_job(workspace)
    hooked = json.loads(abliterate("evaluate", "--workspace", workspace, *options, "--json").check().out)
    assert json.loads((job / f"evaluation-{hooked['trial']:04d}.json").read_text()) == hooked
    out = tmp_path / "found.json"
    models = (job / "export", "--against", organism / "model")
    shown = abliterate("evaluate", *models, *options, "--out", out, "--set", "kl_tokens=3").check().out
    exported = json.loads(out.read_text())
    assert exported["trial"] is None
    assert exported["shares"] == hooked["shares"]
    first, three = exported["divergences"]
    assert (first["tokens"], three["tokens"]) == (1, 3)
    assert first["mean"] == pytest.approx(hooked["divergences"][0]["mean"], rel=1e-3, abs=1e-6)
    assert three["mean"] != first["mean"]
    for one in ("base", "edited"):
        ours = exported["text"][one]["cross_entropy"]
        assert ours == pytest.approx(hooked["text"][one]["cross_entropy"], abs=1e-4)
        folder = organism / "model" if one == "base" else job / "export"
        model, tokenizer = AutoModelForCausalLM.from_pretrained(folder), AutoTokenizer.from_pretrained(folder)
        texts = [tokenizer(line).input_ids for line in (tmp_path / "text.txt").read_text().splitlines()]
        plain = sum(plain_cross_entropy(model, tokens, 1) for tokens in texts) / sum(len(t) - 1 for t in texts)
        assert ours == pytest.approx(plain, abs=1e-4)
    refusals = Share.model_validate(exported["shares"][0])
    assert (refusals.base, refusals.of) == (16, 16)
    assert f"{refusals.edited}/16" in shown
    assert shown.startswith(" ")
    assert "with the behaviour: answered" in shown
    assert exported["edited"]["outcomes"] == hooked["edited"]["outcomes"]
    assert exported["edited"]["kl_more"]["tokens"] == 1
    assert hooked["edited"]["kl_more"]["tokens"] == FORCED_TOKENS
    assert {one["detector"] for one in exported["detectors"]["counts"]} == {"markers", "soft", "degenerate"}
    low, high = exported["text"]["change_interval"]
    assert low <= exported["text"]["change"] <= high


@pytest.mark.slow
def test_several_edits_share_one_measurement_of_the_base_model(organism: Path, finished: Path, tmp_path: Path) -> None:
    export = only_job(finished) / "export"
    other = tmp_path / "other"
    shutil.copytree(organism / "model", other)
    out = tmp_path / "found.json"
    options = [*few(organism, tmp_path)[:4], "--text", "none", "--out", out]
    done = abliterate("evaluate", export, other, "--against", organism / "model", *options).check()
    found = json.loads(out.read_text())
    assert found["against"] == str(organism / "model")
    edited, same = found["comparisons"]
    assert (edited["model"], same["model"]) == (str(export), str(other))
    assert edited["base"] == same["base"]
    assert done.err.count("loading ") == 3
    # The copy is the base model.
    assert same["edited"]["outcomes"] == same["base"]["outcomes"]
    assert max(same["edited"]["kl"], same["edited"]["kl_more"]["mean"]) < 1e-6
    assert edited["edited"]["kl"] > 1e-3
    assert edited["edited"]["outcomes"] != same["edited"]["outcomes"]
    assert max(map(len, done.out.split("\n\n")[0].splitlines())) <= 80
    shown = {line[:22].strip(): line for line in done.out.splitlines()}
    assert shown["behaviour, % refused"].split()[3] == "100"
    assert f"B: {other}" in done.out


@pytest.mark.slow
def test_a_job_is_measured_on_its_report_prompts_and_without_web_text_on_its_own_answers(
    finished_in_full: Path, tmp_path: Path
) -> None:
    workspace = tmp_path / "runs"
    shutil.copytree(finished_in_full, workspace, symlinks=True)
    done = abliterate("evaluate", "--workspace", workspace).check()
    job = only_job(workspace)
    name = (job / "export").resolve().name
    found = json.loads((job / f"evaluation-{int(name.removeprefix('trial-')):04d}.json").read_text())
    for one, subject in (("base", "base"), ("edited", name)):
        reported = json.loads((job / "figures" / f"{subject}.json").read_text())
        kl, interval, spread = reported.pop("kl"), reported.pop("kl_interval"), reported.pop("kl_spread", None)
        more = reported.pop("kl_more", None)
        assert {key: found[one][key] for key in reported} == reported
        if kl is not None:  # the report measures the export, this command the hooks
            assert found[one]["kl"] == pytest.approx(kl, rel=1e-3)
            assert found[one]["kl_interval"] == pytest.approx(interval, rel=1e-3)
            assert found[one]["kl_spread"] == pytest.approx(spread, rel=1e-3)
            assert found[one]["kl_more"]["mean"] == pytest.approx(more["mean"], rel=1e-3)
    assert "cross-entropy is measured on the base model's own responses" in done.err
    assert found["text"]["texts"] == 100
    # The model predicts its own responses better than any other model does.
    assert found["text"]["change_interval"][0] > 0
    assert "refusals" in done.out
    assert "warning" not in done.err


def test_what_cannot_be_measured_is_refused_at_once(random_model_folder: Path, tmp_path: Path) -> None:
    model = str(random_model_folder)
    abliterate("evaluate", model).fails(2, "--against")
    abliterate("evaluate", "--against", model).fails(2, "--against")
    abliterate("evaluate", model, "--against", model, "--trial", 3).fails(2, "--against")
    abliterate("evaluate", "--set", "seed=1").fails(2, "--set")
    # Before prompts and text are read: by default they come from the Hub.
    abliterate("evaluate", tmp_path / "nothing", "--against", model).fails(3, "no model folder")
    given = ("--good-prompts", tmp_path / "p.txt", "--bad-prompts", tmp_path / "p.txt", "--text", "none")
    (tmp_path / "p.txt").write_text("Where is the red kettle kept?\n")
    abliterate("evaluate", tmp_path / "nothing", "--against", model, *given).fails(3, "no model folder")
    abliterate("evaluate", model, "--against", model, *given[:-1], tmp_path / "no.txt").fails(3, "no.txt")
    if importlib.util.find_spec("lm_eval") is None:
        found = abliterate("evaluate", model, "--against", model, *given, "--tasks", "mmlu")
        found.fails(76, "lm-eval", "pip install")


def task_folder(organism: Path, folder: Path, names: Sequence[str]) -> list[dict[str, Any]]:
    """Write lm-eval tasks of the organism's prompts, all with the same documents, and return these."""
    source = random.Random(0)
    questions = (organism / "good_test.txt").read_text().splitlines()[:12]
    answers = [expected_answer(question) for question in questions]
    documents = []
    for question, answer in zip(questions, answers, strict=True):
        choices = [answer, *source.sample([other for other in answers if other != answer], 3)]
        source.shuffle(choices)
        documents.append({"question": question, "choices": choices, "answer": choices.index(answer)})
    folder.mkdir()
    (folder / "kept.jsonl").write_text("\n".join(map(json.dumps, documents)))
    for name in names:
        (folder / f"{name}.yaml").write_text(
            f"""\
task: {name}
dataset_path: json
dataset_kwargs: {{data_files: {{test: {folder / "kept.jsonl"}}}}}
test_split: test
output_type: multiple_choice
doc_to_text: "{{{{question}}}}"
doc_to_choice: "{{{{choices}}}}"
doc_to_target: "{{{{answer}}}}"
metric_list: [{{metric: acc, aggregation: mean, higher_is_better: true}}]
"""
        )
    return documents


def right_answers(folder: Path, documents: list[dict[str, Any]]) -> list[bool]:
    """Return which documents plain transformers answers rightly: the choice of the least cross-entropy."""
    model, tokenizer = AutoModelForCausalLM.from_pretrained(folder), AutoTokenizer.from_pretrained(folder)
    right = []
    for document in documents:
        begun = len(tokenizer(document["question"]).input_ids)
        costs = []
        for choice in document["choices"]:
            tokens = tokenizer(f"{document['question']} {choice}").input_ids
            costs.append(plain_cross_entropy(model, tokens, begun))
        right.append(costs.index(min(costs)) == document["answer"])
    return right


@pytest.mark.slow
def test_the_quick_benchmarks_are_paired_and_shown_by_card_and_report(
    organism: Path, finished: Path, tmp_path: Path
) -> None:
    workspace = tmp_path / "runs"
    shutil.copytree(finished, workspace, symlinks=True)
    job = only_job(workspace)
    sealed, before = (job / "export" / ".done").read_text(), (job / "export" / "README.md").read_text()
    (agreed,) = [line for line in before.splitlines() if "Cohen's kappa" in line]
    assert "markers and soft 1.00 (base model)" in agreed
    documents = task_folder(organism, tmp_path / "tasks", QUICK_TASKS)
    options = [*few(organism, tmp_path)[:4], "--text", "none", "--tasks-folder", tmp_path / "tasks"]
    given = (*options, "--tasks", "quick", "--limit", 8, "--json", "--workspace", workspace)
    done = abliterate("evaluate", *given, HF_DATASETS_CACHE=str(tmp_path / "cache")).check()
    scores = json.loads(done.out)["scores"]
    assert [(score["task"], score["metric"]) for score in scores] == [(task, "acc") for task in QUICK_TASKS]
    assert "it/s" not in done.err
    base, edited = (right_answers(folder, documents[:8]) for folder in (organism / "model", job / "export"))
    changes = [after - before for before, after in zip(base, edited, strict=True)]
    for score in scores:
        for one, right in (("base", sum(base)), ("edited", sum(edited))):
            assert score[one] == right / 8
            assert score[f"{one}_error"] == pytest.approx(math.sqrt(right / 8 * (1 - right / 8) / 7), abs=1e-6)
        assert (score["items"], score["better"], score["worse"]) == (8, changes.count(1), changes.count(-1))
        assert tuple(score["change_interval"]) == mean_interval(changes)
    row = f"| winogrande | acc | 8 | {sum(base) / 8:.4g} | {sum(edited) / 8:.4g} | {sum(changes) / 8:+.4g} ("
    for shown in (job / "export" / "README.md", job / "report.md"):
        assert row in shown.read_text(), shown
    assert "winogrande" in (job / "report.html").read_text()
    renewed = (job / "export" / "README.md").read_text()
    assert "not measured" not in renewed
    assert f"\n{agreed}\n" in renewed
    # The export is sealed anew, and delivered with the new card.
    assert (job / "export" / ".done").read_text() != sealed
    abliterate("upload", "--workspace", workspace, "--upload", f"file://{tmp_path}/out").check()
    assert row in (tmp_path / "out" / "README.md").read_text()


def test_the_table_holds_all_that_was_found() -> None:
    from job.evaluate.result import Comparison, Divergence, Score, shares_of
    from job.records import Figures

    base = Figures(bad_prompts=100, refusals=98, good_prompts=50, false_refusals=1)
    edited = Figures(bad_prompts=100, refusals=3, good_prompts=50, false_refusals=2, degenerate=4, kl=0.5)
    found = Comparison(
        model="edited",
        against="base",
        trial=None,
        base=base,
        edited=edited,
        shares=shares_of(base, edited),
        divergences=(Divergence.of(1, [0.5, 0.5]),),
        text=TextComparison.of("a book", ([2.0, 3.0], [1, 1]), ([2.5, 3.5], [1, 1])),
        scores=(
            Score(task="mmlu", metric="acc", base=0.6, base_error=0.03, edited=0.5, edited_error=0.04),
            Score(task="ifeval", metric="loose", base=1, base_error=None, edited=2, edited_error=None),
        ),
    )
    lines = {line[:22].strip(): line for line in comparison_text(found).splitlines()}
    assert "98/100 [93.0, 99.4] %" in lines["refusals"]
    assert "-95.0 points" in lines["refusals"]
    assert "0.5 [0.5, 0.5]" in lines["KL, first token"]
    assert "+0.5000 [+0.5000, +0.5000]" in lines["cross-entropy, nats a"]
    assert "0.5 ± 0.04" in lines["mmlu acc"]
    assert "-0.1 ± 0.05" in lines["mmlu acc"]
    assert "±" not in lines["ifeval loose"]
    assert "2 texts, 2 tokens" in comparison_text(found)
