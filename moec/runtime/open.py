"""Open a session: on an engine of an artefact's target, or on the eager reference."""

import warnings
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from functools import cache as once
from functools import partial
from pathlib import Path
from typing import Any, TypeGuard

from moec.artefact.artefact import (
    Artefact,
    Entry,
    check_digest,
    check_files,
    named_folder,
    open_artefact,
)
from moec.artefact.manifest import NAME
from moec.artefact.opening.held import held
from moec.artefact.parity import identity
from moec.artefact.placement import INPUT_FILES
from moec.artefact.session_options import EXACT, SETS
from moec.artefact.targets import find_target, imported, targets
from moec.runtime.engines.eager import eager_engine
from moec.runtime.engines.engine import Engine, Run
from moec.runtime.ranks.group import agree, counted, from_first, join, started_as
from moec.runtime.session import Session
from moec.spec.errors import clear_errors, refuse
from moec.spec.hf.forms import checkpoint_folder
from moec.spec.model import ModelSpec
from moec.spec.mtp.model import mtp_of
from moec.spec.sharding import ALONE, Rank
from moec.weights.name_map import read_model

#: the name of the eager reference, which runs any artefact or checkpoint
EAGER = "eager"


def open_session(
    path: str | Path,
    device: str = "cpu",
    *,
    engine: str | None = None,
    session_options: str = "lean",
    preset: str | None = None,
    weights_from: str | Path | None = None,
    trust_engines: bool = False,
    gpus: int | None = None,
) -> Session:
    """Open a session on an artefact or on a checkpoint.

    Args:
        path: an artefact, or a checkpoint folder, which only the eager reference runs.
        device: "cpu" or "cuda". "cuda" runs artefacts of target torch, of target ort in fp16 or
            bf16, and of the TensorRT targets.
        engine: the engine that runs the model. The default depends on the target: "onnxruntime" for
            onnx and ort, "torch" for torch, "tensorrt" for tensorrt and tensorrt-rtx. "interpreter"
            runs the ONNX of the last two in ONNX's reference interpreter, and "eager" runs any
            artefact in the eager reference.
        session_options: settings of ONNX Runtime: "lean" (weights stay mapped from their files),
            "fast" (constants are folded and weights prepacked) or, for int8 and int4, "exact"
            (products are computed in float32).
        preset: the old name of `session_options`; it works for one more version.
        weights_from: a folder that holds the weights of an artefact whose weights are not inside
            it. It is needed if the checkpoint has moved, or if this user neither built nor bound
            an artefact from the folder that the artefact names.
        trust_engines: run TensorRT engines and plugins although this user did not build them here.
            They are native code, which can do anything.
        gpus: how many GPUs of this host share the model, for artefacts of target torch with fused
            programs. Each gets a process of its own, a rank; on device "cpu" they share the cores.
            In a program that torchrun has started, each process is a rank already: leave it out,
            or give 1 to have the whole model in this process.

    Raises:
        MoecError: `path` is not an artefact, it has no weights, a file has another size or header,
            or weights or engines come from where this user allows none (exit code 2); a graph,
            another small file or the manifest has other bytes than it was written with (1); or the
            device or a package is missing (3).
    """
    if preset is not None:
        warnings.warn("preset is now session_options", DeprecationWarning, stacklevel=3)
        session_options = preset
    # A session reads files later, too, when the program may have changed its working directory.
    path = Path(path).absolute()
    weights_from = None if weights_from is None else Path(weights_from).absolute()
    for name, given, known in (
        ("device", device, ("cpu", "cuda")),
        ("engine", engine, (None, *engines())),
        ("session options", session_options, (*SETS, EXACT)),
    ):
        if given not in known:
            expected = " or ".join(filter(None, known))
            refuse(f"{name} {given}", f"no such {name}", expected, "choose one of them")
    if starts_ranks(gpus):
        return _shared(path, device, engine, gpus, weights_from)
    if device == "cuda" and engine in (EAGER, "interpreter"):
        refuse(
            "device cuda",
            f"engine {engine}",
            "another engine; this one runs on the cpu",
            "leave engine out",
            exit_code=3,
        )
    if _is_checkpoint(path):
        if engine not in (None, EAGER):
            refuse(
                path,
                "a checkpoint",
                f"an artefact for engine {engine}",
                f"moec build --checkpoint {path}",
            )
        spec, _, entries = read_model(path, named_folder(weights_from))
        return replace(eager_session(spec, entries, "fp32"), checkpoint=path)
    with held(path):
        artefact = open_artefact(path, weights_from, trust_engines)
        check_files(artefact, files_of_sessions(artefact))
        if engine == EAGER:
            manifest = artefact.manifest
            stored = artefact.entries()
            session = eager_session(manifest.spec, stored, manifest.compute, artefact)
        else:
            chosen = find_engine(artefact, engine, ALONE if gpus == 1 else None)
            session = artefact_session(artefact, device, session_options, engine=chosen)
        # A field that cannot be right was refused before, by its name.
        check_digest(artefact)
    return session


