"""Compare moec and vLLM on one GPU: the whole of Scout in FP8, in one table.

    python benchmarks/vllm_peer.py [--vllm-python PYTHON] [--out ARTEFACT]

Both run the whole text decoder, with 48 layers and 110 GB, which needs the memory of an H200. The
weights are random, so that no checkpoint is needed. All linear layers except routers and head are
FP8, with per-channel scales for weights and per-token scales for inputs. `h200.py` measures moec
and `vllm_decoder.py` measures vLLM. They run one after another in their own processes, because each
takes all of the GPU's memory. A step of moec is a decode step and the choice of its token. A step
of vLLM is a step of its `generate`, with its scheduler and sampler. A prefill is the best of three.

vLLM gets Scout without attention chunks. They change nothing up to 8,192 tokens, but with them vLLM
cannot capture whole steps as CUDA graphs.

vLLM needs its own packages. PYTHON may therefore be the interpreter of another environment, or a
command such as "env PYTHONPATH=/opt/vllm python3". The exit code is 3 without a GPU or vLLM.
"""

import argparse
import json
import shlex
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

from moe_kernels import need_gpu
from rich.box import SIMPLE
from rich.console import Console
from rich.table import Table

from moec.spec.errors import MoecError
from moec.spec.hf.config import write_config
from moec.spec.presets import PRESETS

COMMAND = "benchmarks/vllm_peer.py"
HERE = Path(__file__).parent
_FP8 = {"num_bits": 8, "type": "float", "symmetric": True}
#: as llm-compressor writes it: FP8 with per-channel and per-token scales, except the layers ignored
QUANTIZATION = {
    "quant_method": "compressed-tensors",
    "format": "float-quantized",
    "quantization_status": "compressed",
    "ignore": ["lm_head", "re:.*router", "re:.*embed_tokens"],
    "config_groups": {
        "group_0": {
            "targets": ["Linear"],
            "weights": {**_FP8, "strategy": "channel", "dynamic": False},
            "input_activations": {**_FP8, "strategy": "token", "dynamic": True},
        }
    },
}


def need_vllm(python: list[str]) -> None:
    """End with one message and exit code 3 if the command `python` has no vLLM."""
    look = "import importlib.util, sys; sys.exit(importlib.util.find_spec('vllm') is None)"
    try:
        missing = subprocess.run([*python, "-c", look], capture_output=True).returncode != 0
    except OSError:
        missing = True
    if missing:
        error = MoecError(
            f"package vllm: {COMMAND}",
            f"{shlex.join(python)}, which has no vLLM or does not start",
            "a Python with vLLM, which does not need moec",
            "pip install vllm in a new environment, then --vllm-python ENV/bin/python",
            exit_code=3,
        )
        print(f"error: {error}", file=sys.stderr)
        raise SystemExit(error.exit_code)


def vllm_config() -> dict[str, Any]:
    """The config.json of Scout's text decoder in FP8, without attention chunks."""
    spec = PRESETS["scout"].model_copy(update={"vision": None})
    return {
        **write_config(spec),
        "attention_chunk_size": None,
        "layer_types": ["full_attention"] * spec.text.layers,
        "max_position_embeddings": 131072,  # vLLM keeps a table of all positions
        "quantization_config": QUANTIZATION,
    }


def measured(command: list[str], file: Path) -> dict[str, Any]:
    """Run `command`, which writes JSON to `file`. If it fails, end with its exit code."""
    done = subprocess.run(command)
    if done.returncode:
        print(f"error: {shlex.join(command)}: exit code {done.returncode}", file=sys.stderr)
        raise SystemExit(done.returncode)
    found: dict[str, Any] = json.loads(file.read_text())
    return found


def print_table(ours: dict[str, Any], theirs: dict[str, Any]) -> None:
    """Print the rows that both have, in milliseconds."""
    table = Table(box=SIMPLE, padding=(0, 1, 0, 0))
    for column in ("ms", "limit", "moec", "vLLM", "vLLM / moec"):
        table.add_column(column, justify="left" if column == "ms" else "right")
    mine = {row["name"]: row for row in ours["rows"]}
    for peer in theirs["rows"]:
        own = mine[peer["name"]]
        times = (own["limit_us"], own["us"], peer["us"])
        ratio = f"{peer['us'] / own['us']:.2f}"
        table.add_row(peer["name"], *(f"{each / 1e3:.2f}" for each in times), ratio)
    Console(width=100).print(table)
    print(
        f"{ours['gpu']}; moec on torch {ours['torch']}; vLLM {theirs['vllm']} on torch "
        f"{theirs['torch']}\nlimit: the time to read what a decode step needs at the "
        f"{ours['copy_tb_s']:.2f} TB/s of a copy, or to compute a prefill at the "
        f"{ours['fp8_tflop_s']:.0f} TFLOP/s of an FP8 product"
    )


def main() -> None:
    arguments = argparse.ArgumentParser(description=__doc__)
    arguments.add_argument("--out", help="an artefact of Scout for target torch; built if left out")
    arguments.add_argument("--vllm-python", default=sys.executable, help="the Python that has vLLM")
    given = arguments.parse_args()
    python = shlex.split(given.vllm_python)
    need_gpu(COMMAND)
    need_vllm(python)
    with tempfile.TemporaryDirectory() as folder:
        at = Path(folder)
        (at / "config.json").write_text(json.dumps(vllm_config(), indent=1))
        artefact = ["--out", given.out] if given.out else []
        ours = measured(
            [sys.executable, str(HERE / "h200.py"), "--parts", "model", *artefact,
             "--json", str(at / "moec.json")],
            at / "moec.json",
        )  # fmt: skip
        theirs = measured(
            [*python, str(HERE / "vllm_decoder.py"), folder, str(at / "vllm.json")],
            at / "vllm.json",
        )
    print_table(ours, theirs)


if __name__ == "__main__":
    main()
