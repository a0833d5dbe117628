"""Packing that was cut off goes on where it was, if all is as it was; else it starts anew."""

import hashlib
import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

import moec
from moec.artefact.artefact import open_artefact, verify_files
from moec.artefact.card import CARD
from moec.spec.errors import MoecError
from moec.spec.hf.forms import SINGLE
from moec.weights.packed.file import write_packed
from moec.weights.packed.hashed import tensor_sha256
from moec.weights.packed.journal import PACKED, Hash
from moec.weights.packing import Packing
from moec.weights.random import write_random_checkpoint
from moec.weights.shard import TensorEntry, read_shard
from moec.weights.trust import leftovers
from tests.damage import SECOND, SPEC
from tests.refusals import one_message
from tests.trees import names, tree

pytestmark = pytest.mark.full

ROOT = Path(__file__).parents[2]
JOURNAL = f"{PACKED}.journal"
SINGLES_JOURNAL = f"{SINGLE}.journal"
PACKINGS = {
    "experts": Packing(source="experts", dtype="fp32", fp8="channel"),
    "linear": Packing(source="linear", dtype="bf16", fp8="block", block=4),
    "later": Packing(source="later", arrange="transpose", dtype="fp32", fp8="channel"),
    "head.int8": Packing(source="head", dtype="fp32", bits=8, block=16),
    "norm.fp32": Packing(source="norm", dtype="fp32"),
    "kept": Packing(source="kept", dtype="bf16"),
}
CONSTANTS = {"linear.input_scale": torch.tensor(0.5)}
#: bytes of the sources, in file order
SIZES = {
    "experts": 576, "later": 576, "head": 640, "kept": 70, "linear": 440, "norm": 64,
}  # fmt: skip


