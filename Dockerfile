# The torch wheels bring their own CUDA libraries: the host's driver and a slim Python are enough (docs/decisions/0006).
# The digest is the index of all platforms; `make renew-image` renews it, and the hashes in infra/image.
ARG BASE_IMAGE=python:3.11-slim-bookworm@sha256:0a310eeecf4e1f5a0743f9a6520c90c88d089c903ca5fd283f501e3a805f5f89

FROM ${BASE_IMAGE} AS wheel
WORKDIR /src
# Wheels only, here and below: building a source distribution would fetch its build requirements without any hash.
COPY infra/image/build.txt ./
RUN python3 -m venv /opt/build \
    && /opt/build/bin/pip install --no-cache-dir --require-hashes --only-binary :all: -r build.txt
COPY pyproject.toml README.md LICENSE ./
COPY job job
RUN /opt/build/bin/pip wheel --no-cache-dir --no-index --no-deps --no-build-isolation -w /dist .

FROM ${BASE_IMAGE}
# hadolint ignore=DL3008
RUN apt-get update \
    && apt-get install --yes --no-install-recommends ca-certificates tini \
    && rm -rf /var/lib/apt/lists/* /var/cache/apt/*.bin /var/cache/debconf/*-old /var/log/apt /var/log/dpkg.log \
    && useradd --uid 1000 --create-home abliterate \
    && install -d -o abliterate -g abliterate /workspace
ENV PATH=/opt/abliterate/bin:$PATH \
    PYTHONUNBUFFERED=1
# In the order in which they change: torch with CUDA (most of the image), the other packages, our own code. Each step sees
# its own list alone, so that a change elsewhere leaves its layer as it is. With bytecode: nobody may write it later, and every
# start would compile everything.
ARG TORCH_INDEX=
RUN --mount=type=bind,source=infra/image/torch.txt,target=/tmp/torch.txt \
    python3 -m venv /opt/abliterate \
    && pip install --no-cache-dir --require-hashes --only-binary :all: ${TORCH_INDEX:+--extra-index-url "$TORCH_INDEX"} \
        -r /tmp/torch.txt \
    && find /opt/abliterate -type d \( -name tests -o -path '*/torch/test' \) -prune -exec rm -rf {} +
RUN --mount=type=bind,source=infra/image/packages.txt,target=/tmp/packages.txt \
    pip install --no-cache-dir --require-hashes --only-binary :all: -r /tmp/packages.txt \
    && find /opt/abliterate -type d -name tests -prune -exec rm -rf {} +
RUN --mount=type=bind,from=wheel,source=/dist,target=/dist \
    pip install --no-cache-dir --no-index --no-deps /dist/*.whl \
    && pip check
COPY entrypoint.sh /entrypoint.sh

# Expandable segments: batches of many sizes would otherwise leave pieces of GPU memory that no later batch can use.
ENV ABLITERATE_WORKSPACE=/workspace \
    HF_HOME=/workspace/.cache/huggingface \
    PYTORCH_ALLOC_CONF=expandable_segments:True \
    NVIDIA_VISIBLE_DEVICES=all \
    NVIDIA_DRIVER_CAPABILITIES=compute,utility
VOLUME /workspace
STOPSIGNAL SIGTERM
# No USER: the entrypoint gives up root where the workspace is not root's, which only it can know, and puts tini in its own
# place after that.
ENTRYPOINT ["/entrypoint.sh"]

# That of job/__init__.py.
ARG VERSION=0.2.0
ARG REVISION=unknown
LABEL org.opencontainers.image.title="abliteration-job" \
    org.opencontainers.image.description="Directional ablation of language models as an unattended, preemption-proof batch job" \
    org.opencontainers.image.licenses="Apache-2.0" \
    org.opencontainers.image.version="${VERSION}" \
    org.opencontainers.image.revision="${REVISION}"
