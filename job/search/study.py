"""A study on disk: an Optuna database that survives kills, is copied while in use, and may be damaged.

Needs no torch.
"""

from __future__ import annotations

import json
import sqlite3
import warnings
from collections.abc import Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager
from pathlib import Path
from types import ModuleType
from typing import Any, Literal

import optuna
from optuna.distributions import distribution_to_json, json_to_distribution
from optuna.trial import FrozenTrial

from job.errors import DamagedError, JobError, MachineError, explaining, first_line
from job.records import DEFAULT_OBJECTIVES, Trial, TrialScores
from job.storage.study_file import WAIT_SECONDS, connected, in_use, is_busy, refused_write
from job.system.failpoints import reached

STUDY_NAME = "abliterate"
# Attribute of the study that holds the latest plan.
PLAN = "plan"


def directions(objectives: Sequence[str]) -> list[Literal["minimize"]]:
    """Return Optuna's directions: every objective is stored as a cost."""
    return ["minimize" for _ in objectives]


def open_study(url: str, name: str, objectives: Sequence[str] = DEFAULT_OBJECTIVES) -> optuna.Study:
    """Open or create a run's study."""
    with warnings.catch_warnings():
        # Metric names, which optuna-dashboard shows, are marked experimental since Optuna 3.2.
        warnings.simplefilter("ignore", optuna.exceptions.ExperimentalWarning)
        storage = optuna.storages.RDBStorage(url, engine_kwargs={"connect_args": {"timeout": WAIT_SECONDS}})
        study = optuna.create_study(
            storage=storage, study_name=name, directions=directions(objectives), load_if_exists=True
        )
        study.set_metric_names(list(objectives))
    return study


def as_trial(trial: FrozenTrial) -> Trial:
    """Convert a study's trial."""
    return Trial(number=trial.number, params=trial.params, values=_scores(trial.values, trial.user_attrs))


def _scores(values: Sequence[float], attributes: Mapping[str, Any]) -> TrialScores:
    """Return a trial's scores; with other objectives than refusals and KL all are attributes."""
    found = dict(attributes)
    if "objectives" not in found:
        refusals, found["kl"] = values
        found["refusals"] = int(refusals)
    return TrialScores.model_validate(found)


def add_trials(study: optuna.Study, trials: Sequence[FrozenTrial]) -> None:
    """Add finished trials to a study in a database, all or none of them.

    `Study.add_trials` does so one by one, each with a query for every parameter over all trials: 30 ms a trial and
    more, against 2 ms (docs/lab-notes/speed.md). Here Optuna's own models fill its tables; a test compares what it
    reads back. `study` has no other writer; `trials` continue its numbers, without intermediate values and system
    attributes.
    """
    from optuna.storages._rdb import models
    from optuna.storages._rdb.storage import _create_scoped_session

    rows = [
        models.TrialModel(
            study_id=study._study_id,
            number=trial.number,
            state=trial.state,
            datetime_start=trial.datetime_start,
            datetime_complete=trial.datetime_complete,
        )
        for trial in trials
    ]
    with _create_scoped_session(study._storage._backend.scoped_session) as session:  # type: ignore[attr-defined]
        session.add_all(rows)
        session.flush()
        for row, trial in zip(rows, trials, strict=True):
            session.add_all(_rows_of_trial(models, row.trial_id, trial))
        session.flush()
        reached("study:adding")
    reached("study:added")


def _rows_of_trial(models: ModuleType, trial_id: Any, trial: FrozenTrial) -> Iterator[Any]:
    for name, value in trial.params.items():
        distribution = trial.distributions[name]
        yield models.TrialParamModel(
            trial_id=trial_id,
            param_name=name,
            param_value=distribution.to_internal_repr(value),
            distribution_json=distribution_to_json(distribution),
        )
    for objective, value in enumerate(trial.values):
        stored, value_type = models.TrialValueModel.value_to_stored_repr(value)
        yield models.TrialValueModel(trial_id=trial_id, objective=objective, value=stored, value_type=value_type)
    for key, value in trial.user_attrs.items():
        yield models.TrialUserAttributeModel(trial_id=trial_id, key=key, value_json=json.dumps(value))


