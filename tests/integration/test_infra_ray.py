"""Job files for several machines: our own commands, token-protected clusters, and a working Slurm script."""

from __future__ import annotations

import os
import re
import shlex
import shutil
import signal
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from job.errors import Stopped
from tests.fakes.ray_cluster import RAY
from tests.helpers import wait_until
from tests.integration.test_infra import INFRA, data, filled_in, ray_job, ray_pods, shown_settings

SBATCH = INFRA / "slurm" / "ray.sbatch"
GIVEN = {"MODEL": "me/model", "CHECKPOINT": "hf://me/state", "UPLOAD": "hf://me/edited", "head": "10.0.0.1:6379"}


def compose() -> dict[str, dict[str, Any]]:
    services: dict[str, dict[str, Any]] = data("compose-ray.yaml")["services"]
    return services


def compose_command() -> str:
    """Return the job's line of the head's script, with the script's arguments filled in."""
    bash, option, script, *words = compose()["head"]["command"]
    assert (bash, option) == ("bash", "-c")
    given = " ".join(shlex.quote(filled_in(word, GIVEN)) for word in words[1:])
    assert words[0] == "run"  # $0 of the script
    return str(script.splitlines()[-1].replace('"$$@"', given))


def skypilot_command() -> str:
    (line,) = [line for line in data("skypilot-ray.yaml")["run"].splitlines() if "/entrypoint.sh run" in line]
    return filled_in(line.partition(" && code")[0], GIVEN)


def slurm_command() -> str:
    (line,) = [line for line in SBATCH.read_text().splitlines() if line.startswith("abliterate run")]
    words = shlex.join(["me/model", "--checkpoint", "hf://me/state", "--upload", "hf://me/edited"])
    return line.removesuffix(" &").replace('"$@"', words).replace("$ip:$port", GIVEN["head"])


def kubernetes_command() -> str:
    return str(ray_job()[0]["spec"]["entrypoint"])


@pytest.mark.parametrize("command", [compose_command, skypilot_command, slurm_command, kubernetes_command])
def test_every_cluster_runs_the_job_on_itself(command: Any) -> None:
    shown = shown_settings(
        *re.sub(r".*?(abliterate|/entrypoint\.sh) ", "", command(), count=1).replace('"', "").split()
    )
    assert re.search(r'^engine = "ray" +# ', shown, re.MULTILINE)
    assert re.search(r'^address = "(auto|10\.0\.0\.1:6379)" +# ', shown, re.MULTILINE)
    assert re.search(r'^checkpoint = "hf://(me/state|YOU/STATE-REPO)"', shown, re.MULTILINE)


def test_every_cluster_asks_for_a_token_that_no_file_holds() -> None:
    for service in compose().values():
        environment = service["environment"]
        assert environment["RAY_AUTH_MODE"] == "token"
        assert environment["RAY_AUTH_TOKEN"].startswith("${RAY_AUTH_TOKEN:?")
        assert environment["HF_TOKEN"] is None
    assert "export RAY_AUTH_MODE=token" in data("skypilot-ray.yaml")["run"]
    assert ray_job()[0]["spec"]["rayClusterSpec"]["authOptions"] == {"mode": "token"}
    assert re.search(r"^export RAY_AUTH_TOKEN RAY_AUTH_MODE=token", SBATCH.read_text(), re.MULTILINE)


def test_no_port_is_opened_to_strangers() -> None:
    assert not any("ports" in service or "network_mode" in service for service in compose().values())
    assert "ports" not in data("skypilot-ray.yaml")["resources"]
    job, policy = ray_job()
    spec = job["spec"]
    label = policy["spec"]["podSelector"]["matchLabels"]
    cluster = spec["rayClusterSpec"]
    templates = [spec["submitterPodTemplate"], cluster["headGroupSpec"]["template"]]
    templates += [group["template"] for group in cluster["workerGroupSpecs"]]
    assert all(template["metadata"]["labels"] == label for template in templates)
    own, operator = policy["spec"]["ingress"]
    assert own == {"from": [{"podSelector": {"matchLabels": label}}]}
    assert operator["ports"] == [{"port": 8265}]


