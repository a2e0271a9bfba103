"""Images → class probabilities and features: what an extractor is. Each has a file of its own.

N images · H,W pixels · C channels (1 or 3) · K classes · D features. Images are uint8 (N, H, W, C), NumPy or torch.
Networks compute in float32 without TF32, the last layer and the softmax in float64.
"""

from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from typing import NamedTuple, Protocol, Self

import numpy as np
import torch
from torch import Tensor

from evaluation.scores import Array, softmax_float64


class Extraction(NamedTuple):
    """Of N images, in their order."""

    probabilities: Array  # (N, K) float64
    features: np.ndarray  # (N, D) float32

    @classmethod
    def joined(cls, parts: Iterable["Extraction"]) -> "Extraction":
        """Of the images of all parts, one part after another."""
        return cls(*(np.concatenate(values) for values in zip(*parts, strict=True)))


class Extractor(Protocol):
    """What judges images: a classifier of the data set's own labels, or Inception V3 (inception.py)."""

    @property
    def name(self) -> str: ...
    @property
    def score_name(self) -> str: ...
    @property
    def key(self) -> str:
        """What its results depend on beside the data set."""

    @property
    def accuracy(self) -> float | None:
        """Share of right answers on held-out images; None where its classes are not the data set's."""

    def extract(self, images: np.ndarray) -> Extraction: ...
    def to(self, device: str | torch.device) -> Self: ...


def extract_with(
    images: Tensor,
    batch_size: int,
    device: torch.device,
    features_of: Callable[[Tensor], Tensor],
    weight: Tensor,
    bias: Tensor | None,
) -> Extraction:
    if batch_size < 1:
        raise ValueError(f"batch_size >= 1 must hold, but got {batch_size=}")
    with torch.inference_mode(), reproducible_convolutions():
        parts = [features_of(batch.permute(0, 3, 1, 2).to(device)).cpu() for batch in images.split(batch_size)]
        features = torch.cat(parts)
        # float64 on the CPU: independent of the device's TF32 setting, and cheap beside the convolutions.
        logits = features.double() @ weight.cpu().double().T
        if bias is not None:
            logits += bias.cpu().double()
    return Extraction(softmax_float64(logits.numpy()), features.numpy())


@contextmanager
def reproducible_convolutions() -> Iterator[None]:
    """float32 convolutions without TF32 (whose 1e-3 is more than scores differ by), and one algorithm every time."""
    with torch.backends.cudnn.flags(
        enabled=True, benchmark=False, deterministic=True, allow_tf32=False, fp32_precision="ieee"
    ):
        yield


def check_images(images: np.ndarray | Tensor) -> Tensor:
    batch = torch.as_tensor(images)
    if batch.dtype != torch.uint8 or batch.ndim != 4 or batch.shape[3] not in (1, 3) or 0 in batch.shape:
        raise ValueError(f"images must be uint8 (N, H, W, 1 or 3), but got {batch.dtype} {tuple(batch.shape)}")
    return batch
