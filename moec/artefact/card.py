"""The model card beside published weights: what a build wrote, and what a proof may change."""

import hashlib
import os
import re
from pathlib import Path
from typing import NamedTuple

from moec.spec.bounded.limits import CARD as LONGEST
from moec.spec.bounded.own import is_regular, put

#: the file in which the Hugging Face Hub looks for it
CARD = "README.md"
#: the heading below which a card says what a proof found
PROOF = "## Proof\n"
#: what moec writes below that heading; whatever follows is somebody else's
_OURS = re.compile(r"\n*(Not run yet: [^\n]*\n?|(PASSED|FAILED): [^\n]*\n?(\n(\|[^\n]*\n?)*)?)?\n*")


class Card(NamedTuple):
    """The text of a card: the section of the proof without its heading, and what is around it."""

    before: str
    proof: str
    after: str

    @property
    def sha256(self) -> str:
        """The hash of what a build wrote: of all before the proof."""
        return hashlib.sha256(self.before.encode()).hexdigest()


def read_card(folder: Path) -> Card | None:
    """The card in `folder`; None if there is none, or one that no build can have written."""
    path = folder / CARD
    if not is_regular(path) or os.path.islink(path) or path.stat().st_size > LONGEST:
        return None
    try:
        text = path.read_bytes().decode()
    except (OSError, UnicodeDecodeError):
        return None
    before, found, rest = text.partition(f"\n{PROOF}")
    if not found:
        return None
    ours = _OURS.match(rest)
    assert ours is not None  # it matches nothing, too
    return Card(before + found, ours[0], rest[ours.end() :])


def write_proof(folder: Path, card: Card, proof: str) -> None:
    """Write the card in `folder` with another section of the proof; no link there is followed.

    Raises:
        OSError: it cannot be written.
    """
    at = os.open(folder, os.O_RDONLY | os.O_DIRECTORY)
    try:
        put(at, CARD, card.before + proof + "\n" * bool(card.after) + card.after)
    finally:
        os.close(at)
