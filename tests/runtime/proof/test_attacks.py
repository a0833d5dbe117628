"""What somebody found who attacked proofs: each passed once, or wrote where it must not."""

import json
import os
import shutil
from collections.abc import Callable
from pathlib import Path

import numpy as np
import onnx
import pytest
import torch

import moec
from moec.artefact.artefact import open_artefact, write_manifest
from moec.artefact.placement import INPUT_FILES
from moec.runtime.open import artefact_session
from moec.runtime.proof.each_op.stage import shown_layers
from moec.runtime.proof.source import (
    against_wide,
    read_source,
    schemes,
    text_against_source,
    weights_against_source,
)
from moec.spec.scheme import SCHEMES
from moec.weights.random import write_random_checkpoint
from tests.damage import json_file, listed_again, manifest, sealed, text
from tests.families import CASES
from tests.proofs import assert_passed
from tests.refusals import refusal
from tests.small import SMALL


@pytest.fixture(scope="module")
def built(checkpoint: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """An artefact of it with its own weights."""
    out = tmp_path_factory.mktemp("built") / "art"
    return moec.export(checkpoint, out=out, weights="copy").path


@pytest.fixture
def artefact(built: Path, tmp_path: Path) -> Path:
    """A copy to tamper with."""
    return Path(shutil.copytree(built, tmp_path / "art"))


def _trigger(folder: Path) -> None:
    """Negate the logits of calls of more than 600 tokens, which no proof makes."""
    file = folder / "model.onnx"
    model = onnx.load(file, load_external_data=False)
    last = next(node for node in model.graph.node if "logits" in node.output)
    last.output[0] = "logits/right"
    model.graph.initializer.extend(
        onnx.numpy_helper.from_array(np.array(value, kind), f"t_{name}")
        for name, value, kind in (
            ("most", 600, np.int64), ("minus", -1, np.float32), ("one", 1, np.float32)
        )
    )  # fmt: skip
    helper = onnx.helper.make_node
    model.graph.node.extend(
        [
            helper("Size", ["input_ids"], ["t/size"]),
            helper("Greater", ["t/size", "t_most"], ["t/many"]),
            helper("Where", ["t/many", "t_minus", "t_one"], ["t/sign"]),
            helper("Mul", ["logits/right", "t/sign"], ["logits"]),
        ]
    )
    onnx.save(model, file)
    listed_again(folder, "model.onnx")


@pytest.mark.parametrize("version", [None, "0.0.1"])
def test_a_graph_that_waits_for_long_calls_fails(artefact: Path, version: str | None) -> None:
    _trigger(artefact)
    if version:
        json_file("manifest.json", lambda held: held["versions"].update(moec=version))(artefact)
        sealed(artefact)
    report = moec.validate(artefact, tokens=4, seed=1)
    assert not report.passed
    assert (report.first_divergence or "").startswith("model.onnx: ")
    (detail,) = (check.detail for check in report.checks if not check.passed)
    assert ("moec 0.0.1" in detail) == bool(version)


def test_a_graph_that_is_not_listed_is_refused(artefact: Path) -> None:
    json_file("manifest.json", lambda held: held["files"].pop("model.onnx"))(artefact)
    sealed(artefact)
    (artefact / "model.onnx").unlink()
    os.mkfifo(artefact / "model.onnx")
    refusal(lambda: moec.open_session(artefact), "files", 2)


def test_a_manifest_is_written_through_no_link(artefact: Path, tmp_path: Path) -> None:
    mine = tmp_path / "mine"
    mine.write_text("mine")
    for name in (f".manifest.json.{os.getpid()}", ".manifest.json.0"):
        (artefact / name).symlink_to(mine)
    write_manifest(artefact, open_artefact(artefact).manifest)
    assert mine.read_text() == "mine" and not (artefact / "manifest.json").is_symlink()


def test_a_checkpoint_inside_the_artefact_is_no_source(artefact: Path, checkpoint: Path) -> None:
    shutil.copytree(checkpoint, artefact / "ck")
    put = {"checkpoint": str((artefact / "ck").resolve())}
    json_file("manifest.json", lambda held: held.update(put))(artefact)
    sealed(artefact)
    report = moec.validate(artefact, tokens=4, seed=1)
    assert any("were not compared with a checkpoint" in note for note in report.notes)
    assert not any(check.name.startswith("weights") for check in report.checks)


SAYS: dict[str, Callable[[Path], None]] = {
    "eos": manifest("spec.tokens.eos", [7]),
    "pad": manifest("spec.tokens.pad", 7),
    "sampling": manifest("spec.sampling", {"temperature": 5.0}),
    "tokenizer.json": text("tokenizer.json", "{}"),
    "special_tokens_map.json": text("special_tokens_map.json", '{"bos_token": "x"}'),
    "chat_template.jinja": text("chat_template.jinja", "x"),
    "preprocessor_config.json": text("preprocessor_config.json", "{}"),
}


@pytest.mark.parametrize("what", SAYS)
def test_tokens_and_text_are_those_of_the_checkpoint(
    what: str, checkpoint: Path, artefact: Path, tmp_path: Path
) -> None:
    """No number of a graph depends on them, but what people get does."""
    source = tmp_path / "source"
    shutil.copytree(checkpoint, source)
    for folder in (source, artefact):
        (folder / "tokenizer.json").write_text('{"version": "1.0"}')
    spec = moec.load_spec(source)
    (check,) = text_against_source(open_artefact(artefact), spec, source)
    assert check.passed and "1 files" in check.detail
    SAYS[what](artefact)
    (check,) = text_against_source(open_artefact(artefact), spec, source)
    assert not check.passed and check.name == f"text: {what}"


@pytest.mark.parametrize("name", INPUT_FILES)
def test_a_file_of_text_that_is_missing_is_found(
    name: str, checkpoint: Path, artefact: Path, tmp_path: Path
) -> None:
    """Without it, sessions would take other tokens, or fill another template."""
    source = tmp_path / "source"
    shutil.copytree(checkpoint, source)
    file = source / name
    file.parent.mkdir(exist_ok=True)
    file.write_text("{}")
    put = {"checkpoint": "/nowhere"}
    json_file("manifest.json", lambda held: held.update(put))(artefact)
    sealed(artefact)
    spec = moec.load_spec(source)
    (check,) = text_against_source(open_artefact(artefact), spec, source)
    assert not check.passed and check.name == f"text: {name}" and "no such file" in check.detail


def test_a_proof_compares_tokens_with_the_checkpoint(artefact: Path) -> None:
    manifest("spec.tokens.eos", [7])(artefact)
    sealed(artefact)
    report = moec.validate(artefact, tokens=4, seed=1)
    failed = [check.name for check in report.checks if not check.passed]
    assert failed == ["text: eos", "as a checkpoint"]


def _floor(rows: torch.Tensor) -> torch.Tensor:
    return (rows + 1.28).floor()


@pytest.mark.parametrize("rounding", [torch.floor, torch.trunc, _floor])
def test_integers_that_are_not_rounded_to_the_nearest_are_found(
    rounding: Callable[[torch.Tensor], torch.Tensor], checkpoint: Path, tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:  # fmt: skip
    pytest.importorskip("onnxruntime")
    monkeypatch.setattr(torch.Tensor, "round_", lambda x: x.copy_(rounding(x)))
    art = moec.export(checkpoint, target="ort", precision="int4", out=tmp_path / "art")
    monkeypatch.undo()
    checks = list(weights_against_source(art, read_source(art, checkpoint)[1]))
    assert any(not check.passed and "gate_up" in check.name for check in checks)


def _nudged(artefact: moec.Artefact, name: str, at: int) -> None:
    """Change one byte of the middle of a stored tensor by one."""
    entry = artefact.stored()[name]
    with entry.file.open("r+b") as file:
        file.seek(entry.offset + at * (entry.nbytes - 1) // 7)
        byte = file.read(1)[0]
        file.seek(-1, 1)
        file.write(bytes([byte ^ 1]))


@pytest.mark.full
@pytest.mark.parametrize(
    "precision, scheme",
    [
        ("int4", None),
        ("int8", None),
        ("fp8", "dynamic"),
        ("fp8", "deepseek"),
        ("fp8", "modelopt"),
    ],
)
def test_one_code_or_scale_is_found_and_sound_weights_pass(
    precision: str, scheme: str | None, tiny: Path, tmp_path: Path
) -> None:
    """However near it is: moec packs the checkpoint's weights again, and compares bytes."""
    target = "ort" if scheme is None else "onnx"
    art = moec.export(tiny, target, precision, tmp_path / "art", scheme=scheme)
    _, source = read_source(art, tiny)
    assert all(check.passed for check in weights_against_source(art, source))
    packings = art.manifest.packings.values()
    quantised = [each for each in packings if each.bits or each.fp8]
    names = [name for each in quantised for name in each.names(art.manifest.spec.dtype)]
    chosen = {name: at for at, name in enumerate(names[:: len(names) // 7 | 1][:8])}
    assert len({name.rpartition(".")[2] for name in chosen}) > 1, "codes and scales"
    for name, at in chosen.items():
        _nudged(art, name, at)
    wrong = {check.name.split("[")[0] for check in weights_against_source(art, source)
             if not check.passed}  # fmt: skip
    sources = {each.source for each in quantised
               if chosen.keys() & set(each.names(art.manifest.spec.dtype))}  # fmt: skip
    assert len(wrong) == len(sources), (wrong, sources)


def _against(art: moec.Artefact, checkpoint: Path) -> dict[str, bool]:
    """What the checkpoint says of scheme and static scales: the checks, and whether they passed."""
    spec, entries = read_source(art, checkpoint)
    ids = torch.randint(0, spec.text.vocab, (2, 40), generator=torch.Generator().manual_seed(1))
    lengths = torch.tensor([40, 30])
    taps = shown_layers(spec)
    found = artefact_session(art, taps=taps).trace(ids, lengths, taps)
    wide = against_wide(art, spec, entries, ids, lengths, found)
    return {check.name: check.passed for check in (*schemes(art, spec), *wide)}


@pytest.mark.slow
def test_static_scales_and_schemes_that_are_far_off_fail(tiny: Path, tmp_path: Path) -> None:
    """Engine and reference both follow them, so that only the checkpoint can tell."""
    art = moec.export(tiny, "onnx", "fp8", tmp_path / "static", scheme="static")
    assert _against(art, tiny) == {"FP8 scheme": True, "logits, what FP8 changes": True}
    for name, entry in art.stored().items():
        if name.endswith("input_scale"):
            with entry.file.open("r+b") as file:
                file.seek(entry.offset)
                scales = np.frombuffer(file.read(entry.nbytes), np.float32) / 50
                file.seek(entry.offset)
                file.write(scales.astype(np.float32).tobytes())
    assert _against(art, tiny) == {"FP8 scheme": True, "logits, what FP8 changes": False}

    lie = SCHEMES["meta"].model_copy(update={"bound": 0.02})
    art = moec.export(tiny, "onnx", "fp8", tmp_path / "meta", scheme=lie)
    assert _against(art, tiny) == {"FP8 scheme": False, "logits, what FP8 changes": False}
    own = lie.model_copy(update={"name": "mine", "bound": 1e4})  # nothing to be compared with
    art = moec.export(tiny, "onnx", "fp8", tmp_path / "mine", scheme=own)
    assert _against(art, tiny) == {"logits, what FP8 changes": True}


@pytest.mark.full
def test_a_proof_measures_what_fp8_changes(tmp_path: Path) -> None:
    write_random_checkpoint(SMALL, tmp_path / "small")
    art = moec.export(tmp_path / "small", "onnx", "fp8", tmp_path / "art")
    report = moec.validate(art.path, tokens=40, seed=1)
    assert_passed(report)
    assert {"FP8 scheme", "logits, what FP8 changes"} <= {check.name for check in report.checks}


def test_an_output_that_is_missing_is_said(artefact: Path) -> None:
    file = artefact / "model.onnx"
    model = onnx.load(file, load_external_data=False)
    at = next(i for i, each in enumerate(model.graph.output) if each.name == "present.1.key")
    del model.graph.output[at]
    onnx.save(model, file)
    listed_again(artefact, "model.onnx")
    refusal(lambda: moec.open_session(artefact).logits([[1, 2]]), "present.1.key", 1)


def test_a_command_in_a_message_is_quoted(artefact: Path, tmp_path: Path) -> None:
    held = json.loads((artefact / "manifest.json").read_text())
    folder = str(tmp_path / "a; touch pwned #")
    held["weights"] |= {"folder": folder, "mode": "in-place"}
    (artefact / "manifest.json").write_text(json.dumps(held))
    sealed(artefact)
    with pytest.raises(moec.MoecError) as caught:
        moec.open_session(artefact)
    assert f"'{folder}'" in caught.value.next_step


@pytest.mark.full
def test_another_number_of_chosen_experts_is_a_failed_proof(tmp_path: Path) -> None:
    """The manifest says that three experts are chosen, and the graph chooses two."""
    spec = CASES["olmoe"]
    experts = spec.text.experts
    assert experts is not None
    two = spec.text.model_copy(update={"experts": experts.model_copy(update={"top_k": 2})})
    write_random_checkpoint(spec.model_copy(update={"text": two}), tmp_path / "weights", seed=3)
    moec.export(tmp_path / "weights", "ort", "fp32", tmp_path / "art", weights="copy")
    manifest("spec.text.experts.top_k", 3)(tmp_path / "art")
    sealed(tmp_path / "art")
    refusal(lambda: moec.validate(tmp_path / "art"), "top_k")  # its checkpoint says two
    shutil.rmtree(tmp_path / "weights")
    report = moec.validate(tmp_path / "art")
    assert not report.passed
