# Environment to run the programs on GPUs. It does not contain the code, which launch_container.sh mounts:
#
#     docker build --tag iais .
#
# NVIDIA's 24.12 is the last of these images that supports V100 (sm_70); they include CUDA, NCCL, apex and their own torch. For
# newer GPUs:  --build-arg BASE=nvcr.io/nvidia/pytorch:<year>.<month>-py3
ARG BASE=nvcr.io/nvidia/pytorch:24.12-py3
FROM ${BASE}
SHELL ["/bin/bash", "-o", "pipefail", "-c"]

# Install into an environment on top of the image's, so that its torch and numpy, which are NVIDIA's builds, and everything that
# was tested with them stay as they are.
ENV VIRTUAL_ENV=/opt/iais PATH=/opt/iais/bin:${PATH}
COPY requirements.txt constraints.txt /opt/iais-setup/
WORKDIR /opt/iais-setup
# The image pins packages with PIP_CONSTRAINT, which would contradict constraints.txt.
RUN python3 -m venv --system-site-packages --without-pip /opt/iais \
    && python -c 'from importlib.metadata import version; print("numpy==" + version("numpy"))' > pins.txt \
    && grep -vE '^(torch|numpy)==' constraints.txt >> pins.txt \
    && grep -vE '^(torch|numpy)\b' requirements.txt > packages.txt \
    && PIP_CONSTRAINT='' python -m pip install --no-cache-dir --constraint pins.txt --requirement packages.txt

COPY scripts/install_horovod.sh scripts/
RUN XDG_CACHE_HOME=/tmp/cache bash scripts/install_horovod.sh /opt/iais/bin/python \
    && horovodrun --check-build | grep -F '[X] NCCL' \
    && rm -rf /tmp/cache

# Work for any user: launch_container.sh passes the caller's uid, which has neither home nor name inside, and mounts the caller's
# repository, which git would reject as somebody else's.
RUN mkdir --mode=1777 /home/iais && git config --system --add safe.directory /src
ENV HOME=/home/iais USER=iais

WORKDIR /src
CMD ["bash"]
