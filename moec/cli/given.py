"""Check a command's arguments before it imports torch, so that a refusal comes at once."""

from pathlib import Path

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
