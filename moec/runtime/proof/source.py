"""Compare the weights of an artefact with those of the checkpoint that it was built from.

The other checks of a proof run the engine and the reference on the artefact's own weights. So they
cannot see an expert that was packed wrongly. Here each row of each weight is compared with the
checkpoint's: as bytes where nothing was quantised, else within the error of the quantisation.
"""

from collections.abc import Iterator, Mapping
from pathlib import Path

import torch
from torch import Tensor

from moec.artefact.artefact import Artefact
from moec.graph_builder import ops
from moec.runtime.proof.report import Check
from moec.spec import names
from moec.spec.errors import refuse
from moec.spec.files import other_model
from moec.weights.arrange import arrange, unpack
from moec.weights.name_map import read_model
from moec.weights.packing import Packing
from moec.weights.shard import TensorEntry
from moec.weights.view import TORCH_DTYPES, view

#: the weights that belong to no layer of the decoder
OTHER = "other"
#: the largest error of an integer, in scales: half a step, a step where the largest value of either
#: sign is in one block, and the rounding of the scale itself
STEPS = 1.3
#: the largest relative error of an E4M3 value, with the rounding of its scale, and the largest
#: error of values below the normal ones, as a share of the matrix's largest value
FP8_ERROR, FP8_LEAST = 0.07, 2.0**-17
#: The largest mean error of a matrix, and the largest root of the mean square: in steps of
#: integers, and relative for E4M3. Rounding to the nearest gives 0 and 0.29, and 0 and 0.026;
#: truncation has twice the spread. Smaller matrices than `ENOUGH` elements are left out.
STEP_ERRORS, FP8_ERRORS, ENOUGH = (0.1, 0.4), (0.01, 0.036), 1024
#: E4M3 values below this share of the largest may be below the normal ones
NORMAL = 2.0**-12


def read_source(artefact: Artefact, folder: Path) -> dict[str, TensorEntry]:
    """The tensors of the checkpoint in `folder`, by our name.

    Raises:
        MoecError: the folder holds no checkpoint, or one of another model.
    """
    spec, _, entries = read_model(folder)
    wanted = artefact.manifest.spec
    if not spec.scheme or (wanted.scheme and not wanted.scheme.cache):
        wanted = wanted.model_copy(update={"scheme": spec.scheme})
    odd = other_model(spec, wanted, "scheme")
    if odd:
        refuse(
            f"--source {folder}: {odd[0][0]}",
            odd[0][1],
            f"{odd[0][2]}, as in {artefact.path}",
            "name the checkpoint of the same model",
        )
    return entries


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
    kinds = packing.names(artefact.manifest.spec.dtype) if packing else (name,)
    parts = [stored[each] for each in kinds]
    if packing is None and _same_bytes(parts[0], source):
        return
    right, found = view(source), [view(part) for part in parts]
    many = right.dim() == 3
    for expert in range(len(right)) if many else (None,):
        matrix = right if expert is None else right[expert]
        mine = found if expert is None else [_of(each, expert, right) for each in found]
        off = _wrong_rows(matrix, mine, packing, many)
        if bool(off.any()):
            place = name if expert is None else names.expert_of(name, expert)
            first = int(off.nonzero()[0, 0])
            detail = f"{int(off.sum())} of {len(off)} rows differ from {source.file.name}, "
            yield place, 1 - float(off.double().mean()), f"{detail}first row {first}"


def _same_bytes(mine: TensorEntry, source: TensorEntry) -> bool:
    """Whether both are one place of one file."""
    return mine.offset == source.offset and mine.file.samefile(source.file)


def _of(part: Tensor, expert: int, like: Tensor) -> Tensor:
    """An expert's share of a stored tensor; a scale of the whole tensor stays."""
    return part[expert] if part.dim() and len(part) == len(like) else part


def _wrong_rows(
    right: Tensor, found: list[Tensor], packing: Packing | None, expert: bool
) -> Tensor:
    """Which rows of a matrix (or elements of a vector) are wrong: bool [rows], as stored."""
    if packing is None or not (packing.bits or packing.fp8):
        wanted = right if packing is None else arrange(packing, right)
        wanted = wanted if packing is None else wanted.to(TORCH_DTYPES[packing.dtype])
        rows = len(wanted) if wanted.dim() else 1
        left, right = (x.contiguous().view(-1).view(torch.uint8) for x in (wanted, found[0]))
        return (left != right).view(rows, -1).any(1)
    wide = right.float()
    if packing.fp8:
        codes = found[0] if packing.arrange == "rows" else found[0].t()
        axis = 1 if expert else 0
        value = ops.dequantize.eager(codes, found[1], axis, packing.block, "fp32")
        bound = FP8_ERROR * wide.abs() + FP8_LEAST * wide.abs().amax()
        error = value - wide
        normal = wide.abs() > NORMAL * wide.abs().amax()
        wrong = _badly_rounded(error[normal] / wide[normal], FP8_ERRORS)
        return _too_far(error, bound) | wrong
    value = arrange(packing, unpack(packing, tuple(found))[..., : wide.shape[-1]])
    wide, block = arrange(packing, wide), packing.block
    padded = torch.nn.functional.pad(wide, (0, -wide.shape[1] % block))
    blocks = torch.unflatten(padded, 1, (-1, block))
    assert packing.bits
    scale = blocks.abs().amax(2) / (1 << (packing.bits - 1))
    steps = scale.repeat_interleave(block, 1)[:, : wide.shape[1]]
    error = value - wide
    # A scale may be negative. What rounds is the integer, so the error counts in its direction.
    signs = found[1].float().sign().repeat_interleave(block, 1)[:, : wide.shape[1]]
    in_steps = signs * error / steps.clamp(min=1e-30)
    return _too_far(error, STEPS * steps) | _badly_rounded(in_steps, STEP_ERRORS)


def _too_far(error: Tensor, bound: Tensor) -> Tensor:
    """The rows [n] in which an element of `error` [n, m] is above `bound`; NaN is."""
    within: Tensor = error.abs() <= bound
    return ~within.all(1)


def _badly_rounded(error: Tensor, most: tuple[float, float]) -> bool:
    """Whether the elements of a matrix were not rounded to the nearest: see `STEP_ERRORS`."""
    mean, spread = float(error.mean().abs()), float(error.square().mean().sqrt())
    return error.numel() >= ENOUGH and not (mean <= most[0] and spread <= most[1])


def covered(artefact: Artefact, source: Mapping[str, TensorEntry]) -> bool:
    """Whether the reference can read every parameter of the artefact's graph from `source`."""
    known = artefact.entries() if not quantises(artefact) else {}
    return bool(known) and known.keys() <= source.keys()
