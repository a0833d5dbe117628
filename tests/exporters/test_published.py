"""The weights that a build makes FP8 are a checkpoint for other engines too: one folder for all."""

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import CompressedTensorsConfig, Llama4ForCausalLM

import moec
from moec.artefact import placement
from moec.artefact.artefact import file_of, open_artefact, verify_files
from moec.artefact.placement import COMPANIONS
from moec.exporters import precision
from moec.exporters.model_card import add_proof
from moec.runtime.proof.published import published_folder
from moec.spec.errors import MoecError
from moec.spec.hf.forms import INDEX
from moec.spec.presets import PRESETS
from moec.spec.reduced import reduced
from moec.spec.scheme import Rule, Scheme
from moec.weights.packed import journal
from moec.weights.random import write_random_checkpoint
from tests.families import CASES
from tests.trees import tree

LLAMA4 = reduced(PRESETS["tiny-scout"], 4).model_copy(update={"vision": None})
LINEAR = ("layers.*.moe.gate_up", "layers.*.moe.down", "layers.*.attn.o.weight")
BLOCKS = Scheme(name="blocks", rules=(Rule(of=LINEAR, weight="block", inputs="group"),), block=8)
SCHEMES = {"dynamic": "dynamic", "meta": "meta", "blocks": BLOCKS}
IDS = torch.arange(3, 40)[None]
MODELS = {"llama4": LLAMA4, "qwen3": CASES["qwen3"], "deepseek-v3": CASES["deepseek-v3"]}


