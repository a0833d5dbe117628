"""Prove an artefact against the eager reference, layer by layer, on fresh random tokens.

What each check means and where the limits come from: docs/numerics.md.
"""

import secrets
import tempfile
import warnings
from collections.abc import Callable, Iterator, Mapping
from dataclasses import replace
from functools import partial
from pathlib import Path

import torch
from torch import Tensor

from moec.artefact.artefact import Artefact, open_artefact, write_manifest
from moec.artefact.manifest import Manifest
from moec.artefact.session_options import EXACT
from moec.artefact.targets import find_target
from moec.exporters.export import export
from moec.graph_builder.passes.follow import taken
from moec.runtime.calibrate import calibrate
from moec.runtime.proof.chunked_prefill import in_pieces
from moec.runtime.proof.compare import (
    FAST_PRODUCTS,
    FP8_NOISE,
    SAME_INPUTS,
    SAME_INPUTS_MOST,
    TOLERANCES,
    Tolerance,
    agreement,
    argmax_agreement,
    error,
    worst_error,
)
from moec.runtime.proof.cost import cost
from moec.runtime.proof.image_checks import draw_images, fusion, tower
from moec.runtime.proof.near_ties import choices, following, settled, watched
from moec.runtime.proof.report import Check, Report
from moec.runtime.proof.under_test import ArtefactUnderTest
from moec.spec import names
from moec.spec.errors import refuse
from moec.spec.model import ModelSpec
from moec.spec.reduced import twin
from moec.spec.tensors import quantized
from moec.weights.random import write_random_checkpoint

#: tokens of the longest row where nobody says otherwise; three chunk borders if the chunk allows
MOST_TOKENS = 512

#: precision -> depth of its twin at most, and tokens of the longest row. In float16 and below the
#: routers of random weights flip on near ties, a token in hundreds at each layer, and what follows
#: is another token: after dozens of layers, or among few, nothing would be left to compare.
TWINS = dict.fromkeys(("fp16", "bf16", "int8", "int4", "fp8"), (4, 101))
#: tokens that a twin with such routers is proven on at least, in more rows if need be: among few,
#: one that went to another expert is a large part of an error
TWIN_TOKENS = 128
#: of a twin whose target has engines: none is built, and caches are as small as its chunks
TWIN_OPTIONS = {"context": MOST_TOKENS, "piece": MOST_TOKENS, "build": False}

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
    on_twin: bool | None = None,
) -> Report:
    """Compare an artefact in its engine with the float32 eager reference on the same weights.

    An artefact without weights is proven on a reduced-size model: the same layers and patterns,
    fewer and narrower, with random weights, built for the same target.

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
        on_twin: the old name of `reduced`; it works for one more version.

    Raises:
        MoecError: `path` is no artefact, its weights are gone or changed, or a package is missing
            (exit code 3).
    """
    if on_twin is not None:
        warnings.warn("on_twin is now reduced", DeprecationWarning, stacklevel=2)
        reduced = on_twin
    if not (tokens is None or tokens >= 1) or not (seed is None or 0 <= seed < 2**63):
        refuse(
            "validate",
            f"tokens {tokens}, seed {seed}",
            "1 token or more, a seed of 0 to 2^63",
            "correct --tokens or --seed",
        )
    artefact = open_artefact(path)
    seed = secrets.randbits(31) if seed is None else seed
    unbound = artefact.manifest.weights.mode == "unbound"
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
        report = _validate(artefact, tokens, seed, progress, device)
        report.cost = found.to_dict()
        return report
    if not unbound and not reduced:
        return _validate(artefact, tokens, seed, progress, device)
    ArtefactUnderTest(artefact, device, "lean").check_device()
    with tempfile.TemporaryDirectory(prefix="moec-twin-") as folder:
        layers, longest = TWINS.get(artefact.manifest.precision, (None, None))
        small = twin(artefact.manifest.spec, layers, **_sizes(artefact.manifest))
        progress("reduced-size model", 0, 1)
        built = _build_twin(artefact, small, Path(folder), seed)
        least = TWIN_TOKENS if longest else 1
        report = _validate(built, tokens or longest, seed, progress, device, least)
        report.twin, report.subject = True, f"{artefact.path} (reduced-size model)"
        report.notes.append(
            f"The artefact's {'weights are not bound' if unbound else 'own weights were not run'}: "
            f"proven on its reduced-size model (twin), {small.text.layers} layers of width "
            f"{small.text.dim} with {small.text.experts.count} experts, chunk {small.text.chunk}."
        )
    return report


def _sizes(manifest: Manifest) -> Mapping[str, int]:
    """The least sizes of the reduced-size model, where kernels want more than it has."""
    return find_target(manifest.target).reduced.get(manifest.dialect, {})


