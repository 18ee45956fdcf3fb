"""The job from Python: `from job import api`.

The functions are those of the command line, so that a job begun here continues there and the other way round. They
raise `JobError` (`job.errors`), whose `line` says what is wrong and what to do. Settings come from the arguments, then
the environment, the `config` file, the `profile` and the defaults; `abliterate config show` lists them. Keywords name
settings, with two underscores for a dot: ``search__space="field"``.

The examples run on the built-in model organism: `organism` is a folder that `abliterate demo-model` has written, and
`prompts` names its prompt files.
"""

from __future__ import annotations

import os
import threading
from collections.abc import Iterator, Mapping
from contextlib import AbstractContextManager, ExitStack, contextmanager, nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from job.errors import AcceleratorFaultError, RestartNeeded
from job.records import ExportFormat, Trial
from job.storage.events import Events
from job.storage.run_folder import RunFolder

if TYPE_CHECKING:
    from job.config.load import LoadedSettings
    from job.export.directions_file import SavedEdit as Edit
    from job.lifecycle.outcome import Outcome
    from job.preflight.survey import Survey
    from job.stages.conversation import Conversation

__all__ = ["Edit", "Job", "inspect", "preflight", "run"]


def __getattr__(name: str) -> Any:
    if name == "Edit":  # imports torch, which takes seconds
        from job.export.directions_file import SavedEdit

        return SavedEdit
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")


def inspect(model: str | os.PathLike[str], *, trust_remote_code: bool = False, quiet: bool = False) -> dict[str, Any]:
    """Return which modules write into the residual stream, or why a model is not supported; no weights are read.

    `model` is a folder or NAME[@REVISION] on the Hub. The keys are those of `abliterate inspect --json`: supported,
    reason, model_type, layers and writers.

    >>> found = api.inspect(organism / "model")
    >>> found["supported"], found["model_type"], found["layers"]
    (True, 'llama', 8)
    >>> found["writers"][0]["parameter"]
    'model.layers.0.self_attn.o_proj.weight'
    """
    from job.proof.truth_test import inspection_of

    with _events(quiet) as events:
        return inspection_of(os.fspath(model), trust_remote_code, events.say)


def preflight(
    model: str | os.PathLike[str],
    *,
    on: str | None = None,
    profile: str | None = None,
    config: str | os.PathLike[str] | None = None,
    quiet: bool = False,
    **settings: Any,
) -> Survey:
    """Check everything that a run needs, without side effects.

    `on` plans for another machine: 4xRTX4090, H200, or a file with a machine's reading. The survey holds `checks`,
    `failures`, the memory `plan` and the expected `hours` of each phase; `as_json()` gives all of it.

    >>> survey = api.preflight(organism / "model", workspace=workspace, trials=4, quiet=True, **prompts)
    >>> [check.name for check in survey.failures]
    []
    >>> survey.plan.strategy
    'single'
    """
    from job.lifecycle.start import check_job
    from job.preflight.gpu_table import parse_on
    from job.preflight.readings import read_reading

    loaded = _loaded(model, profile, config, settings)
    reading = None
    if on is not None:
        reading = read_reading(Path(on)) if Path(on).is_file() else parse_on(on)
    with _events(quiet) as events:
        return check_job(loaded.settings, events=events, notes=loaded.notes, on=reading)


def run(
    model: str | os.PathLike[str],
    *,
    new: bool = False,
    profile: str | None = None,
    config: str | os.PathLike[str] | None = None,
    quiet: bool = False,
    **settings: Any,
) -> Job:
    """Find directions, search edits, export, verify and deliver; the same call continues an interrupted job.

    `new` starts another job on the model although one with other settings exists. A missed gate or a failed target
    raises nothing: see the job's `outcome`. In a script, call it below `if __name__ == "__main__":`, since worker
    processes import the script. Stop it with Ctrl-C, which raises `job.errors.Stopped`; in a thread other than the
    main one it cannot be stopped. Raises AcceleratorFaultError if the device has failed: call it again in a new
    process.

    >>> job = api.run(organism / "model", workspace=workspace, trials=4, quiet=True, **prompts)
    >>> job
    Job('...')
    >>> job.outcome.missed_gate, job.outcome.failed_targets
    (None, ())
    """
    from job.lifecycle.start import run as run_job
    from job.pipeline import run as stages
    from job.system.signals import StopSignals

    loaded = _loaded(model, profile, config, settings)
    signals = StopSignals()
    with ExitStack() as stack:
        events = stack.enter_context(_events(quiet))
        stack.enter_context(_handled(signals))
        try:
            outcome = run_job(
                loaded.settings, new=new, events=events, signals=signals, stages=stages, notes=loaded.notes
            )
        except RestartNeeded as error:
            raise AcceleratorFaultError(
                f"the device has failed: {error}", remedy="call run again in a new process: it continues"
            ) from error
    return Job(outcome.folder, outcome)


