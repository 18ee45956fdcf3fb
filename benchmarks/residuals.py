"""Time and memory of extracting residuals: hooks that keep one position, against `output_hidden_states`.

python -m benchmarks.residuals

Each variant runs in its own process on the same random model (8 layers, width 512, vocabulary 32,000)
and 800 prompts of 20 to 200 tokens, in batches of 32. Memory is the process' peak beyond the loaded model.
"""

from __future__ import annotations

import random
import subprocess
import sys
import threading
import time
from pathlib import Path

import psutil
import torch
from torch import Tensor
from transformers import LlamaConfig, LlamaForCausalLM

from job.architectures.structure import discover
from job.directions.residuals import extract_residuals
from job.generation.forward import left_padded
from job.model.loading import LoadedModel

ROWS, PROMPTS = 32, 800


def model() -> LlamaForCausalLM:
    """Return the model."""
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=32_000,
        hidden_size=512,
        intermediate_size=1536,
        num_hidden_layers=8,
        num_attention_heads=8,
        num_key_value_heads=2,
    )
    return LlamaForCausalLM(config).eval().requires_grad_(False)


def prompts() -> list[list[int]]:
    """Return the prompts."""
    chance = random.Random(0)
    return [[chance.randrange(3, 32_000) for _ in range(chance.randint(20, 200))] for _ in range(PROMPTS)]


def by_hooks(loaded: LoadedModel, tokens: list[list[int]]) -> Tensor:
    """Extract as the job does."""
    return extract_residuals(loaded, tokens, ROWS, lambda _: None)


@torch.inference_mode()
def by_hidden_states(loaded: LoadedModel, tokens: list[list[int]]) -> Tensor:
    """Extract the usual way: all positions of all layers are returned, and the head runs on each position."""
    found = []
    for start in range(0, len(tokens), ROWS):
        ids, mask, positions = left_padded(tokens[start : start + ROWS], "cpu")
        output = loaded.model(input_ids=ids, attention_mask=mask, position_ids=positions, output_hidden_states=True)
        found.append(torch.stack([state[:, -1].float() for state in output.hidden_states], dim=1))
    return torch.cat(found)


def watch(peak: list[int], done: threading.Event) -> None:
    """Record the process' peak resident memory."""
    process = psutil.Process()
    while not done.wait(0.005):
        peak[0] = max(peak[0], process.memory_info().rss)


def measure(way: str) -> None:
    """Print seconds and MiB of one variant."""
    built = model()
    loaded = LoadedModel(Path(), built, None, discover(built), "float32")  # type: ignore[arg-type]  # tokens are given
    tokens = prompts()
    extract = {"hooks": by_hooks, "hidden_states": by_hidden_states}[way]
    extract(loaded, tokens[:4])
    before = psutil.Process().memory_info().rss
    peak, done = [before], threading.Event()
    watcher = threading.Thread(target=watch, args=(peak, done))
    watcher.start()
    begin = time.perf_counter()
    found = extract(loaded, tokens)
    took = time.perf_counter() - begin
    done.set()
    watcher.join()
    # Both variants need the result itself.
    wanted = found.numel() * found.element_size()
    print(f"{way:>14}: {took:6.1f} s, {(peak[0] - before - wanted) / 2**20:7.0f} MiB beside the result")


def main() -> None:
    """Measure both variants, each in its own process."""
    if len(sys.argv) > 1:
        measure(sys.argv[1])
        return
    for way in ("hidden_states", "hooks") * 2:
        subprocess.run([sys.executable, "-m", "benchmarks.residuals", way], check=True)


if __name__ == "__main__":
    main()
