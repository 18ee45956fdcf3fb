# The torch wheels bring their own CUDA libraries: the host's driver and this slim image are enough.
ARG BASE_IMAGE=python:3.11-slim-bookworm

FROM ${BASE_IMAGE} AS build
COPY pyproject.toml constraints.txt README.md LICENSE /src/
COPY job /src/job
RUN python3 -m venv /opt/abliterate \
    && /opt/abliterate/bin/pip install --no-cache-dir --no-compile -c /src/constraints.txt /src

FROM ${BASE_IMAGE}
# hadolint ignore=DL3008
RUN apt-get update \
    && apt-get install --yes --no-install-recommends ca-certificates tini \
    && rm -rf /var/lib/apt/lists/*
COPY --from=build /opt/abliterate /opt/abliterate
COPY entrypoint.sh /entrypoint.sh
ENV PATH=/opt/abliterate/bin:$PATH \
    PYTHONUNBUFFERED=1 \
    ABLITERATE_WORKSPACE=/workspace \
    HF_HOME=/workspace/.cache/huggingface \
    NVIDIA_VISIBLE_DEVICES=all \
    NVIDIA_DRIVER_CAPABILITIES=compute,utility
VOLUME /workspace
STOPSIGNAL SIGTERM
ENTRYPOINT ["tini", "--", "/entrypoint.sh"]