def read_trials(file: Path) -> list[Trial]:
    """Return a study's finished trials in number order, none without a file. Raises MachineError."""
    if not file.exists():
        return []
    # Not through SQLAlchemy: it takes half a second to load, and a status command is to read only.
    with clear_errors(file), connected(file) as db:
        db.execute("BEGIN")  # one moment for all that follows, while a run may be adding trials
        if not db.execute("SELECT 1 FROM sqlite_master WHERE name = 'trial_values'").fetchone():
            return []  # a run is just creating it
        trials: dict[int, dict[str, Any]] = {
            trial_id: {"number": number, "params": {}, "values": [], "attributes": {}}
            for trial_id, number in db.execute("SELECT trial_id, number FROM trials WHERE state = 'COMPLETE'")
        }
        rows = db.execute("SELECT trial_id, param_name, param_value, distribution_json FROM trial_params")
        for trial_id, name, value, distribution_json in rows:
            distribution = json_to_distribution(distribution_json)
            trials[trial_id]["params"][name] = distribution.to_external_repr(value)
        values = db.execute("SELECT trial_id, value FROM trial_values ORDER BY trial_id, objective")
        for trial_id, value in values:
            trials[trial_id]["values"].append(value)
        for trial_id, key, value in db.execute("SELECT trial_id, key, value_json FROM trial_user_attributes"):
            trials[trial_id]["attributes"][key] = json.loads(value)
    return [
        Trial(
            number=trial["number"],
            params=trial["params"],
            values=_scores(trial["values"], trial["attributes"]),
        )
        for trial in sorted(trials.values(), key=lambda trial: trial["number"])
    ]


def file_url(file: Path) -> str:
    """Return the SQLite URL of a study."""
    return f"sqlite:///{file.resolve()}"


def _is_storage_error(error: Exception) -> bool:
    from sqlalchemy.exc import SQLAlchemyError  # takes half a second to load; Optuna has loaded it by now

    return isinstance(error, SQLAlchemyError | sqlite3.Error | optuna.exceptions.StorageInternalError)


def _is_caused_by_lock(error: BaseException | None) -> bool:
    """Return whether an error, or one that it comes from, tells of another process's lock."""
    return error is not None and (is_busy(error) or _is_caused_by_lock(error.__cause__))


def _refused_write(file: Path, error: BaseException | None) -> MachineError | None:
    """Return the disk's refusal that an error, or one that it comes from, tells of."""
    if error is None:
        return None
    return refused_write(file, error) or _refused_write(file, error.__cause__)


@contextmanager
def clear_write_errors(file: Path) -> Iterator[None]:
    """Turn storage errors within the block into one clear error about writing a study."""
    try:
        yield
    except Exception as error:
        if not _is_storage_error(error):
            raise
        if _is_caused_by_lock(error):
            raise in_use(file) from error
        if (refused := _refused_write(file, error)) is not None:
            raise refused from error
        raise MachineError(
            f"cannot write the study {file}: {first_line(error.__cause__ or error)}",
            remedy="free disk space, correct its permissions or choose another --workspace",
        ) from error


def clear_errors(file: Path) -> AbstractContextManager[None]:
    """Turn errors within the block into one clear error about opening or reading a study."""

    def explain(error: BaseException) -> JobError:
        if _is_caused_by_lock(error):
            return in_use(file)
        if (refused := _refused_write(file, error)) is not None:
            return refused
        # SQLAlchemy, sqlite3 and json raise a dozen types for a file that is damaged or not a database.
        return DamagedError(
            f"the study {file} cannot be opened: {first_line(error)}",
            remedy="run the job again to restore it from its backup, or move the file away to search from the start",
        )

    return explaining(explain)
