"""A graph has a node for each list of experts' tensors, however many experts there are."""

from collections.abc import Callable
from copy import deepcopy
from pathlib import Path

import pytest
import torch
from torch import Tensor, fx

from moec.graph_builder.parts import build_graph
from moec.graph_builder.passes.weights_as_inputs import lift_weights
from moec.graph_builder.weights import drop_unused, is_list, set_weight, value_of, weights_of
from moec.runtime.cache import new_cache
from moec.spec.hf import names as hf_names
from moec.spec.hf.quantization import read_scheme
from moec.spec.model import ModelSpec
from moec.spec.presets import PRESETS
from moec.spec.reduced import reduced
from moec.spec.tensors import tensors
from moec.weights.name_map import checkpoint_tensors

BLOCKS = {"quant_method": "fp8", "weight_block_size": [16, 16]}


def _spec(experts: int, fp8: bool = False) -> ModelSpec:
    spec = reduced(PRESETS["deepseek-v3"], 4)
    each = spec.text.experts
    assert each is not None
    text = spec.text.model_copy(update={"experts": each.model_copy(update={"count": experts})})
    spec = spec.model_copy(update={"text": text})
    scheme = read_scheme(BLOCKS, Path("config.json"), spec) if fp8 else None
    return spec.model_copy(update={"scheme": scheme})


@pytest.mark.parametrize("fp8", [False, True])
def test_the_number_of_nodes_does_not_grow_with_that_of_experts(fp8: bool) -> None:
    few, many = (build_graph(_spec(count, fp8)) for count in (40, 80))
    assert len(few.graph.nodes) == len(many.graph.nodes)
    for graph, count in ((few, 40), (many, 80)):
        names = [name for node in graph.graph.nodes for name in weights_of(node)]
        assert set(names) == set(tensors(_spec(count, fp8))) == set(dict(graph.named_parameters()))
        lists = [node for node in graph.graph.nodes if is_list(node)]
        assert [len(weights_of(node)) for node in lists] == (
            [2 * count, 2 * count, count, count] if fp8 else [2 * count, count]
        )


def test_keys_are_made_once_for_all_experts_of_a_layer(monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[str] = []
    plain: Callable[..., str] = hf_names.key_of

    def counted(name: str, *how: str, **more: str) -> str:
        asked.append(name)
        return plain(name, *how, **more)

    monkeypatch.setattr(hf_names, "key_of", counted)
    work = []
    for count in (40, 80):
        asked.clear()
        rows = checkpoint_tensors(_spec(count, fp8=True))
        assert sum(".experts." in row.key for row in rows) == 6 * count
        work.append(len(asked))
    assert work[0] == work[1]


def _filled(graph: fx.GraphModule) -> fx.GraphModule:
    generator = torch.Generator().manual_seed(0)
    for name, weight in dict(graph.named_parameters()).items():
        set_weight(graph, name, torch.randn(weight.shape, generator=generator) * 0.3)
    return graph


def _feeds(spec: ModelSpec) -> list[Tensor]:
    ids = torch.arange(6)[None]
    cache = new_cache(spec, "fp32", 1, 0)
    return [ids, cache.lengths, torch.tensor([6]), torch.tensor([[5]]), *cache.tensors.values()]


def test_weights_of_a_list_can_be_set_read_copied_and_lifted() -> None:
    spec = _spec(40)
    graph = _filled(build_graph(spec))
    own = dict(graph.named_parameters())
    for node in graph.graph.nodes:
        if node.op == "get_attr":
            value = value_of(graph, node)
            given = value if isinstance(value, list) else [value]
            assert all(one is own[name] for one, name in zip(given, weights_of(node), strict=True))
    found = graph(*_feeds(spec))[0]
    assert found.isfinite().all() and found.abs().max() > 0
    assert torch.equal(deepcopy(graph)(*_feeds(spec))[0], found)
    order = [name for node in graph.graph.nodes for name in weights_of(node)]
    lifted = lift_weights(graph)
    assert not list(lifted.parameters())
    assert torch.equal(lifted(*_feeds(spec), *(own[name] for name in order))[0], found)


def test_weights_that_no_node_gives_are_dropped() -> None:
    graph = build_graph(_spec(40))
    before = set(dict(graph.named_parameters()))
    drop_unused(graph)
    assert set(dict(graph.named_parameters())) == before
    moe = next(node for node in graph.graph.nodes if is_list(node))
    gone = set(weights_of(moe))
    (user,) = moe.users
    user.args = tuple([] if arg is moe else arg for arg in user.args)
    graph.graph.erase_node(moe)
    drop_unused(graph)
    assert set(dict(graph.named_parameters())) == before - gone
