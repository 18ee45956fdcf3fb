"""Untrusted files: a reproduce.json and a checkpoint decide what is computed, and nothing about this machine."""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from job.config.load import default_values, leaves, load_settings, merged, nested, setting_names
from job.config.origins import EDIT, HERE, JOB, NAMED, PROMPT_SETS, TRUST, left_out_line
from job.data.prompts import PromptSets
from job.errors import JobError, UsageError
from job.export.reproduction import (
    Reproduction,
    fixed_settings,
    read_reproduction,
    reproduction,
    require_same_repository,
)
from job.lifecycle.locate import Whereabouts
from job.lifecycle.resumption import resumption
from job.mirror import MirrorError, MirrorOptions, SnapshotPace, open_mirror
from job.mirror.records import decode_head, is_mirrored
from job.mirror.vetting import proven
from job.records import JobRecord, Manifest, ManifestEntry, State, Upload
from job.storage.atomic import write_record
from job.storage.identity import identify, job_id, versions
from job.storage.jobs import job_settings
from job.storage.run_folder import RunFolder
from job.text import patterns
from tests.fakes.hub import LoopbackHub
from tests.helpers import Result, abliterate, made_from
from tests.system.model.test_own_code import CODE, MAP

PACE = SnapshotPace(beat_s=5.0, expiry_s=60.0, snapshot_s=0.02, poll_s=0.1)
COMMIT = "c" * 40
PROMPTS = {name: f"kitchen/{name}@{COMMIT}#train[2:9]/ask" for name in PROMPT_SETS}
# A non-default value for every setting, as a hostile file would set.
OTHERS: dict[str, Any] = {
    "model": "cook/soup",
    "workspace": "/elsewhere",
    "behaviour": "prose",
    "seed": 3,
    "trials": 7,
    "startup_trials": 2,
    "trials_per_batch": 2,
    "kl_tokens": 3,
    "skip_kl_above": 1.5,
    "tune": True,
    "checkpoint": "file:///elsewhere",
    "require_checkpoint": True,
    "when_done": "destroy",
    "when_failed": "destroy",
    "upload": ["s3://elsewhere/out"],
    "visibility": "public",
    "export_format": "directions",
    "max_kl": 0.5,
    "max_refusals": 9,
    "allow": ["disk.space"],
    "price": 0.0,
    "max_hours": 2.0,
    "max_cost": 3.0,
    "study_storage": "local",
    "workers": 3,
    "engine": "ray",
    "address": "elsewhere:6379",
    "hang_seconds": 1.0,
    "grace": 1.0,
    "wait_for_gpu": 9.0,
    "probe_seconds": 1.0,
    "loading.dtypes": ["float32"],
    "loading.device": "cpu",
    "loading.device_map": "balanced",
    "loading.max_memory": {"0": "20GiB"},
    "loading.offload_folder": "/elsewhere",
    "loading.quantization": "bnb-4bit",
    "loading.trust_remote_code": True,
    "loading.response_prefix": "So:",
    "batching.rows": 8,
    "batching.trials": 2,
    "directions.method": "probe",
    "directions.orthogonalize_direction": True,
    "directions.orthogonalize_directions": True,
    "directions.winsorization_quantile": 0.9,
    "directions.n_components": 2,
    "directions.alpha": 0.5,
    "directions.pca_method": "full",
    "directions.eigenvalue_weighting": "equal",
    "directions.probe_regularization": 0.5,
    "directions.iterative_rounds": 2,
    "ablation.row_normalization": "pre",
    "ablation.through_norms": False,
    "ablation.pull_back": "gain",
    "search.method": "gradient",
    "search.space": "field",
    "search.ei_candidates": 9,
    "search.known_points": False,
    "search.ahead": 1,
    "search.racing": False,
    "search.objectives": ["soft", "kl"],
    "scoring.answer_tokens": 50,
    "scoring.search_tokens": 20,
    "scoring.refusal_markers": ["no"],
    "scoring.evasions": False,
    "scoring.gibberish": 3.0,
    "scoring.detectors": ["soft"],
    "scoring.nli_model": "elsewhere/nli",
    "scoring.thinking_tokens": 9,
    "scoring.words": ["delve"],
    "scoring.pattern": "as an? .*",
    "scoring.classifier": "elsewhere/classifier",
    "scoring.classifier_labels": ["rude"],
    "scoring.tasks": ["piqa"],
    "scoring.tasks_limit": 9,
    "scoring.tasks_folder": "/elsewhere",
    "judge.url": "https://elsewhere/v1",
    "judge.model": "elsewhere",
    "judge.question": "Is it?",
    "judge.parallel": 2,
    "judge.timeout": 5.0,
    "choice.refusal_tolerance": 0.1,
    "choice.held_out": 0.1,
    "card.behaviour": "another habit",
    "card.base_model": "cook/soup",
    "hub.pull_request": True,
    "s3.endpoint": "http://elsewhere",
    "s3.region": "elsewhere",
    "s3.addressing_style": "path",
    "s3.checksums": "when_required",
    "s3.part_mib": 6,
    "s3.parallel_parts": 2,
    "s3.sse": "aws:kms",
    "s3.kms_key": "elsewhere",
    **{f"{name}.spec": spec for name, spec in PROMPTS.items()},
    **{f"{name}.revision": COMMIT for name in PROMPT_SETS},
    **{f"{name}.config": "en" for name in PROMPT_SETS},
    **{f"{name}.split": "train[3:5]" for name in PROMPT_SETS},
    **{f"{name}.column": "ask" for name in PROMPT_SETS},
    **{f"{name}.max_characters": 9 for name in PROMPT_SETS},
    **{f"{name}.prefix": "Now: " for name in PROMPT_SETS},
    **{f"{name}.suffix": "?" for name in PROMPT_SETS},
    **{f"{name}.system_prompt": "Be brief." for name in PROMPT_SETS},
}
DEFAULTS = leaves(load_settings({"model": "-"}).settings.model_dump(mode="json"))