@pytest.fixture(scope="module", params=MODELS)
def wide(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("wide")
    write_random_checkpoint(MODELS[request.param], folder, seed=3)
    return folder


@pytest.fixture
def llama4(tmp_path: Path) -> Path:
    write_random_checkpoint(LLAMA4, tmp_path / "wide", seed=3)
    return tmp_path / "wide"


def logits(artefact: moec.Artefact) -> torch.Tensor:
    return torch.as_tensor(moec.open_session(artefact.path).logits(IDS.numpy()))


def same_weights(mine: Path, other: Path) -> None:
    found, expected = (load_file(folder / "model.safetensors") for folder in (mine, other))
    assert found.keys() == expected.keys()
    for key, tensor in found.items():
        assert tensor.dtype == expected[key].dtype, key
        assert torch.equal(tensor.float(), expected[key].float()), key


@pytest.mark.parametrize(
    ("target", "scheme"),
    [
        ("torch", "dynamic"),
        ("onnx", "dynamic"),
        ("onnx", "meta"),
        ("onnx", "blocks"),
        ("ort", "meta"),
    ],
)
def test_one_folder_serves_every_target(
    wide: Path, target: str, scheme: str, tmp_path: Path
) -> None:
    """A build and `quantize` write the same; another target reads the build's folder in place."""
    art = moec.export(wide, target, "fp8", tmp_path / "art", scheme=SCHEMES[scheme])
    assert art.manifest.weights.published and list(art.manifest.weights.shards) == [
        "model.safetensors"
    ]
    same_weights(art.path, moec.quantize(wide, SCHEMES[scheme], tmp_path / "fp8").path)
    for again in (target, "onnx"):
        read = moec.export(art.path, again, "fp8", tmp_path / again)
        assert read.manifest.weights.mode == "in-place"
        assert read.manifest.weights.folder == str(art.path.resolve())
    same = moec.open_session(tmp_path / target).logits(IDS.numpy())
    assert torch.equal(torch.as_tensor(same), logits(art))


@pytest.mark.full
@pytest.mark.parametrize("scheme", ["dynamic", "meta"])
def test_transformers_reads_an_artefact(llama4: Path, scheme: str, tmp_path: Path) -> None:
    art = moec.export(llama4, "onnx", "fp8", tmp_path / "art", scheme=scheme)
    found = []
    for folder in (art.path, moec.quantize(llama4, scheme, tmp_path / "fp8").path):
        loaded, info = Llama4ForCausalLM.from_pretrained(
            folder,
            dtype=torch.float32,
            quantization_config=CompressedTensorsConfig(dequantize=True),
            output_loading_info=True,
        )
        assert not info["missing_keys"] and not info["unexpected_keys"]
        with torch.inference_mode():
            found.append(loaded(IDS, use_cache=False).logits)
    assert torch.equal(*found)


def test_a_config_says_the_type_that_the_build_gave_the_weights(tmp_path: Path) -> None:
    """Target torch stores what stays wide in bf16."""
    spec = LLAMA4.model_copy(update={"dtype": "fp32"})
    write_random_checkpoint(spec, tmp_path / "wide", seed=3)
    art = moec.export(tmp_path / "wide", "torch", out=tmp_path / "art")
    before, after = (
        json.loads((f / "config.json").read_text()) for f in (tmp_path / "wide", art.path)
    )
    assert "float32" in str(before) and "float32" not in str(after) and "bfloat16" in str(after)
    assert moec.load_spec(art.path).dtype == "bf16"
    read = moec.export(art.path, "torch", out=tmp_path / "again")
    assert torch.equal(logits(read), logits(art))


@pytest.mark.parametrize("model", MODELS)
@pytest.mark.parametrize("odd", ["norm", "layers.1."])
def test_weights_of_several_types_stay_so(model: str, odd: str, tmp_path: Path) -> None:
    """Once matrices are quantised, most tensors that are wide may be norms of another type."""
    write_random_checkpoint(MODELS[model], tmp_path / "wide", seed=3)
    file = tmp_path / "wide/model.safetensors"
    mixed = {key: each.float() if odd in key else each for key, each in load_file(file).items()}
    save_file(mixed, file, metadata={"format": "pt"})
    for scheme in ("dynamic", "meta"):
        done = moec.quantize(tmp_path / "wide", scheme, tmp_path / f"q-{scheme}")
        found = load_file(done.path / "model.safetensors")
        for key in found.keys() & mixed.keys():
            if f"{key}_scale" not in found:
                assert found[key].dtype == mixed[key].dtype, key
        own, theirs = (
            json.loads((folder / "config.json").read_text())
            for folder in (tmp_path / "wide", done.path)
        )
        assert own == {key: each for key, each in theirs.items() if key != "quantization_config"}
        art = moec.export(tmp_path / "wide", "onnx", "fp8", tmp_path / scheme, scheme=scheme)
        assert art.manifest.weights.published
        assert all(check.passed for check in published_folder(art, tmp_path / "wide"))


def test_shards_are_found_again(
    llama4: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("moec.weights.packed.published.SHARD_BYTES", 60_000)
    art = moec.export(llama4, "torch", out=tmp_path / "art")
    shards = art.manifest.weights.shards
    index = json.loads((art.path / "model.safetensors.index.json").read_text())
    assert len(shards) > 2 and set(index["weight_map"].values()) == set(shards)
    verified = verify_files(open_artefact(art.path))
    assert {*shards, "model.safetensors.index.json"} <= set(verified.hashed)
    monkeypatch.undo()
    whole = moec.export(llama4, "torch", out=tmp_path / "whole")
    assert torch.equal(logits(art), logits(whole))


def test_a_build_that_was_cut_off_goes_on(
    llama4: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    class Stop(BaseException):
        pass

    monkeypatch.setattr("moec.weights.packed.published.SHARD_BYTES", 60_000)
    monkeypatch.setattr("moec.weights.packed.file.JOURNAL_BYTES", 1)
    whole = moec.export(llama4, "onnx", "fp8", tmp_path / "whole")

    def stop(stage: str, done: int, total: int) -> None:
        if stage == "pack" and done > total * 2 // 3:
            raise Stop

    with pytest.raises(Stop):
        moec.export(llama4, "onnx", "fp8", tmp_path / "art", progress=stop)
    (left,) = tmp_path.glob(".art.*")
    assert len(journal.unfinished(left)) >= 4
    done = moec.export(llama4, "onnx", "fp8", tmp_path / "art")
    assert 0 < done.manifest.build.bytes_read < whole.manifest.build.bytes_read / 2
    assert tree(done.path) == tree(whole.path)


def _fp8(source: Path, out: Path, progress: Callable[..., None]) -> None:
    moec.export(source, "onnx", "fp8", out, scheme="dynamic", progress=progress)


def _integers(source: Path, out: Path, progress: Callable[..., None]) -> None:
    moec.export(source, "ort", "int4", out, progress=progress)


def _quantise(source: Path, out: Path, progress: Callable[..., None]) -> None:
    moec.quantize(source, "meta", out, progress=progress)


@pytest.mark.full
@pytest.mark.parametrize("first", [_fp8, _integers, _quantise])
@pytest.mark.parametrize("second", [_fp8, _integers, _quantise])
def test_another_call_after_one_that_was_cut_off_leaves_nothing_of_it(
    first: Callable[..., None],
    second: Callable[..., None],
    tiny: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    class Stop(BaseException):
        pass

    def stop(stage: str, done: int, total: int) -> None:
        if stage in ("pack", "quantise") and done > total * 2 // 3:
            raise Stop

    monkeypatch.setattr("moec.weights.packed.file.JOURNAL_BYTES", 1)
    second(tiny, tmp_path / "fresh", lambda *_: None)
    with monkeypatch.context() as patched, pytest.raises(Stop):
        patched.setattr("moec.weights.packed.published.SHARD_BYTES", 400_000)
        first(tiny, tmp_path / "art", stop)
    assert list(tmp_path.glob(".art.*"))
    second(tiny, tmp_path / "art", lambda *_: None)
    assert not list(tmp_path.glob(".art.*"))
    assert tree(tmp_path / "art").keys() == tree(tmp_path / "fresh").keys()


def test_what_config_json_says_of_generation_stays(llama4: Path, tmp_path: Path) -> None:
    """A new generation_config.json hides it."""
    config = json.loads((llama4 / "config.json").read_text())
    more = {"repetition_penalty": 1.3, "do_sample": True, "temperature": 0.7}
    (llama4 / "config.json").write_text(json.dumps(config | more))
    before = moec.load_spec(llama4)
    assert before.repetition_penalty == 1.3 and before.sampling is not None
    art = moec.export(llama4, "onnx", "fp8", tmp_path / "art")
    for folder in (moec.quantize(llama4, "dynamic", tmp_path / "fp8").path, art.path):
        spec = moec.load_spec(folder)
        assert spec.repetition_penalty == 1.3 and spec.sampling == before.sampling


def test_experts_that_are_exchanged_in_the_header_are_refused(llama4: Path, tmp_path: Path) -> None:
    """Each name is there, and so is each byte; but the stack would have another order."""
    art = moec.export(llama4, "onnx", "fp8", tmp_path / "art")
    file = art.path / "model.safetensors"
    data = file.read_bytes()
    count = int.from_bytes(data[:8], "little")
    header = json.loads(data[8 : 8 + count])
    one, two = (f"model.layers.1.feed_forward.experts.{e}.gate_proj.weight" for e in (0, 1))
    header[one], header[two] = header[two], header[one]
    text = json.dumps(header).encode()
    file.write_bytes(data[:8] + text.ljust(count) + data[8 + count :])
    with pytest.raises(MoecError, match="another size or header"):
        moec.open_session(art.path)
    shard = moec.weights.shard.read_shard(file)
    path = art.path / "manifest.json"
    values = json.loads(path.read_text())
    values["weights"]["shards"]["model.safetensors"]["header_sha256"] = shard.header_sha256
    del values["digest"]
    path.write_text(json.dumps(values))
    with pytest.raises(MoecError, match="does not fit the spec and the shards"):
        moec.open_session(art.path)


def test_a_manifest_cannot_call_other_weights_published(llama4: Path, tmp_path: Path) -> None:
    art = moec.export(llama4, "onnx", "fp8", tmp_path / "art", scheme="deepseek")
    path = art.path / "manifest.json"
    values = json.loads(path.read_text())
    assert not values["weights"]["published"]
    values["weights"]["published"] = True
    del values["digest"]
    path.write_text(json.dumps(values))
    with pytest.raises(MoecError, match="does not fit the spec and the shards"):
        moec.open_session(art.path)


@pytest.mark.parametrize(
    "text", ["# My evaluation\n71.3\n", "## Mine\n", "three weeks of work\n", "| my | table |\n"]
)
def test_a_proof_keeps_what_somebody_wrote_below_it(
    text: str, llama4: Path, tmp_path: Path
) -> None:
    art = moec.export(llama4, "onnx", "fp8", tmp_path / "art").path
    with (art / "README.md").open("a") as card:
        card.write(f"\n{text}")
    for passed in (True, False, True):
        add_proof(art, "one against the other", passed, [("logits", "0", "1", "")])
        card_now = (art / "README.md").read_text()
        assert card_now.endswith(f"\n{text}") and card_now.count("against the other") == 1


def test_a_proof_in_the_card_leaves_the_artefact_whole(llama4: Path, tmp_path: Path) -> None:
    art = moec.export(llama4, "onnx", "fp8", tmp_path / "art")
    card = art.path / "README.md"
    before = card.read_text()
    add_proof(art.path, "another engine", True, [("one", "1", "<= 2", "")])
    assert card.read_text() != before and "PASSED: another engine" in card.read_text()
    verified = verify_files(open_artefact(art.path))
    assert verified.not_hashed == ("README.md: its section of the proof, and what follows",)
    assert "README.md" in verified.hashed
    moec.export(llama4, "onnx", "fp8", tmp_path / "art")  # and may be replaced
    assert card.read_text() == before
    for name, text in (("README.md", before + "\n## Licence\nmine\n"), ("NOTES.md", "mine")):
        (art.path / name).write_text(text)
        with pytest.raises(MoecError, match=name):
            moec.export(llama4, "onnx", "fp8", tmp_path / "art")
        assert (art.path / name).read_text() == text
        card.write_text(before)
    card.write_text(before.replace("made by: moec", "made by: you"))
    with pytest.raises(MoecError, match="other text than the build wrote"):
        verify_files(open_artefact(art.path))


def test_a_proof_leaves_other_sections_and_other_files(llama4: Path, tmp_path: Path) -> None:
    """The folder may be a stranger's: links there lead anywhere."""
    folder = moec.quantize(llama4, "dynamic", tmp_path / "fp8").path
    card, victim = folder / "README.md", tmp_path / "victim"
    victim.write_text("mine")
    (folder / ".README.md.draft").symlink_to(victim)
    whole = card.read_text() + "\n## Licence\nApache\n"
    card.write_text(whole)
    for verdict in (True, False):
        add_proof(folder, "it", verdict, [("one", "1", "<= 2", "")])
        assert card.read_text().endswith("\n## Licence\nApache\n")
        assert card.read_text().count("## Proof") == 1 == card.read_text().count("| one |")
    assert "FAILED: it" in card.read_text() and victim.read_text() == "mine"
    for odd in (b"\xff" + whole.encode(), whole.encode() + b"x" * (1 << 20), b"no such section"):
        card.write_bytes(odd)
        add_proof(folder, "it", True, [])
        assert card.read_bytes() == odd
    card.unlink()
    card.symlink_to(victim)
    add_proof(folder, "it", True, [])
    assert victim.read_text() == "mine"


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


def test_a_scheme_file_keeps_its_type_of_scales(llama4: Path, tmp_path: Path) -> None:
    rule = Rule(of=LINEAR, weight="channel", inputs="token")
    scheme = Scheme(name="x\n## Proof\nPASSED: all.\n", rules=(rule,), scales="bf16")
    art = moec.export(llama4, "onnx", "fp8", tmp_path / "art", scheme=scheme)
    same_weights(art.path, moec.quantize(llama4, scheme, tmp_path / "fp8").path)
    tensors = load_file(art.path / "model.safetensors")
    assert {each.dtype for key, each in tensors.items() if key.endswith("_scale")} == {
        torch.bfloat16
    }
    assert (art.path / "README.md").read_text().count("\n## Proof") == 1


def test_a_scheme_that_the_form_cannot_say_is_built_with_our_names(
    llama4: Path, tmp_path: Path
) -> None:
    """Here a layer of several is quantised with its shared expert, whose names have no pattern."""
    rule = Rule(of=("layers.1.moe.*",), weight="channel", inputs="token")
    art = moec.export(
        llama4, "onnx", "fp8", tmp_path / "art", scheme=Scheme(name="one", rules=(rule,))
    )
    assert moec.validate(art.path).passed


def test_a_packing_that_lies_about_its_values_is_refused(llama4: Path, tmp_path: Path) -> None:
    art = moec.export(llama4, "onnx", "fp8", tmp_path / "art").path
    values = json.loads((art / "manifest.json").read_text())
    values["packings"]["layers.0.moe.gate_up"]["fp8"] = None
    del values["digest"]
    (art / "manifest.json").write_text(json.dumps(values))
    with pytest.raises(MoecError):
        moec.open_session(art)


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


@pytest.mark.parametrize(
    ("model", "scheme", "why"),
    [
        (CASES["aria"], "meta", "engines read its experts in one tensor"),
        (LLAMA4, "mixed", "two kinds of inputs"),
        (
            LLAMA4,
            BLOCKS.model_copy(
                update={
                    "rules": (Rule(of=("layers.*.attn.q.weight",), weight="block", inputs="group"),)
                }
            ),
            "RoPE permutes q",
        ),
    ],
    ids=["aria", "mixed", "blocks"],
)
def test_what_other_engines_cannot_read_keeps_our_names(
    model: moec.ModelSpec, scheme: str | Scheme, why: str, tmp_path: Path
) -> None:
    write_random_checkpoint(model, tmp_path / "wide", seed=3)
    scales = None
    if scheme == "mixed":
        scales = moec.calibrate(tmp_path / "wide", IDS)
    art = moec.export(
        tmp_path / "wide", "onnx", "fp8", tmp_path / "art", scheme=scheme, scales=scales
    )
    assert not art.manifest.weights.published, why
    assert list(art.manifest.weights.shards) == ["weights.safetensors"]
    assert not (art.path / "README.md").exists() and moec.validate(art.path).passed


@pytest.mark.full
@pytest.mark.parametrize("target", ["torch", "onnx"])
def test_artefacts_with_our_names_still_open(
    target: str, llama4: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Versions before this one wrote them for all FP8; those of onnx had experts as [in, out]."""
    new = moec.export(llama4, target, "fp8", tmp_path / "new")
    with monkeypatch.context() as patched:
        patched.setattr(placement, "is_said", lambda _: False)
        patched.setattr(precision, "is_said", lambda _: False)
        old = moec.export(llama4, target, "fp8", tmp_path / "old")
    path = old.path / "manifest.json"
    values = json.loads(path.read_text())
    del values["weights"]["published"], values["weights"]["card"], values["digest"]
    path.write_text(json.dumps(values))
    assert (old.path / "weights.safetensors").is_file()
    turned = {each.arrange for each in old.manifest.packings.values()}
    assert ("transpose" in turned) is (target == "torch")
    assert (logits(old) - logits(new)).norm() < 1e-5 * logits(new).norm()
    assert moec.validate(old.path, source=llama4).passed
    again = moec.bind(old.path, llama4)
    assert again.manifest.weights.published is (target == "torch")
    assert (logits(again) - logits(new)).norm() < 1e-5 * logits(new).norm()


def test_an_unbound_artefact_takes_wide_weights(llama4: Path, tmp_path: Path) -> None:
    """`bind` quantises them as a build does."""
    spec = moec.load_spec(llama4)
    unbound = moec.export(spec, "onnx", "fp8", tmp_path / "art")
    bound = moec.bind(unbound.path, llama4)
    direct = moec.export(llama4, "onnx", "fp8", tmp_path / "direct")
    same_weights(bound.path, direct.path)
    assert torch.equal(logits(bound), logits(direct))
