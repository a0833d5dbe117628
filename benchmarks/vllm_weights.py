"""Random weights for vLLM, drawn on the GPU like those of `h200.py`. vLLM's processes import this.

vLLM's own load format "dummy" draws from -0.001 to 0.001. FP8 rounds almost all of that to zero, so
that the router chooses other experts, and the GPU draws less power, than with real weights.
"""

import torch
from torch import Tensor, nn
from vllm.model_executor.model_loader import BaseModelLoader, register_model_loader

LOAD_FORMAT = "drawn"
LARGEST = 448.0  # of float8_e4m3fn


class WorkerExtension:
    """Has no methods: vLLM imports it in each worker, and with it the loader below."""


@register_model_loader(LOAD_FORMAT)
class RandomLoader(BaseModelLoader):
    """vLLM's load format `drawn`."""

    def download_model(self, model_config: object) -> None:
        """Nothing to download."""

    def load_weights(self, model: nn.Module, model_config: object) -> None:
        """Draw every tensor, before vLLM brings it into the layout of its kernels."""
        with torch.no_grad():
            draw(model.state_dict())


def draw(state: dict[str, Tensor]) -> None:
    """Fill the tensors of `state` in place, as `moec`'s synthetic weights are drawn.

    A matrix keeps the size of what it multiplies, and router logits lie well apart. A float8 tensor
    [out, in] or [expert, out, in] has its scales beside it: `NAME_scale`, one for each output.
    """
    narrow = {name for name, each in state.items() if each.dtype == torch.float8_e4m3fn}
    scales = {f"{name}_scale" for name in narrow}
    for name, tensor in state.items():
        if name in narrow:
            matrices = tensor if tensor.dim() == 3 else tensor[None]
            scale = state[f"{name}_scale"].view(*matrices.shape[:2], 1)
            for codes, each in zip(matrices, scale, strict=True):
                wide = torch.randn(codes.shape, device=codes.device)
                largest = wide.abs().amax(1, keepdim=True) / LARGEST
                codes.copy_(wide.div_(largest))
                each.copy_(largest * codes.shape[1] ** -0.5)
        elif name not in scales and tensor.is_floating_point() and tensor.numel() > 1:
            _draw_wide(name, tensor)


def _draw_wide(name: str, tensor: Tensor) -> None:
    if tensor.dim() == 1:
        noise = torch.randn(tensor.shape, device=tensor.device)
        tensor.copy_(0.1 * noise + ("norm" in name))
        return
    width = tensor.shape[-1]
    gain = width**0.5 if "embed" in name else 2.0 if "router" in name else 1.0
    for rows in tensor.flatten(0, -2).split(max(1, 2**27 // width)):  # in pieces, to save memory
        rows.copy_(torch.randn(rows.shape, device=rows.device).mul_(gain * width**-0.5))
