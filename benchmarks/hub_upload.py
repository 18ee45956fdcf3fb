"""A large delivery to a Hub over a faulty line by a process that is killed: bytes sent twice, and memory.

python -m benchmarks.hub_upload [MIB] [FILES] [CUTS] [KILLS] [PART_MIB]

Defaults: 1024 MiB in 16 files, 20 cuts, 2 kills and parts of 16 MiB. Files no larger than a part are uploaded in one
piece.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from random import Random

import huggingface_hub

from job.export.merged import seal
from job.records import Manifest
from job.storage.atomic import read_record, sha256_file
from job.storage.exports import MANIFEST
from tests.fakes.fault_proxy import FaultProxy
from tests.fakes.hub import LoopbackHub

MIB = 1 << 20
REPO, TOKEN = "cook/soup", "hf_CookSendsALotOfSoup01234"
# No healthy upload takes this long.
PATIENCE_S = 900.0


def make_export(folder: Path, mib: int, files: int) -> Path:
    """Write a complete export of random shards, `mib` MiB in total."""
    folder.mkdir()
    random = Random(0)
    (folder / "config.json").write_text('{"layers": 4}\n')
    for number in range(files):
        size = mib * MIB // files
        with (folder / f"model-{number + 1:05}-of-{files:05}.safetensors").open("wb") as file:
            for start in range(0, size, MIB):
                file.write(random.randbytes(min(MIB, size - start)))
    seal(folder, lambda _: {"README.md": "---\nlicense: mit\n---\nSoup without salt.\n"})
    return folder


def upload(
    export: Path, environment: dict[str, str], line: FaultProxy, kills: list[int]
) -> tuple[dict[str, object], int]:
    """Deliver, killing the process whenever the given number of bytes is uploaded.

    Returns:
        The last process's report and the number of kills.
    """
    end = time.monotonic() + PATIENCE_S
    command = [sys.executable, "-W", "ignore", "-m", "tests.fakes.hub_upload", str(export), f"hf://{REPO}"]
    killed = 0
    for point in [*kills, None]:
        process = subprocess.Popen(command, env=environment, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
        try:
            while point is not None and line.sent < point and process.poll() is None and time.monotonic() < end:
                time.sleep(0.002)
            if point is not None:
                process.kill()
            out, err = process.communicate(timeout=max(end - time.monotonic(), 1.0))
        finally:
            process.kill()
        killed += process.returncode < 0
    if process.returncode != 0:
        raise SystemExit(err[-2000:])
    done: dict[str, object] = json.loads(out)
    return done, killed


def arrived(hub: LoopbackHub, export: Path) -> bool:
    """Return whether the repository holds exactly the export, by sha256 of its stored files."""
    found = hub.repo("model", REPO).at().files
    wanted = {name: entry.sha256 for name, entry in read_record(export / MANIFEST, Manifest).files.items()}
    wanted[MANIFEST] = sha256_file(export / MANIFEST)
    return {name: sha256_file(blob.file) for name, blob in found.items() if name != ".gitattributes"} == wanted


def main(mib: int = 1024, files: int = 16, cuts: int = 20, kills: int = 2, part_mib: int = 16) -> None:
    """Measure and print."""
    size = mib * MIB
    with tempfile.TemporaryDirectory() as folder, LoopbackHub(chunk_size=part_mib * MIB) as hub:
        hub.add_token(TOKEN, "cook")
        export = make_export(Path(folder) / "export", mib, files)
        cut_points = [(number + 1) * size // (cuts + 1) for number in range(cuts)]
        kill_points = [(number + 1) * size // (kills + 1) + 11 * MIB for number in range(kills)]
        begin = time.perf_counter()
        with FaultProxy(*hub.storage_address, cut_up=cut_points) as line:
            hub.reach_storage_at(line.url)
            environment = {**os.environ, **hub.environment(Path(folder) / "home", TOKEN)}
            done, killed = upload(export, environment, line, kill_points)
        seconds = time.perf_counter() - begin
        again, file_mib = line.sent - size, mib / files
        print(f"{mib} MiB in {files} files, parts of {part_mib} MiB, {line.cuts} cuts, {killed} kills: {seconds:.0f} s")
        print(
            f"sent again, headers included: {again / MIB:.1f} MiB"
            f" (a file a cut and a kill: {(line.cuts + killed) * file_mib:.0f})"
        )
        print(f"peak resident memory of the last process: {done['peak_bytes'] / 1e6:.0f} MB")
        print(f"sha256 of every file as in the manifest: {arrived(hub, export)}")
        commits = len(hub.repo("model", REPO).history()) - 1
        print(f"commits: {commits}, faults of the Hub itself: {len(hub.errors) + len(hub.strays)}", end=", ")
        print(f"huggingface_hub {huggingface_hub.__version__}")


if __name__ == "__main__":
    main(*map(int, sys.argv[1:]))
