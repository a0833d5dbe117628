"""Every bad input gives one clear message, exit code 2, and leaves the disk as it was."""

import contextlib
import hashlib
import json
import os
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

import moec
from moec.runtime.session import Session
from moec.spec.errors import MoecError
from moec.spec.files import dump_yaml
from moec.spec.presets import PRESETS
from moec.spec.twin import twin
from moec.weights.random import write_random_checkpoint
from tests.refusals import one_message, refusal

ROOT = Path(__file__).parents[2]
SPEC = twin(PRESETS["tiny-scout"])
FIRST, SECOND = "model-00001-of-00002.safetensors", "model-00002-of-00002.safetensors"
INDEX = "model.safetensors.index.json"
EMBED = "language_model.model.embed_tokens.weight"
NORMS = tuple(f"language_model.model.layers.{i}.input_layernorm.weight" for i in (0, 1))
NESTED = "[" * 200_000
HUGE = 10**400  # an int that no float can hold

#: damages a copy of a sound checkpoint or artefact
Damage = Callable[[Path], object]


def tree(folder: Path) -> dict[str, str]:
    """Everything below `folder`, hidden files and links too, with what it holds."""
    found = {}
    for path in sorted(folder.rglob("*")):
        if path.is_symlink():
            what = f"link to {os.readlink(path)}"
        else:
            what = hashlib.sha256(path.read_bytes()).hexdigest() if path.is_file() else "folder"
        found[path.relative_to(folder).as_posix()] = what
    return found


