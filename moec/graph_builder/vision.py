"""The vision tower: it turns tiles of pixels into the features that early fusion puts in the text.

Inputs
    pixel_values    float32 [tiles, channels, height, width]   normalised
Outputs
    image_features  [tiles * tokens, dim]   tile by tile, in the decoder's width and precision

The tower treats each tile as a sequence of its own, without an attention mask. At full size a tile
has 576 patches and a class token; the pixel shuffle makes 144 image tokens of them.
"""

import torch
from torch import fx

from moec.graph_builder import ops
from moec.graph_builder.builder import Builder
from moec.spec import names
from moec.spec.model import ModelSpec
from moec.spec.parameters import vision_parameters
from moec.spec.parts.vision import VisionSpec

#: epsilon of every LayerNorm; the released model does not read the published `norm_eps` either
EPS = 1e-5


def build_vision(spec: ModelSpec, precision: str = "fp32") -> fx.GraphModule:
    """Build the vision tower, adapter and projector of `spec`, which compute in `precision`.

    `spec` must have a vision tower. Weights are on the meta device, in the dtype in which they are
    stored.
    """
    vision, at = spec.vision, names.vision
    assert vision is not None
    b = Builder(vision_parameters(spec), spec.stored)
    shape = ("tiles", vision.channels, vision.image, vision.image)
    pixels = b.input(names.PIXEL_VALUES, shape, torch.float32)

    patches = b.emit(ops.patches, pixels, vision.patch, precision, name=at("pixels"))
    x = b.emit(ops.pack, patches, name=at("pixels", "packed"))
    x = b.emit(ops.linear, x, b.parameter(names.PATCH_WEIGHT), None, name=at("patch"))
    x = b.emit(ops.unpack, x, patches, name=at("patch", "rows"))
    extra = b.parameter(names.CLASS_TOKEN), b.parameter(names.POSITIONS)
    x = b.emit(ops.tile_tokens, x, *extra, name=at("tokens"))
    x = b.emit(ops.pack, x, name=at("tokens", "packed"))
    x = _norm(b, at("pre"), x)

    table = (vision.side, vision.head_dim, vision.rope_theta)
    rope = b.emit_pair(ops.patch_rope_table, patches, *table, name=at("rope"))
    for index in range(vision.layers):
        x = _layer(b, vision, names.vision_layer(index), rope, x)

    x = _norm(b, at("post"), x)
    x = b.emit(ops.unpack, x, rope[0], name=at("post", "rows"))
    x = b.emit(ops.pixel_shuffle, x, vision.side, vision.shuffle, name=at("shuffle"))
    x = b.emit(ops.pack, x, name=at("shuffle", "packed"))
    for part in ("fc1", "fc2"):  # GELU after both
        weight = b.parameter(at("adapter", part, "weight"))
        x = b.emit(ops.linear, x, weight, None, name=at("adapter", part))
        x = b.emit(ops.gelu, x, name=at("adapter", part, "act"))
    projector = b.parameter(names.PROJECTOR_WEIGHT)
    x = b.emit(ops.linear, x, projector, None, name=names.IMAGE_FEATURES)
    return b.output({names.IMAGE_FEATURES: x})


def _layer(
    b: Builder, vision: VisionSpec, at: str, rope: tuple[fx.Node, fx.Node], x: fx.Node
) -> fx.Node:
    h = _norm(b, f"{at}.attn.norm", x)
    rows = {
        part: b.emit(ops.unpack, _linear(b, f"{at}.attn.{part}", h), rope[0], name=name)
        for part in ("q", "k", "v")
        for name in [f"{at}.attn.{part}.rows"]
    }
    for part in ("q", "k"):
        name = f"{at}.attn.{part}.rope"
        rows[part] = b.emit(ops.rope, rows[part], *rope, vision.heads, "adjacent", name=name)
    heads = (vision.heads, vision.heads)
    h = b.emit(ops.attention, *rows.values(), None, *heads, None, name=f"{at}.attn.mix")
    h = _linear(b, f"{at}.attn.o", b.emit(ops.pack, h, name=f"{at}.attn.mix.packed"))
    x = b.emit(ops.add, x, h, name=f"{at}.attn.residual")
    h = _linear(b, f"{at}.mlp.fc1", _norm(b, f"{at}.mlp.norm", x))
    h = _linear(b, f"{at}.mlp.fc2", b.emit(ops.gelu, h, name=f"{at}.mlp.act"))
    return b.emit(ops.add, x, h, name=f"{at}.out")


def _linear(b: Builder, at: str, x: fx.Node) -> fx.Node:
    return b.emit(ops.linear, x, *_biased(b, at), name=at)


def _norm(b: Builder, at: str, x: fx.Node) -> fx.Node:
    return b.emit(ops.layer_norm, x, *_biased(b, at), EPS, name=at)


def _biased(b: Builder, at: str) -> tuple[fx.Node, fx.Node]:
    return b.parameter(f"{at}.weight"), b.parameter(f"{at}.bias")
