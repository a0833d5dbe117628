"""What calibration found, as data: how large the inputs of products get, and keys and values."""

from collections.abc import Iterable
from pathlib import Path
from typing import Literal

from pydantic import Field, ValidationError

from moec.spec.errors import MoecError, refuse
from moec.spec.fields import read_json
from moec.spec.frozen import Frozen
from moec.spec.model import ModelSpec
from moec.spec.scheme import LARGEST, STATIC
from moec.spec.tensors import input_scale_of, quantized, scale_of

_NEXT = "moec calibrate CHECKPOINT --tokens FILE --out scales.json"


class Calibration(Frozen):
    """Largest magnitudes by site, or a percentile of them.

    `inputs` are those of products, by the name of their weight; fused experts have one for each
    expert. `caches` are those of keys and values, by layer: "layers.{i}.attn.k". `unseen` names
    experts that no token chose: what stands for them is the largest of their layer.
    """

    format: Literal["moec-scales/1"] = "moec-scales/1"
    model: str
    tokens: int = Field(gt=0)
    percentile: float = Field(default=100.0, gt=0, le=100)
    inputs: dict[str, float | tuple[float, ...]]
    caches: dict[str, float]
    unseen: tuple[str, ...] = ()


def read_calibration(path: str | Path) -> Calibration:
    """The calibration in a file that `calibrate` wrote."""
    path = Path(path)
    try:
        return Calibration.model_validate(read_json(path))
    except ValidationError as error:
        first = error.errors()[0]
        refuse(
            f"{path}: {'.'.join(map(str, first['loc']))}",
            first["msg"],
            "scales of calibrate",
            _NEXT,
        )


def static_scales(
    spec: ModelSpec, calibration: Calibration | None
) -> dict[str, tuple[float, ...] | float]:
    """Every scale of `spec` that no weight gives, by tensor name: a magnitude over 448.

    Raises:
        MoecError: `spec` wants scales and there is no calibration, or it is of another model.
    """
    scheme = spec.scheme
    if scheme is None or not scheme.static:
        return {}
    if calibration is None:
        refuse(
            f"scheme {scheme.name} of {spec.name}",
            "static scales, and no calibration",
            "--scales FILE",
            _NEXT,
        )
    found: dict[str, tuple[float, ...] | float] = {}
    for name, rule in quantized(spec).items():
        if rule.inputs in STATIC:
            each = _sizes(calibration.inputs.get(name), name, calibration)
            experts = spec.text.experts.count if _is_fused(name) else 1
            if len(each) != experts:
                raise _other_model(name, f"{len(each)} magnitudes", f"{experts}", calibration)
            apart = rule.inputs == "expert" and _is_fused(name)
            found[input_scale_of(name)] = tuple(map(_scale, each)) if apart else _scale(max(each))
    if scheme.cache:
        for layer in spec.text.all_layers:
            for part in "kv":
                name = f"layers.{layer.index}.attn.{part}"
                (size,) = _sizes(calibration.caches.get(name), name, calibration)
                found[scale_of(name)] = _scale(size)
    return found


def _sizes(
    found: float | tuple[float, ...] | None, name: str, of: Calibration
) -> tuple[float, ...]:
    sizes = tuple(found) if isinstance(found, Iterable) else (found,) if found is not None else ()
    if not sizes or not all(size >= 0 for size in sizes):
        raise _other_model(name, sizes or "nothing", "magnitudes of 0 or more", of)
    return sizes


def _scale(size: float) -> float:
    return size / LARGEST if size else 1.0


def _is_fused(name: str) -> bool:
    return name.endswith((".gate_up", ".down")) and ".moe." in name


def _other_model(name: str, found: object, expected: str, of: Calibration) -> MoecError:
    return MoecError(f"--scales: {name}", f"{found}; scales of {of.model}", expected, _NEXT)
