"""The mathematics of LLaMA 2, one concept a file, standing on `shapes`, `tree`, `random` and `config` alone."""
