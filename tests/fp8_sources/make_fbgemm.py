"""An FP8 checkpoint in the FBGEMM layout, quantised and written by transformers itself.

    python make_fbgemm.py CHECKPOINT OUT_FOLDER

Every Linear and expert matrix of the text model but the router and lm_head has one float32 scale
per output channel: Linears `.weight` [out, in] and `.weight_scale` [out, 1]; the fused
`experts.gate_up_proj` [E, D, 2F] and `gate_up_proj_scale` [E, 1, 2F]; `experts.down_proj`
[E, F, D] and `down_proj_scale` [E, D, 1], which does not broadcast against its matrix.
Activations have one scale per token, taken at run time from the largest magnitude or, where that
is smaller, `activation_scale_ub`.

FBGEMM's two kernels exist on GPUs only; here stand-ins take their place, written from what the
kernels are documented to do. Names, layouts, shapes, config and the order of quantisation in the
forward pass are transformers' own.

OUT_FOLDER/library.safetensors holds what that code says that the checkpoint means, in float32:

- `input_ids`
- `dequantized.NAME` for a few weights
- `logits_weights`: transformers' unquantised model on dequantised weights
- `logits`: with every quantised input rounded to FP8 too, each token by its own scale
- `probe.NAME.input` and `.output`: what one module by itself makes of random rows, some of them
  beyond `activation_scale_ub`

The experts' input, the hidden state times the sigmoid of the router logit, is rounded after that
product, expert by expert, and so is up * silu(gate).

Written for transformers 5.23.0 (which needs accelerate for this), torch 2.13.0 on a CPU.
"""

import shutil
import sys
from pathlib import Path

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor
from transformers import FbgemmFp8Config, Llama4ForConditionalGeneration
from transformers.quantizers.quantizer_fbgemm_fp8 import FbgemmFp8HfQuantizer

F8 = torch.float8_e4m3fn
KEPT = ["vision_model", "multi_modal_projector", "language_model.lm_head", "router"]
AT = "language_model.model.layers"
SHOWN = (
    *(f"{AT}.{i}.feed_forward.experts.{kind}_proj" for i in (0, 5) for kind in ("gate_up", "down")),
    f"{AT}.0.self_attn.q_proj.weight",
    f"{AT}.5.feed_forward.shared_expert.down_proj.weight",
)
PROBED = {  # module: (rows, width) of its random input
    f"{AT}.0.self_attn.q_proj": (16, 128),
    f"{AT}.5.feed_forward.shared_expert.down_proj": (16, 64),
    f"{AT}.0.feed_forward.experts": (16 * 4, 128),
    f"{AT}.5.feed_forward.experts": (16 * 4, 128),
}


def quantize_fp8_per_row(
    x: Tensor, bs: Tensor | None = None, scale_ub: Tensor | None = None
) -> tuple[Tensor, Tensor]:
    """Rows of `x` in FP8, each over a scale that makes its largest magnitude 448."""
    top = x.float().abs().amax(-1)
    top = top if scale_ub is None else torch.minimum(top, scale_ub)
    scale = (top / 448).clamp(min=1 / (448 * 512))
    return (x.float() / scale[..., None]).clamp(-448, 448).to(F8), scale


def f8f8bf16_rowwise(
    x: Tensor, weight: Tensor, x_scale: Tensor, weight_scale: Tensor, use_fast_accum: bool = True
) -> Tensor:
    """The product of quantised rows and a quantised [out, in] weight; here left in float32."""
    return (x.float() * x_scale[..., None]) @ (weight.float() * weight_scale.view(-1, 1)).T


def install_stand_ins() -> None:
    torch.library.define(
        "fbgemm::quantize_fp8_per_row",
        "(Tensor x, Tensor? bs=None, Tensor? scale_ub=None) -> (Tensor, Tensor)",
    )
    torch.library.define(
        "fbgemm::f8f8bf16_rowwise",
        "(Tensor x, Tensor weight, Tensor x_scale, Tensor weight_scale, "
        "bool use_fast_accum=True) -> Tensor",
    )
    for kernel in (quantize_fp8_per_row, f8f8bf16_rowwise):
        torch.library.impl(f"fbgemm::{kernel.__name__}", "CPU", kernel)
    FbgemmFp8HfQuantizer.validate_environment = lambda *args, **kwargs: None  # it wants a GPU


def dequantised(state: dict[str, Tensor]) -> dict[str, Tensor]:
    found = {}
    for name, value in state.items():
        if not name.endswith("_scale"):
            scale = state.get(f"{name}_scale", torch.ones(()))
            if name.endswith("experts.down_proj"):
                scale = scale.transpose(1, 2)  # [E, D, 1] as stored
            found[name] = value.float() * scale.float()
    return found


@torch.no_grad()
def make(checkpoint: Path, out: Path) -> None:
    if not hasattr(torch.ops.fbgemm, "quantize_fp8_per_row"):
        install_stand_ins()
    config = FbgemmFp8Config(modules_to_not_convert=KEPT)
    model = Llama4ForConditionalGeneration.from_pretrained(
        checkpoint, dtype=torch.bfloat16, quantization_config=config
    ).eval()
    model.save_pretrained(out, max_shard_size="4MB")
    for name in ("tokenizer.json", "tokenizer_config.json"):
        shutil.copy(checkpoint / name, out)

    golden = load_file(checkpoint / "golden.safetensors")
    weights = dequantised(model.state_dict())
    found = {f"dequantized.{name}": weights[name] for name in SHOWN}
    found["input_ids"] = ids = golden["input_ids"][:, 100:196].long()
    plain = Llama4ForConditionalGeneration.from_pretrained(checkpoint, dtype=torch.float32).eval()
    plain.load_state_dict(weights)
    found["logits_weights"] = plain(ids).logits

    for tensor in (*model.parameters(), *model.buffers()):
        if tensor.is_floating_point():  # FP8 ones too: their scales stay apart
            tensor.data = tensor.data.float()
    found["logits"] = model(ids).logits
    torch.manual_seed(0)
    for name, shape in PROBED.items():
        x = torch.randn(shape) * torch.logspace(-3, 3, shape[0])[torch.randperm(shape[0]), None]
        found[f"probe.{name}.input"] = x
        found[f"probe.{name}.output"] = model.get_submodule(name)(x)
    save_file({k: v.contiguous() for k, v in found.items()}, out / "library.safetensors")


if __name__ == "__main__":
    make(Path(sys.argv[1]), Path(sys.argv[2]))
