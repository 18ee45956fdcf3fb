"""The export: files written, files kept, refusals; and its delivery."""

from __future__ import annotations

import json
import shutil
import subprocess
import tempfile
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM

from job.architectures.structure import discover
from job.edits.hooks import Intervention
from job.errors import (
    DeliveryError,
    ExportMismatchError,
    ImpossibleJobError,
    MachineError,
    UnsupportedArchitectureError,
)
from job.export.merged import Edit, build_manifest, seal_made, write_weights
from job.export.shards import WrittenShards
from job.export.verification import compare_answers
from job.generation.answer import Answer
from job.generation.forward import RowTrials, first_logits
from job.model.safetensors_files import Checkpoint
from job.numerics.basis import Basis
from job.records import EditParameters, Manifest
from job.storage.atomic import read_record
from job.storage.exports import DONE, is_sealed
from job.transfer.folders import deliver
from tests.edits import plain_edit
from tests.helpers import made_from
from tests.integration.edits.test_hooks import EDITS, basis_for, kernel

PROMPTS = [[7, 8, 9, 10, 11], [12, 13, 14]]


def written(source: Path, folder: Path, mode: str = "none", index: int = 0) -> tuple[Edit, WrittenShards]:
    model = AutoModelForCausalLM.from_pretrained(source)
    edit = Edit(EDITS[index], basis_for(model), mode)  # type: ignore[arg-type]  # a mode's name
    return edit, write_weights(source, folder, discover(model), edit, lambda _: None)


def write(source: Path, folder: Path, mode: str = "none", index: int = 0) -> Edit:
    edit, shards = written(source, folder, mode, index)
    shards.verify()
    return edit


@pytest.mark.parametrize("mode", ["none", "pre", "full", "column"])
def test_the_written_model_is_the_hooked_one(random_model_folder: Path, tmp_path: Path, mode: str) -> None:
    edit = write(random_model_folder, tmp_path / "export", mode)
    base = AutoModelForCausalLM.from_pretrained(random_model_folder).eval()
    with Intervention(base, discover(base), edit.basis, edit.mode) as intervention:
        rows = RowTrials(torch.zeros(2, dtype=torch.long), intervention.activate([edit.parameters]))
        hooked = first_logits(base, PROMPTS, rows)
    written = first_logits(AutoModelForCausalLM.from_pretrained(tmp_path / "export").eval(), PROMPTS)
    torch.testing.assert_close(written, hooked, rtol=0, atol=2e-5)
    assert float((written - first_logits(base, PROMPTS)).abs().max()) > 0.01


def test_files_keep_names_shapes_and_all_that_is_not_edited(random_model_folder: Path, tmp_path: Path) -> None:
    write(random_model_folder, tmp_path, index=3)  # edits attention outputs only
    shards = sorted(path.name for path in random_model_folder.glob("*.safetensors"))
    assert len(shards) > 1
    assert shards == sorted(path.name for path in tmp_path.glob("*.safetensors"))
    changed = set()
    for name in shards:
        before, after = load_file(random_model_folder / name), load_file(tmp_path / name)
        assert before.keys() == after.keys()
        changed |= {key for key in before if not torch.equal(before[key], after[key])}
    # The kernel of this edit peaks at layer 1 and ends 2 layers away.
    expected = {f"model.layers.{i}.self_attn.o_proj.{part}" for i in (0, 1, 2) for part in ("weight", "bias")}
    assert changed == expected
    assert (tmp_path / "chat_template.jinja").exists()
    assert (tmp_path / "model.safetensors.index.json").exists()


def test_low_precision_is_rounded_once_from_the_exact_edit(random_model_folder: Path, tmp_path: Path) -> None:
    source = tmp_path / "bf16"
    AutoModelForCausalLM.from_pretrained(random_model_folder, dtype="bfloat16").save_pretrained(source)
    edit = write(source, tmp_path / "export", "full")
    model = AutoModelForCausalLM.from_pretrained(source)
    from job.numerics.ablation import edit_weight
    from job.numerics.rounding import rounded_along

    name = "model.layers.1.mlp.down_proj.weight"
    direction = edit.basis.select(1.3, 1)[0] @ edit.basis.candidates.double()
    weight = dict(model.named_parameters())[name].detach()
    ablation = plain_edit(direction, torch.tensor([0.7 - 0.35 / 4]))
    exact = edit_weight(weight, ablation, "full")
    expected = rounded_along(exact, ablation.read.to(exact), torch.bfloat16)
    assert torch.equal(load_file(tmp_path / "export" / "model.safetensors")[name], expected)