def starts_ranks(gpus: Any) -> TypeGuard[int]:
    """Whether a call with `gpus` starts ranks: not in a rank, and not for one GPU.

    Raises:
        MoecError: `gpus` is no number of GPUs, or torchrun has started another number of ranks.
    """
    if gpus is None:
        return False
    if isinstance(gpus, bool) or not isinstance(gpus, int) or gpus < 1:
        refuse("gpus", repr(gpus)[:80], "1 or more", "correct gpus")
    rank = started_as()
    if rank.count > 1 and gpus not in (1, rank.count):
        found = f"a process that is one of {rank.count} ranks already"
        refuse(f"gpus {gpus}", found, f"gpus={rank.count}, or 1", "leave gpus out")
    return gpus > 1 and rank.count == 1


def _is_checkpoint(path: Path) -> bool:
    """Whether `path` is a checkpoint, and no artefact that is one too."""
    folder = checkpoint_folder(path)
    return (
        folder is not None and not (folder / NAME).is_file() and (folder / "config.json").is_file()
    )


def _shared(
    path: Path, device: str, engine: str | None, gpus: int, weights_from: Path | None
) -> Session:
    """A session of an artefact that `gpus` ranks share; what no rank could do is refused here."""
    from moec.runtime.ranks.session import SharedSession  # which imports this

    if engine in (EAGER, "interpreter"):
        refuse(f"{gpus} GPUs", f"engine {engine}", "engine torch", "leave gpus out, or engine")
    if _is_checkpoint(path):
        build = f"moec build --checkpoint {path} --target torch --precision fp8 --out DIR"
        refuse(path, "a checkpoint", "an artefact of target torch, for several GPUs", build)
    artefact = open_artefact(path, weights_from)
    chosen = find_engine(artefact, engine).shared(Rank(0, gpus))
    chosen.check(artefact, device)
    chosen.limits(artefact, device)
    named = {"device": device, "engine": engine, "weights_from": weights_from}
    return SharedSession.open(gpus, path, artefact, **named)


def files_of_sessions(artefact: Artefact) -> list[str]:
    """The files of an artefact that sessions read: all but those for other programs."""
    return [name for name in artefact.manifest.files if "/" not in name or name in INPUT_FILES]


def engines() -> tuple[str, ...]:
    """The names of all engines of all targets, and the eager reference."""
    return (*dict.fromkeys(name for each in targets().values() for name in each.engines), EAGER)


def find_engine(artefact: Artefact, name: str | None = None, rank: Rank | None = None) -> Engine:
    """Engine `name` of the artefact's target, by default the first.

    It is that of `rank`, by default the rank that this process was started as. An engine whose
    models ranks cannot share runs in each of them by itself.

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
    return found.shared(rank or started_as()) if found.of_rank else found


def artefact_session(
    artefact: Artefact,
    device: str = "cpu",
    options: str = "lean",
    taps: Sequence[str] = (),
    engine: str | Engine | None = None,
) -> Session:
    """A session that runs `artefact` on an engine of its target, by default the first.

    `options` is the name of a set of session options of ONNX Runtime. `taps` are the inner values
    that `Session.trace` can return.
    """
    chosen = engine if isinstance(engine, Engine) else find_engine(artefact, engine)
    limits = chosen.limits(artefact, device)
    shared = chosen.rank.count > 1
    if shared:
        join(device)
        agree("the artefact", identity(artefact))

    def opened(part: str, taps: Sequence[str] = ()) -> Run:
        run = chosen.open(artefact, part, device, options, taps)
        run = clear_errors(run, f"{artefact.path}: {part} on {chosen.title}")
        if not shared:
            return run
        return counted(from_first(run) if part == "vision" else run)

    session = Session(
        artefact.manifest.spec,
        chosen.computes(artefact),
        chosen.name,
        opened("model", taps),
        artefact,
        once(partial(opened, "vision")),
        limits=limits,
        device=device,
        queues=chosen.queues and device != "cpu",
        rank=chosen.rank,
    )
    return with_layer(session, partial(opened, "mtp"))


def with_layer(session: Session, opened: Callable[[], Run]) -> Session:
    """`session` with one of its layer of multi-token prediction, which `opened` opens, if built."""
    if session.spec.text.mtp != "built":
        return session

    @once
    def layer() -> Session:
        return replace(session, spec=mtp_of(session.spec), run=opened(), vision=None)

    return replace(session, mtp=layer)


def eager_session(
    spec: ModelSpec,
    entries: Mapping[str, Entry],
    precision: str,
    artefact: Artefact | None = None,
    taps: Sequence[str] = (),
    near: float | None = None,
) -> Session:
    """A session that runs `spec` on the eager reference, with the weights `entries`.

    `precision` is the dtype that the graph computes in, `taps` are as in `artefact_session`, and
    `near` is as in `eager_engine`.
    """
    run = eager_engine(spec, entries, precision, taps, near=near)
    vision = once(partial(eager_engine, spec, entries, precision, part="vision"))
    session = Session(spec, precision, EAGER, run, artefact, vision)
    return with_layer(session, partial(eager_engine, spec, entries, precision, part="mtp"))
