"""The comparison of methods: how far an edit moves the stream, and an organism with random gains."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM

from benchmarks.methods import moved, with_random_gains
from job.architectures.structure import discover


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
