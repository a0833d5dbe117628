"""Compare the weights of an artefact with those of the checkpoint that it was built from.

The other checks of a proof run the engine and the reference on the artefact's own weights. So they
cannot see an expert that was packed wrongly. Here each row of each weight is compared with the
checkpoint's, byte by byte; a quantised one with what moec makes of the checkpoint's row.
"""

import filecmp
from collections.abc import Iterator, Mapping
from pathlib import Path

import torch
from torch import Tensor

from moec.artefact.artefact import Artefact
from moec.artefact.placement import INPUT_FILES
from moec.runtime.open import eager_session
from moec.runtime.proof.compare import FP8_NOISE
from moec.runtime.proof.near_ties import choices, following
from moec.runtime.proof.report import Check
from moec.spec import names
from moec.spec.bounded.own import find_own
from moec.spec.errors import refuse
from moec.spec.fields import shown
from moec.spec.files import other_model
from moec.spec.model import ModelSpec
from moec.spec.scheme import SCHEMES
from moec.weights import fp8
from moec.weights.arrange import arrange, store
from moec.weights.int4.packed import packed_rows
from moec.weights.name_map import as_packed, read_model, stacked
from moec.weights.packing import Packing
from moec.weights.shard import TensorEntry
from moec.weights.trust.records import is_allowed
from moec.weights.view import STORED, view

#: the weights that belong to no layer of the decoder
OTHER = "other"
#: the largest difference of logits that quantisation to FP8 may make, relative and over all tokens.
#: The schemes of `SCHEMES` make 0.03 to 0.11 on tiny-scout.
WIDE = 0.25


def read_source(artefact: Artefact, folder: Path) -> tuple[ModelSpec, dict[str, TensorEntry]]:
    """The spec of the checkpoint in `folder`, and its tensors by our name.

    The artefact's adapters are merged into them.

    Raises:
        MoecError: the folder holds no checkpoint, or this user has merged an adapter into no build.
    """
    manifest = artefact.manifest
    adapters = [Path(each) for each in manifest.adapters]
    for adapter in adapters:
        # Merging it would make the checkpoint what somebody else wants.
        if not is_allowed("adapter", str(adapter.resolve())):
            refuse(
                adapter,
                "an adapter that this user has merged into no build",
                "an adapter that you have used",
                f"if you trust it: moec bind {artefact.path} --checkpoint {folder} --adapter "
                f"{adapter}",
            )
    wanted = manifest.spec.text.mtp == "built"
    spec, _, entries = read_model(folder, adapters=adapters, mtp=wanted)
    return spec, entries


def check_same_model(
    artefact: Artefact, folder: Path, spec: ModelSpec, entries: dict[str, TensorEntry]
) -> None:
    """Refuse a checkpoint of another model than the artefact's; the rest is what was read of it.

    Raises:
        MoecError: names the first field that differs, or says that one side is quantised and the
            other not, so that their bytes have nothing in common.
    """
    _check_same_form(artefact, folder, spec)
    wanted = artefact.manifest.spec
    if not spec.scheme or (wanted.scheme and not wanted.scheme.cache):
        wanted = wanted.model_copy(update={"scheme": spec.scheme})
    same, stored = as_stored(artefact, spec, entries)
    odd = other_model(same, wanted, "scheme")  # `schemes` compares that
    if odd:
        refuse(
            f"--source {folder}: {odd[0][0]}",
            odd[0][1],
            f"{odd[0][2]}, as in {artefact.path}",
            "name the checkpoint of the same model; do not use the artefact if this one is its own",
        )
    known = {packing.source for packing in artefact.manifest.packings.values()}
    known |= artefact.manifest.weights.tensors.keys()
    if more := next((name for name in stored if name not in known), None):
        refuse(
            f"--source {folder}: {more}",
            "a tensor that the artefact was not built from, such as a scale of another scheme",
            f"the tensors that {artefact.path} was built from",
            "name the checkpoint that it was built from, or leave --source out",
        )


def _check_same_form(artefact: Artefact, folder: Path, spec: ModelSpec) -> None:
    """Refuse wide weights where the artefact was built from quantised ones, or the other way."""
    scheme, packings = artefact.manifest.spec.scheme, artefact.manifest.packings.values()
    own = any(packing.fp8 for packing in packings)  # moec quantised wide weights
    built_from = None if own else scheme
    if (spec.scheme is None) == (built_from is None):
        return
    expected = built_from.shown if built_from else "wide weights"
    refuse(
        f"--source {folder}",
        spec.scheme.shown if spec.scheme else "wide weights",
        f"the wide weights that moec quantised for {artefact.path}"
        if own
        else f"{expected}, which {artefact.path} was built from",
        "name the checkpoint that it was built from, or leave --source out",
    )


def as_stored(
    artefact: Artefact, spec: ModelSpec, entries: dict[str, TensorEntry]
) -> tuple[ModelSpec, dict[str, TensorEntry]]:
    """The spec and the tensors of a checkpoint as the artefact's build saw them."""
    if artefact.manifest.packings:
        return as_packed(spec, entries)
    return (spec, entries) if artefact.manifest.spec.separate_experts else stacked(spec, entries)


