"""Rewritten graphs mean what they did: eager runs of random models, before and after each pass."""

import copy
from typing import Any

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from torch import Tensor, fx

from moec.graph_builder import ops
from moec.graph_builder.decoder import build_decoder
from moec.graph_builder.passes.buffers import keep_buffers
from moec.graph_builder.passes.genai import genai_inputs
from moec.graph_builder.passes.skip_norm import join_skip_norms
from moec.runtime.cache import new_cache, spans
from moec.spec.errors import MoecError
from moec.spec.model import ModelSpec
from tests.strategies import specs


def _filled(spec: ModelSpec, seed: int) -> fx.GraphModule:
    graph = build_decoder(spec)
    graph.to_empty(device="cpu")
    generator = torch.Generator().manual_seed(seed)
    for weight in graph.parameters():
        weight.copy_(torch.randn(weight.shape, generator=generator) * 0.3)
    return graph


def _run(graph: fx.GraphModule, feeds: dict[str, Tensor]) -> dict[str, Tensor]:
    nodes = list(graph.graph.nodes)
    given = [feeds.get(n.meta["name"], n.meta["default"]) for n in nodes if n.op == "placeholder"]
    return dict(zip(nodes[-1].meta["outputs"], graph(*given), strict=True))


def _targets(graph: fx.GraphModule) -> set[Any]:
    return {node.target for node in graph.graph.nodes}


@pytest.mark.full
@settings(max_examples=8, deadline=None, suppress_health_check=list(HealthCheck))
@given(spec=specs(), seed=st.integers(0, 2**31), data=st.data())
def test_passes_keep_the_meaning(spec: ModelSpec, seed: int, data: st.DataObject) -> None:
    """Two rows, several calls that end at chunk borders; genai's graph in calls as they come."""
    plain = _filled(spec, seed)
    fused = join_skip_norms(keep_buffers(copy.deepcopy(plain)))
    genai = genai_inputs(copy.deepcopy(fused))
    assert ops.attention.target not in _targets(fused) | _targets(genai)
    assert ops.skip_norm.target in _targets(fused)
    chunk, capacity = spec.text.chunk or 99, 24
    ids = torch.randint(0, spec.text.vocab, (2, 20), generator=torch.Generator().manual_seed(seed))
    caches = {
        "plain": new_cache(spec, "fp32", 2, capacity),
        "fused": new_cache(spec, "fp32", 2, capacity, "buffers"),
    }
    full = {
        f"past.{i}.{kind}": torch.zeros(2, spec.text.kv_heads, capacity, spec.text.head_dim)
        for i in range(spec.text.layers)
        for kind in ("key", "value")
    }
    at = 0
    while at < 20:
        count = min(20 - at, chunk - at % chunk, data.draw(st.integers(1, 9)))
        piece = ids[:, at : at + count]
        past = torch.full((2,), at)
        common = {
            "input_ids": piece,
            "past_lengths": past,
            "lengths": torch.full((2,), count),
            "logit_index": torch.arange(count).repeat(2, 1),
        }
        found = {}
        for name, graph in (("plain", plain), ("fused", fused)):
            feeds = {**common, **caches[name].tensors, **spans(spec.text.chunk, past, count)}
            found[name] = _run(graph, feeds)
            for key in caches[name].tensors:
                caches[name].tensors[key] = found[name][key.replace("past", "present")]
        mask = torch.ones(2, at + count, dtype=torch.int64)
        found["genai"] = _run(genai, {"input_ids": piece, "attention_mask": mask, **full})
        for key in full:
            full[key] = found["genai"][key.replace("past", "present")]
        largest = found["plain"]["logits"].abs().max().clamp(min=1e-3)
        for name in ("fused", "genai"):
            assert (found[name]["logits"] - found["plain"]["logits"]).abs().max() < 1e-4 * largest
        at += count


def test_genai_calls_may_cross_borders_and_pad_on_the_right() -> None:
    from moec.spec.presets import PRESETS
    from moec.spec.reduced import reduced

    spec = reduced(PRESETS["scout"], 4).model_copy(update={"vision": None})
    chunk = spec.text.chunk or 0
    plain = _filled(spec, 1)
    genai = genai_inputs(join_skip_norms(keep_buffers(copy.deepcopy(plain))))
    count, short = 2 * chunk + 3, chunk + 1
    ids = torch.randint(0, spec.text.vocab, (2, count))
    mask = torch.ones(2, count, dtype=torch.int64)
    mask[1, short:] = 0
    full = {
        f"past.{i}.{kind}": torch.zeros(2, spec.text.kv_heads, count + 2, spec.text.head_dim)
        for i in range(4)
        for kind in ("key", "value")
    }
    out = _run(genai, {"input_ids": ids, "attention_mask": mask, **full})
    whole = _whole(spec, plain, ids)
    assert torch.allclose(out["logits"][0], whole[0], atol=1e-4)
    assert torch.allclose(out["logits"][1, :short], whole[1, :short], atol=1e-4)
    # One more token of each row: row 1 goes on where its padding was.
    new = torch.randint(0, spec.text.vocab, (2, 1))
    full = {key: out[key.replace("past", "present")] for key in full}
    mask = torch.cat([mask, torch.ones(2, 1, dtype=torch.int64)], 1)
    step = _run(genai, {"input_ids": new, "attention_mask": mask, **full})
    row = torch.cat([ids[1, :short], new[1]])[None]
    expected = _whole(spec, plain, row)[0, -1]
    assert torch.allclose(step["logits"][1, 0], expected, atol=1e-4)


def _whole(spec: ModelSpec, graph: fx.GraphModule, ids: Tensor) -> Tensor:
    rows, count = ids.shape
    feeds = {
        "input_ids": ids,
        "past_lengths": torch.zeros(rows, dtype=torch.int64),
        "lengths": torch.full((rows,), count),
        "logit_index": torch.arange(count).repeat(rows, 1),
        **new_cache(spec, "fp32", rows, 0).tensors,
    }
    return _run(graph, feeds)["logits"]


def test_tokens_across_a_border_or_past_a_buffer_are_refused() -> None:
    q, k, buffer = torch.zeros(1, 3, 8), torch.zeros(1, 3, 8), torch.zeros(1, 2, 16, 4)
    for chunk, last, message in ((8, 8, "8 slots"), (None, 16, "16 slots")):
        where = torch.tensor([last], dtype=torch.int32), torch.tensor(last + 1, dtype=torch.int32)
        with pytest.raises(MoecError, match=message):
            ops.buffered_attention.target(q, k, k, buffer, buffer, *where, None, chunk, 2, 2)
