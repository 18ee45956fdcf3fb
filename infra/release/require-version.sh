#!/bin/sh
# Fails unless a tag, the code, the image's label and the changelog name one version: infra/release/require-version.sh v0.2.0
set -eu
cd "$(dirname "$0")/../.."
version="${1#v}"
[ "v$version" = "$1" ] || {
    echo "release: the tag $1 is not of the form vX.Y.Z" >&2
    exit 1
}
require() {
    grep -q -x -e "$2" "$1" || {
        echo "release: $1 does not name version $version" >&2
        exit 1
    }
}
require job/__init__.py "__version__ = \"$version\""
require Dockerfile "ARG VERSION=$version"
require CITATION.cff "version: $version"
require CHANGELOG.md "## $version, [0-9-]*"
