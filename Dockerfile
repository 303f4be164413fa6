# One file for GPU and CPU: torch from the package index brings CUDA with it on x86-64 Linux; the driver comes from the host
# (docker run --gpus all). Without a GPU the same image runs on the CPU with the pocket weights.
FROM python:3.11-slim-bookworm

RUN apt-get update \
    && apt-get install --yes --no-install-recommends make \
    && rm -rf /var/lib/apt/lists/* \
    && useradd --create-home upscaler \
    && install --directory --owner upscaler /app /data

USER upscaler
WORKDIR /app
COPY --chown=upscaler pyproject.toml constraints.txt Makefile README.md ./
COPY --chown=upscaler server ./server
COPY --chown=upscaler pipelines ./pipelines
COPY --chown=upscaler weights ./weights
RUN make install

ENV UPSCALER_DATA=/data UPSCALER_HOST=0.0.0.0 PATH=/app/.venv/bin:$PATH
VOLUME /data
EXPOSE 8000 8443
HEALTHCHECK --interval=10s --start-period=120s \
    CMD ["python", "-c", "import urllib.request; urllib.request.urlopen('http://127.0.0.1:8000/ready', timeout=5)"]
# Listening beyond loopback needs a key: docker run -e UPSCALER_API_KEYS=...
CMD ["creative-upscaler", "serve"]
