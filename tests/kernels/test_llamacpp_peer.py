"""The tensors that benchmarks/llamacpp_peer.py writes have llama.cpp's names, shapes and values."""

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from safetensors.torch import load_file

from benchmarks import llamacpp_peer
from moec.spec.model import ModelSpec
from moec.weights.random import write_random_checkpoint
from tests.families import CASES
from tests.small import SMALL


def _written(spec: ModelSpec, folder: Path) -> dict[str, Any]:
    write_random_checkpoint(spec, folder)
    config = json.loads((folder / "config.json").read_text(encoding="utf-8"))
    architecture = llamacpp_peer.ARCHITECTURES[config["model_type"]]
    tensors = llamacpp_peer._tensors(config, llamacpp_peer._open(folder), architecture)
    return {tensor.name: tensor for tensor in tensors}


def test_olmoe_has_the_tensors_that_llama_cpp_loads(tmp_path: Path) -> None:
    """The names and shapes are those of llama.cpp's loader for `olmoe`, which wants all of them."""
    spec = CASES["olmoe"]
    text, experts = spec.text, spec.text.experts
    assert experts is not None
    queries, keys = text.heads * text.head_dim, text.kv_heads * text.head_dim
    layer = {
        "attn_norm": (text.dim,),
        "attn_q": (queries, text.dim),
        "attn_k": (keys, text.dim),
        "attn_v": (keys, text.dim),
        "attn_output": (text.dim, queries),
        "attn_q_norm": (queries,),
        "attn_k_norm": (keys,),
        "ffn_norm": (text.dim,),
        "ffn_gate_inp": (experts.count, text.dim),
        "ffn_gate_exps": (experts.count, experts.hidden, text.dim),
        "ffn_up_exps": (experts.count, experts.hidden, text.dim),
        "ffn_down_exps": (experts.count, text.dim, experts.hidden),
    }
    wanted = {
        "token_embd.weight": (text.vocab, text.dim),
        "output.weight": (text.vocab, text.dim),
        "output_norm.weight": (text.dim,),
    } | {f"blk.{i}.{x}.weight": shape for i in range(text.layers) for x, shape in layer.items()}
    found = _written(spec, tmp_path)
    assert {name: tensor.shape for name, tensor in found.items()} == wanted

    source = load_file(tmp_path / "model.safetensors")
    for part in ("gate", "up", "down"):
        stack = found[f"blk.1.ffn_{part}_exps.weight"].read()
        for expert in range(experts.count):
            key = f"model.layers.1.mlp.experts.{expert}.{part}_proj.weight"
            assert np.array_equal(stack[expert], source[key].float().numpy())
    norm = source["model.layers.0.self_attn.k_norm.weight"].float().numpy()
    assert np.array_equal(found["blk.0.attn_k_norm.weight"].read(), norm)


def test_llama4_splits_gate_and_up_of_transposed_experts(tmp_path: Path) -> None:
    found = _written(SMALL.model_copy(update={"vision": None}), tmp_path)
    source = load_file(tmp_path / "model.safetensors")
    fused = source["model.layers.1.feed_forward.experts.gate_up_proj"].float().numpy()
    gate, up = np.split(fused.swapaxes(1, 2), 2, axis=1)
    assert np.array_equal(found["blk.1.ffn_gate_exps.weight"].read(), gate)
    assert np.array_equal(found["blk.1.ffn_up_exps.weight"].read(), up)


@pytest.mark.parametrize(
    ("change", "says"),
    [
        ({"clip_qkv": 0.6}, "clip_qkv = None, but the checkpoint has 0.6"),
        ({"norm_topk_prob": True}, "norm_topk_prob = False"),
        ({"head_dim": 24}, "head_dim = 16"),
    ],
)
def test_what_llama_cpp_has_in_its_code_is_refused_otherwise(
    change: dict[str, Any], says: str
) -> None:
    config = {"hidden_size": 64, "num_attention_heads": 4, "norm_topk_prob": False, **change}
    with pytest.raises(ValueError, match=says):
        llamacpp_peer._check(config, llamacpp_peer._fixed_of_olmoe(config))
