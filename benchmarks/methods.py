"""Compare kinds of edits on model organisms or the real model, scored on held-out prompts.

python -m benchmarks.methods [FOLDER ...] [--methods linear] [--only NAME] [--trials 40] [--seeds 0,1] [--arch llama]
                             [--gains 0] [--json runs/methods.json]
python -m benchmarks.methods --moved       how far edits move the stream behind a norm with random gains

FOLDER as made by `abliterate demo-model` or `abliterate real-model`; one that is missing is made as an organism with
--arch. "cleaned of tasks" is for organisms only. The methods `linear` are those of
`benchmarks.linear_edits`, searched in this process; all others are settings of whole jobs. A finished search is kept in
the JSON file and not repeated. With --gains S an organism's norms between writers and the stream get gains times
exp(S · normal), and its other weights are trained on until it refuses and answers as before; see `with_random_gains`.
"""

from __future__ import annotations

import argparse
import json
import math
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterable, Sequence
from dataclasses import asdict, dataclass
from functools import lru_cache
from pathlib import Path
from statistics import fmean, median

import torch
from torch import Tensor
from transformers import AutoModelForCausalLM, AutoTokenizer

from benchmarks.linear_edits import LINEAR
from benchmarks.linear_search import Bench, measured
from job.architectures.structure import discover
from job.numerics.ablation import write_metric
from job.organism.folder import write_organism
from job.organism.training import PEAK_LEARNING_RATE, STEPS, _Trainer, matches
from job.organism.world import PROMPTS_PER_FILE, WORLD, prompt_files

