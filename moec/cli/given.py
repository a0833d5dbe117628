"""Check a command's arguments before it imports torch, so that a refusal comes at once."""

from pathlib import Path

from moec.spec.bounded.own import is_regular
from moec.spec.errors import refuse


def check_given(
    artefact: Path | None = None,
    checkpoint: Path | None = None,
    out: Path | None = None,
    weights_from: Path | None = None,
) -> None:
    """Read manifest and headers, which takes milliseconds; the API reads them again.

    Raises:
        MoecError: no artefact, a broken checkpoint, or an `out` that holds something else.
    """
    from moec.artefact.artefact import open_artefact
    from moec.artefact.folder import refuse_foreign
    from moec.weights.name_map import read_model

    if artefact is not None:
        open_artefact(artefact, weights_from)
    if checkpoint is not None:
        read_model(checkpoint, weights_from)
    if out is not None:
        refuse_foreign(out)


def check_source(variant: str | None, spec: Path | None, checkpoint: Path | None) -> None:
    """Refuse a source that is not what its option names; moec does not guess what a typo meant."""
    from moec.spec.hf.forms import checkpoint_folder, refuse_other_form
    from moec.spec.presets import PRESETS

    if variant is not None and variant not in PRESETS:
        refuse(f"--variant {variant}", "no such preset", ", ".join(PRESETS), "moec spec list")
    if spec is not None and not spec.is_file():
        refuse(f"--spec {spec}", "no such file", "a spec file", "moec spec schema")
    if checkpoint is not None and not checkpoint_folder(checkpoint):
        refuse_other_form(checkpoint)
        refuse(
            f"--checkpoint {checkpoint}",
            "no such folder",
            "a folder with config.json",
            "check the path, or build without weights: moec build --variant scout",
        )


def check_to_write(option: str, path: Path, start: str) -> None:
    """Refuse to write where a folder is, or a file that a command like this one did not write.

    `start` is how each file that it writes begins.

    Raises:
        MoecError: also if the folder of `path` does not exist.
    """
    where = f"{option} {path}"
    if not path.absolute().parent.is_dir() or path.is_dir():
        found = "a folder, or a file in a folder that does not exist"
        refuse(where, found, "a file to write", "choose another")
    if is_regular(path) and not _starts(path, start):  # a device or a pipe loses nothing
        found = "a file that holds something else"
        refuse(where, found, "a new file, or an earlier one of this command", "choose another")


def _starts(path: Path, start: str) -> bool:
    """Whether a file begins with `start`, whatever spaces it has; an empty file does."""
    with path.open("rb") as file:
        data = file.read(4 * len(start)).decode(errors="replace")
    return not data or "".join(data.split()).startswith("".join(start.split()))
