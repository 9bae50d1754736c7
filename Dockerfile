# The rendezvous server: ranks on 10000, /livez /readyz /metrics /address on 10001.
#   docker build -t cosmic-server .
#   docker run --read-only -p 10000:10000 -v "$PWD/secret:/run/secret:ro" cosmic-server --secret-file /run/secret
ARG PYTHON_IMAGE=python:3.12-slim

FROM ${PYTHON_IMAGE} AS build
# "redis" for several servers: docs/servers.md.
ARG EXTRA=server
WORKDIR /src
RUN python3 -m venv /opt/pip && python3 -m venv --without-pip /opt/server
COPY pyproject.toml README.md LICENSE ./
COPY fmi_client fmi_client
COPY rendezvous_server rendezvous_server
# Modules are compiled here: the server's root file system may be read-only.
RUN /opt/pip/bin/pip --python /opt/server/bin/python install --no-cache-dir ".[${EXTRA}]"

FROM ${PYTHON_IMAGE}
COPY --from=build /opt/server /opt/server
# By number: Kubernetes can tell that it is not root, and no base image has to know the name.
USER 10000:10000
EXPOSE 10000 10001
HEALTHCHECK --interval=10s --timeout=3s --start-period=5s \
    CMD ["/opt/server/bin/python", "-c", "import urllib.request as u; u.urlopen('http://127.0.0.1:10001/readyz', timeout=2)"]
ENTRYPOINT ["/opt/server/bin/python", "-m", "rendezvous_server", "--host", "::"]
