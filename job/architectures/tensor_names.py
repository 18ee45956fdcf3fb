"""How a model's files hold its parameters: often under other names, and experts one by one.

transformers puts experts' weights together and renames parameters while it loads a model, and takes both back when it
saves one. What it does is read off a small twin, by what it would save of it; no table of names is needed.
"""

from __future__ import annotations

from collections.abc import Collection, Iterable, Mapping
from dataclasses import dataclass

from torch import Tensor
from transformers import PreTrainedModel
from transformers.core_model_loading import revert_weight_conversion

# What stands for an expert's number in a name.
_NUMBER = "{}"


@dataclass(frozen=True)
class Form:
    """How files hold a parameter.

    Attributes:
        name: Its name there; "{}" stands for an expert's number where every expert has a tensor of its own.
        turned: Experts' weights have their two axes the other way round than in the loaded model.
    """

    name: str
    turned: bool = False

    @property
    def apart(self) -> bool:
        """Whether every expert has a tensor of its own."""
        return _NUMBER in self.name


def stored_forms(twin: PreTrainedModel, names: Collection[str]) -> dict[str, Form]:
    """Return how files hold a model's parameters; those of which that cannot be told are left out.

    Args:
        twin: A small random model, no two parameters of which are alike.
        names: The parameters' names in the loaded model.
    """
    state = twin.state_dict()
    files = revert_weight_conversion(twin, dict(state))
    places = {_content(tensor): name for name, tensor in files.items() if isinstance(tensor, Tensor)}
    found = ((name, _form(state[name], places)) for name in names)
    return {name: form for name, form in found if form is not None}


def _content(tensor: Tensor) -> tuple[tuple[int, ...], bytes]:
    return tuple(tensor.shape), tensor.detach().contiguous().numpy().tobytes()


def _form(tensor: Tensor, places: Mapping[tuple[tuple[int, ...], bytes], str]) -> Form | None:
    whole = places.get(_content(tensor))
    if whole is not None:
        return Form(whole)
    if tensor.ndim < 2:
        return None
    for turned in (False, True) if tensor.ndim == 3 else (False,):
        parts = [places.get(_content(part.T if turned else part)) for part in tensor]
        name = _numbered(parts)
        if name is not None:
            return Form(name, turned)
    return None


def _numbered(names: Iterable[str | None]) -> str | None:
    """Return the name with a place for the number, of which these are the names with the numbers from 0 on."""
    parts = [name.split(".") if name is not None else [] for name in names]
    width = len(parts[0])
    if not width or any(len(part) != width for part in parts):
        return None
    counting = [i for i in range(width) if all(part[i] == str(number) for number, part in enumerate(parts))]
    if len(parts) == 1:
        counting = counting[-1:]  # the others may be the layer's number, which precedes
    if len(counting) != 1:
        return None
    template = [*parts[0][: counting[0]], _NUMBER, *parts[0][counting[0] + 1 :]]
    return ".".join(template) if all(_filled(template, e) == part for e, part in enumerate(parts)) else None


def _filled(template: list[str], number: int) -> list[str]:
    return [str(number) if part == _NUMBER else part for part in template]
