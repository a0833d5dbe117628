"""Our shape rules against torch itself: eager results and FakeTensor, on every node of a graph."""

import re
from collections.abc import Iterator
from typing import Any

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from torch import fx
from torch._subclasses.fake_tensor import FakeTensorMode

from moec.exporters.onnx.write import graphs_of
from moec.graph_builder import ops
from moec.graph_builder.decoder import build_decoder
from moec.graph_builder.fused import build_fused
from moec.graph_builder.parts import build_parts
from moec.graph_builder.passes.buffers import keep_buffers
from moec.graph_builder.passes.fused.fuse import fuse
from moec.graph_builder.passes.fused.quantisation import join_encodes
from moec.graph_builder.passes.skip_norm import join_skip_norms
from moec.graph_builder.passes.static import make_static
from moec.graph_builder.plain import build_plain, build_step
from moec.graph_builder.types import TensorType
from moec.runtime.cache import new_cache
from moec.spec.errors import MoecError
from moec.spec.model import ModelSpec
from moec.spec.presets import PRESETS
from moec.spec.reduced import reduced
from moec.spec.scheme import SCHEMES, Rule, Scheme
from moec.spec.sharding import ALONE, Rank
from moec.weights.joined import unquantised
from moec.weights.view import TORCH_DTYPES
from tests.routes import by
from tests.strategies import fp8_specs, specs, vision_specs


class _Recorder(fx.Interpreter):
    """Runs a graph and compares each node's result with the type that the builder gave it."""

    def __init__(self, graph: fx.GraphModule, sizes: dict[str, int]) -> None:
        super().__init__(graph)
        self.sizes, self.seen = sizes, 0

    def run_node(self, n: fx.Node) -> Any:
        result = super().run_node(n)
        types = n.meta.get("type")
        single = isinstance(types, TensorType)
        kinds, results = ((types,), (result,)) if single else (types or (), result)
        for tensor, kind in zip(results, kinds, strict=True) if types else ():
            shape = tuple(_size(dim, self.sizes) for dim in kind.shape)
            assert (tuple(tensor.shape), tensor.dtype) == (shape, kind.dtype), n.meta["name"]
            self.seen += 1
        return result


def _size(dim: int | str, sizes: dict[str, int]) -> int:
    """Evaluate a symbol such as "ring_slots+sequence" or "batch*sequence"."""
    if isinstance(dim, int):
        return dim
    return eval(re.sub(r"[a-z_]+", lambda m: str(sizes[m.group()]), dim))


def _inputs(
    spec: ModelSpec, precision: str, batch: int, sequence: int, logits: int, capacity: int
) -> tuple[list[torch.Tensor], dict[str, int]]:
    cache = new_cache(spec, precision, batch, capacity)
    chunk = spec.text.chunk or capacity
    sizes = {
        "batch": batch,
        "sequence": sequence,
        "logits": logits,
        "global_slots": capacity,
        "ring_slots": min(chunk, capacity),
    }
    ids = torch.zeros(batch, sequence, dtype=torch.int64)
    lengths = torch.full((batch,), sequence)
    index = torch.zeros(batch, logits, dtype=torch.int64)
    inputs = [ids, cache.lengths, lengths, index, *cache.tensors.values()]
    if spec.vision:
        sizes["image_tokens"] = 3
        inputs.append(torch.zeros(3, spec.text.dim, dtype=TORCH_DTYPES[precision]))
        ids.fill_(int(spec.tokens.image == 0)).view(-1)[:3] = spec.tokens.image
    return inputs, sizes


def _check(graph: fx.GraphModule, inputs: list[torch.Tensor], sizes: dict[str, int]) -> None:
    recorder = _Recorder(graph, sizes)
    recorder.run(*inputs)
    assert recorder.seen >= len(graph.graph.nodes) - 1  # all but the output


def _pixels(spec: ModelSpec, tiles: int) -> list[torch.Tensor]:
    assert spec.vision is not None
    return [torch.zeros(tiles, spec.vision.channels, spec.vision.image, spec.vision.image)]


@pytest.mark.full
@settings(max_examples=8, deadline=None, suppress_health_check=list(HealthCheck))
@given(
    spec=st.one_of(specs(), vision_specs(), fp8_specs()),
    precision=st.sampled_from(["fp32", "fp16", "bf16"]),
    sizes=st.tuples(st.integers(1, 3), st.integers(3, 7), st.integers(1, 3), st.integers(0, 12)),
)
def test_every_rule_agrees_with_eager(
    spec: ModelSpec, precision: str, sizes: tuple[int, int, int, int]
) -> None:
    for part, graph in build_parts(spec, precision).items():
        graph.to_empty(device="cpu")
        for weight in graph.parameters():
            weight.zero_()
        if part == "model":
            _check(graph, *_inputs(spec, precision, *sizes))
        else:
            _check(graph, _pixels(spec, sizes[0]), {"tiles": sizes[0]})


