"""Run prompts in vLLM; `in_process.py` calls `run`."""

import os
from importlib.util import find_spec
from typing import Any

os.environ.setdefault("VLLM_NO_USAGE_STATS", "1")
os.environ.setdefault("HF_HUB_OFFLINE", "1")


def run(job: dict[str, Any]) -> dict[str, Any]:
    """Log-probabilities of the prompts' own tokens, and greedy continuations.

    The job has `folder`, `prompts` (lists of token ids) and `new_tokens`. Keys and values are bf16
    and steps run without CUDA graphs, so that nothing but the checkpoint decides.
    """
    if find_spec("vllm") is None:
        return {"missing": "no module named vllm"}
    try:
        import torch
        import vllm
    except ImportError as error:
        return {"missing": f"{type(error).__name__}: {error}"}
    if not torch.cuda.is_available():
        return {"missing": "no GPU that torch can use"}
    longest = max(map(len, job["prompts"])) + job["new_tokens"] + 1
    engine = vllm.LLM(
        model=job["folder"],
        dtype="bfloat16",
        max_model_len=longest,
        enforce_eager=True,
        skip_tokenizer_init=True,
        enable_prefix_caching=False,
        disable_log_stats=True,
        max_num_seqs=4,
        max_num_batched_tokens=2048,  # their logits take memory: 1.7 GB where words are 200,000
        seed=0,
        trust_remote_code=False,
    )
    sampling = vllm.SamplingParams(
        temperature=0.0,
        max_tokens=job["new_tokens"],
        ignore_eos=True,
        detokenize=False,
        prompt_logprobs=0,
    )
    prompts = [{"prompt_token_ids": ids} for ids in job["prompts"]]
    outputs = engine.generate(prompts, sampling, use_tqdm=False)
    logprobs, tokens = [], []
    for ids, output in zip(job["prompts"], outputs, strict=True):
        each = output.prompt_logprobs[1:]
        logprobs.append([row[token].logprob for token, row in zip(ids[1:], each, strict=True)])
        tokens.append(list(output.outputs[0].token_ids))
    return {"version": vllm.__version__, "logprobs": logprobs, "tokens": tokens}
