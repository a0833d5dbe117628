"""Shards and indices that would take all memory or time are refused."""

import json
import os
import shutil
from pathlib import Path
from typing import Any

import pytest

from moec.weights.checkpoint import read_checkpoint
from moec.weights.name_map import read_model
from moec.weights.shard import read_shard
from tests.refusals import refusal, within_a_gigabyte

TINY = Path(__file__).parents[2] / "examples" / "tiny-scout"


def entry(shape: Any, end: Any = 10, dtype: Any = "BF16") -> dict[str, Any]:
    return {"a": {"dtype": dtype, "shape": shape, "data_offsets": [0, end]}}


#: what is wrong -> (header, what the message must name)
HEADERS: dict[str, tuple[Any, str]] = {
    "text times a number": (entry(["A", 5_000_000_000]), "a: "),
    "a list times a number": (entry([[0], 5_000_000_000]), "a: "),
    "a huge shape": (entry([2**62, 2**62], 2**125), "a: "),
    "100,000 axes": (entry([2**60] * 100_000), "sizes"),
    "float sizes": (entry([1e300]), "a: "),
    "true sizes": (entry([True]), "a: "),
    "offsets that are huge": (entry([1], 10**90), "a: "),
    "a long dtype": (entry([1], 2, "X" * 10**6), "a"),
    "a million empty tensors": (
        {
            f"t{i}": {"dtype": "BF16", "shape": [0], "data_offsets": [0, 0]}
            for i in range(300_000)
        },
        "values",
    ),
    "objects in objects": (b'{"a":' * 100_000 + b"1" + b"}" * 100_000, "levels"),
    "50 MB of metadata": ({"__metadata__": {"x": "y" * 50_000_000}}, "header of 50"),
    "a tensor twice": (b'{"a": {}, "a": {}}', "twice"),
    "a long name": ({"x" * 10**6: {"dtype": "BF16", "shape": [], "data_offsets": [0, 2]}}, "xxx"),
}  # fmt: skip


@pytest.mark.parametrize("case", HEADERS)
def test_a_header_that_grows_is_refused(tmp_path: Path, case: str) -> None:
    header, names = HEADERS[case]
    raw = header if isinstance(header, bytes) else json.dumps(header).encode()
    path = tmp_path / "model.safetensors"
    path.write_bytes(len(raw).to_bytes(8, "little") + raw + bytes(10))
    with within_a_gigabyte():
        refusal(lambda: read_shard(path), names)


@pytest.mark.parametrize("length", [0, 2**63, 2**64 - 1, 10**9])
def test_a_header_of_an_impossible_length_is_refused(tmp_path: Path, length: int) -> None:
    path = tmp_path / "model.safetensors"
    path.write_bytes(length.to_bytes(8, "little") + b"{}"[: length and 2])
    refusal(lambda: read_shard(path), "model.safetensors")


def test_a_sparse_terabyte_is_compared_with_the_config_alone(tmp_path: Path) -> None:
    shutil.copy(TINY / "config.json", tmp_path)
    raw = json.dumps(entry([5 * 10**11], 10**12)).encode()
    path = tmp_path / "model.safetensors"
    path.write_bytes(len(raw).to_bytes(8, "little") + raw)
    os.truncate(path, 8 + len(raw) + 10**12)
    with within_a_gigabyte():
        refusal(lambda: read_model(tmp_path), "no such tensor")


def test_an_index_of_many_shards_is_refused_at_the_first_that_is_missing(tmp_path: Path) -> None:
    shards = {f"t{i}": f"m{i}.safetensors" for i in range(10**5)}
    (tmp_path / "model.safetensors.index.json").write_text(json.dumps({"weight_map": shards}))
    with within_a_gigabyte():
        refusal(lambda: read_checkpoint(tmp_path), "m0.safetensors")


def test_a_shard_that_is_a_pipe_or_a_device_is_refused(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "pipe.safetensors")
    refusal(lambda: read_shard(tmp_path / "pipe.safetensors"), "a pipe or device")
    refusal(lambda: read_shard(Path("/dev/zero")), "a pipe or device")
