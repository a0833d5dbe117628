"""W4A16 checkpoints, quantised, packed and unpacked by compressed-tensors' own code.

`make` stores experts one by one, as quantisers leave them. `plain` is the model that the library
says this checkpoint is: its dequantised weights in the released layout, for transformers.
"""

import json
import re
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from compressed_tensors.compressors.pack_quantized import PackedQuantizationCompressor
from compressed_tensors.quantization import QuantizationArgs, QuantizationConfig, QuantizationScheme
from compressed_tensors.quantization.utils import calculate_qparams
from safetensors.torch import load_file, save_file
from torch import Tensor

#: what quantisers leave alone
IGNORED = ("re:.*lm_head", "re:.*router", "re:vision_model.*", "re:multi_modal_projector.*")
_PARTS = {"gate_up_proj": ("gate_proj", "up_proj"), "down_proj": ("down_proj",)}


def make(
    source: Path,
    out: Path,
    plain: Path | None = None,
    *,
    group: int | None = 32,
    symmetric: bool = True,
    dtype: torch.dtype = torch.bfloat16,
    kept: tuple[str, ...] = (),
    rounded: bool = True,
) -> dict[str, Tensor]:
    """Quantise the wide checkpoint `source` to `out`, and write what it means to `plain`.

    `group` inputs share a scale of `dtype`; None: all inputs of an output do. Keys that an
    expression of `kept` finds stay as they are. Without `rounded`, the library multiplies in
    float32, and does not round to the type of the scales. Returns the meaning of each tensor.
    """
    strategy = "group" if group else "channel"
    args = QuantizationArgs(
        num_bits=4, type="int", strategy=strategy, group_size=group, symmetric=symmetric
    )
    scheme = QuantizationScheme(targets=["Linear"], weights=args)
    tensors = {k: t for f in source.glob("model*.safetensors") for k, t in load_file(f).items()}
    packed, means = dict[str, Tensor](), dict[str, Tensor]()
    for key, tensor in _linear(tensors):
        if _quantises(key, tensor) and not any(re.search(each, key) for each in kept):
            state = _compressed(tensor.to(dtype), scheme)
            given = state if rounded else {**state, "weight_scale": state["weight_scale"].float()}
            means[key] = PackedQuantizationCompressor.decompress(given, scheme)["weight"]
            packed |= {key.removesuffix("weight") + name: each for name, each in state.items()}
        else:
            packed[key] = means[key] = tensor
    ignore = [*IGNORED, *(f"re:.*{each}.*" for each in kept)]
    found = QuantizationConfig(config_groups={"group_0": scheme}, ignore=ignore).model_dump()
    found |= {"quant_method": "compressed-tensors", "format": "pack-quantized"}
    _write(source, out, packed, {"quantization_config": json.loads(json.dumps(found, default=str))})
    if plain:
        _write(source, plain, _fused(means), {})
    return means


def _quantises(key: str, tensor: Tensor) -> bool:
    other = ("embed_tokens", "lm_head", "router", "vision_model", "multi_modal_projector")
    return tensor.dim() == 2 and not any(each in key for each in other)


def _compressed(weight: Tensor, scheme: QuantizationScheme) -> dict[str, Tensor]:
    size = scheme.weights.group_size or weight.shape[1]
    groups = weight.unflatten(1, (-1, size))
    scale, zero = calculate_qparams(groups.amin(2), groups.amax(2), scheme.weights)
    state = {"weight": weight, "weight_scale": scale, "weight_zero_point": zero.to(torch.int8)}
    return dict(PackedQuantizationCompressor.compress(state, scheme))


def _linear(tensors: dict[str, Tensor]) -> Iterator[tuple[str, Tensor]]:
    """The tensors with the experts one by one, [out, in]."""
    for key, tensor in sorted(tensors.items()):
        stem, _, last = key.rpartition(".")
        if last not in _PARTS:
            yield key, tensor
            continue
        for expert, each in enumerate(tensor):
            for part, matrix in zip(_PARTS[last], each.t().chunk(len(_PARTS[last])), strict=True):
                yield f"{stem}.{expert}.{part}.weight", matrix.contiguous()


def _fused(means: dict[str, Tensor]) -> dict[str, Tensor]:
    """The inverse of `_linear`, in float32, which holds all values exactly."""
    found = {key: tensor.float() for key, tensor in means.items()}
    layers = sorted({key.partition(".experts.")[0] for key in found if ".experts." in key})
    for at in layers:
        count = sum(f"{at}.experts.{e}.down_proj.weight" in found for e in range(999))
        gate, up, down = (
            torch.stack([found.pop(f"{at}.experts.{e}.{p}_proj.weight").t() for e in range(count)])
            for p in ("gate", "up", "down")
        )
        found[f"{at}.experts.gate_up_proj"] = torch.cat([gate, up], -1)
        found[f"{at}.experts.down_proj"] = down
    return found


def _write(source: Path, out: Path, tensors: dict[str, Tensor], more: dict[str, Any]) -> None:
    out.mkdir(parents=True, exist_ok=True)
    save_file(
        {key: each.contiguous() for key, each in tensors.items()},
        out / "model.safetensors",
        metadata={"format": "pt"},
    )
    for name in ("generation_config.json", "tokenizer.json", "tokenizer_config.json"):
        if (source / name).exists():
            shutil.copy(source / name, out)
    config = json.loads((source / "config.json").read_text())
    (out / "config.json").write_text(json.dumps({**config, **more}, indent=1))
