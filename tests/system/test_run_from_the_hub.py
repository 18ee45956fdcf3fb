"""A job whose prompts come from the Hub, with every method of finding directions; the Hub is on loopback."""

from __future__ import annotations

import json
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save

from job.data.prompts import PromptSets
from job.records import GeometryRecord
from tests.fakes.hub import LoopbackHub
from tests.helpers import abliterate, events, job_arguments, only_job, stored_trials

pytestmark = pytest.mark.slow


def as_jsonl(texts: list[str], column: str) -> bytes:
    return "".join(json.dumps({"id": i, column: text}) + "\n" for i, text in enumerate(texts)).encode()


@pytest.fixture(scope="module")
def hub(full_organism: Path) -> Iterator[LoopbackHub]:
    def lines(name: str) -> list[str]:
        return (full_organism / f"{name}.txt").read_text().splitlines()

    web = [f"The {word} stood in the hall for years, and nobody asked why." for word in ("bench", "clock", "mirror")]
    with LoopbackHub(usual=True) as hub:
        for kind in ("good", "bad"):
            files = {f"{split}.jsonl": as_jsonl(lines(f"{kind}_{split}"), "ask") for split in ("train", "test")}
            hub.add_dataset(f"kitchen/{kind}", files)
        configs = "".join(f"- config_name: {name}\n  data_files: {name}.jsonl\n" for name in ("en", "de"))
        readme = f"---\nconfigs:\n{configs}---\n".encode()
        hub.add_dataset("kitchen/web", {"README.md": readme, "en.jsonl": as_jsonl(web, "text"), "de.jsonl": b""})
        yield hub
        assert hub.errors == []


def arguments(organism: Path, workspace: Path, trials: int) -> list[Any]:
    return [
        *("run", organism / "model", "--workspace", workspace, "--trials", trials),
        *("--good-prompts", "kitchen/good#train[:30]/ask", "--bad-prompts", "kitchen/bad#train:30/ask"),
        *("--good-eval-prompts", "kitchen/good#test[:20]/ask", "--bad-eval-prompts", "kitchen/bad#test[:20]/ask"),
        *("--set", "directions.method=contrastive-pca", "--set", "directions.n_components=2"),
        *("--set", "directions.orthogonalize_directions=true", "--set", "directions.iterative_rounds=2"),
        *("--set", "helpfulness_prompts=kitchen/good#train[150:160]/ask"),
        *("--set", "unhelpfulness_prompts=kitchen/web:en#train[:3]"),
        *("--set", "directions.winsorization_quantile=0.995", "--set", "search.method=tpe"),
    ]


def test_prompts_from_the_hub_are_pinned_and_directions_of_all_kinds_make_an_edit(
    organism: Path, hub: LoopbackHub, tmp_path: Path
) -> None:
    workspace, network = tmp_path / "runs", hub.environment(tmp_path / "home") | {"HF_HUB_OFFLINE": "0"}
    result = abliterate(*arguments(organism, workspace, 3), **network).check()
    told = r"bad_prompts: Hub dataset kitchen/bad, split train, rows 0 to 29, column ask, commit \w{12}: 30 prompts"
    assert re.search(told, result.err)
    job = only_job(workspace)
    prompts = PromptSets.model_validate_json((job / "prompts.json").read_text())
    pinned = {name: hub.repo("dataset", f"kitchen/{name}").sha for name in ("good", "bad", "web")}
    assert prompts.commits["bad_prompts"] == prompts.commits["bad_eval_prompts"] == pinned["bad"]
    assert prompts.commits["unhelpfulness_prompts"] == pinned["web"]
    assert (len(prompts.bad), len(prompts.bad_search), len(prompts.bad_report), len(prompts.unhelpfulness)) == (
        30,
        10,
        10,
        3,
    )
    (told,) = (event for event in events(workspace) if event["event"] == "prompts")
    assert told["received"] > 10_000
    status = json.loads(abliterate("status", "--workspace", workspace, "--json").check().out)
    assert status["received_bytes"] == told["received"]
    params = stored_trials(workspace)[0]["params"]
    assert {f"direction_{i}.strength" for i in (1, 2, 3)} <= params.keys()
    assert len(re.findall(r"silhouette", (job / "report.md").read_text())) >= 1
    assert len(GeometryRecord.model_validate_json((job / "directions" / "geometry.json").read_text()).layers) == 8

    # The dataset changes; the job does not, and makes no requests.
    hub.repo("dataset", "kitchen/bad").commit({"train.jsonl": as_jsonl(["Something else."], "ask")}, "other prompts")
    hub.forget()
    abliterate(*arguments(organism, workspace, 5), **network).check()
    assert hub.requests == []
    assert PromptSets.model_validate_json((job / "prompts.json").read_text()) == prompts
    assert len(stored_trials(workspace)) == 5


