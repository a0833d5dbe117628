"""An FP8 checkpoint in NVIDIA ModelOpt's layout, calibrated and exported by that library.

    python make_modelopt.py CHECKPOINT OUT_FOLDER

Every weight matrix, every Linear's input and every layer's keys and values have one static scale:
the Linears' `.weight`, `.weight_scale`, `.input_scale`; the fused `experts.gate_up_proj`
[E, in, out] and `experts.gate_up_proj_weight_scale`, one for all experts; `k_proj.k_scale`. The
scales are float32 without axes. The router, lm_head, embeddings and vision tower keep bf16.

OUT_FOLDER/library.safetensors holds what the library says that the checkpoint means, in float32:

- `input_ids`
- `dequantized.NAME` for a few weights
- `logits_weights`: transformers' own model on dequantised weights
- `logits`: with every quantised input rounded to FP8 too, saturating at 448 scales
- `logits_kv`: with keys (after RoPE and norm) and values rounded as well
- `probe.NAME.input` and `.output`: what one module by itself makes of random numbers

The experts' input, the hidden state times the sigmoid of the router logit, is rounded after that
product; one scale serves all experts of a layer, another one silu(gate) * up.

Written for nvidia-modelopt 0.47.0 (which needs accelerate and requests installed beside it),
transformers 5.23.0, torch 2.13.0 on a CPU.
"""

import copy
import shutil
import sys
from pathlib import Path

import modelopt.torch.quantization as mtq
import torch
from modelopt.torch.export import export_hf_checkpoint
from modelopt.torch.quantization.qtensor import FP8QTensor
from modelopt.torch.quantization.utils import update_quant_cfg_with_kv_cache_quant
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from transformers import Llama4ForConditionalGeneration

AT = "language_model.model.layers"
SHOWN = (
    *(f"{AT}.{i}.feed_forward.experts.{kind}_proj" for i in (0, 5) for kind in ("gate_up", "down")),
    f"{AT}.0.self_attn.q_proj.weight",
    f"{AT}.5.feed_forward.shared_expert.down_proj.weight",
)
PROBED = {  # module: (rows, width) of its random input
    f"{AT}.0.self_attn.q_proj": (8, 128),
    f"{AT}.5.feed_forward.shared_expert.down_proj": (8, 64),
    f"{AT}.0.feed_forward.experts": (16 * 4, 128),
    f"{AT}.5.feed_forward.experts": (16 * 4, 128),
}


def calibrated(checkpoint: Path, windows: Tensor) -> nn.Module:
    """The model in bf16 with FP8 quantisers whose ranges `windows` have set."""
    model = Llama4ForConditionalGeneration.from_pretrained(checkpoint, dtype=torch.bfloat16).eval()
    config = update_quant_cfg_with_kv_cache_quant(mtq.FP8_DEFAULT_CFG, mtq.FP8_KV_CFG["quant_cfg"])

    def run(model: nn.Module) -> None:
        for rows in windows.split(4):
            model(rows)

    return mtq.quantize(model, config, run)


def dequantised(folder: Path) -> dict[str, Tensor]:
    """The exported weights in float32, by the library's own quantised tensor."""
    state: dict[str, Tensor] = {}
    for file in sorted(folder.glob("model*.safetensors")):
        state |= load_file(file)
    found = {}
    for name, value in state.items():
        if value.dtype == torch.float8_e4m3fn:
            tensor = FP8QTensor(value.shape, torch.float32, value)
            scale = state[name + ("_scale" if name.endswith(".weight") else "_weight_scale")]
            found[name] = tensor.dequantize(torch.float32, scale=scale)
        elif not name.endswith("_scale"):
            found[name] = value.float()
    return found


@torch.no_grad()
def make(checkpoint: Path, out: Path) -> None:
    golden = load_file(checkpoint / "golden.safetensors")
    model = calibrated(checkpoint, golden["eval_ids"][:, :128].long())
    simulated = copy.deepcopy(model).float()  # the exporter takes the first one apart
    export_hf_checkpoint(model, export_dir=out, max_shard_size="4MB")
    for name in ("tokenizer.json", "tokenizer_config.json"):
        shutil.copy(checkpoint / name, out)

    weights = dequantised(out)
    ids = golden["input_ids"][:, 100:196].long()
    found = {"input_ids": ids} | {f"dequantized.{name}": weights[name] for name in SHOWN}
    plain = Llama4ForConditionalGeneration.from_pretrained(checkpoint, dtype=torch.float32).eval()
    plain.load_state_dict(weights)
    found["logits_weights"] = plain(ids).logits

    simulated.load_state_dict(weights, strict=False)  # the quantisers' ranges stay as they are
    mtq.disable_quantizer(simulated, "*weight_quantizer")
    found["logits_kv"] = simulated(ids).logits
    mtq.disable_quantizer(simulated, "*[kv]_bmm_quantizer")
    found["logits"] = simulated(ids).logits
    torch.manual_seed(0)
    for name, shape in PROBED.items():
        found[f"probe.{name}.input"] = x = 3 * torch.randn(shape)
        found[f"probe.{name}.output"] = simulated.get_submodule(name)(x)
    save_file({k: v.contiguous() for k, v in found.items()}, out / "library.safetensors")


if __name__ == "__main__":
    make(Path(sys.argv[1]), Path(sys.argv[2]))
