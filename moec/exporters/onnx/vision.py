"""Lower the ops of the vision tower, and early fusion, to plain ONNX operators."""

from collections.abc import Sequence

import onnx_ir as ir
import torch
from torch import fx

from moec.exporters.onnx.lowering import DTYPES, Emitter, Values, type_of
from moec.graph_builder.ops.vision import patch_angles
from moec.graph_builder.types import TensorType

_INT64, _BOOL = torch.int64, torch.bool


def lower_patches(e: Emitter, node: fx.Node, pixels: ir.Value, size: int, _: str) -> ir.Value:
    """Cut pixels [T, C, H, W] of T image tiles into patches [T, patches, C*size*size].

    Here and below, a 0 in a shape constant keeps the size of that axis.
    """
    out: TensorType = node.meta["type"]
    kind = type_of(pixels)
    _, channels, height, width = kind.shape
    cut = (channels, height // size, size, width // size, size)
    grid = _turned(e, pixels, cut, [0, 2, 4, 1, 3, 5])
    shape = e.constant([0, *out.shape[1:]])
    if out.dtype == kind.dtype:
        return e.op("Reshape", [grid, shape], out)
    flat = e.op("Reshape", [grid, shape], kind.like(*out.shape), label="flat")
    return e.op("Cast", [flat], out, to=DTYPES[out.dtype].value)


def lower_tile_tokens(
    e: Emitter, node: fx.Node, x: ir.Value, token: ir.Value, positions: ir.Value
) -> ir.Value:
    """Append the class token [D] to x [T, P, D] and add positions [P + 1, D]: [T, P + 1, D]."""
    out: TensorType = node.meta["type"]
    tiles, _, dim = out.shape
    shape = _tiles_by(e, x, 1, dim)
    token = e.cast(token, out.dtype, "token")
    last = e.op("Expand", [token, shape], out.like(tiles, 1, dim), label="last")
    tokens = e.op("Concat", [x, last], out, label="tokens", axis=1)
    return e.op("Add", [tokens, e.cast(positions, out.dtype, "positions")], out)


def lower_patch_rope_table(
    e: Emitter, node: fx.Node, like: ir.Value, side: int, dim: int, theta: float
) -> Values:
    """Expand the constant tables of cos and sin, [side*side + 1, dim / 2], to all image tiles."""
    kind: TensorType = node.meta["type"][0]
    angles = patch_angles(side, dim, theta)
    shape = _tiles_by(e, like, *angles.shape)
    cos, sin = (
        e.op("Expand", [e.constant(table.numpy()), shape], kind, label=name)
        for name, table in (("cos", angles.cos()), ("sin", angles.sin()))
    )
    return cos, sin


def lower_pixel_shuffle(e: Emitter, node: fx.Node, x: ir.Value, side: int, factor: int) -> ir.Value:
    """Shuffle x [T, side*side + 1, D] to [T, (side/factor)^2, D*factor^2], without class token."""
    out: TensorType = node.meta["type"]
    tiles, count, dim = type_of(x).shape
    inputs = [x, e.constant([0]), e.constant([count - 1]), e.constant([1])]
    x = e.op("Slice", inputs, out.like(tiles, count - 1, dim), label="patches")
    step = side // factor
    cut = (step, factor, step, factor, dim)
    grid = _turned(e, x, cut, [0, 1, 3, 2, 4, 5])
    return e.op("Reshape", [grid, e.constant([0, *out.shape[1:]])], out)


def lower_fuse(
    e: Emitter, node: fx.Node, x: ir.Value, ids: ir.Value, features: ir.Value, token: int
) -> ir.Value:
    """Early fusion: write features [N, D] over the rows of x [T, D] whose token id is `token`.

    If N is 0, x stays as it is. If N is neither 0 nor the number of such rows, ScatterND refuses
    the shapes at run time.
    """
    out: TensorType = node.meta["type"]
    tokens = out.shape[0]
    found, used = f"{e.name}.found", f"{e.name}.used"
    flat = e.op("Reshape", [ids, e.constant([-1])], TensorType((tokens,), _INT64), label="ids")
    hits = e.op("Equal", [flat, e.constant(token)], TensorType((tokens,), _BOOL), label="hits")
    across = e.op("NonZero", [hits], TensorType((1, found), _INT64), label="across")
    rows = e.op("Transpose", [across], TensorType((found, 1), _INT64), label="rows", perm=[1, 0])
    one = TensorType((1,), _INT64)
    count = e.op("Shape", [rows], one, label="count", start=0, end=1)
    given = e.op("Shape", [features], one, label="given", start=0, end=1)
    any_given = e.op("Min", [given, e.constant([1])], one, label="any_given")
    end = e.op("Mul", [count, any_given], one, label="end")
    inputs = [rows, e.constant([0]), end]
    at = e.op("Slice", inputs, TensorType((used, 1), _INT64), label="at")
    return e.op("ScatterND", [x, at, features], out)


def _turned(e: Emitter, x: ir.Value, cut: Sequence[int], order: list[int]) -> ir.Value:
    """Reshape x [T, ...] to a grid [T, *cut] and transpose its axes to `order`."""
    kind = type_of(x)
    grid = e.op("Reshape", [x, e.constant([0, *cut])], kind.like(kind.shape[0], *cut), label="grid")
    turned = kind.like(*((kind.shape[0], *cut)[axis] for axis in order))
    return e.op("Transpose", [grid], turned, label="turned", perm=order)


def _tiles_by(e: Emitter, x: ir.Value, *rest: int) -> ir.Value:
    """The shape [T, *rest], with T the leading size of x."""
    tiles = e.op("Shape", [x], TensorType((1,), _INT64), label="tiles", start=0, end=1)
    kind = TensorType((1 + len(rest),), _INT64)
    return e.op("Concat", [tiles, e.constant(list(rest))], kind, label="shape", axis=0)
