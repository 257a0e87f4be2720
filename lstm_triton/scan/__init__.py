"""The path through the kernels. Its entry points are `scan_layers` and `scan_projected_layers`.

Importing this package registers the operators' rules for torch.vmap.
"""

from . import vmap  # noqa: F401
from .layers import scan_layers, scan_projected_layers

__all__ = ["scan_layers", "scan_projected_layers"]