def test_the_same_edit_gives_the_same_bytes_and_a_crash_is_made_good(random_model_folder: Path, tmp_path: Path) -> None:
    for name in ("a", "b"):
        write(random_model_folder, tmp_path / name)
    first = build_manifest(tmp_path / "a")
    assert first == build_manifest(tmp_path / "b")
    # After a crash: a half-written shard under a temporary name, a shard missing, no mark.
    shard = sorted((tmp_path / "b").glob("*.safetensors"))[1]
    shutil.move(shard, shard.with_name(f".{shard.name}.partial"))
    with shard.with_name(f".{shard.name}.partial").open("rb+") as file:
        file.truncate(100)
    assert not is_sealed(tmp_path / "b")
    write(random_model_folder, tmp_path / "b")
    assert build_manifest(tmp_path / "b") == first


@pytest.mark.parametrize(("position", "named"), [(-1, "tensor model.* in .*"), (30, ".*safetensors")])
def test_verification_finds_a_single_wrong_bit(
    random_model_folder: Path, tmp_path: Path, position: int, named: str
) -> None:
    _, shards = written(random_model_folder, tmp_path)
    shards.verify()
    shard = sorted(tmp_path.glob("*.safetensors"))[0]
    data = bytearray(shard.read_bytes())
    data[position] ^= 1
    shard.write_bytes(data)
    with pytest.raises(ExportMismatchError, match=f"^{named} does not hold what was written"):
        shards.verify()
    shard.unlink()
    with pytest.raises(ExportMismatchError, match="cannot be read back: No such file"):
        shards.verify()


def test_answers_may_part_ways_at_ties_only() -> None:
    same = Answer([1, 2, 3], [5.0, 5.0, 5.0, 5.0])
    assert compare_answers([same], [Answer([1, 2, 3], [4.0] * 4)]) == 0
    assert compare_answers([same], [Answer([1, 9], [5.0, 1e-5, 2.0])]) == 1
    with pytest.raises(ExportMismatchError, match="from token 1 on"):
        compare_answers([same], [Answer([1, 9], [5.0, 0.5, 2.0])])
    with pytest.raises(ExportMismatchError, match="from token 2 on"):
        compare_answers([same], [Answer([1, 2], [5.0, 5.0, 5.0])])


def test_the_seal_comes_last_and_breaks_with_the_manifest(random_model_folder: Path, tmp_path: Path) -> None:
    write(random_model_folder, tmp_path)
    assert not is_sealed(tmp_path)
    seal_made(tmp_path, made_from(), random_model_folder)
    assert is_sealed(tmp_path)
    manifest = read_record(tmp_path / "manifest.json", Manifest)
    assert manifest.files["README.md"].size == (tmp_path / "README.md").stat().st_size
    sums = dict(reversed(line.split("  ")) for line in (tmp_path / "SHA256SUMS").read_text().splitlines())
    assert sums.keys() == manifest.files.keys() - {"SHA256SUMS"}
    assert all(manifest.files[name].sha256 == sha for name, sha in sums.items())
    subprocess.run(["sha256sum", "--quiet", "-c", "SHA256SUMS"], cwd=tmp_path, check=True)
    weights = {name for name in manifest.files if name.endswith(".safetensors")}
    assert json.loads((tmp_path / "reproduce.json").read_text())["weights"].keys() == weights
    assert DONE not in manifest.files
    (tmp_path / "manifest.json").write_text(json.dumps({"version": 1, "files": {}}))
    assert not is_sealed(tmp_path)
    write(random_model_folder, tmp_path)
    assert not is_sealed(tmp_path)


