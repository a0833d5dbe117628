"""Prove an artefact against the eager reference, layer by layer, on fresh random tokens.

`validate` chooses what is proven, the artefact or its reduced-size model, and runs the checks.
docs/numerics.md says what each check means and where the limits come from.
"""

import math
import os
import secrets
import tempfile
import warnings
from collections.abc import Callable, Iterator
from contextlib import nullcontext
from pathlib import Path

import torch
from torch import Tensor

from moec.artefact.artefact import Artefact, open_artefact
from moec.artefact.opening.held import held
from moec.artefact.parity import identity
from moec.artefact.parity import record as record
from moec.artefact.session_options import EXACT
from moec.exporters.onnx.write import GENAI
from moec.runtime.open import find_engine, starts_ranks
from moec.runtime.proof.against import compare
from moec.runtime.proof.checks import cached_decode, generation, layer_by_layer
from moec.runtime.proof.compare import FP8_NOISE, TOLERANCES
from moec.runtime.proof.cost import cost
from moec.runtime.proof.each_op.genai import genai
from moec.runtime.proof.each_op.stage import every_op
from moec.runtime.proof.each_op.static_scales import static_bytes, static_scales
from moec.runtime.proof.graph_files import graph_files
from moec.runtime.proof.other_options import other_options
from moec.runtime.proof.parts.images import draw_images, fusion, tower
from moec.runtime.proof.parts.mtp import mtp_layer
from moec.runtime.proof.published import published_folder
from moec.runtime.proof.reduced import (
    MOST_TOKENS,
    REDUCED,
    REDUCED_TOKENS,
    build_reduced,
    reduced_spec,
)
from moec.runtime.proof.report import Check, Report
from moec.runtime.proof.source import (
    against_wide,
    as_stored,
    check_same_model,
    covered,
    read_source,
    schemes,
    text_against_source,
    weights_against_source,
)
from moec.runtime.proof.under_test import ArtefactUnderTest
from moec.runtime.ranks.group import join, same
from moec.spec import names
from moec.spec.errors import MoecError, refuse
from moec.spec.hf.forms import checkpoint_folder
from moec.spec.model import ModelSpec
from moec.spec.tensors import quantized
from moec.weights.shard import TensorEntry

Progress = Callable[[str, int, int], None]


def validate(
    path: str | Path,
    *,
    tokens: int | None = None,
    seed: int | None = None,
    reduced: bool = False,
    progress: Progress = lambda stage, done, total: None,
    device: str = "cpu",
    reference: str | None = None,
    rows: Tensor | str | Path | None = None,
    source: str | Path | None = None,
    on_twin: bool | None = None,
    weights_from: str | Path | None = None,
    against: str | None = None,
    python: str | Path | None = None,
    gpus: int | None = None,
) -> Report:
    """Compare an artefact, run by its engine, with the float32 eager reference on its weights.

    For an artefact without weights, moec builds a reduced-size model for the same target and proves
    that: it has the same patterns of layers, smaller widths and random weights. The artefact's own
    graph files are then compared node for node with those that moec writes now.

    Args:
        path: the artefact's folder.
        tokens: the length of the longest sequence; default three chunks and a few tokens more, at
            most 512.
        seed: the seed that the tokens are drawn from; default a fresh one. The report has it.
        reduced: prove a reduced-size model although the artefact has weights, for models that are
            too large to run here.
        progress: called with (stage, done, total).
        device: where the artefact runs, as in `open_session`; the reference runs on the CPU.
        reference: also measure what the precision costs, against these wide weights: "bf16", "fp16"
            or "fp32" for those that the artefact was built from, or a checkpoint folder.
        rows: the tokens to measure that on, int64 [rows, length] or a file; default drawn from the
            reference.
        source: the checkpoint folder that the artefact was built from: its weights are compared
            with the artefact's, and the reference reads them; default the folder in the manifest,
            if it is there.
        on_twin: the old name of `reduced`; it works for one more version.
        weights_from: the folder of the weights, as in `open_session`.
        against: another engine, "vllm" or "transformers": `path` is then a checkpoint, which that
            engine runs in a process of its own. The checkpoint's prompts and greedy tokens are
            compared with the eager reference; `tokens` and `seed` are as above, and the other
            arguments do not apply.
        python: the interpreter that has that engine; default the one that runs moec.
        gpus: how many GPUs share the model, as in `open_session`.

    Raises:
        MoecError: `path` is not an artefact, its weights are missing or have changed, another
            command has replaced it meanwhile, or a package is missing (exit code 3).
    """
    if on_twin is not None:
        warnings.warn("on_twin is now reduced", DeprecationWarning, stacklevel=3)
        reduced = on_twin
    if not (tokens is None or tokens >= 1) or not (seed is None or 0 <= seed < 2**63):
        refuse(
            "validate",
            f"tokens {tokens}, seed {seed}",
            "1 token or more, a seed of 0 to 2^63",
            "correct --tokens or --seed",
        )
    if gpus is not None and against is not None:
        refuse("against", f"{against}, with gpus {gpus}", "one of them", "leave gpus out")
    if starts_ranks(gpus):
        from moec.runtime.ranks.proof import shared_validate  # which imports this

        return shared_validate(
            gpus,
            Path(path),
            progress,
            tokens=tokens,
            seed=seed,
            reduced=reduced,
            device=device,
            reference=reference,
            rows=rows,
            source=source,
            weights_from=weights_from,
        )
    if against is not None:
        folder = checkpoint_folder(path)
        with held(folder) if folder else nullcontext():
            return compare.against(path, against, tokens, seed, progress, python)
    with held(Path(path)):
        artefact = open_artefact(path, weights_from)
        return _validate(artefact, tokens, seed, reduced, progress, device, reference, rows, source)


