"""The results of calibration: how large inputs of linear layers, keys and values get."""

from collections.abc import Iterable
from pathlib import Path
from typing import Literal

from pydantic import Field, ValidationError

from moec.spec import names
from moec.spec.bounded import limits
from moec.spec.data import Frozen
from moec.spec.errors import MoecError, refuse
from moec.spec.fields import read_json
from moec.spec.model import ModelSpec
from moec.spec.scheme import LARGEST, STATIC
from moec.spec.tensors import quantized, scaled_caches

_NEXT = "moec calibrate CHECKPOINT --tokens FILE --out scales.json"


class Calibration(Frozen):
    """The largest magnitude that calibration saw in each place, or a percentile of the magnitudes.

    `inputs` holds the magnitudes of linear layers' inputs, by the name of the weight; a stacked
    expert weight has one magnitude for each expert. `caches` holds those of keys and values, by
    names such as "layers.{i}.attn.k". `unseen` names the experts that no token chose; they get the
    largest magnitude of their layer. `tokens` counts the tokens that were read.
    """

    format: Literal["moec-scales/1"] = "moec-scales/1"
    model: str = Field(max_length=limits.NAME)
    tokens: int = Field(gt=0)
    percentile: float = Field(default=100.0, gt=0, le=100)
    inputs: dict[str, float | tuple[float, ...]]
    caches: dict[str, float]
    unseen: tuple[str, ...] = ()


def read_calibration(path: str | Path) -> Calibration:
    """Read a file that `moec calibrate` wrote.

    Raises:
        MoecError: the file is missing, or is not such a file.
    """
    path = Path(path)
    try:
        return Calibration.model_validate(read_json(path))
    except ValidationError as error:
        first = error.errors()[0]
        refuse(
            f"{path}: {'.'.join(map(str, first['loc']))}",
            first["msg"][:400],
            "a scales file that moec calibrate wrote",
            _NEXT,
        )


def static_scales(
    spec: ModelSpec, calibration: Calibration | None
) -> dict[str, tuple[float, ...] | float]:
    """The static scales that the scheme of `spec` needs, by tensor name.

    A static scale is a calibrated magnitude divided by 448, the largest E4M3 number. A tensor with
    one scale for each expert gives a tuple. A scheme without static scales gives an empty dict.

    Raises:
        MoecError: the scheme needs static scales and `calibration` is None, or `calibration` was
            made from another model.
    """
    scheme = spec.scheme
    if scheme is None or not scheme.static:
        return {}
    if calibration is None:
        refuse(
            f"scheme {scheme.name} of {spec.name}",
            "the scheme needs static scales, and no calibration was given",
            "a calibration: --scales FILE",
            _NEXT,
        )
    found: dict[str, tuple[float, ...] | float] = {}
    for name, rule in quantized(spec).items():
        if rule.inputs in STATIC:
            sizes = _magnitudes(calibration.inputs.get(name), name, calibration)
            experts = spec.text.expert_count if names.is_routed(name) else 1
            if len(sizes) != experts:
                raise _other_model(
                    name, f"{len(sizes)} magnitudes", f"{experts} magnitudes", calibration
                )
            per_expert = rule.inputs == "expert" and names.is_routed(name)
            found[names.input_scale_of(name)] = (
                tuple(map(_scale, sizes)) if per_expert else _scale(max(sizes))
            )
    if scheme.cache:
        for name in scaled_caches(spec):
            (size,) = _magnitudes(calibration.caches.get(name), name, calibration)
            found[names.scale_of(name)] = _scale(size)
    return found


def _magnitudes(
    found: float | tuple[float, ...] | None, name: str, source: Calibration
) -> tuple[float, ...]:
    sizes = tuple(found) if isinstance(found, Iterable) else (found,) if found is not None else ()
    if not sizes or not all(size >= 0 for size in sizes):
        raise _other_model(name, sizes or "no magnitude", "magnitudes of 0 or more", source)
    return sizes


def _scale(size: float) -> float:
    return size / LARGEST if size else 1.0


def _other_model(name: str, found: object, expected: str, source: Calibration) -> MoecError:
    return MoecError(
        f"--scales: {name}", f"{found}; the scales were made from {source.model}", expected, _NEXT
    )
