"""`abliterate preflight` as a whole: no findings on a healthy machine, and every known disaster provoked."""

from __future__ import annotations

import json
import re
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file

from job import preflight
from job.config.load import load_settings
from job.preflight.checks import NAMES
from tests.fakes.hub import LoopbackHub
from tests.helpers import abliterate, environment, events, job_arguments, only_job, run_script, start
from tests.warm import MAIN


@pytest.fixture
def prompts(tmp_path: Path) -> list[str]:
    """Return the options of four disjoint prompt files."""
    options = []
    for option in ("good-prompts", "bad-prompts", "good-eval-prompts", "bad-eval-prompts"):
        file = tmp_path / f"{option}.txt"
        known = "famous" if "bad" in option else "quiet"  # to the model's tokenizer, which knows few words
        file.write_text("".join(f"Where is the {known} {option} kettle number {i}?\n" for i in range(30)))
        options += [f"--{option}", str(file)]
    return options


@pytest.fixture
def check(random_model_folder: Path, prompts: list[str], tmp_path: Path) -> Any:
    """Return a function that runs preflight and returns exit code and checks by name."""

    def run(*extra: Any, model: Any = random_model_folder, **variables: str) -> tuple[int, dict[str, Any]]:
        command = ["preflight", model, *prompts, "--workspace", tmp_path / "runs", "--json", *extra]
        result = abliterate(*command, **variables)
        assert "Traceback" not in result.err, result.err
        found = json.loads(result.out)
        assert found["ok"] == (result.code == 0)
        checks: dict[str, Any] = {}
        for one in found["checks"]:
            # Of several with one name the worst counts.
            if one["name"] not in checks or one["status"] == "fail":
                checks[one["name"]] = one
        return result.code, {**checks, "plan": found["plan"], "survey": found}

    return run


def fails(found: tuple[int, dict[str, Any]], code: int, name: str, *parts: str) -> None:
    """Assert that a check fails with these parts in its text, a remedy, and the right exit code."""
    assert found[0] == code, found[1]
    one = found[1][name]
    assert one["status"] == "fail"
    assert one["remedy"]
    told = " ".join((one["measured"], one["needed"], one["remedy"]))
    for part in parts:
        assert part in told, (part, told)


def test_a_healthy_machine_raises_no_alarm_and_nothing_is_left_behind(check: Any, tmp_path: Path) -> None:
    before = sorted(tmp_path.rglob("*"))
    code, found = check()
    assert code == 0
    checks = found["survey"]["checks"]
    # The tests' disk and its load are not the job's fault.
    alarms = [one for one in checks if one["status"] != "ok" and one["name"] not in ("disk.speed", "disk.storage")]
    assert alarms == []
    assert len(checks) > 20
    assert found["plan"]["rows"] >= 64
    assert found["survey"]["hours"]["search"] > 0
    code, found = check("--set", "search.method=auto")
    assert code == 0
    descent = found["plan"]["gradient"]
    assert descent["rows"] == 24
    assert descent["row_bytes"] > 0
    assert found["gpu.gradient"]["measured"].startswith("24 prompts a forward pass of the gradient descent")
    assert sorted(tmp_path.rglob("*")) == before


def test_the_table_is_shown_to_people(random_model_folder: Path, prompts: list[str], tmp_path: Path) -> None:
    shown = abliterate("preflight", random_model_folder, *prompts, "--workspace", tmp_path / "runs").check().out
    assert "model.architecture" in shown
    assert "plan: " in shown


def test_a_disk_too_small_is_told_before_anything_is_written(check: Any, tmp_path: Path) -> None:
    small = tmp_path / "small"
    small.mkdir()
    if subprocess.run(["mount", "-t", "tmpfs", "-o", "size=1m", "tmpfs", small], capture_output=True).returncode:
        # Needs root; the arithmetic of a small disk is tested without it in test_preflight_disk.
        pytest.skip("mounting is not permitted here")
    try:
        found = check("--workspace", small / "runs")
        fails(found, 76, "disk.space", "free", "export", "more")
        assert list(small.iterdir()) == []
        # The user's setting takes precedence over the check's.
        assert check("--workspace", small / "runs", "--allow", "disk.space")[0] == 0
    finally:
        subprocess.run(["umount", small], check=True)


def test_a_delivery_folder_with_something_else_in_it(check: Any, tmp_path: Path) -> None:
    taken = tmp_path / "taken"
    taken.mkdir()
    (taken / "thesis.txt").write_text("years of work")
    fails(check("--upload", taken.as_uri()), 3, "target.local", "holds something else")


