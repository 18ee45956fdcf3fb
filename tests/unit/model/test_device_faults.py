"""Out of memory in all its forms, and what a computation holds that has run out of it."""

from __future__ import annotations

import ast
import errno
import gc
import weakref
from collections.abc import Iterator, Mapping
from pathlib import Path

import pytest
import torch

from job.errors import AcceleratorFaultError, MachineError
from job.model.device_faults import (
    Shortage,
    clear_faults,
    halving,
    is_out_of_memory,
    on_device_or_cpu,
    within_memory,
)
from job.numerics.directions import contrastive_pca
from tests.shortage import Short

JOB = Path(__file__).parents[3] / "job"
SHORT = [
    torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB."),
    torch.OutOfMemoryError("HIP out of memory. Tried to allocate 20.00 MiB."),
    torch.AcceleratorError("CUDA error: out of memory\nCUDA kernel errors might be asynchronously reported"),
    torch.AcceleratorError("HIP error: out of memory"),
    RuntimeError("CUDA driver error: out of memory"),
    RuntimeError("CUDA error: CUBLAS_STATUS_ALLOC_FAILED when calling `cublasCreate(handle)`"),
    RuntimeError("cuDNN error: CUDNN_STATUS_ALLOC_FAILED"),
    RuntimeError("cuDNN error: CUDNN_STATUS_INTERNAL_ERROR_DEVICE_ALLOCATION_FAILED"),
    RuntimeError("cusolver error: CUSOLVER_STATUS_ALLOC_FAILED, when calling `cusolverDnCreate(handle)`"),
    RuntimeError("cuFFT error: CUFFT_ALLOC_FAILED"),
    RuntimeError("HIP error: HIPBLAS_STATUS_ALLOC_FAILED when calling `hipblasCreate(handle)`"),
    RuntimeError("rocblas_status_memory_error"),
    RuntimeError("miopenStatusAllocFailed"),
    RuntimeError(
        "[enforce fail at alloc_cpu.cpp:127] DefaultCPUAllocator: can't allocate memory: you tried to allocate"
    ),
    MemoryError(),
    OSError(errno.ENOMEM, "Cannot allocate memory"),
]
OTHERS = [
    torch.AcceleratorError("CUDA error: an illegal memory access was encountered"),
    RuntimeError("CUDA error: CUBLAS_STATUS_EXECUTION_FAILED when calling `cublasGemmEx`"),
    RuntimeError("mat1 and mat2 shapes cannot be multiplied (2x3 and 4x5)"),
    RuntimeError("no more memory of the edit is known"),
    ValueError("out of memory"),
    OSError(errno.ENOSPC, "No space left on device"),
]


@pytest.mark.parametrize("error", SHORT, ids=lambda error: str(error)[:40] or "MemoryError")
def test_every_form_of_out_of_memory_halves_the_work(error: Exception) -> None:
    assert is_out_of_memory(error)
    tried: list[int] = []

    def compute(rows: int) -> int:
        tried.append(rows)
        if rows > 2:
            raise error
        return rows

    told: list[str] = []
    assert halving(8, compute, told.append) == (2, 2)
    assert tried == [8, 4, 2]
    assert told == [f"warning: out of memory: trying again with {rows} rows a forward" for rows in (4, 2)]
    with pytest.raises(MachineError, match="out of memory"), clear_faults():
        raise error


@pytest.mark.parametrize("error", OTHERS, ids=str)
def test_other_errors_are_not_taken_for_it(error: Exception) -> None:
    def fail(_: int = 0) -> None:
        raise error

    assert not is_out_of_memory(error)
    for attempt in (lambda: within_memory(fail), lambda: halving(8, fail, pytest.fail)):
        with pytest.raises(type(error)) as caught:
            attempt()
        assert caught.value is error
    expected = AcceleratorFaultError if isinstance(error, torch.AcceleratorError) else type(error)
    with pytest.raises(expected), clear_faults():
        raise error


def test_where_one_row_is_too_much_the_machine_is_too_small() -> None:
    def fail(_: int) -> None:
        raise MemoryError

    with pytest.raises(MachineError, match="out of memory: none is left"):
        halving(1, fail, pytest.fail)


class Held:
    """Something large that a failing computation holds."""


def test_what_a_computation_held_is_gone_before_memory_is_released() -> None:
    held: list[weakref.ref[Held]] = []

    def fail() -> None:
        large = Held()
        held.append(weakref.ref(large))
        raise torch.OutOfMemoryError("CUDA out of memory.")

    released: list[bool] = []

    def collecting(phase: str, info: dict[str, int]) -> None:
        if phase == "start" and info["generation"] == 2:
            released.append(held[0]() is None)

    gc.callbacks.append(collecting)
    try:
        assert within_memory(fail) == Shortage("CUDA out of memory.")
    finally:
        gc.callbacks.remove(collecting)
    assert released == [True]


def handlers(file: Path) -> Iterator[ast.ExceptHandler]:
    return (node for node in ast.walk(ast.parse(file.read_text())) if isinstance(node, ast.ExceptHandler))


def names(node: ast.AST) -> set[str]:
    named = {part.id for part in ast.walk(node) if isinstance(part, ast.Name)}
    return named | {part.attr for part in ast.walk(node) if isinstance(part, ast.Attribute)}


def test_no_other_place_tells_out_of_memory_or_releases_it_while_an_error_is_handled() -> None:
    for file in JOB.rglob("*.py"):
        if file.name == "device_faults.py":
            continue
        used = names(ast.parse(file.read_text()))
        assert not used & {"is_out_of_memory", "OutOfMemoryError"}, file
        assert not any("release_memory" in names(handler) for handler in handlers(file)), file


@pytest.mark.parametrize("error", ["CUDA error: out of memory", "cusolver error: CUSOLVER_STATUS_ALLOC_FAILED"])
def test_directions_are_computed_on_the_cpu_where_the_device_is_too_small(error: str) -> None:
    torch.manual_seed(0)
    sets = {name: torch.randn(12, 2, 24) for name in ("good", "bad")}

    def solved(sets: Mapping[str, torch.Tensor]) -> torch.Tensor:
        found = contrastive_pca(sets["good"], sets["bad"], n_components=2, alpha=1.0, method="auto")
        return found.directions

    told: list[str] = []
    with Short(lambda name, *_: name.endswith("eigh"), error) as short:
        found = on_device_or_cpu(solved, sets, told.append)
    assert short.left == 0
    assert told == ["warning: out of memory: directions are computed on the CPU"]
    assert torch.equal(found, solved(sets))
