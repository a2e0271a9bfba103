"""Nodes, CPUs and GPUs → how many trials run at once, and how their workers are placed."""

import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Literal

import ray

WORKER_BYTES = 1023 * 2**20  # of a node's memory, for a worker: one of `digits` took 993 MiB, 645 before its network
SPARE_BYTES = 2**20  # of a node's memory: a trial's own process reserves a byte, which workers must not take
NODES_SECONDS = 600  # how long nodes that a trial needs may take to start
LOOK_SECONDS = 2.0


class NoRoomError(ValueError):
    """The cluster holds not one trial."""


@dataclass(frozen=True)
class Resources:
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
    """What a cluster can hold. Slots count workers: a GPU (or a share of one) and a CPU each, or a CPU alone."""

    nodes: tuple[Resources, ...]

    @property
    def use_gpu(self) -> bool:
        return any(node.gpus >= 1 for node in self.nodes)

    @property
    def what(self) -> str:
        return "GPU" if self.use_gpu else "CPU"

    def worker(self, per_gpu: int = 1) -> dict[str, float]:
        """What a worker reserves: a CPU, and where there are GPUs one of them, or a share.

        Of its node's memory nothing, but where that ends before the GPUs or CPUs do.
        """
        worker = {"CPU": 1.0, "GPU": 1.0 / per_gpu} if self.use_gpu else {"CPU": 1.0}
        fit = zip(self.nodes, self.slots(worker), strict=True)
        hosts = [(max(1, node.memory - SPARE_BYTES), n) for node, n in fit if node.memory and n]
        if all(n <= memory // WORKER_BYTES for memory, n in hosts):
            return worker
        return worker | {"memory": min(WORKER_BYTES, max(memory for memory, _ in hosts))}

    def slots(self, worker: dict[str, float] | None = None) -> list[int]:
        """Workers that each node holds, where each reserves `worker`, such as one did when a search began."""
        worker = worker or self.worker()
        share, memory = worker.get("GPU"), worker.get("memory")
        fit = [int(min(int(n.gpus) * round(1 / share), n.cpus) if share else n.cpus) for n in self.nodes]
        if not memory:
            return fit
        room = [max(0, int((node.memory - SPARE_BYTES) // memory)) for node in self.nodes]
        return list(map(min, fit, room))

    def strategy(self, workers: int, worker: dict[str, float]) -> Literal["STRICT_PACK", "PACK"]:
        """Ray's word for how one trial's workers are laid: on one node wherever any node is large enough."""
        return "STRICT_PACK" if max(self.slots(worker), default=0) >= workers else "PACK"

    def trials_at_once(self, workers: int, worker: dict[str, float]) -> int:
        """How many trials of so many workers fit, none spread where a node is large enough; 0 where not even one."""
        slots = self.slots(worker)
        return sum(count // workers for count in slots) or sum(slots) // workers

    def place(self, workers: int, per_gpu: int = 1, min_workers: int | None = None) -> Placement:
        """How trials of so many workers run here.

        Where not even one fits, one runs with the workers that do, down to min_workers.
        Raises NoRoomError where there are fewer, and ValueError where workers of one trial would share a GPU.
        """
        if per_gpu > 1 and workers > 1:
            raise ValueError(
                f"trials_per_gpu above 1 needs train.workers: 1, for NCCL wants a whole GPU for every worker, "
                f"but trials_per_gpu is {per_gpu} and train.workers {workers}"
            )
        worker = self.worker(per_gpu)
        most = sum(self.slots(worker))
        name, least = ("train.min_workers", min_workers) if min_workers else ("train.workers", workers)
        if not most:
            raise NoRoomError(
                f"no node has room for a worker, which takes a CPU{' beside its GPU' * self.use_gpu}; add nodes"
            )
        if most < least:
            has = f"{self.what}s{' and memory' * ('memory' in worker)}"
            raise NoRoomError(
                f"{name} must fit the cluster, which has {has} for {most}, but is {least}; "
                f"set {name} to {most} or add nodes"
            )
        return Placement(max(1, self.trials_at_once(workers, worker)), worker)


def trials_per_gpu(peak_bytes: int, total_bytes: int) -> int:
    """Trials that share a GPU, by one's measured peak; a tenth of the memory is left for fragments and the driver."""
    assert peak_bytes > 0
    return max(1, int(0.9 * total_bytes / peak_bytes))


def read() -> Capacity:
    """The capacity of the cluster that this process is connected to, as it is now."""
    nodes: list[dict[str, Any]] = [node["Resources"] for node in ray.nodes() if node["Alive"]]
    return Capacity(
        tuple(Resources(float(r.get("CPU", 0)), float(r.get("GPU", 0)), float(r.get("memory", 0))) for r in nodes)
    )


def with_room(
    room: tuple[int, int, int | None],
    say: Callable[[str], None],
    timeout_s: float = NODES_SECONDS,
    look: Callable[[], Capacity] = read,
    use_gpu: bool = False,
) -> Capacity:
    """The cluster once a trial of that `room`, as `place` takes it, fits: its nodes may still be starting.

    use_gpu: it has to have a GPU, since what was done so far was done on one.

    Raises NoRoomError where none does after so long, and whatever else `place` refuses at once.
    """
    end, waiting = time.monotonic() + timeout_s, False
    while True:
        cluster = look()
        try:
            if use_gpu and not cluster.use_gpu:
                raise NoRoomError("the cluster has no GPU by now, and had one when this began")
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
