"""Every checkpoint key is consumed exactly once, every parameter filled exactly once, both ways."""

from pathlib import Path

import pytest
import torch
from safetensors import safe_open
from transformers import Llama4Config, Llama4ForCausalLM, Llama4ForConditionalGeneration

import moec
from moec.artefact.artefact import open_artefact
from moec.graph_builder.decoder import build_decoder
from moec.runtime.proof.published import published_folder
from moec.spec.files import load_spec
from moec.spec.hf.architectures.llama4.keys import TEXT, VISION
from moec.spec.hf.config import write_config
from moec.spec.parameters import counts, parameters
from moec.spec.presets import PRESETS
from moec.spec.reduced import reduced
from moec.weights.checkpoint import read_checkpoint
from moec.weights.name_map import checkpoint_tensors, match, read_model
from moec.weights.random import write_random_checkpoint
from moec.weights.view import view


@pytest.mark.parametrize("name", ["scout", "maverick", "tiny-scout"])
def test_keys_and_shapes_are_those_of_the_transformers_model(name: str) -> None:
    spec = PRESETS[name]
    config = Llama4Config(**write_config(spec))
    with torch.device("meta"):
        model = Llama4ForConditionalGeneration(config)
    theirs = {key: tuple(tensor.shape) for key, tensor in model.state_dict().items()}
    ours = {row.key: row.shape for row in checkpoint_tensors(spec)}
    assert len(ours) == len(checkpoint_tensors(spec)) == len(parameters(spec))
    assert ours == theirs


@pytest.mark.parametrize("name", ["scout", "maverick", "behemoth", "tiny-scout"])
def test_the_graph_uses_every_text_parameter_with_the_same_shape(name: str) -> None:
    spec = PRESETS[name]
    graph = build_decoder(spec)
    used = {key: tuple(p.shape) for key, p in graph.named_parameters()}
    text = {
        k: v for k, v in parameters(spec).items() if not k.startswith(("vision.", "projector."))
    }
    assert used == text
    assert sum(p.numel() for p in graph.parameters()) == counts(spec)["text"]
    assert all(p.is_meta for p in graph.parameters())


def test_the_fixture_is_consumed_whole(tiny: Path) -> None:
    checkpoint = read_checkpoint(tiny)
    entries = match(load_spec(tiny), checkpoint)
    places = {(entry.file, entry.offset) for entry in entries.values()}
    assert len(places) == len(entries) == len(checkpoint.tensors)
    assert {entry.name for entry in entries.values()} == set(checkpoint.tensors)


def test_no_row_of_the_tables_is_dead() -> None:
    templates = set()
    for spec in (PRESETS["scout"], PRESETS["maverick"]):
        biased = spec.text.model_copy(update={"attention_bias": True})
        for name in parameters(spec.model_copy(update={"text": biased})):
            head, _, tail = name.partition("layers.")
            templates.add(f"{head}layers.{{i}}.{tail.partition('.')[2]}" if tail else name)
    assert templates == set(TEXT) | set(VISION)


def test_views_and_expert_slices_are_the_bytes_of_the_file(tiny: Path) -> None:
    spec = load_spec(tiny)
    entries = match(spec, read_checkpoint(tiny))
    by_key = {row.key: row.name for row in checkpoint_tensors(spec)}
    for file in {entry.file for entry in entries.values()}:
        with safe_open(file, "pt") as shard:
            for key in shard.keys():  # noqa: SIM118
                entry, expected = entries[by_key[key]], shard.get_tensor(key)
                assert torch.equal(view(entry), expected)
                if entry.name.endswith(("gate_up_proj", "down_proj")):
                    assert torch.equal(view(entry[3]), expected[3])
                    with pytest.raises(IndexError):
                        entry[entry.shape[0]]


def test_a_text_only_checkpoint_of_transformers_is_read(tmp_path: Path) -> None:
    spec = PRESETS["tiny-scout"].model_copy(update={"vision": None})
    write_random_checkpoint(spec, tmp_path / "ours", seed=1)
    Llama4ForCausalLM.from_pretrained(tmp_path / "ours").save_pretrained(tmp_path / "theirs")
    ours = match(load_spec(tmp_path / "ours"), read_checkpoint(tmp_path / "ours"))
    theirs = match(load_spec(tmp_path / "theirs"), read_checkpoint(tmp_path / "theirs"))
    assert ours.keys() == theirs.keys()
    assert all(torch.equal(view(ours[name]), view(theirs[name])) for name in ours)


def test_a_hugging_face_cache_of_links_is_read(tiny: Path, tmp_path: Path) -> None:
    snapshot = tmp_path / "snapshots" / "abc"
    blobs = tmp_path / "blobs"
    snapshot.mkdir(parents=True)
    blobs.mkdir()
    for index, file in enumerate(sorted(tiny.iterdir())):
        (blobs / f"hash{index}").write_bytes(file.read_bytes())
        (snapshot / file.name).symlink_to(f"../../blobs/hash{index}")
    entries = match(load_spec(snapshot), read_checkpoint(snapshot))
    assert {entry.file.parent for entry in entries.values()} == {blobs.resolve()}


def test_misaligned_tensors_are_read_right(tmp_path: Path) -> None:
    """safetensors aligns nothing: a tensor after an odd number of bytes starts at an odd offset."""
    import json

    header = {
        "pad": {"dtype": "U8", "shape": [3], "data_offsets": [0, 3]},
        "x": {"dtype": "BF16", "shape": [2, 2], "data_offsets": [3, 11]},
    }
    raw = json.dumps(header).encode()
    raw += b" " * (-len(raw) % 8)
    values = torch.tensor([[1.5, -2.0], [0.25, 3.0]], dtype=torch.bfloat16)
    data = bytes(values.view(torch.uint8).flatten().tolist())
    path = tmp_path / "model.safetensors"
    path.write_bytes(len(raw).to_bytes(8, "little") + raw + b"abc" + data)
    assert torch.equal(view(read_checkpoint(tmp_path).tensors["x"]), values)


def test_a_folder_with_the_name_of_a_preset_is_read_by_its_config(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A config that was not read could say anything, in a proof too."""
    spec = reduced(PRESETS["tiny-scout"], 2).model_copy(update={"vision": None})
    write_random_checkpoint(spec, tmp_path / "tiny-scout")
    monkeypatch.chdir(tmp_path)
    assert read_model("tiny-scout")[0].text.layers == 2
    art = moec.export("tiny-scout", precision="fp8", out="scout")
    assert art.manifest.weights.published
    assert all(check.passed for check in published_folder(open_artefact("scout"), None))
