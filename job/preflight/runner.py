"""All checks of a job, at once: what is planned, on this machine or on one that is only thought of.

Each group of checks talks to something else (disk, GPU, Hub, target) and runs in a thread of its own; a group
that depends on others waits for them. Nothing is downloaded but what describes the model, and the prompts.
"""

from __future__ import annotations

import contextlib
import json
import os
import time
from collections import Counter
from collections.abc import Callable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from job.config.schema import Settings
from job.data.prompts import PromptSets, load_prompts
from job.data.sources import parse_source
from job.errors import ImpossibleJobError, JobError, MachineError, UsageError
from job.model.files import (
    ModelListing,
    ModelSource,
    fetch_model,
    line_speed,
    list_model,
    parse_model,
    require_complete,
    tensor_shapes,
)
from job.preflight import limit_checks, model_checks
from job.preflight.checks import Check, exit_code, is_allowed, require_known
from job.preflight.data_checks import data_checks
from job.preflight.disk import DiskSpeed, disk_checks
from job.preflight.estimate import Hours, cost_check, time_check
from job.preflight.gpu import gpu_checks
from job.preflight.gpu import holders as holders_check
from job.preflight.limits import read_limits
from job.preflight.machine import read_machine
from job.preflight.memory_plan import MemoryPlan, differences, memory_check, plan
from job.preflight.model_facts import ModelFacts, model_facts, undone
from job.preflight.planning import LINE, Planning
from job.preflight.readings import MachineReading
from job.preflight.rental_checks import checkpoint_check, database_check, expected_bytes, lease_check, rental_checks
from job.preflight.restarts import PastStart, restart_check
from job.preflight.selftest import RATE_SECONDS, Exercise, compute_check, exercise
from job.preflight.strays import own_leftovers
from job.preflight.target_checks import target_checks
from job.records import Record
from job.system.hub_client import count_traffic
from job.system.processes import ProcessRecord
from job.system.tempdirs import scratch

if TYPE_CHECKING:
    from job.architectures.spec import Architecture
    from job.cloud.self_stop import Rental


class Survey(Record):
    """preflight.json: what was found.

    Attributes:
        checks: All checks.
        allowed: Checks that may fail, by the user's word.
        plan: How the model goes onto the machine, None where it was not got to.
        hours: What each phase will take, None likewise.
        offers: How to find such a machine, where one was only thought of.
        commit: The commit of a model on the Hub.
        public: Everybody may see that model's page.
    """

    checks: tuple[Check, ...]
    allowed: tuple[str, ...] = ()
    plan: MemoryPlan | None = None
    hours: Hours | None = None
    offers: str | None = None
    commit: str | None = None
    public: bool = False

    @property
    def exit_code(self) -> int:
        """What the process is to end with if the job must not start, else 0."""
        return exit_code(self.checks, self.allowed)

    @property
    def summary(self) -> str:
        """How many checks came out how."""
        counts = Counter(check.status for check in self.checks)
        return ", ".join(f"{counts[status]} {status}" for status in ("ok", "warn", "fail") if counts[status])

    def as_json(self) -> dict[str, Any]:
        """Return the survey as `preflight --json` prints it (DESIGN section 6)."""
        return {"ok": not self.failures, **self.model_dump(mode="json")}

    def require(self) -> None:
        """Raise if the job must not start.

        Raises:
            ImpossibleJobError: No machine could do it.
            MachineError: This machine cannot.
        """
        if not self.failures:
            return
        kind = ImpossibleJobError if self.exit_code == ImpossibleJobError.exit_code else MachineError
        # The worst first: what no machine could do.
        first = min(self.failures, key=lambda check: check.scope)
        others = len(self.failures) - 1
        more = f" (and {others} more, see `abliterate preflight`)" if others else ""
        raise kind(f"preflight: {first.name}: {first.measured}{more}", remedy=first.remedy)

    @property
    def failures(self) -> list[Check]:
        """The checks that keep the job from starting."""
        return [check for check in self.checks if check.status == "fail" and not is_allowed(check, self.allowed)]


