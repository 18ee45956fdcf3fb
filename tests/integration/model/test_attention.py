"""Attention on the loaded model: cuDNN's kernels are off."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from job.model.loading import load_model
from tests.helpers import loading


def test_a_loaded_model_does_not_use_cudnns_attention(random_model_folder: Path) -> None:
    torch.backends.cuda.enable_cudnn_sdp(True)
    load_model(random_model_folder, loading("float32"), pytest.fail)
    assert not torch.backends.cuda.cudnn_sdp_enabled()
