"""FP8 stands where a scheme says, on every tensor of the spec and none else, and means the same."""

from collections import Counter
from typing import Any

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from torch import Tensor, fx

from moec.graph_builder import ops
from moec.graph_builder.parts import build_graph
from moec.graph_builder.weights import weights_of
from moec.runtime.cache import new_cache
from moec.spec.model import ModelSpec
from moec.spec.names import scale_of, separate
from moec.spec.parameters import parameters
from moec.spec.presets import PRESETS
from moec.spec.reduced import reduced
from moec.spec.scheme import SCHEMES, STATIC, Scheme
from moec.spec.tensors import quantized, tensors
from tests.strategies import fp8_specs

few = settings(max_examples=8, deadline=None, suppress_health_check=list(HealthCheck))

#: scheme -> how many in a layer: token_scale, quantize, dequantize
NODES = {
    "meta": (0, 0, 0),  # experts alone, whose op does all of it
    "dynamic": (4, 4, 7 + 4),  # inputs of q, k and v; of o; of gate and up; of down
    "static": (0, 7, 7 + 7),  # an input for each weight
    "modelopt": (0, 7 + 4, 7 + 7 + 4),  # keys and values twice
    "deepseek": (4, 4, 7 + 4),
}


def _mixed(moe: float) -> tuple[float, ...]:
    """The same of the scheme that is dynamic in experts, where a share of the layers is `moe`."""
    quantized = 4 + 2 * moe + 3 * (1 - moe)  # of attention; of a shared expert, or dense
    return 2 * moe, quantized, 7 + quantized


@pytest.fixture(
    scope="module", params=[(n, s) for n in ("scout", "maverick") for s in SCHEMES], ids="-".join
)
def spec(request: pytest.FixtureRequest) -> ModelSpec:
    """A decoder with a named scheme."""
    name, scheme = request.param
    update = {"scheme": SCHEMES[scheme], "vision": None}
    return reduced(PRESETS[name].model_copy(update=update))


@pytest.fixture(scope="module")
def graph(spec: ModelSpec) -> fx.GraphModule:
    return build_graph(spec)


def _nodes(graph: fx.GraphModule) -> dict[str, fx.Node]:
    nodes = [node for node in graph.graph.nodes if node.op != "output"]
    found = {node.meta["name"]: node for node in nodes}
    assert len(found) == len(nodes), "names are unique"
    return found


def _inputs_by_weight(graph: fx.GraphModule) -> dict[str, Any]:
    """Of each linear layer: the name of its weight, and the node of its input."""
    linear = [node for node in graph.graph.nodes if node.target == ops.linear.target]
    return {node.args[1].meta["name"].removesuffix(".wide"): node.args[0] for node in linear}


def _uses_each_tensor_once(graph: fx.GraphModule, spec: ModelSpec) -> None:
    used = Counter(name for node in graph.graph.nodes for name in weights_of(node))
    kinds = tensors(spec)
    assert used == dict.fromkeys(kinds, 1)
    assert {name: tuple(p.shape) for name, p in graph.named_parameters()} == {
        name: kind.shape for name, kind in kinds.items()
    }
    assert all(node.users for node in graph.graph.nodes if node.op == "get_attr")


def test_the_graph_uses_every_tensor_once_and_none_else(
    spec: ModelSpec, graph: fx.GraphModule
) -> None:
    _uses_each_tensor_once(graph, spec)
    assert None not in _nodes(graph)


def test_nodes_are_where_the_scheme_says(spec: ModelSpec, graph: fx.GraphModule) -> None:
    count = Counter(node.target for node in graph.graph.nodes)
    assert spec.scheme
    layers = spec.text.layers
    kinds = (ops.token_scale, ops.quantize, ops.dequantize)
    found = tuple(count[op.target] / layers for op in kinds)
    moe = sum(layer.moe for layer in spec.text.all_layers)
    assert found == (
        _mixed(moe / layers) if spec.scheme.name == "mixed" else NODES[spec.scheme.name]
    )
    assert count[ops.fp8_moe.target] == moe
    assert not count[ops.moe.target]


def test_products_of_one_input_share_its_rounding_where_scales_are_dynamic(
    spec: ModelSpec, graph: fx.GraphModule
) -> None:
    inputs = _inputs_by_weight(graph)
    assert spec.scheme
    for index, layer in enumerate(spec.text.all_layers):
        ffn = f"layers.{index}.moe.shared" if layer.moe else f"layers.{index}.ffn"
        attention = [f"layers.{index}.attn.{part}.weight" for part in "qkv"]
        for names in (attention, [f"{ffn}.{part}.weight" for part in ("gate", "up")]):
            seen, rule = [inputs[name] for name in names], spec.scheme.rule(names[0])
            assert len(set(seen)) == (len(seen) if rule and rule.inputs in STATIC else 1)
            rounded = spec.scheme.name != "meta"
            assert {each.target == ops.dequantize.target for each in seen} == {rounded}


def test_routers_and_the_head_see_inputs_as_they_are(
    spec: ModelSpec, graph: fx.GraphModule
) -> None:
    inputs = _inputs_by_weight(graph)
    seen = {n: x for n, x in inputs.items() if n.endswith((".router.weight", "head.weight"))}
    assert len(seen) == 1 + sum(layer.moe for layer in spec.text.all_layers)
    for name, x in seen.items():
        assert x.target == ops.rms_norm.target, name


