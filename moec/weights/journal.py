"""What has landed of a file of packed weights, so that a build that was cut off can go on."""

from pathlib import Path

#: the file's name in an artefact
PACKED = "weights.safetensors"


def discard(path: Path) -> None:
    """Remove packed weights that were under way."""
    for file in under_way(path):
        file.unlink()


def journal_of(path: Path) -> Path:
    """The file beside `path` that names what has landed in it."""
    return path.with_name(f"{path.name}.journal")


def under_way(path: Path) -> tuple[Path, ...]:
    """What is needed to go on with `path`, if a call was cut off after something had landed."""
    journal = journal_of(path)
    if path.is_file() and journal.is_file() and journal.read_bytes().count(b"\n") > 1:
        return path, journal
    return ()


def landed(path: Path, journal: Path, fingerprint: str, size: int, known: set[str]) -> set[str]:
    """What an earlier call for the same file has written; anything else of it is removed."""
    try:
        first, *lines = journal.read_text(encoding="utf-8").split("\n")
    except (OSError, UnicodeDecodeError):
        first, lines = "", []
    done = set(lines[:-1])  # what follows the last line break was cut off
    whole = path.is_file() and path.stat().st_size == size
    if not whole or first != fingerprint or not done <= known:
        done = set()
    text = "".join(f"{line}\n" for line in (fingerprint, *sorted(done)))
    journal.write_text(text, encoding="utf-8")
    return done