@pytest.fixture(scope="module")
def sound(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A checkpoint of two shards and an index, with nothing wrong."""
    folder = tmp_path_factory.mktemp("sound") / "checkpoint"
    write_random_checkpoint(SPEC, folder)
    single = folder / "model.safetensors"
    tensors = load_file(single)
    names = [EMBED, *sorted(set(tensors) - {EMBED})]
    halves = {FIRST: names[: len(names) // 2], SECOND: names[len(names) // 2 :]}
    for name, half in halves.items():
        save_file({key: tensors[key] for key in half}, folder / name)
    single.unlink()
    weight_map = {key: name for name, half in halves.items() for key in half}
    (folder / INDEX).write_text(json.dumps({"metadata": {}, "weight_map": weight_map}))
    return folder


@pytest.fixture
def checkpoint(sound: Path, tmp_path: Path) -> Path:
    """A copy of `sound` to be damaged; its parent holds nothing else."""
    return Path(shutil.copytree(sound, tmp_path / "checkpoint"))


@pytest.fixture(scope="module")
def built(sound: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """An artefact that holds its own weights."""
    return moec.export(sound, out=tmp_path_factory.mktemp("built") / "art", weights="copy").path


@pytest.fixture
def artefact(built: Path, tmp_path: Path) -> Path:
    """A copy of `built` to be damaged."""
    return Path(shutil.copytree(built, tmp_path / "art"))


@pytest.fixture(scope="module")
def session(built: Path) -> Session:
    return moec.open_session(built)


# ---------------------------------------------------------------- ways to damage a checkpoint


def json_file(name: str, change: Callable[[dict[str, Any]], object]) -> Damage:
    """Change the JSON object in file `name`."""

    def damage(folder: Path) -> None:
        value = json.loads((folder / name).read_text())
        change(value)
        (folder / name).write_text(json.dumps(value))

    return damage


def put(name: str, dotted: str, value: object) -> Damage:
    """Set field `dotted` of the JSON file `name`."""

    def change(values: dict[str, Any]) -> None:
        *outer, last = dotted.split(".")
        for key in outer:
            values = values[key]
        values[last] = value

    return json_file(name, change)


def drop(name: str, dotted: str) -> Damage:
    """Remove field `dotted` of the JSON file `name`."""

    def change(values: dict[str, Any]) -> None:
        *outer, last = dotted.split(".")
        for key in outer:
            values = values[key]
        del values[last]

    return json_file(name, change)


def text(name: str, content: str | bytes) -> Damage:
    """Write `content` to file `name`."""
    raw = content.encode() if isinstance(content, str) else content
    return lambda folder: (folder / name).write_bytes(raw)


def remove(name: str) -> Damage:
    return lambda folder: (folder / name).unlink()


def folder_instead(name: str) -> Damage:
    """A folder where file `name` should be."""
    return lambda folder: ((folder / name).unlink(), (folder / name).mkdir())


def cut(where: Callable[[int, int], int]) -> Damage:
    """Cut the first shard after `where(length of the header, size of the file)` bytes."""

    def damage(folder: Path) -> None:
        raw = (folder / FIRST).read_bytes()
        (folder / FIRST).write_bytes(raw[: where(int.from_bytes(raw[:8], "little"), len(raw))])

    return damage


def raw_header(header: bytes, length: int | None = None) -> Damage:
    """Replace the first shard's header, or only the length that it states."""

    def damage(folder: Path) -> None:
        raw = (folder / FIRST).read_bytes()
        data = raw[8 + int.from_bytes(raw[:8], "little") :]
        stated = len(header) if length is None else length
        (folder / FIRST).write_bytes(stated.to_bytes(8, "little") + header + data)

    return damage


def header(change: Callable[[dict[str, Any]], object]) -> Damage:
    """Change the first shard's header; the data stay."""

    def damage(folder: Path) -> None:
        raw = (folder / FIRST).read_bytes()
        rows = json.loads(raw[8 : 8 + int.from_bytes(raw[:8], "little")])
        change(rows)
        raw_header(json.dumps(rows).encode())(folder)

    return damage


def row(field: str, value: object) -> Damage:
    """Set one field of the embedding's row in the first shard's header."""
    return header(lambda rows: rows[EMBED].update({field: value}))


def offsets(change: Callable[[int, int, int], list[Any]]) -> Damage:
    """Change the embedding's start and end, given these and the size of all data."""

    def changed(rows: dict[str, Any]) -> None:
        size = max(row["data_offsets"][1] for row in rows.values() if "data_offsets" in row)
        rows[EMBED]["data_offsets"] = change(*rows[EMBED]["data_offsets"], size)

    return header(changed)


def share_bytes(rows: dict[str, Any]) -> None:
    rows[NORMS[0]]["data_offsets"] = rows[NORMS[1]]["data_offsets"]


def tensors(change: Callable[[dict[str, torch.Tensor]], object]) -> Damage:
    """Change the first shard's tensors and keep the index in step with it."""

    def damage(folder: Path) -> None:
        held = load_file(folder / FIRST)
        change(held)
        save_file(held, folder / FIRST)
        index = json.loads((folder / INDEX).read_text())
        kept = {key: name for key, name in index["weight_map"].items() if name != FIRST}
        index["weight_map"] = kept | dict.fromkeys(held, FIRST)
        (folder / INDEX).write_text(json.dumps(index))

    return damage


def embed(change: Callable[[torch.Tensor], torch.Tensor]) -> Damage:
    return tensors(lambda held: held.update({EMBED: change(held[EMBED]).contiguous()}))


def listed(change: Callable[[dict[str, Any]], object]) -> Damage:
    """Change the index's weight_map."""
    return json_file(INDEX, lambda index: change(index["weight_map"]))


def listed_as(name: object) -> Damage:
    """Let the index say that the embedding is in `name`."""
    return listed(lambda weight_map: weight_map.update({EMBED: name}))


def shard_called(name: str) -> Damage:
    """Rename the first shard, in the index too."""

    def damage(folder: Path) -> None:
        (folder / FIRST).rename(folder / name)
        index = json.loads((folder / INDEX).read_text())
        for key, shard in index["weight_map"].items():
            index["weight_map"][key] = name if shard == FIRST else shard
        (folder / INDEX).write_text(json.dumps(index))

    return damage


def config(dotted: str, value: object) -> Damage:
    return put("config.json", dotted, value)


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
    "another dtype of the same width": (embed(lambda t: t.half()), EMBED),
    "another dtype of another width": (embed(lambda t: t.float()), EMBED),
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
    "header without tensors": (raw_header(b"{}"), INDEX),
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
    # config.json as a file
    "no config": (remove("config.json"), "config.json"),
    "a config that is a folder": (folder_instead("config.json"), "config.json"),
    "an empty config": (text("config.json", ""), "config.json"),
    "a config that is no JSON": (text("config.json", '{"model_type": "llama4",}'), "config.json"),
    "a config that is a list": (text("config.json", "[{}]"), "config.json"),
    "a config that is null": (text("config.json", "null"), "config.json"),
    "a config that is no text": (text("config.json", b"\xff\xfe{}"), "config.json"),
    "a config nested without end": (text("config.json", NESTED), "config.json"),
    # its fields
    "an unknown field": (config("sparkle", 3), "sparkle"),
    "an unknown text field": (config("text_config.sparkle", 3), "text_config.sparkle"),
    "an unknown vision field": (config("vision_config.sparkle", 3), "vision_config.sparkle"),
    "an unknown rope field": (
        config("text_config.rope_scaling.sparkle", 3),
        "text_config.rope_scaling.sparkle",
    ),
    "no model_type": (drop("config.json", "model_type"), "model_type"),
    "a model_type of another family": (config("model_type", "llama3"), "'llama3'"),
    "a model_type that is a number": (config("model_type", 4), "model_type"),
    "no text_config": (drop("config.json", "text_config"), "text_config"),
    "a text_config that is a list": (config("text_config", []), "text_config"),
    "no vision_config": (drop("config.json", "vision_config"), "vision_config"),
    "text for an int": (config("text_config.hidden_size", "32"), "text_config.hidden_size"),
    "a bool for an int": (config("text_config.num_hidden_layers", True), "num_hidden_layers"),
    "a float for an int": (config("text_config.vocab_size", 256.0), "text_config.vocab_size"),
    "a list for an int": (config("vision_config.patch_size", [14]), "vision_config.patch_size"),
    "an int for a bool": (config("text_config.use_qk_norm", 1), "text_config.use_qk_norm"),
    "text for a float": (config("text_config.rope_theta", "5e5"), "text_config.rope_theta"),
    "a bool for a float": (config("text_config.rms_norm_eps", True), "text_config.rms_norm_eps"),
    "text for a token id": (config("text_config.bos_token_id", "1"), "bos"),
    "a bool for a token id": (config("text_config.pad_token_id", True), "pad"),
    "text in a list of token ids": (config("text_config.eos_token_id", ["1"]), "eos"),
    "NaN": (config("text_config.rms_norm_eps", float("nan")), "norm_eps"),
    "infinity": (config("text_config.rope_theta", float("inf")), "rope_theta"),
    "NaN in rope_scaling": (config("text_config.rope_scaling.factor", float("nan")), "factor"),
    "NaN in the vision config": (
        config("vision_config.pixel_shuffle_ratio", float("nan")),
        "pixel_shuffle_ratio",
    ),
    "a ratio without an inverse": (
        config("vision_config.pixel_shuffle_ratio", 1e-320),
        "pixel_shuffle_ratio",
    ),
    "a ratio that is no 1/n": (
        config("vision_config.pixel_shuffle_ratio", 0.4),
        "pixel_shuffle_ratio",
    ),
    "a number that no float holds": (config("text_config.rope_theta", HUGE), "rope_theta"),
    "no layers": (config("text_config.num_hidden_layers", 0), "num_hidden_layers"),
    "a negative number of layers": (config("text_config.num_hidden_layers", -8), "-8"),
    "a width of zero": (config("text_config.hidden_size", 0), "hidden_size"),
    "a vision width of zero": (config("vision_config.hidden_size", 0), "hidden_size"),
    "a width of the experts of zero": (config("text_config.intermediate_size", 0), "intermediate"),
    "heads that do not divide": (config("text_config.num_key_value_heads", 3), "kv_heads 3"),
    "more experts a token than there are": (config("text_config.num_experts_per_tok", 99), "99"),
    "an image that patches do not cover": (config("vision_config.image_size", 57), "57"),
    "a quantised checkpoint": (
        config("quantization_config", {"quant_method": "fp8"}),
        "quantised (fp8)",
    ),
    "a quantised checkpoint, badly said": (config("quantization_config", "fp8"), "quantization"),
    "a quantised text model": (
        config("text_config.quantization_config", {"quant_method": "fp8"}),
        "quantization_config",
    ),
    "an unsupported activation": (config("text_config.hidden_act", "gelu"), "hidden_act"),
    "an unsupported rope_type": (config("text_config.rope_scaling.rope_type", "yarn"), "'yarn'"),
    "no rope_type": (drop("config.json", "text_config.rope_scaling.rope_type"), "rope_type"),
    "rope_scaling that is text": (config("text_config.rope_scaling", "llama3"), "rope_scaling"),
    "an unsupported dtype": (config("text_config.torch_dtype", "float8_e4m3fn"), "float8_e4m3fn"),
    "two dtypes": (config("torch_dtype", "float16"), "float16"),
    "layer_types of wrong length": (
        config("text_config.layer_types", ["full_attention"] * 7),
        "layer_types",
    ),
    "an unknown layer type": (
        config("text_config.layer_types", ["sliding_attention"] * 8),
        "'sliding_attention'",
    ),
    "layer_types that are lists": (config("text_config.layer_types", [[]] * 8), "layer_types"),
    "layer_types of two kinds": (
        config("text_config.layer_types", [1, *["full_attention"] * 7]),
        "layer_types",
    ),
    "chunked layers without a chunk": (config("text_config.attention_chunk_size", None), "chunk"),
    "no_rope_layers too short": (config("text_config.no_rope_layers", [1, 1, 1]), "no_rope_layers"),
    "no_rope_layers beside 0 and 1": (config("text_config.no_rope_layers", [2] * 8), "0 or 1"),
    "moe_layers out of range": (config("text_config.moe_layers", [0, 8]), "moe_layers"),
    "moe_layers below zero": (config("text_config.moe_layers", [-1]), "moe_layers"),
    "moe_layers that are text": (config("text_config.moe_layers", ["0"]), "moe_layers"),
    "an image token that is text": (config("image_token_index", "<|patch|>"), "image_token_index"),
    "an image token out of range": (config("image_token_index", 256), "tokens.image is 256"),
    "an image token below zero": (config("image_token_index", -1), "tokens.image is -1"),
}  # fmt: skip

