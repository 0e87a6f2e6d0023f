# Python 3.11 with the packages of envs/requirements.lock. The checkout is not part of the image: Snakemake sends it to a
# pod, and a container mounts it.
#
#     make image                                       # with docker or podman
#     docker run --rm -v "$PWD":/work -w /work auto-quantize-model:0.1.0 snakemake --cores 2
#
# BASE is any image with Python 3.11 and pip, such as one with CUDA libraries of its own.
ARG BASE=python:3.11-slim-bookworm
FROM ${BASE}

# make and git are for `make run` and `make test`; the fonts are for figures; procps tells Snakemake what a job takes.
RUN apt-get update \
    && apt-get install --yes --no-install-recommends ca-certificates git make procps fonts-liberation \
    && rm -rf /var/lib/apt/lists/*

# PIP_ARGS takes options of pip, such as --index-url of a mirror.
ARG PIP_ARGS=""
COPY envs/requirements.lock /opt/requirements.lock
RUN python3 -m venv /opt/venv \
    && /opt/venv/bin/pip install --no-cache-dir --disable-pip-version-check ${PIP_ARGS} -r /opt/requirements.lock

ENV PATH=/opt/venv/bin:$PATH \
    PYTHONDONTWRITEBYTECODE=1
WORKDIR /work
