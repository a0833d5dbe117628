"""From token ids [batch, sequence] to the packed stream [batch*sequence, dim], and back.

The residual stream is packed, because linear layers and experts treat all tokens alike. Only
attention needs to know the sequence and the position of a token.
"""

import torch
from torch import Tensor

from moec.graph_builder.ops.registry import need, op
from moec.graph_builder.types import TensorType, times
from moec.weights.view import TORCH_DTYPES


def _embedding_rule(ids: TensorType, table: TensorType, dtype: str) -> TensorType:
    need(ids.dtype == torch.int64 and len(ids.shape) == 2, "embedding", "ids", ids, "int64 [B, S]")
    need(len(table.shape) == 2, "embedding", "table", table.shape, "[vocab, dim]")
    return TensorType((times(*ids.shape), table.shape[1]), TORCH_DTYPES[dtype])


@op("embedding(Tensor ids, Tensor table, str dtype) -> Tensor", _embedding_rule)
def embedding(ids: Tensor, table: Tensor, dtype: str) -> Tensor:
    """ids [B, S], table [vocab, D] -> [B*S, D] in `dtype`, cast after the look-up."""
    return table[ids.flatten()].to(TORCH_DTYPES[dtype])


def _positions_rule(ids: TensorType, past: TensorType) -> TensorType:
    need(past.shape == ids.shape[:1], "positions", "past", past.shape, ids.shape[:1])
    return TensorType(ids.shape, torch.int64)


@op("positions(Tensor ids, Tensor past) -> Tensor", _positions_rule)
def positions(ids: Tensor, past: Tensor) -> Tensor:
    """ids [B, S] and the number of earlier tokens past [B] -> the position of each token [B, S]."""
    return past[:, None] + torch.arange(ids.shape[1], device=ids.device)


def _unpack_rule(x: TensorType, like: TensorType) -> TensorType:
    rows = like.shape[:2]
    need(x.shape[0] == times(*rows), "unpack", "x", x.shape, f"one row per token of {rows}")
    return x.like(*rows, x.shape[1])


@op("unpack(Tensor x, Tensor like) -> Tensor", _unpack_rule)
def unpack(x: Tensor, like: Tensor) -> Tensor:
    """x [B*S, N], like [B, S, ...] -> [B, S, N]."""
    return x.reshape(*like.shape[:2], x.shape[1]).clone()


def _pack_rule(x: TensorType) -> TensorType:
    need(len(x.shape) == 3, "pack", "x", x.shape, "[B, S, N]")
    return x.like(times(*x.shape[:2]), x.shape[2])


@op("pack(Tensor x) -> Tensor", _pack_rule)
def pack(x: Tensor) -> Tensor:
    """x [B, S, N] -> [B*S, N]."""
    return x.flatten(0, 1).clone()


def _select_rule(x: TensorType, index: TensorType) -> TensorType:
    need(len(x.shape) == 3, "select", "x", x.shape, "[B, S, N]")
    need(index.shape[0] == x.shape[0], "select", "index", index.shape, f"[{x.shape[0]}, M]")
    return x.like(times(*index.shape), x.shape[2])


@op("select(Tensor x, Tensor index) -> Tensor", _select_rule)
def select(x: Tensor, index: Tensor) -> Tensor:
    """x [B, S, N], index [B, M] into S -> packed [B*M, N]: the tokens that need logits."""
    rows = torch.arange(len(x), device=x.device)[:, None]
    return x[rows, index].flatten(0, 1)


def _fuse_rule(
    x: TensorType, ids: TensorType, features: TensorType, image_token: int
) -> TensorType:
    tokens, dim = x.shape
    need(ids.dtype == torch.int64, "fuse", "ids", ids, "int64 [B, S]")
    need(tokens == times(*ids.shape), "fuse", "x", x.shape, f"one row per token of {ids.shape}")
    fits = len(features.shape) == 2 and features.shape[1] == dim and features.dtype == x.dtype
    need(fits, "fuse", "features", features, f"[N, {dim}] of {x.dtype}")
    need(image_token >= 0, "fuse", "image_token", image_token, "a token id")
    return x


@op("fuse(Tensor x, Tensor ids, Tensor features, int image_token) -> Tensor", _fuse_rule)
def fuse(x: Tensor, ids: Tensor, features: Tensor, image_token: int) -> Tensor:
    """Early fusion: embeddings x [B*S, D] of ids [B, S], image features [N, D] -> [B*S, D].

    Image features replace the embeddings where ids are `image_token`, in order, sequence by
    sequence. Without features (N = 0) an image token is a token like any other, as when the model
    itself generates one.

    Raises:
        MoecError: there are features, and their number differs from that of the image tokens.
    """
    out, count = x.clone(), len(features)
    if count:
        at = (ids.flatten() == image_token).nonzero()[:, 0]
        expected = f"{len(at)}, one per image token"
        need(count == len(at), "fuse", "features", f"{count} rows", expected)
        out[at] = features
    return out
