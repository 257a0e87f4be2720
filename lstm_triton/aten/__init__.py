"""The path without kernels: PyTorch's own LSTM function, and what replaces it where it cannot be used."""
