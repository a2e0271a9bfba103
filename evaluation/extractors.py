"""Images → class probabilities and features, by a small classifier of the data set's own labels.

N images · H,W pixels · C channels (1 or 3) · K classes · D features. Images are uint8 (N, H, W, C), NumPy or torch.
Networks compute in float32 without TF32, the last layer and the softmax in float64.
"""

import copy
import hashlib
import itertools
import logging
import tempfile
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass, replace
from pathlib import Path
from typing import NamedTuple, Protocol, Self

import numpy as np
import torch
from safetensors.torch import load as load_tensors
from safetensors.torch import save as save_tensors
from torch import Tensor, nn
from torch.nn import functional as F

from evaluation.scores import Array, softmax_float64
from trainer.storage import Storage

CLASSIFIER_VERSION = 1  # of the architecture and the recipe below: part of a cached classifier's name

log = logging.getLogger(__name__)


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


class _Residual(nn.Module):
    def __init__(self, channels_in: int, channels_out: int) -> None:
        super().__init__()
        self.first = nn.Conv2d(channels_in, channels_out, 3, padding=1, bias=False)
        self.first_norm = nn.BatchNorm2d(channels_out)
        self.second = nn.Conv2d(channels_out, channels_out, 3, padding=1, bias=False)
        self.second_norm = nn.BatchNorm2d(channels_out)
        same = channels_in == channels_out
        self.skip = nn.Identity() if same else nn.Conv2d(channels_in, channels_out, 1, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        h = F.relu(self.first_norm(self.first(x)))
        return F.relu(self.second_norm(self.second(h)) + self.skip(x))


class ClassifierNet(nn.Module):
    """A residual CNN: one stage a width, resolution halved between stages; features are the 64 pooled channels."""

    mean: Tensor
    std: Tensor

    def __init__(self, channels: int, classes: int, image_size: int) -> None:
        super().__init__()
        # 8 px digits need two small stages; above 16 px there is more to see, and more data to learn it from.
        widths = (32, 64) if image_size <= 16 else (64, 128, 128, 64)
        self.register_buffer("mean", torch.zeros(channels, 1, 1))  # of the training images, in 0..1
        self.register_buffer("std", torch.ones(channels, 1, 1))
        layers: list[nn.Module] = [
            nn.Conv2d(channels, widths[0], 3, padding=1, bias=False),
            nn.BatchNorm2d(widths[0]),
            nn.ReLU(),
            _Residual(widths[0], widths[0]),
        ]
        for before, width in itertools.pairwise(widths):
            # Not max pooling: on CUDA its gradient is summed in no fixed order.
            layers += [nn.AvgPool2d(2, ceil_mode=True), _Residual(before, width)]
        self.body = nn.Sequential(*layers)
        self.head = nn.Linear(widths[-1], classes)

    def features(self, images: Tensor) -> Tensor:
        """uint8 (N, C, H, W) → float32 (N, 64)."""
        return self.pooled(self.normalise(images))

    def normalise(self, images: Tensor) -> Tensor:
        """uint8 (N, C, H, W) → float32 of the training images' mean 0 and standard deviation 1 a channel."""
        return (images.float() / 255 - self.mean) / self.std

    def pooled(self, x: Tensor) -> Tensor:
        """Normalised images (N, C, H, W) → (N, 64)."""
        pooled: Tensor = self.body(x).mean(dim=(2, 3))
        return pooled


@dataclass(frozen=True)
class Classifier:
    """A trained classifier of a data set's own labels. Its score is the classifier score, never the Inception Score."""

    net: ClassifierNet
    classes: int
    channels: int
    image_size: int
    accuracy: float  # share of held-out images that are classified right
    held_out: int  # images behind that share
    seed: int

    name = "classifier"
    score_name = "classifier score"

    @property
    def key(self) -> str:
        """Of the weights: another machine trains others on the same images."""
        digest = hashlib.sha256()
        for name, value in sorted(self.net.state_dict().items()):
            digest.update(name.encode() + value.cpu().numpy().tobytes())
        return digest.hexdigest()[:12]

    def extract(self, images: np.ndarray | Tensor, batch_size: int = 500) -> Extraction:
        """uint8 (N, H, W, C) of the trained size and number of channels → Extraction with K classes and D = 64.

        Raises ValueError where the shape or type is another. What is known of the size is the short side.
        """
        batch = check_images(images)
        if batch.shape[3] != self.channels:
            raise ValueError(f"the classifier knows images of {self.channels} channels, but got {batch.shape[3]}")
        if min(batch.shape[1:3]) != self.image_size:
            raise ValueError(
                f"the classifier knows images of {self.image_size} pixels on their short side, but got "
                f"{min(batch.shape[1:3])}"
            )
        device = self.net.head.weight.device
        return extract_with(batch, batch_size, device, self.net.features, self.net.head.weight, self.net.head.bias)

    def to(self, device: str | torch.device) -> "Classifier":
        """The same classifier on another device; this one stays where it is."""
        return replace(self, net=copy.deepcopy(self.net).to(device))

    def save(self, folder: Storage) -> None:
        """Write `weights.safetensors` and `classifier.json` (with the weights' SHA-256) into a folder."""
        weights = save_tensors({name: t.detach().cpu().contiguous() for name, t in self.net.state_dict().items()})
        folder.write("weights.safetensors", weights)
        meta = {k: v for k, v in vars(self).items() if k != "net"}
        meta |= {"version": CLASSIFIER_VERSION, "sha256": hashlib.sha256(weights).hexdigest()}
        folder.write_json("classifier.json", meta)

    @classmethod
    def load(cls, folder: Storage) -> "Classifier":
        """Read what `save` wrote, onto the CPU.

        Raises ValueError where a file is missing, damaged or of another version.
        """
        try:
            meta = folder.read_json("classifier.json")
            weights = folder.read("weights.safetensors")
            digest, version = meta.pop("sha256"), meta.pop("version")
            if version != CLASSIFIER_VERSION or hashlib.sha256(weights).hexdigest() != digest:
                raise ValueError("it is damaged, or of another version: delete it")
            with torch.random.fork_rng(devices=[]):  # building layers draws initial weights
                net = ClassifierNet(meta["channels"], meta["classes"], meta["image_size"])
            net.load_state_dict(load_tensors(weights))
            return cls(net.eval().requires_grad_(False), **meta)
        except (OSError, ValueError, KeyError, TypeError, AttributeError, RuntimeError) as error:
            raise ValueError(f"{folder.uri} holds no readable classifier: {error}") from error


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

    batch_size = min(64 if len(x) < 10_000 else 256, len(x))
    steps = len(x) // batch_size
    optimizer = torch.optim.AdamW(net.parameters(), lr=0.01, weight_decay=0.01)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, 0.01, total_steps=epochs * steps)
    net.train()
    with _reproducible_convolutions():
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


