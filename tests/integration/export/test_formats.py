"""Exports other than the merged model: the adapter and the edit file; repeating an export."""

from __future__ import annotations

import json
import re
import shutil
from pathlib import Path
from typing import TYPE_CHECKING

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM, PreTrainedModel

from job.architectures.structure import discover
from job.edits.hooks import Intervention
from job.errors import UsageError
from job.export.directions_file import EDIT_FILE, apply_edit, write_edit_file
from job.export.lora import with_adapter, write_adapter
from job.export.merged import Edit, write_weights
from job.export.reproduction import Reproduction, read_reproduction
from job.generation.forward import RowTrials, first_logits
from job.model.loading import load_model
from job.numerics.basis import DirectionPath
from job.records import LearnedDirections
from job.storage.exports import is_sealed
from tests.helpers import abliterate, events, job_arguments, loading, made_from, only_job, stored_trials
from tests.integration.edits.test_hooks import EDITS, basis_for, edit_by_layer, path_for

if TYPE_CHECKING:
    from peft import PeftModel

PROMPTS = [[7, 8, 9, 10, 11], [12, 13, 14]]


def edit_of(folder: Path, mode: str, index: int = 0) -> Edit:
    model = AutoModelForCausalLM.from_pretrained(folder)
    return Edit(EDITS[index], basis_for(model), mode)  # type: ignore[arg-type]  # a mode's name


def adapted_by_peft(model: PreTrainedModel, folder: Path) -> PeftModel:
    from peft import PeftModel  # loads for seconds, in every worker if it stood above

    return PeftModel.from_pretrained(model, str(folder))


@pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing`:FutureWarning")  # PEFT triggers it
@pytest.mark.parametrize("mode", ["none", "pre"])
@pytest.mark.parametrize("index", range(len(EDITS)))
def test_an_adapter_is_the_hooked_model_for_plain_peft(
    random_model_folder: Path, tmp_path: Path, mode: str, index: int
) -> None:
    edit = edit_of(random_model_folder, mode, index)
    base = load_model(random_model_folder, loading("float32"), lambda _: None)
    write_adapter(base, tmp_path, edit, "kitchen/base")
    with Intervention(base.model, base.architecture, edit.basis, edit.mode) as intervention:
        rows = RowTrials(torch.zeros(2, dtype=torch.long), intervention.activate([edit.parameters]))
        hooked = first_logits(base.model, PROMPTS, rows)
    plain = AutoModelForCausalLM.from_pretrained(random_model_folder)
    adapted = adapted_by_peft(plain, tmp_path)
    found = first_logits(adapted.get_base_model().eval(), PROMPTS)
    torch.testing.assert_close(found, hooked, rtol=0, atol=2e-5)
    merged = first_logits(adapted.merge_and_unload().eval(), PROMPTS)
    torch.testing.assert_close(merged, hooked, rtol=0, atol=2e-5)
    config = json.loads((tmp_path / "adapter_config.json").read_text())
    assert config["base_model_name_or_path"] == "kitchen/base"
    assert config["target_modules"] == ["down_proj", "o_proj"]
    fresh = with_adapter(load_model(random_model_folder, loading("float32"), lambda _: None), tmp_path)
    torch.testing.assert_close(first_logits(fresh.model, PROMPTS), found, rtol=0, atol=1e-6)  # its head reads a copy


LEARNED = LearnedDirections(sha256="1" * 64, position=0.4)


def learned_edit_of(folder: Path, mode: str) -> Edit:
    basis = basis_for(AutoModelForCausalLM.from_pretrained(folder))
    parameters = edit_by_layer(basis, LEARNED, 3)
    return Edit(parameters, path_for(basis, 1), mode)  # type: ignore[arg-type]  # a mode's name


@pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing`:FutureWarning")  # PEFT triggers it
@pytest.mark.parametrize("mode", ["none", "pre", "full", "column"])
def test_learned_directions_are_in_the_merged_export_the_adapter_and_the_edit_file(
    random_model_folder: Path, tmp_path: Path, mode: str
) -> None:
    edit, basis = learned_edit_of(random_model_folder, mode), basis_for
    base = load_model(random_model_folder, loading("float32"), lambda _: None)
    path = edit.basis
    assert isinstance(path, DirectionPath)
    with Intervention(base.model, base.architecture, basis(base.model), edit.mode, lambda _: path) as intervention:
        rows = RowTrials(torch.zeros(2, dtype=torch.long), intervention.activate([edit.parameters]))
        hooked = first_logits(base.model, PROMPTS, rows)
    write_weights(random_model_folder, tmp_path / "merged", base.architecture, edit, lambda _: None)
    merged = AutoModelForCausalLM.from_pretrained(tmp_path / "merged").eval()
    torch.testing.assert_close(first_logits(merged, PROMPTS), hooked, rtol=0, atol=2e-5)
    settings = {**made_from().settings, "ablation": {"row_normalization": mode}}
    made = made_from(format="directions", edit=edit.parameters, settings=settings)
    write_edit_file(tmp_path / "edit", random_model_folder, base.architecture, edit, made)
    apply_edit(random_model_folder, tmp_path / "edit", tmp_path / "out", lambda _: None)
    for shard in (tmp_path / "merged").glob("*.safetensors"):
        assert (tmp_path / "out" / shard.name).read_bytes() == shard.read_bytes()
    if mode in ("none", "pre"):
        write_adapter(base, tmp_path / "adapter", edit, None)
        plain = AutoModelForCausalLM.from_pretrained(random_model_folder)
        adapted = adapted_by_peft(plain, tmp_path / "adapter")
        found = first_logits(adapted.get_base_model().eval(), PROMPTS)
        torch.testing.assert_close(found, hooked, rtol=0, atol=2e-5)