class Stop(BaseException):
    """What cuts packing off."""


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Holds weights whose every parameter lands at once, and some come in several pieces."""
    monkeypatch.setattr("moec.weights.packed.file.JOURNAL_BYTES", 1)
    monkeypatch.setattr("moec.weights.packed.file.ELEMENTS_AT_ONCE", 64)
    _write_source(tmp_path, seed=0)
    return tmp_path


def _write_source(folder: Path, seed: int) -> None:
    generator = torch.Generator().manual_seed(seed)
    shapes = {
        "experts": (3, 8, 12),
        "later": (3, 12, 8),
        "linear": (11, 20),
        "head": (8, 40),
        "norm": (32,),
    }
    tensors = {
        name: torch.randn(shape, generator=generator).bfloat16()
        for name, shape in (shapes | {"kept": (7, 5)}).items()
    }
    save_file(tensors, folder / "in.safetensors")


def _pack(
    folder: Path,
    name: str = PACKED,
    packings: dict[str, Packing] = PACKINGS,
    progress: Callable[[int, int], None] = lambda done, total: None,
) -> int:
    entries = read_shard(folder / "in.safetensors").tensors
    return write_packed(folder / name, packings, entries, progress, CONSTANTS)


def _cut_off(folder: Path, call: int) -> None:
    """Pack, but stop at this call of progress."""
    calls = 0

    def progress(done: int, total: int) -> None:
        nonlocal calls
        calls += 1
        if calls == call:
            raise Stop

    with pytest.raises(Stop):
        _pack(folder, progress=progress)


def _landed(folder: Path) -> list[str]:
    return [json.loads(line)[0] for line in (folder / JOURNAL).read_text().split("\n")[1:-1]]


def _fresh(folder: Path, packings: dict[str, Packing] = PACKINGS) -> bytes:
    """What packing in one go gives."""
    assert _pack(folder, "whole", packings) == sum(SIZES.values())
    return (folder / "whole").read_bytes()


def _in_order(entries: dict[str, TensorEntry]) -> list[str]:
    return sorted(entries, key=lambda name: entries[name].offset)


def _calls(folder: Path) -> int:
    calls: list[int] = []
    _pack(folder, "counted", progress=lambda done, total: calls.append(done))
    return len(calls)


def test_packing_goes_on_wherever_it_was_cut_off(folder: Path) -> None:
    entries = read_shard(folder / "in.safetensors").tensors
    assert {name: entry.nbytes for name, entry in entries.items()} == SIZES
    whole, calls, seen = _fresh(folder), _calls(folder), set()
    assert calls > len(PACKINGS), "a parameter in several pieces"
    for call in range(1, calls + 1):
        _cut_off(folder, call)
        landed = [PACKINGS[name].source for name in _landed(folder)]
        assert landed == _in_order(entries)[: len(landed)]
        done = sum(SIZES[name] for name in landed)
        steps: list[tuple[int, int]] = []
        read = _pack(folder, progress=lambda *step, to=steps: to.append(step))
        assert read == sum(SIZES.values()) - done, "what had landed is not read"
        assert done < steps[0][0] <= done + read and steps[-1] == (sum(SIZES.values()),) * 2
        assert len(steps) <= calls - len(landed)
        assert (folder / PACKED).read_bytes() == whole
        assert not (folder / JOURNAL).exists()
        (folder / PACKED).unlink()
        seen.add(len(landed))
    assert seen == set(range(len(PACKINGS))), "cut off in each of them"


def test_packing_may_be_cut_off_again_and_again(folder: Path) -> None:
    whole, before = _fresh(folder), list[str]()
    for _ in range(3):
        _cut_off(folder, 7 if not before else 2)  # experts come in six pieces
        assert before == _landed(folder)[: len(before)] != _landed(folder)
        before = _landed(folder)
    assert _pack(folder) == sum(SIZES.values()) - sum(SIZES[PACKINGS[n].source] for n in before)
    assert (folder / PACKED).read_bytes() == whole


def _touch(folder: Path) -> None:
    status = (folder / "in.safetensors").stat()
    os.utime(folder / "in.safetensors", ns=(status.st_atime_ns, status.st_mtime_ns + 1))


def _move(folder: Path) -> None:
    """The same file under the same name, but another inode."""
    path = folder / "in.safetensors"
    path.write_bytes(path.rename(folder / "old.safetensors").read_bytes())


def _grow(folder: Path) -> None:
    """Another size, the same time: the header ends with more spaces."""
    path = folder / "in.safetensors"
    status, raw = path.stat(), path.read_bytes()
    end = 8 + int.from_bytes(raw[:8], "little")
    path.write_bytes(end.to_bytes(8, "little") + raw[8:end] + b" " * 8 + raw[end:])
    os.utime(path, ns=(status.st_atime_ns, status.st_mtime_ns))


def _journal(change: Callable[[str], str]) -> Callable[[Path], object]:
    return lambda folder: (folder / JOURNAL).write_text(change((folder / JOURNAL).read_text()))


@pytest.mark.parametrize(
    "change",
    [
        _grow,
        lambda folder: _write_source(folder, seed=1),
        lambda folder: (folder / PACKED).unlink(),
        lambda folder: (folder / JOURNAL).unlink(),
        _journal(lambda text: ""),
        _journal(lambda text: text[:30]),
        _journal(lambda text: text.split("\n")[0]),
        _journal(lambda text: text[1:]),
        _journal(lambda text: "0" + text[1:] if text[0] != "0" else "1" + text[1:]),
        _journal(lambda text: "\n" + text),
        _journal(lambda text: text + '["another", 0, {}]\n'),
        _journal(lambda text: text + "another\n"),
        lambda folder: (folder / JOURNAL).write_bytes((folder / JOURNAL).read_bytes() + b"\xff\n"),
        lambda folder: os.truncate(folder / PACKED, 500),
    ],
    ids=[
        "source grown", "another source", "no file", "no journal",
        "journal empty", "journal cut", "journal of nothing", "journal damaged",
        "journal of another", "journal shifted", "an unknown name", "no JSON",
        "no text", "file cut",
    ],
)  # fmt: skip
def test_anything_else_starts_anew(folder: Path, change: Callable[[Path], object]) -> None:
    _cut_off(folder, _calls(folder))
    assert len(_landed(folder)) == len(PACKINGS) - 1
    change(folder)
    assert _pack(folder) == sum(SIZES.values())
    assert (folder / PACKED).read_bytes() == _fresh(folder)
    assert not (folder / JOURNAL).exists()


@pytest.mark.parametrize("link", [Path.symlink_to, Path.hardlink_to], ids=["link", "hard link"])
@pytest.mark.parametrize("name", [PACKED, JOURNAL])
@pytest.mark.parametrize("cut_off", [False, True])
def test_packing_writes_through_no_link(
    folder: Path, tmp_path: Path, name: str, link: Callable[[Path, Path], None], cut_off: bool
) -> None:
    """What is linked holds what was cut off, or something else."""
    whole, other = _fresh(folder), tmp_path / "other"
    if cut_off:
        _cut_off(folder, _calls(folder))
        (folder / name).rename(other)
    else:
        other.write_text("mine\nmine\n")
    before = other.read_bytes()
    link(folder / name, other)
    assert _pack(folder) == sum(SIZES.values())
    assert other.read_bytes() == before and (folder / PACKED).read_bytes() == whole


@pytest.mark.parametrize(
    "update",
    [{"fp8": "expert"}, {"fp8": "tensor"}, {"fp8": "block"}, {"dtype": "bf16"}, {"block": 8}],
    ids=str,
)
def test_another_packing_starts_anew(folder: Path, update: dict[str, object]) -> None:
    _cut_off(folder, _calls(folder))
    other = {**PACKINGS, "experts": PACKINGS["experts"].model_copy(update=update)}
    assert _pack(folder, packings=other) == sum(SIZES.values())
    assert (folder / PACKED).read_bytes() == _fresh(folder, other)


@pytest.mark.parametrize("change", [_touch, _move], ids=["touched", "moved"])
def test_times_and_places_of_files_do_not_matter(
    folder: Path, change: Callable[[Path], None]
) -> None:
    whole = _fresh(folder)
    _cut_off(folder, _calls(folder))
    done = sum(SIZES[PACKINGS[name].source] for name in _landed(folder))
    change(folder)
    assert _pack(folder) == sum(SIZES.values()) - done
    assert (folder / PACKED).read_bytes() == whole


@pytest.mark.parametrize("name", list(SIZES))
def test_a_weight_whose_source_has_changed_is_packed_again(folder: Path, name: str) -> None:
    """One byte has changed; size, header and time of the file are as they were."""
    _cut_off(folder, _calls(folder))
    landed = [PACKINGS[each].source for each in _landed(folder)]
    path = folder / "in.safetensors"
    status, entry, raw = path.stat(), read_shard(path).tensors[name], bytearray(path.read_bytes())
    raw[entry.offset + entry.nbytes // 2] ^= 1
    path.write_bytes(raw)
    os.utime(path, ns=(status.st_atime_ns, status.st_mtime_ns))
    kept = sum(SIZES[each] for each in landed if each != name)
    assert _pack(folder) == sum(SIZES.values()) - kept
    assert (folder / PACKED).read_bytes() == _fresh(folder)


def test_hashes_are_those_of_the_file_wherever_it_was_cut_off(folder: Path) -> None:
    for call in range(_calls(folder) + 1):
        if call:
            _cut_off(folder, call)
        hashes: dict[str, Hash] = {}
        entries = read_shard(folder / "in.safetensors").tensors
        write_packed(folder / PACKED, PACKINGS, entries, lambda *_: None, CONSTANTS, hashes)
        tensors = read_shard(folder / PACKED).tensors
        assert hashes.keys() == tensors.keys()
        for name, (sha256, pieces) in hashes.items():
            at = tensors[name]
            assert pieces == (3 if at.name in ("experts", "later") else 1)
            assert sha256 == tensor_sha256(at.file, at.offset, at.nbytes, pieces), (call, name)
        at = tensors["head.int8"]
        whole = (folder / PACKED).read_bytes()[at.offset : at.offset + at.nbytes]
        assert hashes["head.int8"].sha256 == hashlib.sha256(whole).hexdigest()
        (folder / PACKED).unlink()


def test_a_name_that_was_cut_off_has_not_landed(folder: Path) -> None:
    _cut_off(folder, _calls(folder))
    *_, last = _landed(folder)
    _journal(lambda text: text[:-3])(folder)
    expected = SIZES["norm"] + SIZES[PACKINGS[last].source]
    whole = _fresh(folder)
    assert _pack(folder) == expected
    assert (folder / PACKED).read_bytes() == whole


# ---------------------------------------------------------------- the command line

#: the real command line, but packing stops half way, says so, and waits for its parent
COMMAND = """
import contextlib, os, signal, sys
import moec.cli, moec.cli.artefacts, moec.weights.packed.file

