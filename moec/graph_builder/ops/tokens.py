"""Between rows of tokens [batch, sequence] and the packed stream [batch*sequence, dim].

The residual stream is packed because linear layers and experts treat tokens alike; only attention
needs to know which row and position a token has.
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
    """ids [B, S], past [B] tokens seen before -> each token's true position [B, S]."""
    return past[:, None] + torch.arange(ids.shape[1], device=ids.device)


def _unpack_rule(x: TensorType, ids: TensorType) -> TensorType:
    need(
        x.shape[0] == times(*ids.shape), "unpack", "x", x.shape, f"one row per token of {ids.shape}"
    )
    return x.like(*ids.shape, x.shape[1])


@op("unpack(Tensor x, Tensor ids) -> Tensor", _unpack_rule)
def unpack(x: Tensor, ids: Tensor) -> Tensor:
    """x [B*S, N], ids [B, S] -> [B, S, N]."""
    return x.reshape(*ids.shape, x.shape[1]).clone()


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
