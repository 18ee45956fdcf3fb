"""Residuals against transformers' own hidden states, their cache, and the directions that follow."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from job.config.load import default_values
from job.config.sections import DirectionSettings
from job.data.prompts import Prompt, PromptSets
from job.directions.extraction import find_directions
from job.directions.prompt_residuals import PromptResiduals, direction_prompts
from job.directions.residuals import batches, extract_residuals, read_tensors, write_tensors
from job.errors import ImpossibleJobError
from job.model.loading import LoadedModel, load_model
from job.numerics.basis import Basis
from job.numerics.directions import mean_difference
from job.records import GeometryRecord, JobRecord
from job.storage.atomic import read_record
from job.storage.events import Events, read_events
from job.storage.identity import versions
from job.storage.run_folder import RunFolder
from tests.integration.edits.test_hooks import LOADING

GOOD = [f"Where is the {a} {b} lantern kept?" for a in ("old", "new", "red") for b in ("blue", "plain", "small")]
BAD = [f"Where is the {a} hexed lantern kept, and who looks after it?" for a in ("old", "new", "red", "blue", "plain")]


@pytest.fixture(scope="module")
def loaded(random_model_folder: Path) -> LoadedModel:
    return load_model(random_model_folder, LOADING, print)


def reference(loaded: LoadedModel, prompts: list[list[int]]) -> torch.Tensor:
    """Return transformers' result for each prompt alone: embeddings and layer outputs before the final norm."""
    rows = []
    for prompt in prompts:
        kept: list[torch.Tensor] = []
        handle = loaded.model.model.norm.register_forward_pre_hook(lambda _m, inputs, kept=kept: kept.append(inputs[0]))
        with torch.inference_mode():
            states = loaded.model(torch.tensor([prompt]), output_hidden_states=True).hidden_states
        handle.remove()
        rows.append(torch.stack([*(state[0, -1] for state in states[:-1]), kept[0][0, -1]]))
    return torch.stack(rows)


@pytest.mark.parametrize(("rows", "tokens"), [(1, None), (4, None), (64, None), (64, 40)])
def test_residuals_are_the_last_position_of_every_layer(loaded: LoadedModel, rows: int, tokens: int | None) -> None:
    prompts = loaded.tokenize([Prompt(user=text) for text in GOOD + BAD])
    advanced: list[int] = []
    found = extract_residuals(loaded, prompts, rows, advanced.append, tokens=tokens)
    assert found.shape == (14, 4, 32)
    assert found.dtype == torch.float32
    torch.testing.assert_close(found, reference(loaded, prompts), rtol=1e-4, atol=1e-5)
    assert sum(advanced) == 14
    if tokens:
        assert max(advanced) < 9


def test_the_head_is_not_run(loaded: LoadedModel) -> None:
    def refuse(*_: Any) -> None:
        raise AssertionError("the LM head ran")

    handle = loaded.model.lm_head.register_forward_pre_hook(refuse)
    try:
        extract_residuals(loaded, [[5, 6, 7]], 4, lambda _: None)
    finally:
        handle.remove()


def test_batches_keep_within_rows_and_padded_tokens() -> None:
    lengths = [5, 100, 7, 6, 300, 5, 40]
    found = list(batches(lengths, rows=3, tokens=120))
    assert sorted(index for chosen in found for index in chosen) == list(range(7))
    for chosen in found:
        assert len(chosen) <= 3
        assert len(chosen) == 1 or len(chosen) * max(lengths[i] for i in chosen) <= 120
    assert [4] in found  # longer than the limit by itself


def test_kept_tensors_come_back_only_whole_and_under_their_key(tmp_path: Path) -> None:
    file = tmp_path / "sub" / "kept.safetensors"
    tensors = {"a": torch.randn(3, 4).T, "b": torch.tensor([1, 2])}
    assert read_tensors(file, "key") is None
    write_tensors(file, "key", tensors)
    found = read_tensors(file, "key")
    assert found is not None
    assert torch.equal(found["a"], tensors["a"])
    assert read_tensors(file, "other") is None
    data = bytearray(file.read_bytes())
    data[-3] ^= 1  # one bit of the contents
    file.write_bytes(data)
    assert read_tensors(file, "key") is None
    file.write_bytes(data[:-5])
    assert read_tensors(file, "key") is None
    save_file({"a": torch.zeros(2)}, file)
    assert read_tensors(file, "key") is None


class Job:
    """A run folder with the inputs for finding directions."""

    def __init__(self, path: Path, loaded: LoadedModel) -> None:
        path.mkdir(exist_ok=True)
        self.folder = RunFolder(path)
        self.loaded = loaded
        texts = {"good": GOOD, "bad": BAD, "helpfulness": GOOD[:4], "unhelpfulness": [text[:9] for text in BAD]}
        sets: dict[str, Any] = {name: tuple(Prompt(user=text) for text in found) for name, found in texts.items()}
        rest = dict.fromkeys(("good_search", "bad_search", "good_report", "bad_report"), ())
        self.prompts = PromptSets(**sets, **rest, sources={}, commits={})
        self.plain = self.prompts.model_copy(update={"helpfulness": (), "unhelpfulness": ()})

    def find(self, prompts: PromptSets | None = None, **named: Any) -> Basis:
        settings = DirectionSettings.model_validate({**default_values()["directions"], **named})
        record = JobRecord(job_id="j", identity={"model": "m"}, settings={}, startup_trials=1, versions=versions())
        events = Events(self.folder.events_file)
        tokens = {name: self.loaded.tokenize(found) for name, found in direction_prompts(prompts or self.plain).items()}
        quantile = settings.winsorization_quantile
        residuals = PromptResiduals(self.folder, record, self.loaded, tokens, 4, 4000, quantile, events)
        return find_directions(residuals, settings)

    def extractions(self) -> int:
        return sum(event["event"] == "residuals_started" for event in read_events(self.folder.events_file))

    def residuals(self, name: str) -> torch.Tensor:
        (file,) = self.folder.path.glob(f"residuals/{name}-????????????????.safetensors")
        return load_file(file)["residuals"][:, 1:]


