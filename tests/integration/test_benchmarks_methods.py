"""The comparison of methods: edits as hooks against the weights, the kept cells, and an organism with random gains."""

from __future__ import annotations

import argparse
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from torch.nn.functional import normalize
from transformers import AutoModelForCausalLM

from benchmarks import methods
from benchmarks.linear_edits import Choices, Measures, ObliqueHooks, auc
from benchmarks.linear_search import MethodSpace
from benchmarks.methods import compare, moved, table, with_random_gains
from job.architectures.structure import discover
from job.edits.hooks import Intervention
from job.generation.forward import first_logits
from job.model.loading import LoadedModel
from job.numerics.ablation import RowNormalization, edit_bias, edit_weight
from job.numerics.basis import Basis
from job.records import COMPONENTS, EditParameters, KernelParameters
from job.search.space import SearchSpace
from tests.edits import plain_edit
from tests.integration.gradient.test_hooks import loaded_random

STRENGTH, PROMPTS = 0.8, [[7, 8, 9], [12, 13, 14]]


def an_edit(index: float | None) -> EditParameters:
    kernel = KernelParameters(max_weight=STRENGTH, max_weight_position=0, min_weight=STRENGTH, min_weight_distance=9)
    return EditParameters(direction_index=index, kernels=dict.fromkeys(COMPONENTS, kernel))


def some_measures(loaded: LoadedModel) -> tuple[Basis, Measures]:
    """Return random directions, and moments of random rows in the stream and of each writer."""
    generator = torch.Generator().manual_seed(2)
    layers, width = loaded.architecture.layer_count, loaded.architecture.width
    rows = torch.randn(1 + layers, 40, width, generator=generator, dtype=torch.float64)
    moments = rows.mT @ rows
    outputs = {writer.parameter: moments[-1] for writer in loaded.architecture.writers}
    directions = normalize(torch.randn(layers, width, generator=generator), dim=1)
    return Basis.single(directions), Measures({"last": moments[:-1]}, {"last": outputs})


def logits(hooks: Intervention, loaded: LoadedModel, edit: EditParameters) -> torch.Tensor:
    with hooks, hooks.activate([edit]).all_rows(len(PROMPTS), "cpu"):
        return first_logits(loaded.model, PROMPTS)


@pytest.mark.parametrize("mode", ["none", "pre", "full", "column"])
@pytest.mark.parametrize("family", ["llama", "gemma2"])
def test_edits_that_read_what_they_write_are_the_product_s(family: str, mode: RowNormalization) -> None:
    loaded = loaded_random(family, pulled_back="dual")
    basis, found = some_measures(loaded)
    edit = an_edit(0.4)
    own = logits(ObliqueHooks(loaded, basis, mode, found, Choices().of({})), loaded, edit)
    torch.testing.assert_close(own, logits(Intervention(loaded.model, loaded.architecture, basis, mode), loaded, edit))


@pytest.mark.parametrize("index", [None, 0.4])
@pytest.mark.parametrize("reads", ["stream last 0.1", "outputs last 0.1"])
@pytest.mark.parametrize("mode", ["none", "pre", "full", "column"])
@pytest.mark.parametrize("family", ["llama", "gemma2"])
def test_oblique_hooks_are_the_edited_weights(
    family: str, mode: RowNormalization, reads: str, index: float | None
) -> None:
    loaded = loaded_random(family, pulled_back="dual")
    basis, found = some_measures(loaded)
    choice = Choices(norms=(mode,), reads=(reads,)).of({})
    hooked = logits(ObliqueHooks(loaded, basis, mode, found, choice), loaded, an_edit(index))
    for writer in loaded.architecture.writers:
        weight = loaded.model.get_parameter(writer.parameter)
        bias = loaded.model.get_parameter(writer.bias) if writer.bias else None
        pulled, metric = writer.pull_back(basis.candidates, loaded.model.get_parameter)
        written = pulled if metric is None else pulled * metric
        unit = weight if mode in ("pre", "full") else None
        read, written = found.covectors(reads, loaded, writer, basis.candidates, written, unit)
        share = writer.layer if index is None else index
        mix = torch.tensor([1 - share, share], dtype=torch.float64)
        read, written = mix @ read, mix @ written
        edit = plain_edit(read[None] / (read @ written), torch.tensor([STRENGTH]).double())
        edit.write.copy_(STRENGTH * written[None])
        if bias is not None:
            bias.data.copy_(edit_bias(bias.data, weight.data, edit, mode))
        weight.data.copy_(edit_weight(weight.data, edit, mode))
    torch.testing.assert_close(hooked, first_logits(loaded.model, PROMPTS), rtol=0, atol=5e-6)


