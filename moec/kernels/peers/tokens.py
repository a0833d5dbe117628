"""Tokens whose embedding rows and logits are spread over ranks, in Triton."""

import triton
import triton.language as tl

from moec.kernels.peers.words import arrived, push


@triton.jit
def best_of_block(
    logits,
    values,
    tokens_in,
    VOCAB: tl.constexpr,
    BLOCK: tl.constexpr,
    BLOCKS: tl.constexpr,
):
    """The largest of BLOCK logits, bf16 [rows, VOCAB], and its place; of equal ones the first.

    Grid (rows, BLOCKS). It writes values, float32 [rows, BLOCKS], and tokens_in, int32.
    """
    row, block = tl.program_id(0), tl.program_id(1)
    at = block * BLOCK + tl.arange(0, BLOCK)
    start = row.to(tl.int64) * VOCAB
    found = tl.load(logits + start + at, mask=at < VOCAB, other=float("-inf")).to(tl.float32)
    most, place = tl.max(found, 0, return_indices=True, return_indices_tie_break_left=True)
    tl.store(values + row * BLOCKS + block, most)
    # a place among NaNs is of no use, but it must be one
    tl.store(tokens_in + row * BLOCKS + block, tl.minimum(block * BLOCK + place, VOCAB - 1))


@triton.jit
def likeliest(
    values,
    tokens_in,
    out,
    calls,
    peers,
    FIRST: tl.constexpr,
    BLOCKS: tl.constexpr,
    BLOCKS_2: tl.constexpr,
    RANK: tl.constexpr,
    WORLD: tl.constexpr,
    ROWS: tl.constexpr,
    STORE: tl.constexpr,
    POLL: tl.constexpr,
    KINDS: tl.constexpr,
):
    """The token with the largest logit of all ranks; of equal ones the first.

    Grid (rows). values and tokens_in are what `best_of_block` found in the rank's own part of the
    vocabulary, whose first token is FIRST. It writes out, int64 [rows]. calls and peers are as in
    `all_reduce`; a buffer is int64 [2, WORLD, ROWS, 2].
    """
    row, at = tl.program_id(0), tl.arange(0, 2)
    block = tl.arange(0, BLOCKS_2)
    call = tl.load(calls + row) + 1
    slot = (call & 1) * WORLD
    stride: tl.constexpr = ROWS * 2
    known = block < BLOCKS
    each = tl.load(values + row * BLOCKS + block, mask=known, other=float("-inf"))
    own, place = tl.max(each, 0, return_indices=True, return_indices_tie_break_left=True)
    token = FIRST + tl.load(tokens_in + row * BLOCKS + tl.minimum(place, BLOCKS - 1))
    mine = tl.where(at == 0, own.to(tl.int32, bitcast=True), token)
    inside = at < 2
    push(mine, peers, (slot + RANK) * stride + row * 2 + at, inside, call, RANK, WORLD, STORE)
    here = tl.load(peers + RANK).to(tl.pointer_type(tl.int64)) + row * 2 + at
    got = arrived(here, call, slot, stride, RANK, WORLD, POLL, KINDS, 1)
    best = float("-inf")
    chosen = 0
    for peer in tl.static_range(WORLD):
        both = mine if peer == RANK else got[peer if peer < RANK else peer - 1]
        logit = tl.sum(tl.where(at == 0, both, 0), 0).to(tl.float32, bitcast=True)
        other = tl.sum(tl.where(at == 1, both, 0), 0)
        chosen = tl.where(logit > best, other, chosen)
        best = tl.maximum(logit, best)
    tl.store(out + row, chosen.to(tl.int64))
    tl.store(calls + row, call)


@triton.jit(do_not_specialize=["first"])
def embedding_part(
    ids,
    table,
    out,
    first,
    VOCAB: tl.constexpr,
    DIM: tl.constexpr,
    DIM_2: tl.constexpr,
):
    """Rows of table, bf16 [VOCAB, dim], for ids, int64 [tokens], less `first`; else zeros.

    Grid (tokens). It writes out, bf16 [tokens, dim].
    """
    token, at = tl.program_id(0), tl.arange(0, DIM_2)
    row = tl.load(ids + token) - first
    known = (row >= 0) & (row < VOCAB)
    inside = at < DIM
    values = tl.load(table + row * DIM + at, mask=inside & known, other=0.0)
    tl.store(out + token.to(tl.int64) * DIM + at, values, mask=inside)
