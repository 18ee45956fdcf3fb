"""Compare the methods of finding directions on the model organism: whole jobs, scored on held-out prompts.

python -m benchmarks.methods [ORGANISM] [--trials 40] [--seeds 0,1]    ORGANISM as made by `abliterate demo-model`
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import tempfile
from pathlib import Path

from job.organism.folder import write_organism
from job.organism.world import WORLD

METHODS = {
    "mean difference": [],
    "projected": ["directions.orthogonalize_direction=true"],
    "winsorised at 0.95": ["directions.winsorization_quantile=0.95"],
    "probe": ["directions.method=probe"],
    "contrastive PCA, 2": ["directions.method=contrastive-pca", "directions.n_components=2"],
    "contrastive PCA, randomized": [
        "directions.method=contrastive-pca",
        "directions.n_components=2",
        "directions.pca_method=randomized",
    ],
    "against helpfulness": ["directions.orthogonalize_directions=true"],
    "two rounds": ["directions.iterative_rounds=2"],
}


def run(organism: Path, workspace: Path, settings: list[str], trials: int, seed: int) -> dict[str, float]:
    """Run a job and return its export's figures."""
    command = [sys.executable, "-c", "from job.cli.main import main; main()", "run", str(organism / "model")]
    for kind in ("good", "bad"):
        command += [f"--{kind}-prompts", str(organism / f"{kind}_train.txt")]
        command += [f"--{kind}-eval-prompts", str(organism / f"{kind}_test.txt")]
    command += ["--workspace", str(workspace), "--trials", str(trials), "--seed", str(seed)]
    # Stands in for web text: statements, whereas the prompts are requests.
    web = workspace.parent / "web.txt"
    web.write_text("".join(f"The {noun} is made of {material}.\n" for noun, (material, _, _) in WORLD.items()))
    references = [f'helpfulness_prompts="{organism / "good_train.txt"}"', f'unhelpfulness_prompts="{web}"']
    for setting in (*settings, *references):
        command += ["--set", setting]
    subprocess.run(command, check=True, capture_output=True, text=True)
    (export,) = workspace.glob("*/export")
    figures: dict[str, float] = json.loads((export.parent / "figures" / f"{export.resolve().name}.json").read_text())
    return figures


def main() -> None:
    """Print the table."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("organism", nargs="?", default="runs/organism")
    parser.add_argument("--trials", type=int, default=40)
    parser.add_argument("--seeds", default="0,1")
    given = parser.parse_args()
    organism = Path(given.organism)
    write_organism(organism, arch="llama", size="tiny", seed=0, report=print)
    print(f"refusals of 100 and KL after {given.trials} trials, by seed")
    for name, settings in METHODS.items():
        cells = []
        for seed in map(int, given.seeds.split(",")):
            with tempfile.TemporaryDirectory() as folder:
                edited = run(organism, Path(folder) / "runs", settings, given.trials, seed)
            cells.append(f"{edited['refusals']:>3}, {edited['kl']:.2g}")
        print(f"{name:>28}: " + " | ".join(f"{cell:>14}" for cell in cells), flush=True)


if __name__ == "__main__":
    main()
