# The Lambda functions init, infer, summarize, blame and check; which one, says the command.
#   docker build -f deploy/worker.Dockerfile -t cosmic-worker .
#   docker build -f deploy/worker.Dockerfile -t cosmic-worker:onnx --build-arg ENGINE=onnx .
# For ranks that come with tls://, 18 MB more: --build-arg EXTRAS=aws,tls
# Built on AWS's own image it runs from the venv below, as it does on any other with Python.
ARG PYTHON_IMAGE=public.ecr.aws/lambda/python:3.13

FROM ${PYTHON_IMAGE} AS build
# What predicts: torch, onnx or openvino.
ARG ENGINE=torch
ARG EXTRAS=aws
ARG TORCH=torch==2.13.0
ARG TORCH_INDEX=https://download.pytorch.org/whl/cpu
WORKDIR /src
RUN python3 -m venv /opt/pip && python3 -m venv --without-pip /opt/worker
# Alone in its layer, which outlives changes of the code. PyPI's own torch would bring CUDA. Of its
# programs torch needs one; headers and tests it does not need at all (200 MB).
RUN [ ${ENGINE} != torch ] || { /opt/pip/bin/pip --python /opt/worker/bin/python install \
        --no-cache-dir --no-deps --index-url ${TORCH_INDEX} ${TORCH} \
    && cd /opt/worker/lib/python3*/site-packages/torch && mv bin/torch_shm_manager . \
    && rm -r bin include test && mkdir bin && mv torch_shm_manager bin/; }
COPY pyproject.toml README.md LICENSE ./
COPY fmi_client fmi_client
COPY lambda_worker lambda_worker
# Modules are compiled here: Lambda's root file system is read-only, each start would do it again.
RUN case ${ENGINE} in \
        torch) extra=worker ;; \
        onnx|openvino) extra=${ENGINE} ;; \
        *) echo "ENGINE=${ENGINE}: give torch, onnx or openvino" >&2; exit 2 ;; \
    esac; \
    /opt/pip/bin/pip --python /opt/worker/bin/python install --no-cache-dir ".[${extra},${EXTRAS}]"

FROM ${PYTHON_IMAGE}
COPY --from=build /opt/worker /opt/worker
COPY deploy/worker-entrypoint /usr/local/bin/
USER 10000:10000
# Lambda's root file system is read-only but for /tmp.
ENV HOME=/tmp
WORKDIR /tmp
ENTRYPOINT ["/usr/local/bin/worker-entrypoint"]
CMD ["lambda_worker.handlers.infer"]
