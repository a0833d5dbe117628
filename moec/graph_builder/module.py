"""The module that holds a graph."""

from collections.abc import Callable
from typing import Any

from torch import fx, nn


def module_of(root: nn.Module, graph: fx.Graph) -> fx.GraphModule:
    """The module of `graph`, whose weights are in `root`.

    fx would copy each weight from `root` by its name, which costs seconds for 45,000 of them.
    """
    module = MoecGraph(nn.Module(), fx.Graph(), "MoecGraph")
    module._modules.update(root._modules)
    module._parameters.update(root._parameters)
    module.graph = graph
    return module


class MoecGraph(fx.GraphModule):
    """A graph module that generates its Python code when somebody first calls or prints it.

    fx generates and compiles it after each edit. Most exporters read the nodes alone, and the code
    of a decoder with thousands of weights takes seconds. fx makes a class for each graph, and code
    that is up to date is its `forward`.
    """

    def recompile(self) -> None:  # type: ignore[override]
        """Note that the graph was edited."""
        if "forward" in vars(type(self)):
            del type(self).forward

    @property
    def forward(self) -> Callable[..., Any]:  # type: ignore[override]
        """The function that the generated code defines."""
        self._generate()
        return self.forward  # that of the class of this graph

    @property
    def code(self) -> str:
        """The generated code."""
        self._generate()
        return super().code

    def __str__(self) -> str:
        self._generate()
        return super().__str__()

    def _generate(self) -> None:
        if "forward" not in vars(type(self)):
            super().recompile()
