"""The planned memory of the hooks' tables against what the hooks hold, and in the plan of a large model."""

from __future__ import annotations

import gc

import pytest
import torch

from job.architectures.structure import discover
from job.edits.hooks import Intervention
from job.numerics.ablation import RowNormalization
from job.numerics.basis import Basis, orthonormal_basis
from job.preflight.checks import GIB
from job.preflight.gpu_table import parse_on
from job.preflight.memory_plan import MemoryPlan, Workload, plan
from job.preflight.model_facts import ModelFacts
from job.preflight.table_memory import EditTables, batch_bytes, product_bytes
from job.records import EditParameters, KernelParameters
from tests.unit.preflight.test_activation_memory import build, facts_of
from tests.unit.preflight.test_memory_plan import qwen

MODES: tuple[RowNormalization, ...] = ("none", "pre", "full", "column")


def tensors_alive() -> int:
    """Return the bytes of all tensors' storages."""
    gc.collect()
    found = [one for one in gc.get_objects() if type(one) is torch.Tensor]
    return sum({one.untyped_storage().data_ptr(): one.untyped_storage().nbytes() for one in found}.values())


@pytest.mark.parametrize("mode", MODES)
def test_hooks_hold_what_is_planned(mode: RowNormalization) -> None:
    model = build("llama", intermediate_size=384)
    facts, count = facts_of(model), 5
    directions = torch.randn(facts.layers, 3, facts.hidden, dtype=torch.float64)
    basis: Basis = orthonormal_basis(directions, torch.ones(facts.layers, 3))
    kernel = KernelParameters(max_weight=1.0, max_weight_position=1.0, min_weight=0.5, min_weight_distance=5.0)
    edits = [EditParameters(direction_index=None, kernels={"attention": kernel, "mlp": kernel})] * count
    architecture = discover(model)
    before = tensors_alive()
    hooks = Intervention(model, architecture, basis, mode)
    made = tensors_alive() - before
    hooks.activate(edits)
    held = tensors_alive() - before
    tables = EditTables(mode=mode, directions=basis.size, trials=count)
    candidates = facts.layers * 3 * facts.hidden * 8  # shared by all writers
    assert product_bytes(facts, tables) == pytest.approx(made - candidates, rel=0.02)
    assert batch_bytes(facts, tables) == pytest.approx(held - made, rel=0.02)


def llama_70b() -> ModelFacts:
    """Return the facts of a model of 70 billion parameters: 80 layers of 8192, MLPs of 28,672."""
    return qwen(layers=80, hidden=8192, wide=28672, vocab=128256).model_copy(
        update={"heads": 64, "head_dim": 128, "value_dim": 128}
    )


def test_four_directions_of_a_large_model_by_columns_take_seven_gibibytes() -> None:
    facts = llama_70b()
    tables = EditTables(mode="column", directions=4, trials=8)
    assert product_bytes(facts, tables) / GIB == pytest.approx(7.0, abs=0.2)
    assert sum(product_bytes(facts, tables, range(first, first + 40)) for first in (0, 40)) == product_bytes(
        facts, tables
    )
    # Two cards hold the weights; what is left of them has to hold the tables, too.
    reading = parse_on("2xH100-80")
    plain, by_columns = (
        plan(facts, reading, Workload(quantise=False, offload=False, tables=one)) for one in (EditTables(), tables)
    )
    assert isinstance(plain, MemoryPlan)
    assert isinstance(by_columns, MemoryPlan)
    assert sum(device.tables for device in plain.devices) < 0.1 * GIB
    assert sum(device.tables for device in by_columns.devices) > 7 * GIB
    assert by_columns.rows < plain.rows
    assert all(device.total <= device.free for device in by_columns.devices)
