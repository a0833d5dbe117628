"""A program whose weights are given once, and whose other inputs come with each call."""

from collections.abc import Collection, Mapping
from typing import Any

from torch import Tensor, fx

from moec.spec import names


class Bound:
    """A graph whose weights are inputs, with these weights.

    Args:
        graph: the graph; its inputs have underscores in place of the dots of names.
        weights: tensors on `device`, by name.
        known: the names of the inputs that come with a call.
        defaults: values of inputs that a call may leave out.
        device: where the inputs of a call go, "cpu" or "cuda".
    """

    def __init__(
        self,
        graph: fx.GraphModule,
        weights: Mapping[str, Tensor],
        known: Collection[str],
        defaults: Mapping[str, Tensor],
        device: str,
    ) -> None:
        self._graph, self._defaults, self._device = graph, defaults, device
        flat = {_flat(name): each for name, each in weights.items()}
        fed = {_flat(name): name for name in known}
        taken = [str(node.target) for node in graph.graph.nodes if node.op == "placeholder"]
        self._values: list[Any] = [flat.get(name) for name in taken]
        self._fed = [(i, fed[name]) for i, name in enumerate(taken) if name not in flat]

    def __call__(self, feeds: Mapping[str, Tensor]) -> tuple[Tensor, ...]:
        """Run the graph on a call's inputs, by name.

        Raises:
            KeyError: an input is missing.
        """
        own = list(self._values)  # a list that outlives the call would keep the caches alive
        for i, name in self._fed:
            value = feeds.get(name, self._defaults.get(name))
            if value is None:
                raise KeyError(name)
            # The host needs the number of slots in use, so that it stays on the CPU.
            own[i] = value if names.is_total(name) else value.to(self._device)
        return tuple(self._graph(*own))


def _flat(name: str) -> str:
    return name.replace(".", "_")