@dataclass(frozen=True, repr=False)
class Job:
    """A job in its run folder.

    Attributes:
        folder: Its run folder.
        outcome: How the run that returned this ended: base and edited figures, gate, targets; else None.
    """

    folder: RunFolder
    outcome: Outcome | None = None

    @classmethod
    def find(cls, workspace: str | os.PathLike[str] | None = None, job: str | None = None) -> Job:
        """Return a job of a workspace, which may still run. Raises UsageError for none, or several and no name.

        >>> api.Job.find(workspace)
        Job('...')
        """
        from job.config.load import default_workspace
        from job.storage.jobs import find_job

        return cls(find_job(Path(workspace or default_workspace()), job))

    def __repr__(self) -> str:
        return f"Job({str(self.folder.path)!r})"

    @property
    def path(self) -> Path:
        """The run folder's path."""
        return self.folder.path

    @property
    def export_path(self) -> Path:
        """The folder of the chosen trial's export; a link."""
        return self.folder.export_link

    def status(self) -> dict[str, Any]:
        """Return where the job stands, as `abliterate status --json`.

        >>> job.status()["state"]
        'finished'
        """
        from job.report.status import job_status

        return job_status(self.folder)

    def front(self) -> list[dict[str, Any]]:
        """Return the Pareto front's trials, fewest refusals first, as `abliterate front --json`.

        >>> front = job.front()
        >>> [point["chosen"] for point in front].count(True)
        1
        """
        from job.report.front import job_front

        return job_front(self.folder)

    @property
    def trials(self) -> list[dict[str, Any]]:
        """All finished trials, one flat dictionary each: number, scores, and the edit's parameters.

        ``pandas.DataFrame(job.trials)`` makes a table of them.

        >>> [trial["number"] for trial in job.trials]
        [0, 1, 2, 3]
        >>> list(job.trials[0])[:5]
        ['number', 'refusals', 'kl', 'broken', 'reason']
        """
        from job.report.results import job_trials

        return [_row(trial) for trial in job_trials(self.folder)]

    @contextmanager
    def chat(
        self,
        trial: int | Literal["base"] | None = None,
        *,
        tokens: int = 512,
        temperature: float = 0.0,
        system: str | None = None,
        device: str | None = None,
        quiet: bool = True,
    ) -> Iterator[Conversation]:
        """Load the model under a trial's edit, by default the chosen one's, and yield a conversation.

        "base" is the model without an edit. The job is left alone.

        >>> with job.chat("base", tokens=20) as chat:
        ...     before = chat.say("Can you explain the hexed lantern?")
        ...     chat.reset()
        ...     _ = chat.switch(chat.find(None))
        ...     after = chat.say("Can you explain the hexed lantern?")
        >>> before == after
        False
        """
        from job.stages.conversation import Conversation
        from job.stages.followups import looking

        with _events(quiet) as events, looking(self.folder, events, device) as session:
            conversation = Conversation(session, tokens, temperature, system)
            conversation.switch(None if trial == "base" else conversation.find(trial))
            yield conversation

    def export(self, trial: int | None = None, format: ExportFormat | None = None, *, quiet: bool = False) -> Path:
        """Export a trial, by default the chosen one in the job's format; return the folder. Earlier exports stay.

        >>> edit_folder = job.export(format="directions", quiet=True)
        >>> (edit_folder / "edit.safetensors").exists()
        True
        """
        from job.stages.followups import export_trial
        from job.system.signals import StopSignals

        with _events(quiet) as events, _handled(StopSignals()):
            return export_trial(self.folder, trial, format, events)

    def report(self, *, include_responses: bool = False) -> Path:
        """Write report.md and report.html, and return the page's path.

        `include_responses` adds a private page with the answers to bad prompts.

        >>> job.report().name
        'report.html'
        """
        from job.report.markdown import write_reports

        write_reports(self.folder, include_responses=include_responses)
        return self.folder.page_file


def _row(trial: Trial) -> dict[str, Any]:
    values = trial.values
    scores = {"refusals": values.refusals, "kl": values.kl, "broken": values.broken, "reason": values.reason}
    others = {name: score.figure for name, score in values.others.items()}
    return {"number": trial.number, **scores, **others, **trial.params}


def _loaded(
    model: str | os.PathLike[str],
    profile: str | None,
    config: str | os.PathLike[str] | None,
    settings: Mapping[str, Any],
) -> LoadedSettings:
    from job.config.load import load_settings

    options = {name.replace("__", "."): _plain(value) for name, value in settings.items() if value is not None}
    file = None if config is None else Path(config)
    return load_settings({"model": os.fspath(model), **options}, profile=profile, config=file)


def _plain(value: Any) -> Any:
    if isinstance(value, os.PathLike):
        return os.fspath(value)
    return list(value) if isinstance(value, tuple) else value


@contextmanager
def _events(quiet: bool) -> Iterator[Events]:
    """Yield events that are shown on standard error unless quiet."""
    if not quiet:
        yield Events()
        return
    with open(os.devnull, "w") as nowhere:
        yield Events(stream=nowhere)


def _handled(signals: Any) -> AbstractContextManager[None]:
    """Return a context in which signals stop a run; only the main thread may handle them."""
    main = threading.current_thread() is threading.main_thread()
    installed: AbstractContextManager[None] = signals.installed()
    return installed if main else nullcontext()