@pytest.fixture
def job(tmp_path: Path, loaded: LoadedModel) -> Job:
    return Job(tmp_path / "job", loaded)


def test_directions_are_found_once_and_damage_is_made_good(job: Job) -> None:
    basis = job.find()
    good, bad = job.residuals("good"), job.residuals("bad")
    torch.testing.assert_close(basis.directions[:, 0], mean_difference(good, bad))
    assert torch.equal(job.find().directions, basis.directions)
    assert job.extractions() == 1
    (file,) = job.folder.path.glob("directions/*.safetensors")
    whole = file.read_bytes()
    file.write_bytes(whole[: len(whole) // 2])
    assert torch.equal(job.find().directions, basis.directions)
    assert file.read_bytes() == whole
    job.folder.geometry_file.unlink()
    job.find()
    assert len(read_record(job.folder.geometry_file, GeometryRecord).layers) == 3


def test_another_method_takes_up_the_kept_residuals(job: Job) -> None:
    job.find()
    kept = {file: file.stat().st_mtime_ns for file in job.folder.path.glob("residuals/*")}
    basis = job.find(method="contrastive-pca", n_components=2)
    assert {file: file.stat().st_mtime_ns for file in job.folder.path.glob("residuals/*")} == kept
    assert (basis.size, len(list(job.folder.path.glob("directions/*.safetensors")))) == (3, 2)
    gram = basis.directions @ basis.directions.mT
    torch.testing.assert_close(gram, torch.eye(3).expand(3, 3, 3), atol=1e-5, rtol=0)
    weights = basis.weights
    assert bool((weights[:, 0] == 1).all())
    assert bool((weights[:, 1] == 1).all())
    assert bool(((weights[:, 2] > 0) & (weights[:, 2] <= 1)).all())


def test_other_prompts_or_a_prefix_make_other_residuals(job: Job, loaded: LoadedModel) -> None:
    import dataclasses

    job.find()
    job.find(job.plain.model_copy(update={"bad": job.plain.bad[:-1]}))
    assert len(list(job.folder.path.glob("residuals/bad-*"))) == 2
    assert len(list(job.folder.path.glob("residuals/good-*"))) == 1
    job.loaded = dataclasses.replace(loaded, response_prefix="The")
    job.find()
    assert len(list(job.folder.path.glob("residuals/good-*"))) == 2


def test_helpfulness_is_taken_out_of_the_directions(job: Job) -> None:
    basis = job.find(job.prompts, orthogonalize_directions=True)
    reference = mean_difference(job.residuals("unhelpfulness"), job.residuals("helpfulness"))
    assert float((basis.directions[:, 0] * reference).sum(-1).abs().max()) < 1e-5
    plain = job.find()
    assert float((plain.directions[:, 0] * reference).sum(-1).abs().max()) > 0.01


def test_every_round_adds_what_is_left_with_the_former_ablated(job: Job, loaded: LoadedModel) -> None:
    basis = job.find(iterative_rounds=3)
    assert basis.size == 3
    once = job.find()
    torch.testing.assert_close(basis.directions[:, 0], once.directions[:, 0])
    left = mean_difference(job.residuals("good-round-2"), job.residuals("bad-round-2"))
    # After ablating layer l's first direction from layer l, the second is new in every layer but ...
    assert float((basis.directions[:, 0] * basis.directions[:, 1]).sum(-1).abs().max()) < 1e-5
    span = basis.directions[:, :2]
    inside = (left[:, None] @ span.mT) @ span
    torch.testing.assert_close(inside[:, 0], left, atol=1e-4, rtol=0)
    assert torch.equal(job.find(iterative_rounds=3).directions, basis.directions)


def test_winsorisation_changes_directions_but_not_what_is_kept(job: Job) -> None:
    basis, clamped = job.find(), job.find(winsorization_quantile=0.8)
    assert len(list(job.folder.path.glob("residuals/good-*"))) == 1
    assert float((basis.directions - clamped.directions).abs().max()) > 1e-3


def test_prompts_that_do_not_differ_are_told(job: Job) -> None:
    with pytest.raises(ImpossibleJobError, match="do not differ in layer 0"):
        job.find(job.plain.model_copy(update={"bad": job.plain.good}))


def test_a_full_disk_costs_the_cache_and_not_the_job(job: Job, tmp_path: Path) -> None:
    (job.folder.path / "residuals").write_text("a file where the folder ought to be")
    assert job.find().size == 1
    assert any("residuals are not stored" in event["message"] for event in read_events(job.folder.events_file))
