"""Models in forms that moec does not read are recognised by name, with what to do next."""

from collections.abc import Callable
from pathlib import Path

import pytest

import moec
from moec.spec.files import load_spec
from moec.weights.checkpoint import read_checkpoint
from moec.weights.name_map import read_model
from tests.damage import FIRST
from tests.refusals import refusal

POINTER = b"version https://git-lfs.github.com/spec/v1\noid sha256:00\nsize 5368709120\n"
Make = Callable[[Path], Path]


def holding(*names: str, raw: bytes = b"\x80\x02") -> Make:
    """Make a folder that holds files of these names."""

    def make(folder: Path) -> Path:
        for name in names:
            (folder / name).parent.mkdir(parents=True, exist_ok=True)
            (folder / name).write_bytes(raw)
        return folder

    return make


def file(name: str, raw: bytes = b"\x80\x02") -> Make:
    return lambda folder: holding(name, raw=raw)(folder) / name


#: what a user may give instead of a checkpoint -> (how it is made, what is said, what to do)
FORMS: dict[str, tuple[Make, str, str]] = {
    "GGUF": (file("model-Q4_K_M.gguf"), "GGUF", "--precision int4"),
    "GGUF of another name": (file("model.data", b"GGUF\3\0"), "GGUF", "--precision int4"),
    "a folder of GGUF": (holding("README.md", "a-00001-of-2.gguf"), "a-00001-of-2.gguf", "int4"),
    "Meta's layout": (
        holding("consolidated.00.pth", "params.json", "tokenizer.model"),
        "Meta's original layout",
        "convert_llama4_weights_to_hf",
    ),
    "a file of Meta's": (file("consolidated.00.pth"), "Meta's original layout", "Hugging Face"),
    "pickled shards": (
        holding("config.json", "pytorch_model-00001-of-2.bin", "pytorch_model.bin.index.json"),
        "pickled",
        "save_pretrained",
    ),
    "a pickled file": (file("pytorch_model.bin"), "pickled", "save_pretrained"),
    "a lightning checkpoint": (file("last.ckpt"), "pickled", "save_pretrained"),
    "FSDP": (holding("__0_0.distcp", ".metadata"), "training run", "merge-weights"),
    "DeepSpeed": (holding("latest", "zero_to_fp32.py"), "training run", "zero_to_fp32"),
    "Mistral's layout": (holding("consolidated.safetensors"), "Mistral's own", "transformers"),
    "Flax": (holding("flax_model.msgpack"), "Flax", "transformers"),
    "ONNX": (file("model.onnx"), "a compiled model", "the checkpoint"),
    "an archive": (file("scout.tar.gz"), "an archive", "unpack"),
    "an artefact": (holding("manifest.json", "model.onnx"), "an artefact of moec", "moec inspect"),
    "an adapter": (
        holding("adapter_config.json", "adapter_model.safetensors"),
        "an adapter",
        "--adapter",
    ),
    "shards without an index": (
        holding("config.json", "model-00001-of-00050.safetensors"),
        "no model.safetensors.index.json",
        "download",
    ),
    "a cache of the Hub": (
        holding("snapshots/abc/config.json", "blobs/x", "refs/main"),
        "cache of the Hugging Face Hub",
        "snapshots/abc",
    ),
    "the folder above": (holding("scout/config.json"), "no config.json here", "scout"),
    "a shard": (file("model-00001-of-00002.safetensors"), "one file of a checkpoint", "its folder"),
    "a config": (file("config.json", b"{}"), "one file of a checkpoint", "its folder"),
    "a pointer": (file("model-00001-of-00002.safetensors", POINTER), "LFS pointer", "lfs pull"),
}


@pytest.mark.parametrize("kind", FORMS)
def test_other_forms_are_named(tmp_path: Path, kind: str) -> None:
    make, what, next_step = FORMS[kind]
    given = make(tmp_path / "model")
    if (tmp_path / "model" / "config.json").exists() and given.is_dir():
        error = refusal(lambda: read_checkpoint(given), what)
    else:
        error = refusal(lambda: load_spec(given), what)
    assert next_step in error.next_step


@pytest.mark.parametrize(
    "given",
    [
        "meta-llama/Llama-4-Scout-17B-16E-Instruct",
        "https://huggingface.co/meta-llama/Llama-4-Scout-17B-16E-Instruct/tree/main",
        "hf://meta-llama/Llama-4-Scout-17B-16E-Instruct",
        Path("https://huggingface.co/meta-llama/Llama-4-Scout-17B-16E-Instruct"),
    ],
)
def test_names_of_the_hub_get_the_command_that_downloads(given: str | Path) -> None:
    error = refusal(lambda: moec.export(given), "Hugging Face Hub")
    assert error.next_step.startswith("hf download meta-llama/Llama-4-Scout-17B-16E-Instruct ")


@pytest.mark.parametrize("name", ["config.json", FIRST, "generation_config.json"])
def test_a_file_that_git_lfs_left_is_named(checkpoint: Path, name: str) -> None:
    (checkpoint / name).write_bytes(POINTER)
    refusal(lambda: read_model(checkpoint), "Git LFS pointer")
