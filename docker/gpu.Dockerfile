# TimeSformer on NVIDIA's GPUs. The host has the driver and NVIDIA's container toolkit; CUDA and cuDNN
# come with JAX. From the repository:
#
#     docker build -f docker/gpu.Dockerfile -t timesformer_jax:gpu .
#     docker run --rm --gpus=all -v "$PWD:/work" --user "$(id -u)" timesformer_jax:gpu \
#         train --config=finetune --workdir=runs/mine --config.data.directory=data/mine
#
# --build-arg EXTRAS=data,hub,cuda12 is for drivers older than CUDA 13's.
ARG BASE=python:3.12-slim
FROM ${BASE}

# Whoever runs it with --user=NUMBER writes to /home/timesformer too: caches, a token of the Hub.
RUN useradd --create-home --uid 1000 timesformer && chmod 777 /home/timesformer
ENV HOME=/home/timesformer PATH=/opt/venv/bin:$PATH PYTHONUNBUFFERED=1 \
    NVIDIA_VISIBLE_DEVICES=all NVIDIA_DRIVER_CAPABILITIES=compute,utility

# What the package needs is a layer of its own, which stays when only the code changes.
ARG EXTRAS=data,hub,cuda13
WORKDIR /src
COPY setup.py pyproject.toml constraints.txt README.md CITATION.cff LICENSE ./
COPY configs/ configs/
COPY timesformer_jax/__init__.py timesformer_jax/
RUN python3 -m venv /opt/venv \
    && pip install --no-cache-dir --constraint constraints.txt ".[${EXTRAS}]"
COPY timesformer_jax/ timesformer_jax/
RUN pip install --no-cache-dir --no-deps --force-reinstall . && rm -rf build ./*.egg-info

USER 1000
WORKDIR /work
ENTRYPOINT ["timesformer"]
CMD ["--help"]
