"""Templates and job files agree with the image, the exit codes and each other."""

from __future__ import annotations

import json
import os
import re
import shlex
import shutil
import site
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest
import yaml

from job.cloud.image import PLACEHOLDER as IMAGE
from job.config.load import load_settings
from job.errors import ImpossibleJobError, Stopped, UsageError
from job.preflight.gpu_table import MIN_CUDA
from tests.helpers import abliterate

ROOT = Path(__file__).parents[2]
INFRA = ROOT / "infra"
GATE_MISSED = 5
GRACE_SECONDS = 25


def data(name: str) -> Any:
    text = (INFRA / name).read_text("utf-8")
    return json.loads(text) if name.endswith("json") else yaml.safe_load(text)


def kubernetes() -> tuple[dict[str, Any], dict[str, Any]]:
    claim, job = yaml.safe_load_all((INFRA / "kubernetes" / "job.yaml").read_text("utf-8"))
    return claim, job


def ray_job() -> tuple[dict[str, Any], dict[str, Any]]:
    job, policy = yaml.safe_load_all((INFRA / "kubernetes" / "rayjob.yaml").read_text("utf-8"))
    return job, policy


def ray_pods() -> dict[str, dict[str, Any]]:
    spec = ray_job()[0]["spec"]
    cluster = spec["rayClusterSpec"]
    (workers,) = cluster["workerGroupSpecs"]
    return {
        "submitter": spec["submitterPodTemplate"]["spec"],
        "head": cluster["headGroupSpec"]["template"]["spec"],
        "worker": workers["template"]["spec"],
    }


def filled_in(text: str, given: dict[str, str]) -> str:
    """Return a text with its variables replaced, as a shell and compose replace them."""
    return re.sub(r"\$\{?(\w+)(:[?-][^}]*)?\}?", lambda found: given.get(found[1], found[0]), text)


def shown_settings(*run: str) -> str:
    """Return the settings that the command reads from the words after `abliterate`."""
    first, *options = run
    assert first == "run"
    return abliterate("config", "show", *options).check().out


@pytest.mark.parametrize("config", sorted((INFRA / "configs").glob("*.toml")), ids=lambda path: path.name)
def test_every_settings_file_loads(config: Path) -> None:
    loaded = load_settings({}, config=config)
    assert loaded.notes == []
    assert loaded.settings.loading.dtypes == ["bfloat16"]
    cards = int(re.search(r"-(\d+)x", config.name)[1])  # type: ignore[index]  # the names say it
    assert (loaded.settings.loading.device_map == "single") == (cards == 1)


def test_the_command_shows_a_settings_file() -> None:
    shown = abliterate("config", "show", "--config", INFRA / "configs" / "32b-4x4090.toml").check().out
    assert re.search(r'device_map = "balanced" +# .*32b-4x4090', shown)


def test_the_image_is_a_marked_placeholder_everywhere() -> None:
    images = [
        "{image}:{tag}".format(**data("vast/template.json")),
        data("runpod/template.json")["image"],
        data("runpod/pod.json")["image"],
        data("skypilot.yaml")["resources"]["image_id"].removeprefix("docker:"),
        data("skypilot-ray.yaml")["resources"]["image_id"].removeprefix("docker:"),
        data("dstack.yml")["image"],
        kubernetes()[1]["spec"]["template"]["spec"]["containers"][0]["image"],
        *(pod["containers"][0]["image"] for pod in ray_pods().values()),
    ]
    assert set(images) == {IMAGE}


def test_no_secret_lies_in_any_file() -> None:
    for file in INFRA.rglob("*"):
        if file.is_file():
            assert not re.search(r"hf_[A-Za-z0-9]{8,}|rpa_|AKIA", file.read_text("utf-8")), file
    assert data("runpod/pod.json")["env"]["HF_TOKEN"].startswith("{{ RUNPOD_SECRET_")
    assert data("skypilot.yaml")["secrets"] == {"HF_TOKEN": None}
    assert data("skypilot-ray.yaml")["secrets"] == {"HF_TOKEN": None, "RAY_AUTH_TOKEN": None}
    assert "HF_TOKEN" in data("dstack.yml")["env"]


