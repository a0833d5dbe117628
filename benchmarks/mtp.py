"""What drafts by multi-token prediction give on a CPU: how many are right, and what one costs.

    python benchmarks/mtp.py [--layers 9] [--rounds 15]

First the trained model of tests/trained: its drafts in a greedy generation after held-out prompts,
without and with drafts, in calls of the decoder and in time. Then a random model like DeepSeek-V3
of 1.0 B parameters, in float32, int8 and int4: a decode step of one token, one of two tokens, and
a call of the layer with two tokens, which take turns. A random model's drafts are wrong. So the
table gives the share of right drafts from which they pay, and what 85 % would give, as DeepSeek
reports (https://arxiv.org/abs/2412.19437, 5.4.3).
"""

import argparse
import statistics
import tempfile
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from rich.box import SIMPLE
from rich.console import Console
from rich.table import Table
from safetensors.torch import load_file

import moec
from moec.runtime.session import Session
from moec.spec import names
from moec.spec.model import ModelSpec, Tokens
from moec.spec.parameters import counts
from moec.spec.presets import PRESETS
from moec.weights.random import write_random_checkpoint

ROOT = Path(__file__).parents[1]
TRAINED = ROOT / "tests/trained/tiny-deepseek-v3"
PROMPT, NEW, RIGHT = 256, 64, 0.85
SIZES = {"dim": 1024, "heads": 8, "kv_heads": 8, "vocab": 32000, "dense_hidden": 4096}


def like_deepseek(layers: int) -> ModelSpec:
    """A random model of `layers` layers, the first of which is dense, and its further layer."""
    row = PRESETS["deepseek-v3"]
    assert row.text.experts is not None and row.text.latent is not None
    text = row.text.model_copy(
        update={
            **SIZES,
            "layers": layers,
            "ffn": "D" + "M" * (layers - 1),
            "mtp": "built",
            "latent": row.text.latent.model_copy(update={"q_rank": 384, "kv_rank": 256}),
            "experts": row.text.experts.model_copy(
                update={"count": 64, "hidden": 512, "shared_hidden": 512}
            ),
        }
    )
    changed = {"text": text, "dtype": "fp32", "tokens": Tokens(bos=0, eos=(1,), pad=2)}
    return row.model_copy(update=changed)


def trained(folder: Path) -> Table:
    """Drafts of the trained model after 16 prompts that were held out."""
    windows = load_file(ROOT / "examples/tiny-scout/golden.safetensors")["eval_ids"].long()
    session = moec.open_session(moec.export(TRAINED, "ort", out=folder / "trained", mtp=True).path)
    calls = list[int]()

    def run(feeds: Any) -> Any:
        calls.append(1)
        return session.run(feeds)

    counted = replace(session, run=run)
    table = Table("", "calls of the decoder for a token", "us for a token", box=SIMPLE)
    for mtp in (False, True):
        calls.clear()
        began = time.perf_counter()
        for window in windows:
            counted.generate(
                window[None, :PROMPT], max_new_tokens=NEW, temperature=0.0, stop=(), mtp=mtp
            )
        made = NEW * len(windows)
        times = len(calls) / made, 1e6 * (time.perf_counter() - began) / made
        table.add_row("with drafts" if mtp else "without", *(f"{x:.2f}" for x in times))
    share = made / len(calls) - 1
    table.caption = f"{100 * share:.0f} % of drafts were right; prompts of {PROMPT} tokens included"
    return table


def timed(session: Session, rounds: int) -> tuple[float, float, float]:
    """Milliseconds of a step of one token, of one of two tokens, and of the layer, after 256."""
    assert session.mtp is not None
    layer, one = session.mtp(), torch.ones(1, dtype=torch.int64)
    ids = torch.randint(0, session.spec.text.vocab, (1, PROMPT))
    two = 2 * one
    cache, own = (each.new_cache(1, 2 * PROMPT) for each in (session, layer))
    ((_, _, out),) = session.walk(ids, PROMPT * one, cache, every=False)
    before = out[names.HIDDEN]
    list(layer.walk(ids, PROMPT * one, own, every=False, hidden=before))
    hidden = before[:, -2:]

    def step(width: int) -> None:
        list(session.walk(_tokens(session, width), width * one, cache))
        cache.lengths = PROMPT * one

    def draft() -> None:
        """What follows a right draft: the layer gets both tokens of the step."""
        list(layer.walk(_tokens(session, 2), two, own, every=False, hidden=hidden))
        own.lengths = PROMPT * one

    kinds: list[Callable[[], None]] = [lambda: step(1), lambda: step(2), draft]
    found: list[list[float]] = [[], [], []]
    for _ in range(rounds + 2):
        for times, kind in zip(found, kinds, strict=True):
            began = time.perf_counter()
            kind()
            times.append(1e3 * (time.perf_counter() - began))
    first, second, third = (statistics.median(times[2:]) for times in found)
    return first, second, third


def _tokens(session: Session, count: int) -> torch.Tensor:
    """New tokens each time, which choose new experts."""
    return torch.randint(0, session.spec.text.vocab, (1, count))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--layers", type=int, default=9)
    parser.add_argument("--rounds", type=int, default=15)
    given = parser.parse_args()
    console = Console(width=120)
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        console.print(trained(folder))
        spec = like_deepseek(given.layers)
        write_random_checkpoint(spec, folder / "weights", seed=0)
        table = Table(
            *("precision", "1 token, ms", "2 tokens, ms", "layer, ms", "drafts pay from"),
            f"at {100 * RIGHT:.0f} % right",
            box=SIMPLE,
            title=f"like DeepSeek-V3, {counts(spec)['total'] / 1e9:.2f} B parameters, target ort, "
            f"{torch.get_num_threads()} threads",
        )
        for precision in ("fp32", "int8", "int4"):
            art = moec.export(folder / "weights", "ort", precision, folder / precision, mtp=True)
            one, two, layer = timed(moec.open_session(art.path), given.rounds)
            pays, gain = (two + layer) / one - 1, one * (1 + RIGHT) / (two + layer)
            times = (f"{x:.2f}" for x in (one, two, layer))
            table.add_row(precision, *times, f"{100 * pays:.0f} %", f"{gain:.2f}x")
    console.print(table)


if __name__ == "__main__":
    main()
