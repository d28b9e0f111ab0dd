# Two images. `control` runs the dispatcher, the aggregator, the explorer and the command line; it has no torch. `worker` trains, and submits experiments.
#
#   docker build --target control --tag memtail-control .
#   docker build --target worker --tag memtail-worker .
#
# Requirements are installed before the code is copied, so that a change of the code does not install them again. Each image has only the
# packages that it needs.
ARG PYTHON_IMAGE=python:3.13-slim

FROM ${PYTHON_IMAGE} AS base
# One uid in both images, since they share volumes. 1000 is the first user of most machines, who can then read files on bind mounts.
RUN groupadd --gid 1000 memtail \
 && useradd --uid 1000 --gid memtail --no-create-home --home-dir /var/cache/memtail memtail \
 && for name in worker dispatcher aggregator explorer client redis minio grafana; do \
      install --directory --owner memtail --group memtail "/run/services/$name" || exit 1; done \
 && install --directory --owner memtail --group memtail /var/cache/memtail /run/memtail \
 && python -m venv /opt/memtail
# Datasets and compiled code are written to the cache, a volume or a tmpfs. Nothing else is written, so the root file system may be
# read-only. The services are not part of the distribution; Python finds them in app.
ENV PATH=/opt/memtail/bin:$PATH \
    PYTHONPATH=/opt/memtail/app \
    MEMTAIL_CACHE=/var/cache/memtail \
    MPLCONFIGDIR=/var/cache/memtail/matplotlib \
    PYTHONUNBUFFERED=1
WORKDIR /opt/memtail

FROM base AS requirements
COPY pyproject.toml constraints.txt /src/
COPY tools/install.sh tools/requirements.py /src/tools/
WORKDIR /src
RUN python tools/requirements.py build >build.txt \
 && python tools/requirements.py base services >control.txt \
 && python tools/requirements.py base services train >worker.txt \
 && python tools/requirements.py worker-image >init.txt

FROM requirements AS package
RUN --mount=type=cache,target=/root/.cache/pip \
    tools/install.sh /opt/memtail <build.txt
COPY . /src
RUN pip wheel --quiet --no-deps --no-build-isolation --wheel-dir /wheels . \
 && install --directory /app \
 && cp -r services /app \
 && python -m compileall -q /app

FROM base AS control-packages
RUN --mount=type=cache,target=/root/.cache/pip \
    --mount=type=bind,from=requirements,source=/src/control.txt,target=/src/control.txt \
    --mount=type=bind,from=requirements,source=/src/constraints.txt,target=/src/constraints.txt \
    --mount=type=bind,from=requirements,source=/src/tools/install.sh,target=/src/tools/install.sh \
    /src/tools/install.sh /opt/memtail </src/control.txt

FROM control-packages AS worker-packages
# URL of an index with other builds of torch, such as https://download.pytorch.org/whl/cpu; see tools/install.sh.
ARG TORCH_INDEX=
RUN --mount=type=cache,target=/root/.cache/pip \
    --mount=type=bind,from=requirements,source=/src/worker.txt,target=/src/worker.txt \
    --mount=type=bind,from=requirements,source=/src/constraints.txt,target=/src/constraints.txt \
    --mount=type=bind,from=requirements,source=/src/tools/install.sh,target=/src/tools/install.sh \
    /src/tools/install.sh /opt/memtail </src/worker.txt

FROM control-packages AS control
RUN --mount=type=bind,from=package,source=/wheels,target=/wheels \
    pip install --quiet --no-cache-dir --no-deps /wheels/*.whl
COPY --from=package /app app
ENV NUMBA_CACHE_DIR=/var/cache/memtail/compiled-control
USER 1000:1000
WORKDIR /var/cache/memtail
CMD ["memtail", "--help"]

FROM worker-packages AS worker
RUN --mount=type=bind,from=requirements,source=/src/init.txt,target=/src/init.txt \
    --mount=type=bind,from=requirements,source=/src/constraints.txt,target=/src/constraints.txt \
    --mount=type=bind,from=requirements,source=/src/tools/install.sh,target=/src/tools/install.sh \
    /src/tools/install.sh /opt/memtail </src/init.txt
RUN --mount=type=bind,from=package,source=/wheels,target=/wheels \
    pip install --quiet --no-cache-dir --no-deps /wheels/*.whl
COPY --from=package /app app
ENV NUMBA_CACHE_DIR=/var/cache/memtail/compiled-worker \
    TORCHINDUCTOR_CACHE_DIR=/var/cache/memtail/inductor \
    TRITON_CACHE_DIR=/var/cache/memtail/triton
USER 1000:1000
WORKDIR /var/cache/memtail
# Models may fork: the first process reaps their orphans. It passes signals to the worker only.
ENTRYPOINT ["dumb-init", "--single-child", "--"]
CMD ["python", "-m", "services.worker"]
