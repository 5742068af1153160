# CPU:  docker build -t gencompare .
# CUDA: docker build -t gencompare --build-arg BASE=pytorch/pytorch:2.8.0-cuda12.8-cudnn9-runtime .
# Run:  docker run --rm -v "$PWD/runs:/app/runs" gencompare model=ddpm
ARG BASE=python:3.11-slim
FROM ${BASE}

WORKDIR /app
COPY pyproject.toml constraints.txt README.md LICENSE run.py ./
COPY src src
COPY conf conf
# A base image with torch keeps its torch; constraints.txt pins what was tested on the CPU.
RUN if python -c "import torch" 2>/dev/null; then pip install --no-cache-dir -e .; \
    else pip install --no-cache-dir -c constraints.txt -e .; fi

ENV GENCOMPARE_CACHE=/app/runs/.cache
ENTRYPOINT ["python", "run.py"]
CMD ["--help"]