@pytest.mark.full
@pytest.mark.parametrize("name", ["scout", "maverick"])
def test_every_rule_agrees_with_fake_tensors_at_full_size(name: str) -> None:
    spec = PRESETS[name]
    with FakeTensorMode(), torch.device("meta"):
        graphs = build_parts(spec, "bf16")
        _check(graphs["model"], *_inputs(spec, "bf16", 2, 5, 1, 9000))
        _check(graphs["vision"], _pixels(spec, 17), {"tiles": 17})


def _before_joining(spec: ModelSpec) -> list[fx.GraphModule]:
    """Fused graphs, before the passes that join fused ops with one another."""
    graphs = []
    for change in (lambda graph: graph, join_encodes):
        wide = join_skip_norms(keep_buffers(build_decoder(unquantised(spec, "fp32"))))
        graphs.append(change(fuse(wide, spec)))
    return graphs


INT4 = Scheme(
    name="int4",
    layout="pack-quantized",
    rules=(Rule(of=("layers.*.moe.*", "layers.*.attn.q.weight"), weight="group"),),
    block=16,
)


def _fused(spec: ModelSpec, precision: str) -> Iterator[fx.GraphModule]:
    """The fused decoder of a process alone and of a rank, with logits and with tokens."""
    for rank in (ALONE, Rank(1, 2)):
        for greedy in (False, True):
            yield build_fused(spec, precision, rank=rank, greedy=greedy)


@pytest.mark.full
def test_the_vocabulary_is_what_graphs_use() -> None:
    used = {
        node.target
        for name, precision, scheme in (
            ("scout", "fp32", None),
            ("maverick", "fp16", SCHEMES["dynamic"]),
        )
        for spec in [reduced(PRESETS[name].model_copy(update={"scheme": scheme}), 4)]
        for graph in (
            *graphs_of(spec, precision, "standard").values(),
            *graphs_of(spec, precision, "ort").values(),
            make_static(keep_buffers(build_decoder(spec)), {}),
            build_decoder(unquantised(spec, "fp32").model_copy(update={"separate_experts": True})),
            *graphs_of(spec.model_copy(update={"scheme": INT4}), "fp32", "standard").values(),
            build_decoder(reduced(PRESETS["deepseek-v3"], 4)),
            build_decoder(CLIPPED),
            build_plain(CLIPPED),
            build_step(CLIPPED),
            *([*_fused(spec, precision), *_before_joining(spec)] if scheme else ()),
        )
        for node in graph.graph.nodes
        if node.op == "call_function" and node.target.__name__ != "getitem"
    }
    assert used == {op.target for op in ops.OPS.values()}


def test_value_names_are_unique_and_meaningful() -> None:
    expected = {
        "model": {"layers.3.attn.q", "layers.47.moe.gate_up", "past.3.key", "fused", "logits"},
        "vision": {"vision.layers.33.mlp.fc1", "vision.adapter.fc2.act", "image_features"},
    }
    for part, graph in build_parts(PRESETS["scout"]).items():
        names = [node.meta.get("name") for node in graph.graph.nodes][:-1]
        assert len(names) == len(set(names)) and None not in names
        assert expected[part] <= set(names)


OLMOE = reduced(PRESETS["olmoe-1b-7b"], 4)
CLIPPED = OLMOE.model_copy(update={"text": OLMOE.text.model_copy(update={"clip_qkv": 1.0})})
F32, I64, I32, FP8 = torch.float32, torch.int64, torch.int32, ops.FP8


def t(*shape: int | str, dtype: torch.dtype = F32) -> TensorType:
    return TensorType(shape, dtype)


def experts(count: int, dim: int, hidden: int) -> list[TensorType]:
    gate_up = t(count, 2 * hidden, dim, dtype=FP8), t(count, 2 * hidden)
    return [*gate_up, t(count, dim, hidden, dtype=FP8), t(count, dim)]


def table(*shape: int) -> list[TensorType]:
    return [t(*shape)] * 2


def buffers(*shape: int) -> list[TensorType]:
    return [t(*shape), t(*shape), t(shape[0], dtype=I32)]