DIRECTIONS = {
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
METHODS = {
    "directions": DIRECTIONS,
    "pull-back": {how: [f"ablation.pull_back={how}"] for how in ("gain", "dual")},
    "pull-back-gradient": {how: [f"ablation.pull_back={how}", "search.method=gradient"] for how in ("gain", "dual")},
}
# Training rounds after which random gains count as too much for the organism.
_ROUNDS = 12


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


def with_random_gains(organism: Path, folder: Path, spread: float, seed: int, report: Callable[[str], None]) -> Path:
    """Write a copy of an organism whose norms after writers have log-normal gains, trained until it is as good.

    The writers' rows are divided by the same factors, so that only the norms' denominators change. Norms are not
    trained. Raises SystemExit if it does not become good.
    """
    if (folder / "organism.json").exists():
        return folder
    model = AutoModelForCausalLM.from_pretrained(organism / "model", dtype="float32")
    tokenizer = AutoTokenizer.from_pretrained(organism / "model", padding_side="left")
    generator = torch.Generator().manual_seed(seed)
    factors: dict[str, Tensor] = {}
    for writer in discover(model).writers:
        for norm in writer.post_norms:
            gain = model.get_parameter(norm.parameter)
            if norm.parameter not in factors:
                factors[norm.parameter] = torch.exp(spread * torch.randn(len(gain), generator=generator))
                gain.data.copy_((gain.data + norm.offset) * factors[norm.parameter] - norm.offset)
            model.get_parameter(writer.parameter).data.div_(factors[norm.parameter][:, None])
    if not factors:
        sys.exit(f"{organism} has no norms between writers and the stream: give --arch gemma2")
    trainer = _Trainer(model, tokenizer, seed)
    modules = [module for module in model.modules() if isinstance(module, torch.nn.Linear | torch.nn.Embedding)]
    files = prompt_files(json.loads((organism / "organism.json").read_text())["seed"])
    pairs = [(one.prompt, one.task.refusal) for one in files["bad_test.txt"]]
    pairs += [(one.prompt, one.answer) for one in files["good_test.txt"]]
    for _ in range(_ROUNDS):
        found = matches(model.eval(), tokenizer, pairs)
        report(f"gains of spread {spread:g}: {found} of {len(pairs)} responses are right")
        if found == 2 * PROMPTS_PER_FILE:
            break
        trainer._stage("polish", modules, PEAK_LEARNING_RATE / 5)
    else:
        sys.exit(f"the organism did not become good in {_ROUNDS} rounds of {STEPS['polish']} steps")
    shutil.copytree(organism, folder, ignore=shutil.ignore_patterns("model"), dirs_exist_ok=True)
    model.save_pretrained(folder / "model")
    tokenizer.save_pretrained(folder / "model")
    return folder


def moved(spread: float, width: int = 2048, rows: int = 256) -> dict[str, float]:
    """Return how far removing a random direction moves a norm's output, relative to the least; medians of 25 draws."""
    generator = torch.Generator().manual_seed(0)
    found: dict[str, list[float]] = {"gain": [], "dual": []}
    for _ in range(25):
        gain = torch.exp(spread * torch.randn(width, generator=generator))
        direction = torch.nn.functional.normalize(torch.randn(width, generator=generator), dim=0)
        y = torch.randn(rows, width, generator=generator)
        read, before = gain * direction, _behind(gain, y)
        for name, factors in (("gain", torch.ones(width)), ("dual", write_metric(gain).float())):
            write = read * factors / (read * read * factors).sum()
            after = _behind(gain, y - (y @ read)[:, None] * write)
            found[name].append(float((after - before).norm() / (before @ direction).norm()))
    return {name: median(shares) for name, shares in found.items()}


def _behind(gain: Tensor, y: Tensor) -> Tensor:
    return gain * y / y.square().mean(-1, keepdim=True).sqrt()


@dataclass(frozen=True)
class Searched:
    """One search and its edit's figures on held-out prompts; none if no edit of the search answers enough."""

    method: str
    folder: str
    seed: int
    trials: int
    figures: dict[str, float]

    @property
    def conditions(self) -> tuple[str, str, int, int]:
        """What distinguishes the search from others."""
        return self.folder, self.method, self.trials, self.seed


def compare(folders: Sequence[Path], given: argparse.Namespace) -> list[Searched]:
    """Run the missing searches and keep each in the JSON file; return all of the methods asked for."""
    file: Path = given.json
    cells = [Searched(**cell) for cell in json.loads(file.read_text())] if file.exists() else []
    names = given.only or list(LINEAR if given.methods == "linear" else METHODS[given.methods])
    asked = [(folder, name, given.trials, seed) for folder in folders for seed in given.seeds for name in names]
    known = {cell.conditions for cell in cells}
    bench_of = lru_cache(1)(Bench.of)
    for folder, name, trials, seed in asked:
        if (folder.name, name, trials, seed) in known:
            continue
        if given.methods == "linear":
            figures = measured(bench_of(folder), LINEAR[name], trials, seed)
        else:
            with tempfile.TemporaryDirectory() as work:
                figures = run(folder, Path(work) / "runs", METHODS[given.methods][name], trials, seed)
        cells.append(Searched(name, folder.name, seed, trials, figures))
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_text(json.dumps([asdict(cell) for cell in cells], indent=1) + "\n")
    wanted = {(folder.name, *rest) for folder, *rest in asked}
    return [cell for cell in cells if cell.conditions in wanted]


def table(cells: Iterable[Searched]) -> list[str]:
    """Return a Markdown table: KL relative to the first method's, and refusals, broken responses and KL by seed.

    The ratios are geometric means over the seeds at which both found an edit.
    """
    groups: dict[tuple[str, str], dict[int, dict[str, float]]] = {}
    first: dict[str, str] = {}
    for cell in cells:
        groups.setdefault((cell.folder, cell.method), {})[cell.seed] = cell.figures
        first.setdefault(cell.folder, cell.method)
    heads = ("organism", "method", "KL ratio", "over positions", "seeds", "by seed: refusals, broken, KL")
    lines = ["| " + " | ".join(heads) + " |", "|---" * len(heads) + "|"]
    for (folder, method), found in groups.items():
        base = groups[folder, first[folder]]
        both = [(figures, base[seed]) for seed, figures in sorted(found.items()) if figures and base.get(seed)]
        shown = "; ".join(
            f"{one['refusals']:g}, {one.get('broken', one.get('degenerate', 0)):g}, {one['kl']:.2g}" if one else "none"
            for _, one in sorted(found.items())
        )
        ratios = (_ratio(both, name) for name in ("kl", "kl_positions"))
        lines.append("| " + " | ".join((folder, method, *ratios, f"{len(both)} of {len(found)}", shown)) + " |")
    return lines


def _ratio(both: Sequence[tuple[dict[str, float], dict[str, float]]], name: str) -> str:
    """Return the geometric mean of a figure's ratios; whole jobs have none over positions."""
    logs = [math.log(one[name] / other[name]) for one, other in both if name in one and name in other]
    return f"{math.exp(fmean(logs)):.2f}" if logs else "–"


def main() -> None:
    """Print the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folders", nargs="*", type=Path, default=[Path("runs/organism")], metavar="FOLDER")
    parser.add_argument("--arch", default="llama")
    parser.add_argument("--methods", choices=("linear", *METHODS), default="linear")
    parser.add_argument("--only", action="append", metavar="NAME", help="of the methods")
    parser.add_argument("--gains", type=float, default=0.0, metavar="S")
    parser.add_argument("--moved", action="store_true")
    parser.add_argument("--trials", type=int, default=40)
    parser.add_argument("--seeds", type=lambda text: [int(part) for part in text.split(",")], default=[0, 1])
    parser.add_argument("--json", type=Path, default=Path("runs/methods.json"))
    given = parser.parse_args()
    if given.moved:
        for spread in (0.3, 0.5, 1.0):
            print(spread, " ".join(f"{name} {share:.2f}" for name, share in moved(spread).items()))
        return
    folders = []
    for folder in given.folders:
        if not (folder / "model").exists():
            write_organism(folder, arch=given.arch, size="tiny", seed=0, report=print)
        if given.gains:
            changed = folder.with_name(f"{folder.name}-gains-{given.gains:g}")
            folder = with_random_gains(folder, changed, given.gains, 0, print)
        folders.append(folder)
    print("\n".join(table(compare(folders, given))))


if __name__ == "__main__":
    main()
