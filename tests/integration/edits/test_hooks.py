"""Hooks: complete, row by row, many trials in one forward."""

from __future__ import annotations

import copy
import dataclasses
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn
from transformers import AutoModelForCausalLM, LlamaConfig, LlamaForCausalLM, PreTrainedModel, Qwen3Config

from job.architectures.structure import discover
from job.architectures.tiny_model import small_twin
from job.data.prompts import Prompt
from job.edits.compile import PreparedWriter, compile_edit, compile_edits, group_writers, split_batches
from job.edits.hooks import HookTables, Intervention
from job.errors import UnsupportedArchitectureError
from job.generation.forward import RowTrials, first_logits
from job.model.loading import load_model
from job.numerics.ablation import RowNormalization, WriterEdit, edit_bias, edit_weight
from job.numerics.basis import Basis, DirectionPath, orthonormal_basis
from job.numerics.weight_kernel import WeightKernel
from job.proof.truth_test import TOLERANCE, inspect_model, inspection, largest_leak
from job.records import COMPONENTS, EditParameters, KernelParameters, LearnedDirections
from job.scoring.prompt_batches import LEAST_PREFIX, PromptBatches
from job.scoring.report_metrics import ReportMetrics
from job.scoring.trial_scorer import TrialScorer
from job.text.refusal_markers import RefusalMarkers
from tests.edits import plain_edit
from tests.helpers import abliterate, loading

LOADING = loading("float32")


def kernel(weight: float, position: float = 1.0, distance: float = 2.0) -> KernelParameters:
    return KernelParameters(
        max_weight=weight, max_weight_position=position, min_weight=weight / 2, min_weight_distance=distance
    )


EDITS = [
    EditParameters(direction_index=1.3, kernels={"attention": kernel(1.2), "mlp": kernel(0.7, 0.5)}),
    EditParameters(direction_index=None, kernels={"attention": kernel(0.4, 2), "mlp": kernel(1.0)}),
    EditParameters(direction_index=0.0, kernels={"attention": kernel(0.0), "mlp": kernel(1.5, 2, 1)}),
    EditParameters(direction_index=2.0, kernels={"attention": kernel(0.9), "mlp": kernel(0.0)}),
]


def basis_for(model: PreTrainedModel) -> Basis:
    generator = torch.Generator().manual_seed(5)
    count, width = model.config.num_hidden_layers, model.config.hidden_size
    return Basis.single(nn.functional.normalize(torch.randn(count, width, generator=generator), dim=1))


def wide_basis_for(model: PreTrainedModel) -> Basis:
    """Return three weighted directions per layer; one layer has only two."""
    generator = torch.Generator().manual_seed(6)
    count, width = model.config.num_hidden_layers, model.config.hidden_size
    directions = nn.functional.normalize(torch.randn(count, 3, width, generator=generator), dim=-1)
    directions[1, 2] = directions[1, 1]
    return orthonormal_basis(directions, torch.tensor([1.0, 0.8, 0.5]).expand(count, 3))


def edit_in_place(model: PreTrainedModel, edit: EditParameters, mode: RowNormalization, basis: Basis) -> None:
    """Edit a model's parameters themselves, as a reference for the hooks."""
    for writer in discover(model).writers:
        module = model.get_submodule(writer.module)
        assert isinstance(module, nn.Linear)
        coefficients, weights = basis.select(edit.direction_index, writer.layer)
        strength = WeightKernel(**dict(edit.kernels[writer.component])).strength(writer.layer)
        strengths = strength * weights * torch.tensor(edit.strengths)
        replace_parameters(module, plain_edit(coefficients @ basis.candidates.double(), strengths), mode)


def replace_parameters(module: nn.Linear, ablation: WriterEdit, mode: RowNormalization) -> None:
    weight = module.weight.detach().clone()
    module.weight.data.copy_(edit_weight(weight, ablation, mode))
    if module.bias is not None:
        module.bias.data.copy_(edit_bias(module.bias.detach(), weight, ablation, mode))


@pytest.mark.parametrize("several", [False, True])
@pytest.mark.parametrize("mode", ["none", "pre", "full", "column"])
def test_hooks_equal_edited_parameters_with_every_row_of_another_trial(
    random_model_folder: Path, mode: RowNormalization, several: bool
) -> None:
    model = AutoModelForCausalLM.from_pretrained(random_model_folder).eval()
    prompts = [[7, 8, 9, 10, 11], [12, 13, 14]]
    basis = (wide_basis_for if several else basis_for)(model)
    edits = [edit.model_copy(update={"strengths": (1.0, 0.7, 0.2)}) for edit in EDITS] if several else EDITS
    with Intervention(model, discover(model), basis, mode) as intervention:
        active = intervention.activate(edits)
        assert active.reasons == (None,) * 4
        together = first_logits(model, prompts * 4, RowTrials(torch.arange(4).repeat_interleave(2), active))
    for index, edit in enumerate(edits):
        edited = AutoModelForCausalLM.from_pretrained(random_model_folder).eval()
        edit_in_place(edited, edit, mode, basis)
        expected = first_logits(edited, prompts)
        torch.testing.assert_close(together[2 * index : 2 * index + 2], expected, rtol=0, atol=2e-5)


