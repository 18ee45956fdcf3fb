"""The dtype on a CPU: the fast one, if memory suffices."""

from __future__ import annotations

import json
import shutil
from functools import cache
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from job.config.load import load_settings
from job.preflight.conclusion import conclude
from job.preflight.data_checks import DataFindings, examine_data
from job.preflight.inputs import PreflightInputs
from job.preflight.limits import Memory
from job.preflight.machine_checks import MachineFindings
from job.preflight.model_checks import ModelFindings, examine_model
from job.preflight.readings import MachineReading
from job.preflight.selftest import Exercise, exercise
from job.preflight.survey import Survey
from tests.helpers import abliterate, job_arguments, only_job

SLOW_IN_HALF = Exercise(device="cpu", flops=24e9, half_flops=0.5e9, bandwidth=1e10)
FAST_IN_HALF = Exercise(device="cpu", flops=24e9, half_flops=40e9, bandwidth=1e10)


@pytest.fixture(scope="module")
def half(organism: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Return the organism with its weights in bfloat16."""
    folder = tmp_path_factory.mktemp("half") / "organism"
    shutil.copytree(organism, folder)
    weights = folder / "model" / "model.safetensors"
    tensors = {name: tensor.to(torch.bfloat16) for name, tensor in load_file(weights).items()}
    save_file(tensors, weights, {"format": "pt"})
    config = folder / "model" / "config.json"
    config.write_text(json.dumps({**json.loads(config.read_text()), "dtype": "bfloat16"}))
    return folder


def concluded(organism: Path, workspace: Path, measured: Exercise, memory: int, **loading: Any) -> Survey:
    """Return preflight's conclusion for a job on an organism and a CPU with this memory."""
    files = {"good": "good_train", "bad": "bad_train", "good_eval": "good_test", "bad_eval": "bad_test"}
    options: dict[str, Any] = {f"{name}_prompts": str(organism / f"{file}.txt") for name, file in files.items()}
    options |= {"model": str(organism / "model"), "workspace": str(workspace), "probe_seconds": 0, "loading": loading}
    inputs, model, data = examined(json.dumps(options))
    reading = MachineReading(memory=Memory(total=memory, available=memory))
    return conclude(inputs, model, data, MachineFindings((), reading, measured))


@cache
def examined(options: str) -> tuple[PreflightInputs, ModelFindings, DataFindings]:
    """Return what preflight finds without regard to the machine; options are JSON."""
    inputs = PreflightInputs(load_settings(json.loads(options)).settings)
    data = examine_data(inputs)
    return inputs, examine_model(inputs, None, lambda: data), data


def told(conclusion: Survey) -> list[tuple[str, str]]:
    return [(check.status, check.measured) for check in conclusion.checks if check.name == "model.dtype"]


def test_half_precision_is_computed_in_float32_on_a_cpu_without_units_for_it(half: Path, tmp_path: Path) -> None:
    found = concluded(half, tmp_path, SLOW_IN_HALF, 2**34)
    assert found.plan is not None
    assert found.plan.dtype == "float32"
    assert 'loading.dtypes = ["float32"]' in found.plan.settings
    assert told(found) == [("ok", "float32: 24 GFLOP/s in float32, 0.5 in bfloat16")]
    asked = concluded(half, tmp_path, SLOW_IN_HALF, 2**34, dtypes=["float32"])
    assert asked.plan is not None
    assert found.plan.devices == asked.plan.devices  # its memory is planned for


def test_it_is_left_where_the_cpu_is_fast_where_it_is_asked_for_and_where_nothing_is_half(
    half: Path, organism: Path, tmp_path: Path
) -> None:
    for found in (
        concluded(half, tmp_path, FAST_IN_HALF, 2**34),
        concluded(half, tmp_path, SLOW_IN_HALF, 2**34, dtypes=["bfloat16"]),
        concluded(organism, tmp_path, SLOW_IN_HALF, 2**34),
    ):
        assert found.plan is not None
        assert found.plan.dtype is None
        assert told(found) == []


def test_a_model_that_does_not_fit_in_float32_is_left_as_it_is_with_a_warning(half: Path, tmp_path: Path) -> None:
    fits, too_little = 2**34, 0
    while fits - too_little > 2**17:  # below the extra size of the weights in float32
        memory = (fits + too_little) // 2
        if concluded(half, tmp_path, SLOW_IN_HALF, memory).plan is None:
            too_little = memory
        else:
            fits = memory
    found = concluded(half, tmp_path, SLOW_IN_HALF, fits)
    assert found.plan is not None
    assert found.plan.dtype is None
    assert [status for status, _ in told(found)] == ["warn"]


def test_a_job_is_computed_in_what_is_measured_to_be_fast_and_exported_as_its_files_are(
    half: Path, tmp_path: Path
) -> None:
    dtype = "float32" if exercise("cpu", seconds=0.1).prefers_float32 else "bfloat16"
    command = ("run", *job_arguments(half), "--workspace", tmp_path / "runs", "--trials", 2)
    first = abliterate(*command).check()
    assert f"loaded in {dtype}" in first.err
    job = only_job(tmp_path / "runs")
    assert json.loads((job / "job.json").read_text())["resolution"]["dtype"] == dtype
    weights = load_file(next(job.glob("exports/*/model.safetensors")))
    assert {tensor.dtype for tensor in weights.values()} == {torch.bfloat16}
