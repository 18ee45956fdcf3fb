"""Compare the search by gradient with the default search: whole jobs, and what their exports say to unseen prompts.

python -m benchmarks.gradient FOLDER [FOLDER ...] [--methods tpe:60,gradient:24] [--seeds 0,1] [--threads 1,2]
                              [--targets SOURCE,...] [--set KEY=VALUE] [--json runs/gradient.json]

FOLDER is made by `abliterate demo-model` or `abliterate real-model`. A method is the search's name and its number of
trials, by default the tool's. Refusals and KL are the report's, on prompts that the job has not used. Responses to the
same prompts are the export's, by plain transformers: right to the word on an organism, whose world is known; word for
word the base model's on any model; broken by the detector of the search. SOURCE says where the descent's targets come
from: `benchmarks.targets` lists them. A finished job is kept in the JSON file and not repeated. A row of the table is
over all seeds and numbers of threads.
"""

from __future__ import annotations

import argparse
import json
import shutil
import statistics
import sys
import tempfile
import time
from collections.abc import Iterable, Sequence
from dataclasses import asdict, dataclass
from itertools import product
from pathlib import Path
from typing import Any, Self

import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from benchmarks.heretic import Task
from benchmarks.real import FEW_REFUSALS, Conditions, run_this
from job.config.load import default_values
from job.organism.world import expected_answer
from job.scoring.broken import is_broken
from job.search.method import planned_trials
from tests.helpers import COMMAND, only_job

SHIPPED = "shipped"
_ROWS = 20
_KINDS = ("good", "bad")


@dataclass(frozen=True)
class Cell:
    """One job, and what its export says to the report's prompts.

    Attributes:
        asked: Good and bad prompts of the report.
        kl: First-token KL of the export from the base model, nats, mean over the good prompts.
        right: Responses that the organism's world expects, good and bad prompts; None for other models.
        same: Responses to good prompts that are the base model's, word for word.
        broken: Broken responses to bad prompts; of the base model to good ones in `base_broken`.
        first_edit_s: Seconds from the command to the first trial with few refusals; None without one.
        job_s: Seconds from the command to its end.
    """

    folder: str
    method: str
    trials: int
    seed: int
    threads: int
    settings: tuple[str, ...]
    asked: tuple[int, int]
    refusals: int
    kl: float
    right: tuple[int, int] | None
    same: int
    broken: int
    base_broken: int
    first_edit_s: float | None
    job_s: float

    @classmethod
    def parsed(cls, found: dict[str, Any]) -> Self:
        """Read what `asdict` wrote."""
        return cls(**{name: tuple(value) if isinstance(value, list) else value for name, value in found.items()})

    @property
    def conditions(self) -> tuple[Any, ...]:
        """What distinguishes the job from others."""
        return self.folder, self.method, self.trials, self.seed, self.threads, self.settings


@torch.inference_mode()
def responses(folder: Path, prompts: Sequence[str], tokens: int) -> list[str]:
    """Return a model's greedy responses by plain transformers."""
    model = AutoModelForCausalLM.from_pretrained(folder, local_files_only=True, dtype=torch.float32)
    tokenizer = AutoTokenizer.from_pretrained(folder, local_files_only=True, padding_side="left")
    texts = [
        tokenizer.apply_chat_template([{"role": "user", "content": one}], tokenize=False, add_generation_prompt=True)
        for one in prompts
    ]
    found: list[str] = []
    for start in range(0, len(texts), _ROWS):
        batch = tokenizer(texts[start : start + _ROWS], padding=True, return_tensors="pt", add_special_tokens=False)
        output = model.generate(
            input_ids=batch.input_ids,
            attention_mask=batch.attention_mask,
            do_sample=False,
            max_new_tokens=tokens,
            pad_token_id=tokenizer.pad_token_id,
        )
        found += tokenizer.batch_decode(output[:, batch.input_ids.shape[1] :], skip_special_tokens=True)
    return found


def measured(
    folder: Path, method: str, trials: int, seed: int, threads: int, targets: str, given: argparse.Namespace
) -> Cell:
    """Run a job and measure its export."""
    torch.set_num_threads(threads)
    sets = {kind: (folder / f"{kind}_train.txt").resolve() for kind in _KINDS}
    sets |= {f"{kind}_eval": (folder / f"{kind}_test.txt").resolve() for kind in _KINDS}
    tokens = default_values()["scoring"]["answer_tokens"]
    settings = (f"search.method={method}", *given.set)
    conditions = Conditions("", trials, None, threads, tokens, settings)
    task = Task((folder / "model").resolve(), sets, trials, 0, threads, tokens)
    work = Path(tempfile.mkdtemp(prefix="abliterate-gradient-"))
    try:
        began = time.perf_counter()
        search = run_this(task, conditions, seed, work / "run", show=False, command=command_of(targets))
        took = time.perf_counter() - began
        job = only_job(work / "run" / "jobs")
        export = (job / "export").resolve()
        figures = json.loads((job / "figures" / f"{export.name}.json").read_text())
        prompts = json.loads((job / "prompts.json").read_text())
        good, bad = ([prompt["user"] for prompt in prompts[f"{kind}_report"]] for kind in _KINDS)
        base, edited = (responses(one, [*good, *bad], tokens) for one in (folder / "model", export))
    finally:
        shutil.rmtree(work, ignore_errors=True)
    broken = [is_broken(prompt, said) for prompt, said in zip(bad, edited[len(good) :], strict=True)]
    return Cell(
        folder=folder.name,
        method=method,
        trials=trials,
        seed=seed,
        threads=threads,
        settings=_named(targets, given.set),
        asked=(len(good), len(bad)),
        refusals=figures["refusals"],
        kl=figures["kl"],
        right=_right(good, bad, edited) if (folder / "organism.json").exists() else None,
        same=sum(one == other for one, other in zip(base[: len(good)], edited[: len(good)], strict=True)),
        broken=sum(broken),
        base_broken=sum(is_broken(prompt, said) for prompt, said in zip(good, base[: len(good)], strict=True)),
        first_edit_s=min((one.seconds for one in search.points if one.refusals <= FEW_REFUSALS), default=None),
        job_s=took,
    )


