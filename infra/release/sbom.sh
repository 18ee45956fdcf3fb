#!/bin/sh
# Writes what the whole tool installs, with versions and hashes, as CycloneDX: infra/release/sbom.sh FILE
# The packages are those of the image's lists, which pin everything by hash.
set -eu
cd "$(dirname "$0")/../.."
scratch="$(mktemp -d)"
trap 'rm -rf "$scratch"' EXIT
python3 -m venv "$scratch/venv"
"$scratch/venv/bin/pip" install --quiet --disable-pip-version-check cyclonedx-bom==7.5.0
cat infra/image/torch.txt infra/image/packages.txt >"$scratch/requirements.txt"
"$scratch/venv/bin/cyclonedx-py" requirements --pyproject pyproject.toml --output-reproducible --of JSON -o "$1" "$scratch/requirements.txt"
