"""Layers are leaves of torch.fx: a graph has one node for a layer, as it has for the layers of torch.nn."""

from typing import Any

from torch import nn
from torch.fx import Proxy


class Leaf(nn.Module):
    """A module of which torch.fx.symbolic_trace makes one `call_module` node.

    torch.fx takes modules of torch.nn as leaves, by the name of their Python module, and runs all others with a `Proxy`
    for each tensor. A module of this kind answers a Proxy with its node. Its hooks run when the graph runs.
    """

    def _call_impl(self, *arguments: Any, **by_name: Any) -> Any:
        if nn.Module.__call__ is not nn.Module._wrapped_call_impl:  # torch.fx replaces __call__ while it traces
            proxy = _proxy_in(*arguments, *by_name.values())
            if proxy is not None:
                tracer: Any = proxy.tracer
                return tracer.create_proxy("call_module", tracer.path_of_module(self), arguments, by_name)
        return super()._call_impl(*arguments, **by_name)  # type: ignore[no-untyped-call]


def _proxy_in(*arguments: object) -> Proxy | None:
    """The first Proxy in some arguments. Each argument may be a tuple or a list of tensors."""
    for argument in arguments:
        for each in argument if isinstance(argument, (tuple, list)) else (argument,):
            if isinstance(each, Proxy):
                return each
    return None