def job_of(values: dict[str, Any], **fields: Any) -> JobRecord:
    """Return the job.json of a job with these settings, named by their identity."""
    settings = load_settings({}, assignments=[]).settings if not values else _settings(values)
    identity = identify(settings)
    stored = settings.model_dump(mode="json")
    return JobRecord(
        job_id=job_id(identity),
        identity=identity,
        settings=stored,
        startup_trials=2,
        versions=versions(),
        **fields,
    )


def _settings(values: dict[str, Any]) -> Any:
    from job.config.schema import Settings

    return Settings(**merged(default_values(), nested(values)))


def mirror_of(place: Path, record: JobRecord, made: Path, *, prompts: bool = True, reason: str = "") -> str:
    """Write a checkpoint as a hostile host might, and return its URI."""
    run = RunFolder(made / record.job_id)
    run.path.mkdir(parents=True)
    write_record(run.job_file, record)
    write_record(run.state_file, State(state="preempted", trials=2, reason=reason))
    if prompts:
        one = [{"user": "Where is the kettle?"}]
        sets = dict.fromkeys(("good", "bad", "good_search", "bad_search", "good_report", "bad_report"), one)
        run.prompts_file.write_text(PromptSets.model_validate({**sets, "sources": {}, "commits": {}}).model_dump_json())
    with open_mirror(place.as_uri(), MirrorOptions(pace=PACE)) as mirror:
        claim = mirror.claim(run, record.identity, lambda _: None)
        claim.start()
        claim.request()
        assert claim.close()
    return place.as_uri()


# The lists


def test_every_setting_is_in_exactly_one_list() -> None:
    names = set(setting_names())
    assert names == EDIT | JOB | HERE, names ^ (EDIT | JOB | HERE)
    assert not EDIT & JOB
    assert not EDIT & HERE
    assert not JOB & HERE
    assert names == OTHERS.keys()
    same = {name for name in names if OTHERS[name] == DEFAULTS.get(name)}
    assert not same


# reproduce.json


@pytest.fixture
def hub(random_model_folder: Path) -> Iterator[LoopbackHub]:
    """Yield a Hub with a model, and with another user's model that includes its own code."""
    files = {path.name: path.read_bytes() for path in random_model_folder.iterdir()}
    described = json.loads(files["config.json"])
    described |= {"model_type": "kitchen", "architectures": ["KitchenForCausalLM"], "auto_map": MAP}
    own = {"config.json": json.dumps(described).encode(), "modeling_kitchen.py": CODE.encode()}
    with LoopbackHub(usual=True) as hub:
        hub.add_model("cook/soup", files)
        hub.add_model("evil/soup", {**files, **own})
        yield hub


def reproduction_of(hub: LoopbackHub, repository: str, **settings: Any) -> Reproduction:
    model = {"repository": repository, "commit": hub.repo("model", repository).sha}
    others = nested({name: value for name, value in DEFAULTS.items() if name in EDIT - NAMED})
    return made_from(model=model, base_model=repository, settings=merged(others, settings))


def run_again(hub: LoopbackHub, file: Path, folder: Path, *more: Any, **env: str) -> Result:
    (folder / "prompts.txt").write_text("".join(f"Where is kettle {number}?\n" for number in range(8)))
    prompts = [f"--{kind}-prompts" for kind in ("good", "bad", "good-eval", "bad-eval")]
    given = [word for option in prompts for word in (option, folder / "prompts.txt")]
    network = hub.environment(folder / "home") | {"HF_HUB_OFFLINE": "0", **env}
    return abliterate("run", *more, *given, "--workspace", folder / "runs", "--reproduce", file, **network)


