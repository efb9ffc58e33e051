# syntax=docker/dockerfile:1
# ossia's server. Build: docker build -t ossia .    Run: see compose.yaml and docs/deploying.md.
FROM python:3.12-slim-bookworm AS build
RUN apt-get update && apt-get install --yes --no-install-recommends g++ && rm -rf /var/lib/apt/lists/*
COPY . /source
# All instruction sets are compiled and the best is chosen when the server starts, so one image fits every machine.
RUN python -m venv /opt/ossia && /opt/ossia/bin/pip install --no-cache-dir '/source[mcp,postgres,data]'

FROM python:3.12-slim-bookworm
# bubblewrap is the strongest sandbox of the python tool; it needs user namespaces, which many container runtimes forbid.
# Without them the tool proves Landlock, or stays off and says so.
RUN apt-get update && apt-get install --yes --no-install-recommends bubblewrap && rm -rf /var/lib/apt/lists/* \
    && useradd --uid 10001 --no-create-home ossia \
    # A new volume takes the owner of the folder that it covers.
    && mkdir /data /models && chown ossia:ossia /data /models
COPY --from=build /opt/ossia /opt/ossia
ENV PATH=/opt/ossia/bin:$PATH HOME=/data XDG_DATA_HOME=/data HF_HOME=/models
USER ossia
WORKDIR /data
VOLUME ["/data", "/models"]
EXPOSE 8000
HEALTHCHECK --interval=15s --timeout=5s --start-period=60s \
    CMD ["python", "-c", "import urllib.request; urllib.request.urlopen('http://127.0.0.1:8000/ready', timeout=4)"]
ENTRYPOINT ["ossia"]
CMD ["serve", "--host", "0.0.0.0", "--key-file", "/data/keys"]
