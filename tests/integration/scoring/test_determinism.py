"""On a GPU some operations add in any order, and copies from it make the host wait: neither where trials are scored."""

from __future__ import annotations

from collections import Counter
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode

from job.directions.residuals import extract_residuals
from job.edits.hooks import Intervention
from job.generation.greedy import greedy_answers
from job.numerics.directions import contrastive_pca, mean_difference, probe
from tests.integration.edits.test_hooks import EDITS, basis_for, report_metrics, trial_scorer

# Sums by atomic additions in CUDA's kernels; of floating-point numbers, since whole ones add up in any order.
ATOMIC = ("index_add", "scatter_add", "scatter_reduce", "index_reduce", "bincount", "histc", "cumsum", "put_")


class InOrder(TorchDispatchMode):
    """Fails on operations whose CUDA kernels add floating-point numbers in any order."""

    def __torch_dispatch__(self, operation: Any, _types: Any, args: Any = (), options: Any = None) -> Any:
        options = options or {}
        name = operation.__name__
        floats = [one for one in args if isinstance(one, Tensor) and one.is_floating_point()]
        if name.startswith(("index_put", "_index_put")):
            assert not (len(args) > 3 and args[3]), f"{name} accumulates"
        elif floats:
            assert not any(atomic in name for atomic in ATOMIC), name
        return operation(*args, **options)


def test_an_operation_without_an_order_is_found() -> None:
    values, index = torch.ones(3), torch.tensor([0, 0, 1])
    with InOrder():
        torch.ones(3, dtype=torch.long).cumsum(0)
        torch.zeros(3)[index] = values
        for unordered in (
            lambda: torch.zeros(2).index_add_(0, index, values),
            lambda: torch.zeros(2).scatter_add_(0, index, values),
            lambda: torch.zeros(2).index_put_((index,), values, accumulate=True),
        ):
            with pytest.raises(AssertionError):
                unordered()


@pytest.mark.parametrize("kl_tokens", [1, 4])
def test_trials_and_reports_are_scored_in_order(random_model_folder: Path, kl_tokens: int) -> None:
    with InOrder():
        scorer = trial_scorer(random_model_folder, kl_tokens=kl_tokens)
        model = scorer.batches.loaded.model
        for mode in ("none", "full", "column"):
            with Intervention(model, scorer.batches.loaded.architecture, basis_for(model), mode) as hooks:
                scorer.scores(hooks, EDITS, 16)
                metrics = report_metrics(scorer)
                metrics.responses(hooks.activate(EDITS[:1]))


def test_directions_are_computed_in_order(random_model_folder: Path) -> None:
    scorer = trial_scorer(random_model_folder)
    good, bad = torch.randn(2, 12, 3, 24, generator=torch.Generator().manual_seed(0)).unbind()
    with InOrder():
        extract_residuals(scorer.batches.loaded, scorer.batches.good.tokens, 4, lambda _: None)
        mean_difference(good, bad)
        probe(good, bad)
        for method in ("full", "randomized"):
            contrastive_pca(good, bad, n_components=1, method=method)


class Copies(TorchFunctionMode):
    """Counts what makes the host wait for a device: reading values of tensors."""

    def __init__(self) -> None:
        super().__init__()
        self.found = Counter[str]()

    def __torch_function__(self, function: Any, _types: Any, args: Any = (), options: Any = None) -> Any:
        name = getattr(function, "__name__", "")
        if name in ("tolist", "item", "cpu", "numpy", "__bool__", "__int__", "__float__", "nonzero"):
            self.found[name] += 1
        return function(*args, **(options or {}))


def test_a_decoding_step_reads_the_device_once(random_model_folder: Path) -> None:
    scorer = trial_scorer(random_model_folder)
    model, prompts = scorer.batches.loaded.model, [[5, 6, 7, 8]] * 3  # without padding

    def reads(limit: int) -> Counter[str]:
        with Copies() as copies:
            answers = greedy_answers(model, prompts, limit=limit, end_tokens=(), openings=[7] * 3)
        assert all(len(answer.tokens) == limit for answer in answers)
        return copies.found

    few, more = reads(4), reads(9)
    assert more["tolist"] - few["tolist"] == 5
    assert few["tolist"] == 4