#: fields that no config may leave out
REQUIRED = [
    "image_token_index",
    *(
        f"text_config.{name}"
        for name in """
        head_dim hidden_act hidden_size intermediate_size intermediate_size_mlp
        interleave_moe_layer_step max_position_embeddings num_attention_heads num_experts_per_tok
        num_hidden_layers num_key_value_heads num_local_experts rms_norm_eps rope_theta
        use_qk_norm vocab_size
        """.split()
    ),
    *(
        f"vision_config.{name}"
        for name in """
        hidden_act hidden_size image_size intermediate_size num_attention_heads num_channels
        num_hidden_layers patch_size pixel_shuffle_ratio projector_input_dim projector_output_dim
        rope_theta vision_feature_select_strategy vision_output_dim
        """.split()
    ),
]


def refused_and_nothing_left(
    world: Path, call: Callable[[], object], names: str, code: int = 2
) -> None:
    """`call` is refused, and everything below `world` is as it was."""
    before = tree(world)
    refusal(call, names, code)
    assert tree(world) == before, "the disk is as it was"


@pytest.mark.parametrize("case", CHECKPOINTS)
def test_a_broken_checkpoint_is_refused(checkpoint: Path, tmp_path: Path, case: str) -> None:
    damage, names = CHECKPOINTS[case]
    damage(checkpoint)
    refused_and_nothing_left(
        tmp_path, lambda: moec.export(checkpoint, out=tmp_path / "out", weights="copy"), names
    )


