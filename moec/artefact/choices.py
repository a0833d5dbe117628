"""Check what a user chose for a build: the precision, and the placement of the weights."""

from moec.artefact.targets import Target, find_target, targets
from moec.spec.errors import MoecError, refuse
from moec.spec.scheme import Scheme

#: the placements of weights: moec leaves them in the checkpoint, hard-links them, copies them, or
#: packs them (writes them anew)
PLACEMENTS = ("in-place", "link", "copy", "pack")
#: what a message says about a precision that only another target has
_ELSEWHERE = {
    "int8": "weight-only integers are there with --target ort",
    "int4": "weight-only integers are there with --target ort",
}


def choose(
    target: Target, precision: str, weights: str | None, scheme: Scheme | None = None
) -> tuple[str, str]:
    """The dialect of a build, and the placement of its weights.

    `weights` is the placement that the user chose; None leaves the choice to moec. moec does not
    rewrite the weights of an FP8 checkpoint. It packs wide weights that a `scheme` of layout "moec"
    quantises to FP8, and 4-bit integers where the target has another layout for them.

    Raises:
        MoecError: the target does not have the precision, the placement does not exist, or the two
            do not fit together.
    """
    if scheme and scheme.int4 and precision not in target.precisions:
        able = [each.name for each in targets().values() if precision in each.precisions]
        refuse(
            f"--target {target.name}",
            f"{scheme.shown}, which moec does not convert",
            f"--target {' or '.join(able)}",
            f"use --target {able[0]}, or the bf16 checkpoint that they were made from",
        )
    known = target.precisions.get(precision)
    if known and known.given and not (scheme and scheme.precision == precision):
        known = None
    if known is None:
        refuse(
            f"--precision {precision} --target {target.name}",
            _ELSEWHERE.get(precision) or _unknown(precision),
            " or ".join(name for name, each in target.precisions.items() if not each.given),
            f"use --precision {next(iter(target.precisions))}",
        )
    ours = scheme is not None and scheme.layout == "moec"
    stays = None if ours else known.stays
    packed = known.packed if ours or scheme is None or scheme.int4 else None
    mode = weights or ("in-place" if stays else "pack")
    if mode not in PLACEMENTS:
        raise _unknown_placement(mode)
    dialect = packed if mode == "pack" else stays
    if dialect is None:
        found, expected = (
            ("no graph for weights that are rewritten", "in-place, link or copy")
            if mode == "pack"
            else ("a precision whose weights must be rewritten", "pack")
        )
        where = f"--weights {mode} --target {target.name} --precision {precision}"
        refuse(where, found, expected, "leave --weights out")
    return dialect, mode


def for_device(
    target: Target, precision: str | None, device: str | None, scheme: Scheme | None
) -> tuple[Target, str]:
    """The target that builds for `device` (None: for any), and the precision.

    Raises:
        MoecError: `target` builds the same for every device, or does not know this one, or the
            device does not run the precision.
    """
    if device is None:
        return target, default_precision(target, scheme) if precision is None else precision
    if device not in target.devices:
        refuse(
            f"--device {device} --target {target.name}",
            "no such device" if target.devices else "a target that builds for every device alike",
            " or ".join(target.devices) or "no --device",
            "choose one of them" if target.devices else "leave --device out",
        )
    known = target.devices[device]
    if precision is None:
        precision = scheme.precision if scheme else next(iter(known))
    if precision not in known:
        refuse(
            f"--precision {precision} --device {device}",
            f"a precision that ONNX Runtime does not run on {device}",
            " or ".join(known),
            f"use --precision {next(iter(known))}, or leave --device out",
        )
    return find_target(known[precision]), precision


def merging(mode: str, chosen: str | None) -> str:
    """The placement of weights that adapters change; `chosen` is what the user chose.

    Raises:
        MoecError: the user wants the weights to stay in the checkpoint.
    """
    if mode in ("copy", "pack"):
        return mode
    if chosen:
        refuse(
            f"--weights {chosen}",
            "adapters, which change the weights",
            "copy or pack",
            "leave --weights out",
        )
    return "copy"


def default_precision(target: Target, scheme: Scheme | None) -> str:
    """The precision of a build if the user names none.

    "fp8" or "int4" if the checkpoint's weights are that already, else the first precision of the
    target.
    """
    return scheme.precision if scheme else next(iter(target.precisions))


def check_placement(mode: str, packs: bool) -> None:
    """Refuse a placement that does not exist, or that the artefact's graph cannot use.

    `packs` says whether the graph was built for packed weights.

    Raises:
        MoecError: the placement is refused; the message names those that fit.
    """
    if mode not in PLACEMENTS:
        raise _unknown_placement(mode)
    if packs != (mode == "pack"):
        kind = "rewritten" if packs else "left as they are"
        refuse(
            f"--weights {mode}",
            f"an artefact built for weights that are {kind}",
            "pack" if packs else "in-place, link or copy",
            "leave --weights out",
        )


def _unknown(precision: str) -> str:
    known = any(precision in each.precisions for each in targets().values())
    return "a precision of other targets" if known else "no such precision"


def _unknown_placement(mode: str) -> MoecError:
    return MoecError(f"--weights {mode}", mode, ", ".join(PLACEMENTS), "choose one of them")
