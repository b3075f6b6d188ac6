"""`python -m llama_fn` is `llama-fn`."""

from llama_fn.cli.main import main

main()
