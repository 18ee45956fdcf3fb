"""Placement of a model's weights on devices, or offloaded to RAM or disk."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from itertools import chain
from typing import Any

import torch
from accelerate.hooks import AlignDevicesHook
from accelerate.utils import align_module_device, has_offloaded_params
from torch import Tensor, nn
from transformers import PreTrainedModel


def module_device(module: nn.Module) -> torch.device:
    """Return the device that a module, possibly offloaded, computes on."""
    hook = getattr(module, "_hf_hook", None)
    if has_offloaded_params(module) and isinstance(hook, AlignDevicesHook):
        return torch.device(hook.execution_device)
    return next(module.parameters()).device


def read_parameter(model: nn.Module, name: str) -> Tensor:
    """Return a parameter's values, even if offloaded."""
    module, _, own = name.rpartition(".")
    holder = model.get_submodule(module)
    with align_module_device(holder):
        values: Tensor = getattr(holder, own).detach()
    return values


def placement(model: PreTrainedModel) -> dict[str, int]:
    """Return the bytes of weights per device; on disk by their size when loaded."""
    places: Mapping[str, Any] = getattr(model, "hf_device_map", None) or {"": model.device}
    found: dict[str, int] = {}
    for name, tensor in model.named_parameters():
        place = _entry_for(places, name)
        place = f"cuda:{place}" if isinstance(place, int) else str(place)
        found[place] = found.get(place, 0) + tensor.numel() * tensor.element_size()
    return found


def spread(model: nn.Module, places: Mapping[str, Any], name: str = "") -> dict[str, Any]:
    """Expand a device map so that no entry contains another, as accelerate requires; longer names win."""
    inside = f"{name}." if name else ""
    if not any(key.startswith(inside) and key != name for key in places):
        return {name: _entry_for(places, name)}
    found = {f"{inside}{own}": _entry_for(places, f"{inside}{own}") for own, _ in model.named_parameters(recurse=False)}
    for own, child in model.named_children():
        found |= spread(child, places, f"{inside}{own}")
    return found


def _entry_for(places: Mapping[str, Any], name: str) -> Any:
    """Return the entry of the longest name that is a prefix of a module's, or None."""
    while name not in places and name:
        name = name.rpartition(".")[0]
    return places.get(name)


def let_go(model: PreTrainedModel) -> None:
    """Free a model's weights even if it is still referenced; it becomes unusable."""
    for module in model.modules():
        for hook in _hooks(getattr(module, "_hf_hook", None)):
            if isinstance(hook, AlignDevicesHook):
                hook.weights_map = {}
    for tensor in chain(model.parameters(), model.buffers()):
        if tensor.is_meta:
            continue
        tensor.data = torch.empty(0, dtype=tensor.dtype, device=tensor.device)


def _hooks(hook: Any) -> Iterator[Any]:
    yield hook
    yield from getattr(hook, "hooks", ())
