# What the programs run in on GPUs; the code is not inside, launch_container.sh mounts it:
#
#     docker build --tag iais .
#
# NVIDIA's 24.12 is the last of these images for V100 (sm_70); they carry CUDA, NCCL, apex and a torch of their own. For newer
# GPUs:  --build-arg BASE=nvcr.io/nvidia/pytorch:<year>.<month>-py3
ARG BASE=nvcr.io/nvidia/pytorch:24.12-py3
FROM ${BASE}
SHELL ["/bin/bash", "-o", "pipefail", "-c"]

# In an environment on top of the image's: so its torch and numpy, which are builds of NVIDIA's, and what they were tested with
# stay as they are.
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

# For any user: launch_container.sh starts the container with the caller's uid, which has no home and no name in it, and with
# the caller's repository, which git takes for somebody else's.
RUN mkdir --mode=1777 /home/iais && git config --system --add safe.directory /src
ENV HOME=/home/iais USER=iais

WORKDIR /src
CMD ["bash"]
