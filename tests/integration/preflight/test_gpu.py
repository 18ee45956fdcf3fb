"""GPU facts are injected, as readings or through compiled stand-ins for the driver's libraries."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
import timeit
from pathlib import Path

import pytest
import torch

from job.errors import UsageError
from job.preflight import cuda, gpu
from job.preflight.checks import GIB, MIB, Check
from job.preflight.gpu_table import MIN_CUDA, card_of, cards, find_card, offers_query, parse_on
from job.preflight.machine import read_machine, torch_cuda_version
from job.preflight.readings import DriverReading, GpuReading, Holder, MachineReading, read_reading
from job.preflight.selftest import Exercise, compute_check, exercise

READINGS = Path(__file__).parents[2] / "fakes" / "readings"
MODERN = DriverReading(
    driver_version="580.65.06",
    cuda_driver=13000,
    torch_cuda="13.0",
    arch_list=("sm_75", "sm_80", "sm_86", "sm_90", "sm_100", "sm_120"),
)


def card(**changes: object) -> GpuReading:
    idle = GpuReading(
        index=0,
        uuid="0" * 8,
        name="NVIDIA GeForce RTX 4090",
        total_bytes=24 * GIB,
        free_bytes=24 * GIB - 20 * MIB,
        compute_capability=(8, 9),
    )
    return GpuReading.model_validate({**idle.model_dump(), **changes})


def machine(*gpus: GpuReading, driver: DriverReading = MODERN) -> MachineReading:
    return MachineReading(gpus=gpus, driver=driver)


def faults(checks: list[Check]) -> dict[str, str]:
    return {check.name: check.status for check in checks if check.status != "ok"}


def test_this_machine_is_read_and_passes() -> None:
    reading = read_machine()
    assert reading.source == "measured"
    assert reading.memory is not None
    assert reading.cpus is not None
    assert MachineReading.model_validate_json(reading.model_dump_json()) == reading
    if not reading.gpus:
        assert faults(gpu.gpu_checks(reading)) == {}


def test_reading_the_machine_does_not_import_torch() -> None:
    code = (
        "import importlib, pkgutil, sys\nfrom job import preflight\n"
        "for found in pkgutil.iter_modules(preflight.__path__):\n"
        "    importlib.import_module('job.preflight.' + found.name)\n"
        "sys.modules['job.preflight.machine'].read_machine()\nassert 'torch' not in sys.modules"
    )
    subprocess.run([sys.executable, "-c", code], check=True)


def test_torchs_cuda_version_is_read_without_importing_it() -> None:
    import torch

    assert torch_cuda_version() == torch.version.cuda


@pytest.mark.parametrize("path", sorted(READINGS.glob("*.json")), ids=lambda path: path.stem)
def test_recorded_machines_pass(path: Path) -> None:
    assert faults(gpu.gpu_checks(read_reading(path))) == {}


def test_a_file_that_holds_no_reading(tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="cannot read"):
        read_reading(tmp_path / "none.json")
    path = tmp_path / "x.json"
    path.write_text(json.dumps({"gpus": [{"index": 0}]}))
    with pytest.raises(UsageError, match=r"gpus\.0\.name field required"):
        read_reading(path)


@pytest.mark.parametrize(
    ("driver", "status"),
    [
        ({}, "ok"),
        ({"cuda_driver": 12040, "driver_version": "550.54"}, "fail"),
        ({"cuda_driver": 12000, "torch_cuda": "12.8"}, "ok"),
        ({"cuda_driver": 11080, "torch_cuda": "12.8"}, "fail"),
        ({"cuda_driver": None, "driver_version": "525.60", "torch_cuda": "12.4"}, "ok"),
        ({"cuda_driver": None, "driver_version": "520.61", "torch_cuda": "12.4"}, "fail"),
        ({"cuda_driver": None, "driver_version": "579.1"}, "fail"),
        ({"torch_cuda": None}, "fail"),
    ],
)
def test_driver_against_torch(driver: dict[str, object], status: str) -> None:
    check = gpu.driver(MODERN.model_copy(update=driver))
    assert check.status == status
    assert bool(check.remedy) == (status == "fail")


@pytest.mark.parametrize(
    ("capability", "built", "torch_cuda", "status"),
    [
        ((8, 9), ("sm_80", "sm_90"), "12.4", "ok"),
        ((12, 0), ("sm_80", "sm_90"), "12.4", "fail"),
        ((12, 0), ("sm_80", "compute_90"), "12.4", "ok"),
        ((9, 0), ("sm_90a",), "12.4", "ok"),
        ((10, 3), ("sm_100a",), "12.8", "fail"),
        ((10, 3), ("sm_100",), "12.8", "ok"),
        ((8, 0), ("sm_86",), "12.8", "fail"),
        ((7, 0), ("sm_75", "sm_80"), "13.0", "fail"),
        ((12, 0), (), "12.6", "fail"),
        ((10, 0), (), "12.8", "ok"),
        ((9, 0), (), "11.8", "ok"),
        ((9, 0), (), None, "fail"),
    ],
)
def test_architecture_against_torch(
    capability: tuple[int, int], built: tuple[str, ...], torch_cuda: str | None, status: str
) -> None:
    driver = DriverReading(torch_cuda=torch_cuda, arch_list=built)
    assert gpu.architecture(machine(card(compute_capability=capability), driver=driver)).status == status


def test_a_broken_driver_is_not_a_machine_without_gpu() -> None:
    reading = machine(driver=DriverReading(error="cuInit: system has unsupported display driver (803)"))
    assert faults(gpu.gpu_checks(reading)) == {"gpu.present": "fail"}


def test_old_cards_ecc_errors_and_slices() -> None:
    assert faults(gpu.gpu_checks(machine(card(compute_capability=(7, 5))))) == {"gpu.bf16": "warn"}
    assert faults(gpu.gpu_checks(machine(card(ecc_uncorrected=2)))) == {"gpu.ecc": "fail"}
    assert faults(gpu.gpu_checks(machine(card(mig=True)))) == {"gpu.mig": "warn"}


def test_others_on_the_card_are_found_whether_seen_or_not() -> None:
    half = 12 * GIB
    unseen = gpu.holders(card(free_bytes=half))
    assert unseen.status == "fail"
    assert "outside this container" in unseen.remedy
    other = Holder(pid=4711, name="python", used_bytes=half)
    seen = gpu.holders(card(free_bytes=half, holders=(other.model_dump(),)))
    assert seen.status == "fail"
    assert "process 4711 python 12.0 GiB" in seen.measured
    ours = Holder(pid=1, used_bytes=half, ours=True)
    assert gpu.holders(card(free_bytes=half, holders=(ours.model_dump(),))).status == "ok"
    desktop = card(free_bytes=23 * GIB, holders=(Holder(pid=9, name="Xorg", used_bytes=GIB).model_dump(),))
    assert gpu.holders(desktop).status == "warn"


def test_one_card_full_and_three_idle() -> None:
    """A recorded host with GPU 0 at 96 %."""
    cards_of_four = [card(index=index) for index in range(4)]
    cards_of_four[0] = card(index=0, free_bytes=GIB)
    check = gpu.balance(cards_of_four)
    assert check.status == "warn"
    assert "GPU 0 96%, GPU 1 0%" in check.measured
    assert "CUDA_VISIBLE_DEVICES=1,2,3" in check.remedy
    assert gpu.balance([card(index=index, free_bytes=8 * GIB) for index in range(4)]).status == "ok"


def test_the_table_of_cards() -> None:
    reading = parse_on("4xRTX4090")
    assert [found.index for found in reading.gpus] == [0, 1, 2, 3]
    assert faults(gpu.gpu_checks(reading)) == {}
    assert parse_on("h200") == parse_on("1xH200")
    assert parse_on("2 × a100 80").gpus[1].name == "A100-80"
    for entry in cards():
        found = card_of(parse_on(entry.name).gpus[0])
        assert found == entry
    assert card_of(card(name="NVIDIA A100-SXM4-80GB", total_bytes=find_card("A100-80").total_bytes)) == find_card(
        "A100-80"
    )
    assert card_of(card(name="NVIDIA GeForce GTX 1080")) is None
    assert "gpu_name=RTX_4090 num_gpus=4" in offers_query(find_card("RTX4090"), 4, 200 * 10**9)
    assert "disk_space>=200" in offers_query(find_card("RTX4090"), 4, 200 * 10**9)
    assert f"cuda_max_good>={MIN_CUDA}" in offers_query(find_card("RTX4090"), 4, 200 * 10**9)


@pytest.mark.parametrize(
    ("text", "hint"),
    [("4xRTX4080", "RTX4090"), ("1xH2000", "H200"), ("0xH200", "1 to 16"), ("", "NxCARD"), ("foo", "B200")],
)
def test_cards_that_are_none(text: str, hint: str) -> None:
    with pytest.raises(UsageError) as caught:
        parse_on(text)
    assert hint in caught.value.line


def test_a_device_computes_right_and_keeps_its_memory() -> None:
    found = exercise("cpu", most_bytes=8 * MIB, seconds=0.05)
    assert found.fault is None
    assert found.pattern_bytes == 8 * MIB
    assert found.flops > 1e8
    assert found.bandwidth > 1e8
    assert compute_check(found).status == "ok"


def fastest_product(dtype: torch.dtype, side: int = 768) -> float:
    matrix = torch.ones(side, side, dtype=dtype)
    return min(timeit.repeat(lambda: matrix @ matrix, number=1, repeat=20))


@pytest.mark.parametrize("seconds", [0.0, 0.4])
def test_a_cpu_is_judged_by_its_arithmetic_and_not_by_what_it_takes_to_begin(seconds: float) -> None:
    loss = fastest_product(torch.bfloat16) / fastest_product(torch.float32)
    if 1 < loss < 4:
        pytest.skip("this CPU is about as fast as float32 has to be: either verdict is right")
    assert exercise("cpu", most_bytes=MIB, seconds=seconds).prefers_float32 == (loss > 2)


def test_a_device_that_is_not_there() -> None:
    check = compute_check(exercise("cuda:99", most_bytes=MIB, seconds=0.01))
    assert check.status == "fail"
    assert check.measured.startswith("cuda:99: ")
    assert compute_check(Exercise(device="cuda:0", fault="3 words of memory lost")).status == "fail"


STUB = Path(__file__).parents[2] / "fakes" / "stub_driver.c"
NVML = "libnvidia-ml.so.1"


def compiled(source: Path, library: Path) -> Path:
    compiler = shutil.which("cc")
    if compiler is None:  # a stand-in for the driver's library must be compiled
        pytest.skip("no C compiler here")
    subprocess.run([compiler, "-shared", "-fPIC", "-o", str(library), str(source)], check=True)
    return library


@pytest.fixture(scope="module")
def stub(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return compiled(STUB, tmp_path_factory.mktemp("stub") / "libstub.so")


READ = """
import sys
import timeit
from job.preflight.machine import read_machine
print(read_machine(cuda_library=sys.argv[1]).model_dump_json())
"""


def read_with(cuda_library: Path, nvml_library: Path) -> MachineReading:
    """Read the machine in a process whose loader finds a library, of the name of NVML's, first."""
    env = {**os.environ, "LD_LIBRARY_PATH": str(nvml_library.parent)}
    command = [sys.executable, "-c", READ, str(cuda_library)]
    done = subprocess.run(command, capture_output=True, text=True, env=env, check=True)
    return MachineReading.model_validate_json(done.stdout)