def _validate(
    artefact: Artefact,
    tokens: int | None,
    seed: int | None,
    reduced: bool,
    progress: Progress,
    device: str,
    reference: str | None,
    rows: Tensor | str | Path | None,
    source: str | Path | None,
) -> Report:
    """What `validate` does with an artefact in this process."""
    seed = secrets.randbits(31) if seed is None else seed
    if find_engine(artefact).rank.count > 1:  # in a rank: all of them draw the same tokens
        join(device)
        seed = same(seed)
    unbound = artefact.manifest.weights.mode == "unbound"
    if source is not None and (unbound or reduced):
        refuse(
            f"--source {source}",
            "a proof of the reduced-size model (the twin), whose weights are random",
            "an artefact with weights",
            "leave --source out, or bind a checkpoint",
        )
    if reference is None and rows is not None:
        refuse("--eval", "no --reference", "a reference", "add --reference bf16")
    if reference is not None:
        if unbound or reduced:
            refuse(
                f"--reference {reference}",
                "a proof of the reduced-size model (the twin), whose weights are random",
                "an artefact with weights",
                "leave --reference out, or bind a checkpoint",
            )
        found = cost(artefact, reference, rows, device, seed, progress)
        report = _prove(artefact, tokens, seed, progress, device, source=source)
        report.cost = found.to_dict()
        return report
    if not unbound and not reduced:
        return _prove(artefact, tokens, seed, progress, device, source=source)
    proven = identity(artefact)
    ArtefactUnderTest(artefact, device, "lean").check_device()
    with tempfile.TemporaryDirectory(prefix="moec-twin-") as folder:
        layers, longest = REDUCED.get(artefact.manifest.precision, (None, None))
        small = reduced_spec(artefact.manifest, layers)
        progress("graph files", 0, 1)
        files = [*graph_files(artefact), *published_folder(artefact, None)]
        progress("reduced-size model", 0, 1)
        built = build_reduced(artefact, small, Path(folder), seed)
        least = REDUCED_TOKENS if longest else 1
        report = _prove(built, tokens or longest, seed, progress, device, least, twin=True)
        report.identity = proven
        subject = os.fsencode(artefact.path).decode(errors="replace")
        report.twin, report.subject = True, f"{subject} (reduced-size model)"
        report.checks[:0] = files
        experts = f" with {small.text.expert_count} experts" if small.text.experts else ""
        report.notes.append(
            f"The artefact's {'weights are not bound' if unbound else 'own weights were not run'}: "
            f"proven on its reduced-size model (twin), {small.text.layers} layers of width "
            f"{small.text.dim}{experts}, chunk {small.text.chunk}. "
            "The artefact's own graph files did not run: they were compared node for node with "
            "what this version of moec writes for the model's full size."
        )
    return report


def _source(
    artefact: Artefact, folder: str | Path | None, notes: list[str]
) -> tuple[ModelSpec, dict[str, TensorEntry], Path] | None:
    """The spec, tensors and folder of the checkpoint to compare with; None if none is known."""
    if folder is not None:
        given = read_source(artefact, Path(folder))
        check_same_model(artefact, Path(folder), *given)
        return (*given, checkpoint_folder(folder) or Path(folder))
    known = artefact.checkpoint
    # A folder inside the artefact comes from whoever made the artefact.
    if known and known.resolve().is_relative_to(artefact.path.resolve()):
        known = None
    read = home = None
    try:
        home = checkpoint_folder(known) if known else None
        if known and home:
            read = read_source(artefact, known)
        found = f"{known} is no folder here" if known else "none is known that you have used"
    except MoecError as error:
        found = f"{error.where}: {error.found}"
    if known and home and read:
        check_same_model(artefact, known, *read)
        notes.append(f"The weights were compared with those in {known}.")
        return (*read, home)
    notes.append(
        f"The weights were not compared with a checkpoint ({found}): a wrong expert in them would "
        "not be found. Use --source DIR."
    )
    return None


