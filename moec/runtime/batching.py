"""Split the tokens of a batch into calls of a graph, in prefill chunks.

A call is a pair of slices over the token ids [B, S]: which sequences, and which of their tokens.
"""

from collections.abc import Iterator

import torch
from torch import Tensor

#: tokens of a prefill chunk; the limit bounds the memory of masks and logits
PREFILL_CHUNK = 1024
#: tokens of a prefill chunk on a GPU, whose kernels make no masks, and which a call should fill
GPU_PREFILL_CHUNK = 8192
#: the same for programs whose attention has masks
GPU_PLAIN_CHUNK = 4096
#: prefill chunks longer than `PREFILL_CHUNK` are cut until a call has no more tokens than this
MOST_AT_ONCE = 64 * PREFILL_CHUNK

Call = tuple[slice, slice]
#: the sequences that end in a call, by number, and the logits of their last tokens
Ends = tuple[Tensor, Tensor]


def padded_calls(width: int, prefill_chunk: int | None, rows: int) -> Iterator[Call]:
    """Calls for all `rows` together, `prefill_chunk` of `width` tokens at a time, or all at once.

    Shorter sequences are padded. Chunks longer than `PREFILL_CHUNK` are cut for many rows.
    """
    if prefill_chunk is None:
        most = width
    else:
        most = min(prefill_chunk, max(PREFILL_CHUNK, MOST_AT_ONCE // rows))
    for start in range(0, width, most):
        yield slice(None), slice(start, min(start + most, width))


def buffered_calls(
    past: Tensor, lengths: Tensor, width: int, ring: int | None, prefill_chunk: int = PREFILL_CHUNK
) -> Iterator[Call]:
    """Calls for caches that are buffers, which would keep padding as if it were tokens.

    If `width` is 1, one call decodes a token of every sequence. Otherwise each sequence has calls
    of its own, without padding. No call crosses a border of the attention chunks of `ring` tokens;
    None stands for a model without such layers.

    `past` [B] counts the tokens that each sequence already has, `lengths` [B] those that it gets.
    """
    if width == 1:
        yield slice(None), slice(0, 1)
        return
    for row, (seen, own) in enumerate(zip(past.tolist(), lengths.tolist(), strict=True)):
        start = 0
        while start < own:
            room = ring - (seen + start) % ring if ring else own
            end = start + min(prefill_chunk, own - start, room)
            yield slice(row, row + 1), slice(start, end)
            start = end


def ends_of(call: Call, lengths: Tensor, logits: Tensor, found: list[Ends]) -> Tensor:
    """Which sequences of a call end in it, bool; their logits are added to `found`, on the host.

    `lengths` [B] are those of all sequences, `logits` [rows, 1, vocab] those of the call. Nothing
    waits for a call in which no sequence ends.
    """
    rows, columns = call
    ends: Tensor = (lengths[rows] > columns.start) & (lengths[rows] <= columns.stop)
    if ends.any():
        last = logits[:, 0] if ends.all() else logits[ends.to(logits.device), 0]
        found.append((torch.arange(len(lengths))[rows][ends], last.to("cpu", copy=True)))
    return ends


def logits_of(found: list[Ends], batch: int, vocab: int) -> Tensor:
    """The logits of each sequence's last token, float32 [batch, vocab]; zeros of those without."""
    if len(found) == 1 and len(found[0][0]) == batch:
        return found[0][1]  # a large tensor on the host is slow to make
    whole = torch.zeros(batch, vocab)
    for rows, logits in found:
        whole[rows] = logits
    return whole