def cached_classifier(cache_dir: Path, data_key: str, make: Callable[[], Classifier]) -> Classifier:
    """The classifier stored under data_key (a hash of the data and its split), or `make()`, which is then stored.

    On the CPU: see Classifier.to. Processes that start at once may each make one; the first one stored is what all of
    them return. A damaged one is made again.
    """
    final = cache_dir / f"classifier-v{CLASSIFIER_VERSION}-{data_key}"
    cache_dir.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=cache_dir, prefix=".making-") as scratch:
        if final.exists():
            try:
                return Classifier.load(Storage(final))
            except ValueError as error:
                log.warning("making the classifier again: %s", error)
                with suppress(FileNotFoundError):  # another process has moved it away
                    final.rename(Path(scratch) / "damaged")
        made = make()
        fresh = Path(scratch) / "fresh"
        made.save(Storage(fresh))
        try:
            fresh.rename(final)
        except OSError:
            return Classifier.load(
                Storage(final)
            )  # another process was first: a folder that is not empty is never replaced
        return made.to("cpu")


def kept_classifier(place: Storage, find: Callable[[], Classifier]) -> Classifier:
    """The classifier that a run keeps at `place`, or `find()`, which is then kept there.

    Two machines train two classifiers on the same images, and what was judged by one compares with nothing that was
    judged by the other. One driver at a time has a run; a damaged classifier is found again.
    """
    if place.exists("classifier.json"):
        try:
            return Classifier.load(place)
        except ValueError as error:
            log.warning("looking for the judge elsewhere: %s", error)
    found = find()
    found.save(place)
    return found


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
    with torch.inference_mode(), _reproducible_convolutions():
        parts = [features_of(batch.permute(0, 3, 1, 2).to(device)).cpu() for batch in images.split(batch_size)]
        features = torch.cat(parts)
        # float64 on the CPU: independent of the device's TF32 setting, and cheap beside the convolutions.
        logits = features.double() @ weight.cpu().double().T
        if bias is not None:
            logits += bias.cpu().double()
    return Extraction(softmax_float64(logits.numpy()), features.numpy())


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


@contextmanager
def _reproducible_convolutions() -> Iterator[None]:
    """float32 convolutions without TF32 (whose 1e-3 is more than scores differ by), and one algorithm every time."""
    with torch.backends.cudnn.flags(
        enabled=True, benchmark=False, deterministic=True, allow_tf32=False, fp32_precision="ieee"
    ):
        yield


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


def check_images(images: np.ndarray | Tensor) -> Tensor:
    batch = torch.as_tensor(images)
    if batch.dtype != torch.uint8 or batch.ndim != 4 or batch.shape[3] not in (1, 3) or 0 in batch.shape:
        raise ValueError(f"images must be uint8 (N, H, W, 1 or 3), but got {batch.dtype} {tuple(batch.shape)}")
    return batch


def _check_labels(labels: np.ndarray | Tensor, count: int) -> Tensor:
    values = torch.as_tensor(labels).cpu()
    if values.shape != (count,) or values.is_floating_point() or (count and int(values.min()) < 0):
        raise ValueError(f"labels must be {count} integers >= 0, but got {values.dtype} {tuple(values.shape)}")
    return values.long()
