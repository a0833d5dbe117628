"""All ops that a graph can hold. Each file has one family of ops."""

from moec.graph_builder.ops.attention import (
    attention,
    attention_mask,
    clip,
    head_norm,
    scale_queries,
    temperature,
)
from moec.graph_builder.ops.cache import (
    cache_append,
    cache_index,
    cache_write,
    key_positions,
)
from moec.graph_builder.ops.fp8 import FP8, dequantize, fp8_moe, quantize, token_scale
from moec.graph_builder.ops.fused.attention import attend, attend_fp8, attention_fp8, rope_append
from moec.graph_builder.ops.fused.buffers import (
    buffered_attention,
    columns,
    slot_mask,
    spans_of_mask,
)
from moec.graph_builder.ops.fused.collectives import (
    all_gather,
    all_reduce,
    all_reduce_norm,
    all_reduce_norm_fp8,
    embedding_part,
    likeliest,
    likeliest_part,
    moe_all_reduce_norm_fp8,
    rows_like,
)
from moec.graph_builder.ops.fused.layers import (
    encode,
    fp8_linear,
    moe_layer,
    norm_fp8,
    norm_moe,
    norm_moe_norm_fp8,
    skip_norm_fp8,
    swiglu_fp8,
)
from moec.graph_builder.ops.fused.routed import routed_layer
from moec.graph_builder.ops.fused.slots import cache_put, cache_slot, slot_positions
from moec.graph_builder.ops.heads import head_linear, join_parts, take_part
from moec.graph_builder.ops.int4 import int4_linear, int4_moe
from moec.graph_builder.ops.linear import (
    add,
    gelu,
    layer_norm,
    linear,
    rms_norm,
    skip_norm,
    swiglu,
    to_float32,
)
from moec.graph_builder.ops.moe import moe, ranks, route, separate_moe
from moec.graph_builder.ops.registry import OPS, Op
from moec.graph_builder.ops.rope import rope, rope_table
from moec.graph_builder.ops.tokens import (
    embedding,
    fuse,
    pack,
    positions,
    select,
    unpack,
)
from moec.graph_builder.ops.vision import patch_rope_table, patches, pixel_shuffle, tile_tokens

__all__ = [
    "FP8",
    "OPS",
    "Op",
    "add",
    "all_gather",
    "all_reduce",
    "all_reduce_norm",
    "all_reduce_norm_fp8",
    "attend",
    "attend_fp8",
    "attention",
    "attention_fp8",
    "attention_mask",
    "buffered_attention",
    "cache_append",
    "cache_index",
    "cache_put",
    "cache_slot",
    "cache_write",
    "clip",
    "columns",
    "dequantize",
    "embedding",
    "embedding_part",
    "encode",
    "fp8_linear",
    "fp8_moe",
    "fuse",
    "gelu",
    "head_linear",
    "head_norm",
    "int4_linear",
    "int4_moe",
    "join_parts",
    "key_positions",
    "layer_norm",
    "likeliest",
    "likeliest_part",
    "linear",
    "moe",
    "moe_all_reduce_norm_fp8",
    "moe_layer",
    "norm_fp8",
    "norm_moe",
    "norm_moe_norm_fp8",
    "pack",
    "patch_rope_table",
    "patches",
    "pixel_shuffle",
    "positions",
    "quantize",
    "ranks",
    "rms_norm",
    "rope",
    "rope_append",
    "rope_table",
    "route",
    "routed_layer",
    "rows_like",
    "scale_queries",
    "select",
    "separate_moe",
    "skip_norm",
    "skip_norm_fp8",
    "slot_mask",
    "slot_positions",
    "spans_of_mask",
    "swiglu",
    "swiglu_fp8",
    "take_part",
    "temperature",
    "tile_tokens",
    "to_float32",
    "token_scale",
    "unpack",
]