def test_too_few_files_may_be_open(random_model_folder: Path, prompts: list[str], tmp_path: Path) -> None:
    code = f"import resource; resource.setrlimit(resource.RLIMIT_NOFILE, (200, 200)); {MAIN}"
    done = run_script(code, "preflight", random_model_folder, *prompts, "--workspace", tmp_path / "runs", "--json")
    checks = {one["name"]: one for one in json.loads(done.out)["checks"]}
    assert (done.code, checks["limits.open-files"]["status"]) == (76, "fail")
    assert "ulimit -n 1024" in checks["limits.open-files"]["remedy"]


def test_time_and_money_that_would_not_do(check: Any) -> None:
    fails(check("--max-hours", "1e-9"), 76, "estimate.time", "raise --max-hours")
    code, found = check("--max-cost", "5", "--price", "2.5")
    assert (code, found["estimate.cost"]["status"]) == (0, "ok")
    assert "$2.50 an hour" in found["estimate.cost"]["measured"]
    fails(check("--max-cost", "5"), 3, "estimate.cost", "give --price")


def test_models_that_cannot_work(check: Any, random_model_folder: Path, tmp_path: Path) -> None:
    import shutil

    fails(check(model="/absent"), 3, "model", "no model folder")
    broken = tmp_path / "broken"
    shutil.copytree(random_model_folder, broken)
    (broken / "chat_template.jinja").unlink()
    fails(check(model=broken), 3, "model.tokenizer", "no chat template")
    for file in broken.glob("*.safetensors"):
        file.unlink()
    fails(check(model=broken), 3, "model.weights", "no safetensors weights")
    config = json.loads((broken / "config.json").read_text())
    (broken / "config.json").write_text(json.dumps({**config, "model_type": "t5", "architectures": ["T5Model"]}))
    fails(check(model=broken), 3, "model.architecture", "t5")


def test_data_that_cannot_be_had_and_data_in_two_sets(check: Any, prompts: list[str]) -> None:
    fails(check("--bad-prompts", "/absent.txt"), 3, "data", "no prompt file")
    bad = prompts[prompts.index("--bad-prompts") + 1]
    code, found = check("--bad-eval-prompts", bad)
    assert (code, found["data.overlap"]["status"]) == (0, "warn")
    assert "30 of 30 of bad_prompts are also among the bad evaluation prompts" in found["data.overlap"]["measured"]
    code, found = check("--bad-prompts", f"{bad}#train[:5]")
    assert (code, found["data.bad_prompts"]["status"]) == (0, "warn")


def test_a_plan_for_a_machine_one_does_not_have(check: Any) -> None:
    code, found = check("--on", "4xRTX4090")
    assert code == 0
    assert "vastai search offers 'gpu_name=RTX_4090 num_gpus=4" in found["survey"]["offers"]
    assert found["plan"]["devices"][0]["device"] == "cuda:0"
    assert not any(name.startswith(("disk.", "limits.", "memory.")) for name in found)


def test_an_unknown_card_is_told_with_the_nearest(random_model_folder: Path) -> None:
    abliterate("preflight", random_model_folder, "--on", "2xRTX4900").fails(2, "did you mean RTX4090?")


# --- the Hub ------------------------------------------------------------------------------------------


def header_only(tensors: dict[str, tuple[str, list[int]]]) -> bytes:
    """Return a safetensors file with only its header present."""
    sizes = {"BF16": 2, "F32": 4}
    entries, at = {}, 0
    for name, (dtype, shape) in tensors.items():
        end = at + sizes[dtype] * torch.Size(shape).numel()
        entries[name] = {"dtype": dtype, "shape": shape, "data_offsets": [at, end]}
        at = end
    header = json.dumps(entries).encode()
    return len(header).to_bytes(8, "little") + header