def test_a_reproduce_json_runs_no_code(hub: LoopbackHub, tmp_path: Path) -> None:
    hostile = {"trust_remote_code": True, "device": "cpu"}
    file = tmp_path / "reproduce.json"
    file.write_text(reproduction_of(hub, "evil/soup", loading=hostile, upload=["file:///x"]).model_dump_json())
    refused = run_again(hub, file, tmp_path)
    refused.fails(3, f"{TRUST}=true")
    assert f"not read from {file}" in refused.err
    assert TRUST in refused.err.partition("not read from")[2].splitlines()[0]
    assert not list(tmp_path.rglob("*.ran"))


def test_trust_that_was_given_for_another_model_is_not_lent_to_a_file(hub: LoopbackHub, tmp_path: Path) -> None:
    file = tmp_path / "reproduce.json"
    file.write_text(reproduction_of(hub, "evil/soup").model_dump_json())
    trusting = {"ABLITERATE_LOADING__TRUST_REMOTE_CODE": "true"}
    commit = hub.repo("model", "evil/soup").sha
    for model in ((), ("evil/soup",), (f"evil/soup@{'d' * 40}",)):
        refused = run_again(hub, file, tmp_path, *model, **trusting)
        refused.fails(2, f"the code of evil/soup@{commit}", "MODEL as evil/soup@")
    run_again(hub, file, tmp_path, "cook/soup", **trusting).fails(2, "MODEL is cook/soup", "evil/soup@")
    assert not list(tmp_path.rglob("*.ran"))
    # Naming the commit that was read trusts it.
    settings = load_settings({"model": f"evil/soup@{commit}", TRUST: True}, fixed=None).settings
    require_same_repository(read_reproduction(file), settings, settings.model)


