# The server as an image, from one file:
#   docker build --tag creative-upscaler .                    for GPUs; CUDA comes with torch, the driver is the host's
#   docker build --tag creative-upscaler:cpu --target cpu --build-arg PIP_EXTRA_INDEX_URL=ADDRESS .
# ADDRESS is the index of torch's CPU builds, which PyTorch's installation page names. pip reads the arguments by itself;
# PIP_INDEX_URL is for a mirror. Both stay readable in the image's history: no passwords in them.
ARG PYTHON_IMAGE=python:3.11-slim-bookworm
FROM ${PYTHON_IMAGE} AS installed

RUN apt-get update \
    && apt-get install --yes --no-install-recommends make \
    && rm -rf /var/lib/apt/lists/* \
    && useradd --uid 10001 --create-home upscaler \
    && install --directory --owner upscaler --mode 0700 /data

ARG PIP_INDEX_URL
ARG PIP_EXTRA_INDEX_URL
ENV PIP_NO_CACHE_DIR=1
WORKDIR /app
# Libraries lie in a layer below the code, so that a change of the code does not install torch again.
COPY pyproject.toml constraints.txt Makefile ./
RUN make dependencies
COPY README.md ./
COPY server ./server
COPY pipelines ./pipelines
COPY weights ./weights
RUN make install

ENV UPSCALER_DATA=/data UPSCALER_HOST=0.0.0.0 PATH=/app/.venv/bin:$PATH
VOLUME /data
EXPOSE 8000 8443
# A number, so that Kubernetes can tell that it is not root.
USER 10001
HEALTHCHECK --interval=10s --start-period=600s CMD ["python", "-m", "server.healthcheck"]
# Listening beyond loopback needs a key: docker run -e UPSCALER_API_KEYS=...
CMD ["creative-upscaler", "serve"]

FROM installed AS cpu
RUN python -c "import sys, torch; torch.version.cuda and sys.exit('this torch brings CUDA: give PIP_EXTRA_INDEX_URL')"

FROM installed AS cuda
RUN python -c "import sys, torch; torch.version.cuda or sys.exit('this torch has no CUDA: leave PIP_EXTRA_INDEX_URL away')"
ENV NVIDIA_DRIVER_CAPABILITIES=compute,utility
