"""Draw random weights for vLLM on the GPU, like those of `h200.py`. vLLM's processes import this.

vLLM's own load format "dummy" draws values from -0.001 to 0.001. FP8 rounds almost all of them to
zero. The router then chooses other experts than with real weights, and the GPU needs less power.
"""

import torch
from torch import Tensor, nn
from vllm.model_executor.model_loader import BaseModelLoader, register_model_loader

LOAD_FORMAT = "drawn"
LARGEST = 448.0  # of float8_e4m3fn


class WorkerExtension:
    """An empty class. vLLM imports it in each worker, which also registers the loader below."""


@register_model_loader(LOAD_FORMAT)
class RandomLoader(BaseModelLoader):
    """The load format `drawn` for vLLM."""

    def download_model(self, model_config: object) -> None:
        """Do nothing, because there is nothing to download."""

    def load_weights(self, model: nn.Module, model_config: object) -> None:
        """Draw every tensor, before vLLM converts it to the layout of its kernels."""
        with torch.no_grad():
            draw(model.state_dict())


def draw(state: dict[str, Tensor]) -> None:
    """Fill the tensors of `state` in place, with the distribution of `moec`'s synthetic weights.

    A matrix keeps the magnitude of its inputs, and router logits lie well apart. A float8 tensor
    [out, in] or [expert, out, in] has its scales in the tensor `NAME_scale`, one for each output.
    """
    in_fp8 = {name for name, each in state.items() if each.dtype == torch.float8_e4m3fn}
    scales = {f"{name}_scale" for name in in_fp8}
    for name, tensor in state.items():
        if name in in_fp8:
            matrices = tensor if tensor.dim() == 3 else tensor[None]
            scale = state[f"{name}_scale"].view(*matrices.shape[:2], 1)
            for values, each in zip(matrices, scale, strict=True):
                weights = torch.randn(values.shape, device=values.device)
                largest = weights.abs().amax(1, keepdim=True) / LARGEST
                values.copy_(weights.div_(largest))
                each.copy_(largest * values.shape[1] ** -0.5)
        elif name not in scales and tensor.is_floating_point() and tensor.numel() > 1:
            _draw_unquantised(name, tensor)


def _draw_unquantised(name: str, tensor: Tensor) -> None:
    if tensor.dim() == 1:
        noise = torch.randn(tensor.shape, device=tensor.device)
        tensor.copy_(0.1 * noise + ("norm" in name))
        return
    width = tensor.shape[-1]
    gain = width**0.5 if "embed" in name else 2.0 if "router" in name else 1.0
    for rows in tensor.flatten(0, -2).split(max(1, 2**27 // width)):  # by rows, to save memory
        rows.copy_(torch.randn(rows.shape, device=rows.device).mul_(gain * width**-0.5))