def _build_twin(artefact: Artefact, small: ModelSpec, folder: Path, seed: int) -> Artefact:
    """`small` with random weights, built as `artefact` was."""
    manifest, scheme = artefact.manifest, small.scheme
    ours = scheme if scheme and scheme.layout == "moec" else None  # from wide weights
    weights, scales = folder / "weights", None
    write_random_checkpoint(
        small.model_copy(update={"scheme": None}) if ours else small, weights, seed
    )
    if ours and ours.static:
        tokens = torch.randint(
            0, small.text.vocab, (4, 64), generator=torch.Generator().manual_seed(seed)
        )
        scales = calibrate(weights, tokens)
    return export(
        weights,
        target=manifest.target,
        precision=manifest.precision,
        out=folder / "twin",
        weights="pack" if manifest.packings else None,
        scheme=ours,
        scales=scales,
        cache=None if scheme is None or ours else "fp8" if scheme.cache else "wide",
        options=manifest.options and manifest.options.model_copy(update=TWIN_OPTIONS),
    )


def record(path: str | Path, report: Report) -> None:
    """Store `report` in the artefact's manifest."""
    artefact = open_artefact(path)
    write_manifest(artefact.path, artefact.manifest.model_copy(update={"parity": report.to_dict()}))


def _validate(
    artefact: Artefact,
    tokens: int | None,
    seed: int,
    progress: Progress,
    device: str,
    least: int = 1,
) -> Report:
    manifest = artefact.manifest
    # Quantised weights are proven by products in float32 on what they mean, and what their fast
    # products add is a check of its own.
    exact = EXACT in manifest.presets
    subject = ArtefactUnderTest(artefact, device, EXACT if exact else "lean")
    subject.check_device()
    tolerance = FP8_NOISE if manifest.spec.scheme else TOLERANCES[subject.compute]
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
        str(artefact.path),
        subject.title,
        "eager fp32",
        manifest.precision,
        seed,
        lengths.tolist(),
        versions=dict(manifest.versions),
    )
    if subject.engine.note:
        report.notes.append(subject.engine.note(artefact))
    if chunk and longest <= chunk:
        report.notes.append(
            f"No chunk border was crossed: chunk {chunk}, {longest} tokens; use --tokens for more."
        )
    stages: list[tuple[str, Callable[[], Iterator[Check]]]] = [
        ("layer by layer", lambda: _ladder(subject, ids, lengths, tolerance)),
        ("cached decode", lambda: _cached(subject, ids, lengths, tolerance)),
        ("generation", lambda: _greedy(subject, ids, tolerance)),
    ]
    if manifest.vision:
        images = draw_images(manifest.spec, ids, lengths, generator)
        narrow = any(names.of_vision(name) for name in quantized(manifest.spec))
        limits = tolerance if narrow else TOLERANCES[subject.compute]
        stages.insert(0, ("vision tower", lambda: tower(subject, images.pixels, limits)))
        if images.placed:
            stages.append(("images", lambda: fusion(subject, images, lengths, tolerance)))
        else:
            report.notes.append(
                f"No image was placed in the text: {longest} tokens are too few; use --tokens."
            )
    if exact:
        stages.append(("fast products", lambda: _fast(subject, ids, lengths)))
    for done, (name, checks) in enumerate(stages):
        progress(name, done, len(stages))
        report.checks += checks()
    progress("proof", len(stages), len(stages))
    return report


def _ladder(
    subject: ArtefactUnderTest, ids: Tensor, lengths: Tensor, tolerance: Tolerance
) -> Iterator[Check]:
    """Every layer's output and routing, then the logits, of one call without a cache."""
    spec = subject.artefact.manifest.spec
    layers = spec.text.all_layers
    routers = {i: names.router(i) for i in (la.index for la in layers if la.moe)}
    hidden = [names.EMBED, *(names.out(layer.index) for layer in layers)]
    chosen = {i: names.chosen(i) for i in routers}
    taps = [*hidden, *routers.values(), *chosen.values()]
    found = subject.session(taps).trace(ids, lengths, taps)
    reference = subject.reference(taps, tolerance.near)
    taken = {name: found[name] for name in choices(spec, tolerance)}
    expected = following(reference, taken, lengths).trace(ids, lengths, taps)
    if spec.scheme:
        yield from _each_layer(subject, ids, lengths, found, hidden)
    own = torch.arange(ids.shape[1]) < lengths[:, None]
    yield error("embed", found[names.EMBED], expected[names.EMBED], tolerance)
    for layer in layers:
        if layer.moe:
            logits = expected[routers[layer.index]]
            ours, theirs = (each[chosen[layer.index]] for each in (expected, found))
            same, clear = (theirs == ours).all(-1), _clear(logits, ours, theirs, tolerance)
            yield agreement(f"{names.layer(layer.index)} router", same, clear, tolerance)
        name = names.out(layer.index)
        yield error(names.layer(layer.index), found[name], expected[name], tolerance)
    a, b = found["logits"], expected["logits"]
    yield error("logits, all positions", a, b, tolerance)
    if not spec.scheme:  # few tokens: roundings to FP8 may have moved all to other experts
        ends = lengths.cumsum(0) - 1
        yield error("logits, last token", a[ends], b[ends], tolerance)
    yield argmax_agreement("argmax", a, b, tolerance)
    chunk = spec.text.chunk
    if chunk and int(lengths.max()) > chunk:
        at = torch.arange(ids.shape[1]).expand_as(ids)[own]
        border = (at >= chunk) & ((at % chunk == 0) | (at % chunk == chunk - 1)) | (at == chunk - 1)
        detail = f"{int(border.sum())} positions beside {int((lengths.max() - 1) // chunk)} borders"
        yield error("logits, chunk borders", a[border], b[border], tolerance, detail)


