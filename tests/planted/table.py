"""The table of faults: 32 and more for target onnx, 30 for target ort, 6 in weights.

A row says what is wrong, in which layer, and which values may be named as the first wrong ones.
The layers are those of examples/tiny-scout: 3 and 7 see all positions and have a temperature, the
others are chunked and have rotary positions and QK-norm.
"""

from tests.planted import attention_faults as attention
from tests.planted import block_faults as block
from tests.planted import model_faults as model
from tests.planted import vision_faults as vision
from tests.planted import weight_faults as weights
from tests.planted.block_faults import epsilon
from tests.planted.fault import Fault

_ROPE = "rope.0 rope.1 rope layers.0.attn.q.rope layers.0.attn.k.rope"
_TEMPERATURE = "temperature layers.3.attn.q.temperature"
_ROUTE = "moe.route"
_HEAD = "head logits"
_FUSED = "fused"

#: faults that both dialects can have
_BOTH = (
    #     name                                kind          plant                    layer  at
    Fault("norm epsilon 1e-3", "norm", epsilon("layers.{}.attn.norm", 1e-3), 1, "attn.norm"),
    Fault("norm epsilon 1e-6", "norm", epsilon("layers.{}.ffn.norm", 1e-6), 0, "ffn.norm"),
    Fault("last norm epsilon 0.1", "norm", epsilon("norm", 0.1), None, "norm"),
    Fault("QK-norm epsilon 1e-3", "QK-norm", epsilon("layers.{}.attn.q.norm", 1e-3), 5,
          "attn.q.norm"),
    Fault("RoPE halves", "RoPE", attention.halves, 1, "attn.q.rope attn.k.rope"),
    Fault("RoPE halves of keys", "RoPE", attention.halves_of_keys, 6, "attn.k.rope"),
    Fault("RoPE base", "RoPE", model.theta_off, None, _ROPE),
    Fault("RoPE sine negated", "RoPE", attention.sine_negated, 2, "attn.q.rope attn.k.rope"),
    Fault("RoPE in a layer without", "RoPE", attention.rope_in_a_layer_without, 3,
          "attn.q.rows attn.k.rows attn.q.temperature attn.k.seen attn.q.rope"),
    Fault("RoPE dropped", "RoPE", attention.rope_dropped, 4, "attn.q.rope attn.k.rope"),
    Fault("positions clipped at 400", "positions", model.positions_clipped, None,
          f"positions {_ROPE} {_TEMPERATURE}"),
    Fault("past ignored in positions", "positions", model.past_ignored, None,
          f"positions {_ROPE} {_TEMPERATURE}"),
    Fault("query norm dropped", "QK-norm", attention.norm_of_queries_dropped, 0, "attn.q.norm"),
    Fault("key norm dropped", "QK-norm", attention.norm_of_keys_dropped, 6, "attn.k.norm"),
    Fault("QK-norm over all heads", "QK-norm", attention.norm_over_all_heads, 2, "attn.q.norm"),
    Fault("temperature dropped", "temperature", attention.temperature_dropped, 7,
          "attn.q.temperature"),
    Fault("temperature in another layer", "temperature", attention.temperature_in_a_layer_without,
          4, "attn.q.norm attn.q.temperature attn.mix"),
    Fault("temperature floor 129", "temperature", model.temperature_floor_off, None, _TEMPERATURE),
    Fault("attention scale 1 %", "attention", attention.scale_off, 6, "attn.mix"),
    Fault("key heads in the wrong order", "attention", attention.key_heads_in_the_wrong_order, 3,
          "attn.mix"),
    Fault("o columns permuted", "attention", attention.columns_of_output_permuted, 5, "attn.o"),
    Fault("o rounded to float16", "cast", attention.rounded_to_half, 2, "attn.o"),
    Fault("attention residual dropped", "residual", attention.residual_dropped, 4,
          "attn.residual ffn.norm"),
    Fault("softmax router", "router", block.softmax_router, 0, _ROUTE),
    Fault("second expert", "router", block.second_expert, 4, _ROUTE),
    Fault("score on output", "experts", block.score_on_output, 3, "moe.routed"),
    Fault("gate and up swapped, routed", "experts", block.routed_gate_and_up_swapped, 1,
          "moe.routed"),
    Fault("experts 3 and 5 swapped", "experts", block.experts_swapped, 6, "moe.routed"),
    Fault("ReLU in routed experts", "experts", block.routed_relu, 7, "moe.routed"),
    Fault("gate and up swapped, shared", "experts", block.shared_gate_and_up_swapped, 7,
          "moe.shared.gate moe.shared.up"),
    Fault("GELU in the shared expert", "experts", block.shared_gelu, 3, "moe.shared.act"),
    Fault("shared expert dropped", "experts", block.shared_dropped, 2, "moe.out"),
    Fault("routed experts dropped", "experts", block.routed_dropped, 5, "moe.out"),
    Fault("second residual dropped", "residual", block.residual_dropped, 1,
          "out layers.2.attn.norm"),
    Fault("embedding row scaled", "embedding", model.embedding_row_scaled, None, "embed fused"),
    Fault("bias of 1e-3 on a logit", "head", model.logit_biased, None, _HEAD),
    Fault("head row replaced", "head", model.head_row_replaced, None, _HEAD),
    Fault("logit_index ignored", "head", model.logit_index_ignored, None, f"selected norm {_HEAD}"),
    Fault("image features shifted", "images", model.images_shifted, None, _FUSED),
    Fault("vision norm epsilon 0.1", "vision", epsilon("vision.layers.{}.mlp.norm", 0.1), 1,
          "vision.mlp.norm", "vision.onnx"),
    Fault("ReLU in the vision tower", "vision", vision.relu, 0, "vision.mlp.act", "vision.onnx"),
    Fault("vision GELU approximated", "vision", vision.gelu_approximated, None,
          "vision.adapter.fc1.act", "vision.onnx"),
)  # fmt: skip

