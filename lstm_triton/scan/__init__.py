"""The path through the kernels: `layers` is its door. Importing it registers the operators' rules for torch.vmap."""

from . import vmap  # noqa: F401
from .layers import scan_layers, scan_projected_layers

__all__ = ["scan_layers", "scan_projected_layers"]
