"""Directions, bases and geometry: against definitions, on planted directions and in degenerate cases."""

from __future__ import annotations

import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from job.numerics.basis import Basis, eigenvalue_weights, orthogonalize, orthonormal_basis
from job.numerics.directions import contrastive_pca, mean_difference, probe, project_out, winsorize
from job.numerics.geometry import geometry, projections


def test_mean_difference_is_the_unit_difference_of_means_per_layer() -> None:
    good, bad = torch.randn(7, 3, 16), torch.randn(5, 3, 16) + 1
    found = mean_difference(good, bad)
    expected = torch.nn.functional.normalize(bad.mean(0) - good.mean(0), dim=-1)
    assert found.dtype == torch.float32
    torch.testing.assert_close(found, expected)


def test_mean_difference_survives_low_precision_and_massive_activations() -> None:
    generator = torch.Generator().manual_seed(0)
    base = torch.randn(400, 1, 64, generator=generator)
    base[:, :, 3] += 3e4  # a massive activation, the same in both classes
    shift = torch.zeros(64)
    shift[10] = 0.5
    found = mean_difference(base[:200], base[:200] + shift)
    assert abs(float(found[0, 10])) > 0.99


def test_orthogonalised_directions_have_nothing_of_the_good_mean() -> None:
    good, bad = torch.randn(7, 3, 16) + 2, torch.randn(5, 3, 16)
    found = mean_difference(good, bad, orthogonalize=True)
    mean = torch.nn.functional.normalize(good.mean(0), dim=-1)
    assert float((found * mean).sum(-1).abs().max()) < 1e-5


def test_equal_classes_have_no_direction() -> None:
    same = torch.randn(4, 2, 8)
    with pytest.raises(ValueError, match="layer 0"):
        mean_difference(same, same)
    with pytest.raises(ValueError, match="of one model"):
        mean_difference(same, torch.randn(4, 3, 8))


def test_project_out_leaves_zero_references_alone() -> None:
    vectors = torch.randn(2, 8)
    assert torch.equal(project_out(vectors, torch.zeros(2, 8)), vectors)


def test_selection_interpolates_to_a_unit_vector() -> None:
    directions = torch.nn.functional.normalize(torch.randn(4, 8), dim=1).double()
    basis = Basis.single(directions)
    torch.testing.assert_close(basis.select(None, 2)[0], torch.tensor([[0, 0, 1, 0]], dtype=torch.float64))
    torch.testing.assert_close(basis.select(3.0, 0)[0], torch.tensor([[0, 0, 0, 1]], dtype=torch.float64))
    between, weights = basis.select(1.25, 0)
    expected = torch.nn.functional.normalize(0.75 * directions[1] + 0.25 * directions[2], dim=0)
    torch.testing.assert_close((between @ directions)[0], expected)
    assert weights.tolist() == [1.0]
    with pytest.raises(ValueError, match="outside"):
        basis.select(3.5, 0)


def test_differences_of_huge_size_have_a_direction() -> None:
    good = torch.randn(4, 1, 8, dtype=torch.float64)
    bad = good.clone()
    bad[:, 0, 2] += 1e200
    assert abs(float(mean_difference(good, bad)[0, 2])) == pytest.approx(1.0)


def definition(good: Tensor, bad: Tensor, alpha: float) -> tuple[Tensor, Tensor]:
    """Return eigenvalues in descending order, and eigenvectors as rows of cov(bad) - alpha cov(good), one layer."""
    contrast = torch.cov(bad.double().T) - alpha * torch.cov(good.double().T)
    values, vectors = torch.linalg.eigh(contrast)
    return values.flip(0), vectors.T.flip(0)


@given(
    seed=st.integers(0, 10_000),
    sizes=st.tuples(st.integers(3, 30), st.integers(3, 30)),
    width=st.integers(4, 50),
    alpha=st.sampled_from([0.0, 0.5, 1.0, 2.0]),
    method=st.sampled_from(["auto", "full"]),
)
def test_contrastive_pca_equals_its_definition(
    seed: int, sizes: tuple[int, int], width: int, alpha: float, method: str
) -> None:
    generator = torch.Generator().manual_seed(seed)
    good = torch.randn(sizes[0], 2, width, generator=generator) * torch.linspace(0.1, 3, width)
    bad = torch.randn(sizes[1], 2, width, generator=generator) * torch.linspace(3, 0.1, width) + 1
    found = contrastive_pca(good, bad, n_components=2, alpha=alpha, method=method)  # type: ignore[arg-type]  # a method's name
    for layer in range(2):
        values, vectors = definition(good[:, layer], bad[:, layer], alpha)
        for component in range(2):
            if values[component] <= 1e-6 * values.abs().max():
                continue
            assert float(found.eigenvalues[layer, component]) == pytest.approx(float(values[component]), rel=1e-6)
            gaps = [abs(float(values[component] - values[c])) for c in range(width) if c != component]
            if min(gaps) > 1e-3 * float(values[0]):
                cosine = abs(float(found.directions[layer, component].double() @ vectors[component]))
                assert cosine > 0.9999