def test_an_edit_file_whose_strengths_do_not_fit_its_directions_is_refused(
    random_model_folder: Path, tmp_path: Path
) -> None:
    edit = learned_edit_of(random_model_folder, "none")
    base = load_model(random_model_folder, loading("float32"), lambda _: None)
    outside = edit.parameters.model_copy(update={"directions": LEARNED.model_copy(update={"position": 1.5})})
    fewer = {name: layers[:-1] for name, layers in (edit.parameters.layer_strengths or {}).items()}
    for number, other in enumerate((outside, edit.parameters.model_copy(update={"layer_strengths": fewer}))):
        folder = tmp_path / str(number)
        made = made_from(format="directions", edit=other)
        with pytest.raises(UsageError, match="is not an edit"):
            write_edit_file(folder, random_model_folder, base.architecture, edit, made)


def test_the_same_edit_gives_the_same_adapter_and_edit_file(random_model_folder: Path, tmp_path: Path) -> None:
    edit = edit_of(random_model_folder, "none")
    base = load_model(random_model_folder, loading("float32"), lambda _: None)
    for name in "ab":
        write_adapter(base, tmp_path / name, edit, None)
        write_edit_file(tmp_path / name, random_model_folder, base.architecture, edit, made_from())
    for path in (tmp_path / "a").iterdir():
        assert path.read_bytes() == (tmp_path / "b" / path.name).read_bytes(), path.name


@pytest.mark.parametrize("mode", ["none", "full"])
def test_an_applied_edit_file_gives_the_merged_export(random_model_folder: Path, tmp_path: Path, mode: str) -> None:
    edit = edit_of(random_model_folder, mode)
    architecture = discover(AutoModelForCausalLM.from_pretrained(random_model_folder))
    settings = {**made_from().settings, "ablation": {"row_normalization": mode}}
    made = made_from(format="directions", edit=edit.parameters, settings=settings)
    write_edit_file(tmp_path / "edit", random_model_folder, architecture, edit, made)
    write_weights(random_model_folder, tmp_path / "merged", architecture, edit, lambda _: None)
    out = tmp_path / "out"
    out.mkdir()
    apply_edit(random_model_folder, tmp_path / "edit", out, lambda _: None)
    assert is_sealed(out)
    for shard in (tmp_path / "merged").glob("*.safetensors"):
        assert (out / shard.name).read_bytes() == shard.read_bytes()
    assert read_reproduction(out / "reproduce.json").format == "merged"
    assert [path.name for path in tmp_path.iterdir() if path.name.startswith(".")] == []
    with pytest.raises(UsageError, match="is not empty"):
        apply_edit(random_model_folder, tmp_path / "edit" / EDIT_FILE, out, lambda _: None)


