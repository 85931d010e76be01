# Two images of one code base:  docker build --target api .   and   docker build --target worker .
# The worker's torch: the default index has the CUDA build. For a CPU image give PyTorch's CPU index:
#   docker build --target worker --build-arg TORCH_INDEX=<PyTorch's CPU index> .
FROM python:3.11-slim AS core
ENV PYTHONUNBUFFERED=1 PYTHONDONTWRITEBYTECODE=1 PIP_NO_CACHE_DIR=1 PIP_DISABLE_PIP_VERSION_CHECK=1
RUN useradd --create-home --uid 10001 espalier && install -d -o espalier -g espalier /var/lib/espalier
WORKDIR /srv/espalier
COPY pyproject.toml constraints.txt README.md ./
COPY app app
COPY worker worker
COPY migrations migrations
ENV ESPALIER_HOME=/var/lib/espalier
VOLUME /var/lib/espalier

FROM core AS api
RUN pip install -c constraints.txt -e '.[api]'
USER espalier
EXPOSE 8000
HEALTHCHECK --interval=10s --timeout=3s --start-period=20s CMD ["python", "-c", "import urllib.request; urllib.request.urlopen('http://127.0.0.1:8000/readyz', timeout=2)"]
# SIGTERM ends streams and requests within 10 s.
CMD ["python", "-m", "app.serve", "--workers", "0"]

FROM core AS worker
ARG TORCH_INDEX=""
RUN pip install ${TORCH_INDEX:+--extra-index-url "$TORCH_INDEX"} -c constraints.txt -e '.[worker]'
USER espalier
HEALTHCHECK --interval=30s --timeout=10s --start-period=30s CMD ["python", "-m", "worker.health"]
# SIGTERM checkpoints and releases the running job within 30 s.
STOPSIGNAL SIGTERM
CMD ["python", "-m", "worker"]