def path_for(basis: Basis, seed: int) -> DirectionPath:
    """Return a path of two stages of random directions, orthonormal at each."""
    generator = torch.Generator().manual_seed(seed)
    shape = basis.directions.shape
    random = torch.randn(2 * shape[0], *shape[1:], generator=generator)
    return DirectionPath(orthonormal_basis(random, torch.ones(random.shape[:2])).directions.unflatten(0, (2, -1)))


def edit_by_layer(basis: Basis, learned: LearnedDirections | None, seed: int) -> EditParameters:
    generator = torch.Generator().manual_seed(seed)
    given = torch.rand(2, basis.layers, basis.size, generator=generator).tolist()
    strengths = dict(zip(("attention", "mlp"), given, strict=True))
    return EditParameters.model_validate(
        {"direction_index": None, "kernels": {}, "layer_strengths": strengths, "directions": learned}
    )


def directions_at(basis: Basis, path: DirectionPath, edit: EditParameters, layer: int) -> Tensor:
    """Return the directions that a by-layer edit ablates, [k, d], by their definition."""
    if edit.directions is None:
        return basis.directions[layer].double()
    share = edit.directions.position
    mixed = (1 - share) * path.directions[0, layer] + share * path.directions[1, layer]
    q, r = torch.linalg.qr(mixed.double().T)
    return (q * r.diagonal().sign()).T


@pytest.mark.parametrize("several", [False, True])
@pytest.mark.parametrize("mode", ["none", "pre", "full", "column"])
def test_edits_by_layer_and_with_directions_of_their_own_share_a_batch_with_edits_by_kernels(
    random_model_folder: Path, mode: RowNormalization, several: bool
) -> None:
    model = AutoModelForCausalLM.from_pretrained(random_model_folder).eval()
    architecture, basis = discover(model), (wide_basis_for if several else basis_for)(model)
    paths = {"1" * 64: path_for(basis, 1), "2" * 64: path_for(basis, 2)}
    kernels = [edit.model_copy(update={"strengths": (1.0, 0.7, 0.2)}) for edit in EDITS] if several else EDITS
    places = [("2" * 64, 0.3), None, ("1" * 64, 0.0), ("1" * 64, 1.0), ("2" * 64, 0.75)]
    learned = [place and LearnedDirections(sha256=place[0], position=place[1]) for place in places]
    by_layer = [edit_by_layer(basis, one, seed) for seed, one in enumerate(learned)]
    edits = [by_layer[0], kernels[0], *by_layer[1:], kernels[1]]
    with Intervention(model, architecture, basis, mode, paths.__getitem__) as intervention:
        active = intervention.activate(edits)
        assert active.reasons == (None,) * 7
        together = first_logits(model, [[7, 8, 9, 10]] * 7, RowTrials(torch.arange(7), active))
        again = first_logits(
            model, [[7, 8, 9, 10]], RowTrials(torch.zeros(1, dtype=torch.long), intervention.activate(edits[2:3]))
        )
    torch.testing.assert_close(again[0], together[2], rtol=0, atol=2e-5)
    for edit, found in zip(edits, together, strict=True):
        edited = copy.deepcopy(model)
        if edit.layer_strengths is None:
            edit_in_place(edited, edit, mode, basis)
        else:
            path = paths[edit.directions.sha256 if edit.directions else "1" * 64]
            for writer in architecture.writers:
                strengths = torch.tensor(edit.layer_strengths[writer.component][writer.layer], dtype=torch.float64)
                ablation = plain_edit(directions_at(basis, path, edit, writer.layer), strengths)
                module = edited.get_submodule(writer.module)
                assert isinstance(module, nn.Linear)
                replace_parameters(module, ablation, mode)
        torch.testing.assert_close(found, first_logits(edited, [[7, 8, 9, 10]])[0], rtol=0, atol=2e-5)


