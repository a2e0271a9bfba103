"""The classifier of a data set's own labels: its network, its files, and where it is kept.

N images · H,W pixels · C channels (1 or 3) · K classes. Images are uint8 (N, H, W, C), NumPy or torch.
"""

import copy
import hashlib
import itertools
import logging
import tempfile
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
import torch
from safetensors.torch import load as load_tensors
from safetensors.torch import save as save_tensors
from torch import Tensor, nn
from torch.nn import functional as F

from evaluation.extractors import Extraction, check_images, extract_with
from trainer.storage import Storage

CLASSIFIER_VERSION = 2  # of the network below and of train_classifier.py: part of a cached classifier's name

log = logging.getLogger(__name__)


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

    def extract(self, images: np.ndarray | Tensor, batch_size: int | None = None) -> Extraction:
        """uint8 (N, H, W, C) of the trained size and number of channels → Extraction with K classes and D = 64.

        batch_size None: 500 images of 64 x 64 pixels at once, fewer of larger ones: some 2 GiB of memory.
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
        if batch_size is None:
            batch_size = max(1, min(500, 500 * 64 * 64 // (batch.shape[1] * batch.shape[2])))
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
            log.warning("looking for the classifier elsewhere: %s", error)
    found = find()
    found.save(place)
    return found