def test_sample_space_bears_massive_activations() -> None:
    generator = torch.Generator().manual_seed(1)
    good, bad = (torch.randn(40, 1, 200, generator=generator) for _ in range(2))
    bad[:, 0, 7] *= 3
    for residuals in (good, bad):
        residuals[:, 0, 3] = residuals[:, 0, 3] * 500 + 3e4
    auto = contrastive_pca(good, bad)
    full = contrastive_pca(good, bad, method="full")
    torch.testing.assert_close(auto.eigenvalues, full.eigenvalues, rtol=1e-5, atol=1e-9)
    assert float((auto.directions * full.directions).sum(-1).abs().min()) > 0.9999


def test_layers_are_solved_alike_one_by_one_and_together() -> None:
    good, bad = torch.randn(9, 5, 24), torch.randn(8, 5, 24) * 1.5
    together, alone = contrastive_pca(good, bad), contrastive_pca(good, bad, memory=1)
    torch.testing.assert_close(together.eigenvalues, alone.eigenvalues)
    torch.testing.assert_close(together.directions, alone.directions)
    torch.testing.assert_close(probe(good, bad).directions, probe(good, bad, memory=1).directions)


def test_randomized_ranks_by_sign_and_size() -> None:
    generator = torch.Generator().manual_seed(2)
    good, bad = (torch.randn(60, 1, 300, generator=generator) for _ in range(2))
    good[:, 0, 0] *= 100  # by far the largest eigenvalue in magnitude, and negative
    bad[:, 0, 5] *= 20
    bad[:, 0, 9] *= 10
    found = contrastive_pca(good, bad, n_components=2, method="randomized")
    exact = contrastive_pca(good, bad, n_components=2)
    assert abs(float(found.directions[0, 0, 5])) > 0.99
    torch.testing.assert_close(found.eigenvalues, exact.eigenvalues, rtol=1e-6, atol=0)
    assert float((found.directions * exact.directions).sum(-1).abs().min()) > 0.9999
    assert torch.equal(found.directions, contrastive_pca(good, bad, n_components=2, method="randomized").directions)


def test_a_layer_without_positive_eigenvalue_gets_the_mean_difference() -> None:
    good, bad = torch.randn(10, 3, 16), torch.randn(10, 3, 16)
    bad[:, 1] = good[:, 1].mean(0) + torch.eye(16)[4]  # no variance at all among the bad
    found = contrastive_pca(good, bad)
    assert found.fallbacks == (1,)
    torch.testing.assert_close(found.directions[1, 0].abs(), torch.eye(16)[4], atol=1e-5, rtol=0)
    assert float(found.directions[1, 1:].abs().max()) == 0
    assert float(found.eigenvalues[1].max()) == 0
    assert float(found.eigenvalues[[0, 2], 0].min()) > 0


def test_a_solver_that_overflows_in_one_layer_gives_way_in_that_layer_alone() -> None:
    good = torch.randn(10, 3, 16, dtype=torch.float64)
    bad = torch.randn(10, 3, 16, dtype=torch.float64) + 1
    bad[:, 2] *= 1e200  # its covariance is infinite
    for found in (contrastive_pca(good, bad), contrastive_pca(good, bad, method="full"), probe(good, bad)):
        assert found.fallbacks == (2,)
        torch.testing.assert_close(found.directions[2, 0], mean_difference(good, bad)[2])
        assert bool(found.directions.isfinite().all())


def test_fewer_directions_than_asked_for_are_rows_of_zeros() -> None:
    good, bad = torch.randn(10, 1, 16), torch.randn(3, 1, 16) * 10
    found = contrastive_pca(good, bad, n_components=5, alpha=0.0)
    assert (found.eigenvalues[0] > 0).tolist() == [True, True, False, False, False]
    norms = found.directions[0].norm(dim=-1)
    torch.testing.assert_close(norms, torch.tensor([1.0, 1.0, 0.0, 0.0, 0.0]))


