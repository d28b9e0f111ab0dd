# Two images. `control` runs the dispatcher, the aggregator and the command line; it has no torch. `worker` trains, and submits experiments.
#
#   docker build --target control --tag memtail-control .
#   docker build --target worker --tag memtail-worker .
#
# What pyproject.toml asks for is installed before the code is copied, so that new code installs nothing else again.
ARG PYTHON_IMAGE=python:3.13-slim

FROM ${PYTHON_IMAGE} AS base
# One uid in both images: they share volumes. It is that of the first user on most machines, who can then read what is written for them.
RUN groupadd --gid 1000 memtail \
 && useradd --uid 1000 --gid memtail --no-create-home --home-dir /var/cache/memtail memtail \
 && install --directory --owner memtail --group memtail /var/cache/memtail /run/memtail \
 && python -m venv --without-pip /opt/memtail
# Datasets and compiled code go where a volume or a tmpfs belongs. Nothing else is written, so that the root may be read-only.
ENV PATH=/opt/memtail/bin:$PATH \
    MEMTAIL_CACHE=/var/cache/memtail \
    MPLCONFIGDIR=/var/cache/memtail/matplotlib \
    PYTHONUNBUFFERED=1
WORKDIR /opt/memtail

FROM base AS requirements
COPY pyproject.toml tools/requirements.py /src/
WORKDIR /src
# Without what the one never loads: pandas, which notebooks use.
RUN python requirements.py train >train.txt \
 && python requirements.py base services >worker.txt \
 && sed '/^pandas/d' worker.txt >control.txt

FROM base AS package
COPY . /src
WORKDIR /src
RUN pip wheel --quiet --no-cache-dir --no-deps --wheel-dir /wheels .