def test_an_edit_file_is_applied_to_its_own_model_only(random_model_folder: Path, tmp_path: Path) -> None:
    edit = edit_of(random_model_folder, "none")
    architecture = discover(AutoModelForCausalLM.from_pretrained(random_model_folder))
    write_edit_file(tmp_path / "edit", random_model_folder, architecture, edit, made_from())
    other = tmp_path / "other"
    shutil.copytree(random_model_folder, other)
    shard = next(p for p in sorted(other.glob("*.safetensors")) if any("down_proj" in name for name in load_file(p)))
    tensors = load_file(shard)
    name = next(name for name in tensors if "down_proj" in name)
    tensors[name].view(-1)[0] += 1
    save_file(tensors, shard, metadata={"format": "pt"})
    with pytest.raises(UsageError, match="is not the model that the edit was made for"):
        apply_edit(other, tmp_path / "edit", tmp_path / "out", lambda _: None)
    assert not (tmp_path / "out").exists()
    for contents in (b"", b"no tensors", (random_model_folder / "config.json").read_bytes(), shard.read_bytes()):
        (tmp_path / "wrong").write_bytes(contents)
        with pytest.raises(UsageError, match="is not an edit"):
            apply_edit(random_model_folder, tmp_path / "wrong", tmp_path / "out", lambda _: None)
    with pytest.raises(UsageError, match="there is no file"):
        apply_edit(random_model_folder, tmp_path / "nothing", tmp_path / "out", lambda _: None)


@pytest.mark.slow
def test_a_finished_job_is_exported_in_every_format_and_made_again(
    organism: Path, finished: Path, tmp_path: Path
) -> None:
    workspace = tmp_path / "runs"
    shutil.copytree(finished, workspace, symlinks=True)
    job = only_job(workspace)
    merged = (job / "export").resolve()
    arguments = ["run", *job_arguments(organism), "--workspace", workspace, "--trials", 20]
    told = abliterate(*arguments, "--export-format", "adapter").check()
    assert (job / "export").resolve().name == f"{merged.name}-adapter"
    assert "40 of 40 responses match" in told.err
    exported = Path(abliterate("export", "--workspace", workspace, "--format", "directions").check().out.strip())
    assert exported.name == f"{merged.name}-directions"
    abliterate("apply", organism / "model", exported / EDIT_FILE, tmp_path / "applied").check()
    weights = (merged / "model.safetensors").read_bytes()
    assert (tmp_path / "applied" / "model.safetensors").read_bytes() == weights
    abliterate("export", "--workspace", workspace, "--format", "gguf").fails(2, "no format gguf", "merged")

    # Elsewhere, from the file, the model and the prompts alone; then again where it is finished.
    again = ["run", *job_arguments(organism), "--workspace", tmp_path / "again", "--reproduce"]
    for wanted in ("all 1 files of weights equal", "nothing to do"):
        assert wanted in abliterate(*again, merged / "reproduce.json").check().err
    remade = only_job(tmp_path / "again")
    assert (remade / "export" / "model.safetensors").read_bytes() == weights
    assert (remade / "export" / "README.md").read_text() == (merged / "README.md").read_text()
    assert not (remade / "study.db").exists()
    status = json.loads(abliterate("status", "--workspace", tmp_path / "again", "--json").check().out)
    assert (status["state"], status["trials"]) == ("finished", {"done": 1, "target": 1, "running": 0})
    assert "the edit was given" in (remade / "report.md").read_text()


