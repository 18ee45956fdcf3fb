"""Learned directions in the run folder and in exports."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from safetensors.torch import save

from job.directions.learned import (
    EXPORTED,
    export_learned,
    import_learned,
    keep_learned,
    learned_file,
    parse_learned,
    read_learned,
)
from job.errors import JobError, UsageError
from job.numerics.basis import DirectionPath
from job.records import EditParameters, LearnedDirections
from job.storage.run_folder import RunFolder


def kept(folder: RunFolder) -> EditParameters:
    generator = torch.Generator().manual_seed(0)
    name = keep_learned(folder, DirectionPath(torch.randn(2, 3, 1, 8, generator=generator)))
    strengths = {"attention": [[0.1]] * 3, "mlp": [[0.2]] * 3}
    edit = {"direction_index": None, "kernels": {}, "layer_strengths": strengths}
    return EditParameters.model_validate({**edit, "directions": LearnedDirections(sha256=name, position=0.5)})


def test_directions_are_named_by_their_hash_and_go_with_an_export_and_back(tmp_path: Path) -> None:
    folder, other = RunFolder(tmp_path / "one"), RunFolder(tmp_path / "two")
    edit = kept(folder)
    assert kept(folder) == edit
    assert edit.directions is not None
    name, export = edit.directions.sha256, tmp_path / "export"
    export.mkdir()
    export_learned(folder, edit, export)
    import_learned(other, edit, export)
    assert torch.equal(read_learned(other, name).directions, read_learned(folder, name).directions)
    plain = EditParameters(direction_index=0.0, kernels={})
    import_learned(RunFolder(tmp_path / "three"), plain, export)
    export_learned(folder, plain, export)
    assert not (export / EXPORTED).exists()
    with pytest.raises(UsageError, match="does not hold the directions"):
        import_learned(RunFolder(tmp_path / "three"), edit, export)


def test_damaged_and_missing_directions_are_one_clear_error(tmp_path: Path) -> None:
    folder = RunFolder(tmp_path)
    edit = kept(folder)
    assert edit.directions is not None
    name, export = edit.directions.sha256, tmp_path / "export"
    export.mkdir()
    file = learned_file(folder, name)
    whole = file.read_bytes()
    for contents in (whole[:-1], whole[:-4] + b"\0\0\0\0", b""):
        file.write_bytes(contents)
        with pytest.raises(JobError, match="missing or damaged"):
            read_learned(folder, name)
        with pytest.raises(JobError, match="missing or damaged"):
            export_learned(folder, edit, export)
    assert not (export / EXPORTED).exists()
    file.unlink()
    with pytest.raises(JobError, match="missing or damaged"):
        read_learned(folder, name)


@pytest.mark.parametrize(
    "contents",
    [
        save({"other": torch.zeros(1, 1, 1, 2)}),
        save({"path": torch.zeros(2, 2)}),
        save({"path": torch.zeros(1, 1, 1, 2, dtype=torch.long)}),
        save({"path": torch.full((1, 1, 1, 2), torch.nan)}),
        b"no tensors",
    ],
)
def test_what_holds_no_directions_is_refused_whatever_its_hash(contents: bytes) -> None:
    import hashlib

    with pytest.raises(ValueError, match=r"no learned directions|not have the shape of directions"):
        parse_learned(contents, hashlib.sha256(contents).hexdigest())