def test_learned_directions_that_are_not_there_or_of_another_size_are_refused(random_model_folder: Path) -> None:
    model = AutoModelForCausalLM.from_pretrained(random_model_folder).eval()
    architecture, basis = discover(model), basis_for(model)
    edit = edit_by_layer(basis, LearnedDirections(sha256="1" * 64, position=0.0), 0)
    with pytest.raises(ValueError, match="no learned directions have the hash 111111111111"):
        Intervention(model, architecture, basis, "none").activate([edit])
    wide = path_for(wide_basis_for(model), 1)
    with pytest.raises(ValueError, match="3 directions in"):
        Intervention(model, architecture, basis, "none", lambda _: wide).activate([edit])


@pytest.mark.parametrize("own", [False, True])
@pytest.mark.parametrize("mode", ["none", "pre", "full", "column"])
def test_a_model_of_more_writers_than_are_worked_out_at_once(mode: RowNormalization, own: bool) -> None:
    torch.manual_seed(3)
    sizes = {"vocab_size": 64, "hidden_size": 32, "intermediate_size": 48, "num_attention_heads": 2}
    model = LlamaForCausalLM(LlamaConfig(num_hidden_layers=19, num_key_value_heads=1, **sizes)).eval()
    architecture, basis = discover(model), basis_for(model)
    everywhere = {name: kernel(0.6, 9.5, 20.0) for name in ("attention", "mlp")}
    weaker = {name: kernel(0.2, 9.5, 20.0) for name in ("attention", "mlp")}
    edits = [edit.model_copy(update={"kernels": everywhere}) for edit in EDITS]
    edits += [edit.model_copy(update={"kernels": weaker}) for edit in EDITS[:2]]
    if own:
        edits = [edit.model_copy(update={"direction_index": None}) for edit in edits]
    with Intervention(model, architecture, basis, mode) as intervention:
        assert sorted(writer.parameter for group in intervention._groups for writer in group.writers) == sorted(
            writer.parameter for writer in architecture.writers
        )
        assert len(intervention._groups) > 2
        together = first_logits(model, [[7, 8, 9]] * 6, RowTrials(torch.arange(6), intervention.activate(edits)))
    for edit, found in zip(edits, together, strict=True):
        edited = copy.deepcopy(model)
        edit_in_place(edited, edit, mode, basis)
        torch.testing.assert_close(found, first_logits(edited, [[7, 8, 9]])[0], rtol=0, atol=2e-5)


@pytest.mark.parametrize("mode", ["none", "pre", "full", "column"])
def test_an_edit_compiled_alone_is_the_one_compiled_among_others(
    random_model_folder: Path, mode: RowNormalization
) -> None:
    """Files and adapters compile one edit for one writer, hooks many for many: the numbers must be equal."""
    model = AutoModelForCausalLM.from_pretrained(random_model_folder)
    basis = wide_basis_for(model)
    edits = [edit.model_copy(update={"strengths": (1.0, 0.7, 0.2)}) for edit in EDITS]
    prepared = [
        PreparedWriter.of(
            writer,
            basis.candidates.double(),
            None if mode == "none" else model.get_parameter(writer.parameter).detach(),
            mode,
        )
        for writer in discover(model).writers
    ]
    batches, slots = split_batches(basis, edits)
    assert [len(batch.parameters) for batch in batches] == [3, 1]
    assert slots.tolist() == [0, 3, 1, 2]
    for group in group_writers(basis, prepared):
        compiled = [compile_edits(group, batch) for batch in batches]
        tables = HookTables.of(compiled, len(group.writers))
        for writer, found in zip(group.writers, tables, strict=True):
            one = next(one for one in prepared if one.writer is writer)
            for edit, slot in zip(edits, slots.tolist(), strict=True):
                alone = compile_edit(one, basis, edit)
                rows = slice(slot * basis.size, (slot + 1) * basis.size)
                assert torch.equal(found.read.T[rows], alone.output_read.float())
                torch.testing.assert_close(found.write[rows], alone.output_write.float())
                for table, scale in ((found.output_scale, alone.output_scale), (found.input_scale, alone.input_scale)):
                    assert (table is None) == (scale is None)
                    if table is not None and scale is not None:
                        torch.testing.assert_close(table[slot], scale.float())


def test_no_hook_remains_and_nothing_changes_without_rows(random_model_folder: Path) -> None:
    model = AutoModelForCausalLM.from_pretrained(random_model_folder).eval()
    before = first_logits(model, [[7, 8, 9]])
    with Intervention(model, discover(model), basis_for(model), "full") as intervention:
        intervention.activate(EDITS)
        assert torch.equal(first_logits(model, [[7, 8, 9]]), before)
    assert torch.equal(first_logits(model, [[7, 8, 9]]), before)
    assert not any(module._forward_hooks or module._forward_pre_hooks for module in model.modules())