def test_the_libraries_are_called_as_their_headers_say(
    stub: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("STUB_HOLDER", str(os.getppid()))
    (tmp_path / NVML).symlink_to(stub)
    reading = read_with(stub, tmp_path / NVML)
    assert (reading.driver.cuda_driver, reading.driver.driver_version) == (12080, "570.124.06")
    first, second = reading.gpus
    assert first.name == "Stub GPU"
    assert first.uuid == "00010203-0405-0607-0809-0a0b0c0d0e0f"
    assert first.compute_capability == (9, 0)
    # 80 GiB, half a GiB of them reserved by the driver; 70 are free, one process holds 9.
    assert (first.total_bytes, first.free_bytes) == (80 * GIB - GIB // 2, 70 * GIB)
    assert (first.ecc_uncorrected, first.mig) == (3, False)
    # Seventy processes: more than fit at first.
    assert len(first.holders) == 70
    holder = next(holder for holder in first.holders if holder.pid == os.getppid())
    assert holder.used_bytes == 9 * GIB
    assert not holder.ours
    unknown = next(holder for holder in first.holders if holder.pid != os.getppid())
    assert unknown.used_bytes is None
    # The second is a slice; its driver supports only the older memory query.
    assert second.mig
    assert (second.total_bytes, second.free_bytes, second.ecc_uncorrected) == (20 * GIB, 19 * GIB, None)
    assert {check.name for check in gpu.gpu_checks(reading) if check.status == "fail"} >= {"gpu.ecc", "gpu.holders"}


@pytest.mark.parametrize("kind", ["no library", "without any function"])
def test_without_nvml_the_driver_tells_the_free_memory(stub: Path, tmp_path: Path, kind: str) -> None:
    (tmp_path / "empty.c").touch()
    if kind == "no library":
        (tmp_path / NVML).write_text(kind)
    else:
        compiled(tmp_path / "empty.c", tmp_path / NVML)
    reading = read_with(stub, tmp_path / NVML)
    assert [found.free_bytes for found in reading.gpus] == [5 * GIB, 5 * GIB]
    assert reading.driver.driver_version is None


def test_libraries_that_fail_or_are_none(stub: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("STUB_INIT", "803")
    found = cuda.read_cuda(str(stub))
    assert (found.version, found.error) == (12080, "cuInit: stub error (803)")
    monkeypatch.setenv("STUB_INIT", "100")
    assert cuda.read_cuda(str(stub)) == cuda.CudaReading(version=12080)
    assert cuda.read_cuda("libnone.so.1") == cuda.CudaReading()
    assert cuda.read_cuda("libc.so.6").error is not None
    assert cuda.free_bytes(0, "libc.so.6") is None


WAITING = """
import sys
import timeit
from pathlib import Path
from job.config.load import load_settings
from job.preflight import machine_checks
from job.preflight.inputs import PreflightInputs
read = machine_checks.read_machine
machine_checks.read_machine = lambda **given: read(cuda_library=sys.argv[1])
taken = Path(sys.argv[2])
for minutes, waits in ((1, 2), (0.75, 99), (0, 99)):
    taken.touch()
    said, slept = [], []
    def sleep(seconds):
        slept.append(seconds)
        if len(slept) == waits:
            taken.unlink()
    settings = load_settings({"model": "-", "wait_for_gpu": minutes}).settings
    inputs = PreflightInputs(settings, report=said.append, clock=lambda: sum(slept), sleep=sleep)
    reading = machine_checks.wait_for_gpus(inputs)
    print(reading.gpus[0].free_bytes >> 30, len(said), *slept)
"""


def test_others_are_waited_for_until_they_leave_or_the_time_is_up(stub: Path, tmp_path: Path) -> None:
    taken = tmp_path / "taken"
    command = [sys.executable, "-c", WAITING, str(stub), str(taken)]
    env = {**os.environ, "STUB_TAKEN": str(taken)}
    done = subprocess.run(command, capture_output=True, text=True, env=env, check=True)
    assert done.stdout.splitlines() == ["80 2 10.0 10.0", "5 5 10.0 10.0 10.0 10.0 5.0", "5 0"]