def _clear(logits: Tensor, ours: Tensor, theirs: Tensor, tolerance: Tolerance) -> Tensor:
    """bool [T]: where the reference's router logits [T, E] leave no other choice than `ours`.

    ours and theirs [T, k] are the experts that the reference and the engine chose.
    """
    if tolerance.near is not None:
        return (taken(logits, ours, theirs, tolerance.near) != theirs).any(-1)
    best = logits.topk(min(ours.shape[1] + 1, logits.shape[1])).values
    return (-best.diff() > tolerance.error * logits.abs().max()).all(-1)


def _each_layer(
    subject: ArtefactUnderTest,
    ids: Tensor,
    lengths: Tensor,
    found: dict[str, Tensor],
    hidden: list[str],
) -> Iterator[Check]:
    """Every layer by itself: the reference starts from what the engine made of the layer before.

    Half of its tokens are held to what roundings make of all, most to what they make of some.
    """
    given = {name: found[name] for name in hidden}
    expected = subject.reference_from(ids, lengths, given, hidden)
    compute = subject.compute
    for name in (*hidden[1:], "logits"):
        label, a, b = names.title(name), found[name], expected[name]
        index = names.layer_of(name)
        chosen = None if index is None else found.get(names.chosen(index))
        yield worst_error(f"{label}, same inputs", a, b, chosen, SAME_INPUTS[compute])
        yield error(f"{label}, most tokens", a, b, SAME_INPUTS_MOST[compute])


def _cached(
    subject: ArtefactUnderTest, ids: Tensor, lengths: Tensor, tolerance: Tolerance
) -> Iterator[Check]:
    """Prefill in uneven pieces and decode around each chunk border, rows of different length."""
    routes = choices(subject.artefact.manifest.spec, tolerance)
    session = subject.session(routes)
    reference = partial(subject.reference, near=tolerance.near)
    chunk = session.spec.text.chunk or 16
    whole = session.trace(ids, lengths, routes)
    cuts = {
        cut
        for border in range(chunk, ids.shape[1], chunk)
        for cut in (border - 2, border - 1, border, border + 1)
    } or {ids.shape[1] - 2, ids.shape[1] - 1}
    name = "prefill against decode"
    yield in_pieces(name, session, ids, lengths, cuts, whole, tolerance, reference)
    row, short = ids[1:2, : lengths[1]], lengths[1:2]
    within = {key: each[lengths[0] : lengths[:2].sum()] for key, each in whole.items()}
    alone = settled(reference, row, short, within, session.trace(row, short, routes))
    yield error("ragged batch against row alone", within["logits"], alone, tolerance)


def _greedy(subject: ArtefactUnderTest, ids: Tensor, tolerance: Tolerance) -> Iterator[Check]:
    """Greedy tokens through the caches, and the reference's opinion of each."""
    routes = choices(subject.artefact.manifest.spec, tolerance)
    session, seen = watched(subject.session(routes), routes)
    prompt = ids[:1, : max(1, min(ids.shape[1] - 8, (session.spec.text.chunk or 16) - 4))]
    wanted = 32 if session.spec.scheme else 8  # of few, two that FP8 moved would be too many
    context = session.limits.context
    room = wanted if context is None else context - prompt.shape[1] + 1
    tokens = session.generate(prompt, max_new_tokens=min(wanted, room), stop=())
    fed = tokens[:, :-1]
    lengths, taken = torch.tensor([fed.shape[1]]), {n: torch.cat(each) for n, each in seen.items()}
    reference = following(subject.reference((), tolerance.near), taken, lengths)
    logits = reference.logits(fed)[0, prompt.shape[1] - 1 :]
    best = logits.max(-1).values
    given = logits.gather(1, tokens[0, prompt.shape[1] :, None])[:, 0]
    near = best - given <= tolerance.error * logits.abs().max()
    yield agreement("greedy tokens", near, torch.ones_like(near), tolerance)


def _fast(subject: ArtefactUnderTest, ids: Tensor, lengths: Tensor) -> Iterator[Check]:
    """What users run, whose products round activations to int8, against options `exact`."""
    exact, fast = (
        replace(subject, options=options).session().trace(ids, lengths, [])["logits"]
        for options in (subject.options, "lean")
    )
    yield error("logits, int8 activations", fast, exact, FAST_PRODUCTS)
    yield argmax_agreement("argmax, int8 activations", fast, exact, FAST_PRODUCTS)
