"""Nodes, CPUs and GPUs → how many trials run at once, and how their workers are placed."""

import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Literal

import ray

WORKER_BYTES = 2**30  # of a node's memory, for a worker: one of `digits` took 0.97 GiB of it, 0.63 before its network
NODES_SECONDS = 600  # how long nodes that a trial needs may take to start
LOOK_SECONDS = 2.0


class NoRoomError(ValueError):
    """The cluster holds not one trial."""


@dataclass(frozen=True)
class Node:
    """What one node has for workers. memory: in bytes, as Ray lends it; 0 where it was told of none."""

    cpus: float
    gpus: float
    memory: float = 0


@dataclass(frozen=True)
class Placement:
    """Trials at once, and what each of a trial's workers reserves."""

    at_once: int
    worker: dict[str, float]


@dataclass(frozen=True)
class Capacity:
    """What a cluster can hold. Slots count workers: a GPU (or a share of one) each where there are GPUs, else a CPU."""

    nodes: tuple[Node, ...]

    @property
    def use_gpu(self) -> bool:
        return any(node.gpus >= 1 for node in self.nodes)

    @property
    def what(self) -> str:
        return "GPU" if self.use_gpu else "CPU"

    def memory(self, per_gpu: int = 1) -> float:
        """What every worker reserves of its node's memory: nothing, but where that ends before the GPUs or CPUs do."""
        hosts = [node for node in self.nodes if node.memory and self._fit(node, per_gpu) >= 1]
        if all(self._fit(node, per_gpu) <= node.memory // WORKER_BYTES for node in hosts):
            return 0
        return min(WORKER_BYTES, max(node.memory for node in hosts))

    def slots(self, per_gpu: int = 1) -> list[int]:
        """Workers that each node holds, where so many share a GPU. Every worker has a CPU."""
        memory = self.memory(per_gpu)
        fit = [self._fit(node, per_gpu) for node in self.nodes]
        return [min(n, int(node.memory // memory)) for n, node in zip(fit, self.nodes, strict=True)] if memory else fit

    def _fit(self, node: Node, per_gpu: int) -> int:
        return int(min(int(node.gpus) * per_gpu, node.cpus) if self.use_gpu else node.cpus)

    def strategy(self, workers: int) -> Literal["STRICT_PACK", "PACK"]:
        """Ray's word for how one trial's workers are laid: on one node wherever any node is large enough."""
        return "STRICT_PACK" if max(self.slots(), default=0) >= workers else "PACK"

    def place(self, workers: int, per_gpu: int = 1, min_workers: int | None = None) -> Placement:
        """How many trials of so many workers run at once, none spread where a node is large enough.

        Where not even one fits, one runs with the workers that do, down to min_workers.
        Raises NoRoomError where there are fewer, and ValueError where workers of one trial would share a GPU.
        """
        if per_gpu > 1 and workers > 1:
            raise ValueError(
                f"trials_per_gpu above 1 needs train.workers: 1, for NCCL wants a whole GPU for every worker, "
                f"but trials_per_gpu is {per_gpu} and train.workers {workers}"
            )
        slots, memory = self.slots(per_gpu), self.memory(per_gpu)
        worker = {"CPU": 1.0, "GPU": 1.0 / per_gpu if self.use_gpu else 0, "memory": memory}
        worker = {name: amount for name, amount in worker.items() if amount}
        packed = sum(count // workers for count in slots)
        at_once = packed or sum(slots) // workers  # larger than any node: spread
        name, least = ("train.min_workers", min_workers) if min_workers else ("train.workers", workers)
        if not sum(slots):
            raise NoRoomError(
                f"no node has room for a worker, which takes a CPU{' beside its GPU' * self.use_gpu}; add nodes"
            )
        if sum(slots) < least:
            has = f"{self.what}s{' and memory' * bool(memory)}"
            raise NoRoomError(
                f"{name} must fit the cluster, which has {has} for {sum(slots)}, but is {least}; "
                f"set {name} to {sum(slots)} or add nodes"
            )
        return Placement(max(1, at_once), worker)


def trials_per_gpu(peak_bytes: int, total_bytes: int) -> int:
    """Trials that share a GPU, by one's measured peak; a tenth of the memory is left for fragments and the driver."""
    assert peak_bytes > 0
    return max(1, int(0.9 * total_bytes / peak_bytes))


def read() -> Capacity:
    """The capacity of the cluster that this process is connected to, as it is now."""
    nodes: list[dict[str, Any]] = [node["Resources"] for node in ray.nodes() if node["Alive"]]
    return Capacity(
        tuple(Node(float(r.get("CPU", 0)), float(r.get("GPU", 0)), float(r.get("memory", 0))) for r in nodes)
    )


def with_room(
    room: tuple[int, int, int | None],
    say: Callable[[str], None],
    timeout_s: float = NODES_SECONDS,
    look: Callable[[], Capacity] = read,
) -> Capacity:
    """The cluster once a trial of that `room`, as `place` takes it, fits: its nodes may still be starting.

    Raises NoRoomError where none does after so long, and whatever else `place` refuses at once.
    """
    end, waiting = time.monotonic() + timeout_s, False
    while True:
        cluster = look()
        try:
            cluster.place(*room)
        except NoRoomError as error:
            if time.monotonic() >= end:
                raise
            if not waiting:
                say(f"Waiting for nodes, for {timeout_s / 60:.0f} minutes at most: {error}")
            waiting = True
            time.sleep(LOOK_SECONDS)
        else:
            return cluster
