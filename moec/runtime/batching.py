"""How tokens are split into calls of a graph: which rows, and which columns of their ids."""

from collections.abc import Iterator

from torch import Tensor

#: tokens of a prompt that go through the graph at once; bounds the memory of masks and logits
PIECE = 1024
#: the same where kernels make no masks and a call should fill a GPU
LONG_PIECE = 8192

Call = tuple[slice, slice]


def padded_calls(width: int, piece: int = PIECE) -> Iterator[Call]:
    """All rows together, `piece` columns at a time; rows that are shorter are padded."""
    for start in range(0, width, piece):
        yield slice(None), slice(start, min(start + piece, width))


def buffered_calls(
    past: Tensor, lengths: Tensor, width: int, ring: int | None, piece: int = PIECE
) -> Iterator[Call]:
    """One column for all rows together; more are appended row by row, and end at chunk borders.

    `past` [B] and `lengths` [B] are the tokens that each row has and gets. A buffer keeps whatever
    a call gives it: there is no padding but in rows that get nothing.
    """
    if width == 1:
        yield slice(None), slice(0, 1)
        return
    for row, (seen, own) in enumerate(zip(past.tolist(), lengths.tolist(), strict=True)):
        start = 0
        while start < own:
            room = ring - (seen + start) % ring if ring else own
            end = start + min(piece, own - start, room)
            yield slice(row, row + 1), slice(start, end)
            start = end
