"""What a checkpoint holds, how it is written, and how it is verified when it is read.

A checkpoint is a folder: `state.pt` (tensors and plain numbers, loaded with weights_only=True) and
`checkpoint.json` (format, step, epoch, configuration, versions, and a SHA-256 of both), written last.
"""

import hashlib
import io
import json
import re
from dataclasses import dataclass
from importlib.metadata import version
from typing import Any

import torch
from torch import nn

from trainer import model as unet
from trainer.config import TrainConfig, Weights
from trainer.storage import Storage

FORMAT = 2


class BrokenCheckpointError(Exception):
    """A checkpoint that is cut short, altered, or of another format; the message names it."""


@dataclass(frozen=True)
class Checkpoint:
    """A verified checkpoint: `meta` is checkpoint.json, `state` what state.pt holds."""

    meta: dict[str, Any]
    state: dict[str, Any]

    @property
    def config(self) -> TrainConfig:
        return TrainConfig.model_validate(self.meta["config"])

    def denoiser(self, weights: Weights = "ema") -> nn.Module:
        """The U-Net in eval mode with its best EMA's weights, or those that were trained, on the CPU."""
        config = self.config
        state = self.state["model"] if weights == "raw" else self.state["ema"][str(self.meta["ema_decay"])]
        network = unet.build(config.model, tuple(self.meta["image_shape"]), config.dropout, seed=0)
        network.load_state_dict(state)
        return network.eval().requires_grad_(False)


def save(storage: Storage, state: dict[str, Any], meta: dict[str, Any]) -> None:
    """Writes a checkpoint into a folder; checkpoint.json comes last, so a cut write is no checkpoint."""
    buffer = io.BytesIO()
    torch.save(state, buffer)
    content = buffer.getvalue()
    storage.write("state.pt", content)
    versions = {name: version(name) for name in ("ddpm-search", "torch", "diffusers")}
    described = {"format": FORMAT, **meta, "versions": versions}
    storage.write_json("checkpoint.json", described | {"sha256": _digest(described, content)})


def load(storage: Storage) -> Checkpoint:
    """Reads and verifies the checkpoint in a folder. Raises BrokenCheckpointError."""
    try:
        meta = storage.read_json("checkpoint.json")
        content = storage.read("state.pt")
    except (FileNotFoundError, json.JSONDecodeError, UnicodeDecodeError) as error:
        raise BrokenCheckpointError(f"checkpoint {storage.uri} cannot be read: {error}") from error
    if not isinstance(meta, dict) or meta.get("format") != FORMAT:
        raise BrokenCheckpointError(f"checkpoint {storage.uri} is not of format {FORMAT}")
    if _digest({name: value for name, value in meta.items() if name != "sha256"}, content) != meta.get("sha256"):
        raise BrokenCheckpointError(f"checkpoint {storage.uri} is damaged: its content does not match its SHA-256")
    return Checkpoint(meta, torch.load(io.BytesIO(content), map_location="cpu", weights_only=True))


def _digest(described: dict[str, Any], content: bytes) -> str:
    """SHA-256 of both files: a flipped byte in the description is as bad as one in a tensor."""
    canonical = json.dumps(json.loads(json.dumps(described)), sort_keys=True).encode()
    return hashlib.sha256(canonical + content).hexdigest()


def name_of(step: int) -> str:
    """A checkpoint's folder: one that is trained again after a crash overwrites its own."""
    return f"checkpoint_{step:09d}"


def names(storage: Storage) -> list[str]:
    """The folders of `name_of`, oldest first (Ray Train keeps a checkpoint_manager_snapshot.json beside them)."""
    return [name for name in storage.names() if re.fullmatch(r"checkpoint_\d{9}", name)]


def is_of(meta: dict[str, Any], config: TrainConfig) -> bool:
    """Whether what checkpoint.json says is a training that learns as `config` does."""
    try:
        return TrainConfig.model_validate(meta["config"]).learned() == config.learned()
    except (KeyError, ValueError):  # settings that this version does not know
        return False


def latest(
    storage: Storage, of_a_rung: bool = False, of: TrainConfig | None = None
) -> tuple[Storage, Checkpoint] | None:
    """The newest whole checkpoint (or the newest of a rung) here.

    Broken ones, and those that learn otherwise than `of`, are named and passed over.
    """
    for name in reversed(names(storage)):
        folder = storage.at(name)
        try:
            found = load(folder)
        except BrokenCheckpointError as error:
            print(f"{error}; trying the one before", flush=True)
            continue
        if of is not None and not is_of(found.meta, of):
            print(f"checkpoint {folder.uri} is of another configuration: it is passed over", flush=True)
            continue
        if not of_a_rung or found.meta.get("metrics", {}).get("rung"):
            return folder, found
    return None