@pytest.mark.parametrize("field", REQUIRED)
def test_a_config_without_a_field_is_refused(checkpoint: Path, tmp_path: Path, field: str) -> None:
    drop("config.json", field)(checkpoint)
    refused_and_nothing_left(
        tmp_path, lambda: moec.export(checkpoint, out=tmp_path / "out"), field.split(".")[-1]
    )


def test_what_the_tables_damage_was_sound(checkpoint: Path, tmp_path: Path) -> None:
    assert moec.export(checkpoint, out=tmp_path / "out", weights="copy").path.is_dir()
    assert load_file(checkpoint / FIRST).keys() >= {EMBED, *NORMS}


@pytest.mark.parametrize("name", ["model.onnx", "manifest.json", "config.json.safetensors"])
def test_hard_links_never_write_to_the_checkpoint(
    checkpoint: Path, tmp_path: Path, name: str
) -> None:
    art = moec.export(checkpoint, out=tmp_path / "art").path
    shard_called(name)(checkpoint)
    before = tree(checkpoint)
    with contextlib.suppress(MoecError):
        moec.bind(art, checkpoint, weights="link")
    assert tree(checkpoint) == before


# ---------------------------------------------------------------- spec files


SPEC_FILES: dict[str, tuple[str, str | bytes, str]] = {
    "broken YAML": ("x.yaml", "name: [", "x.yaml"),
    "broken JSON": ("x.json", "{", "x.json"),
    "no text": ("x.yaml", b"\xff\xfe\x00", "x.yaml"),
    "a list": ("x.yaml", "- 1", "x.yaml"),
    "empty": ("x.yaml", "", "x.yaml"),
    "YAML that builds objects": ("x.yaml", "!!python/object/apply:os.getcwd []", "x.yaml"),
    "YAML nested without end": ("x.yaml", NESTED, "x.yaml"),
    "JSON nested without end": ("x.json", NESTED, "x.json"),
    "an unknown field": ("x.yaml", dump_yaml(SPEC) + "sparkle: 3\n", "sparkle"),
    "a missing field": ("x.yaml", "name: x\nprovenance: custom\ndtype: bf16\n", "text"),
    "NaN": ("x.yaml", dump_yaml(SPEC).replace("norm_eps: 1.0e-05", "norm_eps: .nan"), "norm_eps"),
    "layers beyond memory": (
        "x.yaml",
        dump_yaml(SPEC).replace("layers: 8", f"layers: {10**30}"),
        "layers",
    ),
    "another suffix": ("x.txt", dump_yaml(SPEC), "x.txt"),
}


@pytest.mark.parametrize("case", SPEC_FILES)
def test_a_broken_spec_file_is_refused(tmp_path: Path, case: str) -> None:
    name, content, names = SPEC_FILES[case]
    text(name, content)(tmp_path)
    refused_and_nothing_left(
        tmp_path, lambda: moec.export(tmp_path / name, out=tmp_path / "out"), names
    )


# ---------------------------------------------------------------- choices


@pytest.mark.parametrize("bound", [True, False], ids=["checkpoint", "preset"])
@pytest.mark.parametrize(
    "choice",
    [
        {"target": "tpu"},
        *({"target": name} for name in ("ort", "tensorrt", "tensorrt-rtx", "torch")),
        {"precision": "fp8"},
        {"precision": "int4"},
        {"precision": ""},
        {"weights": "teleport"},
    ],
    ids=lambda choice: " ".join(f"{key}={value}" for key, value in choice.items()),
)
def test_an_unknown_choice_is_refused(
    sound: Path, tmp_path: Path, choice: dict[str, str], bound: bool
) -> None:
    source = sound if bound else "tiny-scout"
    key, value = next(iter(choice.items()))
    refused_and_nothing_left(
        tmp_path,
        lambda: moec.export(source, out=tmp_path / "out", **choice),
        f"--{key} {value}".strip(),
    )


@pytest.mark.parametrize(
    "source", ["herd", "gone.yaml", "gone/checkpoint", "", "x" * 5000, "zero\0byte"]
)
def test_an_unknown_source_is_refused(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, source: str
) -> None:
    monkeypatch.chdir(tmp_path)
    before = tree(tmp_path)
    with pytest.raises(MoecError) as caught:
        moec.export(source, out="out")
    assert caught.value.exit_code == 2
    assert tree(tmp_path) == before


