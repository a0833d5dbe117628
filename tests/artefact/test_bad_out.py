"""An --out that cannot be gives one clear message, and stays as it was."""

import shutil
from collections.abc import Callable
from pathlib import Path

import pytest

import moec
from moec.weights.name_map import read_model
from tests.refusals import refusal, refused_and_nothing_left


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
    "not UTF-8": (lambda world: world / "\udcff", "not UTF-8"),
    "below what is not UTF-8": (lambda world: world / "\udcff" / "out", "not UTF-8"),
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


def test_folders_that_are_not_utf8_are_named(
    checkpoint: Path, artefact: Path, tmp_path: Path
) -> None:
    """Manifests and ONNX Runtime cannot have their paths; what needs neither works."""
    for name in ("\udcff", "\udcff/deep"):
        odd = tmp_path / name / "checkpoint"
        shutil.copytree(checkpoint, odd)
        for out in (tmp_path / "new", tmp_path / "packed"):
            weights = "copy" if out.name == "packed" else None
            refusal(
                lambda odd=odd, out=out, w=weights: moec.export(odd, out=out, weights=w), "UTF-8"
            )
            assert not out.exists()
        refusal(lambda odd=odd: moec.bind(artefact, odd), "not UTF-8")
        assert moec.open_session(odd).logits([[1, 2]]).shape[1] == 2
    shutil.copytree(checkpoint, odd := tmp_path / "name\udcfe")
    assert read_model(odd)[0].name == "name\ufffd"
    shutil.copytree(artefact, moved := tmp_path / "\udcfd")
    refusal(lambda: moec.open_session(moved), "not UTF-8")
    assert moec.open_session(moved, engine="eager").logits([[1, 2]]).shape[1] == 2
