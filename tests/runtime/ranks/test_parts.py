"""The weights of all ranks, put together, are those of one process; and who reads which bytes."""

from collections import Counter
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

import moec
from moec.artefact.artefact import Artefact, open_artefact
from moec.runtime.engines import reading
from moec.runtime.engines.weights import load, piece_of
from moec.spec import names
from moec.spec.files import load_scheme
from moec.spec.model import ModelSpec
from moec.spec.sharding import Rank, cut_of, span
from moec.weights.joined import joined_tensors
from moec.weights.random import write_random_checkpoint
from tests.ranks import UNEVEN

pytestmark = pytest.mark.full


@pytest.fixture(scope="module")
def apart(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """An artefact of a checkpoint in FP8 that has experts apart, and scales in bf16."""
    folder = tmp_path_factory.mktemp("apart")
    own = {"layout": "compressed-tensors", "scales": "bf16"}
    spec = UNEVEN.model_copy(update={"scheme": load_scheme("dynamic").model_copy(update=own)})
    write_random_checkpoint(spec, folder / "checkpoint")
    return moec.export(folder / "checkpoint", target="torch", out=folder / "art").path


@pytest.fixture(params=["tiny-scout", "maverick", "uneven", "apart"])
def artefact(request: pytest.FixtureRequest, shared: dict[str, Path], apart: Path) -> Artefact:
    return open_artefact({**shared, "apart": apart}[request.param])


def part_of(spec: ModelSpec, rank: Rank, name: str, whole: Tensor) -> Tensor:
    """What a rank has of a joined tensor, said again for each tensor by itself."""
    text = spec.text

    def own(divided: Any, tensor: Tensor, axis: int) -> Tensor:
        start, stop = span(text, divided, rank)
        return tensor.narrow(axis, start, stop - start)

    def gated(divided: Any, axis: int) -> Tensor:
        return torch.cat([own(divided, half, axis) for half in whole.chunk(2, axis)], axis)

    kind = name.removeprefix("layers.").partition(".")[2].removesuffix("_scale")
    match kind:
        case "attn.qkv.weight":
            queries, keys = text.heads * text.head_dim, text.kv_heads * text.head_dim
            q, k, v = whole.split([queries, keys, keys])
            return torch.cat([own("heads", q, 0), own("kv_heads", k, 0), own("kv_heads", v, 0)])
        case "ffn.gate_up.weight":
            return gated("dense_hidden", 0)
        case "moe.gate_up":
            return gated("hidden", 1)
    if name in (names.EMBED_WEIGHT, names.HEAD_WEIGHT):
        return own("vocab", whole, 0)
    inputs = {"attn.o.weight": "heads", "ffn.down.weight": "dense_hidden", "moe.down": "hidden"}
    if kind in inputs and not names.is_scale(name):
        return own(inputs[kind], whole, -1)
    return whole


def bits(tensor: Tensor) -> Tensor:
    return tensor.contiguous().view(torch.uint8)


@pytest.mark.parametrize("short, block", [(64 << 10, 64 << 20), (64, 1000), (1, 4000)], ids=str)
@pytest.mark.parametrize("count", [2, 4])
def test_ranks_load_their_parts_to_the_bit(
    artefact: Artefact, count: int, short: int, block: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    spec = artefact.manifest.spec
    if spec.text.kv_heads == 3 and count == 4:
        count = 3  # which can share it
    whole = load(artefact)
    assert whole.keys() == joined_tensors(spec).keys()
    monkeypatch.setattr(reading, "SHORT", short)
    monkeypatch.setattr(reading, "BLOCK", block)
    for rank in (Rank(index, count) for index in range(count)):
        found = load(artefact, rank=rank)
        assert found.keys() == whole.keys()
        for name, tensor in found.items():
            expected = part_of(spec, rank, name, whole[name])
            assert (tensor.shape, tensor.dtype) == (expected.shape, expected.dtype), name
            assert torch.equal(bits(tensor), bits(expected)), name


@pytest.mark.parametrize("count", [1, 2, 3])
def test_pieces_of_a_stored_tensor_are_all_of_it(count: int) -> None:
    spec = UNEVEN
    for name, shape in (
        ("layers.0.attn.q.weight", (48, 32)),
        ("layers.0.attn.v.weight_scale", (24,)),
        ("layers.0.attn.o.weight", (32, 48)),
        ("layers.1.moe.gate_up", (5, 30, 32)),
        ("layers.1.moe.gate_up_scale", (5, 30)),
        ("layers.1.moe.down", (5, 32, 15)),
        ("layers.1.moe.experts.3.down.weight", (32, 15)),
        ("layers.1.moe.shared.up.weight", (15, 32)),
        ("embed.weight", (255, 32)),
    ):
        values = torch.arange(torch.Size(shape).numel()).reshape(shape)
        pieces = [piece_of(spec, Rank(index, count), name, shape) for index in range(count)]
        assert torch.equal(
            torch.cat([piece.of(values) for piece in pieces], 1).flatten(), values.flatten()
        ), name
        for piece in pieces:
            assert piece.of(values).numel() == torch.Size(piece.shape).numel()
        assert all(one.stop == two.start for one, two in pairwise(pieces))


def test_a_rank_reads_only_its_own_bytes_where_outputs_are_divided(
    shared: dict[str, Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    artefact, rank = open_artefact(shared["tiny-scout"]), Rank(1, 2)
    spec, read = artefact.manifest.spec, Counter[tuple[Path, int]]()
    single = reading.read_into

    def counted(entry: Any, first: int, out: Tensor) -> None:
        read[entry.file, entry.offset] += out.numel()
        single(entry, first, out)

    monkeypatch.setattr(reading, "read_into", counted)
    monkeypatch.setattr(reading, "SHORT", 100)  # bytes; the model has short rows
    load(artefact, rank=rank)
    stored, halves = artefact.stored(), 0
    for joined in joined_tensors(spec).values():
        for name in joined.sources:
            entry, cut = stored[name], cut_of(name)
            expected = entry.nbytes
            if cut and cut.axis == -2:
                halves += 1
                expected //= 2
            assert read.pop((entry.file, entry.offset)) == expected, name
    assert halves > 12 * spec.text.layers and not read, "and nothing else"
