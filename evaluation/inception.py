"""Inception V3 with the weights of published scores: images → class probabilities and features."""

import copy
import hashlib
import http.client
import io
import shutil
import tempfile
import urllib.request
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from evaluation.extractors import Extraction, check_images, extract_with

SHA256 = "6726825d0af5f729cebd5821db510b11b1cfad8faad88a03f1befd49fb9129b2"
FILE = "weights-inception-2015-12-05-6726825d.pth"
URL = f"https://github.com/toshas/torch-fidelity/releases/download/v0.2.0/{FILE}"


class Inception:
    """torch-fidelity's Inception V3: the 2015 TensorFlow graph whose scores are published. K = 1008, D = 2048."""

    name = "inception"
    score_name = "Inception Score"
    key = "inception"  # its weights are known by their SHA-256
    accuracy = None

    def __init__(self, weights: Path | None = None, device: str | torch.device = "cpu", sha256: str = SHA256) -> None:
        """weights: the file; None takes inception_path(), and downloads the file (91 MiB) to it where it is missing.

        Raises FileNotFoundError where there is no file and none can be had, ValueError where its SHA-256 is another.
        """
        from torch_fidelity.feature_extractor_inceptionv3 import FeatureExtractorInceptionV3

        path = inception_path() if weights is None else weights
        if not path.is_file():
            if weights is not None:
                raise FileNotFoundError(f"no Inception weights at {path}: put {URL} there")
            _download_inception(path, sha256)
        content = path.read_bytes()
        digest = hashlib.sha256(content).hexdigest()
        if digest != sha256:  # before anything reads the file as more than bytes
            raise ValueError(f"{path} must have SHA-256 {sha256}, but has {digest}: put {URL} there instead")
        state = torch.load(io.BytesIO(content), map_location="cpu", weights_only=True)
        # torch-fidelity builds the network only together with its weights, and unpickles those in full: it is given
        # tensors that were loaded safely and pickled again here.
        tensors = io.BytesIO()
        torch.save(state, tensors)
        tensors.seek(0)
        with torch.random.fork_rng(devices=[]):  # building layers draws initial weights
            self.net = FeatureExtractorInceptionV3("inception", ["2048"], feature_extractor_weights_path=tensors)
        self.net.to(device)
        self.device = torch.device(device)

    def to(self, device: str | torch.device) -> "Inception":
        """The same extractor on another device; this one stays where it is."""
        moved = copy.copy(self)
        moved.net, moved.device = copy.deepcopy(self.net).to(device), torch.device(device)
        return moved

    def extract(self, images: np.ndarray | Tensor, batch_size: int = 50) -> Extraction:
        """uint8 (N, H, W, 1 or 3) of any size (grey is repeated to three channels) → Extraction, K = 1008, D = 2048."""
        # The bias of the last layer is left out, as in every published Inception Score.
        return extract_with(check_images(images), batch_size, self.device, self._features, self.net.fc.weight, None)

    def _features(self, images: Tensor) -> Tensor:
        features: Tensor = self.net(images.expand(-1, 3, -1, -1))[0]
        return features


def inception_path() -> Path:
    """Where the Inception weights are looked for when no path is given: torch-fidelity's own place, there or not."""
    return Path(torch.hub.get_dir()) / "checkpoints" / FILE


def _download_inception(path: Path, sha256: str) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.NamedTemporaryFile(dir=path.parent, prefix=".download-", delete=False) as file:
        part = Path(file.name)
    try:
        with urllib.request.urlopen(URL, timeout=30) as response, part.open("wb") as file:
            shutil.copyfileobj(response, file)
        # A connection that breaks off ends the body without an error.
        digest = hashlib.sha256(part.read_bytes()).hexdigest()
        if digest != sha256:
            raise OSError(f"what came has SHA-256 {digest} and not {sha256}")
        part.chmod(0o644)
        part.replace(path)
    except (OSError, http.client.HTTPException) as error:
        raise FileNotFoundError(
            f"no Inception weights at {path}, and {URL} does not give them ({error}): "
            f"put the file {FILE} there, or name its path"
        ) from error
    finally:
        part.unlink(missing_ok=True)