def test_arguments_that_make_no_sense_are_refused() -> None:
    some = torch.randn(4, 2, 8)
    for call, message in (
        (lambda: contrastive_pca(some[:1], some), "two prompts"),
        (lambda: contrastive_pca(some, some, n_components=0), "n_components"),
        (lambda: contrastive_pca(some, some, method="svd"), "unknown method"),  # type: ignore[arg-type]  # the point
        (lambda: probe(some, some[:1]), "two prompts"),
        (lambda: probe(some, some, regularization=0), "positive"),
        (lambda: winsorize(some, 0.0), "quantile"),
    ):
        with pytest.raises(ValueError, match=message):
            call()


def planted(n: int, seed: int) -> tuple[Tensor, Tensor, Tensor]:
    """Return residuals with a behaviour direction and a shared nuisance of far greater variance, and the direction.

    The behaviour shifts the mean by 1 along v and spreads by 1.5 along it; the nuisance spreads both
    classes by 20 along u; d is 400.
    """
    generator = torch.Generator().manual_seed(seed)
    v, u = torch.linalg.qr(torch.randn(400, 2, generator=generator)).Q.T
    good, bad = (0.05 * torch.randn(n, 400, generator=generator) for _ in range(2))
    for residuals in (good, bad):
        residuals += 20 * torch.randn(n, 1, generator=generator) * u
    bad = bad + (1 + 1.5 * torch.randn(n, 1, generator=generator)) * v
    return good[:, None], bad[:, None], v


def sum_of_covariances(good: Tensor, bad: Tensor) -> Tensor:
    """Return the result of the mistake of stacking bad and negated good rows into one PCA."""
    rows = torch.cat([bad[:, 0] - bad[:, 0].mean(0), -(good[:, 0] - good[:, 0].mean(0))])
    return torch.linalg.svd(rows, full_matrices=False).Vh[0]


def test_methods_find_a_planted_direction_under_a_large_nuisance() -> None:
    recovered: dict[str, list[float]] = {"mean": [], "pca": [], "randomized": [], "probe": [], "sum": []}
    for seed in range(5):
        good, bad, v = planted(200, seed)
        found = {
            "mean": mean_difference(good, bad)[0],
            "probe": probe(good, bad).directions[0, 0],
            "sum": sum_of_covariances(good, bad),
        }
        for name, method in (("pca", "auto"), ("randomized", "randomized")):
            # The sampling noise of so large a nuisance also leaves a positive eigenvalue: the behaviour is among three.
            directions = contrastive_pca(good, bad, method=method).directions[0]  # type: ignore[arg-type]  # a method's name
            found[name] = torch.nn.functional.normalize((directions @ v) @ directions, dim=0)
        for name, direction in found.items():
            recovered[name].append(abs(float(direction @ v)))
    worst = {name: min(values) for name, values in recovered.items()}
    assert worst["pca"] > 0.95
    assert worst["randomized"] > 0.95
    assert worst["probe"] > 0.95
    assert max(recovered["sum"]) < 0.1
    assert sorted(recovered["mean"])[2] < 0.9  # the sampling noise of the nuisance is as large as the shift
    assert min(recovered["probe"]) > max(recovered["mean"]) - 0.05


def test_winsorized_vectors_are_clamped_to_their_own_quantile() -> None:
    residuals = torch.randn(3, 2, 101)
    residuals[0, 0, 5] = 1e6
    found = winsorize(residuals, 0.95)
    assert float(found.abs().max()) < 10
    bound = residuals.abs().sort(dim=-1).values[..., 95]  # of 101 entries, the 96th is at 0.95
    torch.testing.assert_close(found.abs().amax(-1), bound)
    inside = residuals.abs() <= bound[..., None]
    assert torch.equal(found[inside], residuals[inside])
    assert torch.equal(winsorize(residuals, 1.0), residuals)


def test_bases_are_orthonormal_and_repetitions_are_dropped() -> None:
    first = torch.nn.functional.normalize(torch.randn(2, 1, 12), dim=-1)
    other = torch.nn.functional.normalize(torch.randn(2, 1, 12), dim=-1)
    basis = orthonormal_basis(torch.cat([first, first, other], dim=1), torch.tensor([[1.0, 0.8, 0.5]] * 2))
    torch.testing.assert_close(basis.directions[:, 0], first[:, 0])
    assert float(basis.directions[:, 1].abs().max()) == 0
    torch.testing.assert_close(basis.weights, torch.tensor([[1.0, 0.0, 0.5]] * 2))
    gram = basis.directions @ basis.directions.mT
    torch.testing.assert_close(gram, torch.diag(torch.tensor([1.0, 0.0, 1.0])).expand(2, 3, 3), atol=1e-6, rtol=0)


