"""Measure the quality that each precision of target ort costs, on the trained examples/tiny-scout.

    python benchmarks/precisions.py [--device cpu|cuda]

The script prints the perplexity of the 16 held-out sequences, which is 13.3217 in float32; the
share of positions with the same likeliest token as in float32; and for the four greedy
continuations the number of tokens before the first difference.
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

TINY = Path(__file__).parents[1] / "examples" / "tiny-scout"
PERPLEXITY = 13.3217
PROMPTS = (10, 11, 8, 5)  # lengths in tokens of the prompts of the golden continuations
WAYS = {
    "cpu": (("fp32", None), ("fp32", "pack"), ("fp16", None), ("int8", None), ("int4", None)),
    "cuda": (("fp16", "pack"), ("bf16", None)),
}


def main() -> None:
    arguments = argparse.ArgumentParser(description=__doc__)
    arguments.add_argument("--device", default="cpu")
    device = arguments.parse_args().device
    golden = {k: t.long() if t.dtype == torch.int32 else t for k, t in
              load_file(TINY / "golden.safetensors").items()}  # fmt: skip
    windows = golden["eval_ids"]
    table = Table(box=SIMPLE, padding=(0, 1, 0, 0))
    for column in ("precision", "weights", "perplexity", "change", "same choice", "same greedy"):
        table.add_column(column, justify="right" if column != "precision" else "left")
    for precision, placement in WAYS[device]:
        with tempfile.TemporaryDirectory() as folder:
            out = Path(folder) / "art"
            art = moec.export(TINY, target="ort", precision=precision, weights=placement, out=out)
            session = moec.open_session(out, device)
            logits = session.logits(windows[:, :-1]).transpose(1, 2)
            found = functional.cross_entropy(logits, windows[:, 1:]).exp().item()
            choices = session.logits(golden["input_ids"]).argmax(-1) == golden["argmax"]
            same = []
            for index, prompt in enumerate(PROMPTS):
                expected = golden[f"generate.{index}"]
                got = session.generate(
                    expected[None, :prompt], max_new_tokens=len(expected) - prompt, stop=()
                )[0]
                equal = (got[prompt:] == expected[prompt:]).long()
                same.append(f"{int(equal.cumprod(0).sum())} of {len(equal)}")
            size = sum(shard.size for shard in art.manifest.weights.shards.values())
        table.add_row(
            precision, f"{size / 1e6:.1f} MB", f"{found:.3f}",
            f"{100 * (found / PERPLEXITY - 1):+.2f} %", f"{100 * choices.float().mean():.1f} %",
            ", ".join(same),
        )  # fmt: skip
    Console(width=110).print(table)


if __name__ == "__main__":
    main()