def coder_32b() -> dict[str, bytes]:
    """Return configuration and headers of a model of Qwen2.5-Coder-32B's shape."""
    config = {
        "architectures": ["Qwen2ForCausalLM"],
        "model_type": "qwen2",
        "hidden_size": 5120,
        "intermediate_size": 27648,
        "num_hidden_layers": 64,
        "num_attention_heads": 40,
        "num_key_value_heads": 8,
        "vocab_size": 152064,
        "tie_word_embeddings": False,
        "torch_dtype": "bfloat16",
    }
    tensors: dict[str, tuple[str, list[int]]] = {
        "model.embed_tokens.weight": ("BF16", [152064, 5120]),
        "lm_head.weight": ("BF16", [152064, 5120]),
        "model.norm.weight": ("BF16", [5120]),
    }
    shapes = {
        "self_attn.q_proj.weight": [5120, 5120], "self_attn.q_proj.bias": [5120],
        "self_attn.k_proj.weight": [1024, 5120], "self_attn.k_proj.bias": [1024],
        "self_attn.v_proj.weight": [1024, 5120], "self_attn.v_proj.bias": [1024],
        "self_attn.o_proj.weight": [5120, 5120],
        "mlp.gate_proj.weight": [27648, 5120], "mlp.up_proj.weight": [27648, 5120],
        "mlp.down_proj.weight": [5120, 27648],
        "input_layernorm.weight": [5120], "post_attention_layernorm.weight": [5120],
    }  # fmt: skip
    for layer in range(64):
        tensors |= {f"model.layers.{layer}.{name}": ("BF16", shape) for name, shape in shapes.items()}
    return {"config.json": json.dumps(config).encode(), "model.safetensors": header_only(tensors)}


@pytest.fixture(scope="module")
def hub(random_model_folder: Path) -> Iterator[LoopbackHub]:
    tokenizer = {
        name: (random_model_folder / name).read_bytes()
        for name in ("tokenizer.json", "tokenizer_config.json", "chat_template.jinja")
    }
    with LoopbackHub(usual=True) as hub:
        hub.add_model("kitchen/coder-32b", {**coder_32b(), **tokenizer})
        hub.add_model("kitchen/gated", {**coder_32b(), **tokenizer}, gated="manual")
        license = b"---\nlicense: llama3.1\n---\n"
        hub.add_model("kitchen/tiny", {"README.md": license, **{p.name: p for p in random_model_folder.iterdir()}})
        hub.add_token("hf_cook" + "k" * 20, "cook")
        yield hub
        assert hub.errors == []