#: the masks, rings and images of plain ONNX
_ONNX_ONLY = (
    Fault("chunk border off by one", "mask", model.chunk_border_off, None,
          "ring.mask layers.0.attn.mix"),
    Fault("next token seen", "mask", attention.mask_sees_the_next_token, 5, "attn.mix"),
    Fault("mask dropped", "mask", attention.mask_dropped, 2, "attn.mix"),
    Fault("chunk ignored in a layer", "mask", attention.mask_of_the_other_kind, 6, "attn.mix"),
    Fault("empty slots seen", "mask", model.empty_slots_seen, None,
          "ring.key_positions global.key_positions ring.mask global.mask layers.0.attn.mix"),
    Fault("lengths ignored in the ring", "cache", model.lengths_ignored, None,
          "ring.index present.0.key present.0.value"),
    Fault("values hold keys", "cache", attention.values_hold_keys, 4,
          "present.4.value attn.v.seen"),
    Fault("ring rotated", "cache", attention.cache_rotated, 2,
          "present.2.key present.2.value attn.k.seen attn.v.seen"),
    Fault("images dropped", "images", model.images_dropped, None, _FUSED),
    Fault("vision positions dropped", "vision", vision.positions_dropped, None, "vision.tokens",
          "vision.onnx"),
    Fault("vision RoPE axes swapped", "vision", vision.rope_axes_swapped, None,
          "vision.rope.0 vision.rope.1 vision.rope vision.layers.0.attn.q.rope", "vision.onnx"),
    Fault("pixel shuffle order", "vision", vision.shuffle_order, None, "vision.shuffle",
          "vision.onnx"),
)  # fmt: skip

#: faults in ONNX Runtime's own operators, in branches of experts, and in the graph for its GenAI
_ORT_ONLY = (
    Fault("RoPE twice", "RoPE", attention.rope_twice, 5, "attn.q.rope attn.k.rope"),
    Fault("RoPE of queries dropped", "RoPE", attention.rope_of_queries_dropped, 0, "attn.q.rope"),
    Fault("temperature without floor", "temperature", model.temperature_without_floor, None,
          _TEMPERATURE),
    Fault("window in a global layer", "attention", attention.window_in_a_global_layer, 7,
          "attn.mix"),
    Fault("scores capped", "attention", attention.scores_capped, 1, "attn.mix"),
    Fault("global layer in ring slots", "cache", attention.spans_of_the_ring, 3,
          "attn.mix present.3.key present.3.value"),
    Fault("values hold keys", "cache", attention.values_hold_keys, 4, "present.4.value attn.mix"),
    Fault("ring rotated", "cache", attention.cache_rotated, 2,
          "present.2.key present.2.value attn.mix"),
    Fault("residual after the norm", "residual", attention.residual_after_norm, 2,
          "attn.residual ffn.norm"),
    Fault("score dropped", "experts", block.score_dropped, 5, "moe.routed"),
    Fault("gate and up of one expert", "experts", block.one_gate_and_up_swapped, 2, "moe.routed"),
    Fault("an expert never runs", "experts", block.an_expert_never_runs, 4, "moe.routed"),
    Fault("first experts lost", "experts", block.first_experts_lost, 0, "moe.routed"),
    Fault("images reversed", "images", model.images_reversed, None, _FUSED),
    Fault("GenAI: norm epsilon 0.1", "GenAI", epsilon("layers.{}.ffn.norm", 0.1), 3, "ffn.norm",
          "genai/model.onnx"),
    Fault("GenAI: RoPE halves", "GenAI", attention.halves, 6, "attn.q.rope attn.k.rope",
          "genai/model.onnx"),
)  # fmt: skip

#: the faults in the graphs of an artefact, by its target
GRAPH = {"onnx": (*_BOTH, *_ONNX_ONLY), "ort": (*_BOTH, *_ORT_ONLY)}

#: the faults in weights, for artefacts that hold their own (mode copy or pack)
WEIGHTS = (
    Fault("expert 4 zeroed", "weights", weights.expert_zeroed, 5,
          "moe.gate_up moe.down moe.routed", ""),
    Fault("experts 2 and 5 swapped", "weights", weights.experts_swapped, 2,
          "moe.gate_up moe.down moe.routed", ""),
    Fault("embedding row replaced", "weights", weights.embedding_row_replaced, None,
          "embed.weight embed fused", ""),
    Fault("head row replaced", "weights", weights.head_row_replaced, None,
          f"head.weight {_HEAD}", ""),
    Fault("norm gain times 1.01", "weights", weights.gain_scaled, 6,
          "ffn.norm ffn.norm.weight", ""),
    Fault("query weights of 0 and 1 exchanged", "weights", weights.queries_exchanged, 0,
          "attn.q attn.q.weight", ""),
)  # fmt: skip
