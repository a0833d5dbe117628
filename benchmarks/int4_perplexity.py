"""Perplexity of W4A16 checkpoints of the trained fixture: target ort against the library's weights.

    python benchmarks/int4_perplexity.py [--windows 64] [--kinds 32,64,64-zeros]

compressed-tensors quantises the fixture, and says what its weights are: values rounded to the type
of the scales, bfloat16, or, where the scales are given in float32, values that are not rounded.
QMoE and MatMulNBits multiply in float32 and do not round either. Both figures are over the same
tokens: the 16 held-out windows of the fixture, then `--windows` of 512 tokens each from Python's
standard library, on which it was trained. "noise" is the standard error of the change, from windows
as samples: a change of its size is no finding.
"""

import argparse
import random
import sys
import sysconfig
import tempfile
from pathlib import Path

import torch
from rich.box import SIMPLE
from rich.console import Console
from rich.table import Table
from safetensors.torch import load_file
from tokenizers import Tokenizer
from torch import Tensor
from torch.nn import functional

import moec
from moec.runtime.bench.torchvision_ops import declare_torchvision_ops

ROOT = Path(__file__).parents[1]
TINY = ROOT / "examples" / "tiny-scout"
LENGTH = 513


def main() -> None:
    arguments = argparse.ArgumentParser(description=__doc__)
    arguments.add_argument("--windows", type=int, default=64)
    arguments.add_argument("--kinds", default="32,64,64-zeros")
    given = arguments.parse_args()
    declare_torchvision_ops()  # before compressed-tensors imports transformers
    sys.path.insert(0, str(ROOT))
    from tests.int4_checkpoints import make

    held_out = load_file(TINY / "golden.safetensors")["eval_ids"].long()
    texts = {"held out": held_out, "trained on": library_windows(given.windows)}
    table = Table(box=SIMPLE, padding=(0, 1, 0, 0))
    for column in ("", "tokens", "ort", "to rounded", "noise", "to unrounded", "noise"):
        table.add_column(column, justify="right" if column else "left")
    for kind in given.kinds.split(","):
        group, _, zeros = kind.partition("-")
        with tempfile.TemporaryDirectory() as scratch:
            folder = Path(scratch)
            for rounded in (True, False):
                make(
                    TINY, folder / "int4", folder / f"plain-{rounded}",
                    group=int(group), symmetric=not zeros, rounded=rounded,
                )  # fmt: skip
            art = moec.export(folder / "int4", "ort", out=folder / "art").path
            for name, windows in texts.items():
                ort = losses(art, windows)
                cells = [f"{kind} {name}", f"{windows[:, 1:].numel():,}", f"{ort.mean().exp():.4f}"]
                for rounded in (True, False):
                    change = ort - losses(folder / f"plain-{rounded}", windows)
                    noise = change.std() / len(change) ** 0.5
                    cells += [f"{100 * change.mean().expm1():+.4f} %", f"{100 * noise:.4f} %"]
                table.add_row(*cells)
                print(*cells, sep="\t", file=sys.stderr, flush=True)  # this takes minutes
    Console(width=110).print(table)


def losses(source: Path, windows: Tensor) -> Tensor:
    """The mean negative log likelihood of each window, in nats a token."""
    session = moec.open_session(source)
    found = []
    for some in windows.split(16):
        logits = torch.as_tensor(session.logits(some[:, :-1])).transpose(1, 2)
        loss = functional.cross_entropy(logits.double(), some[:, 1:], reduction="none")
        found.append(loss.mean(1))
    return torch.cat(found)


def library_windows(count: int) -> Tensor:
    """`count` windows of the standard library's files, [count, LENGTH], the same in each run."""
    tokenizer = Tokenizer.from_file(str(TINY / "tokenizer.json"))
    files = sorted(Path(sysconfig.get_path("stdlib")).glob("*.py"))
    chosen, rows = random.Random(0), list[list[int]]()
    while len(rows) < count:
        text = chosen.choice(files).read_text(encoding="utf-8", errors="replace")
        ids = tokenizer.encode(text).ids
        if len(ids) >= LENGTH:
            at = chosen.randrange(len(ids) - LENGTH + 1)
            rows.append(ids[at : at + LENGTH])
    return torch.tensor(rows)


if __name__ == "__main__":
    main()
