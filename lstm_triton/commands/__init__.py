"""What `python -m lstm_triton info`, `check` and `demo` run."""