@pytest.mark.parametrize(
    "op, args",
    [
        (ops.embedding, (t(2, 3), t(9, 4), "fp32")),
        (ops.linear, (t(6, 4), t(8, 5), None)),
        (ops.linear, (t(6, 4), t(8, 4), t(7))),
        (ops.rms_norm, (t(6, 4), t(5), 1e-5)),
        (ops.rms_norm, (t(6, 4), t(4), 0.0)),
        (ops.add, (t(6, 4), t(6, 5))),
        (ops.swiglu, (t(6, 4), t(6, 4, dtype=torch.float16))),
        (ops.unpack, (t(7, 4), t(2, 3, dtype=I64))),
        (ops.fuse, (t(6, 4), t(2, 4, dtype=I64), t(1, 4), 3)),
        (ops.fuse, (t(6, 4), t(2, 3, dtype=I64), t(1, 5), 3)),
        (ops.fuse, (t(6, 4), t(2, 3, dtype=I64), t(1, 4, dtype=torch.float16), 3)),
        (ops.fuse, (t(6, 4), t(2, 3, dtype=I64), t(1, 4), -1)),
        (ops.layer_norm, (t(6, 4), t(4), t(5), 1e-5)),
        (ops.layer_norm, (t(6, 4), t(4), t(4), 0.0)),
        (ops.patches, (t("tiles", 3, 8, 9), 4, "fp32")),
        (ops.patches, (t(3, 8, 8), 4, "fp32")),
        (ops.tile_tokens, (t("tiles", 9, 4), t(5), t(10, 4))),
        (ops.tile_tokens, (t("tiles", 9, 4), t(4), t(9, 4))),
        (ops.patch_rope_table, (t("tiles", 9, 4), 3, 6, 1e4)),
        (ops.patch_rope_table, (t("tiles", 8, 4), 3, 8, 1e4)),
        (ops.pixel_shuffle, (t("tiles", 9, 4), 3, 1)),
        (ops.pixel_shuffle, (t("tiles", 10, 4), 3, 2)),
        (ops.pack, (t(6, 4),)),
        (ops.select, (t(2, 3, 4), t(3, 1, dtype=I64))),
        (ops.rope, (t(2, 3, 8), t(2, 3, 3), t(2, 3, 3), 2, "adjacent")),
        (ops.rope_table, (t(2, 3, dtype=I64), 7, 1e4, "none", [], 1.0)),
        (ops.rope_table, (t(2, 3, dtype=I64), 8, 1e4, "bands", [1.0], 1.0)),
        (ops.rope_table, (t(2, 3, dtype=I64), 8, 1e4, "other", [], 1.0)),
        (ops.clip, (t(2, 3, 8), 0.0)),
        (ops.head_norm, (t(2, 3, 9), None, 2, 1e-5)),
        (ops.head_norm, (t(2, 3, 8), t(8), 2, 1e-5)),
        (ops.temperature, (t(2, 3, dtype=I64), 0, 0.1)),
        (ops.scale_queries, (t(2, 3, 8), t(2, 3, 1, dtype=torch.float16))),
        (ops.attention_mask, (t(2, 3, dtype=I64), t(2, 3, dtype=I64), 0, None)),
        (ops.attention, (t(2, 3, 8), t(2, 5, 8), t(2, 5, 8), t(2, 1, 3, 5), 2, 1, None)),
        (ops.attention, (t(2, 3, 8), t(2, 5, 4), t(2, 5, 4), t(2, 1, 3, 4), 2, 1, None)),
        (ops.attention, (t(2, 3, 9), t(2, 5, 3), t(2, 5, 3), t(2, 1, 3, 5), 3, 2, None)),
        (ops.take_part, (t(6, 8), 2, 1, 5)),
        (ops.take_part, (t(6, 8), 3, 0, 1)),
        (ops.join_parts, (t(6, 8), t(5, 8), 2)),
        (ops.join_parts, (t(6, 8), t(6, 9), 2)),
        (ops.head_linear, (t(6, 8), t(12, 5), 2, 0, 5, False)),
        (ops.head_linear, (t(6, 8), t(12, 5), 2, 0, 4, True)),
        (ops.head_linear, (t(6, 8), t(13, 4), 2, 0, 4, True)),
        (ops.cache_append, (t(2, 5, 8), t(2, 3, 4))),
        (ops.cache_write, (t(2, 5, 8), t(3, 5, dtype=I64))),
        (ops.cache_index, (t(2, 5, 8), t(3, dtype=I64), t(2, dtype=I64))),
        (ops.key_positions, (t(2, 5), t(2, dtype=I64), t(2, 3, dtype=I64))),
        (ops.positions, (t(2, 3, dtype=I64), t(3, dtype=I64))),
        (ops.route, by(t(6, 4), 5)),
        (ops.route, by(t(6, 4), 2, t(6, 5))),
        (ops.ranks, (t(6, 4), None, "sigmoid", 3, 1)),
        (ops.ranks, (t(6, 4), t(5), "sigmoid", 2, 1)),
        (ops.ranks, (t(6, 4), None, "tanh", 1, 1)),
        (ops.ranks, (t(6, 4), None, "softmax", 2, 3)),
        (ops.moe, (t(6, 4), t(6, 1), t(6, 1), "input", t(3, 5, 8), t(3, 4, 4))),
        (ops.moe, (t(6, 4), t(6, 1), t(6, 1), "input", t(3, 4, 8), t(3, 3, 4))),
        (ops.moe, (t(6, 4), t(6, 1), t(6, 2), "input", t(3, 4, 8), t(3, 4, 4))),
        (ops.separate_moe, (t(6, 4), t(6, 1), t(6, 1), "input", [], [])),
        (ops.separate_moe, (t(6, 4), t(6, 1), t(6, 1), "input", [t(3, 4)] * 3, [t(4, 3)] * 2)),
        (ops.separate_moe, (t(6, 4), t(6, 1), t(6, 1), "input", [t(4, 3)] * 4, [t(4, 3)] * 2)),
        (ops.separate_moe, (t(6, 4), t(6, 1), t(6, 1), "input", [t(3, 4)] * 4, [t(4, 3), t(5, 3)])),
        (ops.encode, (t(2, 3, 4),)),
        (ops.norm_fp8, (t(6, 4), t(5), 1e-5)),
        (ops.skip_norm_fp8, (t(6, 4), t(6, 5), t(4), 1e-5)),
        (ops.swiglu_fp8, (t(6, 5),)),
        (ops.fp8_linear, (t(6, 4), t(6), t(3, 4, dtype=FP8), t(3), "bf16")),
        (ops.fp8_linear, (t(6, 4, dtype=FP8), t(5), t(3, 4, dtype=FP8), t(3), "bf16")),
        (ops.fp8_linear, (t(6, 4, dtype=FP8), t(6), t(3, 5, dtype=FP8), t(3), "bf16")),
        (ops.fp8_linear, (t(6, 4, dtype=FP8), t(6), t(3, 4, dtype=FP8), t(4), "bf16")),
        (ops.moe_layer, (t(6, 4), t(3, 4), *experts(3, 4, 5))),
        (ops.moe_layer, (t(6, 4), t(2, 5), *experts(3, 4, 5))),
        (ops.moe_layer, (t(6, 4), t(2, 4), *experts(3, 4, 5)[:2], *experts(3, 4, 6)[2:])),
        (ops.rope_append, (t(2, 3, 16), *table(2, 3, 2), None, *buffers(2, 1, 9, 4), 2, 2, None)),
        (ops.rope_append, (t(2, 3, 16), *table(2, 3, 4), None, *buffers(2, 1, 9, 4), 2, 1, None)),
        (ops.rope_append, (t(2, 3, 16), t(2, 3, 2), None, None, *buffers(2, 1, 9, 4), 2, 1, None)),
        (ops.rope_append, (t(2, 3, 16), None, None, t(2, 3), *buffers(2, 1, 9, 4), 2, 1, None)),
        (ops.rope_append, (t(2, 3, 16), None, None, None, *buffers(3, 1, 9, 4), 2, 1, None)),
        (ops.attend, (t(2, 3, 8), *buffers(2, 1, 9, 5), t(dtype=I32), 2, 1)),
        (ops.attend, (t(2, 3, 8), *buffers(2, 1, 9, 4), t(1, dtype=I32), 2, 1)),
        (ops.attend_fp8, (t(2, 3, 8), *buffers(2, 2, 9, 4), t(dtype=I32), 2, 1)),
    ],
    ids=lambda value: value.name if isinstance(value, ops.Op) else "",
)
def test_bad_operands_are_refused_by_name(op: ops.Op, args: tuple[Any, ...]) -> None:
    with pytest.raises(MoecError, match="op moec::"):
        op.rule(*args)


def test_eager_calls_refuse_too() -> None:
    with pytest.raises(MoecError, match="operand weight"):
        torch.ops.moec.linear(torch.zeros(2, 3), torch.zeros(4, 5), None)