FROM base AS control-packages
RUN apt-get update -qq \
 && apt-get install -qq --yes --no-install-recommends binutils >/dev/null \
 && rm -rf /var/lib/apt/lists/*
# What is large and never loaded here goes: parts of pyarrow and of numpy; of the Kubernetes client the asynchronous half, and all but the APIs of
# pods and Jobs; the fonts and codecs that no figure, image or page takes; what a prompt, and colours for program text, would need; tests, symbols,
# the byte code of modules that are not loaded.
# Libraries beside a package, in NAME.libs, have been rewritten to run on any Linux and do not survive `strip`.
RUN --mount=type=cache,target=/root/.cache/pip \
    --mount=type=bind,from=requirements,source=/src/control.txt,target=/tmp/control.txt \
    pip --python bin/python install --quiet --no-compile --requirement /tmp/control.txt \
 && site=$(bin/python -c 'import sysconfig; print(sysconfig.get_path("platlib"))') \
 && rm -rf "$site"/pyarrow/include "$site"/pyarrow/src "$site"/pyarrow/*flight* "$site"/pyarrow/*arrow_s3* "$site"/pyarrow/_s3fs* \
      "$site"/pyarrow/libarrow_python*.so "$site"/pyarrow/libarrow_python*.so.*.*.* \
      "$site"/pyarrow/*.pxi "$site"/numpy/f2py "$site"/numpy/_core/_simd.*.so "$site"/numpy/_core/*_tests.*.so \
      "$site"/kubernetes/aio "$site"/aiohttp "$site"/multidict "$site"/yarl "$site"/Crypto/SelfTest \
      "$site"/matplotlib/testing "$site"/matplotlib/mpl-data/sample_data \
      "$site"/matplotlib/mpl-data/images "$site"/matplotlib/mpl-data/fonts/afm "$site"/matplotlib/mpl-data/fonts/pdfcorefonts \
      "$site"/PIL/_avif.*.so "$site"/PIL/_webp.*.so "$site"/PIL/_imagingft.*.so "$site"/PIL/_imagingcms.*.so "$site"/pillow.libs/libavif* \
      "$site"/pillow.libs/libwebp* "$site"/pillow.libs/libsharpyuv* "$site"/pillow.libs/libfreetype* "$site"/pillow.libs/libharfbuzz* \
      "$site"/pillow.libs/liblcms2* "$site"/pillow.libs/libpng16* "$site"/pillow.libs/libbrotli* \
      "$site"/wcwidth "$site"/prompt_toolkit "$site"/click_repl \
 && find "$site"/kubernetes/client/api -name '*_api.py' -not -name core_v1_api.py -not -name batch_v1_api.py -not -name custom_objects_api.py -delete \
 && find "$site"/fontTools -mindepth 1 -maxdepth 1 -type d -not -name misc -exec rm -r {} + \
 && find "$site"/matplotlib/mpl-data/fonts/ttf -type f -not -name DejaVuSans.ttf -not -name "LastResort*" -delete \
 && find "$site"/pygments/lexers -name '*.py' -not -name __init__.py -not -name _mapping.py -not -name data.py -not -name python.py -delete \
 && find "$site" -name tests -type d -prune -exec rm -rf {} + \
 && find "$site" -type f \( -name '*.pyi' -o -name '*.pyx' -o -name '*.pxd' -o -name '*.h' -o -name '*.c' -o -name '*.cpp' -o -name '*.a' \) -delete \
 && find "$site" -name '*.so*' -type f -not -path '*.libs/*' -exec strip --strip-unneeded {} +

FROM base AS control
COPY --from=control-packages /opt/memtail /opt/memtail
RUN --mount=type=bind,from=package,source=/wheels,target=/wheels \
    pip --python bin/python install --quiet --no-cache-dir --no-deps /wheels/*.whl \
 && python -c 'import memtail.cli.service, memtail.scores.reader, services.aggregator.aggregator, services.aggregator.explorer, services.dispatcher.cluster' \
 && PYTHONDONTWRITEBYTECODE=1 MPLCONFIGDIR=/tmp/tried NUMBA_CACHE_DIR=/tmp/tried python -c 'import numpy as np; import memtail.report.page as page; \
    from memtail.estimators import convergence; from memtail.statistics.accumulator import PackedTrials; bits = np.arange(1, 9, dtype=np.uint64); \
    stages = convergence(PackedTrials(*3 * [bits[None]], np.uint64([15])), page.MEM_STEPS, (0.5, 0.95, 1.0), page.EDGES); \
    page.memorization_figure(stages[-1], page.EDGES); page.convergence_figure(stages, 0.7); \
    [page.thumbnail(np.zeros((side, side, 3), np.uint8)) for side in (20, 200)]' \
 && rm -r /tmp/tried
ENV NUMBA_CACHE_DIR=/var/cache/memtail/compiled-control
USER 1000:1000
WORKDIR /var/cache/memtail
CMD ["memtail", "--help"]

FROM base AS worker
# An index beside PyPI, such as https://download.pytorch.org/whl/cpu: its builds of torch count as newer than PyPI's of the same version.
ARG TORCH_INDEX=
RUN --mount=type=cache,target=/root/.cache/pip \
    --mount=type=bind,from=requirements,source=/src/train.txt,target=/tmp/train.txt \
    PIP_EXTRA_INDEX_URL=$TORCH_INDEX pip --python bin/python install --quiet --requirement /tmp/train.txt
RUN --mount=type=cache,target=/root/.cache/pip \
    --mount=type=bind,from=requirements,source=/src/worker.txt,target=/tmp/worker.txt \
    pip --python bin/python install --quiet --requirement /tmp/worker.txt
RUN --mount=type=bind,from=package,source=/wheels,target=/wheels \
    pip --python bin/python install --quiet --no-cache-dir --no-deps /wheels/*.whl
ENV NUMBA_CACHE_DIR=/var/cache/memtail/compiled-worker \
    TORCHINDUCTOR_CACHE_DIR=/var/cache/memtail/inductor \
    TRITON_CACHE_DIR=/var/cache/memtail/triton
USER 1000:1000
WORKDIR /var/cache/memtail
CMD ["python", "-m", "services.worker"]
