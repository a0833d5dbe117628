"""What can be built: targets, precisions, and where weights go; and what to say of the rest."""

from typing import Literal

from moec.spec.errors import MoecError, refuse
from moec.spec.scheme import Scheme

#: names of experts, for which a scheme has rules
EXPERT_NAMES = ("layers.0.moe.gate_up", "layers.0.moe.down")

_TENSORRT: dict[str, tuple[str | None, str | None]] = {
    "bf16": ("tensorrt", None),
    "fp8": ("tensorrt", "tensorrt"),
    "fp16": ("tensorrt", None),
    "fp32": ("tensorrt", None),
}
#: target -> precision -> dialect for weights that stay, dialect for weights that are rewritten
TARGETS: dict[str, dict[str, tuple[str | None, str | None]]] = {
    "onnx": {
        **dict.fromkeys(("fp32", "fp16", "bf16"), ("standard", None)),
        "fp8": ("standard", "standard"),
    },
    "ort": {
        "fp32": ("ort", "ort-packed"),
        "fp16": ("ort", "ort-packed"),
        "bf16": (None, "ort-packed"),
        "fp8": ("ort", "ort"),
        "int8": (None, "ort-int8"),
        "int4": (None, "ort-int4"),
    },
    # FP8 checkpoints would stay: the target itself says why it takes none
    "torch": {"fp8": ("torch", "torch")},
    "tensorrt": _TENSORRT,
    "tensorrt-rtx": _TENSORRT,
}
#: target -> how its graphs' files end
SUFFIXES = {"torch": ".pt2", **dict.fromkeys(("onnx", "ort", "tensorrt", "tensorrt-rtx"), ".onnx")}
#: target -> the scheme of wide weights that become FP8, where nobody names one
SCHEMES = {
    **dict.fromkeys(("onnx", "ort"), "meta"),
    "torch": "dynamic",
    "tensorrt": "mixed",
    "tensorrt-rtx": "static",
}
#: target -> the package that builds its engines
PACKAGES: dict[str, Literal["tensorrt", "tensorrt_rtx"]] = {
    "tensorrt": "tensorrt",
    "tensorrt-rtx": "tensorrt_rtx",
}
#: bits of the weights, for precisions whose weights alone are narrow
BITS = {"int8": 8, "int4": 4}


def choose(
    target: str, precision: str, weights: str | None, scheme: Scheme | None = None
) -> tuple[str, str]:
    """The dialect of a build, and where its weights go.

    FP8 weights stay where a checkpoint has them, and are written where `scheme` is an artefact's.

    Raises:
        MoecError: no such target, precision or placement, or they do not go together.
    """
    if target not in TARGETS:
        refuse(f"--target {target}", "no such target", " or ".join(TARGETS), "use --target onnx")
    if precision not in TARGETS[target]:
        refuse(
            f"--precision {precision} --target {target}",
            _NOT_YET.get(precision) or _unknown_precision(precision),
            " or ".join(TARGETS[target]),
            f"use --precision {next(iter(TARGETS[target]))}",
        )
    stays, packed = TARGETS[target][precision]
    if scheme and scheme.layout == "moec":
        stays = None
    elif scheme:
        packed = None
    if scheme and scheme.cache and target == "ort":
        refuse(
            f"--target ort with FP8 caches (scheme {scheme.name})",
            "GroupQueryAttention, which has none on a CPU",
            "--cache wide, or --target onnx",
            "add --cache wide",
        )
    mode = weights or ("in-place" if stays else "pack")
    if mode not in _PLACEMENTS:
        raise _unknown_placement(mode)
    dialect = packed if mode == "pack" else stays
    if dialect is None:
        refuse(
            f"--weights {mode} --target {target} --precision {precision}",
            "no graph for weights that are rewritten"
            if mode == "pack"
            else "a precision whose weights must be rewritten",
            "in-place, link or copy" if mode == "pack" else "pack",
            "leave --weights out",
        )
    if dialect == "tensorrt" and scheme and wants_plugin(scheme):
        dialect = "tensorrt-plugin"
    return dialect, mode


def wants_plugin(scheme: Scheme) -> bool:
    """Whether TensorRT can run the experts of `scheme` in a plugin alone: scales by token."""
    return any(rule.inputs == "token" for rule in map(scheme.rule, EXPERT_NAMES) if rule)


#: precisions of the design that are not there, or not in every target
_NOT_YET = {
    "int8": "weight-only integers are there with --target ort",
    "int4": "weight-only integers are there with --target ort",
}
_PLACEMENTS = ("in-place", "link", "copy", "pack")


def default_precision(target: str, scheme: Scheme | None) -> str:
    """The precision of a build where nobody names one."""
    known = TARGETS.get(target, {})
    if scheme or list(known) == ["fp8"]:
        return "fp8"
    return next(iter(known), "fp32")


def _unknown_precision(precision: str) -> str:
    known = any(precision in each for each in TARGETS.values())
    return "a precision of other targets" if known else "no such precision"


def _unknown_placement(mode: str) -> MoecError:
    return MoecError(f"--weights {mode}", mode, ", ".join(_PLACEMENTS), "choose one of them")


def check_placement(mode: str, packs: bool) -> None:
    """Refuse a placement that is none, or not one for a graph that `packs`."""
    if mode not in _PLACEMENTS:
        raise _unknown_placement(mode)
    if packs != (mode == "pack"):
        refuse(
            f"--weights {mode}",
            "an artefact built for weights that are "
            + ("rewritten" if packs else "left as they are"),
            "pack" if packs else "in-place, link or copy",
            "leave --weights out",
        )
