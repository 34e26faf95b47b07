# Server on NVIDIA GPUs with vLLM as engine: docker build -f examples/deploy/cuda.Dockerfile -t wispprof-cuda .
# The base image holds vLLM with its torch and CUDA libraries; wispprof is installed beside them.
ARG BASE=vllm/vllm-openai:v0.32.0
FROM ${BASE}
ARG PIP_ARGS=""
WORKDIR /opt/wispprof
COPY . .
RUN python3 -m pip install --no-cache-dir ${PIP_ARGS} . \
    && useradd --system --create-home --home-dir /srv/wispprof wispprof
USER wispprof
WORKDIR /srv/wispprof
ENV HF_HOME=/srv/wispprof/hub
STOPSIGNAL SIGTERM
ENTRYPOINT ["wispprof"]
CMD ["serve", "--engine", "vllm"]
