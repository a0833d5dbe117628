"""Graphs generate their code when they are called or printed, and not at each edit."""

from copy import deepcopy

import torch
from torch import Tensor, fx, nn

from moec.graph_builder.module import MoecGraph


def _graph() -> MoecGraph:
    graph = fx.Graph()
    x = graph.placeholder("x")
    graph.output((graph.call_function(torch.neg, (x,)),))
    return MoecGraph(nn.Module(), graph, "MoecGraph")


def _edit(module: fx.GraphModule) -> None:
    (node,) = module.graph.find_nodes(op="call_function", target=torch.neg)
    node.target = torch.abs
    module.recompile()


X = torch.tensor([-2.0, 3.0])


def _value(module: fx.GraphModule) -> Tensor:
    (found,) = module(X)
    assert isinstance(found, Tensor)
    return found


def test_no_code_is_there_before_the_first_call() -> None:
    module = _graph()
    assert "_code" not in vars(module)
    assert torch.equal(_value(module), -X)
    assert "torch.neg" in vars(module)["_code"]


def test_each_edit_is_seen_by_calls_and_prints() -> None:
    module, other = _graph(), _graph()
    assert torch.equal(_value(module), -X)
    _edit(module)
    assert torch.equal(_value(module), X.abs()) and torch.equal(_value(other), -X)
    assert "torch.abs" in module.code and "torch.neg" in str(other)
    module = _graph()
    _edit(module)
    assert "torch.abs" in module.code
    assert torch.equal(_value(module), X.abs())


def test_a_copy_is_a_graph_of_its_own() -> None:
    module = _graph()
    copy = deepcopy(module)
    _edit(copy)
    assert torch.equal(_value(module), -X) and torch.equal(_value(copy), X.abs())
