"""The denoiser: diffusers' UNet2DModel from a ModelConfig."""

import torch
from diffusers import UNet2DModel

from trainer.config import ModelConfig


def build(config: ModelConfig, shape: tuple[int, int, int], dropout: float, seed: int) -> UNet2DModel:
    """The U-Net for images of shape (C, H, W), with weights that depend on `seed` alone.

    Raises ValueError where the image does not halve once a level.
    """
    config.check_fits(shape)
    channels, height, width = shape
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        return UNet2DModel(
            sample_size=(height, width),
            in_channels=channels,
            out_channels=channels,
            block_out_channels=config.channels,
            down_block_types=tuple("AttnDownBlock2D" if a else "DownBlock2D" for a in config.attention),
            up_block_types=tuple("AttnUpBlock2D" if a else "UpBlock2D" for a in reversed(config.attention)),
            layers_per_block=config.layers_per_block,
            attention_head_dim=config.attention_head_dim,
            norm_num_groups=config.norm_groups,
            dropout=dropout,
        )