def test_the_entrypoint_stays_on_vast() -> None:
    template = data("vast/template.json")
    assert template["runtype"] == "args"
    assert not template["onstart"]
    assert not template["use_ssh"]
    assert shlex.split(template["args_str"])[0] == "run"
    # Template options know only -e, -p and -h.
    assert {word for word in shlex.split(template["env"]) if word.startswith("-")} <= {"-e", "-p", "-h"}


def test_the_hosts_know_the_cuda_of_the_image() -> None:
    assert data("vast/template.json")["extra_filters"]["cuda_max_good"]["gte"] == float(MIN_CUDA)
    assert data("runpod/pod.json")["gpu"]["minCudaVersion"] == MIN_CUDA


def test_runpod_bodies_have_the_fields_of_version_2() -> None:
    container = {"args", "disk", "env", "image", "ports", "registry"}
    pod = {"name", "cloud", "cpu", "dataCenterIds", "globalNetworking", "gpu", "mounts", "startJupyter", "startSsh"}
    template = {"name", "allowedCudaVersions", "category", "mounts", "public", "serverless", "startJupyter", "startSsh"}
    assert data("runpod/pod.json").keys() <= container | pod | {"templateId"}
    assert data("runpod/template.json").keys() <= container | template
    for name in ("runpod/pod.json", "runpod/template.json"):
        assert data(name)["mounts"]["persistent"]["path"] == "/workspace"
        assert data(name)["mounts"]["persistent"]["size"] >= 10


def test_what_is_started_again_goes_by_the_exit_codes() -> None:
    never = [UsageError.exit_code, ImpossibleJobError.exit_code, GATE_MISSED]
    _, job = kubernetes()
    spec = job["spec"]["template"]["spec"]
    ignore, fail = job["spec"]["podFailurePolicy"]["rules"]
    assert (ignore["action"], ignore["onPodConditions"]) == ("Ignore", [{"type": "DisruptionTarget", "status": "True"}])
    assert (fail["action"], fail["onExitCodes"]["values"]) == ("FailJob", never)
    assert fail["onExitCodes"]["containerName"] == spec["containers"][0]["name"]
    assert spec["restartPolicy"] == "Never"
    assert spec["terminationGracePeriodSeconds"] == GRACE_SECONDS
    for name in ("skypilot.yaml", "skypilot-ray.yaml"):
        assert data(name)["resources"]["job_recovery"]["recover_on_exit_codes"] == [Stopped.exit_code]
    assert "error" not in data("dstack.yml")["retry"]["on_events"]
    for service in (data("compose.yaml")["services"]["job"], data("compose-ray.yaml")["services"]["head"]):
        assert (service["restart"], service["stop_grace_period"]) == ("no", f"{GRACE_SECONDS}s")


def test_the_claim_is_the_one_that_is_mounted() -> None:
    claim, job = kubernetes()
    spec = job["spec"]["template"]["spec"]
    claims = [
        volume["persistentVolumeClaim"]["claimName"] for volume in spec["volumes"] if "persistentVolumeClaim" in volume
    ]
    assert claims == [claim["metadata"]["name"]]
    mounts = {mount["name"] for mount in spec["containers"][0]["volumeMounts"]}
    assert mounts == {volume["name"] for volume in spec["volumes"]}


def test_onstart_fits_and_is_clean() -> None:
    script = INFRA / "vast" / "onstart.sh"
    assert len(script.read_text("utf-8")) <= 4048
    shellcheck = shutil.which("shellcheck", path=f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}")
    assert shellcheck is not None  # a development dependency
    subprocess.run([shellcheck, script], check=True)