def with_draft_heads(model: Path, folder: Path) -> dict[str, torch.Tensor]:
    """Copy a model and add what transformers does not load: a layer behind the last, and draft heads by other names."""
    shutil.copytree(model, folder)
    heads = {
        "model.layers.3.eh_proj.weight": torch.randn(32, 64),
        "model.layers.3.self_attn.o_proj.weight": torch.randn(32, 32),
        "mtp.layers.0.mlp.down_proj.weight": torch.randn(32, 48).to(torch.bfloat16),
        "mtp.norm.weight": torch.randn(32),
    }
    save_file(heads, folder / "model-mtp.safetensors")
    index = json.loads((folder / "model.safetensors.index.json").read_text())
    index["weight_map"].update(dict.fromkeys(heads, "model-mtp.safetensors"))
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps({**config, "num_nextn_predict_layers": 1}))
    return heads


def test_draft_heads_are_kept_byte_for_byte_and_the_card_says_that_none_is_missing(
    random_model_folder: Path, tmp_path: Path
) -> None:
    heads = with_draft_heads(random_model_folder, tmp_path / "model")
    write(tmp_path / "model", tmp_path / "export")
    kept = load_file(tmp_path / "export" / "model-mtp.safetensors")
    assert kept.keys() == heads.keys()
    assert all(torch.equal(kept[name], tensor) and kept[name].dtype == tensor.dtype for name, tensor in heads.items())
    count = len(json.loads((tmp_path / "export" / "model.safetensors.index.json").read_text())["weight_map"])
    promise = f"None of the base model's {count} tensors is missing."
    seal_made(tmp_path / "export", made_from(), tmp_path / "model")
    assert promise in (tmp_path / "export" / "README.md").read_text()
    del kept["mtp.norm.weight"]
    save_file(kept, tmp_path / "export" / "model-mtp.safetensors")
    seal_made(tmp_path / "export", made_from(), tmp_path / "model")
    assert "is missing" not in (tmp_path / "export" / "README.md").read_text()
    for other in ("adapter", "directions"):
        seal_made(tmp_path / "export", made_from(format=other), tmp_path / "model")
        assert "is missing" not in (tmp_path / "export" / "README.md").read_text()


def test_an_edit_too_strong_for_weights_is_refused(random_model_folder: Path, tmp_path: Path) -> None:
    architecture = discover(AutoModelForCausalLM.from_pretrained(random_model_folder))
    kernels = dict.fromkeys(("attention", "mlp"), kernel(1e300))
    edit = Edit(EditParameters(direction_index=1.0, kernels=kernels), Basis.single(torch.eye(3, 32)), "none")
    with pytest.raises(ImpossibleJobError, match="too strong"):
        write_weights(random_model_folder, tmp_path, architecture, edit, lambda _: None)
    assert list(tmp_path.iterdir()) == []


def test_bad_checkpoints_are_refused(random_model_folder: Path, tmp_path: Path) -> None:
    architecture = discover(AutoModelForCausalLM.from_pretrained(random_model_folder))
    edit = Edit(EDITS[0], Basis.single(torch.eye(3, 32)), "none")
    with pytest.raises(ImpossibleJobError, match="holds the base model"):
        write_weights(random_model_folder, random_model_folder, architecture, edit, lambda _: None)
    copy = tmp_path / "copy"
    shutil.copytree(random_model_folder, copy)
    shard = sorted(copy.glob("*.safetensors"))[0]
    shard.write_bytes(shard.read_bytes()[:-10])
    with pytest.raises(ImpossibleJobError, match="is damaged"):
        Checkpoint(copy)
    shard.unlink()
    with pytest.raises(ImpossibleJobError, match=f"lacks {shard.name}"):
        Checkpoint(copy)
    pickled = tmp_path / "pickled"
    pickled.mkdir()
    (pickled / "pytorch_model.bin").write_bytes(b"")
    with pytest.raises(ImpossibleJobError, match="no safetensors"):
        Checkpoint(pickled)


def test_checkpoints_without_the_writers_as_floats_are_refused(random_model_folder: Path, tmp_path: Path) -> None:
    architecture = discover(AutoModelForCausalLM.from_pretrained(random_model_folder))
    writer = architecture.writers[0].parameter
    save_file({"other": torch.ones(2)}, tmp_path / "model.safetensors")
    with pytest.raises(UnsupportedArchitectureError, match="hold no tensor"):
        Checkpoint(tmp_path).require_writers(architecture)
    save_file({writer: torch.ones(2, dtype=torch.int8)}, tmp_path / "model.safetensors")
    with pytest.raises(UnsupportedArchitectureError, match="stored as I8"):
        Checkpoint(tmp_path).require_writers(architecture)


