"""Load a spec from what a user names: that of a checkpoint says what the checkpoint's tensors are.

config.json names no type of scales, and its type of weights may be wrong. A build without weights
from such a spec would not take the weights of the very checkpoint.
"""

import os
from pathlib import Path

from moec.spec import files
from moec.spec.errors import MoecError
from moec.spec.hf.forms import LISTS, checkpoint_folder
from moec.spec.model import ModelSpec
from moec.spec.presets import PRESETS
from moec.weights.checkpoint import read_checkpoint
from moec.weights.name_map import of_tensors


def load_spec(source: str | Path | ModelSpec, *, mtp: bool = False) -> ModelSpec:
    """Load a spec from a preset name, a spec file (.yaml, .yml, .json) or a checkpoint folder.

    The headers of a checkpoint's weights give their types, as for a build. A folder without weights
    has those that its config.json says. If there are weights and they cannot be read, a note in the
    spec says so. `mtp` is as in `moec.export`.

    Raises:
        MoecError: `source` is none of these, or its contents are not a valid spec.
    """
    spec = files.load_spec(source, mtp)
    if isinstance(source, ModelSpec) or str(source) in PRESETS:
        return spec
    folder = checkpoint_folder(source)
    if not folder or not any(os.path.lexists(folder / name) for name in LISTS):
        return spec
    try:
        return of_tensors(spec, read_checkpoint(source))[0]
    except MoecError as error:
        note = f"Types are those of config.json: {error.where}: {error.found}."
        return spec.model_copy(update={"notes": (*spec.notes, note)})