moec.weights.packed.file.JOURNAL_BYTES = 1
os.fsync = lambda file: None  # a kill leaves what the system was given; a busy disk takes seconds
signal.signal(signal.SIGINT, signal.default_int_handler)  # also below a shell that ignores it

@contextlib.contextmanager
def bar(*args, **kwargs):
    waited = []

    def progress(name, done, total):
        if name == "pack" and 2 * done > total and not waited:
            waited.append(name)
            print("reached", flush=True)
            sys.stdin.readline()

    yield progress

moec.cli.artefacts.bar = bar
moec.cli.main()
"""


@contextmanager
def _stopped(checkpoint: Path, out: Path) -> Iterator[subprocess.Popen[str]]:
    """A build of `out` in FP8, in a process of its own that has packed a half and waits there."""
    command = [sys.executable, "-c", COMMAND, "build", "--no-validate", "--precision", "fp8"]
    process = subprocess.Popen(
        [*command, "--checkpoint", str(checkpoint), "--out", str(out)], cwd=ROOT, text=True,
        stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.PIPE,
    )  # fmt: skip
    try:
        assert process.stdout and process.stdout.readline() == "reached\n"
        _wait_for_journal(out.parent / f".{out.name}.moec-partial-{process.pid}" / SINGLES_JOURNAL)
        yield process
    finally:
        process.kill()
        process.communicate()


def _wait_for_journal(journal: Path) -> None:
    """Until the thread that keeps it has nothing more to write."""
    size = -1
    while size != (size := journal.stat().st_size) or not size:
        time.sleep(0.5)


@pytest.fixture(scope="module", params=[signal.SIGINT, signal.SIGKILL], ids=["Ctrl-C", "killed"])
def leftover(
    request: pytest.FixtureRequest, sound: Path, tmp_path_factory: pytest.TempPathFactory
) -> Path:
    """What a build of `art` leaves here; to be copied."""
    work = tmp_path_factory.mktemp("leftover")
    with _stopped(sound, work / "art") as process:
        process.send_signal(request.param)
        _, err = process.communicate(timeout=60)
    assert "Traceback" not in err
    assert names(work) == [f".art.moec-partial-{process.pid}"], "hidden, beside --out"
    (hidden,) = work.iterdir()
    assert {SINGLE, SINGLES_JOURNAL} <= set(names(hidden))
    if request.param == signal.SIGINT:
        assert (
            names(hidden) == [SINGLE, SINGLES_JOURNAL]
            and "stopped" in err
            and process.returncode == 2
        )
    assert leftovers.take_over(hidden), "the build has recorded it"
    return work


@pytest.fixture
def work(leftover: Path, tmp_path: Path) -> Path:
    """A copy of what a build of `art` left, which is recorded as what it is a copy of."""
    subprocess.run(["cp", "-a", str(leftover), str(tmp_path / "work")], check=True)
    (hidden,) = (tmp_path / "work").iterdir()
    leftovers.record(hidden)
    return tmp_path / "work"


def _assert_whole(work: Path, out: Path, fresh: Path) -> None:
    """`out` is the only thing in `work`, and equals what a build in one go gives."""
    assert names(work) == [out.name]
    artefact, expected = open_artefact(out), open_artefact(fresh)
    verify_files(artefact)
    weights = artefact.manifest.weights
    known = {"manifest.json", *artefact.manifest.files, *weights.shards}
    known |= {CARD} if weights.card else set()
    assert set(tree(out)) - {"genai"} == known == set(tree(fresh)) - {"genai"}
    assert artefact.manifest.weights == expected.manifest.weights
    for name in artefact.manifest.weights.shards:
        assert (out / name).read_bytes() == (fresh / name).read_bytes()


def test_the_next_build_goes_on(sound: Path, work: Path, tmp_path: Path) -> None:
    fresh = moec.export(sound, precision="fp8", out=tmp_path / "fresh")
    found = moec.export(sound, precision="fp8", out=work / "art")
    _assert_whole(work, work / "art", fresh.path)
    whole = sum(e.nbytes for name in sound.glob("*.safetensors") for e in _entries(name))
    assert fresh.manifest.build.bytes_read == whole
    # a half was packed, of which a kill may lose what the journal did not name yet
    assert 0 < found.manifest.build.bytes_read < 0.9 * whole


def _entries(path: Path) -> list[TensorEntry]:
    return list(read_shard(path).tensors.values())


@pytest.mark.parametrize(
    "options",
    [
        {"precision": "fp8", "scheme": "dynamic"},
        pytest.param({"precision": "bf16", "target": "ort"}, marks=pytest.mark.slow),
    ],
    ids=str,
)
def test_another_build_of_the_same_out_starts_anew(
    sound: Path, work: Path, tmp_path: Path, options: dict[str, str]
) -> None:
    fresh = moec.export(sound, out=tmp_path / "fresh", **options)
    found = moec.export(sound, out=work / "art", **options)
    _assert_whole(work, work / "art", fresh.path)
    assert found.manifest.build.bytes_read == fresh.manifest.build.bytes_read


@pytest.mark.parametrize("source", ["checkpoint", "preset"])
def test_a_build_that_packs_nothing_takes_nothing_over(
    source: str, sound: Path, work: Path
) -> None:
    out = work / "art"
    art = (
        moec.export(sound, out=out, weights="copy")
        if source == "checkpoint"
        else moec.export("tiny-scout", precision="fp8", out=out)
    )
    assert names(work) == ["art"]
    assert not (out / SINGLES_JOURNAL).exists()
    assert set(tree(out)) == {
        "manifest.json", *art.manifest.files, *art.manifest.weights.shards
    }  # fmt: skip


def test_a_source_that_shrinks_meanwhile_is_noticed(folder: Path) -> None:
    entries = read_shard(folder / "in.safetensors").tensors
    os.truncate(folder / "in.safetensors", entries["experts"].offset + 8)
    with pytest.raises(MoecError, match="ended before experts"):
        write_packed(folder / PACKED, PACKINGS, entries, lambda *step: None)


def test_another_checkpoint_starts_anew(work: Path, tmp_path: Path) -> None:
    write_random_checkpoint(SPEC, tmp_path / "other", seed=1)
    fresh = moec.export(tmp_path / "other", precision="fp8", out=tmp_path / "fresh")
    found = moec.export(tmp_path / "other", precision="fp8", out=work / "art")
    _assert_whole(work, work / "art", fresh.path)
    assert found.manifest.build.bytes_read == fresh.manifest.build.bytes_read


def test_an_error_leaves_nothing_not_even_what_had_landed(
    checkpoint: Path, work: Path, cli: Callable[..., tuple[int, str]]
) -> None:
    tensors = load_file(checkpoint / SECOND)
    name = next(name for name in tensors if name.endswith("experts.down_proj"))
    tensors[name].view(-1)[-1] = torch.nan
    save_file(tensors, checkpoint / SECOND)
    code, err = cli(
        "build", "--checkpoint", checkpoint, "--precision", "fp8", "--out", work / "art"
    )
    assert code == 2
    one_message(err, SECOND)
    assert names(work) == []
