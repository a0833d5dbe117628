"""Damage is found by its hash: by `inspect --verify`, and at opening where a session reads it."""

import json
import os
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

import moec
from moec.artefact.artefact import open_artefact, verify_files, write_manifest
from moec.artefact.manifest import NAME
from moec.runtime.proof.report import Check, Report
from moec.spec.errors import MoecError
from moec.weights.trust.records import allow_folder
from tests.conftest import TINY, run_command
from tests.damage import FIRST, SECOND, Damage, json_file, remove
from tests.refusals import refusal, refused_and_nothing_left
from tests.trees import tree

#: how the weights of an artefact were placed -> how it is built
BASES: dict[str, dict[str, Any]] = {
    "copy": {"weights": "copy"},
    "pack": {"target": "ort", "precision": "int4"},
    "fp8": {"precision": "fp8"},
    "in place": {"hash_weights": True},
    "link": {"weights": "link", "hash_weights": True},
}
#: a report that says what its author likes
PASSED = Report("art", "onnxruntime", "eager fp32", "fp32", 1, [3], checks=[
    Check("layers.0", "error", 0.0, 1e-4)
]).to_dict()  # fmt: skip
EXPERTS = "layers.0.moe.down"


@pytest.fixture(scope="module")
def source(sound: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A checkpoint with a tokenizer."""
    folder = Path(shutil.copytree(sound, tmp_path_factory.mktemp("source") / "checkpoint"))
    shutil.copy(TINY / "tokenizer.json", folder)
    return folder


@pytest.fixture(scope="module")
def bases(source: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    folder = tmp_path_factory.mktemp("bases")
    return {  # the widths of `source` are too small for four bits
        name: moec.export(TINY if name == "pack" else source, out=folder / name, **options).path
        for name, options in BASES.items()
    }


@pytest.fixture
def art(request: pytest.FixtureRequest, bases: dict[str, Path], tmp_path: Path) -> Path:
    """A copy of a base that a test may damage; weights in place are copied too."""
    name = request.param
    folder = Path(shutil.copytree(bases[name], tmp_path / "art"))
    found = open_artefact(folder)
    if found.manifest.weights.folder:
        own = Path(shutil.copytree(found.weights_folder, tmp_path / "checkpoint"))
        weights = found.manifest.weights.model_copy(update={"folder": str(own)})
        allow_folder(own)  # as a build from there would
        write_manifest(folder, found.manifest.model_copy(update={"weights": weights}))
    return folder


def flip(path: Path, at: int, bit: int = 1) -> None:
    raw = bytearray(path.read_bytes())
    raw[at] ^= bit
    path.unlink()  # a hard link keeps what it had
    path.write_bytes(raw)


def _place(folder: Path, name: str) -> tuple[Path, int, int]:
    """The file, offset and length of a stored tensor whose name starts so."""
    art = open_artefact(folder)
    refs = art.manifest.weights.tensors
    ref = refs[next(each for each in sorted(refs) if each.startswith(name))]
    return art.weights_folder / ref.file, ref.offset, ref.length


def _data(folder: Path) -> None:
    file, offset, length = _place(folder, "layers.1.attn.q.weight")
    flip(file, offset + length // 2)


def _last_byte(folder: Path) -> None:
    for file in {_place(folder, name)[0] for name in ("embed", "head", "layers.3")}:
        flip(file, file.stat().st_size - 1, 0x80)


def _swapped_experts(folder: Path) -> None:
    art = open_artefact(folder)
    count = art.manifest.spec.text.experts.count
    file, offset, length = _place(folder, EXPERTS)
    size, raw = length // count, bytearray(file.read_bytes())
    first, second = (slice(offset + i * size, offset + (i + 1) * size) for i in (0, 1))
    raw[first], raw[second] = raw[second], raw[first]
    file.unlink()
    file.write_bytes(raw)


def _link_to_another(folder: Path) -> None:
    file, offset, length = _place(folder, "layers.1.attn.q.weight")
    other = file.with_name("other.safetensors")  # one elsewhere would not be looked at
    shutil.copyfile(file, other)
    flip(other, offset + length - 1)
    file.unlink()
    file.symlink_to(other)


def _header(folder: Path) -> None:
    """The name of a tensor has changed; the header is as long as it was."""
    file, *_ = _place(folder, "layers.1.attn.q.weight")
    raw = file.read_bytes()
    flip(file, raw.index(b"weight") + 1)


def _truncated_weights(folder: Path) -> None:
    file, *_ = _place(folder, "layers.1.attn.q.weight")
    raw = file.read_bytes()[:-100]
    file.unlink()
    file.write_bytes(raw)


def _swapped_shards(folder: Path) -> None:
    root = open_artefact(folder).weights_folder
    (root / FIRST).rename(root / "x")
    (root / SECOND).rename(root / FIRST)
    (root / "x").rename(root / SECOND)


def _swapped_references(values: dict[str, Any]) -> None:
    refs = values["weights"]["tensors"]
    names = [name for name in sorted(refs) if ".attn.q.weight" in name]
    a, b = next(
        (a, b)
        for a in names
        for b in names
        if a.split(".")[1] < b.split(".")[1] and refs[a]["length"] == refs[b]["length"]
    )
    refs[a], refs[b] = refs[b], refs[a]


def _edited(change: Callable[[dict[str, Any]], object]) -> Damage:
    return json_file(NAME, change)


def _in_file(name: str, share: float = 0.5) -> Damage:
    return lambda folder: flip(folder / name, int((folder / name).stat().st_size * share))


def _constant(folder: Path) -> None:
    """A bit of epsilon, which ONNX Runtime opens as it opens any other number."""
    raw = (folder / "model.onnx").read_bytes()
    flip(folder / "model.onnx", raw.index(b"epsilon") + len("epsilon") + 3, 0x10)


ALL, OWN = tuple(BASES), ("copy", "pack", "fp8")
#: damage to the data of weights, which only hashing all of them finds -> bases
OF_DATA: dict[str, tuple[Damage, tuple[str, ...]]] = {
    "a byte of data": (_data, ALL),
    "the last byte": (_last_byte, ALL),
    "two experts swapped": (_swapped_experts, ALL),
    "a link to another file": (_link_to_another, ALL),
}
#: damage that opening finds too
OF_THE_REST: dict[str, tuple[Damage, tuple[str, ...]]] = {
    "a byte of a header": (_header, ALL),
    "weights cut short": (_truncated_weights, ALL),
    "shards swapped": (_swapped_shards, ("copy", "in place", "link")),
    "two references swapped": (_edited(_swapped_references), ALL),
    "another epsilon": (_edited(lambda v: v["spec"]["text"].update(norm_eps=0.1)), ALL),
    "another chunk": (_edited(lambda v: v["spec"]["text"].update(chunk=2)), ALL),
    "a faked report": (_edited(lambda v: v.update(parity=PASSED)), ALL),
    "no report": (_edited(lambda v: v.update(parity={"passed": True, "checks": []})), ("copy",)),
    "another hash": (_edited(lambda v: v["files"]["model.onnx"].update(sha256="0")), ("copy",)),
    "no vision tower": (remove("vision.onnx"), ALL),
    "a byte of the vision tower": (_in_file("vision.onnx"), ALL),
    "a byte of the model": (_in_file("model.onnx", 0.3), ALL),
    "another model at the end": (_in_file("model.onnx", 0.999), ALL),
    "a byte of the tokenizer": (_in_file("tokenizer.json"), OWN),
    "a byte of the config": (_in_file("config.json"), OWN),
}


def _rows(cases: dict[str, tuple[Damage, tuple[str, ...]]]) -> list[Any]:
    return [
        pytest.param(base, damage, id=f"{base}: {name}")
        for name, (damage, bases) in cases.items()
        for base in bases
    ]


@pytest.mark.parametrize(("art", "damage"), _rows(OF_DATA | OF_THE_REST), indirect=["art"])
def test_verify_finds(art: Path, damage: Damage) -> None:
    assert run_command("inspect", art, "--verify")[0] == 0
    damage(art)
    code, out, err = run_command("inspect", art, "--verify")
    assert code in (1, 2) and "verified" not in out
    assert err.startswith("error: ") and "  next: " in err


@pytest.mark.parametrize(("art", "damage"), _rows(OF_THE_REST), indirect=["art"])
def test_opening_finds(art: Path, damage: Damage) -> None:
    damage(art)
    with pytest.raises(MoecError) as caught:
        moec.open_session(art)
    assert caught.value.exit_code in (1, 2)


@pytest.mark.parametrize("art", ["copy"], indirect=True)
@pytest.mark.parametrize("engine", ["onnxruntime", "eager"])
def test_other_bytes_are_a_failed_check_whatever_runs_them(art: Path, engine: str) -> None:
    _constant(art)
    refusal(lambda: moec.open_session(art, engine=engine), "model.onnx", code=1)


@pytest.mark.parametrize("art", ALL, indirect=True)
def test_files_that_were_only_touched_or_linked_are_as_they_were(art: Path) -> None:
    file, *_ = _place(art, "layers.1.attn.q.weight")
    for path in (file, art / "model.onnx", art / NAME):
        os.utime(path, ns=(10**18, 10**18))
    file.rename(file.with_name("blob"))
    file.symlink_to("blob")
    found = open_artefact(art)
    assert file.relative_to(found.weights_folder).as_posix() in verify_files(found).hashed


def test_verified_is_said_only_of_what_was_hashed(source: Path, tmp_path: Path) -> None:
    art = moec.export(source, out=tmp_path / "art").path
    (art / "notes.txt").write_text("mine")
    _, out, _ = run_command("inspect", art, "--verify")
    verified = next(line for line in out.splitlines() if line.startswith("verified: "))
    assert "model.onnx" in verified and FIRST not in verified
    for name in (FIRST, SECOND, "notes.txt"):
        assert f"not hashed: {name}: " in out
    assert "damage, not malice" in out


def test_an_older_manifest_without_a_digest_opens_and_inspect_says_so(
    artefact: Path,
) -> None:
    json_file(NAME, lambda values: values.pop("digest"))(artefact)
    moec.open_session(artefact)
    code, out, _ = run_command("inspect", artefact, "--verify")
    assert code == 0 and f"not hashed: {NAME}: it has no digest" in out


@pytest.mark.parametrize("part", ["model.onnx", "vision.onnx", NAME])
def test_bind_refuses_a_damaged_graph_and_writes_nothing(
    source: Path, tmp_path: Path, part: str
) -> None:
    spec = moec.load_spec(source)
    art = moec.export(spec, out=tmp_path / "art").path
    if part == NAME:
        json_file(NAME, lambda values: values.update(opset=23))(art)
    else:
        flip(art / part, (art / part).stat().st_size // 3)
    refused_and_nothing_left(tmp_path, lambda: moec.bind(art, source), part, code=1)
    refused_and_nothing_left(
        tmp_path, lambda: moec.bind(art, source, tmp_path / "new", weights="copy"), part, code=1
    )


def test_the_digest_is_of_the_content_and_not_of_its_layout(artefact: Path) -> None:
    values = json.loads((artefact / NAME).read_text())
    turned = dict(reversed(values.items()))
    (artefact / NAME).write_text(json.dumps(turned, separators=(",", ":")))
    moec.open_session(artefact)


def test_a_build_says_nothing_of_when_and_how_long(source: Path, tmp_path: Path) -> None:
    arts = [moec.export(source, out=tmp_path / name, weights="copy") for name in "ab"]
    assert tree(arts[0].path) == tree(arts[1].path)
    assert arts[0].manifest.build.seconds and arts[0].manifest.build.peak_bytes > 0
    stored = json.loads((tmp_path / "a" / NAME).read_text())["build"]
    assert stored.keys() == {"bytes_written", "bytes_copied", "bytes_packed"}


@pytest.mark.parametrize("base", ["pack", "fp8"])
def test_packed_weights_have_the_hashes_of_their_bytes(bases: dict[str, Path], base: str) -> None:
    artefact = open_artefact(bases[base])
    weights = artefact.manifest.weights
    assert weights.hashes.keys() == weights.tensors.keys()
    assert any(each.pieces > 1 for each in weights.hashes.values())
    assert weights.shards.keys() <= set(verify_files(artefact).hashed)
