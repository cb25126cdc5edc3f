# One file, four images: gateway and scheduler (no PyTorch), worker, and, as the last target,
# all three in one container:
#   docker build -t quire . && docker run -p 8080:8080 -e QUIRE_PORT=8080 quire
# A GPU build of the worker: --build-arg TORCH_INDEX=https://pypi.org/simple
ARG PYTHON=3.11

FROM python:${PYTHON}-slim AS build
WORKDIR /src
RUN pip install --no-cache-dir build hatchling==1.33.0
COPY pyproject.toml README.md LICENSE ./
COPY quire quire
COPY gateway gateway
COPY scheduler scheduler
COPY worker worker
COPY kernels kernels
COPY models/demo models/demo
COPY models/demo-draft models/demo-draft
RUN python -m build --wheel --no-isolation --outdir /wheels

FROM python:${PYTHON}-slim AS base
ENV PIP_NO_CACHE_DIR=1 PIP_DISABLE_PIP_VERSION_CHECK=1 \
    PYTHONUNBUFFERED=1 PYTHONSAFEPATH=1 \
    HF_HOME=/home/quire/.cache/huggingface \
    QUIRE_CACHE_DIR=/tmp/quire TRITON_CACHE_DIR=/tmp/triton \
    QUIRE_HOST=0.0.0.0
RUN useradd --create-home --uid 10001 quire \
    && mkdir -p /home/quire/.cache/huggingface \
    && chown -R quire:quire /home/quire
COPY constraints.txt /constraints.txt
COPY --from=build /wheels /wheels
# What every service needs; the layer is shared by all images.
RUN pip install -c /constraints.txt "$(echo /wheels/quire-*.whl)"
ENTRYPOINT ["quire"]

FROM base AS gateway
RUN pip install -c /constraints.txt "$(echo /wheels/quire-*.whl)[gateway,otlp]"
USER quire
EXPOSE 8000
CMD ["gateway"]

FROM base AS scheduler
RUN pip install -c /constraints.txt "$(echo /wheels/quire-*.whl)[scheduler,otlp]"
USER quire
EXPOSE 50051 5557 9101
CMD ["scheduler"]

FROM base AS torch
ARG TORCH_INDEX=https://download.pytorch.org/whl/cpu
# What torch needs comes with the next layer, from PyPI.
RUN pip install -c /constraints.txt --no-deps --index-url "${TORCH_INDEX}" torch==2.13.0

FROM torch AS worker
RUN pip install -c /constraints.txt "$(echo /wheels/quire-*.whl)[worker,otlp]"
USER quire
EXPOSE 9102
CMD ["worker"]

FROM torch AS all
RUN pip install -c /constraints.txt "$(echo /wheels/quire-*.whl)[all]"
USER quire
EXPOSE 8000
HEALTHCHECK --interval=5s --timeout=3s --start-period=120s --retries=3 \
    CMD ["python", "-c", "import os, urllib.request as u; u.urlopen('http://127.0.0.1:' + os.environ.get('QUIRE_PORT', '8000') + '/ready', timeout=2)"]
CMD ["serve"]
