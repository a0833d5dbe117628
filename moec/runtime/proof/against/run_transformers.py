"""Run prompts in transformers; `in_process.py` calls `run`.

This imports nothing of moec but one file, by its path. Quantised weights are dequantised while they
are loaded, and everything is computed in float32 on the CPU.
"""

import json
import os
import runpy
from pathlib import Path
from typing import Any

os.environ.setdefault("HF_HUB_OFFLINE", "1")
#: layouts of the library compressed-tensors
_COMPRESSED = ("compressed-tensors", "pack-quantized")
#: for a torchvision that does not fit torch, which transformers imports
_OPERATORS = Path(__file__).parents[2] / "bench" / "torchvision_ops.py"


def run(job: dict[str, Any]) -> dict[str, Any]:
    """Log-probabilities of the prompts' own tokens, and greedy continuations.

    The job has `folder`, `prompts` (lists of token ids), `new_tokens`, `images` (whether the model
    has a vision tower) and `quantised`, the quantisation method of the checkpoint or "".
    """
    try:
        runpy.run_path(str(_OPERATORS))["declare_torchvision_ops"]()
        import torch
        import transformers

        if job["quantised"] in _COMPRESSED:
            import compressed_tensors  # noqa: F401
    except ImportError as error:
        return {"missing": f"{type(error).__name__}: {error}"}
    kind = json.loads((Path(job["folder"]) / "config.json").read_text())["model_type"]
    if kind not in transformers.CONFIG_MAPPING:
        return {"missing": f"no class in transformers for model_type {kind!r}"}
    name = "AutoModelForImageTextToText" if job["images"] else "AutoModelForCausalLM"
    options: dict[str, Any] = {}
    if job["quantised"] in _COMPRESSED:
        options["quantization_config"] = transformers.CompressedTensorsConfig(dequantize=True)
    if job["quantised"] == "fp8":
        options["quantization_config"] = transformers.FineGrainedFP8Config(dequantize=True)
    model, loaded = getattr(transformers, name).from_pretrained(
        job["folder"],
        dtype=torch.float32,
        output_loading_info=True,
        use_safetensors=True,
        trust_remote_code=False,
        attn_implementation="eager",  # whatever the config names, which may be code of the Hub
        return_dict=True,
        ignore_mismatched_sizes=True,  # its own error names no weight; ours does
        **options,
    )
    if wrong := loaded.get("mismatched_keys"):
        key, found, known = min(wrong)
        shapes = f"shape {list(found)}, where the class of transformers has {list(known)}"
        return {"failed": f"{key}: {shapes} (weights of a wrong shape: {len(wrong)})"}
    # It rounds no inputs, and so takes no static scales of them.
    odd = {
        kind: [key for key in sorted(loaded[kind]) if not key.endswith(".input_scale")][:3]
        for kind in ("missing_keys", "unexpected_keys")
    }
    if any(odd.values()):
        return {"failed": f"keys that it does not take, or misses: {odd}"}
    model.float().eval()  # transformers leaves what was not quantised in its stored type
    logprobs, tokens = [], []
    with torch.inference_mode():
        for ids in job["prompts"]:
            now, cache, new = torch.tensor([ids]), None, []
            for step in range(job["new_tokens"] + 1):
                out = model(input_ids=now, past_key_values=cache, use_cache=True)
                cache = out.past_key_values
                if step == 0:
                    likely = out.logits[0, :-1].log_softmax(-1)
                    logprobs.append(likely[range(len(ids) - 1), ids[1:]].tolist())
                if step < job["new_tokens"]:
                    new.append(int(out.logits[0, -1].argmax()))
                    now = torch.tensor([[new[-1]]])
            tokens.append(new)
    return {"version": transformers.__version__, "logprobs": logprobs, "tokens": tokens}
