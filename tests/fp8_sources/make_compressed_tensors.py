"""An FP8 checkpoint in the compressed-tensors layout, quantised and packed by that library.

    python make_compressed_tensors.py CHECKPOINT OUT_FOLDER [meta | dynamic | attention]

`meta` quantises the routed experts alone, as Meta's Maverick FP8 does; `dynamic` quantises every
Linear of the text model but the router and lm_head, as the FP8-dynamic releases do. `attention`
leaves all experts wide, and writes them one by one all the same. Weights have
one scale per output channel, activations one per token, taken at run time. The experts are
written one by one: `experts.{e}.{gate,up,down}_proj.weight` [out, in] and `.weight_scale` [out, 1].

OUT_FOLDER/library.safetensors holds what the library says that the checkpoint means, in float32:

- `input_ids`
- `dequantized.NAME` for a few weights
- `logits_weights`: transformers' own fused model on dequantised weights
- `logits`: with every quantised Linear's input rounded to FP8 too, each token by its own scale
- `probe.NAME.input` and `.output`: what one Linear by itself makes of random rows

An expert's input is the token's hidden state times the sigmoid of its router logit, rounded after
that product; the input of its down projection is silu(gate) * up.

Written for compressed-tensors 0.20.0, transformers 5.23.0, torch 2.13.0 on a CPU.
"""

import shutil
import sys
from pathlib import Path

import torch
from compressed_tensors.compressors import ModelCompressor
from compressed_tensors.quantization import (
    QuantizationConfig,
    QuantizationScheme,
    apply_quantization_config,
    preset_name_to_scheme,
)
from compressed_tensors.quantization.utils import calculate_qparams
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from transformers import Llama4ForConditionalGeneration
from transformers.models.llama4.modeling_llama4 import Llama4TextExperts, Llama4TextMoe

NOT_TEXT = ["re:vision_model.*", "re:multi_modal_projector.*", "re:.*lm_head", "re:.*router"]
IGNORED = {
    "dynamic": NOT_TEXT,
    "meta": [*NOT_TEXT, "re:.*self_attn.*", "re:.*shared_expert.*"],
    "attention": [*NOT_TEXT, "re:.*expert.*"],
}
SHOWN = (
    *(f"layers.0.feed_forward.experts.0.{kind}_proj" for kind in ("gate", "up", "down")),
    *(f"layers.5.feed_forward.experts.7.{kind}_proj" for kind in ("gate", "up", "down")),
    *(f"layers.{i}.self_attn.{kind}_proj" for i, kind in ((0, "q"), (1, "k"), (4, "v"), (7, "o"))),
    "layers.5.feed_forward.shared_expert.down_proj",
)


class Expert(nn.Module):
    """One routed expert as three Linears, cut from the fused [in, out] matrices."""

    def __init__(self, gate_up: Tensor, down: Tensor) -> None:
        super().__init__()
        for name, matrix in zip(("gate", "up", "down"), (*gate_up.chunk(2, -1), down), strict=True):
            linear = nn.Linear(*matrix.shape, bias=False, device="meta")
            linear.weight = nn.Parameter(matrix.T.contiguous(), requires_grad=False)
            self.add_module(f"{name}_proj", linear)

    def forward(self, x: Tensor) -> Tensor:
        return self.down_proj(self.up_proj(x) * nn.functional.silu(self.gate_proj(x)))


class Experts(nn.ModuleList):
    """All experts of a layer; takes and gives what the fused module does."""

    def __init__(self, fused: Llama4TextExperts) -> None:
        super().__init__(map(Expert, fused.gate_up_proj.detach(), fused.down_proj.detach()))

    def forward(self, routed_in: Tensor) -> Tensor:
        rows = routed_in.chunk(len(self))
        # Three axes: of an input with two, the library takes one scale for all tokens together.
        return torch.cat([expert(x[None])[0] for expert, x in zip(self, rows, strict=True)])


def unfuse(model: nn.Module) -> None:
    for module in model.modules():
        if isinstance(module, Llama4TextMoe):
            module.experts = Experts(module.experts)
            module.shared_expert.register_forward_pre_hook(lambda _, args: (args[0][None],))
            module.shared_expert.register_forward_hook(lambda _, args, out: out[0])


def fused(state: dict[str, Tensor], layers: int, experts: int) -> dict[str, Tensor]:
    """The state of the linear model under transformers' names and in its layout."""
    state = {k: v for k, v in state.items() if not k.endswith(("_scale", "_zero_point"))}
    for layer in range(layers):
        at = f"language_model.model.layers.{layer}.feed_forward.experts"
        gate, up, down = (
            torch.stack([state.pop(f"{at}.{e}.{kind}_proj.weight").T for e in range(experts)])
            for kind in ("gate", "up", "down")
        )
        state[f"{at}.gate_up_proj"] = torch.cat([gate, up], -1)
        state[f"{at}.down_proj"] = down
    return state


@torch.no_grad()
def make(checkpoint: Path, out: Path, variant: str = "meta") -> None:
    model = Llama4ForConditionalGeneration.from_pretrained(checkpoint, dtype=torch.bfloat16).eval()
    unfuse(model)
    scheme: QuantizationScheme = preset_name_to_scheme("FP8_DYNAMIC", ["Linear"])
    config = QuantizationConfig(config_groups={"group_0": scheme}, ignore=IGNORED[variant])
    apply_quantization_config(model, config, show_progress=False)
    linears = {n: m for n, m in model.named_modules() if hasattr(m, "quantization_scheme")}
    for linear in linears.values():
        low, high = torch.aminmax(linear.weight, dim=-1, keepdim=True)
        linear.weight_scale.data, _ = calculate_qparams(low, high, scheme.weights)

    out.mkdir(parents=True, exist_ok=True)
    compressor = ModelCompressor.from_pretrained_model(model)
    compressor.compress_model(model)
    model.save_pretrained(out, max_shard_size="4MB")
    for name in ("config.json", "generation_config.json", "tokenizer.json"):
        shutil.copy(checkpoint / name, out)  # the config as released; the library adds its part
    shutil.copy(checkpoint / "tokenizer_config.json", out)
    compressor.update_config(str(out))

    model.float()  # F8 and scales to float32, where their product is exact; bf16 would round it
    compressor.decompress_model(model)
    plain = Llama4ForConditionalGeneration.from_pretrained(checkpoint, dtype=torch.float32).eval()
    text = plain.config.text_config
    plain.load_state_dict(fused(model.state_dict(), text.num_hidden_layers, text.num_local_experts))
    ids = load_file(checkpoint / "golden.safetensors")["input_ids"][:, 100:196].long()
    names = [f"language_model.model.{name}" for name in SHOWN]
    found = {f"dequantized.{n}.weight": linears[n].weight.data for n in names if n in linears}
    found |= {"input_ids": ids, "logits_weights": plain(ids).logits, "logits": model(ids).logits}
    torch.manual_seed(0)
    for name in filter(linears.__contains__, names):
        found[f"probe.{name}.input"] = x = torch.randn(8, linears[name].in_features)
        x *= torch.logspace(-3, 3, 8)[:, None]  # one row's scale is no use to another
        found[f"probe.{name}.output"] = linears[name](x[None])[0]
    save_file({k: v.contiguous() for k, v in found.items()}, out / "library.safetensors")


if __name__ == "__main__":
    make(Path(sys.argv[1]), Path(sys.argv[2]), *sys.argv[3:])
