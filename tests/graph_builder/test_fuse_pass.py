"""The fused decoder is the quantised one: same weights, same numbers, on random models."""

from collections import Counter
from typing import Any

import pytest
import torch
from hypothesis import HealthCheck, Phase, given, settings
from hypothesis import strategies as st
from torch import Tensor, fx

from moec.graph_builder import ops
from moec.graph_builder.fused import build_fused
from moec.graph_builder.parts import build_graph
from moec.runtime.cache import Cache, new_cache, spans
from moec.spec.errors import MoecError
from moec.spec.model import ModelSpec
from moec.spec.presets import PRESETS
from moec.spec.reduced import reduced
from moec.spec.scheme import SCHEMES
from moec.spec.tensors import tensors
from moec.weights.joined import joined_tensors
from moec.weights.view import STORED
from tests.strategies import specs

CAPACITY = 24


def _fusible(spec: ModelSpec) -> ModelSpec:
    """`spec` without what the fused ops cannot express, and with the scheme that they can."""
    experts = spec.text.experts and spec.text.experts.model_copy(update={"top_k": 1})
    text = spec.text.model_copy(update={"attention_bias": False, "experts": experts})
    rules = SCHEMES["dynamic"].rules[0]
    kinds = {".moe.": "M" in text.ffn, ".ffn.": "D" in text.ffn}
    of = tuple(p for p in rules.of if all(on for part, on in kinds.items() if part in p))
    scheme = SCHEMES["dynamic"].model_copy(update={"rules": (rules.model_copy(update={"of": of}),)})
    return spec.model_copy(update={"text": text, "scheme": scheme, "dtype": "fp32"})


def _values(spec: ModelSpec, seed: int) -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(seed)

    def draw(name: str, shape: tuple[int, ...], dtype: str) -> Tensor:
        noise = torch.randn(shape, generator=generator)
        if dtype == "fp8":
            return (noise * 100).clamp(-448, 448).to(ops.FP8)
        return noise.abs() * 0.002 + 0.002 if name.endswith("_scale") else noise * 0.3

    return {name: draw(name, *kind) for name, kind in tensors(spec).items()}


def _joined(spec: ModelSpec, values: dict[str, Tensor]) -> dict[str, Tensor]:
    """`values` as the fused decoder has them."""
    found = {}
    for name, joined in joined_tensors(spec, "fp32").items():
        pieces = [values[piece] for piece in joined.sources]
        if name.endswith((".moe.gate_up", ".moe.down")):  # [expert, in, out]
            pieces[0] = pieces[0].view(torch.uint8).transpose(1, 2).contiguous()
        flat = [piece.contiguous().view(torch.uint8).flatten() for piece in pieces]
        found[name] = torch.cat(flat).view(STORED[joined.dtype]).view(joined.shape)
    return found


def _fill(graph: fx.GraphModule, values: dict[str, Tensor]) -> fx.GraphModule:
    graph.to_empty(device="cpu")
    for name, weight in graph.named_parameters():
        assert (weight.shape, weight.dtype) == (values[name].shape, values[name].dtype), name
        weight.copy_(values[name])
    return graph


def _run(graph: fx.GraphModule, feeds: dict[str, Tensor]) -> dict[str, Tensor]:
    nodes = list(graph.graph.nodes)
    given = [feeds.get(n.meta["name"], n.meta["default"]) for n in nodes if n.op == "placeholder"]
    return dict(zip(nodes[-1].meta["outputs"], graph(*given), strict=True))


def _calls(
    spec: ModelSpec, graphs: dict[str, fx.GraphModule], counts: list[int], seed: int
) -> list[dict[str, Tensor]]:
    """Logits of each graph, by call: two rows that end at chunk borders."""
    generator = torch.Generator().manual_seed(seed)
    layouts = {"plain": "slots", "fused": "buffers"}
    caches: dict[str, Cache] = {
        name: new_cache(spec, "fp32", 2, CAPACITY, layouts[name]) for name in graphs
    }
    found, at = [], 0
    for count in counts:
        past = torch.full((2,), at)
        feeds = {
            "input_ids": torch.randint(0, spec.text.vocab, (2, count), generator=generator),
            "past_lengths": past,
            "lengths": torch.full((2,), count),
            "logit_index": torch.arange(count).repeat(2, 1),
            **spans(spec.text.chunk, past, count),
        }
        results = {}
        for name, graph in graphs.items():
            out = _run(graph, {**feeds, **caches[name].tensors})
            results[name] = out["logits"]
            for key in caches[name].tensors if name == "plain" else ():
                caches[name].tensors[key] = out[key.replace("past", "present")]
        found.append(results)
        at += count
    return found


def _cut(chunk: int, sizes: list[int]) -> list[int]:
    """Calls of at most these sizes that fill the buffers and cross no border within."""
    counts: list[int] = []
    while (at := sum(counts)) < CAPACITY:
        counts.append(min(sizes[len(counts) % len(sizes)], CAPACITY - at, chunk - at % chunk))
    return counts


@pytest.mark.full
@settings(
    max_examples=8, deadline=None, suppress_health_check=list(HealthCheck),
    phases=[Phase.explicit, Phase.generate],  # a smaller example would take minutes to find
)  # fmt: skip
@given(spec=specs(), seed=st.integers(0, 2**31), sizes=st.lists(st.integers(1, 9), min_size=1))
def test_the_fused_decoder_is_the_quantised_one(
    spec: ModelSpec, seed: int, sizes: list[int]
) -> None:
    """Where a rounding falls on the other side of a tie, all later tokens move: draw others then.

    That is so in one draw of three at most; a graph that means something else is off in all.
    """
    spec = _fusible(spec)
    counts = _cut(spec.text.chunk or CAPACITY, sizes)
    errors = []
    for draw in range(seed, seed + 8):
        values = _values(spec, draw)
        graphs = {
            "plain": _fill(build_graph(spec), values),
            "fused": _fill(build_fused(spec, "fp32"), _joined(spec, values)),
        }
        errors.append(max(_error(**call) for call in _calls(spec, graphs, counts, draw)))
        if errors[-1] < 2e-5:
            return
    raise AssertionError(errors)


