"""A large upload to S3 over a faulty line by a process that is killed: bytes sent twice, and memory.

python -m benchmarks.s3_upload [MIB] [CUTS] [KILLS]      default: 1024 MiB, 20 cuts and 2 kills
"""

from __future__ import annotations

import hashlib
import json
import os
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import boto3

from job.records import Manifest
from tests.fakes.fault_proxy import FaultProxy
from tests.fakes.s3_server import BUCKET, KEY_ID, SECRET, S3Server, make_export

MIB = 1 << 20
PART_MIB, LANES = 16, 4
URI = f"s3://{BUCKET}/model"


def start(export: Path, state: Path, endpoint: str) -> subprocess.Popen[str]:
    """Start an upload in its own process."""
    options = {
        "endpoint": endpoint,
        "region": "us-east-1",
        "addressing_style": "path",
        "part_mib": PART_MIB,
        "parallel_parts": LANES,
    }
    command = [sys.executable, "-m", "tests.fakes.s3_upload", str(export), URI, str(state), json.dumps(options)]
    return subprocess.Popen(command, stdout=subprocess.PIPE, text=True)


def upload(export: Path, state: Path, line: FaultProxy, kills: list[int]) -> dict[str, int]:
    """Upload, killing the process at the given numbers of bytes, and return the last process's report."""
    for point in kills:
        process = start(export, state, line.url)
        while line.sent < point and process.poll() is None:
            time.sleep(0.002)
        process.kill()
        process.communicate()
    out, _ = start(export, state, line.url).communicate()
    done: dict[str, int] = json.loads(out)
    return done


def remote_sha256(server: S3Server) -> str:
    """Return the sha256 of the object, downloaded past the faulty line."""
    digest = hashlib.sha256()
    client = server.client()
    for block in client.get_object(Bucket=BUCKET, Key="model/model.safetensors")["Body"].iter_chunks(MIB):
        digest.update(block)
    client.close()
    return digest.hexdigest()


def main(mib: int = 1024, cuts: int = 20, kills: int = 2) -> None:
    """Measure and print."""
    os.environ.update(AWS_ACCESS_KEY_ID=KEY_ID, AWS_SECRET_ACCESS_KEY=SECRET, AWS_EC2_METADATA_DISABLED="true")
    size = mib * MIB
    with tempfile.TemporaryDirectory() as folder, S3Server() as server:
        export = make_export(Path(folder) / "export", {"config.json": 500, "model.safetensors": size})
        client = server.client()
        client.create_bucket(Bucket=BUCKET)
        client.close()
        cut_points = [(number + 1) * size // (cuts + 1) for number in range(cuts)]
        kill_points = [(number + 1) * size // (kills + 1) + 11 * MIB for number in range(kills)]
        begin = time.perf_counter()
        with FaultProxy(server.host, server.port, cut_up=cut_points) as line:
            done = upload(export, Path(folder) / "state", line, kill_points)
        seconds = time.perf_counter() - begin
        again = line.sent - size
        bound = (cuts + kills * LANES) * PART_MIB
        entry = Manifest.model_validate_json((export / "manifest.json").read_bytes()).files["model.safetensors"]
        print(
            f"{mib} MiB in parts of {PART_MIB} MiB, {LANES} at a time, {line.cuts} cuts, {kills} kills: {seconds:.0f} s"
        )
        print(
            f"sent again, headers included: {again / MIB:.1f} MiB (a part a cut, the parts in flight a kill: {bound})"
        )
        print(f"peak resident memory of the last process: {done['peak_bytes'] / 1e6:.0f} MB")
        print(f"sha256 of the object equal: {remote_sha256(server) == entry.sha256}")
        print(f"uploads left: {len(server.uploads())}, boto3 {boto3.__version__}")


if __name__ == "__main__":
    main(*map(int, sys.argv[1:]))