@dataclass
class Surveyor:
    """Makes a survey.

    Attributes:
        settings: The job.
        notes: What became of old settings.
        on: The machine to plan for; None for this one.
        prompts: The job's prompts where an earlier start has read them.
        commit: The commit that the model is pinned to, None where it is not yet.
        left_by: What earlier runs said of their processes.
        starts: The job's past starts.
        settings_key: What tells these settings from those of past starts.
        trials_done: Trials of the study.
        held: Who holds the job, None if nobody.
        held_remedy: What to do about it.
        leased: Name of the job whose lease at the checkpoint is looked at; None where this run has taken it.
        uploads: Folder in which what was learnt of targets is remembered, None for nowhere.
        rental: The rented machine that this is, None if it is none that is known.
        undelivered: Which other job of the workspace keeps it from being ended, "" if there is none.
        keep: What is fetched may stay in the caches.
        report: Told of what is tried again.
        clock: Returns seconds.
        sleep: Waits so many seconds.
    """

    settings: Settings
    notes: tuple[str, ...] = ()
    on: MachineReading | None = None
    prompts: PromptSets | None = None
    commit: str | None = None
    left_by: tuple[ProcessRecord, ...] = ()
    starts: tuple[PastStart, ...] = ()
    settings_key: str = ""
    trials_done: int = 0
    held: str | None = None
    held_remedy: str = "wait for it to end or stop it"
    leased: str | None = None
    uploads: Path | None = None
    rental: Rental | None = None
    undelivered: str = ""
    keep: bool = True
    report: Callable[[str], None] = lambda _: None
    clock: Callable[[], float] = time.monotonic
    sleep: Callable[[float], None] = time.sleep

    _model: tuple[ModelSource, ModelListing, Path] | None = field(init=False, default=None)
    _facts: ModelFacts | None = field(init=False, default=None)
    _architecture: Architecture | None = field(init=False, default=None)
    _reading: MachineReading | None = field(init=False, default=None)
    _line: float = field(init=False, default=LINE)
    _exercise: Exercise | None = field(init=False, default=None)

    def survey(self) -> Survey:
        """Make all checks.

        Raises:
            UsageError: A setting is malformed.
        """
        require_known(self.settings.allow)
        _import_before_threads(self.settings)
        count_traffic()
        with contextlib.ExitStack() as stack:
            cache = None if self.keep else stack.enter_context(scratch("headers"))
            executor = stack.enter_context(_threads())
            data = executor.submit(self._guarded, "data", self._data_checks)
            model = executor.submit(self._guarded, "model", lambda: self._model_checks(cache, data))
            machine = executor.submit(self._guarded, "machine", self._machine_checks)
            targets = executor.submit(self._guarded, "target", self._target_checks)
            checks = [*self._settings_checks(), *self._job_checks()]
            for group in (model, data, machine, targets):
                checks += group.result()
            # After the others, whose reading and writing would count in the disk's speed.
            return self._concluded(checks)

    def _guarded(self, name: str, group: Callable[[], list[Check]]) -> list[Check]:
        """Return a group's checks; what it raises becomes one."""
        try:
            return group()
        except UsageError:
            raise
        except JobError as error:
            return [_failed(name, error)]

    # --- settings and the job itself -----------------------------------------------------------------

    def _settings_checks(self) -> list[Check]:
        checks = [
            Check(
                name="settings.old", status="warn", measured=note, needed="today's names", remedy="rename or remove it"
            )
            for note in self.notes
        ]
        settings = self.settings
        if settings.directions.orthogonalize_direction and settings.directions.method == "probe":
            checks.append(
                Check(
                    name="settings.directions",
                    status="warn",
                    measured="directions.orthogonalize_direction has no effect on the probe",
                    needed="settings that have an effect",
                    remedy="use it with mean-difference or contrastive-pca",
                )
            )
        if not checks:
            checks.append(Check(name="settings", status="ok", measured="valid", needed="settings that go together"))
        return checks

    def _job_checks(self) -> list[Check]:
        """Return the checks of locks, leftovers and restarts."""
        if self.on is not None:
            return []
        checks = [restart_check(self.starts, self.settings_key)]
        leased = self.leased
        if leased is not None:
            checks += self._guarded("job.lease", lambda: [lease_check(self.settings, leased)])
        lock = Check(
            name="job.lock",
            status="fail" if self.held else "ok",
            measured=f"held by {self.held}" if self.held else "nobody holds this job",
            needed="no other run of this job",
            remedy=self.held_remedy if self.held else "",
        )
        return [lock, *checks]

    # --- the model -----------------------------------------------------------------------------------

    def _model_checks(self, cache: Path | None, data: Future[list[Check]]) -> list[Check]:
        source = parse_model(self.settings.model)
        listing = list_model(source, self.commit, self.report)
        folder = fetch_model(source, listing, self.report, weights=False, cache=cache)
        self._model = (source, listing, folder)
        if self.on is None:
            self._line = line_speed(source, listing, self.settings.probe_seconds) or LINE
        return [
            model_checks.files(source, listing),
            *self._guarded(
                "model.architecture",
                lambda: [self._architecture_check(folder)],
            ),
            *self._guarded("model.weights", lambda: self._weights_checks(source, listing, folder)),
            model_checks.licence(listing, self.settings.upload),
            # Last: it waits for the prompts.
            *self._guarded("model.tokenizer", lambda: self._tokenizer_checks(folder, data)),
        ]

    @property
    def _trusted(self) -> bool:
        return self.settings.loading.trust_remote_code

    def _tokenizer_checks(self, folder: Path, data: Future[list[Check]]) -> list[Check]:
        from job.model.loading import load_tokenizer

        loaded = load_tokenizer(folder, self._trusted)
        data.result()
        prompts = self.prompts.everything if self.prompts is not None else ()
        return [
            model_checks.tokenizer(loaded),
            *self._guarded("model.template", lambda: [model_checks.template(loaded, prompts)]),
        ]

    def _architecture_check(self, folder: Path) -> Check:
        from job.proof.truth_test import inspect_model

        self._architecture = inspect_model(folder, self._trusted)
        return model_checks.architecture(
            self._architecture, self.settings.ablation.row_normalization, self.settings.export_format
        )

    def _weights_checks(self, source: ModelSource, listing: ModelListing, folder: Path) -> list[Check]:
        shapes = tensor_shapes(source, listing, self.report)
        require_complete(folder, listing, shapes)
        config = json.loads((folder / "config.json").read_text())
        self._facts = model_facts(config, shapes)
        if self._architecture is not None:
            model_checks.require_writers(self._architecture, folder, self._trusted, undone(config, shapes))
        return [model_checks.weights(self._facts, listing, len(shapes))]

    # --- the prompts ---------------------------------------------------------------------------------

    def _data_checks(self) -> list[Check]:
        if self.prompts is None:
            self.prompts = load_prompts(self.settings, lambda _: None)
        return data_checks(self.prompts)

    # --- the machine ---------------------------------------------------------------------------------

    def _machine_checks(self) -> list[Check]:
        if self.on is not None:
            self._reading = self.on
            return gpu_checks(self.on) if self.on.gpus else []
        reading = self._waited_for()
        self._reading = reading
        device = self.settings.loading.device
        if device == "auto":
            device = "cuda:0" if reading.gpus else "cpu"
        self._exercise = exercise(device, seconds=min(RATE_SECONDS, self.settings.probe_seconds))
        limits = read_limits()
        checks = [compute_check(self._exercise), own_leftovers(self.left_by, reading)]
        if device.startswith("cuda"):
            checks += gpu_checks(reading)
        assert reading.memory is not None
        assert reading.cpus is not None
        return [
            *checks,
            limit_checks.shared_memory(reading.memory),
            limit_checks.threads(reading.cpus, os.environ),
            limit_checks.cpu_quota(reading.cpus, os.environ),
            limit_checks.open_files(limits),
        ]

    def _waited_for(self) -> MachineReading:
        """Return the reading of this machine, once others have left its GPUs or the time for that is up."""
        deadline = self.clock() + 60 * self.settings.wait_for_gpu
        while True:
            reading = read_machine(torch_architectures=True)
            taken = any(holders_check(gpu).status != "ok" for gpu in reading.gpus)
            if not taken or self.clock() >= deadline:
                return reading
            self.report("others hold memory of the GPUs; waiting for them to leave")
            self.sleep(min(10.0, max(deadline - self.clock(), 0.0)))

    def _target_checks(self) -> list[Check]:
        """Return a check of every target: that it can be written, without leaving anything there."""
        checks = [
            check for target in self.settings.upload for check in target_checks(target, self.settings, self.uploads)
        ]
        return checks + ([] if self.on else rental_checks(self.settings, self.rental, self.undelivered))

    # --- what follows from all of it -----------------------------------------------------------------

    def _concluded(self, checks: list[Check]) -> Survey:
        """Return the survey with the checks that need several groups' results."""
        survey = Survey(checks=tuple(checks), allowed=tuple(self.settings.allow))
        if self._model is None or self._facts is None or self.prompts is None or self._reading is None:
            return survey
        planning = Planning(self.settings, *self._model[:2], self._facts, self.prompts, self._model[2])
        speeds: dict[str, DiskSpeed] = {}
        if self.on is None:
            checks += self._guarded("disk", lambda: disk_checks(planning.needs(), speeds, self.settings.probe_seconds))
        planned = plan(self._facts, planning.reachable(self._reading), planning.workload())
        hours: Hours | None = None
        wanted: tuple[str, ...] = ()
        if isinstance(planned, MemoryPlan):
            loading = self.settings.loading
            wanted = differences(planned, loading.device_map, loading.quantization)
        # For a machine that is only thought of, the plan's settings are what was asked for.
        checks.append(memory_check(planned, () if self.on else wanted))
        if isinstance(planned, MemoryPlan):
            if self._reading.memory is not None and self.on is None:
                checks.append(limit_checks.ram(self._reading.memory, planned.host_bytes))
            hours = planning.hours(
                planned,
                reading=self._reading,
                measured=self._exercise,
                speeds=speeds,
                line=self._line,
                trials_done=self.trials_done,
            )
        if self.settings.checkpoint is not None:
            held = expected_bytes(self.prompts, self._facts.layers, self._facts.hidden)
            checks += self._guarded("checkpoint", lambda: [checkpoint_check(self.settings, held)])
        database = self.settings.database
        if database is not None and self.on is None:
            checks += self._guarded("database", lambda: [database_check(database)])
        if hours is not None:
            checks.append(time_check(hours, self.settings.max_hours))
            checks.append(cost_check(hours, self.settings.price, self.settings.max_cost))
        return survey.model_copy(
            update={
                "checks": tuple(checks),
                "plan": planned if isinstance(planned, MemoryPlan) else None,
                "hours": hours,
                "offers": planning.offers(self.on) if self.on else None,
                "commit": self._model[1].commit,
                "public": self._model[1].public,
            }
        )


def _import_before_threads(settings: Settings) -> None:
    """Import what several threads use: transformers' lazy modules are not there yet while another thread loads them."""
    import job.model.loading
    import job.proof.truth_test  # noqa: F401

    if any(parse_source(source).kind != "file" for source in settings.prompt_sets().values()):
        import datasets  # noqa: F401


@contextlib.contextmanager
def _threads() -> Iterator[ThreadPoolExecutor]:
    """Yield an executor that is not waited for when a signal leaves the block."""
    executor = ThreadPoolExecutor(max_workers=4, thread_name_prefix="preflight")
    try:
        yield executor
    finally:
        executor.shutdown(wait=False, cancel_futures=True)


def _failed(name: str, error: JobError) -> Check:
    return Check(
        name=name,
        status="fail",
        measured=str(error),
        needed="that it can be had",
        remedy=error.remedy,
        scope="job" if isinstance(error, ImpossibleJobError) else "machine",
    )
