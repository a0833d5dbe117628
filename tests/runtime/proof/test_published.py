"""A proof of a folder that is a checkpoint for other engines too: what they would read there."""

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

import moec
from moec.artefact.artefact import file_of, open_artefact
from moec.artefact.placement import COMPANIONS
from moec.runtime.proof.published import published_folder
from moec.spec.hf.forms import INDEX
from moec.spec.presets import PRESETS
from moec.spec.reduced import reduced
from moec.weights.random import write_random_checkpoint

LLAMA4 = reduced(PRESETS["tiny-scout"], 4).model_copy(update={"vision": None})


@pytest.fixture
def llama4(tmp_path: Path) -> Path:
    write_random_checkpoint(LLAMA4, tmp_path / "wide", seed=3)
    return tmp_path / "wide"


def rewrite(art: Path, name: str, change: Callable[[dict[str, Any]], object]) -> None:
    """Change a JSON file of an artefact, and its size and hash in the manifest."""
    values = json.loads((art / name).read_text())
    change(values)
    (art / name).write_text(json.dumps(values))
    rewrite_manifest(art, lambda m: m["files"].update({name: file_of(art / name).model_dump()}))


def rewrite_manifest(art: Path, change: Callable[[dict[str, Any]], object]) -> None:
    manifest = json.loads((art / "manifest.json").read_text())
    change(manifest)
    del manifest["digest"]
    (art / "manifest.json").write_text(json.dumps(manifest))


#: what a stranger changed -> (file, how, whether the artefact alone shows it)
ELSEWHERE: dict[str, tuple[str, Callable[[dict[str, Any]], object], bool]] = {
    "another theta": ("config.json", lambda c: c.update(rope_theta=1e4), True),
    "other modules": (
        "config.json",
        lambda c: c["quantization_config"]["ignore"].append("re:.*experts.*"),
        True,
    ),
    "no temperature": (
        "generation_config.json",
        lambda c: c.update(attn_temperature_tuning=None),
        True,
    ),
    "other end tokens": ("generation_config.json", lambda c: c.update(eos_token_id=[3]), True),
    "another class": ("config.json", lambda c: c.update(architectures=["Other"]), False),
    "another field of generation": ("generation_config.json", lambda c: c.update(x=1), False),
}


def test_a_proof_sees_weights_that_other_engines_would_load(llama4: Path, tmp_path: Path) -> None:
    """They load every file of weights where there is no index, and what the index says else."""
    art = moec.export(llama4, "onnx", "fp8", tmp_path / "art").path
    shutil.copy(art / "model.safetensors", art / "model-00001-of-00001.safetensors")
    (check,) = published_folder(open_artefact(art), None)
    assert not check.passed and "none of the artefact" in check.detail


@pytest.mark.parametrize("name", ["model.safetensors", "model-00001-of-00001.safetensors"])
def test_weights_beside_those_of_our_own_names_are_seen(
    name: str, llama4: Path, tmp_path: Path
) -> None:
    """config.json names the model there too: another engine would load them."""
    sound = open_artefact(moec.export(llama4, "torch", "bf16", tmp_path / "art").path)
    assert not sound.manifest.weights.published and not list(published_folder(sound, None))
    shutil.copy(sound.path / "weights.safetensors", sound.path / name)
    (check,) = published_folder(sound, None)
    assert not check.passed and name in check.detail


def link(name: str) -> Callable[[Path], None]:
    return lambda art: (art / name).symlink_to("model.safetensors")


def text(name: str, raw: str = "{}") -> Callable[[Path], None]:
    def write(art: Path) -> None:
        (art / name).parent.mkdir(exist_ok=True)
        (art / name).write_text(raw)

    return write


#: what a stranger adds to a sound folder, for other engines to read
ADDED: dict[str, Callable[[Path], None]] = {
    "adapter_config.json": text("adapter_config.json", '{"peft_type": "LORA"}'),
    "adapter_model.safetensors": link("adapter_model.safetensors"),
    "consolidated.safetensors": link("consolidated.safetensors"),
    "params.json": text("params.json"),
    "pytorch_model.bin": text("pytorch_model.bin"),
    "pytorch_model.bin.index.json": text("pytorch_model.bin.index.json"),
    "model.gguf": text("model.gguf"),
    "last.pt": text("last.pt"),
    "model.safetensors.index.json": text("model.safetensors.index.json", '{"weight_map": {}}'),
    "additional_chat_templates/default.jinja": text("additional_chat_templates/default.jinja"),
    "additional_chat_templates/.x.jinja": text("additional_chat_templates/.x.jinja"),
    "additional_chat_templates": lambda art: (art / "additional_chat_templates").symlink_to(".."),
    "chat_template.jinja": text("chat_template.jinja", "EVIL"),
    "vocab.json": text("vocab.json"),
    "merges.txt": text("merges.txt"),
    "tokenizer.model": text("tokenizer.model"),
    "added_tokens.json": text("added_tokens.json"),
    "special_tokens_map.json": text("special_tokens_map.json"),
    "preprocessor_config.json": text("preprocessor_config.json"),
    "video_preprocessor_config.json": text("video_preprocessor_config.json"),
    "modeling_llama4.py": text("modeling_llama4.py"),
    "custom_generate/generate.py": text("custom_generate/generate.py"),
    "generation_config.JSON": text("generation_config.JSON"),
    ".evil.safetensors": link(".evil.safetensors"),
    "original/params.json": text("original/params.json"),
}

#: a build may have copied these: the check "text" compares them with the source's
COPIED = {*COMPANIONS, INDEX}