def test_onstart_starts_the_job_once(tmp_path: Path) -> None:
    if sys.platform != "linux":  # rented machines run Linux; elsewhere there is no flock to start the script with
        pytest.skip("flock is Linux's")
    entrypoint = tmp_path / "entrypoint.sh"
    entrypoint.write_text('#!/bin/sh\nprintf "%s|" "$@"\nread -r _ <"$ABLITERATE_WORKSPACE/go"\necho end\n')
    entrypoint.chmod(0o755)
    workspace = tmp_path / "workspace"
    workspace.mkdir()
    os.mkfifo(workspace / "go")
    env = {
        **os.environ,
        "ABLITERATE_WORKSPACE": str(workspace),
        "ABLITERATION_ENTRYPOINT": str(entrypoint),
        "ABLITERATION_COMMAND": "run model --set 'a=\"b c\"'",
    }

    def start(**extra: str) -> str:
        command = ["bash", str(INFRA / "vast" / "onstart.sh")]
        return subprocess.run(command, env={**env, **extra}, capture_output=True, text=True, check=True).stderr

    log = workspace / "abliterate.log"
    assert "nothing is started" in start(ABLITERATION_COMMAND="")
    assert "started" in start()
    assert "already running" in start()
    (workspace / "go").write_text("go\n")  # waits until the job reads it
    deadline = time.monotonic() + 10
    while "end" not in log.read_text() and time.monotonic() < deadline:
        time.sleep(0.05)
    assert log.read_text() == 'run|model|--set|a="b c"|end\n'


def test_onstart_installs_a_wheel_into_an_image_that_is_not_ours(tmp_path: Path) -> None:
    """Such an image has torch; a fresh environment that sees ours stands for it."""
    build = [sys.executable, "-m", "build", "--no-isolation", "--wheel", "--outdir", str(tmp_path), str(ROOT)]
    subprocess.run(build, capture_output=True, check=True)
    subprocess.run([sys.executable, "-m", "venv", "--without-pip", tmp_path / "image"], check=True)
    python = tmp_path / "image/bin/python"
    place = subprocess.run(
        [python, "-c", "import site; print(*site.getsitepackages())"], capture_output=True, text=True
    )
    packages = Path(place.stdout.strip())
    (packages / "torch.pth").write_text(f"{site.getsitepackages()[0]}\n")
    env = {
        **{name: value for name, value in os.environ.items() if name != "PYTHONPATH"},
        **{"ABLITERATE_WORKSPACE": str(tmp_path / "workspace"), "ABLITERATION_PYTHON": str(python)},
        **{"ABLITERATION_WHEEL": str(next(tmp_path.glob("*.whl"))), "ABLITERATION_COMMAND": "config show workspace"},
    }
    script = ["bash", INFRA / "vast" / "onstart.sh"]
    started = subprocess.run(script, env=env, cwd=tmp_path, capture_output=True, text=True)
    assert started.returncode == 0, started.stderr
    assert (packages / "job/__main__.py").is_file()
    log, deadline = tmp_path / "workspace/abliterate.log", time.monotonic() + 30
    while not log.read_text() and time.monotonic() < deadline:
        time.sleep(0.05)
    assert str(tmp_path / "workspace") in log.read_text()


def test_onstart_says_where_one_looks_that_no_job_is_running(tmp_path: Path) -> None:
    env = {
        **os.environ,
        **{"ABLITERATE_WORKSPACE": str(tmp_path), "ABLITERATION_PYTHON": sys.executable, "ABLITERATION_RETRY": "0"},
        **{"ABLITERATION_WHEEL": str(tmp_path / "gone.whl"), "ABLITERATION_COMMAND": "config show workspace"},
    }
    started = subprocess.run(["bash", INFRA / "vast" / "onstart.sh"], env=env, capture_output=True, text=True)
    log = (tmp_path / "abliterate.log").read_text()
    assert started.returncode == 1
    assert "no job is running, and the machine bills on" in log
    assert log.count("gone.whl") >= 3
