"""Measure the lowering rules of the `ort` dialects: one model, lowered in all ways considered.

    python benchmarks/ort_rules.py [--model scout|olmoe] [--rounds 4] [--json FILE]

The model is random and seeded, in float32: one like Scout with 0.43 B parameters (4 layers of width
1024, 16 experts of width 2048), or one like OLMoE with 0.44 B (4 layers of width 1024, 64 experts
of width 512, 8 a token), for which only the ways of many experts take part. Each way of lowering
gives its own artefact, which is proven before it is timed. The artefacts take turns.
"""

import argparse
import json
import tempfile
from functools import partial
from pathlib import Path
from typing import Any

from fresh_process import call
from presets import model
from rich.box import SIMPLE
from rich.console import Console
from rich.table import Table

import moec
from moec.cli.tables import size
from moec.exporters.onnx import write
from moec.exporters.onnx.experts.branches import guarded, lower_branches, lower_separate, tree
from moec.exporters.onnx.experts.loop import lower_moe
from moec.exporters.onnx.lowering import Rule
from moec.exporters.onnx.ort import ORT
from moec.exporters.onnx.write import DIALECTS, GENAI, Dialect
from moec.graph_builder import ops
from moec.graph_builder.passes.buffers import keep_buffers
from moec.graph_builder.passes.genai import genai_inputs
from moec.runtime.bench.bench import Lane, race
from moec.spec.model import ModelSpec
from moec.spec.presets import PRESETS
from moec.weights.random import write_random_checkpoint

#: for each way: target, precision, placement, a replacement for the `ort` dialect, session options
WAYS: dict[str, tuple[str, str, str | None, Dialect | None, tuple[str, ...]]] = {
    "standard: Attention, caches returned": ("onnx", "fp32", None, None, ("lean",)),
    "experts: loop, weights gathered": (
        "ort", "fp32", None,
        Dialect((Rule(ops.moe, lower_moe), *ORT), DIALECTS["ort"].passes), ("lean",),
    ),
    "experts: an If each": (
        "ort", "fp32", None,
        Dialect(
            (Rule(ops.moe, partial(lower_branches, write=guarded)), *ORT), DIALECTS["ort"].passes
        ),
        ("lean", "fast"),
    ),
    "experts: loop, tree of Ifs": (
        "ort", "fp32", None,
        Dialect(
            (Rule(ops.moe, partial(lower_branches, write=tree)), *ORT), DIALECTS["ort"].passes
        ),
        ("lean", "fast"),
    ),
    "experts: an If each, norms not joined": (
        "ort", "fp32", None,
        Dialect(ORT, {"model": (keep_buffers,), GENAI: (keep_buffers, genai_inputs)}), ("lean",),
    ),
    "packed: MoE": ("ort", "fp32", "pack", None, ("lean", "fast")),
    "int8: QMoE, MatMulNBits": ("ort", "int8", None, None, ("lean", "exact")),
    "int4: QMoE, MatMulNBits": ("ort", "int4", None, None, ("lean", "exact")),
}  # fmt: skip

#: the same for many experts that have tensors of their own
MANY_WAYS: dict[str, tuple[str, str, str | None, Dialect | None, tuple[str, ...]]] = {
    name: (
        "ort", "fp32", None,
        Dialect(
            (Rule(ops.separate_moe, partial(lower_separate, write=write_)), *ORT),
            DIALECTS["ort"].passes,
        ),
        ("lean", "fast"),
    )
    for name, write_ in (("experts: an If each", guarded), ("experts: loop, tree of Ifs", tree))
} | {
    "experts: rows sorted, no branches": ("ort", "fp32", None, None, ("lean", "fast")),
    "packed: MoE": WAYS["packed: MoE"],
}  # fmt: skip


def many() -> ModelSpec:
    """A model like OLMoE, with 4 layers of width 1024 and 64 experts of width 512."""
    olmoe = PRESETS["olmoe-1b-7b"]
    assert olmoe.text.experts is not None
    experts = olmoe.text.experts.model_copy(update={"hidden": 512})
    sizes = {"layers": 4, "dim": 1024, "heads": 16, "kv_heads": 16, "head_dim": 64, "vocab": 8192}
    text = olmoe.text.model_copy(update={**sizes, "experts": experts})
    return olmoe.model_copy(update={"name": "random-0.5b", "provenance": "custom", "text": text})


MODELS = {"scout": (model, WAYS), "olmoe": (many, MANY_WAYS)}


def build(weights: Path, out: Path, name: str, way: str) -> str:
    """Build an artefact in one way; return whether its proof passed."""
    target, precision, placement, dialect, _ = MODELS[name][1][way]
    if dialect:
        write.DIALECTS["ort"] = dialect
    moec.export(weights, target=target, precision=precision, weights=placement, out=out)
    report = moec.validate(out, tokens=24)
    return "passed" if report.passed else f"FAILED at {report.first_divergence}"


def main() -> None:
    arguments = argparse.ArgumentParser(description=__doc__)
    arguments.add_argument("--model", choices=MODELS, default="scout")
    arguments.add_argument("--rounds", type=int, default=4)
    arguments.add_argument("--json", type=Path)
    options = arguments.parse_args()
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        make, choices = MODELS[options.model]
        spec = make().model_copy(update={"dtype": "fp32"})
        call(write_random_checkpoint, spec, folder / "weights")
        lanes, ways, proofs = [], [], {}
        for i, (way, (*_, presets)) in enumerate(choices.items()):
            outcome = call(build, folder / "weights", folder / str(i), options.model, way)
            proofs[way] = outcome.value or outcome.error
            lanes += [Lane(str(folder / str(i)), "onnxruntime", preset) for preset in presets]
            ways += [way] * len(presets)
        rows = race(lanes, 1, 256, 16, options.rounds)
    table = Table(box=SIMPLE, padding=(0, 1, 0, 0))
    texts = ("way", "session options", "proof")
    for column in (*texts, "opens in", "decode", "prefill of 256", "own memory"):
        table.add_column(column, justify="left" if column in texts else "right")
    found: list[dict[str, Any]] = []
    for way, row in zip(ways, rows, strict=True):
        table.add_row(
            way, row.preset, proofs[way], f"{row.open_s:.2f} s",
            f"{1e3 / row.decode_tokens_per_s:.1f} ms", f"{1e3 * row.first_token_s:.0f} ms",
            size(row.anonymous_bytes),
        )  # fmt: skip
        found.append({"way": way, "proof": proofs[way], **row.to_dict()})
    Console(width=120).print(table)
    if options.json:
        options.json.write_text(json.dumps(found, indent=1))


if __name__ == "__main__":
    main()