def test_an_export_onto_a_file_is_a_machine_error(random_model_folder: Path, tmp_path: Path) -> None:
    (tmp_path / "file").write_text("in the way")
    with pytest.raises(MachineError, match="cannot write"):
        write(random_model_folder, tmp_path / "file" / "export")


@pytest.fixture
def sealed(random_model_folder: Path, tmp_path: Path) -> Path:
    write(random_model_folder, tmp_path / "export")
    seal_made(tmp_path / "export", made_from(), random_model_folder)
    return tmp_path / "export"


def test_delivery_copies_all_that_the_manifest_names_and_replaces_an_earlier_one(
    sealed: Path, random_model_folder: Path, tmp_path: Path
) -> None:
    target = tmp_path / "a folder" / "model"
    uri = target.as_uri()
    deliver(sealed, uri)
    names = {*read_record(sealed / "manifest.json", Manifest).files, "manifest.json"}
    assert {path.name for path in target.iterdir()} == names
    AutoModelForCausalLM.from_pretrained(target)
    written = (target / "README.md").stat().st_mtime_ns
    deliver(sealed, uri)  # already delivered
    assert (target / "README.md").stat().st_mtime_ns == written
    write(random_model_folder, sealed, index=1)
    seal_made(sealed, made_from(behaviour="another"), random_model_folder)
    deliver(sealed, uri)
    assert "- removed: another\n" in (target / "README.md").read_text()
    assert list(tmp_path.glob("a folder/.*")) == []


def test_delivered_weights_share_the_disk_with_the_export_and_texts_do_not(sealed: Path, tmp_path: Path) -> None:
    target = tmp_path / "target"
    deliver(sealed, target.as_uri())
    for path in target.iterdir():
        assert path.samefile(sealed / path.name) == (path.suffix == ".safetensors"), path
    before = read_record(sealed / "manifest.json", Manifest)
    deliver(sealed, target.as_uri())
    write_weights_again = sorted(sealed.glob("*.safetensors"))[0]
    write_weights_again.unlink()  # what a later export does to its files
    assert (target / write_weights_again.name).stat().st_size == before.files[write_weights_again.name].size


def test_delivery_to_another_file_system_copies(sealed: Path) -> None:
    memory = Path("/dev/shm")
    if not memory.is_dir() or memory.stat().st_dev == sealed.stat().st_dev:
        # On one file system links replace copies; only root can mount another one.
        pytest.skip("there is one file system only")
    with tempfile.TemporaryDirectory(dir=memory) as folder:
        target = Path(folder) / "model"
        deliver(sealed, target.as_uri())
        assert json.loads((target / "manifest.json").read_text()) == json.loads((sealed / "manifest.json").read_text())


def test_delivery_never_overwrites_what_it_did_not_bring(sealed: Path, tmp_path: Path) -> None:
    target = tmp_path / "target"
    target.mkdir()
    (target / "thesis.txt").write_text("years of work")
    with pytest.raises(DeliveryError, match="holds something else"):
        deliver(sealed, target.as_uri())
    assert [path.name for path in target.iterdir()] == ["thesis.txt"]
    (tmp_path / "file").write_text("in the way")
    with pytest.raises(DeliveryError, match="holds something else"):
        deliver(sealed, (tmp_path / "file").as_uri())
    with pytest.raises(DeliveryError, match="cannot write"):
        deliver(sealed, (tmp_path / "file" / "below").as_uri())


def test_a_delivery_beside_strange_files_is_not_replaced(sealed: Path, tmp_path: Path) -> None:
    target = tmp_path / "target"
    deliver(sealed, target.as_uri())
    (target / "notes.txt").write_text("mine")
    (target / "README.md").write_text("changed")
    with pytest.raises(DeliveryError, match="holds something else"):
        deliver(sealed, target.as_uri())
    assert (target / "notes.txt").exists()
