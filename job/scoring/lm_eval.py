"""Standard benchmarks by lm-eval, EleutherAI's harness, an optional extra."""

from __future__ import annotations

import contextlib
import io
import logging
import math
import sys
import warnings
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from job.errors import JobError, UsageError
from job.model.loading import LoadedModel
from job.numerics.statistics import mean_interval
from job.records.evaluation import Score
from job.system.extras import require_extra

# The set "quick": multiple choice without examples, so that nothing is generated; the first documents of each task.
QUICK, QUICK_LIMIT = "quick", 200
QUICK_TASKS = ("arc_challenge", "hellaswag", "piqa", "truthfulqa_mc1", "winogrande")
_CPU_ROWS = 8


@dataclass(frozen=True)
class TaskScore:
    """A model's metric on a task: value, standard error or None, and its values by document, if it has such."""

    value: float
    error: float | None
    items: Mapping[int, float]


# By task and metric.
Scores = Mapping[tuple[str, str], TaskScore]


class Harness:
    """Benchmark tasks of lm-eval."""

    def __init__(self, tasks: Sequence[str], limit: int | None, folder: Path | None) -> None:
        """Find tasks, groups, tags or "quick"; `folder` holds further tasks as YAML. Raises UsageError."""
        require_extra("lm_eval", "--tasks")
        if QUICK in tasks:
            if len(tasks) > 1:
                raise UsageError("--tasks quick is a set of its own", remedy="name the other tasks in another command")
            tasks, limit = QUICK_TASKS, limit or QUICK_LIMIT
        if folder is not None and not folder.is_dir():
            raise UsageError(f"there is no folder {folder}", remedy="check --tasks-folder")
        self._tasks, self._limit = list(tasks), limit
        with _lm_eval_silenced():
            self._manager = _manager_of(self._tasks, folder)
        unknown = [task for task in self._tasks if not self._manager.match_tasks([task])]
        if unknown:
            raise UsageError(f"lm-eval has no task {unknown[0]}", remedy="`lm-eval ls tasks` lists them")

    def scores(self, loaded: LoadedModel) -> Scores:
        """Return a model's scores on every task. Raises JobError if lm-eval fails, for example without data."""
        with _lm_eval_silenced():
            import lm_eval
            from lm_eval.models.huggingface import HFLM

            try:
                model = HFLM(
                    pretrained=loaded.model,
                    tokenizer=loaded.tokenizer,
                    backend="causal",
                    device=str(loaded.device),
                    batch_size=_rows(loaded),
                )
                found = lm_eval.simple_evaluate(
                    model=model,
                    tasks=self._tasks,
                    task_manager=self._manager,
                    limit=self._limit,
                    log_samples=True,
                )
            except (OSError, ValueError, KeyError, ConnectionError) as error:
                raise JobError(
                    f"lm-eval failed at {', '.join(self._tasks)}: {str(error).strip() or type(error).__name__}",
                    remedy="check that this machine can download its data",
                ) from error
        return _scores(found["results"], found["samples"])


def _rows(loaded: LoadedModel) -> int | str:
    """Return the rows per forward; on an accelerator lm-eval determines them."""
    if not loaded.architecture.batching.padded:
        return 1
    return "auto" if loaded.device.type == "cuda" else _CPU_ROWS


def _manager_of(tasks: Sequence[str], folder: Path | None) -> Any:
    """Return the task manager; lm-eval's own tasks, which take most of a minute to read, only on request."""
    from lm_eval.tasks import TaskManager

    if folder is not None:
        own = TaskManager(include_path=str(folder), include_defaults=False)
        if all(own.match_tasks([task]) for task in tasks):
            return own
    return TaskManager(include_path=str(folder) if folder is not None else None)


def _scores(
    results: Mapping[str, Mapping[str, Any]], samples: Mapping[str, Sequence[Mapping[str, Any]]]
) -> dict[tuple[str, str], TaskScore]:
    found: dict[tuple[str, str], TaskScore] = {}
    for task, measures in results.items():
        for name, value in measures.items():
            metric, _, kind = name.partition(",")
            if metric.endswith("_stderr") or not kind or isinstance(value, bool) or not isinstance(value, int | float):
                continue
            error = measures.get(f"{metric}_stderr,{kind}")
            items = {
                int(sample["doc_id"]): float(sample[metric])
                for sample in samples.get(task, ())
                if sample["filter"] == kind and isinstance(sample.get(metric), int | float)
            }
            if items and not math.isclose(math.fsum(items.values()) / len(items), value, abs_tol=1e-9):
                items = {}  # the metric is no mean of its values by document
            shown = metric if kind == "none" else f"{metric} ({kind})"
            error = float(error) if isinstance(error, int | float) else None
            found[task, shown] = TaskScore(float(value), error, items)
    return found


def paired_scores(base: Scores, edited: Scores) -> tuple[Score, ...]:
    """Return both models' scores, with the change over the documents where both have the same."""
    return tuple(_paired(*name, one, edited[name]) for name, one in base.items() if name in edited)


def _paired(task: str, metric: str, base: TaskScore, edited: TaskScore) -> Score:
    score = Score(
        task=task,
        metric=metric,
        base=base.value,
        base_error=base.error,
        edited=edited.value,
        edited_error=edited.error,
    )
    if not base.items or base.items.keys() != edited.items.keys():
        return score
    changes = [edited.items[document] - value for document, value in base.items.items()]
    paired = {
        "items": len(changes),
        "better": sum(change > 0 for change in changes),
        "worse": sum(change < 0 for change in changes),
        "change_interval": mean_interval(changes),
    }
    return score.model_copy(update=paired)


@contextmanager
def _lm_eval_silenced() -> Iterator[None]:
    """Keep lm-eval's messages out of standard output, and its advice out of everything."""
    logging.getLogger("lm_eval").setLevel(logging.ERROR)
    # Its progress bars are for terminals, and would fill logs.
    bars = sys.stderr if sys.stderr.isatty() else io.StringIO()
    with contextlib.redirect_stdout(bars), contextlib.redirect_stderr(bars), warnings.catch_warnings():
        warnings.simplefilter("ignore")
        yield
