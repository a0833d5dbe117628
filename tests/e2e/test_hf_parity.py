"""Random models, both engines, against Hugging Face transformers in float32.

transformers runs each row alone and without padding: under left padding it shifts the query
temperature (docs/numerics.md).
"""

import tempfile
from collections.abc import Iterator
from itertools import pairwise
from pathlib import Path

import pytest
import torch
from hypothesis import HealthCheck, assume, example, given, settings
from hypothesis import strategies as st
from torch import Tensor

import moec
from moec.runtime.session import Session
from moec.spec.model import ModelSpec
from moec.spec.presets import PRESETS
from moec.spec.reduced import reduced
from moec.weights.random import write_random_checkpoint
from tests.oracle import relative, routers_are_clear, transformers_logits
from tests.strategies import specs

pytestmark = pytest.mark.full

RELATIVE = 1e-4
MAVERICK = reduced(PRESETS["maverick"])
MAVERICK = MAVERICK.model_copy(
    update={"vision": None, "text": MAVERICK.text.model_copy(update={"layers": 8})}
)
#: a text model without experts, whose embedding is its head, and whose layers all have RoPE
DENSE = ModelSpec.model_validate(
    MAVERICK.model_dump()
    | {
        "name": "dense",
        "text": MAVERICK.text.model_dump()
        | {"ffn": "D", "rope": "R", "qk_norm": "Q", "temperature": "-", "tie_embeddings": True},
    }
)


@settings(max_examples=4, deadline=None, suppress_health_check=list(HealthCheck))
@given(
    spec=specs(),
    seed=st.integers(0, 2**31),
    lengths=st.lists(st.integers(1, 34), min_size=1, max_size=3),
    cuts=st.lists(st.integers(1, 33), max_size=4),
)
@example(spec=MAVERICK, seed=1, lengths=[33, 9, 20], cuts=[7, 8, 9, 25])
@example(spec=DENSE, seed=1, lengths=[33, 9, 20], cuts=[7, 8, 9, 25])
def test_random_models_agree(
    spec: ModelSpec, seed: int, lengths: list[int], cuts: list[int]
) -> None:
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        write_random_checkpoint(spec, folder / "weights", seed)
        generator = torch.Generator().manual_seed(seed)
        rows = [torch.randint(0, spec.text.vocab, (n,), generator=generator) for n in lengths]
        assume(routers_are_clear(folder / "weights", rows))
        expected = transformers_logits(folder / "weights", rows)
        for session in _sessions(folder):
            _check_prefill(session, rows, expected)
            _check_pieces(session, rows, expected, cuts)


@pytest.mark.parametrize("preset", ["scout", pytest.param("maverick", marks=pytest.mark.slow)])
def test_token_by_token_across_three_chunk_borders(preset: str, tmp_path: Path) -> None:
    spec = reduced(PRESETS[preset])
    spec = spec.model_copy(
        update={"vision": None, "text": spec.text.model_copy(update={"layers": 8})}
    )
    write_random_checkpoint(spec, tmp_path / "weights", seed=3)
    chunk = spec.text.chunk or 0
    rows = [torch.randint(0, 256, (n,)) for n in (3 * chunk + 5, 2)]
    expected = transformers_logits(tmp_path / "weights", rows[:1])[0]
    for session in _sessions(tmp_path):
        cache = session.new_cache(1, 1)
        steps = [session.decode(token[None], cache)[0] for token in rows[0]]
        assert relative(torch.stack(steps), expected) < RELATIVE


def _sessions(folder: Path) -> Iterator[Session]:
    """Each engine and target on `folder`/weights."""
    yield moec.open_session(folder / "weights")
    fits = moec.load_spec(folder / "weights").text.head_dim % 8 == 0
    builds = [("onnx", None), *([("ort", None), ("ort", "pack")] if fits else [])]
    for target, weights in builds:
        out = folder / f"{target}-{weights}"
        moec.export(folder / "weights", target=target, weights=weights, out=out)
        yield moec.open_session(out)


def _check_prefill(session: Session, rows: list[Tensor], expected: list[Tensor]) -> None:
    logits = session.logits([row.tolist() for row in rows])
    for got, row, want in zip(logits, rows, expected, strict=True):
        assert relative(torch.as_tensor(got[: len(row)]), want) < RELATIVE


def _check_pieces(
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
