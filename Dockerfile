# Workers of a cluster: docker build -t peerlora-worker . ; see docs/cluster.md
FROM python:3.11-slim
WORKDIR /peerlora
COPY pyproject.toml README.md constraints.txt ./
COPY src src
RUN pip install --no-cache-dir -c constraints.txt ".[cluster]" && useradd --create-home worker
USER worker
ENV RAY_USAGE_STATS_ENABLED=0
# docker run --shm-size=8g --network=host peerlora-worker FIRST:6379
ENTRYPOINT ["ray", "start", "--block", "--address"]
