"""A damaged checkpoint gives one clear message, and the disk stays as it was."""

from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

import moec
from tests.damage import (
    EMBED,
    FIRST,
    INDEX,
    NESTED,
    NORMS,
    SECOND,
    Damage,
    cut,
    drop,
    embed,
    folder_instead,
    header,
    listed,
    listed_as,
    offsets,
    put,
    raw_header,
    remove,
    row,
    shard_called,
    share_bytes,
    tensors,
    text,
)
from tests.refusals import refused_and_nothing_left

HOSTILE = "evil\x1b[2J\nerror: all is well"

#: what is wrong -> (damage, what the message must name)
CHECKPOINTS: dict[str, tuple[Damage, str]] = {
    # tensors against the config
    "a tensor is missing": (tensors(lambda held: held.pop(EMBED)), EMBED),
    "an unexpected tensor": (tensors(lambda held: held.update(extra=torch.ones(2))), "extra"),
    "a hostile tensor name": (tensors(lambda held: held.update({HOSTILE: torch.ones(2)})), "evil"),
    "a transposed tensor": (embed(lambda t: t.T), EMBED),
    "another rank": (embed(lambda t: t[None]), EMBED),
    "a row too few": (embed(lambda t: t[1:]), EMBED),
    "no elements": (embed(lambda t: t[:0]), EMBED),
    "another dtype": (embed(lambda t: t.double()), EMBED),
    "integers": (embed(lambda t: t.to(torch.int8)), EMBED),
    "fp8": (embed(lambda t: t.to(torch.float8_e4m3fn)), EMBED),
    # shards cut short
    "an empty shard": (cut(lambda header, size: 0), FIRST),
    "a shard cut in its prefix": (cut(lambda header, size: 5), FIRST),
    "a shard cut after its prefix": (cut(lambda header, size: 8), FIRST),
    "a shard cut in its header": (cut(lambda header, size: 8 + header // 2), FIRST),
    "a shard cut after its header": (cut(lambda header, size: 8 + header), FIRST),
    "a shard cut in its data": (cut(lambda header, size: (8 + header + size) // 2), FIRST),
    "a shard cut by one byte": (cut(lambda header, size: size - 1), FIRST),
    # headers
    "header length beyond the file": (raw_header(b"{}", 10**6), FIRST),
    "header length of 64 bits": (raw_header(b"{}", 2**64 - 1), FIRST),
    "header length zero": (raw_header(b"", 0), FIRST),
    "header that is no JSON": (raw_header(b"not json at all"), FIRST),
    "header that is no text": (raw_header(b"\xff\xfe\x00\x80"), FIRST),
    "header that is a list": (raw_header(b"[1, 2]"), FIRST),
    "header that is null": (raw_header(b"null"), FIRST),
    "header nested without end": (raw_header(NESTED.encode()), FIRST),
    "header without tensors": (raw_header(b"{}"), FIRST),
    "row that is a list": (header(lambda rows: rows.update({EMBED: [1, 2]})), FIRST),
    "row that is null": (header(lambda rows: rows.update({EMBED: None})), FIRST),
    "row without dtype": (header(lambda rows: rows[EMBED].pop("dtype")), FIRST),
    "row without shape": (header(lambda rows: rows[EMBED].pop("shape")), FIRST),
    "row without offsets": (header(lambda rows: rows[EMBED].pop("data_offsets")), FIRST),
    "unknown dtype": (row("dtype", "Q4_K"), EMBED),
    "dtype that is a list": (row("dtype", ["BF16"]), FIRST),
    "dtype that is a number": (row("dtype", 16), EMBED),
    "shape that disagrees with the offsets": (row("shape", [256, 31]), EMBED),
    "negative sizes": (row("shape", [-256, -32]), EMBED),
    "sizes that are no integers": (row("shape", [256.0, 32.0]), EMBED),
    "sizes that are text": (row("shape", ["256", "32"]), FIRST),
    "shape that is a number": (row("shape", 8192), FIRST),
    "shape of 10 ** 60 elements": (row("shape", [10**30, 10**30]), EMBED),
    "negative offsets": (offsets(lambda a, b, size: [-2, b - a - 2]), EMBED),
    "offsets that end first": (offsets(lambda a, b, size: [b, a]), EMBED),
    "offsets beyond the end": (offsets(lambda a, b, size: [a + 10**9, b + 10**9]), EMBED),
    "offsets across the end": (offsets(lambda a, b, size: [size - 2, size - 2 + b - a]), EMBED),
    "offsets too close": (offsets(lambda a, b, size: [a, b - 2]), EMBED),
    "offsets too far apart": (offsets(lambda a, b, size: [a, b + 2]), EMBED),
    "one offset": (offsets(lambda a, b, size: [a]), FIRST),
    "three offsets": (offsets(lambda a, b, size: [a, b, b]), FIRST),
    "offsets that are text": (offsets(lambda a, b, size: [str(a), str(b)]), FIRST),
    "offsets that are no integers": (offsets(lambda a, b, size: [float(a), float(b)]), EMBED),
    "offsets that are NaN": (offsets(lambda a, b, size: [float("nan")] * 2), EMBED),
    "two tensors on the same bytes": (header(share_bytes), FIRST),
    # the index, and which files there are
    "a missing shard": (remove(SECOND), SECOND),
    "a shard that is a folder": (folder_instead(SECOND), SECOND),
    "a link to nowhere": (
        lambda folder: ((folder / SECOND).unlink(), (folder / SECOND).symlink_to("gone")),
        SECOND,
    ),
    "no weights at all": (
        lambda folder: [(folder / name).unlink() for name in (INDEX, FIRST, SECOND)],
        INDEX,
    ),
    "an index that leaves the folder": (listed_as("../checkpoint/" + FIRST), "../checkpoint"),
    "an index that leaves it further down": (listed_as("a/../../x.safetensors"), "a/../../x"),
    "an index with an absolute path": (listed_as("/etc/passwd"), "/etc/passwd"),
    "an index with a backslash": (listed_as("..\\x.safetensors"), "x.safetensors"),
    "an index with a drive": (listed_as("C:\\x.safetensors"), "x.safetensors"),
    "an index with a zero byte": (listed_as("x\0.safetensors"), EMBED),
    "an index with an endless name": (listed_as("x" * 5000), EMBED),
    "an index with an empty name": (listed_as(""), EMBED),
    "an index with a number": (listed_as(1), EMBED),
    "an index with a list": (listed_as([FIRST]), EMBED),
    "an index with null": (listed_as(None), EMBED),
    "an index that names the folder": (listed_as("."), "checkpoint"),
    "an index that names a file of another kind": (listed_as("config.json"), "config.json"),
    "an empty weight_map": (put(INDEX, "weight_map", {}), "weight_map"),
    "a weight_map that is a list": (put(INDEX, "weight_map", [FIRST]), "weight_map"),
    "no weight_map": (drop(INDEX, "weight_map"), "weight_map"),
    "a shard whose name is not UTF-8": (
        put(INDEX, "weight_map", {"embed": "model\udcff.safetensors"}),
        INDEX,
    ),
    "generation_config.json with half a character": (
        text("generation_config.json", r'{"x\ud800": 5}'),
        "generation_config.json",
    ),
    "a note with half a character": (put("config.json", "unsloth_\ud800", 5), "config.json"),
    "an index that is no JSON": (text(INDEX, '{"weight_map": '), INDEX),
    "an index that is a list": (text(INDEX, "[]"), INDEX),
    "an index nested without end": (text(INDEX, NESTED), INDEX),
    "an index that is no text": (text(INDEX, b"\xff\xfe\x00"), INDEX),
    "an index that is a folder": (folder_instead(INDEX), INDEX),
    "a tensor listed, not in its shard": (listed_as(SECOND), EMBED),
    "a tensor listed, in no shard": (listed(lambda weight_map: weight_map.update(x=FIRST)), "x"),
    "a tensor in a shard, not listed": (listed(lambda weight_map: weight_map.pop(EMBED)), EMBED),
    "a shard called like the model": (shard_called("model.onnx"), "model.onnx"),
    "a shard called like the manifest": (shard_called("manifest.json"), "manifest.json"),
}  # fmt: skip


@pytest.mark.parametrize("case", CHECKPOINTS)
def test_a_broken_checkpoint_is_refused(checkpoint: Path, tmp_path: Path, case: str) -> None:
    damage, names = CHECKPOINTS[case]
    damage(checkpoint)
    refused_and_nothing_left(
        tmp_path, lambda: moec.export(checkpoint, out=tmp_path / "out", weights="copy"), names
    )


def test_what_the_tables_damage_was_sound(checkpoint: Path, tmp_path: Path) -> None:
    assert moec.export(checkpoint, out=tmp_path / "out", weights="copy").path.is_dir()
    assert load_file(checkpoint / FIRST).keys() >= {EMBED, *NORMS}
