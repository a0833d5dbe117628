"""Open a session: an artefact in an engine of its target, or the eager reference."""

import warnings
from collections.abc import Mapping, Sequence
from functools import cache as once
from functools import partial
from pathlib import Path

from moec.artefact.artefact import Artefact, Entry, open_artefact
from moec.artefact.manifest import NAME
from moec.artefact.session_options import EXACT, SETS
from moec.artefact.targets import find_target, imported, targets
from moec.runtime.engines.eager import eager_engine
from moec.runtime.engines.engine import Engine
from moec.runtime.session import Session
from moec.spec.errors import refuse
from moec.spec.model import ModelSpec
from moec.weights.name_map import read_model

#: the reference engine, which runs the graph of any artefact or checkpoint
EAGER = "eager"


def open_session(
    path: str | Path,
    device: str = "cpu",
    *,
    engine: str | None = None,
    session_options: str = "lean",
    preset: str | None = None,
) -> Session:
    """Open an artefact, or a checkpoint folder, which only the eager reference runs.

    Args:
        path: an artefact, or a checkpoint folder.
        device: "cpu"; "cuda" for artefacts of target torch, of target ort in fp16 or bf16, and of
            the targets of TensorRT.
        engine: what runs it; default as its target has it: "onnxruntime" for targets onnx and ort,
            "torch" for torch, "tensorrt" for tensorrt and tensorrt-rtx. The ONNX of these two runs
            in ONNX's "interpreter" too, and any artefact in the "eager" reference.
        session_options: settings of ONNX Runtime: "lean" (weights stay mapped from their files),
            "fast" (constants are folded and weights prepacked) or, for int8 and int4, "exact"
            (products are computed in float32).
        preset: the old name of `session_options`; it works for one more version.

    Raises:
        MoecError: no artefact, no weights, changed weights (exit code 2), or a device or package
            that is not there (3).
    """
    if preset is not None:
        warnings.warn("preset is now session_options", DeprecationWarning, stacklevel=2)
        session_options = preset
    path = Path(path)
    for name, given, known in (
        ("device", device, ("cpu", "cuda")),
        ("engine", engine, (None, *engines())),
        ("session options", session_options, (*SETS, EXACT)),
    ):
        if given not in known:
            expected = " or ".join(filter(None, known))
            refuse(f"{name} {given}", f"no such {name}", expected, "choose one of them")
    if device == "cuda" and engine in (EAGER, "interpreter"):
        refuse(
            "device cuda",
            f"engine {engine}",
            "another engine; this one runs on the cpu",
            "leave engine out",
            exit_code=3,
        )
    if not (path / NAME).is_file() and (path / "config.json").is_file():
        if engine not in (None, EAGER):
            refuse(
                path,
                "a checkpoint",
                f"an artefact for engine {engine}",
                f"moec build --checkpoint {path}",
            )
        spec, _, entries = read_model(path)
        return eager_session(spec, entries, "fp32")
    artefact = open_artefact(path)
    if engine == EAGER:
        manifest = artefact.manifest
        return eager_session(manifest.spec, artefact.entries(), manifest.compute, artefact)
    return artefact_session(artefact, device, session_options, engine=engine)


def engines() -> tuple[str, ...]:
    """The names of all engines."""
    return (*dict.fromkeys(name for each in targets().values() for name in each.engines), EAGER)


def find_engine(artefact: Artefact, name: str | None = None) -> Engine:
    """Engine `name` for `artefact`, or the first that its target has.

    Raises:
        MoecError: the target has no such engine.
    """
    target = find_target(artefact.manifest.target)
    place = target.engines.get(name or target.engine)
    if place is None:
        refuse(
            f"engine {name}: {artefact.path}",
            f"an artefact of target {target.name}",
            f"engine {' or '.join((*target.engines, EAGER))}",
            "leave engine out",
        )
    found: Engine = imported(place)
    return found


def artefact_session(
    artefact: Artefact,
    device: str = "cpu",
    options: str = "lean",
    taps: Sequence[str] = (),
    engine: str | Engine | None = None,
) -> Session:
    """`artefact` in an engine of its target, by default the first.

    `options` names session options of ONNX Runtime, `taps` inner values that `Session.trace` will
    want.
    """
    chosen = engine if isinstance(engine, Engine) else find_engine(artefact, engine)
    limits = chosen.limits(artefact, device)
    return Session(
        artefact.manifest.spec,
        chosen.computes(artefact),
        chosen.name,
        chosen.open(artefact, "model", device, options, taps),
        artefact,
        once(partial(chosen.open, artefact, "vision", device, options, ())),
        limits,
        device,
        chosen.queues and device != "cpu",
    )


def eager_session(
    spec: ModelSpec,
    entries: Mapping[str, Entry],
    precision: str,
    artefact: Artefact | None = None,
    taps: Sequence[str] = (),
    near: float | None = None,
) -> Session:
    """The eager reference on the weights `entries`; `taps` as in `artefact_session`.

    `near` is as in `eager_engine`.
    """
    run = eager_engine(spec, entries, precision, taps, near=near)
    vision = once(partial(eager_engine, spec, entries, precision, part="vision"))
    return Session(spec, precision, EAGER, run, artefact, vision)
