# docker build -t llama_fn .
# docker run --rm llama_fn                                           a story from the embedded model
# docker run --rm -v ./weights:/weights llama_fn generate "Hello" --model /weights/llama-2-7b
# docker run --rm --gpus all ...                                     on the GPU, which "--device auto" takes
FROM python:3.11-slim

# What compiles a step of a large model.
RUN apt-get update && apt-get install -y --no-install-recommends g++ && rm -rf /var/lib/apt/lists/*

# The pinned set first: it changes less often than the code, and is gigabytes with CUDA in it.
WORKDIR /app
COPY requirements.txt ./
RUN python -m venv /venv && /venv/bin/pip install --no-cache-dir -r requirements.txt

COPY pyproject.toml README.md LICENSE llama_fn_script.py ./
COPY llama_fn ./llama_fn
RUN /venv/bin/pip install --no-cache-dir --no-deps .

RUN useradd --create-home --uid 1000 teller && mkdir /weights && chown teller /weights
USER teller
WORKDIR /home/teller
VOLUME /weights
ENV PATH=/venv/bin:$PATH PYTHONUNBUFFERED=1
ENTRYPOINT ["llama-fn"]
CMD ["generate", "Once upon a time"]
