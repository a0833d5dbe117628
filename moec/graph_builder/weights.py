"""The weights of a graph: a node gives one tensor, or a list of those of a layer's experts.

A checkpoint may keep each expert in tensors of its own. A model has tens of thousands of these, and
as many scales: a node and a module for each took most of a build's time and memory. So one node
stands for a list of them, such as the `gate_up` of all experts of a layer. Its `meta["type"]` is a
tuple of types, and `meta["parts"]` has the names of the tensors.
"""

from collections.abc import Mapping

import torch
from torch import Tensor, fx, nn

from moec.graph_builder.types import TensorType

#: the targets of nodes, and the names of weights, are paths from the root module
Path = str


class Lists(nn.Module):
    """Weights in lists: attribute NAME is the list of the tensors of list NAME.

    The names of the weights may have dots, so that a weight has the name that a module for each
    expert would give it.
    """

    def __init__(self) -> None:
        super().__init__()
        self.lists: dict[str, tuple[str, ...]] = {}

    def __getattr__(self, name: str) -> list[Tensor]:  # type: ignore[override]
        if name not in vars(self).get("lists", ()):
            raise AttributeError(name)
        return [self._parameters[each] for each in self.lists[name]]  # type: ignore[misc]


def add_weight(root: nn.Module, graph: fx.Graph, name: Path, kind: TensorType) -> fx.Node:
    """Add weight `name`, on the meta device, to `root`, and a node for it to `graph`."""
    owner, _, leaf = name.rpartition(".")
    _submodule(root, owner)._parameters[leaf] = _empty(kind)
    return _node(graph, name, kind, (name,))


def add_list(
    root: nn.Module, graph: fx.Graph, target: Path, kinds: Mapping[Path, TensorType]
) -> fx.Node:
    """Add weights, on the meta device, to `root`, and a node for the list of them to `graph`.

    `kinds` has the type of each by name. `target` says where the list is: "PATH.NAME", and the
    names of the weights start with PATH.
    """
    owner, _, name = target.rpartition(".")
    lists = _submodule(root, owner, Lists)
    assert isinstance(lists, Lists)
    lists.lists[name] = tuple(each[len(owner) + 1 :] for each in kinds)
    for key, kind in zip(lists.lists[name], kinds.values(), strict=True):
        lists._parameters[key] = _empty(kind)
    return _node(graph, target, tuple(kinds.values()), tuple(kinds))


def weights_of(node: fx.Node) -> dict[Path, TensorType]:
    """The weights that `node` gives, by name; none if it gives something else."""
    if node.op != "get_attr":
        return {}
    kinds = node.meta["type"]
    kinds = (kinds,) if isinstance(kinds, TensorType) else kinds
    return dict(zip(node.meta["parts"], kinds, strict=True))


def is_list(node: object) -> bool:
    """Whether `node` gives a list of weights."""
    return isinstance(node, fx.Node) and node.op == "get_attr" and type(node.meta["type"]) is tuple


def value_of(graph: fx.GraphModule, node: fx.Node) -> Tensor | list[Tensor]:
    """What the weight node `node` of `graph` gives."""
    owner, _, leaf = str(node.target).rpartition(".")
    found: Tensor | list[Tensor] = getattr(_submodule(graph, owner), leaf)
    return found


def set_weight(root: nn.Module, name: Path, weight: Tensor) -> None:
    """Give the weight `name` below `root` a value in place of the one it has."""
    module = root
    while not isinstance(module, Lists) and "." in name:
        part, _, name = name.partition(".")
        module = module._modules[part] or module
    assert name in module._parameters
    module._parameters[name] = nn.Parameter(weight, requires_grad=False)


def drop_unused(graph: fx.GraphModule) -> None:
    """Remove the weights that no node of `graph` gives.

    fx's own `delete_all_unused_submodules` takes quadratic time.
    """
    used = {name for node in graph.graph.nodes for name in weights_of(node)}
    targets = {str(node.target) for node in graph.graph.nodes if node.op == "get_attr"}

    def prune(module: nn.Module, path: Path) -> None:
        for name in [each for each in module._parameters if path + each not in used]:
            del module._parameters[name]
        if isinstance(module, Lists):
            kept = {name: parts for name, parts in module.lists.items() if path + name in targets}
            module.lists = kept
        for name, child in list(module._modules.items()):
            if child is not None:
                prune(child, f"{path}{name}.")
            if child is None or not (child._modules or child._parameters):
                del module._modules[name]

    prune(graph, "")


def _node(graph: fx.Graph, target: Path, kind: object, parts: tuple[Path, ...]) -> fx.Node:
    node = graph.create_node("get_attr", target)  # `graph.get_attr` would look the weight up first
    node.meta |= {"name": target, "type": kind, "parts": parts}
    return node


def _empty(kind: TensorType) -> nn.Parameter:
    data = torch.empty(kind.shape, dtype=kind.dtype, device="meta")
    return nn.Parameter(data, requires_grad=False)


def _submodule(root: nn.Module, path: Path, kind: type[nn.Module] = nn.Module) -> nn.Module:
    """The module at `path` below `root`. Modules that are missing are made, the last of `kind`."""
    module, parts = root, path.split(".") if path else []
    for i, part in enumerate(parts, start=1):
        found = module._modules.get(part)
        if found is None:
            found = kind() if i == len(parts) else nn.Module()
            module._modules[part] = found
        module = found
    return module