def test_a_covector_reads_little_of_good_outputs_and_removes_what_is_written() -> None:
    loaded = loaded_random("llama")
    basis, found = some_measures(loaded)
    writer = loaded.architecture.writers[0]
    moments = found.outputs["last"][writer.parameter]
    written = basis.candidates.double()
    read, _ = found.covectors("outputs last 0.01", loaded, writer, basis.candidates, written, None)
    torch.testing.assert_close((read * written).sum(-1), torch.ones(len(written)).double())
    assert bool(((read @ moments * read).sum(-1) < 0.9 * (written @ moments * written).sum(-1)).all())


def test_a_mask_leaves_writers_alone_that_do_not_tell_the_classes_apart() -> None:
    loaded = loaded_random("llama")
    basis, found = some_measures(loaded)
    places = [(writer.component, writer.layer) for writer in loaded.architecture.writers]
    found.auc["outputs"] = dict.fromkeys(places, 0.6)
    choices = Choices(masks=("outputs",))
    hooks, edit = ObliqueHooks(loaded, basis, "none", found, choices.of({})), an_edit(None)
    plain = first_logits(loaded.model, PROMPTS)
    hooks.thresholds = {id(edit): 0.7}
    torch.testing.assert_close(logits(hooks, loaded, edit), plain)
    hooks.thresholds = {id(edit): 0.5}
    assert not torch.allclose(logits(hooks, loaded, edit), plain)
    assert auc(torch.tensor([1.0, 2, 3]), torch.tensor([2.5, 0.5])) == pytest.approx(2 / 3)
    assert auc(torch.tensor([3.0, 4]), torch.tensor([1.0, 2])) == 1


def test_a_method_s_choices_are_parameters_of_the_search_beside_the_product_s() -> None:
    choices = Choices(norms=("none", "full"), masks=("outputs",))
    space = MethodSpace(SearchSpace("wide", 4), choices)
    own = space.distributions().keys() - space.kernels.distributions().keys()
    assert own == {"norms", "threshold"}
    first, second = space.known_points()[:2]
    assert (first["norms"], second["norms"]) == ("none", "full")
    assert choices.of(second) == {"norms": "full", "reads": "same", "keeps": "nothing", "masks": "outputs"}
    assert space.edit(first) == space.kernels.edit(space.kernels.known_points()[0])


def test_a_finished_search_is_kept_and_not_repeated(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[tuple[Choices, int]] = []

    def measured(_bench: object, choices: Choices, _trials: int, seed: int) -> dict[str, float]:
        asked.append((choices, seed))
        if len(asked) == 3:
            raise KeyboardInterrupt
        return {"refusals": 1, "broken": 0, "kl": 0.5 if choices == Choices() else 0.25, "kl_positions": 1.0}

    monkeypatch.setattr(methods, "measured", measured)
    monkeypatch.setattr(methods, "Bench", SimpleNamespace(of=lambda folder: folder))
    only = ["default", "norms full"]
    given = argparse.Namespace(json=tmp_path / "cells.json", only=only, methods="linear", trials=8, seeds=[0, 1])
    with pytest.raises(KeyboardInterrupt):
        compare([tmp_path], given)
    cells = compare([tmp_path], given)
    assert [seed for _, seed in asked] == [0, 0, 1, 1, 1]
    assert len(cells) == 4
    full = table(cells)[-1]
    assert "| 0.50 | 1.00 | 2 of 2 |" in full


def test_the_dual_write_moves_the_stream_least_and_the_other_one_by_its_formula() -> None:
    found = moved(0.5)
    assert found["dual"] == pytest.approx(1.0, abs=0.01)
    # |g²v| / |gv|² for log-normal gains.
    assert found["gain"] == pytest.approx(float(torch.tensor(2 * 0.5**2).exp()), rel=0.1)


@pytest.mark.slow
def test_an_organism_with_random_gains_answers_as_before(organism_of: Callable[[str], Path], tmp_path: Path) -> None:
    lines: list[str] = []
    folder = with_random_gains(organism_of("gemma2"), tmp_path / "gains", 0.5, 0, lines.append)
    assert "400 of 400" in lines[-1]
    model = AutoModelForCausalLM.from_pretrained(folder / "model")
    for writer in discover(model).writers:
        for norm in writer.post_norms:
            assert 0.3 < float((model.get_parameter(norm.parameter).detach() + norm.offset).log().std()) < 0.7
    assert with_random_gains(organism_of("gemma2"), folder, 0.5, 0, lines.append) == folder