#: what users keep beside a model, and engines do not read
KEPT = (
    "NOTES.md", "LICENSE", "LICENSE.txt", "report.html", "report-3.json", "images/scores.png",
    ".gitattributes", ".gitignore", ".git/config", ".git/hooks/x.py", ".DS_Store",
    ".cache/huggingface/download/x.metadata", "trtexec/model.engine",
)  # fmt: skip


@pytest.fixture(scope="module")
def plain(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A sound artefact whose folder is a checkpoint, beside its source."""
    world = tmp_path_factory.mktemp("plain")
    write_random_checkpoint(LLAMA4, world / "wide", seed=3)
    return moec.export(world / "wide", "onnx", "fp8", world / "art").path


@pytest.mark.parametrize(
    ("name", "listed"),
    [*((name, False) for name in ADDED), *((name, True) for name in ADDED if name not in COPIED)],
)
def test_a_proof_names_files_that_other_engines_would_read(
    name: str, listed: bool, plain: Path, tmp_path: Path
) -> None:
    """Whoever adds a file can list it in the manifest too; a text that may be a build's cannot."""
    art = shutil.copytree(plain, tmp_path / "art")
    ADDED[name](art)
    if listed and (art / name).is_file():
        rewrite_manifest(art, lambda m: m["files"].update({name: file_of(art / name).model_dump()}))
    for source in (None, plain.parent / "wide"):
        checks = list(published_folder(open_artefact(art), source))
        assert not any(check.passed for check in checks)
        assert any(name in check.detail for check in checks), [each.detail for each in checks]


def test_a_proof_names_a_shard_that_is_only_listed(plain: Path, tmp_path: Path) -> None:
    art = shutil.copytree(plain, tmp_path / "art")
    link("adapter_model.safetensors")(art)
    rewrite_manifest(
        art,
        lambda m: m["weights"]["shards"].update(
            {"adapter_model.safetensors": m["weights"]["shards"]["model.safetensors"]}
        ),
    )
    checks = list(published_folder(open_artefact(art), None))
    assert checks and not any(check.passed for check in checks)


def test_files_that_no_engine_reads_may_lie_beside_a_model(plain: Path, tmp_path: Path) -> None:
    art = shutil.copytree(plain, tmp_path / "art")
    for name in KEPT:
        (art / name).parent.mkdir(parents=True, exist_ok=True)
        (art / name).write_text("x")
    (art / "empty").mkdir()
    with (art / "README.md").open("a") as card:
        card.write("\n## Mine\n")
    (check,) = published_folder(open_artefact(art), None)
    assert check.passed, check.detail


def test_text_of_the_source_may_be_copied_beside_a_model(plain: Path, tmp_path: Path) -> None:
    """An engine may need a tokenizer that moec does not read; the source's own is no lie."""
    art = shutil.copytree(plain, tmp_path / "art")
    source = shutil.copytree(plain.parent / "wide", tmp_path / "wide")
    for folder in (art, source):
        for name in ("tokenizer.model", "vocab.json", "adapter_config.json"):
            (folder / name).write_text("{}")
    (check,) = published_folder(open_artefact(art), source)
    assert "adapter_config.json" in check.detail, "another engine applies it, and moec does not"
    (art / "adapter_config.json").unlink()
    (check,) = published_folder(open_artefact(art), source)
    assert check.passed
    (art / "vocab.json").write_text("[]")
    (check,) = published_folder(open_artefact(art), source)
    assert not check.passed and "vocab.json" in check.detail


def test_a_proof_names_the_first_of_many_files(plain: Path, tmp_path: Path) -> None:
    art = shutil.copytree(plain, tmp_path / "art")
    for number in range(30):
        (art / f"{number:02}.py").write_text("")
    checks = list(published_folder(open_artefact(art), None))
    assert len(checks) == 9 and "22 more" in checks[-1].detail


def test_a_proof_sees_an_index_that_leads_elsewhere(
    llama4: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("moec.weights.packed.published.SHARD_BYTES", 60_000)
    art = moec.export(llama4, "onnx", "fp8", tmp_path / "art").path
    first = min(art.glob("model-*.safetensors"))
    shutil.copy(first, art / "evil.safetensors")
    rewrite(
        art,
        "model.safetensors.index.json",
        lambda index: index["weight_map"].update(
            {k: "evil.safetensors" for k, v in index["weight_map"].items() if v == first.name}
        ),
    )
    details = [check.detail for check in published_folder(open_artefact(art), None)]
    assert any("no shard of the artefact" in each for each in details)


@pytest.mark.full
@pytest.mark.parametrize("kind", ELSEWHERE)
def test_a_proof_reads_the_folder_as_a_checkpoint_too(
    kind: str, llama4: Path, tmp_path: Path
) -> None:
    """No session of moec reads these files, but other engines do."""
    file, change, alone = ELSEWHERE[kind]
    art = moec.export(llama4, "onnx", "fp8", tmp_path / "art").path
    artefact = open_artefact(art)
    sound = [*published_folder(artefact, None), *published_folder(artefact, llama4)]
    assert all(check.passed for check in sound) and len(sound) == 2
    rewrite(art, file, change)
    artefact = open_artefact(art)
    checks = list(published_folder(artefact, None))
    assert all(check.passed for check in checks) is not alone
    assert not all(check.passed for check in published_folder(artefact, llama4))
    report = moec.validate(art, source=llama4)
    assert not report.passed and report.first_divergence == "as a checkpoint"