def quantises(artefact: Artefact) -> bool:
    """Whether moec quantised weights when it built `artefact`."""
    return any(packing.bits or packing.fp8 for packing in artefact.manifest.packings.values())


def weights_against_source(
    artefact: Artefact, source: Mapping[str, TensorEntry]
) -> Iterator[Check]:
    """Compare every row of every weight; one check for each layer, and one for what is wrong."""
    stored = artefact.stored()
    packings = {packing.source: packing for packing in artefact.manifest.packings.values()}
    groups: dict[str, list[str]] = {}
    for name in source:
        index = names.layer_of(name)
        groups.setdefault(OTHER if index is None else names.layer(index), []).append(name)
    for group, members in groups.items():
        same = sum(_stays(name, source[name], stored, packings) for name in members)
        label = "weights" if group == OTHER else f"weights, {group}"
        wrong = [
            Check(f"{label}: {_within(place, group)}", "agreement", share, 1.0, detail)
            for name in members
            for place, share, detail in _wrong(
                artefact, name, source[name], stored, packings.get(name)
            )
        ]
        detail = f"{len(members)} tensors, row by row"
        if same:
            detail += f"; {same} of them are the checkpoint's own bytes"
        yield from wrong or [Check(f"weights, {group}", "agreement", 1.0, 1.0, detail)]


def _stays(
    name: str,
    source: TensorEntry,
    stored: Mapping[str, TensorEntry],
    packings: Mapping[str, Packing],
) -> bool:
    """Whether the artefact reads parameter `name` from the checkpoint itself."""
    return name not in packings and _same_bytes(stored[name], source)


def _within(place: str, group: str) -> str:
    return place.removeprefix(f"{group}.")


def _wrong(
    artefact: Artefact,
    name: str,
    source: TensorEntry,
    stored: Mapping[str, TensorEntry],
    packing: Packing | None,
) -> Iterator[tuple[str, float, str]]:
    """The matrices of parameter `name` that differ: (place, share of right rows, what differs)."""
    kinds = packing.names(artefact.manifest.spec.stored(name)) if packing else (name,)
    parts = [stored[each] for each in kinds]
    if packing is None and _same_bytes(parts[0], source):
        return
    found = [view(part) for part in parts]
    many = len(source.shape) == 3
    matrices = [source[expert] for expert in range(source.shape[0])] if many else [source]
    along = fp8.along_of(packing.fp8 if packing else None, many)
    largest = None  # magnitude of a stack whose matrices share a scale
    if many and packing and packing.fp8 == "tensor":
        sizes = [fp8.magnitudes(view(each), "all", packing.block) for each in matrices]
        largest = torch.stack(sizes).amax()
    for expert, each in enumerate(matrices):
        mine = [_of(part, expert, source.shape[0]) for part in found] if many else found
        wanted = _packed(packing, each, along, largest) if packing else (view(each),)
        off = _wrong_rows(wanted, mine)
        if bool(off.any()):
            place = names.expert_of(name, expert) if many else name
            first = int(off.nonzero()[0, 0])
            detail = f"{int(off.sum())} of {len(off)} rows differ from {source.file.name}, "
            yield place, 1 - float(off.double().mean()), f"{detail}first row {first}"


def _same_bytes(mine: TensorEntry, source: TensorEntry) -> bool:
    """Whether both are one place of one file, and nothing is added to it."""
    if source.changes or source.parts:
        return False
    return mine.offset == source.offset and mine.file.samefile(source.file)


def _of(part: Tensor, expert: int, count: int) -> Tensor:
    """An expert's share of a stored tensor; a scale of the whole tensor stays."""
    return part[expert] if part.dim() and len(part) == count else part


def _wrong_rows(wanted: tuple[Tensor, ...], found: list[Tensor]) -> Tensor:
    """The rows of a matrix (or the elements of a vector) with a wrong byte: bool [rows], as stored.

    `wanted` and `found` are the tensors that hold it. A scale of several rows makes all of them
    wrong.
    """
    rows = len(wanted[0]) if wanted[0].dim() else 1
    off = torch.zeros(rows, dtype=torch.bool)
    for right, mine in zip(wanted, found, strict=True):
        left, other = (x.contiguous().view(-1).view(torch.uint8) for x in (right, mine))
        if len(left) != len(other):  # such as scales of blocks, and of outputs
            return torch.ones_like(off)
        differs = left != other
        off |= differs.view(rows, -1).any(1) if right.numel() % rows == 0 else differs.any()
    return off


