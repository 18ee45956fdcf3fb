"""The judge, against a loopback endpoint of the same interface; a real judge model has not been run."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from job.config.load import default_values
from job.config.sections import JudgeSettings
from job.errors import JobError, MachineError, UsageError
from job.scoring.broken import Exchange
from job.scoring.judge import KEY, Judge, Verdicts
from tests.fakes.judge import Endpoint
from tests.system.test_failpoints import dies

POLITE, RUDE = Exchange("Where is the kettle?", "In the kitchen, please."), Exchange("Where?", "Go away {now}.")


@pytest.fixture
def endpoint() -> Iterator[Endpoint]:
    with Endpoint() as server:
        yield server


def judge(endpoint: Endpoint, file: Path | None, said: list[str] | None = None, **settings: Any) -> Judge:
    given = {**default_values()["judge"], "url": endpoint.url, "model": "tiny", **settings}
    say = (said if said is not None else []).append
    return Judge(JudgeSettings.model_validate(given), "Is it rude?", Verdicts(file), say, lambda _: 0.0)


def test_nothing_is_asked_twice_and_only_the_owner_may_read_the_answers(endpoint: Endpoint, tmp_path: Path) -> None:
    file = tmp_path / "answers" / "verdicts.txt"
    assert judge(endpoint, file)([POLITE, RUDE, POLITE]) == [0.0, 0.9, 0.0]
    assert len(endpoint.asked) == 2
    content = {body["messages"][0]["content"] for body in endpoint.asked}
    assert all("Is it rude?" in one for one in content)
    assert any("Go away {now}." in one for one in content)
    assert all((body["temperature"], body["model"]) == (0, "tiny") for body in endpoint.asked)
    assert (file.stat().st_mode & 0o777, file.parent.stat().st_mode & 0o777) == (0o600, 0o700)
    assert "kettle" not in file.read_text()
    assert judge(endpoint, file)([RUDE, POLITE]) == [0.9, 0.0]
    assert len(endpoint.asked) == 2
    # A line torn by a crash is asked again; the file goes on behind it.
    torn = file.read_text().rstrip("\n")
    file.write_text(torn[:-2])
    assert judge(endpoint, file)([RUDE, POLITE]) == [0.9, 0.0]
    assert judge(endpoint, file)([RUDE, POLITE]) == [0.9, 0.0]
    assert len(endpoint.asked) == 3
    assert judge(endpoint, file, model="other")([POLITE]) == [0.0]
    assert len(endpoint.asked) == 4


def test_a_run_killed_after_an_answer_does_not_ask_it_again(endpoint: Endpoint, tmp_path: Path) -> None:
    file, faults = tmp_path / "verdicts.txt", tmp_path / "faults"
    faults.mkdir()
    assert dies(faults, ["judge:answered"], lambda: judge(endpoint, file, parallel=1)([POLITE, RUDE]))
    assert len(endpoint.asked) == 1
    assert judge(endpoint, file)([POLITE, RUDE]) == [0.0, 0.9]
    assert len(endpoint.asked) == 2


def test_failures_that_may_pass_are_tried_again(endpoint: Endpoint, tmp_path: Path) -> None:
    said: list[str] = []
    endpoint.failures = [(503, "busy"), (429, ""), (200, "no JSON"), (200, json.dumps({"choices": []}))]
    assert judge(endpoint, None, said, parallel=1)([RUDE]) == [0.9]
    assert len(said) == 4
    assert said[0] == "warning: the judge answers 503; trying again in 0 s (1 of 4)"
    endpoint.failures = [(503, "busy")] * 5
    with pytest.raises(MachineError, match="the judge answers 503"):
        judge(endpoint, None)([POLITE])
    endpoint.reply = "I would rather not say: go away."
    with pytest.raises(UsageError, match="without a number") as caught:
        judge(endpoint, None)([RUDE])
    assert "away" not in caught.value.line
    endpoint.shutdown()
    endpoint.server_close()
    with pytest.raises(MachineError, match="cannot be reached"):
        judge(endpoint, None, timeout=0.5)([POLITE])


@pytest.mark.parametrize(
    ("reply", "number"),
    [
        ("On a scale from 0 to 10 I rate this 8.", 0.8),
        ("8/10", 0.8),
        ("8 out of 10", 0.8),
        ("**10**", 1.0),
        ("The response is rude: 9", 0.9),
    ],
)
def test_the_number_that_is_meant_is_found(endpoint: Endpoint, reply: str, number: float) -> None:
    endpoint.reply = reply
    assert judge(endpoint, None)([RUDE]) == [number]


@pytest.mark.parametrize("reply", ["-3", "11", "4.5", "2026"])
def test_other_numbers_are_none(endpoint: Endpoint, reply: str) -> None:
    endpoint.reply = reply
    with pytest.raises(UsageError, match="without a number"):
        judge(endpoint, None)([RUDE])


def test_no_proxy_reads_what_stays_on_this_machine(endpoint: Endpoint, monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("http_proxy", "HTTP_PROXY", "ALL_PROXY"):
        monkeypatch.setenv(name, "http://127.0.0.1:9")
    assert judge(endpoint, None)([RUDE]) == [0.9]


@pytest.mark.parametrize(
    "url", ["http://judge.example/v1", "https://[x", "https://judge.example/v1#a", "https://a:b@c"]
)
def test_an_address_that_exposes_responses_is_refused_wherever_it_comes_from(url: str) -> None:
    given = JudgeSettings.model_validate({**default_values()["judge"], "url": url, "model": "tiny"})
    with pytest.raises(UsageError, match=r"judge\.url"):
        Judge.opened(given, "rudeness", None, print)


def test_the_key_goes_to_the_endpoint_and_into_no_message(
    endpoint: Endpoint, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert judge(endpoint, None)([POLITE]) == [0.0]
    monkeypatch.setenv(KEY, "sesame-opens-it")
    assert judge(endpoint, tmp_path / "verdicts.txt")([POLITE]) == [0.0]
    assert endpoint.keys == [None, "Bearer sesame-opens-it"]
    assert "sesame" not in (tmp_path / "verdicts.txt").read_text()
    refused: list[JobError] = []
    for status, text in ((401, "sesame-opens-it is wrong"), (400, json.dumps({"error": {"message": "no such model"}}))):
        endpoint.failures = [(status, text)]
        with pytest.raises(UsageError) as caught:
            judge(endpoint, None)([RUDE])
        refused.append(caught.value)
    assert "sesame" not in refused[0].line
    assert str(refused[1]) == "the judge answers 400: no such model"
    # A redirect would carry the key elsewhere.
    endpoint.failures = [(302, "")]
    with pytest.raises(UsageError, match="the judge answers 302"):
        judge(endpoint, None)([RUDE])


@pytest.mark.parametrize(("text", "number"), [("10", 10), ("7/10", 7), ("Score: 3.", 3), ("0", 0)])
def test_the_number_is_read_from_what_the_judge_says(endpoint: Endpoint, text: str, number: int) -> None:
    endpoint.reply = text
    assert judge(endpoint, None)([POLITE]) == [number / 10]
