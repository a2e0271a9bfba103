"""What a training logged: TensorBoard event files → curves, the last sample grid, and when it was at work."""

import io
from collections import defaultdict
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np


@dataclass(frozen=True)
class Events:
    """Of one trial.

    scalars: tag → (epoch, value) in the order of epochs. samples: the newest grid of images (H, W, C) uint8, that its
    last rung was scored by. spans: Unix seconds of the first and the last event of every process that worked on it.
    """

    scalars: dict[str, list[tuple[int, float]]] = field(default_factory=dict)
    samples: np.ndarray | None = None
    spans: list[tuple[float, float]] = field(default_factory=list)


def read(folder: Path) -> Events:
    """The events of one trial's folder; empty where there are none.

    A resumed trial logs again the epochs after its checkpoint: what the earlier process wrote of them is dropped, so
    an epoch has one value, the latest. A file that was cut short is read as far as it goes.
    """
    files = sorted(folder.glob("*tfevents*"))
    if not files:
        return Events()
    from PIL import Image
    from tensorboard.backend.event_processing import event_file_loader  # type: ignore[import-untyped]
    from tensorboard.compat.proto.event_pb2 import SessionLog  # type: ignore[import-untyped]

    scalars: dict[str, dict[int, float]] = defaultdict(dict)
    pictures: dict[int, bytes] = {}
    spans = []
    for file in files:
        times = []
        for event in event_file_loader.LegacyEventFileLoader(str(file)).Load():
            times.append(event.wall_time)
            if event.HasField("session_log") and event.session_log.status == SessionLog.START:
                for tag, values in scalars.items():
                    scalars[tag] = {epoch: value for epoch, value in values.items() if epoch < event.step}
                pictures = {epoch: picture for epoch, picture in pictures.items() if epoch < event.step}
            for value in event.summary.value:
                if value.HasField("simple_value"):
                    scalars[value.tag][event.step] = value.simple_value
                elif value.HasField("image"):
                    pictures[event.step] = value.image.encoded_image_string
        if times:
            spans.append((min(times), max(times)))
    samples = None
    if pictures:
        with Image.open(io.BytesIO(pictures[max(pictures)])) as picture:
            pixels = np.asarray(picture)
        samples = pixels[..., None] if pixels.ndim == 2 else pixels
    return Events({tag: sorted(values.items()) for tag, values in scalars.items() if values}, samples, spans)