@pytest.fixture(scope="module")
def home(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Return the Hub's cache of checks that download no weights: processes fork for one cache, and load for each."""
    return tmp_path_factory.mktemp("home")


@pytest.mark.parametrize(
    ("machine", "strategy", "quantization"),
    [
        # The same plan with more room than on the next card.
        pytest.param("1xH200.json", "single", "none", marks=pytest.mark.full("checkpoints")),
        ("1xA100-80.json", "single", "none"),
        ("4x4090.json", "balanced", "none"),
        ("1x24GB.json", "single", "bnb-4bit"),
    ],
)
def test_plans_for_a_32b_model_from_its_headers_alone(
    hub: LoopbackHub, home: Path, check: Any, machine: str, strategy: str, quantization: str
) -> None:
    hub.forget()
    reading = Path(__file__).parents[2] / "fakes" / "readings" / machine
    network = hub.environment(home) | {"HF_HUB_OFFLINE": "0"}
    code, found = check("--on", reading, model="kitchen/coder-32b", **network)
    assert code == 0, found
    plan = found["plan"]
    assert (plan["strategy"], plan["quantization"]) == (strategy, quantization)
    for device in plan["devices"]:
        used = max(
            device["weights"] + device["cache"] + device["activations"] + device["margin"], device["loading_peak"]
        )
        assert used <= device["free"]
    weights = sum(device["weights"] for device in plan["devices"])
    assert weights == 65_527_752_704 if quantization == "none" else weights < 22e9
    # The plan prints existing settings that are valid together.
    assert load_settings({"model": "m"}, assignments=plan["settings"]).settings.batching.rows == plan["rows"]
    assert not list(home.rglob("*.safetensors"))
    assert not list(home.rglob("config.json"))


def test_a_card_that_is_too_small_is_refused_with_what_would_do(
    hub: LoopbackHub, home: Path, check: Any, tmp_path: Path
) -> None:
    reading = json.loads((Path(__file__).parents[2] / "fakes" / "readings" / "1x24GB.json").read_text())
    for gpu in reading["gpus"]:
        gpu["total_bytes"], gpu["free_bytes"] = 12 << 30, 12 << 30
    reading["memory"] = {**reading["memory"], "total": 32 << 30, "available": 30 << 30}
    (tmp_path / "small.json").write_text(json.dumps(reading))
    network = hub.environment(home) | {"HF_HUB_OFFLINE": "0"}
    found = check("--on", tmp_path / "small.json", model="kitchen/coder-32b", **network)
    fails(found, 76, "gpu.memory", "61.0 GiB of weights", "4xRTX3090")


def test_the_line_is_timed_as_far_as_it_goes(hub: LoopbackHub, tmp_path: Path) -> None:
    hub.add_model("kitchen/large", {"model.safetensors": bytes(12 << 20)})
    program = """
from job.model.files import line_speed, list_model, parse_model
source = parse_model("kitchen/large")
print(line_speed(source, list_model(source, None, print)))
"""
    network = hub.environment(tmp_path / "home") | {"HF_HUB_OFFLINE": "0"}

    def timed() -> str:
        command = [sys.executable, "-c", program]
        done = subprocess.run(command, capture_output=True, text=True, env=environment(**network))
        assert done.returncode == 0, done.stderr
        return done.stdout.strip()

    assert float(timed()) > 1e6
    hub.cut("*model.safetensors*", after_bytes=0, times=None, method="GET")
    assert timed() == "None"
    hub.faults.clear()


def test_models_of_the_hub_that_cannot_be_had(hub: LoopbackHub, home: Path, check: Any) -> None:
    network = hub.environment(home) | {"HF_HUB_OFFLINE": "0"}
    fails(check(model="kitchen/absent", **network), 3, "model", "not on the Hub")
    fails(check(model="kitchen/gated", **network), 3, "model", "has not been granted", "terms")
    fails(check(model="kitchen/tiny@v9", **network), 3, "model", "no such revision")


@pytest.mark.slow
def test_a_model_of_the_hub_is_pinned_downloaded_and_edited(hub: LoopbackHub, organism: Path, tmp_path: Path) -> None:
    hub.add_model("kitchen/organism", {p.name: p for p in (organism / "model").iterdir()})
    pinned = hub.repo("model", "kitchen/organism").sha
    network = hub.environment(tmp_path / "home") | {"HF_HUB_OFFLINE": "0"}
    command: list[Any] = ["run", "kitchen/organism", "--workspace", tmp_path / "runs", "--trials"]
    sets = job_arguments(organism)[1:]
    hub.cut("*model.safetensors*", after_bytes=300_000, times=2)
    abliterate(*command, 2, *sets, **network).check()
    job = only_job(tmp_path / "runs")
    assert json.loads((job / "job.json").read_text())["model_commit"] == pinned
    assert f"kitchen/organism at commit {pinned}" in (job / "export" / "README.md").read_text()
    # The repository changes; the job does not.
    hub.repo("model", "kitchen/organism").commit({"config.json": b"{}"}, "broken")
    abliterate(*command, 4, *sets, **network).check()
    assert json.loads((job / "job.json").read_text())["model_commit"] == pinned


# --- the job itself -----------------------------------------------------------------------------------


@pytest.mark.slow
def test_a_process_that_has_let_its_job_go_is_not_in_the_way(organism: Path, tmp_path: Path) -> None:
    """As a notebook: the tests' process runs a job and lives on, while another process extends it."""
    job = [*job_arguments(organism), "--workspace", tmp_path, "--set", "startup_trials=1"]
    abliterate("run", *job, "--trials", 1).check()
    done = abliterate("preflight", *job, "--trials", 2, "--json", process=True).check()
    (check,) = [check for check in json.loads(done.out)["checks"] if check["name"] == "strays.own"]
    assert check["status"] == "ok"
    abliterate("run", *job, "--trials", 2, process=True).check()


def test_a_job_that_is_held_and_one_in_a_restart_loop(organism: Path, tmp_path: Path) -> None:
    workspace = tmp_path / "runs"
    arguments = [*job_arguments(organism), "--workspace", workspace]
    process = start("run", *arguments, "--trials", 400)
    try:
        deadline = time.monotonic() + 120
        while not list(workspace.glob("*/study.db")):
            assert process.poll() is None
            assert time.monotonic() < deadline
            time.sleep(0.05)
        result = abliterate("preflight", *arguments, "--json")
        checks = {one["name"]: one for one in json.loads(result.out)["checks"]}
        assert (result.code, checks["job.lock"]["status"]) == (76, "fail")
        assert f"process {process.pid}" in checks["job.lock"]["measured"]
    finally:
        process.kill()
        process.communicate()
    # From now on every start fails: the study is corrupt.
    job = only_job(workspace)
    for name in ("study.db", ".study.backup.db"):
        (job / name).write_bytes(b"no database" * 1000)
    codes = [abliterate("run", *arguments, "--trials", 400).code for _ in range(4)]
    assert codes == [76] * 4
    reasons = [event["reason"] for event in events(workspace) if event["event"] == "job_failed"]
    assert "restarts.loop" in reasons[-1]


def test_every_check_can_be_allowed_by_name_and_nothing_else(check: Any, random_model_folder: Path) -> None:
    named = set()
    for file in Path(preflight.__file__).parent.glob("*.py"):
        named |= set(re.findall(r'name="([a-z.-]+)"|(?:guarded|attempt)\("([a-z.]+)"', file.read_text()))
    literal = {one or other for one, other in named}
    assert literal <= NAMES, literal - NAMES
    code, found = check("--max-hours", "0.0000001", "--allow", "estimate.time")
    assert (code, found["estimate.time"]["status"]) == (0, "fail")
    wrong = abliterate("preflight", random_model_folder, "--allow", "estimate.tme")
    wrong.fails(2, "no check has that name", "did you mean estimate.time?")


def test_a_job_that_is_held_at_its_checkpoint_is_told(organism: Path, tmp_path: Path) -> None:
    arguments = [*job_arguments(organism), "--checkpoint", (tmp_path / "mirror").as_uri()]
    process = start("run", *arguments, "--workspace", tmp_path / "one", "--trials", 400)
    try:
        while not list((tmp_path / "mirror").glob("*/head.json")):
            assert process.poll() is None, process.communicate()[1]
            time.sleep(0.05)
        result = abliterate("preflight", *arguments, "--workspace", tmp_path / "two", "--json")
        checks = {one["name"]: one for one in json.loads(result.out)["checks"]}
        assert (result.code, checks["job.lease"]["status"]) == (76, "fail")
        assert f"process {process.pid}" in checks["job.lease"]["measured"]
        assert checks["checkpoint"]["status"] == "ok"
        assert "no model, no export" in checks["checkpoint"]["measured"]
        assert not (tmp_path / "two").exists()
    finally:
        process.kill()
        process.communicate()


def test_run_stops_at_preflight_before_it_begins(random_model_folder: Path, prompts: list[str], tmp_path: Path) -> None:
    taken = tmp_path / "taken"
    taken.mkdir()
    (taken / "thesis.txt").write_text("years of work")
    result = abliterate(
        "run", random_model_folder, *prompts, "--workspace", tmp_path / "runs", "--upload", taken.as_uri()
    )
    result.fails(3, "target.local", "holds something else")
    assert not (tmp_path / "runs").exists()


def test_old_settings_are_taken_over_and_each_explained(check: Any, tmp_path: Path) -> None:
    config = tmp_path / "old.toml"
    config.write_text(
        "n_trials = 50\ncache_weights = false\nuse_pca_extraction = true\niterative_rounds = 0\n"
        'device_map = "auto"\nrefusal_check_tokens = 30\n'
        '[unhelpfulness_prompts]\ndataset = "allenai/c4"\nconfig = "en"\nsplit = "train[:200]"\ncolumn = "text"\n'
    )
    code, found = check("--config", config)
    assert code == 0
    told = [one["measured"] for one in found["survey"]["checks"] if one["name"] == "settings.old"]
    assert "n_trials is trials now" in told
    assert 'use_pca_extraction = true is directions.method = "contrastive-pca" now' in told
    assert any(line.startswith("cache_weights is no longer needed: an edit is a hook") for line in told)
    assert "unhelpfulness_prompts.dataset is unhelpfulness_prompts.spec now" in told
    settings = load_settings({"model": "m"}, config=config).settings
    assert (settings.trials, settings.directions.iterative_rounds, settings.scoring.answer_tokens) == (50, 1, 30)
    assert settings.loading.device_map == "auto"
    assert (settings.unhelpfulness_prompts.spec, settings.unhelpfulness_prompts.config) == ("allenai/c4", "en")


def test_settings_that_cannot_go_together(random_model_folder: Path) -> None:
    result = abliterate(
        "preflight",
        random_model_folder,
        "--set",
        "loading.quantization=bnb-4bit",
        "--set",
        "ablation.row_normalization=full",
    )
    result.fails(2, "cannot be combined", "row_normalization")


def test_save_file_is_what_headers_are_read_from(tmp_path: Path) -> None:
    from job.model.files import list_model, parse_model, tensor_shapes

    save_file({"a": torch.zeros(2, 3, dtype=torch.bfloat16)}, tmp_path / "model.safetensors", {"format": "pt"})
    source = parse_model(str(tmp_path))
    assert tensor_shapes(source, list_model(source, None, print), print) == {"a": ("BF16", (2, 3))}
