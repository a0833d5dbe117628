"""Read and write a checkpoint's `config.json`, by the row of its architecture."""

import os
from pathlib import Path
from typing import Any

from pydantic import ValidationError

from moec.spec.errors import refuse
from moec.spec.fields import Fields, read_own_json
from moec.spec.hf.architectures import ARCHITECTURES
from moec.spec.hf.architectures.common import bookkeeping
from moec.spec.hf.generation import with_generation
from moec.spec.hf.quantization import read_scheme, write_scheme
from moec.spec.model import ModelSpec
from moec.spec.mtp.layer import with_mtp

#: the row of each value of `model_type`
_ROWS = {kind: name for name, row in ARCHITECTURES.items() for kind in row.types}


def read_config(path: Path, mtp: bool = False) -> ModelSpec:
    """Read the spec from a checkpoint's `config.json`. The folder's name becomes the spec's name.

    `mtp` is as in `moec.export`.

    Raises:
        MoecError: the file cannot be read, is a link that leads out of its folder, or has a field
            that is missing, unknown or not supported.
    """
    raw = read_own_json(path)
    top = Fields(str(path), raw)
    folder = os.fsencode(path.parent.resolve().name).decode(errors="replace")
    kind = top.take("model_type", str)
    quantization = top.left.pop("quantization_config", None)
    if kind not in _ROWS:
        raise top.error("model_type", repr(kind), " or ".join(map(repr, _ROWS)))
    try:
        row = ARCHITECTURES[_ROWS[kind]]
        found = row.read(top, kind)
        spec = ModelSpec(
            name=folder,
            provenance="custom",
            notes=(*found.notes, *bookkeeping(raw)),
            dtype=found.dtype,
            architecture=_ROWS[kind],
            separate_experts=row.separate_experts,
            vision=found.vision,
            text=found.text,
            tokens=found.tokens,
        )
    except ValidationError as error:
        first = error.errors()[0]
        field = ".".join(str(part) for part in first["loc"]) or "the values together"
        refuse(
            f"{path}: spec field {field}",
            first["msg"],
            "a consistent config",
            "correct config.json",
        )
    spec = with_generation(with_mtp(spec, mtp), path.with_name("generation_config.json"), raw)
    return spec.model_copy(update={"scheme": read_scheme(quantization, path, spec)})


def write_config(spec: ModelSpec) -> dict[str, Any]:
    """The `config.json` of `spec`; `read_config` reads the same spec back.

    Raises:
        MoecError: a config of this architecture cannot say what the spec says.
    """
    found = ARCHITECTURES[spec.architecture].write(spec)
    return found | ({"quantization_config": write_scheme(spec)} if spec.scheme else {})
