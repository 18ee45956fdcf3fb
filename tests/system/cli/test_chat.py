"""Chatting with a job's model: the base and exported models' responses, without reloading."""

from __future__ import annotations

import io
import json
import re
import sys
from pathlib import Path

import pytest
import torch
from torch import Tensor
from transformers import AutoModelForCausalLM, AutoTokenizer

from job.model.loading import load_model
from job.stages.conversation import AnswerStreamer, _answered
from tests.helpers import abliterate, loading, only_job, run_script
from tests.warm import MAIN

Conversation = list[dict[str, str]]


def said(*texts: str, system: str | None = None) -> Conversation:
    """Return a conversation of alternating user and assistant messages."""
    begun = [{"role": "system", "content": system}] if system else []
    return begun + [{"role": ("user", "assistant")[i % 2], "content": text} for i, text in enumerate(texts)]


def plain_answers(folder: Path, conversations: list[Conversation]) -> list[str]:
    """Return greedy responses of plain transformers, without our code."""
    model, tokenizer = AutoModelForCausalLM.from_pretrained(folder), AutoTokenizer.from_pretrained(folder)
    answers = []
    for messages in conversations:
        text = tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=True)
        ids = tokenizer(text, add_special_tokens=False, return_tensors="pt").input_ids
        found = model.generate(ids, attention_mask=torch.ones_like(ids), do_sample=False, max_new_tokens=40)
        answers.append(tokenizer.decode(found[0, ids.shape[1] :], skip_special_tokens=True))
    return answers


@pytest.mark.slow
def test_base_and_trial_answer_as_the_models_on_disk_do_and_nothing_is_loaded_twice(
    organism: Path, finished: Path
) -> None:
    job = only_job(finished)
    before = {path: path.stat().st_mtime_ns for path in finished.rglob("*") if path.is_file() and path.name != ".lock"}
    bad = (organism / "bad_test.txt").read_text().splitlines()[:4]
    good = (organism / "good_test.txt").read_text().splitlines()[:2]
    chosen = int(re.sub(r"\D", "", (job / "export").resolve().name))
    turns = [line for question in (*bad, *good) for line in (question, "/reset")]
    script = [
        *("/tokens 40", "/base", *turns, f"/trial {chosen}", *turns),
        *(bad[0], "/base", bad[1]),  # one conversation across models
        *("/trial 99", "/trial x", "/dance", "/tokens 0", "/trials", "", "/trial", "/help", "/reset"),
        *("/system Be brief.", good[0], "/quit", "never asked"),
    ]
    done = run_script(MAIN, "chat", "--workspace", finished, asked="\n".join(script)).check()
    answers = done.out.splitlines()
    assert len(answers) == 15
    base = plain_answers(organism / "model", [said(question) for question in (*bad, *good)])
    edited = plain_answers(
        job / "export", [*(said(question) for question in (*bad, *good)), said(good[0], system="Be brief.")]
    )
    assert answers[:6] == base
    assert answers[6:12] == edited[:6]
    assert base[:4] != edited[:4]
    assert answers[12] == edited[0]
    assert answers[13:14] == plain_answers(organism / "model", [said(bad[0], edited[0], bad[1])])
    assert answers[14] == edited[6]
    assert done.err.count("loading the model") == 1
    errors = [line for line in done.err.splitlines() if line.startswith("error: ")]
    assert [re.search(r"no trial 99|/trial x|/dance|/tokens 0", line) is not None for line in errors] == [True] * 4
    for told in (f"trial {chosen}: ", "/system [TEXT]", "refusals ("):
        assert told in done.err
    assert "Traceback" not in done.err
    # Read-only: not even the event log has grown.
    after = {path: path.stat().st_mtime_ns for path in finished.rglob("*") if path.is_file() and path.name != ".lock"}
    assert after == before


@pytest.mark.slow
def test_questions_given_as_options_and_answers_as_json(organism: Path, finished: Path, tmp_path: Path) -> None:
    question = (organism / "bad_test.txt").read_text().splitlines()[0]
    lines = ("--prompt", question, "--prompt", "/base", "--prompt", "/reset", "--prompt", question)
    found = abliterate("chat", "--workspace", finished, "--json", "--tokens", 30, *lines).check()
    edited, base = map(json.loads, found.out.splitlines())
    assert edited["trial"] == int(re.sub(r"\D", "", (only_job(finished) / "export").resolve().name))
    assert base["trial"] is None
    assert edited["prompt"] == base["prompt"] == question
    assert edited["answer"] != base["answer"]
    abliterate("chat", "--workspace", finished, "--trial", 99).fails(2, "no trial 99")
    abliterate("chat", "--workspace", finished, "--device", "abacus").fails(2, "no device abacus")
    abliterate("chat", "--workspace", tmp_path).fails(2, "no job")


class Interrupting(AnswerStreamer):
    """Shows three tokens, then raises Ctrl-C."""

    def put(self, tokens: Tensor) -> None:
        super().put(tokens)
        if self._tokens is not None and len(self._tokens) == 3:
            raise KeyboardInterrupt


def test_ctrl_c_stops_an_answer_on_a_terminal_and_everything_elsewhere(
    random_model_folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    loaded = load_model(random_model_folder, loading("float32"), lambda _: None)
    monkeypatch.setattr(sys, "stdin", io.StringIO())
    with pytest.raises(KeyboardInterrupt):
        _answered(loaded, [7, 8, 9], 20, 0.0, Interrupting(loaded, None))
    monkeypatch.setattr(sys.stdin, "isatty", lambda: True)
    out = io.StringIO()
    found = _answered(loaded, [7, 8, 9], 20, 0.0, Interrupting(loaded, out.write))
    whole = _answered(loaded, [7, 8, 9], 20, 0.0, AnswerStreamer(loaded, io.StringIO().write))
    assert found == out.getvalue()
    assert whole.startswith(found)
    assert whole != found
    assert _answered(loaded, [7, 8, 9], 20, 1.5, AnswerStreamer(loaded, None))  # sampled