def test_a_pattern_in_a_reproduce_json_is_bounded(
    hub: LoopbackHub, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    file = tmp_path / "reproduce.json"
    file.write_text(reproduction_of(hub, "cook/soup", scoring={"pattern": "x" * 20_000}).model_dump_json())
    run_again(hub, file, tmp_path).fails(2, "scoring.pattern is longer than 10000 characters")
    monkeypatch.setattr(patterns, "SECONDS", 0.2)
    file.write_text(reproduction_of(hub, "cook/soup", scoring={"pattern": "(a+)+$"}).model_dump_json())
    with pytest.raises(UsageError, match="takes more than"):
        load_settings({}, fixed=fixed_settings(read_reproduction(file), str(file)))


def test_of_a_reproduce_json_only_what_identifies_the_edit_is_taken() -> None:
    said = nested({name: value for name, value in OTHERS.items() if name not in NAMED})
    whole = fixed_settings(made_from(settings={**said, "mind": 1}), "file")
    for name in EDIT - NAMED:
        assert whole.values[name] == OTHERS[name], name
    # Norms are not preserved in a quantised model: both together are no valid settings.
    said["loading"].pop("quantization")
    fixed = fixed_settings(made_from(settings={**said, "mind": 1}), "file")
    found = leaves(load_settings({"model": "m"}, fixed=fixed).settings.model_dump(mode="json"))
    for name in (JOB | HERE) - {"workspace"}:
        assert found[name] == DEFAULTS.get(name), name
        assert name in fixed.left_out
    for name in EDIT - NAMED - {"loading.quantization"}:
        assert found[name] == OTHERS[name], name
    line = left_out_line("file", fixed.left_out, found)
    assert line is not None
    for name in {*JOB, *HERE} - {"workspace"}:
        assert name in line
    assert line.endswith("1 unknown")
    # Neither prompts nor model can be smuggled in, nor a section in place of a value.
    back = {"bad_prompts": {"spec": "/etc/passwd"}, "model": "evil/soup", "loading": 5, "loading.trust_remote_code": 1}
    door = fixed_settings(made_from(settings=back), "file")
    assert door.values.keys() | door.origins.keys() <= EDIT
    assert not {"bad_prompts.spec", "model", "loading", TRUST} & (door.values.keys() | door.origins.keys())


def test_what_an_export_says_of_its_settings_is_what_may_be_taken() -> None:
    record = job_of(OTHERS, resolution=made_from().resolution, model_commit=COMMIT, model_public=True)
    one = ({"user": "x"},)
    sets = PromptSets.model_validate(
        {
            **dict.fromkeys(("good", "bad", "good_search", "bad_search", "good_report", "bad_report"), one),
            **dict.fromkeys(("helpfulness", "unhelpfulness", "capability"), one),
            "sources": {},
            "commits": {},
        }
    )
    made = made_from()
    written = reproduction(
        record,
        _settings(OTHERS),
        sets,
        trial=made.trial,
        trials=7,
        edit=made.edit,
        figures=(made.base, made.edited),
        form="merged",
        method="gradient",
    )
    assert leaves(written.settings).keys() == EDIT - NAMED


@pytest.mark.parametrize(
    "changes",
    [
        {"model": {"repository": "../soup", "commit": COMMIT}},
        {"model": {"repository": "cook/soup", "commit": "main"}},
        {"model": {"repository": "cook/soup@x", "commit": COMMIT}},
        {"model": {"sha256": "../../x"}},
        {"resolution": {"dtype": "object", "rows": 8, "layers": 4}},
        {"resolution": {"dtype": "float32", "rows": 1 << 40, "layers": 4}},
        {"resolution": {"dtype": "float32", "rows": 8, "layers": 4, "norms": ["a\x1b[2J"]}},
        {"versions": {"torch": "\x1b]0;x\x07"}},
        {"weights": {"../x": "0" * 64}},
        {"prompts": {"bad_prompts": {"source": {"dataset": "../x/y"}}}},
        {"prompts": {"bad_prompts": {"source": {"dataset": "x/y", "commit": "main"}}}},
        {"prompts": {"bad_prompts": {"taken": {"split": "train]/../x"}}}},
        {"prompts": {"bad_prompts": {"taken": {"split": "train", "start": -1}}}},
        {"prompts": {"bad_prompts": {"taken": {"split": "train", "start": 0, "path": "/etc/passwd"}}}},
    ],
    ids=str,
)
def test_names_and_sizes_that_no_export_has_are_refused(tmp_path: Path, changes: dict[str, Any]) -> None:
    file = tmp_path / "reproduce.json"
    plain = json.loads(made_from().model_dump_json())
    file.write_text(json.dumps(plain))
    read_reproduction(file)
    file.write_text(json.dumps(merged(plain, changes) if "prompts" in changes else {**plain, **changes}))
    with pytest.raises(UsageError, match="is not a reproduce") as refused:
        read_reproduction(file)
    assert "\x1b" not in refused.value.line


# Checkpoints


def resume(hub: LoopbackHub, uri: str, folder: Path, *more: Any, command: str = "resume") -> Result:
    network = hub.environment(folder / "home") | {"HF_HUB_OFFLINE": "0", "JOB_CHECKPOINT_PACE": "5,60,0.02,0.1"}
    return abliterate(command, "--checkpoint", uri, "--workspace", folder / "runs", *more, **network)


@pytest.mark.parametrize("command", ["resume", "upload", "status"])
def test_a_checkpoint_whose_settings_were_changed_runs_no_code(hub: LoopbackHub, tmp_path: Path, command: str) -> None:
    record = job_of({"model": "cook/soup"}, model_commit=hub.repo("model", "cook/soup").sha)
    evil = {"model": "evil/soup", "loading": {"trust_remote_code": True, "device": "cpu"}}
    changed = {"settings": merged(record.settings, evil), "model_commit": hub.repo("model", "evil/soup").sha}
    uri = mirror_of(tmp_path / "mirror", record.model_copy(update=changed), tmp_path / "made")
    refused = resume(hub, uri, tmp_path, command=command)
    refused.fails(6, "differ from its identity: loading.device, model")
    assert not list(tmp_path.rglob("*.ran"))
    assert not list((tmp_path / "runs").glob("*/job.json"))


@pytest.mark.parametrize("command", ["resume", "upload"])
def test_a_checkpoint_of_a_hostile_job_runs_no_code(hub: LoopbackHub, tmp_path: Path, command: str) -> None:
    commit = hub.repo("model", "evil/soup").sha
    record = job_of({"model": "evil/soup", TRUST: True, "upload": ["file:///nowhere"]}, model_commit=commit)
    uri = mirror_of(tmp_path / "mirror", record, tmp_path / "made")
    trusting = f"--set {TRUST}=true --set model=evil/soup@{commit}"
    resume(hub, uri, tmp_path, command=command).fails(2, f"runs the code that comes with evil/soup@{commit}", trusting)
    # Naming the code means trusting it.
    for more in ((), ("--set", "model=evil/soup"), ("--set", f"model=cook/soup@{commit}")):
        resume(hub, uri, tmp_path, "--set", f"{TRUST}=true", *more, command=command).fails(2, trusting)
    assert not list(tmp_path.rglob("*.ran"))
    given = (f"{TRUST}=true", f"model=evil/soup@{commit}")
    trusted = resumption(Whereabouts(tmp_path / "runs", None, uri, given))
    assert trusted.settings.loading.trust_remote_code


def test_trust_would_make_it_another_job(hub: LoopbackHub, tmp_path: Path) -> None:
    uri = mirror_of(tmp_path / "mirror", job_of({"model": "cook/soup"}), tmp_path / "made")
    resume(hub, uri, tmp_path, "--set", f"{TRUST}=true").fails(2, "another job")
    resume(hub, uri, tmp_path, "--set", "seed=9").fails(2, "another job")


def test_of_a_checkpoint_the_job_is_taken_and_nothing_of_the_machine(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    record = job_of(OTHERS, model_commit=COMMIT)
    uri = mirror_of(tmp_path / "mirror", record, tmp_path / "made")
    said: list[str] = []
    trusting = (f"{TRUST}=true", f"model=cook/soup@{COMMIT}")
    where = Whereabouts(tmp_path / "runs", None, uri, trusting)
    start = resumption(where, say=said.append)
    found = leaves(start.settings.model_dump(mode="json"))
    assert (found.pop("workspace"), found.pop("checkpoint")) == (str(tmp_path / "runs"), uri)
    assert found.pop(TRUST) is True
    for name in HERE & found.keys():
        assert found[name] == DEFAULTS.get(name), name
    for name in EDIT | JOB:
        assert found[name] == OTHERS[name], name
    (line,) = said
    for name in HERE - {TRUST, "workspace"}:  # the workspace is always local
        assert name in line, name
    # It is the same job, with this machine's local settings.
    assert (start.folder.path.name, start.identity) == (record.job_id, record.identity)
    monkeypatch.setenv("ABLITERATE_VISIBILITY", "gated")
    monkeypatch.setenv("ABLITERATE_SEED", "9")
    given = Whereabouts(tmp_path / "runs", None, uri, (*trusting, 's3.endpoint="http://mine"', 'when_done="stop"'))
    mine = resumption(given, upload=["file:///mine"]).settings
    assert (mine.visibility, mine.s3.endpoint, mine.when_done, mine.upload, mine.seed) == (
        "gated",
        "http://mine",
        "stop",
        ["file:///mine"],
        3,
    )


def test_the_end_of_a_rental_is_taken_from_set_before_options_before_the_environment(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    record = job_of({"model": "cook/soup", "when_done": "destroy", "when_failed": "destroy"})
    uri = mirror_of(tmp_path / "mirror", record, tmp_path / "made")
    where = Whereabouts(tmp_path / "runs", None, uri)
    assert resumption(where).settings.when_done == "nothing"  # never by what the file says
    monkeypatch.setenv("ABLITERATE_WHEN_DONE", "stop")
    assert resumption(where).settings.when_done == "stop"
    option = {"when_done": "destroy", "when_failed": None}
    assert resumption(where, option).settings.when_done == "destroy"
    last = Whereabouts(tmp_path / "runs", None, uri, ('when_done="nothing"', 'when_failed="stop"'))
    found = resumption(last, option).settings
    assert (found.when_done, found.when_failed) == ("nothing", "stop")


def test_a_target_that_no_delivery_knows_is_refused_before_anything_is_restored(tmp_path: Path) -> None:
    """Regression: `upload --upload ftp://x` first replaced the run folder, then called the target no S3 target."""
    uri = mirror_of(tmp_path / "mirror", job_of({"model": "cook/soup"}), tmp_path / "made")
    where = Whereabouts(tmp_path / "runs", None, uri)
    with pytest.raises(UsageError, match="upload target 'ftp://x' is not supported"):
        resumption(where, upload=["ftp://x"])
    assert not (tmp_path / "runs").exists()


def test_a_secret_of_another_machine_is_not_asked_for(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("MY_TOKEN", "swordfish-1234")
    given = {"model": "cook/soup", "scoring.nli_model": "cook/swordfish-1234", "scoring.answer_tokens": 50}
    record = job_of({**given, "s3.endpoint": "http://me:swordfish-1234@host"})
    uri = mirror_of(tmp_path / "mirror", record, tmp_path / "made")
    with open_mirror(uri, MirrorOptions(pace=PACE)) as mirror:
        fetched = mirror.fetch(record.job_id, tmp_path / "into").folder
    # No local setting was taken, so none of them lacks its secret.
    found = job_settings(fetched, whole=True)
    assert (found.scoring.nli_model, found.scoring.answer_tokens, found.s3.endpoint) == (None, 50, None)


def test_settings_that_a_checkpoint_leaves_out_come_from_the_identity(tmp_path: Path) -> None:
    record = job_of({"model": "cook/soup", "seed": 3, "loading.device": "cpu", "loading.dtypes": ["float16"]})
    said = leaves(record.settings)
    silent = {"seed", "loading.device", "loading.dtypes", "search.known_points"}
    left = record.model_copy(update={"settings": nested({k: v for k, v in said.items() if k not in silent})})
    uri = mirror_of(tmp_path / "mirror", left, tmp_path / "made")
    settings = resumption(Whereabouts(tmp_path / "runs", None, uri)).settings
    assert (settings.seed, settings.loading.device, settings.loading.dtypes) == (3, "cpu", ["float16"])
    # Everything in it defines the job, and nothing absent is invented.
    whole = leaves(proven(record, record.job_id)[0].settings)
    assert leaves(proven(left, record.job_id)[0].settings) == whole
    assert identify(settings) == record.identity
    # The identity holds no local settings, either.
    identity = {**record.identity, "when_done": "destroy", "allow": ["disk.space"]}
    plain = leaves(left.settings)
    silent |= {"when_done", "allow"}
    hostile = {"settings": nested({name: value for name, value in plain.items() if name not in silent})}
    kept, _ = proven(
        left.model_copy(update={**hostile, "identity": identity, "job_id": job_id(identity)}), job_id(identity)
    )
    assert leaves(kept.settings) == whole


@pytest.mark.parametrize(
    ("said", "resolved", "taken"), [("tpe", None, True), ("gradient", None, False), ("tpe", "gradient", False)]
)
def test_the_method_of_a_job_that_a_former_version_began_is_taken(
    tmp_path: Path, said: str, resolved: str | None, taken: bool
) -> None:
    """Regression: `resume` printed that search.method was not read, although the job kept to TPE."""
    resolution = made_from().resolution.model_copy(update={"method": resolved})
    record = job_of({"model": "cook/soup"}, model_commit=COMMIT, resolution=resolution)
    changed = record.model_copy(update={"settings": merged(record.settings, {"search": {"method": said}})})
    uri = mirror_of(tmp_path / "mirror", changed, tmp_path / "made")
    lines: list[str] = []
    settings = resumption(Whereabouts(tmp_path / "runs", None, uri), say=lines.append).settings
    assert settings.search.method == (said if taken else "auto")
    assert any("search.method" in line for line in lines) is not taken


def test_what_a_restore_puts_into_the_run_folder_says_nothing_of_this_machine(tmp_path: Path) -> None:
    record = job_of(OTHERS, model_commit=COMMIT)
    uri = mirror_of(tmp_path / "mirror", record, tmp_path / "made")
    folder = RunFolder(tmp_path / "runs" / record.job_id)
    with open_mirror(uri, MirrorOptions(pace=PACE)) as mirror:
        mirror.claim(folder, record.identity, lambda _: None).close(final=False)
    restored = leaves(folder.read_job().settings)
    assert not restored.keys() & HERE
    assert {name: restored[name] for name in EDIT | JOB} == {name: OTHERS[name] for name in EDIT | JOB}


def test_code_that_was_trusted_is_not_exchanged_meanwhile(tmp_path: Path) -> None:
    record = job_of({"model": "cook/soup", TRUST: True}, model_commit=COMMIT)
    uri = mirror_of(tmp_path / "mirror", record, tmp_path / "made")
    where = Whereabouts(tmp_path / "runs", None, uri, (f"{TRUST}=true", f"model=cook/soup@{COMMIT}"))
    start = resumption(where)
    start.folder.path.mkdir(parents=True)
    write_record(start.folder.job_file, proven(record, record.job_id)[0])
    assert start.opened()[1].loading.trust_remote_code
    write_record(start.folder.job_file, proven(record, record.job_id)[0].model_copy(update={"model_commit": "d" * 40}))
    with pytest.raises(UsageError, match="now names cook/soup@ddd"):
        start.opened()


def _run_on(hub: LoopbackHub, uri: str, folder: Path, *more: Any, command: str = "run", **env: str) -> Result:
    network = hub.environment(folder / "home") | {"HF_HUB_OFFLINE": "0", "JOB_CHECKPOINT_PACE": "5,60,0.02,0.1", **env}
    given = ("--checkpoint", uri, "--workspace", folder / "runs", "--set", f"{TRUST}=true", *more)
    # It ends with preflight, which looks at the model.
    return abliterate(command, "evil/soup", *given, "--when-done", "destroy", **network)


def _begun(commit: str) -> dict[str, Any]:
    """Return the job.json of a job whose search has begun: preflight does not discard it."""
    return {"model_commit": commit, "resolution": made_from().resolution}


def _pull_request(hub: LoopbackHub) -> str:
    """Have a stranger open a pull request with code, and return its commit, which loads like any revision."""
    repo = hub.repo("model", "evil/soup")
    pull = repo.open_pull("Better soup", "stranger", status="open")
    return repo.commit({"modeling_kitchen.py": CODE.encode() + b"# of a stranger\n"}, branch=pull.ref).sha


def test_code_of_a_pull_request_that_only_a_checkpoint_names_is_not_run(hub: LoopbackHub, tmp_path: Path) -> None:
    commit = _pull_request(hub)
    record = job_of({"model": "evil/soup", TRUST: True}, **_begun(commit))
    uri = mirror_of(tmp_path / "mirror", record, tmp_path / "made")
    trusting = f"resume --checkpoint {uri} --set {TRUST}=true --set model=evil/soup@{commit}"
    said = f"the code of evil/soup@{commit} is named by the checkpoint of job {record.job_id} only"
    _run_on(hub, uri, tmp_path).fails(2, said, trusting)
    # Restored files in the workspace are not local settings, either.
    for command in ("run", "preflight"):
        _run_on(hub, uri, tmp_path, command=command).fails(2, said)
    # Without the Hub it cannot be checked, and nothing runs.
    _run_on(hub, uri, tmp_path, HF_HUB_OFFLINE="1").fails(76, "the history of model evil/soup")
    assert not list(tmp_path.rglob("*.ran"))
    assert not list(tmp_path.rglob("modeling_kitchen.py"))


def test_code_of_the_named_history_is_run_as_pinned(hub: LoopbackHub, tmp_path: Path) -> None:
    repo = hub.repo("model", "evil/soup")
    commit = repo.sha
    repo.commit({"modeling_kitchen.py": b"raise SystemExit('a later commit')"})
    record = job_of({"model": "evil/soup", TRUST: True}, **_begun(commit))
    uri = mirror_of(tmp_path / "mirror", record, tmp_path / "made")
    _run_on(hub, uri, tmp_path).fails(3, "rental.survival")
    assert list(tmp_path.rglob("*.ran"))
    # It is known now: the next start makes no request.
    asked = len([one for one in hub.requests if "/commits/" in one.path])
    assert asked
    _run_on(hub, uri, tmp_path).fails(3, "rental.survival")
    assert len([one for one in hub.requests if "/commits/" in one.path]) == asked
    # Only of that commit, not of later ones that the checkpoint may name.
    job = tmp_path / "runs" / record.job_id / "job.json"
    job.write_text(job.read_text().replace(commit, _pull_request(hub)))
    _run_on(hub, uri, tmp_path).fails(2, "is named by the checkpoint")


def test_a_commit_that_this_side_names_is_its_own_word(hub: LoopbackHub, tmp_path: Path) -> None:
    commit = _pull_request(hub)
    record = job_of({"model": "evil/soup", TRUST: True}, **_begun(commit))
    uri = mirror_of(tmp_path / "mirror", record, tmp_path / "made")
    named = ("--set", f"{TRUST}=true", "--set", f"model=evil/soup@{commit}", "--when-done", "destroy")
    resume(hub, uri, tmp_path, *named).fails(3, "rental.survival")
    assert list(tmp_path.rglob("*.ran"))
    _run_on(hub, uri, tmp_path).fails(3, "rental.survival")


def test_files_of_this_machine_are_not_read_into_a_checkpoint(tmp_path: Path) -> None:
    secret = tmp_path / "secret.txt"
    secret.write_text("nobody is to read this\n" * 9)
    known = tmp_path / "known.txt"
    known.write_text("what its host knows\n" * 9)
    record = job_of({"model": "cook/soup", "bad_prompts.spec": str(known)})
    settings = merged(record.settings, {"bad_prompts": {"spec": str(secret)}})
    changed = record.model_copy(update={"settings": settings})
    uri = mirror_of(tmp_path / "mirror", changed, tmp_path / "made", prompts=False)
    where = Whereabouts(tmp_path / "runs", None, uri)
    with pytest.raises(UsageError, match="does not hold the bad_prompts of job"):
        resumption(where)
    # While it holds them, or they are at the checkpoint already, the job continues.
    shutil.copy(known, secret)
    resumption(where)


def test_a_model_folder_that_holds_something_else_is_refused(random_model_folder: Path, tmp_path: Path) -> None:
    model = tmp_path / "model"
    shutil.copytree(random_model_folder, model)
    record = job_of({"model": str(model), "workspace": str(tmp_path / "first")})
    uri = mirror_of(tmp_path / "mirror", record, tmp_path / "made")
    where = Whereabouts(tmp_path / "runs", None, uri)
    assert resumption(where).identity == record.identity
    (model / "config.json").write_text("{}")
    with pytest.raises(UsageError, match="is not the model of job"):
        resumption(where)


@pytest.mark.parametrize(
    "change",
    [
        {"settings": {"model": "evil/soup"}},
        {"settings": {"model": "../soup"}},
        {"settings": {"model": "/etc"}},
        {"settings": {"seed": 9}},
        {"settings": {"loading": {"device": "cpu"}}},
        {"settings": {"good_report_prompts": {"spec": "evil/prompts"}}},
        {"settings": {"bad_prompts": {"spec": "/etc/passwd"}}},
        {"settings": {"bad_prompts": {"prefix": "evil"}}},
        {"model_commit": "d" * 40},
        {"model_commit": "../x"},
        {"reproduces": "evil"},
        {"searches": False},
        {"job_id": "0" * 12},
        {"identity": {"seed": 9}},
    ],
    ids=str,
)
def test_a_changed_record_is_refused(change: dict[str, Any]) -> None:
    record = job_of({"model": f"cook/soup@{COMMIT}"}, model_commit=COMMIT)
    assert proven(record, record.job_id)[0].identity == record.identity
    plain = record.model_dump(mode="json")
    hostile = JobRecord.model_validate(merged(plain, change))
    with pytest.raises(JobError, match="identity"):
        proven(hostile, record.job_id)


def test_a_folder_of_prompts_is_not_taken_for_a_dataset(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "my" / "prompts").mkdir(parents=True)
    (tmp_path / "my" / "prompts" / "a.txt").write_text("one\ntwo\n")
    record = job_of({"model": "cook/soup", "bad_prompts.spec": "my/prompts"})
    shutil.rmtree(tmp_path / "my")
    kept, _ = proven(record, record.job_id)
    assert kept.settings["bad_prompts"]["spec"] == "./my/prompts"


BAD_NAMES = [
    "",
    ".",
    "..",
    "../0123456789ab",
    "/tmp/x",
    "0123456789AB",
    "0123456789abc",
    "0123456789a\n",
    "a" * 12 + "/",
]


@pytest.mark.parametrize("name", BAD_NAMES, ids=repr)
def test_a_job_is_named_by_the_hash_of_its_identity(tmp_path: Path, name: str) -> None:
    record = job_of({"model": "cook/soup"})
    mirror_of(tmp_path / "mirror", record, tmp_path / "made")
    head = json.loads((tmp_path / "mirror" / record.job_id / "head.json").read_text())
    decode_head(json.dumps(head).encode(), record.job_id, "here")
    for changed in ({"job_id": name}, {"identity": {**head["identity"], "seed": 9}}):
        with pytest.raises(MirrorError):
            decode_head(json.dumps({**head, **changed}).encode(), changed.get("job_id", record.job_id), "here")


def test_a_head_beside_the_jobs_is_passed_over(tmp_path: Path) -> None:
    record = job_of({"model": "cook/soup"})
    uri = mirror_of(tmp_path / "mirror", record, tmp_path / "made")
    shutil.copytree(tmp_path / "mirror" / record.job_id, tmp_path / "mirror" / "..evil")
    with open_mirror(uri, MirrorOptions(pace=PACE)) as mirror:
        assert [head.job_id for head in mirror.jobs()] == [record.job_id]


@pytest.mark.parametrize(
    ("path", "allowed"),
    [
        ("study.db", True),
        ("figures/trial-0001.json", True),
        ("directions/mean-0a.safetensors", True),
        ("study.db/x", False),
        ("job.json/../../x", False),
        ("figures/../../x", False),
        ("figures/..", False),
        ("figures//x", False),
        ("figures/", False),
        ("/etc/passwd", False),
        ("../job.json", False),
        ("figures/.hidden", False),
        ("figures/a\\b", False),
        ("figures/a\nb", False),
        ("figures/" + "a" * 300, False),
        ("exports/x", False),
        (".lock", False),
        ("", False),
    ],
    ids=repr,
)
def test_a_checkpoint_names_files_of_a_run_folder_only(path: str, allowed: bool) -> None:
    assert is_mirrored(path) is allowed


@pytest.mark.parametrize("kind", ["link", "pipe", "longer"])
def test_what_is_no_plain_object_is_not_read(tmp_path: Path, kind: str) -> None:
    record = job_of({"model": "cook/soup"})
    uri = mirror_of(tmp_path / "mirror", record, tmp_path / "made")
    head = json.loads((tmp_path / "mirror" / record.job_id / "head.json").read_text())
    spoilt = tmp_path / "mirror" / record.job_id / "objects" / head["files"]["state.json"]["object"]
    contents = spoilt.read_bytes()
    spoilt.unlink()
    if kind == "link":
        (tmp_path / "elsewhere").write_bytes(contents)
        spoilt.symlink_to(tmp_path / "elsewhere")
    elif kind == "pipe":
        os.mkfifo(spoilt)
    else:
        spoilt.write_bytes(contents + b"\0")
    with open_mirror(uri, MirrorOptions(pace=PACE)) as mirror, pytest.raises(MirrorError, match="inconsistent"):
        mirror.fetch(record.job_id, tmp_path / "into")


@pytest.mark.parametrize("name", ["../x", "/x", "a/../b", "a//b", "a/.hidden", ".hidden", "a\nb", "", "a\\b"], ids=repr)
def test_names_in_records_lead_nowhere(name: str) -> None:
    Upload(target="file:///x", export="trial-0001-adapter", state="done")
    entry = ManifestEntry(sha256="0" * 64, size=1)
    Manifest(files={"model-00001-of-00002.safetensors": entry})
    with pytest.raises(ValueError, match="pattern"):
        Upload(target="file:///x", export=name, state="done")
    with pytest.raises(ValueError, match="pattern"):
        Manifest(files={name: entry})


def test_what_a_checkpoint_says_does_not_steer_the_terminal(tmp_path: Path) -> None:
    record = job_of({"model": "cook/soup"})
    hostile = "\x1b]0;mine\x07\x1b[2J\u202e"
    uri = mirror_of(tmp_path / "mirror", record, tmp_path / "made", reason=hostile)
    shown = abliterate("status", "--checkpoint", uri, "--workspace", tmp_path / "runs").check().out
    assert "preempted" in shown
    assert "]0;mine" in shown
    assert not {"\x1b", "\x07", "\u202e"} & {*shown}
