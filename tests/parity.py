"""Compare every engine with the logits of an oracle: in one call, and in pieces through caches."""

from collections.abc import Iterator
from itertools import pairwise
from pathlib import Path

import torch
from torch import Tensor

import moec
from moec.runtime.session import Session
from tests.oracle import relative

RELATIVE = 1e-4


def sessions(folder: Path, *more: str) -> Iterator[Session]:
    """Each engine and target on `folder`/weights in float32; also the targets `more`."""
    yield moec.open_session(folder / "weights")
    fits = moec.load_spec(folder / "weights").text.head_dim % 8 == 0
    builds = [("onnx", None), *([("ort", None), ("ort", "pack")] if fits else [])]
    for target, weights in [*builds, *((name, None) for name in more)]:
        out = folder / f"{target}-{weights}"
        moec.export(folder / "weights", target, "fp32", out, weights=weights)
        yield moec.open_session(out)


def check_prefill(session: Session, rows: list[Tensor], expected: list[Tensor]) -> None:
    """All rows in one call, padded on the right."""
    logits = session.logits([row.tolist() for row in rows])
    for got, row, want in zip(logits, rows, expected, strict=True):
        assert relative(torch.as_tensor(got[: len(row)]), want) < RELATIVE


def check_pieces(
    session: Session, rows: list[Tensor], expected: list[Tensor], cuts: list[int]
) -> None:
    """The same tokens in pieces through the caches: rows end in different pieces."""
    longest = max(map(len, rows))
    ids = torch.stack([torch.nn.functional.pad(row, (0, longest - len(row))) for row in rows])
    lengths = torch.tensor([len(row) for row in rows])
    cache = session.new_cache(len(rows), 1)
    edges = [0, *sorted({cut for cut in cuts if cut < longest}), longest]
    for start, end in pairwise(edges):
        own = (lengths - start).clamp(0, end - start)
        got = session.extend(ids[:, start:end], own, cache)
        for index, count in enumerate(own.tolist()):
            if count:
                assert relative(got[index], expected[index][start + count - 1]) < RELATIVE
    assert torch.equal(cache.lengths, lengths)
