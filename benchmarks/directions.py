"""Direction solvers: speed, accuracy and memory at the shapes of real models, and recovery of a planted direction.

python -m benchmarks.directions [--device cuda] [--shapes 32B,70B] [--skip-full]

Residuals are random with a few massive activations. The full d × d solver is timed on one layer and extrapolated to all
(stated as such); ours is timed on all layers. Both run in this process, in turn, on the same residuals.
"""

from __future__ import annotations

import argparse
import resource
import statistics
import time
from collections.abc import Callable

import torch
from torch import Tensor

from job.numerics.directions import Directions, PcaMethod, contrastive_pca, mean_difference, probe

# layers, width of 7B, 14B, 32B (Qwen2.5) and 70B (Llama 3) models
SHAPES = {"7B": (28, 3584), "14B": (48, 5120), "32B": (64, 5120), "70B": (80, 8192)}
PROMPTS = 400


def residuals(layers: int, width: int, device: str, prompts: int = PROMPTS) -> tuple[Tensor, Tensor]:
    """Return residuals [prompts, layers, width], float32, with massive activations and a planted behaviour."""
    generator = torch.Generator().manual_seed(0)
    spread = torch.logspace(0.7, -1, width)
    found = []
    for behaviour in (0.0, 1.0):
        one = torch.randn(prompts, layers, width, generator=generator) * spread
        one[:, :, 7] += 2000
        shift = behaviour * (3 + 4 * torch.randn(prompts, layers, generator=generator))
        one[:, :, 11] += shift
        found.append(one.to(device))
    return found[0], found[1]


def seconds(work: Callable[[], Directions | Tensor], device: str) -> tuple[float, Directions | Tensor]:
    """Return the duration of `work` and its result."""
    if device == "cuda":
        torch.cuda.synchronize()
    begin = time.perf_counter()
    found = work()
    if device == "cuda":
        torch.cuda.synchronize()
    return time.perf_counter() - begin, found


def compare(name: str, device: str, skip_full: bool) -> None:
    """Print the row of one shape."""
    layers, width = SHAPES[name]
    good, bad = residuals(layers, width, device)
    contrastive_pca(good[:, :1], bad[:, :1])  # warm-up
    ours, found = seconds(lambda: contrastive_pca(good, bad), device)
    mean, _ = seconds(lambda: mean_difference(good, bad), device)
    linear, _ = seconds(lambda: probe(good, bad), device)
    sketch, _ = seconds(lambda: contrastive_pca(good, bad, method="randomized"), device)
    line = f"{name:>4} {layers:>6} {width:>6} {ours:>9.2f} s {sketch:>9.2f} s {linear:>7.2f} s {mean:>7.2f} s"
    if not skip_full:
        full, exact = seconds(lambda: contrastive_pca(good[:, :1], bad[:, :1], method="full"), device)
        assert isinstance(found, Directions)
        assert isinstance(exact, Directions)
        cosine = float((found.directions[0] * exact.directions[0]).sum(-1).abs().min())
        error = float(((found.eigenvalues[0] - exact.eigenvalues[0]) / exact.eigenvalues[0]).abs().max())
        line += f" {full * layers:>9.0f} s {full * layers / ours:>6.1f}× {cosine:>10.6f} {error:>9.1e}"
    print(line, flush=True)


def recovery() -> None:
    """Print how well each method recovers a planted direction, by number of prompts per class."""
    print("\n|cos| with a planted direction of shift 1 and spread 1.5, under a shared nuisance of spread 20 (d = 400);")
    print("medians of 9 draws. pca: projection onto the span of its three; sum: PCA of the stacked classes.")
    methods = ("mean", "pca", "randomized", "probe", "mean+pca", "sum")
    print(f"{'n':>5} " + " ".join(f"{method:>10}" for method in methods))
    for n in (25, 50, 100, 200, 400):
        found: dict[str, list[float]] = {method: [] for method in methods}
        for seed in range(9):
            generator = torch.Generator().manual_seed(seed)
            v, u = torch.linalg.qr(torch.randn(400, 2, generator=generator)).Q.T
            good, bad = (0.05 * torch.randn(n, 400, generator=generator) for _ in range(2))
            for one in (good, bad):
                one += 20 * torch.randn(n, 1, generator=generator) * u
            bad = bad + (1 + 1.5 * torch.randn(n, 1, generator=generator)) * v
            mean = mean_difference(good[:, None], bad[:, None])[0]
            spans = {"mean": mean[None], "probe": probe(good[:, None], bad[:, None]).directions[0]}
            options: tuple[tuple[str, PcaMethod], ...] = (("pca", "auto"), ("randomized", "randomized"))
            for name, method in options:
                spans[name] = contrastive_pca(good[:, None], bad[:, None], method=method).directions[0]
            spans["mean+pca"] = torch.cat([spans["mean"], spans["pca"]])
            stacked = torch.cat([bad - bad.mean(0), good.mean(0) - good])
            spans["sum"] = torch.linalg.svd(stacked, full_matrices=False).Vh[:1]
            for name, span in spans.items():
                kept = span[span.norm(dim=1) > 0]
                basis = torch.linalg.qr(kept.T).Q
                found[name].append(float((basis.T @ v).norm()))
        print(f"{n:>5} " + " ".join(f"{statistics.median(found[method]):>10.3f}" for method in methods))


def precision() -> None:
    """Print the error of float32 arithmetic where ours uses float64."""
    good, bad = residuals(1, 1024, "cpu")
    reference = contrastive_pca(good, bad, method="full")
    print("\nlargest relative error of the top 3 eigenvalues at 1024, massive activations of 2000:")
    ours = contrastive_pca(good, bad)
    error = ((ours.eigenvalues - reference.eigenvalues) / reference.eigenvalues).abs().max()
    print(f"  float64 in sample space (ours): {float(error):.1e}")
    covariances = [torch.cov(one[:, 0].T) for one in (bad, good)]  # float32 throughout
    values = torch.linalg.eigvalsh(covariances[0] - covariances[1]).flip(0)[:3].double()
    error = ((values - reference.eigenvalues[0]) / reference.eigenvalues[0]).abs().max()
    print(f"  float32, d × d:                 {float(error):.1e}")


def main() -> None:
    """Print all tables."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--shapes", default=",".join(SHAPES))
    parser.add_argument("--skip-full", action="store_true")
    given = parser.parse_args()
    threads = torch.get_num_threads()
    print(f"{PROMPTS} + {PROMPTS} prompts, 3 directions, all layers, on {given.device}, {threads} threads")
    print(" size layers  width   exact, ours  randomized     probe      mean   full eigh   ratio  least cos  rel. err.")
    for name in given.shapes.split(","):
        before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
        compare(name, given.device, given.skip_full)
        peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
        print(
            f"     peak memory of the process so far: {peak / 2**20:.1f} GiB (before: {before / 2**20:.1f})", flush=True
        )
        if given.device == "cuda":
            print(f"     peak of the GPU: {torch.cuda.max_memory_allocated() / 2**30:.1f} GiB")
    precision()
    recovery()


if __name__ == "__main__":
    main()
