# The rendezvous server: ranks on 10000, /livez /readyz /metrics /address on 10001.
#   docker build -t rendezvous .
#   docker run -p 10000:10000 -v "$PWD/secret:/run/secret:ro" rendezvous --secret-file /run/secret
ARG PYTHON_IMAGE=python:3.12-slim

FROM ${PYTHON_IMAGE} AS build
WORKDIR /src
COPY pyproject.toml README.md LICENSE ./
COPY fmi_client fmi_client
COPY rendezvous_server rendezvous_server
RUN python3 -m venv /opt/server && /opt/server/bin/pip install --no-cache-dir ".[server]"

FROM ${PYTHON_IMAGE}
COPY --from=build /opt/server /opt/server
RUN useradd --system --no-create-home rendezvous
USER rendezvous
EXPOSE 10000 10001
HEALTHCHECK --interval=10s --timeout=2s \
    CMD ["/opt/server/bin/python", "-c", "import urllib.request as u; u.urlopen('http://127.0.0.1:10001/readyz', timeout=1)"]
ENTRYPOINT ["/opt/server/bin/python", "-m", "rendezvous_server", "--host", "::"]