def _packed(
    packing: Packing, source: TensorEntry, along: str, largest: Tensor | None
) -> tuple[Tensor, ...]:
    """What moec stores for a matrix: the same arithmetic as when it packs, so the same bytes.

    `along` says which elements share an FP8 scale, as in `fp8.magnitudes`, and `largest` is their
    largest magnitude if they are more than the matrix.
    """
    if packing.group:
        return tuple(map(torch.cat, zip(*packed_rows(packing, source), strict=True)))
    matrix = view(source)
    if not packing.fp8:
        return store(packing, arrange(packing, matrix))
    size = fp8.magnitudes(matrix, along, packing.block) if largest is None else largest
    scales = fp8.scales(size, STORED[packing.dtype])
    values = torch.empty(matrix.shape, dtype=STORED["fp8"])
    fp8.quantise(matrix, scales.float(), along, packing.block, values)
    turned = packing.fp8 == "block" and packing.arrange == "transpose"
    return arrange(packing, values), scales.transpose(-2, -1) if turned else scales


def schemes(artefact: Artefact, source: ModelSpec) -> Iterator[Check]:
    """Compare the scheme with that of the checkpoint, or with moec's own of the same name.

    A scheme that somebody wrote has nothing to be compared with; `against_wide` measures it.
    """
    mine = artefact.manifest.spec.scheme
    if mine is None:
        return
    right = source.scheme or SCHEMES.get(mine.name)
    if right is None:
        return
    free: dict[str, object] = {"cache": mine.cache, "scales": mine.scales}
    if source.scheme is None:
        free["layout"] = mine.layout
    wanted, found = right.model_copy(update=free).model_dump(), mine.model_dump()
    odd = [key for key in wanted if wanted[key] != found[key]]
    detail = f"{odd[0]} is {found[odd[0]]}, not {wanted[odd[0]]}"[:200] if odd else mine.name
    yield Check(f"{mine.precision.upper()} scheme", "agreement", 0.0 if odd else 1.0, 1.0, detail)


def text_against_source(artefact: Artefact, source: ModelSpec, folder: Path) -> Iterator[Check]:
    """Compare what decides which tokens go in and when a sequence ends with the checkpoint's.

    These are end tokens and sampling, which the manifest has, and the files of the tokenizer and of
    images that sessions of the artefact read. No number of a graph depends on them. A file that
    only the checkpoint has counts too: without its template, another one would be filled. Only an
    artefact whose weights lie elsewhere may have none of the files.
    """
    mine, wanted = artefact.manifest.spec, dict[str, object]()
    found = dict[str, object]()
    for spec, values in ((mine, found), (source, wanted)):
        values["bos"], values["eos"], values["pad"] = (
            spec.tokens.bos,
            spec.tokens.eos,
            spec.tokens.pad,
        )
        values["sampling"] = spec.sampling.model_dump() if spec.sampling else None
        values["repetition_penalty"] = spec.repetition_penalty
    odd = {
        name: f"{shown(value)}, expected {shown(wanted[name])}"
        for name, value in found.items()
        if value != wanted[name]
    }
    # another engine reads a published folder, and knows of no other
    published = artefact.manifest.weights.published
    read = {
        name: find_own(artefact.path, name) if published else artefact.companion(name)
        for name in INPUT_FILES
    }
    copies = sum(own is not None for own in read.values())
    needed = published or copies or artefact.manifest.weights.mode != "in-place"
    for name, own in read.items():
        theirs = find_own(folder, name)
        if own and theirs is None:
            odd[name] = f"{folder} has no such file"
        elif theirs and own is None and needed:
            odd[name] = f"the artefact has no such file, but {folder} has"
        elif own and theirs and not filecmp.cmp(own, theirs, shallow=False):
            odd[name] = f"other bytes than in {folder}"
    for name, what in odd.items():
        yield Check(f"text: {name}", "agreement", 0.0, 1.0, what)
    if not odd:
        detail = f"end tokens, sampling, and {copies} files" if copies else "end tokens, sampling"
        yield Check("text", "agreement", 1.0, 1.0, detail)


def against_wide(
    artefact: Artefact,
    source: ModelSpec,
    entries: Mapping[str, TensorEntry],
    ids: Tensor,
    lengths: Tensor,
    found: Mapping[str, Tensor],
) -> Iterator[Check]:
    """Compare the engine's logits of ids [B, S] with those of the checkpoint's wide weights.

    `found` are the engine's values, as `shown_layers` names them, and the logits. The other checks
    follow the artefact's own static scales and its scheme. Only this one sees that they are far
    off. It has a loose limit, because FP8 itself costs something; where it changes a router's
    choice at a near tie, the wide model makes the same choice.
    """
    if artefact.manifest.spec.scheme is None or source.scheme is not None:
        return
    wide = eager_session(source, entries, "fp32", near=FP8_NOISE.near)
    followed = {name: found[name] for name in choices(source, FP8_NOISE)}
    expected = following(wide, followed, lengths).trace(ids, lengths, [])["logits"]
    off = float((found["logits"] - expected).norm() / expected.norm())
    detail = "the checkpoint's wide weights"
    yield Check("logits, what FP8 changes", "error", off, WIDE, detail)


def covered(artefact: Artefact, source: Mapping[str, TensorEntry]) -> bool:
    """Whether the reference can read every parameter of the artefact's graph from `source`."""
    known = artefact.entries() if not quantises(artefact) else {}
    return bool(known) and known.keys() <= source.keys()
