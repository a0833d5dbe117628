"""What a build may choose: a precision of its target, and where its weights go."""

from moec.artefact.targets import Target, targets
from moec.spec.errors import MoecError, refuse
from moec.spec.scheme import Scheme

#: where weights may go: left, hard-linked or copied as they are, or rewritten
PLACEMENTS = ("in-place", "link", "copy", "pack")
#: what to say of a precision that another target has
_ELSEWHERE = {
    "int8": "weight-only integers are there with --target ort",
    "int4": "weight-only integers are there with --target ort",
}


def choose(
    target: Target, precision: str, weights: str | None, scheme: Scheme | None = None
) -> tuple[str, str]:
    """The dialect of a build, and where its weights go.

    An FP8 checkpoint keeps its weights where they are. Wide weights that become FP8 by a `scheme`
    of layout "moec" are rewritten.

    Raises:
        MoecError: the target has no such precision, there is no such placement, or they do not go
            together.
    """
    known = target.precisions.get(precision)
    if known is None:
        refuse(
            f"--precision {precision} --target {target.name}",
            _ELSEWHERE.get(precision) or _unknown(precision),
            " or ".join(target.precisions),
            f"use --precision {next(iter(target.precisions))}",
        )
    ours = scheme is not None and scheme.layout == "moec"
    stays = None if ours else known.stays
    packed = known.packed if ours or scheme is None else None
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


def default_precision(target: Target, scheme: Scheme | None) -> str:
    """The precision of a build where nobody names one: "fp8" where the weights are FP8 already."""
    return "fp8" if scheme else next(iter(target.precisions))


def check_placement(mode: str, packs: bool) -> None:
    """Refuse a placement that does not exist, or that does not fit a graph that `packs`.

    Raises:
        MoecError: says which placements fit.
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
