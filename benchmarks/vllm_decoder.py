"""Time decode and prefill in vLLM on the GPUs of one host; this needs no moec.

    python benchmarks/vllm_decoder.py MODEL_FOLDER FILE [--gpus 1]

MODEL_FOLDER holds a config.json; the weights are random. The script writes the times to FILE as
JSON, under the row names of `h200.py`. vLLM runs with its usual settings: compiled, with CUDA
graphs for these batches, and with its engine in its own process. Prefix caching is off, because
every prompt is to be computed.
"""

import argparse
import json
import statistics
import time
from pathlib import Path

import torch
import vllm
import vllm_weights

BATCHES, CONTEXT, PREFILL = (1, 8, 64), 1024, 8192
#: tokens that a request generates; the time of a step comes from the difference of two requests
SHORT, LONG = 16, 128
REPEATS = 3


class Model:
    """vLLM's engine on random weights, and requests of random tokens."""

    def __init__(self, folder: Path, gpus: int) -> None:
        self.vocab = json.loads((folder / "config.json").read_text())["vocab_size"]
        self.generator = torch.Generator().manual_seed(1)
        self.engine = vllm.LLM(
            model=str(folder),
            load_format=vllm_weights.LOAD_FORMAT,
            worker_extension_cls=f"{vllm_weights.__name__}.{vllm_weights.WorkerExtension.__name__}",
            skip_tokenizer_init=True,
            generation_config="vllm",
            dtype="bfloat16",
            tensor_parallel_size=gpus,
            max_model_len=PREFILL + LONG,
            max_num_batched_tokens=PREFILL,
            max_num_seqs=max(BATCHES),
            gpu_memory_utilization=0.95,
            enable_prefix_caching=False,
            compilation_config={"cudagraph_capture_sizes": list(BATCHES)},
        )

    def generate_us(self, batch: int, context: int, count: int) -> float:
        """Microseconds of `batch` requests of `context` tokens, which generate `count` tokens."""
        ids = torch.randint(0, self.vocab, (batch, context), generator=self.generator)
        sampling = vllm.SamplingParams(
            temperature=0.0, max_tokens=count, ignore_eos=True, detokenize=False
        )
        start = time.perf_counter()
        found = self.engine.generate(
            [{"prompt_token_ids": row} for row in ids.tolist()], sampling, use_tqdm=False
        )
        took = 1e6 * (time.perf_counter() - start)
        tokens = [token for each in found for token in each.outputs[0].token_ids]
        if len(tokens) != batch * count or (count > SHORT and len(set(tokens)) == 1):
            raise SystemExit(f"vLLM generated {len(tokens)} tokens, {len(set(tokens))} different")
        return took

    def step_us(self, batch: int) -> float:
        """Microseconds of a decode step of `batch` sequences, from LONG and SHORT requests."""
        self.generate_us(batch, CONTEXT, SHORT)
        times = []
        for _ in range(REPEATS):
            short, long = (self.generate_us(batch, CONTEXT, count) for count in (SHORT, LONG))
            times.append((long - short) / (LONG - SHORT))
        return statistics.median(times)

    def prefill_us(self) -> float:
        """Microseconds of a prompt of PREFILL tokens and the choice of one token."""
        self.generate_us(1, PREFILL, 1)
        return min(self.generate_us(1, PREFILL, 1) for _ in range(REPEATS))


def main() -> None:
    arguments = argparse.ArgumentParser(description=__doc__)
    arguments.add_argument("folder", type=Path)
    arguments.add_argument("file", type=Path)
    arguments.add_argument("--gpus", type=int, default=1)
    given = arguments.parse_args()
    model = Model(given.folder, given.gpus)
    times = {f"Scout: decode, batch {batch}, 1k": model.step_us(batch) for batch in BATCHES}
    times[f"Scout: prefill, {PREFILL} tokens"] = model.prefill_us()
    run = {"vllm": vllm.__version__, "torch": torch.__version__}
    rows = [{"name": name, "us": took} for name, took in times.items()]
    given.file.write_text(json.dumps({**run, "rows": rows}, indent=1))


if __name__ == "__main__":
    main()
