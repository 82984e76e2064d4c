# Targets: `server` (the default), and `quantizer`, which quantizes a text model and exits.
# The base is any Debian 12: python3 is installed if it is not there.
ARG BASE_IMAGE=debian:bookworm-20250520-slim

FROM ${BASE_IMAGE} AS python
RUN apt-get update \
    && apt-get install -y --no-install-recommends ca-certificates python3 \
    && rm -rf /var/lib/apt/lists/*

FROM python AS packages
RUN apt-get update && apt-get install -y --no-install-recommends python3-venv
RUN python3 -m venv /opt/venv
ENV PATH=/opt/venv/bin:$PATH PIP_NO_CACHE_DIR=1 PIP_DISABLE_PIP_VERSION_CHECK=1
# torch first and alone, as the index of a CPU build may have other packages, too
ARG TORCH_INDEX=""
COPY requirements.txt /build/
RUN pip install --no-compile ${TORCH_INDEX:+--extra-index-url "$TORCH_INDEX"} \
        "$(grep '^torch==' /build/requirements.txt)" \
    && pip install --no-compile -r /build/requirements.txt
COPY pyproject.toml README.md LICENSE /build/
COPY omnispeech /build/omnispeech
COPY deploy/as-owner deploy/answers /app/bin/
COPY startup.py model_worker.py quantize.py quantize_llm_awq.py quantize_model_once.py /app/
COPY examples /app/examples
# Headers, programs that test torch, and pip are not for running. Everything is compiled once and
# never again: compiled files that go by time are stale when a layer has changed the times.
RUN pip install --no-compile --no-deps /build \
    && pip uninstall --yes --quiet pip \
    && cd /opt/venv/lib/python3*/site-packages \
    && rm -rf torch/include torch/test \
    && find torch/bin -type f ! -name torch_shm_manager -delete \
    && python3 -m compileall -q -f -j 0 --invalidation-mode unchecked-hash \
        -x '/py312_intrinsics\.py$' /opt/venv/lib \
    && chmod -R a+rX /app /opt/venv

FROM python AS runtime
COPY --from=packages /opt/venv /opt/venv
COPY --from=packages /app /app
# Any user may run it: nothing but the models directory and the temporary one is written.
# Threads that wait for each other sleep: where a container has fewer processors than it sees, those
# that spin take the time of those that work.
ENV PATH=/opt/venv/bin:/app/bin:$PATH \
    HOME=/tmp LOGNAME=omnispeech LANG=C.UTF-8 \
    PYTHONDONTWRITEBYTECODE=1 PYTHONUNBUFFERED=1 OMP_WAIT_POLICY=PASSIVE \
    NVIDIA_VISIBLE_DEVICES=all NVIDIA_DRIVER_CAPABILITIES=compute,utility
WORKDIR /app
ENTRYPOINT ["as-owner"]

FROM runtime AS quantizer
ENTRYPOINT ["as-owner", "python3", "/app/quantize.py"]

FROM runtime AS server
ENV OMNISPEECH_HOST=0.0.0.0 OMNISPEECH_PORT=8000
EXPOSE 8000
# the first start downloads 22 GB before anything listens
HEALTHCHECK --interval=30s --timeout=5s --start-period=2h --retries=3 \
    CMD ["answers", "/health"]
CMD ["python3", "/app/startup.py"]
