"""The kernels: interpreted, compiled and emulated, and what plans and compiler make of them."""
