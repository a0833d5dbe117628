"""The op vocabulary: every op that a graph can hold, one family a file."""

from moec.graph_builder.ops.attention import (
    attention,
    attention_mask,
    head_norm,
    scale_queries,
    temperature,
)
from moec.graph_builder.ops.cache import cache_append, cache_index, cache_write, key_positions
from moec.graph_builder.ops.linear import (
    add,
    gelu,
    layer_norm,
    linear,
    rms_norm,
    swiglu,
    to_float32,
)
from moec.graph_builder.ops.moe import moe, route
from moec.graph_builder.ops.registry import OPS, Op
from moec.graph_builder.ops.rope import rope, rope_table
from moec.graph_builder.ops.tokens import embedding, fuse, pack, positions, select, unpack
from moec.graph_builder.ops.vision import patch_rope_table, patches, pixel_shuffle, tile_tokens

__all__ = [
    "OPS",
    "Op",
    "add",
    "attention",
    "attention_mask",
    "cache_append",
    "cache_index",
    "cache_write",
    "embedding",
    "fuse",
    "gelu",
    "head_norm",
    "key_positions",
    "layer_norm",
    "linear",
    "moe",
    "pack",
    "patch_rope_table",
    "patches",
    "pixel_shuffle",
    "positions",
    "rms_norm",
    "rope",
    "rope_table",
    "route",
    "scale_queries",
    "select",
    "swiglu",
    "temperature",
    "tile_tokens",
    "to_float32",
    "unpack",
]