def _error(plain: Tensor, fused: Tensor) -> float:
    return float((fused - plain).abs().max() / plain.abs().max().clamp(min=1e-3))


@pytest.fixture(params=["scout", "maverick"])
def preset(request: pytest.FixtureRequest) -> ModelSpec:
    return PRESETS[request.param].model_copy(update={"scheme": SCHEMES["dynamic"]})


@pytest.mark.full
def test_full_size_graphs_have_the_joined_weights_and_nothing_unfused(preset: ModelSpec) -> None:
    graph = build_fused(preset)
    found = {name: (tuple(p.shape), p.dtype) for name, p in graph.named_parameters()}
    kinds = {name: (f.shape, STORED[f.dtype]) for name, f in joined_tensors(preset).items()}
    assert found == kinds
    used = Counter(node.target for node in graph.graph.nodes if node.op == "get_attr")
    assert used == dict.fromkeys(kinds, 1)
    layers = preset.text.all_layers
    moe = sum(layer.moe for layer in layers)
    count = Counter(n.target for n in graph.graph.nodes if n.op == "call_function")
    # The last layer's sum goes on to the head.
    assert count[ops.norm_moe.target] + count[ops.norm_moe_norm_fp8.target] == moe
    assert count[ops.norm_moe.target] == int(layers[-1].moe)
    dense = len(layers) - moe
    assert count[ops.fp8_linear.target] == 2 * len(layers) + 2 * dense
    assert count[ops.swiglu_fp8.target] == dense
    assert count[ops.attention_fp8.target] == len(layers)
    assert count[ops.norm_fp8.target] == 1  # of the embedding; all others follow a sum
    followed = count[ops.norm_moe_norm_fp8.target]
    assert count[ops.skip_norm_fp8.target] + followed == len(layers) - 1 + dense
    plain = (
        ops.encode, ops.attend, ops.attend_fp8, ops.rope_append, ops.moe_layer, ops.skip_norm,
        ops.moe, ops.route, ops.rope, ops.head_norm, ops.swiglu,
    )  # fmt: skip
    assert not any(count[op.target] for op in plain)
    assert list(graph.graph.nodes)[-1].meta["outputs"] == ("logits",)


def test_taps_show_what_a_fused_op_keeps_to_itself(preset: ModelSpec) -> None:
    taps = ["layers.1.moe.router", "layers.1.moe.route.1", "layers.1.out", "layers.0.attn.norm"]
    graph = build_fused(reduced(preset, 3), "fp32", taps)
    nodes = {node.meta.get("name"): node for node in graph.graph.nodes}
    output: Any = list(graph.graph.nodes)[-1]
    assert output.meta["outputs"] == ("logits", *taps)
    assert nodes["layers.1.moe.router"].args == (*nodes["layers.1.moe.out"].args[:2], None)
    # Values that somebody wants to see are made, and their codes from them.
    assert nodes["layers.0.attn.norm"].target == ops.rms_norm.target
    assert nodes["layers.0.attn.norm.encoded"].target == ops.encode.target


def _with(**text: Any) -> ModelSpec:
    spec = reduced(PRESETS["scout"].model_copy(update={"scheme": SCHEMES["dynamic"]}), 4)
    return spec.model_copy(update={"text": spec.text.model_copy(update=text)})


def _schemed(name: str, **update: Any) -> ModelSpec:
    return _with().model_copy(update={"scheme": SCHEMES[name].model_copy(update=update)})


EXPERTS = _with().text.experts
BY_TENSOR = SCHEMES["dynamic"].rules[0].model_copy(update={"inputs": "none"})
HEAD = SCHEMES["dynamic"].rules[0].model_copy(update={"of": ("head.weight",)})


@pytest.mark.parametrize(
    "spec, where",
    [
        (_with().model_copy(update={"scheme": None}), "scheme"),
        (_with(attention_bias=True), "text.attention_bias"),
        (_with(experts=EXPERTS.model_copy(update={"top_k": 2})), "text.experts.top_k"),
        (_with(experts=EXPERTS.model_copy(update={"shared_hidden": 8})), "shared_hidden"),
        (_schemed("meta"), "scheme meta: layers.0.attn.k.weight"),
        (_schemed("modelopt", cache=False), "scheme modelopt: layers.0.attn.k.weight"),
        (_schemed("deepseek"), "scheme deepseek: layers.0.attn.k.weight"),
        (_schemed("dynamic", cache=True), "cache"),
        (_schemed("dynamic", bound=3.0), "bound"),
        (_schemed("dynamic", scales="bf16"), "scales"),
        (_schemed("meta", layout="fbgemm_fp8"), "layout"),
        (_schemed("dynamic", rules=(BY_TENSOR,)), "layers.0.attn.k.weight"),
        (_schemed("dynamic", rules=(*SCHEMES["dynamic"].rules, HEAD)), "head.weight"),
    ],
    ids=lambda value: value if isinstance(value, str) else "",
)
def test_what_fused_ops_cannot_express_is_refused(spec: ModelSpec, where: str) -> None:
    with pytest.raises(MoecError, match=where) as caught:
        build_fused(spec)
    assert "use --" in str(caught.value) or "add --" in str(caught.value)
