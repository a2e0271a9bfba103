"""Nodes, CPUs and GPUs → how many trials run at once, and how their workers are placed."""

from dataclasses import dataclass
from typing import Any, Literal

import ray


@dataclass(frozen=True)
class Node:
    """What one node has for workers."""

    cpus: float
    gpus: float


@dataclass(frozen=True)
class Placement:
    """Trials at once, and what each of a trial's workers reserves."""

    at_once: int
    worker: dict[str, float]


@dataclass(frozen=True)
class Capacity:
    """What a cluster can hold. Slots count workers: a GPU (or a share of one) and a CPU each, or a CPU alone."""

    nodes: tuple[Node, ...]

    @property
    def use_gpu(self) -> bool:
        return any(node.gpus >= 1 for node in self.nodes)

    def worker(self, per_gpu: int = 1) -> dict[str, float]:
        """What a worker reserves: a CPU, and where there are GPUs one of them, or a share."""
        return {"CPU": 1.0, "GPU": 1.0 / per_gpu} if self.use_gpu else {"CPU": 1.0}

    def slots(self, worker: dict[str, float] | None = None) -> list[int]:
        """Workers that each node holds, where each reserves `worker`, such as one did when a search began."""
        share = (worker or self.worker()).get("GPU")
        return [int(min(int(n.gpus) * round(1 / share), n.cpus) if share else n.cpus) for n in self.nodes]

    def strategy(self, workers: int, worker: dict[str, float]) -> Literal["STRICT_PACK", "PACK"]:
        """Ray's word for how one trial's workers are laid: on one node wherever any node is large enough."""
        return "STRICT_PACK" if max(self.slots(worker), default=0) >= workers else "PACK"

    def trials_at_once(self, workers: int, worker: dict[str, float]) -> int:
        """How many trials of so many workers fit, none spread where a node is large enough; 0 where not even one."""
        slots = self.slots(worker)
        return sum(count // workers for count in slots) or sum(slots) // workers

    def place(self, workers: int, per_gpu: int = 1) -> Placement:
        """How trials of so many workers run here.

        Raises ValueError where not even one fits, or where workers of one trial would share a GPU.
        """
        if per_gpu > 1 and workers > 1:
            raise ValueError(
                f"trials_per_gpu above 1 needs train.workers: 1, for NCCL wants a whole GPU for every worker, "
                f"but trials_per_gpu is {per_gpu} and train.workers {workers}"
            )
        worker = self.worker(per_gpu)
        at_once = self.trials_at_once(workers, worker)
        if not at_once:
            what, most = "GPUs" if self.use_gpu else "CPUs", sum(self.slots(worker))
            raise ValueError(
                f"train.workers must fit the cluster, which has {what} for {most}, but is {workers}; "
                f"set train.workers to {max(most, 1)} or add nodes"
            )
        return Placement(at_once, worker)


def trials_per_gpu(peak_bytes: int, total_bytes: int) -> int:
    """Trials that share a GPU, by one's measured peak; a tenth of the memory is left for fragments and the driver."""
    assert peak_bytes > 0
    return max(1, int(0.9 * total_bytes / peak_bytes))


def read() -> Capacity:
    """The capacity of the cluster that this process is connected to, as it is now."""
    nodes: list[dict[str, Any]] = [node["Resources"] for node in ray.nodes() if node["Alive"]]
    return Capacity(tuple(Node(float(r.get("CPU", 0)), float(r.get("GPU", 0))) for r in nodes))
