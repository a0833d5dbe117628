"""Measure the quality that each FP8 scheme costs, on the trained examples/tiny-scout.

    python benchmarks/fp8_schemes.py [--target onnx|ort|tensorrt]

The script runs the 16 held-out sequences and compares with the float32 graph on the bf16 weights.
It prints perplexity, KL divergence, the share of positions with another likeliest token, and the
share of router choices that differ. Static scales are calibrated on other tokens. `eager` is the
perplexity of the same FP8 graph in eager mode. Target tensorrt runs its ONNX in ONNX's reference
interpreter, with the schemes that it supports.
"""

import argparse
import tempfile
from pathlib import Path

import torch
from rich.box import SIMPLE
from rich.console import Console
from rich.table import Table
from safetensors.torch import load_file
from torch.nn import functional

import moec
from moec.artefact.engine_options import EngineOptions
from moec.runtime.proof.cost import cost
from moec.spec.files import load_scheme
from moec.spec.scheme import ATTENTION, SCHEMES, Scheme

TINY = Path(__file__).parents[1] / "examples" / "tiny-scout"
#: schemes that quantise attention only, or all but attention
PARTS = {
    "dynamic, attention only": [{"of": ATTENTION, "weight": "channel", "inputs": "token"}],
    "dynamic, all but attention": [
        {
            "of": [p for p in SCHEMES["dynamic"].rules[0].of if p not in ATTENTION],
            "weight": "channel",
            "inputs": "token",
        }
    ],
}


def main() -> None:
    arguments = argparse.ArgumentParser(description=__doc__)
    arguments.add_argument("--target", default="onnx")
    target = arguments.parse_args().target
    golden = load_file(TINY / "golden.safetensors")
    windows = golden["eval_ids"].long()
    scales = moec.calibrate(TINY, golden["input_ids"].long())
    cases: list[tuple[str, str | Scheme, str | None]] = [(n, n, None) for n in SCHEMES]
    parts: list[tuple[str, str | Scheme, str | None]] = [
        (name, Scheme.model_validate({"name": "part", "rules": rules}), None)
        for name, rules in PARTS.items()
    ]
    if target == "tensorrt":
        cases = [(n, n, "wide") for n in ("static", "mixed", "modelopt")]
    elif target == "ort":
        cases = [(n, n, "wide") for n in SCHEMES] + parts
    else:
        cases += [("modelopt, caches not FP8", "modelopt", "wide"), *parts]
    options = EngineOptions(context=520, build=False) if target == "tensorrt" else None
    table = Table(box=SIMPLE, padding=(0, 1, 0, 0))
    columns = ("scheme", "perplexity", "change", "eager", "KL", "another choice", "router flips")
    for column in columns:
        table.add_column(column, justify="left" if column == "scheme" else "right")
    for name, scheme, cache in cases:
        with tempfile.TemporaryDirectory() as folder:
            static = load_scheme(scheme).static
            art = moec.export(
                TINY, target, "fp8", Path(folder) / "art", scheme=scheme,
                scales=scales if static else None, cache=cache, options=options,
            )  # fmt: skip
            found = cost(art, "bf16", windows)
            eager = moec.open_session(art.path, engine="eager").logits(windows[:, :-1])
        nll = functional.cross_entropy(torch.as_tensor(eager).transpose(1, 2), windows[:, 1:])
        change = 100 * (found.perplexity / found.reference_perplexity - 1)
        table.add_row(
            name, f"{found.perplexity:.3f}", f"{change:+.2f} %", f"{nll.exp().item():.3f}",
            f"{found.kl:.3f}", f"{100 * (1 - found.same_choice):.1f} %",
            f"{100 * found.router_flips:.2f} %",
        )  # fmt: skip
    Console(width=110).print(table)


if __name__ == "__main__":
    main()
