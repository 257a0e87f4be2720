"""The path without kernels: PyTorch's own LSTM function, and what stands in for it where that function cannot go."""