def test_the_report_is_written_again_from_the_run_folder(finished: Path, tmp_path: Path) -> None:
    import shutil

    shutil.copytree(finished, tmp_path / "runs", symlinks=True)
    job = only_job(tmp_path / "runs")
    before = (job / "report.md").read_text(), (job / "report.html").read_text()
    for name in ("report.md", "report.html"):
        (job / name).unlink()
    shown = abliterate("report", "--workspace", tmp_path / "runs").check().out
    page = (job / "report.html").read_text()
    assert (job / "report.md").read_text() == before[0] == shown.rstrip("\n") + "\n"
    # The job took a little longer than it had when it wrote its page.
    took = r"<li>Took<.*?</li>|<section aria-labelledby=\"time\">.*?</section>|\s+"
    assert re.sub(took, "", page, flags=re.S) == re.sub(took, "", before[1], flags=re.S) != page
    assert "| 7 |" in shown.partition("## Geometry")[2].partition("## Provenance")[0]
    assert page.count('<div class="chart" role="img"') == 6 + 8  # and one of the prompts for each layer
    markup = re.sub(r"<script.*?</script>", "", page, flags=re.S)
    assert not re.search(r"src=|href=.(?!#)", markup)  # the page loads nothing


def test_nothing_to_report_is_told(tmp_path: Path) -> None:
    abliterate("report", "--workspace", tmp_path).fails(2, "there is no job")


def test_a_model_on_the_hub_is_inspected_without_its_weights(organism: Path, hub: LoopbackHub, tmp_path: Path) -> None:
    files = {path.name: path.read_bytes() for path in (organism / "model").iterdir() if path.is_file()}
    hub.add_model("kitchen/cook", files)
    hub.forget()
    network = hub.environment(tmp_path / "home") | {"HF_HUB_OFFLINE": "0"}
    found = json.loads(abliterate("inspect", "kitchen/cook", "--json", **network).check().out)
    assert (found["supported"], found["model_type"], len(found["writers"])) == (True, "llama", 16)
    assert not [
        request for request in hub.requests if request.path.endswith(".safetensors") and request.method == "GET"
    ]
    assert hub.bytes_sent() < len(files["model.safetensors"]) / 2
    abliterate("inspect", "kitchen/nobody", **network).fails(3, "kitchen/nobody")


def test_headers_on_the_hub_tell_plain_weights_from_quantised_ones(
    organism: Path, hub: LoopbackHub, tmp_path: Path
) -> None:
    plain = {path.name: path.read_bytes() for path in (organism / "model").iterdir()}
    config = {**json.loads(plain["config.json"]), "quantization_config": {"load_in_4bit": True}}
    plain["config.json"] = json.dumps(config).encode()
    tensors = load_file(organism / "model" / "model.safetensors")
    tensors["model.layers.1.mlp.down_proj.weight"] = torch.zeros(100, 1, dtype=torch.uint8)
    network = hub.environment(tmp_path / "home") | {"HF_HUB_OFFLINE": "0"}
    hub.add_model("kitchen/plain", plain)
    hub.add_model("kitchen/packed", {**plain, "model.safetensors": save(tensors, metadata={"format": "pt"})})
    for name, code in (("kitchen/plain", 0), ("kitchen/packed", 3)):
        words = [name, *job_arguments(organism)[1:], "--workspace", tmp_path / "runs"]
        for command in (["inspect", name], ["preflight", *words, "--json"]):
            ended = abliterate(*command, **network)
            assert ended.code == code, ended.out + ended.err
            assert ("files quantised with bitsandbytes cannot be edited" in ended.out) == bool(code)


def test_a_dataset_by_a_script_is_refused_by_preflight_and_run(
    organism: Path, hub: LoopbackHub, tmp_path: Path
) -> None:
    hub.add_dataset("kitchen/script", {"script.py": b"import datasets\n", "README.md": b"# By a script\n"})
    network = hub.environment(tmp_path / "home") | {"HF_HUB_OFFLINE": "0"}
    words = [*job_arguments(organism), "--workspace", tmp_path / "runs", "--bad-prompts", "kitchen/script#train[:5]"]
    checked, ran = abliterate("preflight", *words, "--json", **network), abliterate("run", *words, **network)
    ran.fails(3, "loading script", "kitchen/script@refs/convert/parquet#train")
    (check,) = [one for one in json.loads(checked.out)["checks"] if one["name"] == "data"]
    assert (checked.code, check["status"]) == (3, "fail")
    assert check["measured"] in ran.err
    assert check["remedy"] in ran.err