def test_caches_are_codes_where_the_scheme_has_them(spec: ModelSpec, graph: fx.GraphModule) -> None:
    nodes = _nodes(graph)
    assert spec.scheme
    kind = ops.FP8 if spec.scheme.cache else torch.float32
    output = list(graph.graph.nodes)[-1]
    given = dict(zip(output.meta["outputs"], output.args[0], strict=True))
    for index in range(spec.text.layers):
        for part in ("key", "value"):
            name = f"present.{index}.{part}"
            assert nodes[f"past.{index}.{part}"].meta["type"].dtype == kind
            assert given[name].meta["type"].dtype == kind
            assert given[name].meta["name"] == name


# ---------------------------------------------------------------- numbers


def _values(spec: ModelSpec, seed: int) -> dict[str, Tensor]:
    """Random tensors of `spec`."""
    generator = torch.Generator().manual_seed(seed)

    def draw(name: str, shape: tuple[int, ...], dtype: str) -> Tensor:
        noise = torch.randn(shape, generator=generator)
        if dtype == "fp8":
            return (noise * 100).clamp(-448, 448).to(ops.FP8)
        if not name.endswith("_scale"):
            return noise * 0.3
        return noise.abs() * 0.002 + (0.02 if name.endswith("input_scale") else 0.002)

    return {name: draw(name, *kind) for name, kind in tensors(spec).items()}


def _filled(spec: ModelSpec, values: dict[str, Tensor]) -> fx.GraphModule:
    graph = build_graph(spec)
    graph.to_empty(device="cpu")
    for name, weight in graph.named_parameters():
        weight.copy_(values[name])
    return graph


def _run(graph: fx.GraphModule, spec: ModelSpec, seed: int) -> dict[str, Tensor]:
    """Two rows in two calls; outputs of both."""
    generator = torch.Generator().manual_seed(seed)
    cache = new_cache(spec, "fp32", 2, 8)
    found, names = {}, list(graph.graph.nodes)[-1].meta["outputs"]
    for call, count in enumerate((5, 2)):
        ids = torch.randint(0, spec.text.vocab, (2, count), generator=generator)
        lengths = torch.tensor([count, count - 1])
        index = torch.arange(count).repeat(2, 1)
        out = dict(
            zip(
                names,
                graph(ids, cache.lengths, lengths, index, *cache.tensors.values()),
                strict=True,
            )
        )
        cache.lengths = cache.lengths + lengths
        for name in cache.tensors:
            cache.tensors[name] = out[name.replace("past", "present")]
        found |= {f"{call}.{name}": each for name, each in out.items()}
    return found


@few
@given(spec=fp8_specs(), seed=st.integers(0, 2**31))
def test_any_scheme_runs(spec: ModelSpec, seed: int) -> None:
    graph = _filled(spec, _values(spec, seed))
    _uses_each_tensor_once(graph, spec)
    _nodes(graph)
    assert spec.scheme
    for name, found in _run(graph, spec, seed).items():
        assert found.float().isfinite().all(), name
        assert (found.dtype == ops.FP8) == (spec.scheme.cache and "present" in name)


def _wide(spec: ModelSpec, values: dict[str, Tensor]) -> dict[str, Tensor]:
    """The parameters that codes and scales mean."""
    rules, scheme = quantized(spec), spec.scheme
    assert scheme

    def product(name: str, axis: int = 0, at: Any = ...) -> Tensor:
        codes, scale = values[name][at], values[scale_of(name)]
        scale = scale[at] if scale.dim() else scale
        return ops.dequantize.target(codes, scale, axis, scheme.block, "fp32")

    def parameter(name: str, shape: tuple[int, ...]) -> Tensor:
        if name not in rules:
            return values[name]
        if len(shape) < 3:
            return product(name)
        if not scheme.separate_experts:
            return torch.stack([product(name, 1, expert) for expert in range(shape[0])])
        experts = [map(product, separate(name, expert)) for expert in range(shape[0])]
        return torch.stack([torch.cat(list(parts)).t() for parts in experts])

    return {name: parameter(name, shape) for name, shape in parameters(spec).items()}


@pytest.mark.full
@few
@given(spec=fp8_specs(), seed=st.integers(0, 2**31))
def test_weights_on_the_grid_give_what_they_give_wide(spec: ModelSpec, seed: int) -> None:
    assert spec.scheme
    rules = tuple(rule.model_copy(update={"inputs": "none"}) for rule in spec.scheme.rules)
    scheme = spec.scheme.model_copy(update={"rules": rules, "cache": False})
    narrow = spec.model_copy(update={"scheme": scheme, "dtype": "fp32"})
    wide = narrow.model_copy(update={"scheme": None})
    values = _values(narrow, seed)
    found = _run(_filled(narrow, values), narrow, seed)
    expected = _run(_filled(wide, _wide(narrow, values)), wide, seed)
    for name, each in expected.items():
        assert (found[name] - each).abs().max() <= 1e-5 * each.abs().max().clamp(min=1e-3), name


def test_products_of_one_input_may_round_it_in_two_ways() -> None:
    rules = [
        {"of": ["layers.*.attn.q.weight"], "weight": "channel", "inputs": "token"},
        {"of": ["layers.*.attn.k.weight"], "weight": "block", "inputs": "group"},
    ]
    scheme = Scheme.model_validate({"name": "two", "rules": rules, "block": 8})
    graph = build_graph(reduced(PRESETS["scout"]).model_copy(update={"scheme": scheme}))
    names = [node.meta["name"] for node in graph.graph.nodes if node.op != "output"]
    assert len(names) == len(set(names))
    by_name = {node.meta.get("name"): node for node in graph.graph.nodes}
    q, k, v = (by_name[f"layers.0.attn.{part}"].args[0] for part in "qkv")
    assert len({q, k, v}) == 3
