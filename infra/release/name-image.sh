#!/bin/sh
# Names an owner's image as the default of this build: infra/release/name-image.sh OWNER
set -eu
cd "$(dirname "$0")/../.."
owner="$(printf '%s' "$1" | tr '[:upper:]' '[:lower:]')"
sed "s|^NAME = .*|NAME = \"ghcr.io/$owner/abliteration-job\"|" job/cloud/image.py >job/cloud/image.py.new
mv job/cloud/image.py.new job/cloud/image.py
grep -q -F "ghcr.io/$owner/" job/cloud/image.py
