# syntax=docker/dockerfile:1
# dist_int8 as a command, without a compiler in the image.
#
#   docker build -t dist-int8 .
#   docker run --rm dist-int8 doctor
#   docker run --rm -v /models:/models dist-int8 generate --model /models/llama --device cpu --prompt "Hello"
#
# With CUDA, the kernels compiled for the architectures in CUDAARCHS. RUNTIME is the release of BASE,
# since the library needs its C library or a newer one. The host needs the NVIDIA container toolkit.
#
#   docker build -t dist-int8:cuda --build-arg CUDAARCHS="80-real;90a-real" \
#       --build-arg BASE=nvidia/cuda:13.0.1-devel-ubuntu24.04 --build-arg RUNTIME=ubuntu:24.04 \
#       --build-arg TORCH_INDEX=https://download.pytorch.org/whl/cu130 .
#   docker run --rm --gpus all --ipc=host dist-int8:cuda doctor

ARG BASE=debian:12-slim
ARG RUNTIME=debian:12-slim

FROM ${BASE} AS wheel
ARG CUDAARCHS=""
ARG TORCH_INDEX=https://download.pytorch.org/whl/cpu
ENV PIP_EXTRA_INDEX_URL=${TORCH_INDEX}
RUN apt-get update \
    && DEBIAN_FRONTEND=noninteractive apt-get install --yes --no-install-recommends \
        g++ make python3 python3-venv \
    && rm -rf /var/lib/apt/lists/*
WORKDIR /src
COPY Makefile CMakeLists.txt pyproject.toml README.md LICENSE ./
COPY csrc csrc
COPY configs configs
COPY dist_int8 dist_int8
RUN CUDAARCHS="${CUDAARCHS}" make wheel

FROM ${RUNTIME}
ARG TORCH_INDEX=https://download.pytorch.org/whl/cpu
RUN apt-get update \
    && DEBIAN_FRONTEND=noninteractive apt-get install --yes --no-install-recommends \
        python3 python3-venv \
    && rm -rf /var/lib/apt/lists/*
RUN --mount=type=bind,from=wheel,source=/src/dist,target=/dist \
    python3 -m venv /opt/dist_int8 \
    && /opt/dist_int8/bin/pip install --no-cache-dir --extra-index-url "${TORCH_INDEX}" /dist/*.whl
ENV PATH=/opt/dist_int8/bin:${PATH}
RUN useradd --create-home user
USER user
WORKDIR /home/user
ENTRYPOINT ["dist-int8"]
CMD ["--help"]
