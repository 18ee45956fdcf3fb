"""Whether weights fit, by headers alone, is what loading them comes to: for families that rename and fuse them, too."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from safetensors.torch import load_file, save_file
from transformers import AutoConfig

from job.errors import ImpossibleJobError
from job.model.fit import require_fit, require_fitting_headers, unloadable
from tests.zoo import FAMILIES, tiny_model


@pytest.mark.parametrize("family", FAMILIES)
def test_headers_tell_what_loading_does(family: str, tmp_path: Path) -> None:
    model = tiny_model(family)
    model.save_pretrained(tmp_path)
    file, config = tmp_path / "model.safetensors", AutoConfig.from_pretrained(tmp_path)
    tensors = load_file(file)
    shapes = {name: tuple(tensor.shape) for name, tensor in tensors.items()}
    require_fitting_headers(tmp_path, [file.name], config, shapes)
    middle = sorted(name for name in shapes if "layers.1." in name or "h.1." in name or "blocks.1." in name)[0]
    for changed in ({**tensors, middle: tensors[middle][:-1].contiguous()}, without(tensors, middle)):
        save_file(changed, file, metadata={"format": "pt"})
        shapes = {name: tuple(tensor.shape) for name, tensor in changed.items()}
        said = refusal(lambda shapes=shapes: require_fitting_headers(tmp_path, [file.name], config, shapes))
        assert said == refusal(lambda: load(type(model), tmp_path))


def load(kind: Any, folder: Path) -> None:
    try:
        _, info = kind.from_pretrained(folder, output_loading_info=True, ignore_mismatched_sizes=True)
    except RuntimeError as error:
        raise unloadable(folder, error) from error
    require_fit(folder, ["model.safetensors"], info)


def refusal(step: Callable[[], None]) -> str:
    with pytest.raises(ImpossibleJobError) as refused:
        step()
    return str(refused.value)


def without(tensors: dict[str, object], name: str) -> dict[str, object]:
    return {key: value for key, value in tensors.items() if key != name}
