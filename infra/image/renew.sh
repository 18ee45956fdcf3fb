#!/bin/sh
# Renews what the image is made from: the digest of its base in the Dockerfile, and the hashes of everything that pip
# installs in it, in the versions that constraints.txt names.
#   infra/image/renew.sh [base | hashes]      both, where neither is named
# The digest is read with docker buildx, crane or skopeo; uv computes the hashes, and is installed for that if it is missing.
# TORCH_INDEX=URL allows torch from another index, for x86_64 alone; build with `--build-arg TORCH_INDEX=URL` then.
set -eu
cd "$(dirname "$0")/../.."
scratch="$(mktemp -d)"
trap 'rm -rf "$scratch"' EXIT

die() {
    echo "renew: $*" >&2
    exit 1
}

# Print the manifest of an image as its registry has it, byte for byte.
manifest() {
    if docker buildx version >/dev/null 2>&1; then
        docker buildx imagetools inspect --raw "$1"
    elif command -v crane >/dev/null; then
        crane manifest "$1"
    elif command -v skopeo >/dev/null; then
        skopeo inspect --raw "docker://$1"
    else
        die "needs docker buildx, crane or skopeo to read the base image's digest"
    fi
}

renew_base() {
    tag="$(sed -n 's/^ARG BASE_IMAGE=\([^@]*\).*/\1/p' Dockerfile)"
    manifest "$tag" >"$scratch/manifest" || die "cannot read $tag; the Dockerfile is unchanged"
    # The index of all platforms: the digest of one of them would build on no other.
    grep -q -e 'image\.index\.v1' -e 'manifest\.list\.v2' "$scratch/manifest" ||
        die "$tag is for one platform only; the Dockerfile is unchanged"
    digest="$(sha256sum <"$scratch/manifest" | cut -d ' ' -f 1)"
    sed "s|^ARG BASE_IMAGE=.*|ARG BASE_IMAGE=$tag@sha256:$digest|" Dockerfile >"$scratch/Dockerfile"
    cp "$scratch/Dockerfile" Dockerfile
    echo "renew: base image $tag@sha256:$digest" >&2
}

# Pin requirements for one platform. No configuration of this machine's user decides what others install.
pin() {
    platform="$1"
    shift
    uv pip compile --no-config --quiet -c constraints.txt --generate-hashes --only-binary :all: \
        --python-version 3.11 --python-platform "$platform" --no-header --no-annotate --no-emit-index-url \
        ${TORCH_INDEX:+--index "$TORCH_INDEX" --index-strategy unsafe-best-match} "$@"
}

# Pin the three steps of the Dockerfile for one platform, into a folder.
pin_all() {
    mkdir "$scratch/$1"
    echo hatchling | pin "$1" -o "$scratch/$1/build.txt" -
    echo torch | pin "$1" -o "$scratch/$1/torch.txt" -
    # Not again what torch has brought: other builds of it bring other packages.
    sed -n 's/^\([a-z0-9-]*\)==.*/--no-emit-package=\1/p' "$scratch/$1/torch.txt" >"$scratch/brought"
    # shellcheck disable=SC2046
    pin "$1" -o "$scratch/$1/packages.txt" $(cat "$scratch/brought") --extra bnb --extra ray --extra kuberay pyproject.toml
}

renew_hashes() {
    if ! command -v uv >/dev/null; then
        python3 -m venv "$scratch/venv"
        "$scratch/venv/bin/pip" install --quiet --disable-pip-version-check uv
        PATH="$scratch/venv/bin:$PATH"
    fi
    pin_all x86_64-manylinux_2_28 >/dev/null
    platforms="x86_64"
    if [ -z "${TORCH_INDEX:-}" ]; then
        pin_all aarch64-manylinux_2_28 >/dev/null
        # The hashes of a version are those of all its files, so one list does for both, where both need the same packages.
        diff -r "$scratch/x86_64-manylinux_2_28" "$scratch/aarch64-manylinux_2_28" >&2 ||
            die "x86_64 and aarch64 need different packages; the lists are unchanged"
        platforms="x86_64 and aarch64"
    fi
    for list in build torch packages; do
        {
            echo "# Written by infra/image/renew.sh, for Python 3.11 on Linux, $platforms."
            cat "$scratch/x86_64-manylinux_2_28/$list.txt"
        } >"infra/image/$list.txt"
    done
    echo "renew: $(grep -c == infra/image/*.txt | tr '\n' ' ')packages with hashes" >&2
}

case "${1:-both}" in
base) renew_base ;;
hashes) renew_hashes ;;
both)
    renew_base
    renew_hashes
    ;;
*) die "usage: infra/image/renew.sh [base | hashes]" ;;
esac