def test_edits_cannot_be_applied_to_the_wrong_rows_or_after_others(random_model_folder: Path) -> None:
    model = AutoModelForCausalLM.from_pretrained(random_model_folder).eval()
    before = first_logits(model, [[7, 8, 9]])
    with Intervention(model, discover(model), basis_for(model), "none") as intervention:
        former = intervention.activate(EDITS[:1])
        bound = former.all_rows(1, "cpu")
        with bound, pytest.raises(RuntimeError, match="rows of another forward"), former.all_rows(2, "cpu"):
            pass
        with pytest.raises(ValueError, match="2 rows with the trials of 1"):
            first_logits(model, [[7, 8, 9]] * 2, RowTrials(torch.zeros(1, dtype=torch.long), former))
        with bound, pytest.raises(RuntimeError, match="is still running"):
            intervention.activate(EDITS)
        with pytest.raises(ZeroDivisionError), bound:
            raise ZeroDivisionError
        assert torch.equal(first_logits(model, [[7, 8, 9]]), before)
        with bound:  # re-entered
            edited = first_logits(model, [[7, 8, 9]])
        assert not torch.equal(edited, before)
        intervention.activate(EDITS[1:])
        with pytest.raises(RuntimeError, match="active now"), bound:
            pass


def test_every_row_of_every_forward_is_edited_whoever_calls_the_model(random_model_folder: Path) -> None:
    model = AutoModelForCausalLM.from_pretrained(random_model_folder).eval()
    plain = first_logits(model, [[7, 8, 9]] * 3)
    with Intervention(model, discover(model), basis_for(model), "full") as intervention:
        active = intervention.activate(EDITS)
        expected = first_logits(model, [[7, 8, 9]], RowTrials(torch.zeros(1, dtype=torch.long), active))
        with active.on_every_row(model):
            for rows in (3, 1):
                torch.testing.assert_close(model(torch.tensor([[7, 8, 9]] * rows)).logits[:1, -1], expected)
            with pytest.raises(IndexError):
                model(torch.tensor([[10**6]]))
            torch.testing.assert_close(model(torch.tensor([[7, 8, 9]])).logits[:, -1], expected)
        assert torch.equal(first_logits(model, [[7, 8, 9]] * 3), plain)


MARKERS, RESPONSE_TOKENS = RefusalMarkers(["plate", "sorry"]), 6


def trial_scorer(
    folder: Path, *, system: str | None = None, kl_tokens: int = 1, least_prefix: int = LEAST_PREFIX
) -> TrialScorer:
    loaded = load_model(folder, LOADING, print)
    texts = [f"Where is the {word} kettle kept?" for word in ("old", "new", "red", "very old and blue")]
    prompts = [Prompt(user=text, system=system) for text in texts]
    batches = PromptBatches.of(loaded, prompts, prompts[::-1], 64, least_prefix=least_prefix)
    return TrialScorer.measured(batches, MARKERS, RESPONSE_TOKENS, kl_tokens)


def report_metrics(scorer: TrialScorer) -> ReportMetrics:
    return ReportMetrics(scorer.batches, MARKERS, RESPONSE_TOKENS, scorer.reference.tokens)


def test_a_trial_scores_the_same_alone_and_in_a_batch(random_model_folder: Path) -> None:
    scorer = trial_scorer(random_model_folder)
    model = scorer.batches.loaded.model
    with Intervention(model, discover(model), basis_for(model), "full") as intervention:
        together = scorer.scores(intervention, EDITS, rows=16)
        alone = [scorer.scores(intervention, [edit], rows=16)[0] for edit in EDITS]
    for one, other in zip(alone, together, strict=True):
        assert one.refusals == other.refusals
        assert one.kl == pytest.approx(other.kl, rel=1e-4)
    assert len({round(score.kl, 4) for score in together}) == 4  # the trials do differ


