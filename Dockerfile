# The torch wheels bring their own CUDA libraries: the host's driver and a slim Python are enough (docs/decisions/0006).
ARG BASE_IMAGE=python:3.11-slim-bookworm

FROM ${BASE_IMAGE} AS wheel
WORKDIR /src
RUN python3 -m venv /opt/build
COPY pyproject.toml constraints.txt ./
RUN /opt/build/bin/pip install --no-cache-dir -c constraints.txt hatchling \
    && mkdir /dist \
    && cp constraints.txt /dist/ \
    && python3 -c 'import tomllib; project = tomllib.load(open("pyproject.toml", "rb"))["project"]; \
        print(*project["dependencies"], *project["optional-dependencies"]["bnb"], sep="\n")' \
        >/dist/requirements.txt
COPY README.md LICENSE ./
COPY job job
RUN /opt/build/bin/pip wheel --no-cache-dir --no-deps --no-build-isolation -w /dist .

FROM ${BASE_IMAGE}
# hadolint ignore=DL3008
RUN apt-get update \
    && apt-get install --yes --no-install-recommends ca-certificates tini \
    && rm -rf /var/lib/apt/lists/* /var/cache/apt/*.bin /var/cache/debconf/*-old /var/log/apt /var/log/dpkg.log \
    && useradd --uid 1000 --create-home abliterate \
    && install -d -o abliterate -g abliterate /workspace
ENV PATH=/opt/abliterate/bin:$PATH \
    PYTHONUNBUFFERED=1
# In the order in which they change: torch with CUDA (most of the image), the other packages, our own code. With bytecode:
# nobody may write it later, and every start would compile everything.
ARG TORCH_INDEX=
RUN --mount=type=bind,from=wheel,source=/dist,target=/dist \
    python3 -m venv /opt/abliterate \
    && pip install --no-cache-dir -c /dist/constraints.txt ${TORCH_INDEX:+--index-url "$TORCH_INDEX"} torch \
    && find /opt/abliterate -type d \( -name tests -o -path '*/torch/test' \) -prune -exec rm -rf {} +
RUN --mount=type=bind,from=wheel,source=/dist,target=/dist \
    pip install --no-cache-dir -c /dist/constraints.txt -r /dist/requirements.txt \
    && find /opt/abliterate -type d -name tests -prune -exec rm -rf {} +
RUN --mount=type=bind,from=wheel,source=/dist,target=/dist \
    pip install --no-cache-dir --no-deps /dist/*.whl
COPY entrypoint.sh /entrypoint.sh

ENV ABLITERATE_WORKSPACE=/workspace \
    HF_HOME=/workspace/.cache/huggingface \
    NVIDIA_VISIBLE_DEVICES=all \
    NVIDIA_DRIVER_CAPABILITIES=compute,utility
VOLUME /workspace
STOPSIGNAL SIGTERM
# No USER: the entrypoint gives up root where the workspace is not root's, which only it can know.
ENTRYPOINT ["tini", "--", "/entrypoint.sh"]

ARG VERSION=unreleased
ARG REVISION=unknown
LABEL org.opencontainers.image.title="abliteration-job" \
    org.opencontainers.image.description="Directional ablation of language models as an unattended, preemption-proof batch job" \
    org.opencontainers.image.licenses="Apache-2.0" \
    org.opencontainers.image.version="${VERSION}" \
    org.opencontainers.image.revision="${REVISION}"
