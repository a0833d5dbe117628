"""How tokens are split into calls: everything once, in order, never across a chunk border."""

import torch
from hypothesis import given
from hypothesis import strategies as st

from moec.runtime.batching import (
    GPU_PLAIN_CHUNK,
    PREFILL_CHUNK,
    Ends,
    buffered_calls,
    ends_of,
    logits_of,
    padded_calls,
)


@given(
    rows=st.lists(st.tuples(st.integers(0, 40), st.integers(0, 40)), min_size=1, max_size=4),
    ring=st.one_of(st.none(), st.integers(1, 16)),
    piece=st.integers(1, 20),
)
def test_every_token_is_called_once_and_no_call_crosses_a_border(
    rows: list[tuple[int, int]], ring: int | None, piece: int
) -> None:
    past, own = (torch.tensor(each) for each in zip(*rows, strict=True))
    width = max(2, int(own.max()))
    done = [0] * len(rows)
    for row, columns in buffered_calls(past, own, width, ring, piece):
        (index,) = range(len(rows))[row]
        assert columns.start == done[index] and 0 < columns.stop - columns.start <= piece
        first, last = (int(past[index]) + c for c in (columns.start, columns.stop - 1))
        assert ring is None or first // ring == last // ring
        done[index] = columns.stop
    assert done == own.tolist()


def test_a_single_column_is_one_call_for_all_rows() -> None:
    calls = list(buffered_calls(torch.tensor([7, 0]), torch.tensor([1, 0]), 1, 8))
    assert calls == [(slice(None), slice(0, 1))]


def test_padded_calls_of_many_rows_are_short_where_chunks_are_long() -> None:
    def widths(rows: int, chunk: int) -> list[int]:
        return [each.stop - each.start for _, each in padded_calls(9000, chunk, rows)]

    assert widths(1, GPU_PLAIN_CHUNK) == [4096, 4096, 808]
    assert widths(32, GPU_PLAIN_CHUNK) == [2048] * 4 + [808]
    assert widths(1000, GPU_PLAIN_CHUNK) == widths(1000, PREFILL_CHUNK) == [1024] * 8 + [808]


def test_padded_calls_take_all_rows() -> None:
    assert [columns for _, columns in padded_calls(5, 2, 1)] == [
        slice(0, 2),
        slice(2, 4),
        slice(4, 5),
    ]


@given(
    lengths=st.lists(st.integers(0, 9), min_size=1, max_size=4).map(torch.tensor),
    piece=st.integers(1, 10),
    apart=st.booleans(),
)
def test_the_last_logits_are_those_of_each_sequences_last_token(
    lengths: torch.Tensor, piece: int, apart: bool
) -> None:
    batch, width = len(lengths), max(2, int(lengths.max()))
    calls = (
        buffered_calls(torch.zeros(batch), lengths, width, None, piece)
        if apart
        else padded_calls(width, piece, batch)
    )
    found: list[Ends] = []
    for rows, columns in calls:
        last = (lengths[rows].clamp(columns.start, columns.stop) - 1).float()
        own = torch.arange(batch)[rows].float()
        ends = ends_of((rows, columns), lengths, torch.stack([own, last], -1)[:, None], found)
        inside = (columns.start < lengths[rows]) & (lengths[rows] <= columns.stop)
        assert torch.equal(ends, inside)
    expected = torch.stack([torch.arange(batch), lengths - 1], -1).float()
    expected[lengths == 0] = 0.0
    assert torch.equal(logits_of(found, batch, 2), expected)
