# Server and edge on CPUs: docker build -f examples/deploy/cpu.Dockerfile -t wispprof .
# Packages have the versions of requirements.lock. PIP_ARGS says where pip finds them, for instance a CPU build of
# torch. Without a network: wheels in wheels/, and --build-arg PIP_ARGS="--no-index --find-links wheels".
ARG BASE=python:3.12-slim-bookworm
FROM ${BASE}
ARG PIP_ARGS=""
WORKDIR /opt/wispprof
COPY . .
RUN python3 -m venv /opt/venv \
    && /opt/venv/bin/pip install --no-cache-dir ${PIP_ARGS} -c requirements.lock . \
    && useradd --system --create-home --home-dir /srv/wispprof wispprof
USER wispprof
WORKDIR /srv/wispprof
ENV PATH=/opt/venv/bin:$PATH HF_HOME=/srv/wispprof/hub
STOPSIGNAL SIGTERM
ENTRYPOINT ["wispprof"]
CMD ["--help"]