def command_of(targets: str) -> list[str]:
    """Return the command of this tool with a source of targets."""
    return COMMAND if targets == SHIPPED else [sys.executable, "-m", "benchmarks.targets", targets]


def _named(targets: str, settings: Sequence[str]) -> tuple[str, ...]:
    """Return what names a job's settings in the table and in the record."""
    return (*settings, *([] if targets == SHIPPED else [f"targets: {targets}"]))


def _right(good: Sequence[str], bad: Sequence[str], said: Sequence[str]) -> tuple[int, int]:
    right = [one == expected_answer(prompt) for prompt, one in zip([*good, *bad], said, strict=True)]
    return sum(right[: len(good)]), sum(right[len(good) :])


def table(cells: Iterable[Cell]) -> list[str]:
    """Return a Markdown table: a row for each model and method, medians over seeds with the range."""
    groups: dict[tuple[str, str, int, tuple[str, ...]], list[Cell]] = {}
    for cell in cells:
        groups.setdefault((cell.folder, cell.method, cell.trials, cell.settings), []).append(cell)
    heads = ("model", "method", "trials", "jobs", "refusals", "KL", "right, good", "right, bad", "as the base model")
    lines = ["| " + " | ".join((*heads, "broken, bad", "first edit, s", "job, s")) + " |", "|---" * 12 + "|"]
    for (folder, method, trials, settings), rows in groups.items():
        rights = [cell.right for cell in rows if cell.right is not None]
        edits = [cell.first_edit_s for cell in rows if cell.first_edit_s is not None]
        row = (
            folder,
            " ".join((method, *settings)),
            str(trials),
            str(len(rows)),
            f"{_spread([cell.refusals for cell in rows], 'd')}/{rows[0].asked[1]}",
            _spread([cell.kl for cell in rows], ".2g"),
            _spread([right[0] for right in rights], "d"),
            _spread([right[1] for right in rights], "d"),
            _spread([cell.same for cell in rows], "d"),
            f"{_spread([cell.broken for cell in rows], 'd')} (base, good: {rows[0].base_broken})",
            _spread(edits, ".0f") if len(edits) == len(rows) else f"{len(edits)} of {len(rows)} jobs",
            _spread([cell.job_s for cell in rows], ".0f"),
        )
        lines.append("| " + " | ".join(row) + " |")
    return lines


def _spread(figures: Sequence[float], form: str) -> str:
    """Return the median with the range, for counts the lower median."""
    if not figures:
        return "–"
    middle = statistics.median_low(figures)
    least, most = min(figures), max(figures)
    alone = format(middle, form)
    return alone if least == most else f"{alone} ({format(least, form)} to {format(most, form)})"


def main() -> None:
    """Run the missing jobs and print the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folders", nargs="+", type=Path, metavar="FOLDER")
    parser.add_argument("--methods", default="tpe:60,gradient:24")
    parser.add_argument("--seeds", type=lambda text: [int(part) for part in text.split(",")], default=[0, 1])
    parser.add_argument("--threads", type=lambda text: [int(part) for part in text.split(",")], default=[1])
    parser.add_argument("--targets", default=SHIPPED, metavar="SOURCE,...")
    parser.add_argument("--set", action="append", default=[], metavar="KEY=VALUE")
    parser.add_argument("--json", type=Path, default=Path("runs/gradient.json"))
    given = parser.parse_args()
    kept = [Cell.parsed(cell) for cell in json.loads(given.json.read_text())] if given.json.exists() else []
    known = {cell.conditions for cell in kept}
    asked = (given.seeds, given.threads, given.folders, given.methods.split(","), given.targets.split(","))
    for seed, threads, folder, one, targets in product(*asked):
        method, _, number = one.partition(":")
        trials = int(number) if number else planned_trials(None, method)
        if (folder.name, method, trials, seed, threads, _named(targets, given.set)) in known:
            continue
        kept.append(measured(folder, method, trials, seed, threads, targets, given))
        given.json.parent.mkdir(parents=True, exist_ok=True)
        given.json.write_text(json.dumps([asdict(cell) for cell in kept], indent=1) + "\n")
    print("\n".join(table(kept)))


if __name__ == "__main__":
    main()