@given(index=st.floats(0, 3), seed=st.integers(0, 1000))
def test_selected_directions_are_orthonormal_between_layers_too(index: float, seed: int) -> None:
    generator = torch.Generator().manual_seed(seed)
    directions = torch.nn.functional.normalize(torch.randn(4, 3, 10, generator=generator), dim=-1)
    basis = orthonormal_basis(directions, torch.rand(4, 3, generator=generator))
    coefficients, weights = basis.select(index, 0)
    selected = coefficients @ basis.candidates.double()
    torch.testing.assert_close(selected @ selected.T, torch.eye(3, dtype=torch.float64), atol=1e-6, rtol=0)
    lower = min(int(index), 3)
    between = torch.lerp(basis.weights[lower], basis.weights[min(lower + 1, 3)], index - lower)
    torch.testing.assert_close(weights, between.double(), atol=1e-6, rtol=0)


def test_weights_by_eigenvalue_do_not_collapse_to_one_direction() -> None:
    weights = eigenvalue_weights(torch.tensor([[400.0, 100.0, 4.0, 0.0]], dtype=torch.float64), "eigenvalue")
    torch.testing.assert_close(weights, torch.tensor([[1.0, 0.5, 0.1, 0.0]]))
    equal = eigenvalue_weights(torch.tensor([[400.0, 100.0, 4.0, 0.0]], dtype=torch.float64), "equal")
    assert equal.tolist() == [[1.0, 1.0, 1.0, 0.0]]


def test_orthogonalised_against_references_and_left_where_nothing_would_remain() -> None:
    directions = torch.nn.functional.normalize(torch.randn(3, 2, 12), dim=-1)
    references = torch.nn.functional.normalize(torch.randn(3, 2, 12), dim=-1)
    references[2, 0] = directions[2, 1]
    found, kept = orthogonalize(directions, references)
    assert kept == (2,)
    assert float((found @ references.mT)[:2].abs().max()) < 1e-5
    assert torch.equal(found[2, 1], directions[2, 1])
    torch.testing.assert_close(found.norm(dim=-1), torch.ones(3, 2))


def test_geometry_by_hand_and_by_definition() -> None:
    good = torch.tensor([[[3.0, 0.0]], [[5.0, 0.0]]])
    bad = torch.tensor([[[0.0, 1.0]], [[0.0, 3.0]]])
    found = geometry(good, bad, torch.tensor([[0.0, 1.0]]))
    assert (float(found.good_norm[0]), float(found.bad_norm[0])) == (4.0, 2.0)
    assert float(found.difference_norm[0]) == pytest.approx(math.sqrt(20))
    assert (float(found.cosine_means[0]), float(found.cosine_good[0]), float(found.cosine_bad[0])) == (0.0, 0.0, 1.0)
    assert math.isnan(float(found.cosine_previous[0]))
    assert float(found.variance_share[0]) == pytest.approx(6 / (6 + 18))
    # Each point's own cluster mate is 2 away; the mean distance to the other cluster, averaged by hand:
    others = [[math.dist(p, q) for q in bad[:, 0].tolist()] for p in good[:, 0].tolist()]
    expected = [1 - 2 / (sum(row) / 2) for row in others] + [
        1 - 2 / (sum(col) / 2) for col in zip(*others, strict=True)
    ]
    assert float(found.silhouette[0]) == pytest.approx(sum(expected) / 4)


def test_projections_show_the_direction_and_the_largest_rest() -> None:
    good, bad = torch.randn(20, 30), torch.randn(25, 30)
    bad[:, 3] += 10
    for residuals in (good, bad):
        residuals[:, 8] *= 50
    direction = torch.eye(30)[3]
    first, second = projections(good, bad, direction)
    centre = torch.cat([good, bad])[:, 3].double().mean()
    torch.testing.assert_close(first[:, 0], good[:, 3].double() - centre)
    torch.testing.assert_close(second[:, 0], bad[:, 3].double() - centre)
    rest = torch.cat([good, bad])[:, 8].double()
    correlation = torch.corrcoef(torch.stack([torch.cat([first, second])[:, 1], rest]))[0, 1]
    assert abs(float(correlation)) > 0.99
