"""Memory that runs out in a chosen operation, as it does on a device without a limit that a test could set."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch.overrides import TorchFunctionMode


class Short(TorchFunctionMode):
    """Within it the first `times` calls of operations that `fails` chooses raise an error.

    Attributes:
        left: Calls that are still to fail.
    """

    def __init__(
        self, fails: Callable[[str, tuple[Any, ...], dict[str, Any]], bool], error: str, times: int = 1
    ) -> None:
        super().__init__()
        self._fails, self._error, self.left = fails, error, times

    def __torch_function__(
        self, function: Any, _types: Any, args: tuple[Any, ...] = (), options: dict[str, Any] | None = None
    ) -> Any:
        options = options or {}
        if self.left and self._fails(getattr(function, "__name__", ""), args, options):
            self.left -= 1
            raise (
                torch.AcceleratorError(self._error)
                if self._error.startswith("CUDA error")
                else RuntimeError(self._error)
            )
        return function(*args, **options)
