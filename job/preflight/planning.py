"""A job's need of disk, memory, time and money, from model, prompts and machine."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from job.config.schema import Settings
from job.data.prompts import PromptSets
from job.errors import JobError
from job.model.files import ModelListing, ModelSource, missing_bytes
from job.preflight.disk import DiskNeed, DiskSpeed
from job.preflight.estimate import Hours, PhaseWork, Rates, device_rates, estimate
from job.preflight.gpu_table import card_of, offers_query
from job.preflight.gradient_memory import DescentRow, GradientPlan, gradient_plan
from job.preflight.inputs import EarlierStarts
from job.preflight.memory_plan import MemoryPlan, Workload
from job.preflight.model_facts import ModelFacts
from job.preflight.readings import MachineReading
from job.preflight.selftest import Exercise
from job.preflight.table_memory import EditTables
from job.records import TRIALS_PER_WORKER
from job.search.bounds import MOST_FINALISTS
from job.search.method import first_method, planned_trials
from job.transfer.folders import target_folder

# Rates where none could be measured, bytes a second: a modest rented line and disk.
LINE, DISK = 12e6, 200e6
# Stages of the descent until refusals return.
DESCENT_STAGES = 5
_DTYPE_BYTES = {"float32": 4}


@dataclass(frozen=True)
class Planning:
    """Known facts of a job before it starts."""

    settings: Settings
    source: ModelSource
    listing: ModelListing
    facts: ModelFacts
    prompts: PromptSets
    folder: Path

    def needs(self) -> list[DiskNeed]:
        """Return the disk space that the job will need, by folder and purpose."""
        workspace, weights = Path(self.settings.workspace), self.facts.stored_bytes
        prompts = self.prompts
        sets = (prompts.good, prompts.bad, prompts.helpfulness, prompts.unhelpfulness, prompts.capability)
        residuals = sum(map(len, sets)) * (self.facts.layers + 1) * self.facts.hidden * 4
        needs = [
            DiskNeed(path=workspace, bytes=weights, what="export", database=True, keep=True),
            DiskNeed(path=workspace, bytes=residuals * self.settings.directions.iterative_rounds, what="residuals"),
        ]
        if self.source.kind == "hub":
            from huggingface_hub import constants

            missing = missing_bytes(self.source, self.listing)
            needs.append(DiskNeed(path=Path(constants.HF_HUB_CACHE), bytes=missing, what="model", files=50))
        local = [target for target in self.settings.upload if target.startswith("file:")]
        return needs + [
            DiskNeed(path=target_folder(target), bytes=weights, what=f"delivery to {target}") for target in local
        ]

    def reachable(self, reading: MachineReading) -> MachineReading:
        """Return a reading with only the allowed devices."""
        device = self.settings.loading.device
        if device == "cpu":
            return reading.model_copy(update={"gpus": ()})
        if device.startswith("cuda:"):
            index = int(device.partition(":")[2])
            return reading.model_copy(update={"gpus": reading.gpus[index : index + 1]})
        return reading

    def workload(self, dtype_bytes: int | None = None) -> Workload:
        """Return what memory is planned for, by default in the type that the settings and the files ask for."""
        return Workload(
            prompt_tokens=self._longest_prompt(),
            answer_tokens=self.settings.scoring.answer_tokens,
            dtype_bytes=dtype_bytes or self.dtype_bytes(),
            most_rows=self.settings.batching.rows or None,
            quantise=self.settings.ablation.row_normalization == "none",
            processes=self.settings.workers or 1,
            tables=EditTables(
                mode=self.settings.ablation.row_normalization,
                directions=self._directions(),
                trials=self.settings.batching.trials or self.settings.trials_per_batch or TRIALS_PER_WORKER,
            ),
        )

    def _directions(self) -> int:
        found = self.settings.directions
        added = found.n_components if found.method == "contrastive-pca" else 0
        return 1 + added + found.iterative_rounds - 1

    def _longest_prompt(self) -> int:
        """Return the longest prompt's tokens; a guess if the tokenizer fails, which has its own check."""
        from job.model.loading import load_tokenizer
        from job.model.rendering import conversations, token_ids

        prompts = self.prompts
        extraction = (*prompts.of_setting("good_prompts"), *prompts.of_setting("bad_prompts"))
        try:
            tokenizer = load_tokenizer(self.folder, self.settings.loading.trust_remote_code)
            texts = conversations(tokenizer, (*extraction, *prompts.good_search, *prompts.bad_search))
            return max(map(len, token_ids(tokenizer, texts)))
        except JobError:
            return Workload().prompt_tokens

    def dtype_bytes(self) -> int:
        """Return the size of a number in the type that the settings and the files ask for."""
        dtype = self.settings.loading.dtypes[0]
        if dtype != "auto":
            return _DTYPE_BYTES.get(dtype, 2)
        cast = sum(part.cast for part in self.facts.parts)
        kept = sum(part.kept for part in self.facts.parts)
        return 4 if cast and (self.facts.stored_bytes - kept) / cast > 3 else 2

    def descent(self, planned: MemoryPlan, earlier: EarlierStarts) -> GradientPlan | None:
        """Return the memory plan of the descent, None if the job makes none."""
        if earlier.path_found or first_method(self.settings.search.asked_method) != "gradient":
            return None
        work = self._planned_workload(planned)
        row = DescentRow.longest(work.prompt_tokens, work.dtype_bytes, work.tables.mode)
        return gradient_plan(self.facts, planned.devices, row, offloaded=planned.strategy == "offload")

    def _planned_workload(self, planned: MemoryPlan) -> Workload:
        return self.workload(4 if planned.dtype == "float32" else None)

    def hours(
        self,
        planned: MemoryPlan,
        *,
        reading: MachineReading,
        measured: Exercise | None,
        speeds: dict[str, DiskSpeed],
        line: float,
        earlier: EarlierStarts,
    ) -> Hours | None:
        """Return the duration of each phase, None if unknown; `line` is the download rate, bytes per second."""
        known = (measured.flops, measured.bandwidth) if measured else device_rates(reading)
        if known is None or not all(known):
            return None
        disk = min(speeds.values(), key=lambda found: found.write, default=DiskSpeed(write=DISK, read=DISK))
        work = self._planned_workload(planned)
        remote = sum(not target.startswith("file:") for target in self.settings.upload)
        descent_rows = planned.gradient.rows if planned.gradient is not None else 0
        asked = "tpe" if planned.gradient is not None and not descent_rows else self.settings.search.asked_method
        trials = earlier.trials_wanted or planned_trials(self.settings.trials, asked)
        finalist_prompts = len(self.prompts.bad_search) + len(self.prompts.bad_choice)
        task = PhaseWork(
            download_bytes=missing_bytes(self.source, self.listing) if measured else self.listing.size,
            weights_bytes=self.facts.weights_bytes(work.dtype_bytes),
            active_parameters=self.facts.active_parameters,
            direction_prompts=len(self.prompts.good) + len(self.prompts.bad),
            generated_prompts=len(self.prompts.bad_search),
            compared_prompts=len(self.prompts.good_search),
            # Prompts and responses end at about half of the longest; a guess that the observed rate corrects.
            prompt_tokens=work.prompt_tokens / 2,
            answer_tokens=min(work.answer_tokens / 2, self.settings.scoring.search_tokens),
            gradient_stages=DESCENT_STAGES if descent_rows else 0,
            gradient_rows=descent_rows,
            trials=max(trials - earlier.trials_done, 0),
            finalist_answers=min(MOST_FINALISTS, trials) * finalist_prompts,
            finalist_tokens=work.answer_tokens / 2,
            rows=planned.rows,
            export_bytes=self.facts.stored_bytes,
            upload_bytes=self.facts.stored_bytes * remote,
        )
        flops, bandwidth = known
        rates = Rates(download=line, upload=line, read=disk.read, write=disk.write, flops=flops, bandwidth=bandwidth)
        return estimate(task, rates)

    def offers(self, reading: MachineReading) -> str | None:
        """Return a query for a machine like the planned one, None if the table lacks its cards."""
        card = card_of(reading.gpus[0]) if reading.gpus else None
        room = sum(need.bytes for need in self.needs()) + self.listing.size
        return None if card is None else offers_query(card, len(reading.gpus), int(1.2 * room) + 20 * 2**30)
