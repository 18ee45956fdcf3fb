#!/bin/sh
# Prints a version's section of the changelog, without its heading: infra/release/notes.sh 0.2.0
set -eu
cd "$(dirname "$0")/../.."
notes="$(awk -v heading="## $1," 'index($0, "## ") == 1 { inside = index($0, heading) == 1; next } inside' CHANGELOG.md)"
[ -n "$notes" ] || {
    echo "release: CHANGELOG.md has no section for $1" >&2
    exit 1
}
printf '%s\n' "$notes"
