"""The model card of a checkpoint that moec wrote: where it comes from, and what was done."""

import hashlib
from collections.abc import Iterable
from pathlib import Path

from moec.artefact.card import PROOF, read_card, write_proof
from moec.exporters.versions import versions
from moec.spec.errors import visible
from moec.spec.model import ModelSpec
from moec.spec.scheme import INPUTS, INT4_WEIGHTS, WEIGHTS
from moec.spec.tensors import eligible, quantized
from moec.weights.checkpoint import Checkpoint

#: what a rule says of a weight's scales; what the quantised values are
_KINDS = WEIGHTS | INT4_WEIGHTS
_VALUES = {"fp8": "E4M3 values", "int4": "4-bit integers around 8, eight in a word,"}


def model_card(told: ModelSpec, scheme: str, source: Checkpoint) -> str:
    """The card of a checkpoint with the spec `told`, made from `source` by the scheme of that name.

    It names the source by a hash of its headers, because its data is not read twice.
    """
    rules = quantized(told)
    kinds = sorted({(rule.weight, rule.inputs) for rule in rules.values()})
    how = "; ".join(f"weights: {_KINDS[w]}; inputs: {INPUTS[i]}" for w, i in kinds)
    side = told.scheme.block if told.scheme else None
    blocks = f"; block: {side}" if {w for w, _ in kinds} & {"block", "group"} else ""
    precision, scheme = told.scheme.precision if told.scheme else "", visible(scheme)
    wide = sum(name not in rules for name in eligible(told))
    headers = hashlib.sha256()
    for shard in source.shards:
        headers.update(f"{shard.name} {shard.size} {shard.header_sha256}\n".encode())
    adapters = f"\n- adapters, merged: {len(source.adapters)}" if source.adapters else ""
    return f"""---
tags:
- {precision}
- compressed-tensors
- moec
---

# {visible(told.name)}, {scheme} {precision.upper()}

{_MADE}{versions().get("moec", "from a checkout")}
- scheme: {scheme} ({how}){blocks}
- quantised: {len(rules)} weights; {wide} others that could be are as they were
- source: {len(source.shards)} files, SHA-256 of their names, sizes and headers
  `{headers.hexdigest()}`{adapters}

The weights are {_VALUES[precision]} in compressed-tensors form.
vLLM reads the folder as it is. moec reads it with `moec build --checkpoint`, and proves what it
builds from it:

    moec build --checkpoint . --target onnx --out build/model

{PROOF}
Not run yet: `moec validate . --against vllm`.
"""


def add_proof(folder: Path, ran: str, passed: bool, rows: Iterable[tuple[str, ...]]) -> None:
    """Write the result of a proof into the card of `folder`, in place of an earlier one.

    A card that moec did not write stays as it is, and so do other sections.

    Args:
        folder: the checkpoint.
        ran: what was compared with what.
        passed: the verdict.
        rows: name, figure, limit and detail of each check.

    Raises:
        OSError: the card cannot be written.
    """
    card = read_card(folder)
    if card is None or _MADE not in card.before:
        return
    table = "".join(f"| {' | '.join(_cell(each) for each in row)} |\n" for row in rows)
    verdict = "PASSED" if passed else "FAILED"
    head = f"{verdict}: {ran}.\n\n| check | found | limit | detail |\n|---|---|---|---|\n"
    write_proof(folder, card, f"\n{head}{table}")


def _cell(text: str) -> str:
    return visible(text).replace("|", "/")


#: what shows that a card is moec's
_MADE = "- made by: moec "