@pytest.mark.slow
def test_no_output_calls_prompts_held_out_that_the_direction_or_the_search_has_seen(
    organism: Path, finished: Path, tmp_path: Path
) -> None:
    claim = "prompts that neither the direction nor the search has seen"
    known = (organism / "bad_train.txt").read_text().splitlines()[:3]
    new = (organism / "bad_test.txt").read_text().splitlines()[12:]
    (tmp_path / "report.txt").write_text("\n".join([*known, *new]))
    (tmp_path / "eval.txt").write_text("\n".join((organism / "bad_test.txt").read_text().splitlines()[:12]))
    sets = ("--bad-eval-prompts", tmp_path / "eval.txt", "--bad-report-prompts", tmp_path / "report.txt")
    arguments = ["run", *job_arguments(organism), *sets, "--workspace"]
    workspace = tmp_path / "runs"
    told = abliterate(*arguments, workspace, "--trials", 4).check()
    job = only_job(workspace)
    total = len(known) + len(new) + 20  # and half of the good evaluation prompts
    words = f"{total} prompts, 3 also used by the direction or the search"
    assert f"(on {words})" in told.out
    assert "data.overlap" in told.err
    others = json.loads(abliterate("front", "--workspace", workspace, "--json").check().out)
    number = next((one["number"] for one in others if not one["chosen"]), others[0]["number"])
    other = Path(abliterate("export", "--workspace", workspace, "--trial", number).check().out.strip())
    again = ["--reproduce", job / "export" / "reproduce.json"]
    assert f"(on {words})" in abliterate(*arguments, tmp_path / "again", *again).check().out
    remade = only_job(tmp_path / "again")
    files = (folder / name for folder in (job, remade) for name in ("report.md", "report.html", "export/README.md"))
    for file in (*files, other / "README.md"):
        text = file.read_text()
        assert f"on {words}" in text, file
        assert claim not in text, file
    shown = abliterate("front", "--workspace", workspace).check().out
    assert f"on report prompts, 3 of {total} seen before" in shown
    assert "held-out" not in shown

    # If the claim is true, all of them state it.
    job = only_job(finished)
    for name in ("report.md", "report.html", "export/README.md"):
        assert f"on {claim}" in (job / name).read_text().replace("On", "on"), name
    assert "on held-out prompts" in abliterate("front", "--workspace", finished).check().out


@pytest.mark.slow
def test_a_reproduction_from_other_things_is_refused_or_found_different(
    organism: Path, finished: Path, tmp_path: Path
) -> None:
    original = read_reproduction(only_job(finished) / "export" / "reproduce.json")
    arguments = ["run", *job_arguments(organism), "--workspace", tmp_path / "runs", "--reproduce"]
    file = tmp_path / "reproduce.json"

    def reproduce(made: Reproduction, *others: str) -> None:
        file.write_text(made.model_dump_json())
        abliterate(*arguments, file, *others).fails(expected, text)

    expected, text = 1, "are not the original's"
    reproduce(original.model_copy(update={"weights": {"model.safetensors": "0" * 64}}))
    expected, text = 2, "bad_prompts differ from those"
    reproduce(original, "--bad-prompts", str(organism / "good_train.txt"))
    expected, text = 2, "the model differs"
    reproduce(original.model_copy(update={"model": {"sha256": "1" * 64}}))
    file.write_text("{}")
    abliterate(*arguments, file).fails(2, "is not a reproduce.json")
    abliterate(*arguments, tmp_path / "nothing.json").fails(2, "cannot read")


@pytest.mark.slow
def test_the_whole_search_is_made_again_on_request(organism: Path, tmp_path: Path) -> None:
    arguments = ["run", *job_arguments(organism), "--workspace"]
    abliterate(*arguments, tmp_path / "first", "--trials", 4, "--set", "startup_trials=2").check()
    made = read_reproduction(only_job(tmp_path / "first") / "export" / "reproduce.json")
    # Warn of other versions before hours are spent.
    other = made.model_copy(update={"versions": {**made.versions, "torch": "1.0"}})
    (tmp_path / "other.json").write_text(other.model_dump_json())
    again = ("--reproduce", tmp_path / "other.json", "--with-search")
    told = abliterate(*arguments, tmp_path / "second", *again).check()
    assert re.search(r"warning: torch was 1\.0, is \d", told.err)
    assert "all 1 files of weights equal" in told.err
    assert [event["number"] for event in events(tmp_path / "second") if event["event"] == "trial"] == list(range(4))
    first, second = (stored_trials(tmp_path / name) for name in ("first", "second"))
    assert second == first