def _prove(
    artefact: Artefact,
    tokens: int | None,
    seed: int,
    progress: Progress,
    device: str,
    least: int = 1,
    source: str | Path | None = None,
    twin: bool = False,
) -> Report:
    manifest = artefact.manifest
    # An artefact with quantised weights is proven with float32 products on dequantised weights. A
    # check of its own measures the error that users' products add.
    exact = EXACT in manifest.presets
    notes = list[str]()
    known = None if twin else _source(artefact, source, notes)
    if known and manifest.adapters:  # they make another model of the checkpoint
        merged = ", ".join(manifest.adapters)
        notes.append(f"These adapters were merged into {known[2]} before the comparison: {merged}.")
    original = known[1] if known else {}
    tested = ArtefactUnderTest(
        artefact,
        device,
        EXACT if exact else "lean",
        original if original and covered(artefact, original) else None,
    )
    tested.check_device()
    tolerance = FP8_NOISE if manifest.spec.fp8 else TOLERANCES[tested.compute]
    chunk = manifest.spec.text.chunk
    longest = tokens or min(MOST_TOKENS, 3 * (chunk or 16) + 5)
    if manifest.options:
        longest = min(longest, manifest.options.context)
    generator = torch.Generator().manual_seed(seed)
    pair = [longest, max(1, longest * 5 // 8)]
    lengths = torch.tensor(pair * -(-least // sum(pair)))
    shape = (len(lengths), longest)
    ids = torch.randint(0, manifest.spec.text.vocab, shape, generator=generator)
    report = Report(
        os.fsencode(artefact.path).decode(errors="replace"),  # what is stored is UTF-8
        tested.title,
        "eager fp32",
        manifest.precision,
        seed,
        lengths.tolist(),
        versions=dict(manifest.versions),
        notes=notes,
        identity=identity(artefact),
    )
    if tested.engine.note:
        report.notes.append(tested.engine.note(artefact))
    if chunk and longest <= chunk:
        report.notes.append(
            f"No chunk border was crossed: chunk {chunk}, {longest} tokens; use --tokens for more."
        )
    traced = dict[str, Tensor]()
    more = torch.Generator().manual_seed(seed + 1)
    stages: list[tuple[str, Callable[[], Iterator[Check]]]] = [
        (
            "each op",
            lambda: every_op(tested, ids, lengths, tolerance, more, report.notes, traced),
        ),
        ("layer by layer", lambda: layer_by_layer(tested, ids, lengths, tolerance, traced)),
        ("cached decode", lambda: cached_decode(tested, ids, lengths, tolerance)),
        ("generation", lambda: generation(tested, ids, tolerance)),
    ]
    if GENAI in artefact.parts:
        most = math.inf if manifest.spec.fp8 else tolerance.error
        stages.append(("genai", lambda: genai(tested, most, more)))
    if manifest.vision:
        images = draw_images(manifest.spec, ids, lengths, generator)
        narrow = any(names.of_vision(name) for name in quantized(manifest.spec))
        limits = tolerance if narrow else TOLERANCES[tested.compute]
        stages.insert(0, ("vision tower", lambda: tower(tested, images.pixels, limits)))
        if images.placed:
            stages.append(("images", lambda: fusion(tested, images, lengths, tolerance)))
        else:
            report.notes.append(
                f"No image was placed in the text: {longest} tokens are too few; use --tokens."
            )
    if manifest.mtp and longest > 3:
        stages.append(("mtp", lambda: mtp_layer(tested, ids, lengths, tolerance)))
    if known:
        built_from = known[0]
        stored = as_stored(artefact, built_from, dict(original))[1]
        stages.insert(0, ("weights", lambda: weights_against_source(artefact, stored)))
        stages.insert(0, ("scheme", lambda: schemes(artefact, built_from)))
        stages.insert(0, ("text", lambda: text_against_source(artefact, built_from, known[2])))
        given = (artefact, built_from, original, ids, lengths)
        stages.append(("wide weights", lambda: against_wide(*given, traced)))
    if exact or (manifest.presets and not twin):
        stages.append(
            ("session options", lambda: other_options(tested, ids, lengths, tolerance, notes))
        )
    if not twin:
        home = known[2] if known else None
        stages.append(("graph files", lambda: graph_files(artefact)))
        stages.append(("checkpoint", lambda: published_folder(artefact, home)))
    if manifest.spec.scheme and manifest.spec.scheme.static:
        stages.append(
            ("static scales", lambda: static_scales(manifest.spec, artefact.entries(), ids))
        )
        stages.append(("bytes of static scales", lambda: static_bytes(artefact)))
    for done, (name, checks) in enumerate(stages):
        progress(name, done, len(stages))
        report.checks += checks()
    progress("proof", len(stages), len(stages))
    return report
