"""What PyTorch and other libraries do with the module."""
