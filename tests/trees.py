"""What lies in a folder, byte for byte, and whether the artefact there is whole."""

import hashlib
import os
import shutil
from pathlib import Path

from moec.artefact.artefact import open_artefact, verify_files

#: what `out` holds before the build
HELD = ("nothing", "an artefact")


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


def names(folder: Path) -> list[str]:
    """What lies in `folder`, hidden things too."""
    return sorted(path.name for path in folder.iterdir())


def place(folder: Path, old: Path, held: str) -> Path:
    """Where an artefact goes, in `folder`: free, or taken by the old artefact."""
    folder.mkdir(exist_ok=True)
    if held == "an artefact":
        shutil.copytree(old, folder / "art")
    return folder / "art"


def assert_whole(art: Path, checkpoint: Path, precision: str | None = None) -> None:
    """`art` opens, every byte is as it was written, and its weights are the checkpoint's."""
    artefact = open_artefact(art)
    verify_files(artefact)
    assert precision is None or artefact.manifest.precision == precision
    for name in artefact.manifest.weights.shards:
        assert (art / name).read_bytes() == (checkpoint / name).read_bytes()
    known = {"manifest.json", *artefact.manifest.files, *artefact.manifest.weights.shards}
    assert set(tree(art)) == known, "nothing that the manifest does not know"
