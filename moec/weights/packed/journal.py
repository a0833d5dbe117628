"""The journal of a packed file: which weights are on disk, so that packing can be resumed.

The journal lies beside the packed file. Its first line identifies the file that is being written.
Each further line is about a weight that is on disk.

A checkpoint may change between a kill and the next build: somebody downloads another fine-tune of
the same model into the same folder, and neither sizes nor headers differ. Times of files do not
tell, because copies and archives change them or keep them as they like. So the journal holds a
checksum of the bytes that each weight was made from, and the next build reads these bytes again.
"""

import hashlib
import json
import os
import stat
import zlib
from collections.abc import Collection, Iterable, Mapping
from pathlib import Path
from typing import BinaryIO, NamedTuple, TextIO

from moec.weights.packed.hashed import BLOCK
from moec.weights.packing import Packing
from moec.weights.shard import TensorEntry

#: the name of the packed file in an artefact
PACKED = "weights.safetensors"
_JOURNAL = ".journal"


class Hash(NamedTuple):
    """The SHA-256 of a stored tensor, and the number of pieces that it was written in."""

    sha256: str
    pieces: int = 1


class Landed(NamedTuple):
    """A weight that is on disk: the checksum of its source, and its stored tensors by name."""

    source: int
    hashes: dict[str, Hash]


def fingerprint(
    header: bytes, packings: Mapping[str, Packing], entries: Mapping[str, TensorEntry]
) -> str:
    """Identify the packed file: its layout, its packings, and the sizes of its sources."""
    digest = hashlib.sha256(header)
    digest.update("".join(p.model_dump_json() for p in packings.values()).encode())
    for file in sorted({file for entry in entries.values() for file in entry.files}):
        digest.update(f"{file.name} {file.stat().st_size}\n".encode())
    return digest.hexdigest()


def checksum(matrices: Iterable[int]) -> int:
    """The checksum of a weight, from the CRC-32 of each of its matrices."""
    return zlib.crc32(b"".join(each.to_bytes(4, "little") for each in matrices))


def checksum_of(matrices: Iterable[TensorEntry]) -> int:
    """The checksum of a weight whose matrices are in a checkpoint; it reads all of them."""
    return checksum(map(crc_of, matrices))


def crc_of(matrix: TensorEntry, crc: int = 0) -> int:
    """The CRC-32 of a matrix in a checkpoint, after bytes that have the checksum `crc`."""
    if matrix.dtype == "int4":  # its parts are tensors of several types
        for part in matrix.parts:
            crc = crc_of(part, crc)
        return crc
    if matrix.changes or matrix.parts:
        from moec.weights.view import raw  # torch, which refusals do not wait for

        return zlib.crc32(raw(matrix), crc)
    left = matrix.nbytes
    with matrix.file.open("rb", buffering=0) as file:
        file.seek(matrix.offset)
        while left and (data := file.read(min(left, BLOCK))):
            crc, left = zlib.crc32(data, crc), left - len(data)
    return crc


def journal_of(path: Path) -> Path:
    """The journal of the packed file `path`."""
    return path.with_name(f"{path.name}{_JOURNAL}")


def finish(path: Path) -> None:
    """Remove the journal of the packed file `path`: it is complete."""
    journal_of(path).unlink()


def discard(folder: Path, but: Collection[str] = ()) -> None:
    """Remove the unfinished packed files of a folder, `but` those of these names, and journals.

    A call that was cut off may have written others than the next one in the same place does.
    """
    kept = {each for name in but for each in (name, journal_of(folder / name).name)}
    for file in unfinished(folder):
        if file.name not in kept:
            file.unlink()


def unfinished(folder: Path) -> tuple[Path, ...]:
    """The unfinished packed files of a folder, and their journals; links do not count."""
    journals = sorted(folder.glob(f"*{_JOURNAL}")) if folder.is_dir() else []
    paths = (each.with_name(each.name.removesuffix(_JOURNAL)) for each in journals)
    return tuple(file for path in paths for file in _resumable(path))


def _resumable(path: Path) -> tuple[Path, ...]:
    """The unfinished packed file `path` and its journal, if at least one weight is on disk.

    Links do not count: to write through one would overwrite a file that is somewhere else.
    """
    journal = journal_of(path)
    if _alone(path) and _alone(journal) and journal.read_bytes().count(b"\n") > 1:
        return path, journal
    return ()


def _alone(path: Path) -> bool:
    """Whether `path` itself is a regular file, which has no other name."""
    try:
        status = os.lstat(path)
    except OSError:
        return False
    return stat.S_ISREG(status.st_mode) and status.st_nlink == 1


def open_packed(path: Path, anew: bool) -> BinaryIO:
    """Open the packed file to write it; with `anew` as an empty file, whatever was there before.

    Neither way writes through a link.
    """
    if anew:
        path.unlink(missing_ok=True)
        return path.open("xb")

    def opener(name: str, flags: int) -> int:
        return os.open(name, flags | os.O_NOFOLLOW)

    return open(path, "r+b", opener=opener)


def landed(path: Path, fingerprint: str, size: int, known: Collection[str]) -> dict[str, Landed]:
    """The weights that an earlier call for the same file has written, by name.

    They are none if the journal is damaged, or belongs to another file.
    """
    if not _resumable(path):
        return {}
    try:
        first, *lines = journal_of(path).read_text(encoding="utf-8").split("\n")
        found = dict(_read(line) for line in lines[:-1])  # what follows the last "\n" was cut off
    except (OSError, ValueError, TypeError):
        return {}
    whole = path.stat().st_size == size
    return found if whole and first == fingerprint and found.keys() <= set(known) else {}


def begin(path: Path, fingerprint: str, landed: Mapping[str, Landed]) -> TextIO:
    """Write the journal anew, with the weights that count as written; it stays open for more."""
    journal = journal_of(path)
    journal.unlink(missing_ok=True)  # a link is replaced and not followed
    log = journal.open("x", encoding="utf-8")
    log.write(f"{fingerprint}\n" + "".join(line(*each) for each in sorted(landed.items())))
    log.flush()
    return log


def line(name: str, weight: Landed) -> str:
    """The line of the journal about a weight."""
    return json.dumps([name, weight.source, weight.hashes]) + "\n"


def _read(line: str) -> tuple[str, Landed]:
    name, source, hashes = json.loads(line)
    return name, Landed(source, {part: Hash(*each) for part, each in hashes.items()})
