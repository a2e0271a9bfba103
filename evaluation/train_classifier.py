"""How the classifier learns a data set's own labels. A change of it raises CLASSIFIER_VERSION."""

from collections.abc import Sequence
from dataclasses import replace

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional as F

from evaluation.classifier import Classifier, ClassifierNet
from evaluation.extractors import check_images, reproducible_convolutions


def train_classifier(
    images: Sequence[np.ndarray | Tensor],
    labels: np.ndarray | Tensor,
    held_out_images: np.ndarray | Tensor,
    held_out_labels: np.ndarray | Tensor,
    seed: int = 0,
    device: str | torch.device = "cpu",
    epochs: int = 30,
    horizontal_flip: bool = False,
) -> Classifier:
    """Train a classifier, and state its accuracy on images it has not seen.

    images: one or more uint8 (N_i, H, W, C), in all N, read a batch at a time: they may be mapped from disk.
    held_out_images: uint8 (M, H, W, C); labels (N,), held_out_labels (M,): integers 0..K-1, all K among the training
    labels. The same seed gives the same classifier on the same device type and number of threads; the caller's random
    numbers are not touched.
    Raises ValueError where images or labels are not of that form.
    """
    x = _Rows([check_images(part) for part in images if len(part)])
    y = _check_labels(labels, len(x))
    held_out, truth = check_images(held_out_images), _check_labels(held_out_labels, len(held_out_images))
    classes = int(y.max()) + 1
    if len(y.unique()) != classes or int(truth.max()) >= classes or classes < 2:
        last = max(classes - 1, int(truth.max()), 1)
        raise ValueError(f"training labels must cover every class 0..{last}, but are {y.unique().tolist()}")
    device = torch.device(device)
    generator = torch.Generator().manual_seed(seed)  # on the CPU: one order of images whatever the device
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        net = ClassifierNet(x.shape[2], classes, min(x.shape[:2])).to(device)
    mean, std = x.mean_and_std()
    net.mean.copy_((mean / 255)[:, None, None])
    net.std.copy_((std / 255).clamp_min(1e-3)[:, None, None])

    # Of large images fewer at once: 256 of 64 x 64 pixels take 2 GiB.
    batch_size = min(64 if len(x) < 10_000 else 256, max(16, 2**20 // (x.shape[0] * x.shape[1])), len(x))
    steps = len(x) // batch_size
    optimizer = torch.optim.AdamW(net.parameters(), lr=0.01, weight_decay=0.01)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, 0.01, total_steps=epochs * steps)
    net.train()
    with reproducible_convolutions():
        for _ in range(epochs):
            order = torch.randperm(len(x), generator=generator)
            for step in range(steps):
                index = order[step * batch_size : (step + 1) * batch_size]
                batch = _augment(net.normalise(x[index].to(device)), generator, horizontal_flip)
                loss = F.cross_entropy(net.head(net.pooled(batch)), y[index].to(device))
                optimizer.zero_grad(set_to_none=True)
                loss.backward()
                optimizer.step()
                schedule.step()
    net.eval().requires_grad_(False)
    classifier = Classifier(net, classes, x.shape[2], min(x.shape[:2]), 0.0, len(truth), seed)
    guesses = classifier.extract(held_out).probabilities.argmax(axis=1)
    return replace(classifier, accuracy=float((guesses == truth.numpy()).mean()))


class _Rows:
    """Images of several tensors (N_i, H, W, C) read as one, none of it before it is asked for."""

    def __init__(self, parts: list[Tensor]) -> None:
        if len({part.shape[1:] for part in parts}) != 1:
            raise ValueError(f"images must be of one shape, but got {[tuple(part.shape) for part in parts]}")
        self.parts, self.shape = parts, parts[0].shape[1:]  # (H, W, C)

    def __len__(self) -> int:
        return sum(len(part) for part in self.parts)

    def __getitem__(self, index: Tensor) -> Tensor:
        """(n,) int64 → (n, C, H, W) uint8."""
        rows = torch.empty((len(index), *self.shape), dtype=torch.uint8)
        first = 0
        for part in self.parts:
            here = (first <= index) & (index < first + len(part))
            rows[here] = part[index[here] - first]
            first += len(part)
        return rows.permute(0, 3, 1, 2)

    def mean_and_std(self) -> tuple[Tensor, Tensor]:
        """Of each channel, (C,) float64 in 0..255; from how often each of the 256 values is there."""
        channels = self.shape[2]
        counts = torch.zeros(channels, 256, dtype=torch.float64)
        for part in self.parts:
            for block in part.split(1000):
                for channel in range(channels):
                    counts[channel] += torch.bincount(block[..., channel].flatten(), minlength=256)
        values, n = torch.arange(256, dtype=torch.float64), counts.sum(dim=1)
        mean = counts @ values / n
        return mean, ((counts * (values - mean[:, None]) ** 2).sum(dim=1) / (n - 1)).sqrt()


def _augment(images: Tensor, generator: torch.Generator, horizontal_flip: bool) -> Tensor:
    """Shift by up to an eighth of the side, turn by up to 0.15 rad, scale by up to e^0.1; normalised (N, C, H, W)."""
    n = len(images)
    shift_x, shift_y, turn, scale = 2 * torch.rand((4, n), generator=generator) - 1
    turn, scale = 0.15 * turn, torch.exp(0.1 * scale)
    cos, sin = scale * turn.cos(), scale * turn.sin()
    mirror = torch.where(torch.rand(n, generator=generator) < 0.5, -1.0, 1.0) if horizontal_flip else torch.ones(n)
    rows = torch.stack([cos * mirror, -sin, shift_x / 4, sin * mirror, cos, shift_y / 4], dim=1)
    grid = F.affine_grid(rows.view(n, 2, 3).to(images.device), list(images.shape), align_corners=False)
    return F.grid_sample(images, grid, padding_mode="zeros", align_corners=False)  # 0 is the mean of the images


def _check_labels(labels: np.ndarray | Tensor, count: int) -> Tensor:
    values = torch.as_tensor(labels).cpu()
    if values.shape != (count,) or values.is_floating_point() or (count and int(values.min()) < 0):
        raise ValueError(f"labels must be {count} integers >= 0, but got {values.dtype} {tuple(values.shape)}")
    return values.long()
