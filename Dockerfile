# lte in a container, for edge boards and old GPUs.
#
#   docker build -t lte:cpu .                                       CPU, amd64 and arm64
#   docker build -t lte:cuda   --build-arg TORCH_BUILD=cu130 .      Turing and newer
#   docker build -t lte:legacy --build-arg TORCH_BUILD=cu126 --build-arg TORCH_VERSION='2.14.*' .
#                                                                   Maxwell, Pascal, Volta (amd64)
#
# TORCH_BUILD names one of PyTorch's own wheel indexes. Why these two CUDA builds: the architecture table in PyTorch's
# RELEASE.md (pytorch/pytorch, pull requests 182849 and 187075) gives torch 2.12 and 2.13 kernels for
#   cu126  amd64 5.0 6.0 7.0 7.5 8.0 8.6 9.0        arm64 8.0 9.0
#   cu130  amd64 7.5 8.0 8.6 9.0 10.0 12.0          arm64 8.0 9.0 10.0 11.0 12.0
# A kernel for 6.0 also runs on 6.1 (GTX 10 series), one for 5.0 on 5.2. CUDA 13 cannot compile for anything below 7.5;
# the cu128 wheels lost 5.0 and 6.0 in torch 2.8 and 7.0 in 2.11 (issues 157517 and 172352). cu126 goes on until torch
# 2.14, the last release for the old GPUs, and ends with 2.15 (issue 190385), which pyproject.toml refuses.
# Jetson and other builds of torch: set TORCH_INDEX, TORCH_VERSION and BASE; see docs/docker.md.

ARG BASE=python:3.11-slim-bookworm

# --- the list of dependencies alone, so that a new version in pyproject.toml does not reinstall gigabytes -------------
FROM ${BASE} AS requirements

WORKDIR /src
COPY pyproject.toml ./
RUN python3 -m venv venv \
    && venv/bin/pip install --no-cache-dir "tomli>=2.0" \
    && venv/bin/python -c \
        "import tomli; print(*tomli.load(open('pyproject.toml', 'rb'))['project']['dependencies'], sep='\n')" \
        > requirements.txt

# --- torch and the other dependencies: large and seldom changed, so they are a layer of their own ---------------------
FROM ${BASE} AS dependencies

ARG TORCH_BUILD=cpu
ARG TORCH_INDEX=https://download.pytorch.org/whl/${TORCH_BUILD}
ARG TORCH_VERSION=2.13.*

ENV PIP_NO_CACHE_DIR=1 \
    PIP_DISABLE_PIP_VERSION_CHECK=1 \
    PATH=/opt/venv/bin:$PATH

# torch from that one index, and without what it depends on: were PyPI asked too, its torch (another CUDA) could win.
RUN python3 -m venv /opt/venv \
    && pip install --index-url "${TORCH_INDEX}" --no-deps "torch==${TORCH_VERSION}"

# What torch and lte depend on. With torch named again, pip stops if pyproject.toml refuses its version; without, it
# would fetch another.
COPY --from=requirements /src/requirements.txt /tmp/requirements.txt
RUN pip install --extra-index-url "${TORCH_INDEX}" "torch==${TORCH_VERSION}" -r /tmp/requirements.txt

# --- lte itself, set aside under /out: a few hundred kilobytes --------------------------------------------------------
FROM dependencies AS application

WORKDIR /src
COPY pyproject.toml README.md LICENSE ./
COPY profiles/ profiles/
COPY simulate/ simulate/
COPY ltecli/ ltecli/
RUN pip install --no-deps --root /out .

# --- the image: an interpreter, two copied folders, a user ------------------------------------------------------------
FROM ${BASE}

LABEL org.opencontainers.image.title="lte" \
      org.opencontainers.image.description="Pre-train neural networks on small, old or far-apart GPUs" \
      org.opencontainers.image.licenses="Apache-2.0"

# Any uid may write to /work, so `docker run --user` works without a mount as well; the sticky bit keeps users apart.
# Ubuntu bases have a user 1000 of their own, hence --non-unique.
RUN useradd --non-unique --uid 1000 --user-group --home-dir /tmp --no-create-home --shell /usr/sbin/nologin lte \
    && mkdir /work \
    && chown lte:lte /work \
    && chmod 1777 /work

COPY --from=dependencies /opt/venv /opt/venv
COPY --from=application /out/opt/venv /opt/venv

# HOME and USER: under --user there is no passwd entry, and libraries that cache files ask for both.
ENV PATH=/opt/venv/bin:$PATH \
    PYTHONUNBUFFERED=1 \
    HOME=/tmp \
    USER=lte

USER 1000:1000
WORKDIR /work
VOLUME /work
ENTRYPOINT ["lte"]
CMD ["--help"]