def test_the_dashboard_is_off_where_nobody_needs_it() -> None:
    """KubeRay submits the job through it; it listens on all interfaces there, behind token and policy."""
    scripts = [compose()["head"]["command"][2], data("skypilot-ray.yaml")["run"], SBATCH.read_text()]
    for script in scripts:
        (head,) = re.findall(r"ray start --head.*", script.replace("\\\n", ""))
        assert "--include-dashboard=false" in head
    assert ray_job()[0]["spec"]["rayClusterSpec"]["headGroupSpec"]["rayStartParams"] == {"dashboard-host": "0.0.0.0"}


def test_the_runs_own_gpu_is_reserved_on_the_head() -> None:
    spec, pods = ray_job()[0]["spec"], ray_pods()
    limits = [pods[name]["containers"][0]["resources"]["limits"]["nvidia.com/gpu"] for name in ("head", "worker")]
    assert [spec["entrypointNumGpus"]] * 2 == limits
    assert "node:__internal_head__" in spec["entrypointResources"]
    devices = [service["deploy"]["resources"]["reservations"]["devices"][0] for service in compose().values()]
    assert [device["device_ids"] for device in devices] == [["0"], ["1"], ["2"]]


def test_pods_are_confined_and_have_what_they_mount() -> None:
    for name, pod in ray_pods().items():
        (container,) = pod["containers"]
        assert pod["automountServiceAccountToken"] is False
        assert pod["securityContext"]["runAsNonRoot"] is True
        assert container["securityContext"]["readOnlyRootFilesystem"] is True
        assert {mount["name"] for mount in container["volumeMounts"]} == {volume["name"] for volume in pod["volumes"]}
        assert any(mount["mountPath"] == "/dev/shm" for mount in container["volumeMounts"]) == (name != "submitter")


def test_the_head_is_the_version_of_the_image() -> None:
    (pinned,) = re.findall(r"^ray==(\S+)", (INFRA / "image" / "packages.txt").read_text(), re.MULTILINE)
    assert ray_job()[0]["spec"]["rayClusterSpec"]["rayVersion"] == pinned


def test_a_pod_that_is_deleted_stops_the_job_and_waits_for_it(tmp_path: Path) -> None:
    hook = ray_pods()["head"]["containers"][0]["lifecycle"]["preStop"]["exec"]["command"]
    assert hook[:2] == ["python", "-c"]
    # A process with the name that the hook looks for, with a child of the same name: only the first gets the signal.
    command = tmp_path / "bin" / "abliterate"
    command.parent.mkdir()
    command.write_text(
        f"#!{sys.executable}\n"
        "import os, signal, sys, time\n"
        "child = os.fork()\n"
        "def stop(*_):\n"
        f"    os.write(1, b'told %d\\n' % bool(child))\n"
        "    os.kill(child, signal.SIGKILL)\n"
        f"    sys.exit({Stopped.exit_code})\n"
        "signal.signal(signal.SIGTERM, stop)\n"
        "os.write(1, b'ready\\n')\n"
        "while True: time.sleep(0.1)\n"
    )
    command.chmod(0o755)
    # The hook scans all processes: keep it away from those of other tests.
    script = hook[2].replace('"/bin/abliterate"', repr(str(command)))
    assert script != hook[2]
    job = subprocess.Popen([command, "run"], stdout=subprocess.PIPE, text=True, start_new_session=True)
    assert job.stdout is not None
    try:
        assert [job.stdout.readline(), job.stdout.readline()] == ["ready\n", "ready\n"]
        hooked = subprocess.Popen([sys.executable, "-c", script])
        assert job.wait(timeout=20) == Stopped.exit_code
        assert hooked.wait(timeout=20) == 0
        assert job.stdout.read() == "told 1\n"
    finally:
        job.stdout.close()
        if job.poll() is None:
            os.killpg(job.pid, signal.SIGKILL)


