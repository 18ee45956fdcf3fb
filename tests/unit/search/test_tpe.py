import numpy as np
import pytest
from optuna.distributions import BaseDistribution, CategoricalDistribution, FloatDistribution
from optuna.samplers import TPESampler
from optuna.samplers._tpe.parzen_estimator import _ParzenEstimator, _ParzenEstimatorParameters

from job.search.space import SearchSpace
from job.search.tpe import ParzenEstimator, Sampler

SPACE: dict[str, BaseDistribution] = {
    "scope": CategoricalDistribution(("global", "per layer", "none")),
    "index": FloatDistribution(1.4, 7.0),
    "weight": FloatDistribution(-0.25, 1.5),
}
DRAWN = 20_000


def parameters() -> _ParzenEstimatorParameters:
    found = TPESampler(multivariate=True)._parzen_estimator_parameters
    assert isinstance(found, _ParzenEstimatorParameters)
    return found


def farthest(one: np.ndarray, other: np.ndarray) -> float:
    """Return the largest distance of two samples' distribution functions (Kolmogorov and Smirnov)."""
    at = np.sort(np.concatenate([one, other]))
    shares = [np.searchsorted(np.sort(values), at, side="right") / len(values) for values in (one, other)]
    return float(np.abs(shares[0] - shares[1]).max())


def observations(trials: int) -> dict[str, np.ndarray]:
    rng = np.random.RandomState(0)
    return {
        "scope": rng.choice(2, size=trials).astype(float),
        # Half of them at the ends of the range, where half of a normal distribution lies outside.
        "index": np.where(rng.rand(trials) < 0.5, 7.0, rng.uniform(1.4, 7.0, trials)),
        "weight": np.where(rng.rand(trials) < 0.5, -0.25, rng.uniform(-0.25, 1.5, trials)),
    }


@pytest.mark.parametrize("trials", [0, 1, 30])
def test_draws_are_distributed_as_those_of_optuna(trials: int) -> None:
    observed = observations(trials)
    own = ParzenEstimator(observed, SPACE, parameters()).sample(np.random.RandomState(1), DRAWN)
    optunas = _ParzenEstimator(observed, SPACE, parameters()).sample(np.random.RandomState(2), DRAWN)
    assert own.keys() == optunas.keys()
    for name in SPACE:
        # Two samples of one distribution exceed 1.95 √(2/n) once in a thousand times.
        assert farthest(own[name], optunas[name]) < 1.95 * (2 / DRAWN) ** 0.5, name
    for name in ("index", "weight"):
        range_ = SPACE[name]
        assert isinstance(range_, FloatDistribution)
        assert range_.low <= own[name].min() < own[name].max() <= range_.high
    assert set(own["scope"]) == {0, 1, 2}


@pytest.mark.parametrize("trials", [0, 1, 300])
@pytest.mark.parametrize("names", [("scope",), ("index", "weight"), ("scope", "index", "weight")])
def test_densities_are_those_of_optuna(trials: int, names: tuple[str, ...]) -> None:
    observed = {name: observations(trials)[name] for name in names}
    space = {name: SPACE[name] for name in names}
    own, optunas = (kind(observed, space, parameters()) for kind in (ParzenEstimator, _ParzenEstimator))
    at = optunas.sample(np.random.RandomState(1), 128)
    np.testing.assert_allclose(own.log_pdf(at), optunas.log_pdf(at), rtol=1e-9, atol=1e-9)


def test_the_same_seed_draws_the_same() -> None:
    estimator = ParzenEstimator({name: np.array([1.0, 1.4]) for name in SPACE}, SPACE, parameters())
    one, other = (estimator.sample(np.random.RandomState(3), 64) for _ in range(2))
    assert all(np.array_equal(one[name], other[name]) for name in SPACE)


@pytest.mark.parametrize("layers", [1, 2, 32])
def test_the_spaces_of_models_have_no_other_ranges(layers: int) -> None:
    for name in ("wide", "field"):
        for range_ in SearchSpace(name, layers, 3).distributions().values():
            plain = isinstance(range_, FloatDistribution) and not range_.log and range_.step is None
            assert plain or isinstance(range_, CategoricalDistribution)


def test_what_has_one_value_only_is_not_searched() -> None:
    ranges = {"b": (0, 1), "a": (0, 1), "c": (2, 2)}
    sampler = Sampler({name: FloatDistribution(*range_) for name, range_ in ranges.items()}, seed=0)
    assert list(sampler._known) == ["a", "b"]
