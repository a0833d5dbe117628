"""The vision tower, its adapter and the projector."""

from typing import Self

from pydantic import Field, model_validator

from moec.spec.bounded import limits
from moec.spec.data import Frozen
from moec.spec.parts.sizes import Base, Depth, Heads, Width


class VisionSpec(Frozen):
    """The vision tower, its adapter and the projector into the decoder's width."""

    layers: Depth
    dim: Width
    heads: Heads
    hidden: Width = Field(description="width of each layer's GELU MLP")
    image: int = Field(gt=0, le=limits.TILE, description="pixels along one side of a tile")
    patch: int = Field(gt=0, le=limits.TILE, description="pixels along one side of a patch")
    channels: int = Field(gt=0, le=limits.CHANNELS)
    shuffle: int = Field(
        gt=0, le=limits.PATCHES, description="the pixel shuffle joins shuffle x shuffle patches"
    )
    adapter_hidden: Width
    adapter_out: Width
    rope_theta: Base

    @model_validator(mode="after")
    def _check(self) -> Self:
        if self.image % self.patch or self.side % self.shuffle:
            raise ValueError(
                f"image {self.image} must be a multiple of patch {self.patch}, and the patches "
                f"along a side a multiple of shuffle {self.shuffle}"
            )
        if self.side > limits.PATCHES:
            raise ValueError(
                f"{self.side} patches along a side: at most {limits.PATCHES} are expected, which "
                "is far above any known model"
            )
        if self.side**2 * self.head_dim > limits.ROTATIONS:
            raise ValueError(
                f"{self.side**2} patches of heads of width {self.head_dim}: at most "
                f"{limits.ROTATIONS} products are expected, which is far above any known model"
            )
        if self.dim % self.heads or self.head_dim % 4:
            raise ValueError(
                f"dim {self.dim} over {self.heads} heads: 2D RoPE needs heads whose width is a "
                "multiple of 4"
            )
        return self

    @property
    def side(self) -> int:
        """Patches along one side of an image tile."""
        return self.image // self.patch

    @property
    def tokens(self) -> int:
        """Image tokens of one image tile, after the pixel shuffle."""
        return (self.side // self.shuffle) ** 2

    @property
    def head_dim(self) -> int:
        """Width of one head."""
        return self.dim // self.heads

    @property
    def patch_width(self) -> int:
        """Values in one patch: its pixels in all channels."""
        return self.channels * self.patch**2

    @property
    def shuffled_dim(self) -> int:
        """Width of one image token after the pixel shuffle."""
        return self.dim * self.shuffle**2