def test_a_prefix_is_computed_once_a_trial_under_its_edit_and_changes_no_score(random_model_folder: Path) -> None:
    system = "You are a helpful assistant in the old kitchen."
    on, off = (trial_scorer(random_model_folder, system=system, least_prefix=least) for least in (2, 1000))
    model = on.batches.loaded.model
    forwards: list[tuple[int, int]] = []
    handle = model.register_forward_pre_hook(
        lambda _m, _i, named: forwards.append(tuple(named["input_ids"].shape)), with_kwargs=True
    )
    with Intervention(model, discover(model), basis_for(model), "full") as intervention:
        found = on.scores(intervention, EDITS, rows=8)
        answers = report_metrics(on).responses(intervention.activate(EDITS))
    handle.remove()
    length = len(on.batches.prefix)
    assert length > 8
    # One row per trial; then two prompts of each for the KL divergence, and again for the responses.
    assert forwards[0] == (4, length)
    assert all(shape[1] < length for shape in forwards[1:5])
    model = off.batches.loaded.model
    with Intervention(model, discover(model), basis_for(model), "full") as intervention:
        expected = off.scores(intervention, EDITS, rows=8)
        assert off.batches.prefix == []
        assert [a.tokens for a in answers] == [
            a.tokens for a in report_metrics(off).responses(intervention.activate(EDITS))
        ]
    for one, other in zip(found, expected, strict=True):
        assert one.refusals == other.refusals
        assert one.kl == pytest.approx(other.kl, rel=1e-4)
        assert one.opening == pytest.approx(other.opening, rel=1e-4)


def test_many_trials_are_one_batch_and_not_a_loop(random_model_folder: Path) -> None:
    """With fixed rows per forward, forwards must not grow with K; a loop over trials would multiply them by K."""
    scorer = trial_scorer(random_model_folder)
    model = scorer.batches.loaded.model
    forwards: list[int] = []
    handle = model.register_forward_pre_hook(
        lambda _m, _i, named: forwards.append(len(named["input_ids"])), with_kwargs=True
    )
    counts = {}
    with Intervention(model, discover(model), basis_for(model), "none") as intervention:
        for k in (1, 2, 4):
            forwards.clear()
            # 4 prompts per trial; the same trial k times, so that responses end at the same steps.
            scorer.scores(intervention, [EDITS[0]] * k, rows=16)
            counts[k] = len(forwards)
            assert max(forwards) == 4 * k
    handle.remove()
    assert counts[1] == counts[2] == counts[4]


def test_a_degenerate_edit_is_told_as_a_failed_trial(random_model_folder: Path) -> None:
    scorer = trial_scorer(random_model_folder)
    model = scorer.batches.loaded.model
    # Along a basis vector, full ablation zeroes a row of every weight.
    directions = torch.zeros(model.config.num_hidden_layers, model.config.hidden_size)
    directions[:, 0] = 1.0
    everywhere = KernelParameters(max_weight=1, max_weight_position=0, min_weight=1, min_weight_distance=9)
    whole = EditParameters(direction_index=None, kernels=dict.fromkeys(COMPONENTS, everywhere))
    with Intervention(model, discover(model), Basis.single(directions), "full") as intervention:
        failed, fine = scorer.scores(intervention, [whole, EDITS[2]], rows=16)
    assert failed.reason is not None
    assert "restore a norm" in failed.reason
    assert (failed.refusals, failed.kl) == (4, 100.0)
    assert fine.reason is None


@pytest.mark.parametrize(
    "config",
    [
        LlamaConfig(hidden_size=64, num_hidden_layers=3, attention_bias=True, mlp_bias=True),
        Qwen3Config(hidden_size=64, num_hidden_layers=3, attention_bias=True),
    ],
)
def test_truth_test_passes_and_leaving_out_any_writer_fails_it(config: LlamaConfig) -> None:
    twin = small_twin(config)
    architecture = discover(twin)
    assert largest_leak(twin, architecture)[1] < TOLERANCE
    for left_out in architecture.writers:
        rest = tuple(writer for writer in architecture.writers if writer is not left_out)
        incomplete = dataclasses.replace(architecture, writers=rest)
        layer, share = largest_leak(twin, incomplete)
        assert layer == left_out.layer
        assert share > 100 * TOLERANCE


def test_a_family_that_cannot_be_edited_completely_is_refused_with_the_reason(tmp_path: Path) -> None:
    from transformers import RwkvConfig

    RwkvConfig(num_hidden_layers=2).save_pretrained(tmp_path)  # gates, entry by entry, what a writer has written
    with pytest.raises(UnsupportedArchitectureError, match="still writes"):
        inspect_model(tmp_path)
    assert inspection(tmp_path)["supported"] is False
    result = abliterate("inspect", tmp_path, "--json")
    assert result.code == 3
    assert '"supported": false' in result.out


def test_inspect_names_the_writers_from_the_configuration_alone(random_model_folder: Path, tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text((random_model_folder / "config.json").read_text())
    found = inspection(tmp_path)
    names = dict(AutoModelForCausalLM.from_pretrained(random_model_folder).named_parameters())
    assert found["supported"] is True
    assert found["layers"] == 3
    assert len(found["writers"]) == 6
    for writer in found["writers"]:
        assert names[writer["parameter"]].shape[writer["axis"]] == 32
        assert names[writer["bias"]].shape == (32,)
        assert writer["post_norm"] == []