@pytest.mark.slow
def test_gates_keep_a_result_from_being_delivered(organism: Path, finished: Path, tmp_path: Path) -> None:
    workspace, target = tmp_path / "runs", tmp_path / "target"
    to = ("--upload", target.as_uri())
    # One edit with almost no effect.
    one = ("--seed", 5, "--trials", 1, "--set", "search.known_points=false")
    poor = ["run", *job_arguments(organism), "--workspace", workspace, *one]
    abliterate(*poor, *to, "--max-refusals", "10").fails(5, "max_refusals is 10", "not delivered")
    figures = json.loads((only_job(workspace) / "figures" / "base.json").read_text())
    assert figures["refusals"] == 20
    assert not target.exists()
    status = json.loads(abliterate("status", "--workspace", workspace, "--json").check().out)
    assert (status["state"], Path(status["export"]).is_dir()) == ("finished", True)
    assert "max_refusals" in status["reason"]
    shutil.rmtree(workspace)
    shutil.copytree(finished, workspace, symlinks=True)
    edited = read_reproduction(only_job(workspace) / "export" / "reproduce.json").edited
    arguments = ["run", *job_arguments(organism), "--workspace", workspace, "--trials", 20]
    abliterate(*arguments, "--max-kl", "0.0000001").fails(5, "max_kl is 1e-07")
    abliterate("upload", "--workspace", workspace, *to).fails(5, "max_kl is 1e-07")
    abliterate(*arguments, *to, "--max-refusals", str(edited.refusals), "--max-kl", str(edited.kl)).check()
    assert target.exists()


@pytest.mark.slow
def test_a_job_is_resumed_and_delivered_from_its_folder_alone(organism: Path, finished: Path, tmp_path: Path) -> None:
    workspace = tmp_path / "runs"
    shutil.copytree(finished, workspace, symlinks=True)
    # The prompt files are gone; the model is in its place.
    text = (only_job(workspace) / "job.json").read_text()
    (only_job(workspace) / "job.json").write_text(text.replace(str(organism / "bad"), str(tmp_path / "gone" / "bad")))
    abliterate("resume", "--workspace", workspace, "--trials", 22).check()
    status = json.loads(abliterate("status", "--workspace", workspace, "--json").check().out)
    assert status["trials"]["done"] == 22
    other = next(best["number"] for best in status["best"] if best["number"] != status["chosen"])
    target = tmp_path / "other"
    abliterate("upload", "--workspace", workspace, "--trial", other, "--upload", target.as_uri()).check()
    assert read_reproduction(target / "reproduce.json").trial.number == other
    abliterate("upload", "--workspace", workspace).fails(2, "no delivery target")
    (tmp_path / "file").write_text("in the way")
    blocked = f"file://{tmp_path}/file/below"
    result = abliterate("resume", "--workspace", workspace, "--upload", blocked)
    result.fails(6, "cannot write")
    command = re.search(r"to continue the delivery, run: abliterate (.+)", result.err)
    assert command is not None
    (tmp_path / "file").unlink()
    abliterate(*command[1].split()).check()
    assert (tmp_path / "file" / "below" / "model.safetensors").exists()


@pytest.mark.slow
def test_a_job_is_not_continued_with_another_model(organism: Path, finished: Path, tmp_path: Path) -> None:
    workspace, other = tmp_path / "runs", tmp_path / "other"
    shutil.copytree(finished, workspace, symlinks=True)
    shutil.copytree(organism / "model", other)
    (other / "generation_config.json").write_text("{}")
    record = only_job(workspace) / "job.json"
    record.write_text(record.read_text().replace(str(organism / "model"), str(other)))
    abliterate("resume", "--workspace", workspace, "--trials", 22).fails(2, "has changed")
    export = only_job(workspace) / "exports"
    shutil.rmtree(export)
    abliterate("export", "--workspace", workspace).fails(2, "has changed")