def test_hard_links_across_file_systems_are_refused(
    sound: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def link(source: object, target: object) -> None:
        raise OSError(18, "Invalid cross-device link", str(source))

    monkeypatch.setattr(os, "link", link)
    refused_and_nothing_left(
        tmp_path, lambda: moec.export(sound, out=tmp_path / "out", weights="link"), "--weights"
    )


# ---------------------------------------------------------------- --out


def _file(world: Path) -> Path:
    (world / "file").write_text("mine")
    return world / "file"


def _link(world: Path) -> Path:
    (world / "link").symlink_to(world / "checkpoint")
    return world / "link"


def _dangling(world: Path) -> Path:
    (world / "link").symlink_to("gone")
    return world / "link"


def _holds(name: str, content: str = "mine") -> Callable[[Path], Path]:
    def out(world: Path) -> Path:
        (world / "holds").mkdir()
        (world / "holds" / name).write_text(content)
        return world / "holds"

    return out


def _artefact_and_checkpoint(world: Path) -> Path:
    """One folder that is both; the checkpoint's own name is a link to it."""
    moec.export(world / "checkpoint", out=world / "art")
    shutil.copytree(world / "checkpoint", world / "art", dirs_exist_ok=True)
    shutil.rmtree(world / "checkpoint")
    (world / "checkpoint").symlink_to("art")
    return world / "art"


def _artefact_around(world: Path) -> Path:
    """An artefact that somebody moved the checkpoint into; a link stands where it was."""
    moec.export("tiny-scout", out=world / "art")
    (world / "checkpoint").rename(world / "art" / "checkpoint")
    (world / "checkpoint").symlink_to("art/checkpoint")
    return world / "art"


#: what --out is -> (how it comes to be, what the message must name)
OUTS: dict[str, tuple[Callable[[Path], Path], str]] = {
    "a file": (_file, "/file"),
    "a link to a folder": (_link, "/link"),
    "a link to nowhere": (_dangling, "/link"),
    "a folder of something else": (_holds("notes.txt"), "notes.txt"),
    "a folder of hidden files": (_holds(".git"), ".git"),
    "a folder with a manifest.json of something else": (
        _holds("manifest.json", '{"name": "my web page", "start_url": "."}'),
        "/holds",
    ),
    "the checkpoint": (lambda world: world / "checkpoint", "/checkpoint"),
    "the checkpoint by another path": (
        lambda world: world / "checkpoint" / ".." / "checkpoint",
        "/checkpoint",
    ),
    "the checkpoint, an artefact itself": (_artefact_and_checkpoint, "/art"),
    "an artefact around the checkpoint": (_artefact_around, "/art"),
    "below a file": (lambda world: _file(world) / "out", "/file"),
    "far below a file": (lambda world: _file(world) / "deep" / "out", "/file"),
    "a name too long": (lambda world: world / ("x" * 300), "x" * 300),
    "a name too long for a neighbour": (lambda world: world / ("x" * 250), "x" * 250),
    "in a read-only place": (lambda world: Path("/proc/moec-artefact"), "/proc"),
    "deep in a read-only place": (lambda world: Path("/proc/moec/artefact"), "/proc"),
}


@pytest.mark.parametrize("case", OUTS)
def test_an_out_that_cannot_be_is_refused(checkpoint: Path, tmp_path: Path, case: str) -> None:
    make, names = OUTS[case]
    out = make(tmp_path)
    if "read-only" in case and not Path("/proc/self").exists():
        pytest.skip("no /proc here")
    refused_and_nothing_left(tmp_path, lambda: moec.export(checkpoint, out=out), names)


def test_bind_does_not_replace_the_folder_that_holds_its_checkpoint(
    checkpoint: Path, tmp_path: Path
) -> None:
    art = moec.export(SPEC, out=tmp_path / "art").path
    checkpoint.rename(art / "checkpoint")
    refused_and_nothing_left(tmp_path, lambda: moec.bind(art, art / "checkpoint"), "/art")


def test_bind_refuses_a_checkpoint_of_another_model(checkpoint: Path, tmp_path: Path) -> None:
    art = moec.export("tiny-scout", out=tmp_path / "art").path
    refused_and_nothing_left(tmp_path, lambda: moec.bind(art, checkpoint), "text.dim")


# ---------------------------------------------------------------- sessions


VOCAB = SPEC.text.vocab
IDS: dict[str, tuple[Any, str]] = {
    "beyond the vocabulary": ([[1, VOCAB]], f"token {VOCAB}"),
    "negative": ([[1, -1]], "token -1"),
    "beyond 64 bits": ([[2**70]], "input_ids"),
    "beyond the vocabulary, in a tensor": (torch.tensor([[VOCAB]]), f"token {VOCAB}"),
    "nothing": ([], "input_ids"),
    "an empty row": ([[]], "input_ids"),
    "an empty row among others": ([[1, 2], []], "input_ids"),
    "an empty tensor": (torch.zeros(1, 0, dtype=torch.int64), "input_ids"),
    "floats": ([[1.0, 2.0]], "input_ids"),
    "one float": ([[1, 2.5]], "input_ids"),
    "a float tensor": (torch.ones(1, 3), "input_ids"),
    "a bool tensor": (torch.ones(1, 3, dtype=torch.bool), "input_ids"),
    "text": ("hello", "input_ids"),
    "rows of text": ([["a", "b"]], "input_ids"),
    "None in a row": ([[1, None]], "input_ids"),
    "a row and a number": ([[1, 2], 3], "input_ids"),
    "one dimension": (torch.tensor([1, 2, 3]), "input_ids"),
    "three dimensions": (torch.ones(1, 2, 3, dtype=torch.int64), "input_ids"),
}


@pytest.mark.parametrize("method", ["logits", "generate"])
@pytest.mark.parametrize("case", IDS)
def test_token_ids_that_are_none_are_refused(session: Session, case: str, method: str) -> None:
    ids, names = IDS[case]
    refusal(lambda: getattr(session, method)(ids), names)


@pytest.mark.parametrize("method", ["logits", "generate"])
@pytest.mark.parametrize("lengths", [[0], [4], [-1], [1, 1], [], [1.5], [[1]]], ids=str)
def test_lengths_that_do_not_fit_the_rows_are_refused(
    session: Session, lengths: Any, method: str
) -> None:
    ids = torch.tensor([[1, 2, 3]])
    refusal(lambda: getattr(session, method)(ids, lengths=lengths), "lengths")


@pytest.mark.parametrize(
    "setting",
    [
        {"temperature": -1.0},
        {"temperature": float("nan")},
        {"temperature": 1.0, "top_k": 0},
        {"temperature": 1.0, "top_k": -3},
        {"temperature": 1.0, "top_p": 0.0},
        {"temperature": 1.0, "top_p": 1.5},
        {"temperature": 1.0, "top_p": float("nan")},
        {"temperature": 1.0, "seed": 2**70},
    ],
    ids=str,
)
def test_sampling_settings_out_of_range_are_refused(
    session: Session, setting: dict[str, Any]
) -> None:
    refusal(lambda: session.generate([[1]], max_new_tokens=2, **setting), list(setting)[-1])


@pytest.mark.parametrize(
    "setting", [{"tokens": 0}, {"tokens": -3}, {"seed": 2**70}, {"seed": -(2**70)}], ids=str
)
def test_a_proof_on_tokens_that_cannot_be_is_refused(built: Path, setting: dict[str, int]) -> None:
    refusal(lambda: moec.validate(built, **setting), next(iter(setting)))


# ---------------------------------------------------------------- artefacts


def manifest(dotted: str, value: object) -> Damage:
    return put("manifest.json", dotted, value)


def reference(change: Callable[[dict[str, Any]], object]) -> Damage:
    """Change where the manifest says that the embedding's bytes are."""
    return json_file(
        "manifest.json", lambda values: change(values["weights"]["tensors"]["embed.weight"])
    )


def tensor_refs(change: Callable[[dict[str, Any]], object]) -> Damage:
    return json_file("manifest.json", lambda values: change(values["weights"]["tensors"]))


def grow(name: str) -> Damage:
    def damage(folder: Path) -> None:
        with (folder / name).open("ab") as file:
            file.write(b"x")

    return damage


def halve(name: str) -> Damage:
    return lambda folder: os.truncate(folder / name, (folder / name).stat().st_size // 2)


def other_header(folder: Path) -> None:
    """Another header of the same length: two tensors of one shape have changed places."""

    def swap(rows: dict[str, Any]) -> None:
        a, b = (rows[name] for name in NORMS)
        a["data_offsets"], b["data_offsets"] = b["data_offsets"], a["data_offsets"]

    raw = (folder / FIRST).read_bytes()
    length = int.from_bytes(raw[:8], "little")
    rows = json.loads(raw[8 : 8 + length])
    swap(rows)
    changed = json.dumps(rows, separators=(",", ":")).encode().ljust(length)
    assert len(changed) == length and changed != raw[8 : 8 + length]
    (folder / FIRST).write_bytes(raw[:8] + changed + raw[8 + length :])


ARTEFACTS: dict[str, tuple[Damage, str]] = {
    "an empty folder": (lambda folder: (shutil.rmtree(folder), folder.mkdir()), "/art"),
    "no folder": (shutil.rmtree, "/art"),
    "a file": (lambda folder: (shutil.rmtree(folder), folder.write_text("mine")), "/art"),
    "no manifest": (
        lambda folder: [(folder / name).unlink() for name in ("manifest.json", "config.json")],
        "manifest.json",
    ),
    "no model": (remove("model.onnx"), "model.onnx"),
    "a model cut short": (halve("model.onnx"), "model.onnx"),
    "an empty model": (text("model.onnx", b""), "model.onnx"),
    "a model that grew": (grow("model.onnx"), "model.onnx"),
    "a shard that is gone": (remove(SECOND), SECOND),
    "a shard cut short": (halve(SECOND), SECOND),
    "an empty shard": (text(SECOND, b""), SECOND),
    "a shard that grew": (grow(SECOND), SECOND),
    "a shard with another header": (other_header, FIRST),
    "a shard that is a folder": (folder_instead(SECOND), SECOND),
    "a manifest cut short": (halve("manifest.json"), "manifest.json"),
    "an empty manifest": (text("manifest.json", ""), "manifest.json"),
    "a manifest that is a list": (text("manifest.json", "[]"), "manifest.json"),
    "a manifest that is no text": (text("manifest.json", b"\xff\xfe"), "manifest.json"),
    "a manifest nested without end": (text("manifest.json", NESTED), "manifest.json"),
    "a manifest of something else": (text("manifest.json", '{"name": "x"}'), "manifest.json"),
    "a manifest of another version": (manifest("format", "moec/2"), "format"),
    "a manifest without a spec": (drop("manifest.json", "spec"), "spec"),
    "a manifest with an unknown field": (manifest("sparkle", 1), "sparkle"),
    "a manifest with an unknown weight mode": (manifest("weights.mode", "cloud"), "mode"),
    "a manifest with text for a number": (manifest("opset", "many"), "opset"),
    "a parameter that the model lacks": (
        tensor_refs(lambda refs: refs.update(extra=refs["embed.weight"])),
        "extra",
    ),
    "a parameter that is not said": (
        tensor_refs(lambda refs: refs.pop("embed.weight")),
        "embed.weight",
    ),
    "a parameter in an unknown shard": (reference(lambda ref: ref.update(file="x")), "embed"),
    "a parameter in another file": (
        reference(lambda ref: ref.update(file="../checkpoint/config.json")),
        "embed.weight",
    ),
    "a parameter before the file": (reference(lambda ref: ref.update(offset=-8)), "embed.weight"),
    "a parameter beyond the file": (reference(lambda ref: ref.update(offset=10**9)), "embed"),
    "a parameter cut short": (reference(lambda ref: ref.update(length=2)), "embed.weight"),
    "a spec of another width": (manifest("spec.text.dim", 64), "/art"),
}  # fmt: skip


@pytest.mark.parametrize("engine", ["onnxruntime", "eager"])
@pytest.mark.parametrize("case", ARTEFACTS)
def test_a_damaged_artefact_does_not_open(artefact: Path, case: str, engine: str) -> None:
    damage, names = ARTEFACTS[case]
    damage(artefact)
    refusal(lambda: moec.open_session(artefact, engine=engine), names)


@pytest.mark.parametrize("engine", ["onnxruntime", "eager"])
def test_an_artefact_without_weights_does_not_open(tmp_path: Path, engine: str) -> None:
    art = moec.export(SPEC, out=tmp_path / "art").path
    error = refusal(lambda: moec.open_session(art, engine=engine), "/art")
    assert "bind" in error.next_step


def test_an_artefact_whose_checkpoint_moved_does_not_open(checkpoint: Path, tmp_path: Path) -> None:
    art = moec.export(checkpoint, out=tmp_path / "art").path
    checkpoint.rename(tmp_path / "elsewhere")
    refusal(lambda: moec.open_session(art), "/checkpoint")


def test_a_model_with_other_bytes_of_the_same_size_does_not_load(artefact: Path) -> None:
    model = artefact / "model.onnx"
    model.write_bytes(b"\xff" * model.stat().st_size)
    refusal(lambda: moec.open_session(artefact), "model.onnx", code=1)


@pytest.mark.parametrize(
    ("options", "names", "code"),
    [
        ({"engine": "abacus"}, "abacus", 2),
        ({"preset": "ludicrous"}, "ludicrous", 2),
        ({"engine": "eager", "preset": "ludicrous"}, "ludicrous", 2),
        ({"device": "cuda"}, "cuda", 3),
    ],
    ids=str,
)
def test_an_unknown_way_to_run_is_refused(
    built: Path, options: dict[str, str], names: str, code: int
) -> None:
    refusal(lambda: moec.open_session(built, **options), names, code)


@pytest.mark.parametrize("engine", ["onnxruntime", "abacus"])
def test_a_checkpoint_opens_in_the_eager_engine_only(sound: Path, engine: str) -> None:
    refusal(lambda: moec.open_session(sound, engine=engine), engine)


# ---------------------------------------------------------------- the command line


COMMANDS: dict[str, tuple[str, str]] = {
    "no source": ("build", "0 sources"),
    "two sources": ("build --variant scout --checkpoint CHECKPOINT", "2 sources"),
    "an unknown variant": ("build --variant herd", "herd"),
    "a spec file that is not there": ("build --spec gone.yaml", "gone.yaml"),
    "a preset for a spec file": ("build --spec scout", "scout"),
    "a checkpoint that is not there": ("build --checkpoint gone", "gone"),
    "a preset for a checkpoint": ("build --checkpoint scout", "scout"),
    "an unknown target": ("build --variant scout --target tpu", "tpu"),
    "a planned target": ("build --variant scout --target tensorrt", "planned"),
    "a planned precision": ("build --variant scout --precision fp8", "planned"),
    "an unknown placement": ("build --checkpoint CHECKPOINT --weights cloud", "cloud"),
    "bind without an artefact": ("bind gone --checkpoint CHECKPOINT", "gone"),
    "bind without a checkpoint": ("bind ARTEFACT --checkpoint gone", "gone"),
    "validate without an artefact": ("validate gone", "gone"),
    "inspect no artefact": ("inspect CHECKPOINT", "manifest.json"),
    "bench no artefact": ("bench gone", "gone"),
    "generate from nothing": ("generate ARTEFACT", "--prompt"),
    "generate from two things": ("generate ARTEFACT --prompt a --ids 1", "--prompt"),
    "generate from no artefact": ("generate gone --ids 1", "gone"),
    "generate from words for ids": ("generate ARTEFACT --ids one,two", "one,two"),
    "generate from ids out of range": ("generate ARTEFACT --ids 1,99999", "99999"),
    "generate from a negative id": ("generate ARTEFACT --ids=-1", "-1"),
    "generate by an unknown engine": ("generate ARTEFACT --ids 1 --engine abacus", "abacus"),
    "generate by an unknown preset": ("generate ARTEFACT --ids 1 --preset no", "preset"),
    "generate at a negative temperature": ("generate ARTEFACT --ids 1 --temperature -1", "-1"),
    "generate without a tokenizer": ("generate ARTEFACT --prompt hello", "tokenizer.json"),
    "generate with a broken tokenizer": ("generate ARTEFACT --prompt hello", "tokenizer.json"),
    "chat without a template": ("generate ARTEFACT --prompt hello --chat", "template"),
    "chat with a broken template": ("generate ARTEFACT --prompt hello --chat", "template"),
    "plan an unknown model": ("plan herd", "herd"),
    "plan an unknown precision": ("plan scout --precision int4", "int4"),
    "plan an unknown device": ("plan scout --device abacus", "abacus"),
    "plan no context": ("plan scout --context 0", "context"),
    "plan fewer tiles than none": ("plan scout --tiles -1", "tiles"),
    "show an unknown model": ("spec show herd", "herd"),
    "show in an unknown format": ("spec show scout --format toml", "toml"),
    "compare with an unknown model": ("spec diff scout herd", "herd"),
}


TOKENIZER = (ROOT / "examples" / "tiny-scout" / "tokenizer.json").read_bytes()

#: case of COMMANDS -> files that lie beside its model
BESIDE: dict[str, dict[str, str | bytes]] = {
    "generate with a broken tokenizer": {"tokenizer.json": "{}"},
    "chat without a template": {"tokenizer.json": TOKENIZER},
    "chat with a broken template": {"tokenizer.json": TOKENIZER, "chat_template.jinja": "{% for"},
}


@pytest.mark.parametrize("case", COMMANDS)
def test_a_command_that_cannot_be_run_ends_with_one_message(
    cli: Callable[..., tuple[int, str]],
    checkpoint: Path,
    artefact: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    case: str,
) -> None:
    line, names = COMMANDS[case]
    for name, content in BESIDE.get(case, {}).items():
        text(name, content)(artefact)
    places = {"CHECKPOINT": checkpoint, "ARTEFACT": artefact}
    monkeypatch.chdir(tmp_path)
    before = tree(tmp_path)
    code, err = cli(*(places.get(word, word) for word in line.split()))
    one_message(err, names)
    assert code == 2
    assert tree(tmp_path) == before


def test_a_page_that_cannot_be_written_ends_with_one_message(
    cli: Callable[..., tuple[int, str]], artefact: Path
) -> None:
    code, err = cli("validate", artefact, "--tokens", 4, "--html", artefact / "gone" / "page.html")
    one_message(err, "gone/page.html")
    assert code == 2


@pytest.mark.parametrize(
    "line",
    ["build --sparkle", "sparkle", "validate", "build --variant", "generate x --max-new-tokens 0"],
)
def test_a_line_that_is_no_command_ends_with_exit_code_2(
    cli: Callable[..., tuple[int, str]], line: str
) -> None:
    code, err = cli(*line.split())
    assert code == 2 and "Error" in err and "Traceback" not in err


def test_a_path_in_a_message_is_not_broken_over_lines(
    cli: Callable[..., tuple[int, str]], tmp_path: Path
) -> None:
    path = tmp_path / ("long " * 40).strip()
    _, err = cli("inspect", path)
    assert str(path) in err


PROCESSES: dict[str, tuple[Damage, str]] = {
    "a shard cut short": (CHECKPOINTS["a shard cut in its data"][0], FIRST),
    "an unknown config field": (CHECKPOINTS["an unknown text field"][0], "sparkle"),
    "a missing tensor": (CHECKPOINTS["a tensor is missing"][0], EMBED),
    "an --out of something else": (
        lambda folder: (
            (folder.parent / "out").mkdir(),
            (folder.parent / "out" / "notes.txt").write_text("mine"),
        ),
        "notes.txt",
    ),
    "an --out that is a file": (lambda folder: (folder.parent / "out").write_text("x"), "/out"),
}


@pytest.mark.parametrize("case", PROCESSES)
def test_the_real_command_refuses(checkpoint: Path, tmp_path: Path, case: str) -> None:
    damage, names = PROCESSES[case]
    damage(checkpoint)
    before = tree(tmp_path)
    command = [sys.executable, "cli.py", "build", "--checkpoint", checkpoint]
    done = subprocess.run(
        [*command, "--out", tmp_path / "out"], cwd=ROOT, capture_output=True, text=True, timeout=120
    )
    one_message(done.stderr, names)
    assert done.returncode == 2
    assert "Traceback" not in done.stdout
    assert tree(tmp_path) == before


def test_the_real_command_needs_a_source() -> None:
    done = subprocess.run(
        [sys.executable, "cli.py", "build"], cwd=ROOT, capture_output=True, text=True, timeout=120
    )
    one_message(done.stderr, "0 sources")
    assert done.returncode == 2