def test_the_sbatch_script_is_clean_and_checked() -> None:
    shellcheck = shutil.which("shellcheck", path=f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}")
    assert shellcheck is not None  # a development dependency
    subprocess.run([shellcheck, SBATCH], check=True)
    makefile = (INFRA.parent / "Makefile").read_text()
    assert re.search(r"^SCRIPTS := .*infra/slurm/ray\.sbatch$", makefile, re.MULTILINE)
    assert len(re.findall(r"^\t\$\(BIN\)/sh(?:ellcheck|fmt) .*\$\(SCRIPTS\)$", makefile, re.MULTILINE)) == 2
    for option in ("--requeue", "--no-kill", "--open-mode=append", "--signal=B:TERM@60"):
        assert f"\n#SBATCH {option}\n" in SBATCH.read_text()


def test_the_scripts_of_other_files_are_shell(tmp_path: Path) -> None:
    scripts = [data("skypilot-ray.yaml")["run"], *(service["command"][2] for service in compose().values())]
    for script in scripts:
        subprocess.run(["bash", "-n", "-c", script], check=True)


@pytest.mark.full("workers")
@pytest.mark.slow
@pytest.mark.xdist_group("ray")
@pytest.mark.skipif(sys.platform != "linux", reason="Slurm's nodes are Linux")
def test_the_sbatch_script_runs_the_job_on_all_nodes_and_is_queued_again_after_a_stop(tmp_path: Path) -> None:
    """Ray is real. Slurm's commands and the job are stand-ins: the job waits for two nodes, and then to be stopped."""
    tools, queued = tmp_path / "bin", tmp_path / "queued"
    tools.mkdir()
    job = (
        "import os, signal, sys, time",
        "import ray",
        "sys.argv[1:5] == ['run', 'me/model', '--engine', 'ray'] or sys.exit(f'wrong words: {sys.argv}')",
        "ray.init(sys.argv[6], log_to_driver=False)",
        "while sum(node['Alive'] for node in ray.nodes()) < 2: time.sleep(0.2)",
        f"signal.signal(signal.SIGTERM, lambda *_: (ray.shutdown(), os._exit({Stopped.exit_code})))",
        "print('two nodes, token', len(os.environ['RAY_AUTH_TOKEN']), flush=True)",
        "while True: time.sleep(0.2)",
    )
    commands = {
        "abliterate": "#!{python}\n" + "\n".join(job),
        # Arguments after its own options run here, as on another node.
        "srun": '#!/bin/sh\nwhile [ "${1#--}" != "$1" ]; do shift; done\nexec "$@" --node-ip-address=127.0.0.1',
        "scontrol": f'#!/bin/sh\necho "$@" >{shlex.quote(str(queued))}',
        "ray": '#!/bin/sh\nexec {ray} "$@"',
    }
    for name, text in commands.items():
        text = text.replace("{python}", sys.executable).replace("{ray}", str(RAY))
        (tools / name).write_text(text + "\n")
        (tools / name).chmod(0o755)
    number = os.getpid()
    env = {
        **{name: value for name, value in os.environ.items() if not name.startswith("RAY_")},
        "PATH": f"{tools}{os.pathsep}{os.environ['PATH']}",
        "ABLITERATION_HEAD_IP": "127.0.0.1",
        "SLURM_JOB_ID": str(number),
        "SLURM_JOB_NUM_NODES": "2",
        "SLURM_CPUS_PER_TASK": "1",
        "SLURMD_NODENAME": "node1",
    }
    script = subprocess.Popen(
        ["bash", SBATCH, "me/model"], cwd=tmp_path, env=env, stdout=subprocess.PIPE, text=True, start_new_session=True
    )
    assert script.stdout is not None
    try:
        said = script.stdout.readline()
        assert said == "two nodes, token 64\n", (tmp_path / f"ray-{number}.log").read_text()
        script.send_signal(signal.SIGTERM)
        assert script.wait(timeout=120) == Stopped.exit_code
        assert queued.read_text() == f"requeue {number}\n"
        assert not Path(f"/tmp/ray-{number}").exists()
        wait_until(lambda: subprocess.run(["pgrep", "-f", f"/tmp/ray-{number}/"], check=False).returncode == 1)
    finally:
        script.stdout.close()
        if script.poll() is None:
            os.killpg(script.pid, signal.SIGKILL)
