"""Run all checks of a job concurrently, for this machine or another.

Each group of checks accesses another resource (disk, GPU, Hub, target) in its own thread, and returns its checks and
findings. Only descriptive files and prompts are downloaded.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass

from job.config.schema import Settings
from job.data.prompts import PromptSets
from job.data.sources import parse_source
from job.preflight.checks import guarded, require_known
from job.preflight.conclusion import conclude
from job.preflight.data_checks import examine_data
from job.preflight.inputs import PreflightInputs
from job.preflight.job_checks import job_checks, settings_checks
from job.preflight.machine_checks import examine_machine
from job.preflight.model_checks import examine_model
from job.preflight.scorer_checks import scorer_checks
from job.preflight.survey import Survey
from job.preflight.target_checks import delivery_checks
from job.system.extras import require_quantization
from job.system.hub_client import count_traffic
from job.system.tempdirs import scratch


@dataclass(frozen=True)
class PreflightResult:
    """Results of preflight: the survey, and the prompts or None if unreadable."""

    survey: Survey
    prompts: PromptSets | None


def preflight(inputs: PreflightInputs) -> PreflightResult:
    """Run all checks. Raises UsageError for a malformed setting, or a missing package."""
    require_known(inputs.settings.allow)
    if inputs.on is None:
        require_quantization(inputs.settings.loading.quantization)
    _import_before_threads(inputs.settings)
    count_traffic()
    with contextlib.ExitStack() as stack:
        cache = None if inputs.keep_downloads else stack.enter_context(scratch("headers"))
        executor = stack.enter_context(_threads())
        data_future = executor.submit(examine_data, inputs)
        model_future = executor.submit(examine_model, inputs, cache, data_future.result)
        machine_future = executor.submit(examine_machine, inputs)
        targets_future = executor.submit(guarded, "target", lambda: delivery_checks(inputs))
        scorers_future = executor.submit(guarded, "scorer", lambda: scorer_checks(inputs, cache))
        first = [*settings_checks(inputs), *job_checks(inputs)]
        model, data, machine = model_future.result(), data_future.result(), machine_future.result()
        groups = (
            *first,
            *model.checks,
            *data.checks,
            *machine.checks,
            *targets_future.result(),
            *scorers_future.result(),
        )
        # After the others, whose reading and writing would count in the disk's speed.
        end = conclude(inputs, model, data, machine)
    return PreflightResult(end.model_copy(update={"checks": (*groups, *end.checks)}), data.prompts)


def _import_before_threads(settings: Settings) -> None:
    """Import modules shared by threads: transformers' lazy imports are not thread-safe."""
    import job.model.loading
    import job.proof.truth_test  # noqa: F401

    if any(parse_source(source).kind in ("folder", "hub") for source in settings.prompt_sets().values()):
        import datasets  # noqa: F401


@contextlib.contextmanager
def _threads() -> Iterator[ThreadPoolExecutor]:
    """Yield an executor that is not awaited when a signal leaves the block."""
    executor = ThreadPoolExecutor(max_workers=4, thread_name_prefix="preflight")
    try:
        yield executor
    finally:
        executor.shutdown(wait=False, cancel_futures=True)
