"""SHA-256 of weights: made while they are written, and made again from the files.

hashlib lets other threads run while it works, so that a hash costs little beside a disk.
"""

import hashlib
import os
from collections.abc import Sequence
from concurrent.futures import Executor
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

#: bytes that are in memory at once while a file is hashed
BLOCK = 1 << 22


@dataclass(slots=True)
class Piece:
    """A part of a file that is written from its start to its end, and its hash.

    Attributes:
        handle: the file's descriptor. Nothing uses the file's own position, so that several
            threads can write different pieces.
        at: where the next bytes go.
        sha256: the hash of all bytes so far.
    """

    handle: int
    at: int
    sha256: Any = field(default_factory=hashlib.sha256)

    def write(self, data: Any, beside: Executor | None = None) -> None:
        """Append all of `data`, and hash it in a thread of `beside` while the disk works."""
        left = memoryview(data).cast("B")
        hashing = beside.submit(self.sha256.update, left) if beside else None
        if not hashing:
            self.sha256.update(left)
        while left:
            count = os.pwrite(self.handle, left, self.at)
            left, self.at = left[count:], self.at + count
        if hashing:
            hashing.result()


def joined(digests: Sequence[bytes]) -> str:
    """The hash of a tensor: that of its only piece, or of the hashes of its pieces in order."""
    if len(digests) == 1:
        return digests[0].hex()
    return hashlib.sha256(b"".join(digests)).hexdigest()


def file_sha256(path: Path) -> str:
    """The hash of a whole file."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def tensor_sha256(path: Path, offset: int, length: int, pieces: int = 1) -> str:
    """The hash of `length` bytes at `offset` of a file, which are `pieces` of one size."""
    size, digests = length // pieces, []
    with path.open("rb", buffering=0) as file:
        file.seek(offset)
        for _ in range(pieces):
            digest, left = hashlib.sha256(), size
            while left and (data := file.read(min(left, BLOCK))):
                digest.update(data)
                left -= len(data)
            digests.append(digest.digest())
    return joined(digests)
