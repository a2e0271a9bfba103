"""Nodes, CPUs and GPUs → how many trials run at once."""

from dataclasses import dataclass

import ray


@dataclass(frozen=True)
class Node:
    """What one node has for workers."""

    cpus: float
    gpus: float


@dataclass(frozen=True)
class Capacity:
    """What a cluster can hold. `slots` counts workers: a GPU each where there are GPUs, else a CPU each."""

    nodes: tuple[Node, ...]

    @property
    def use_gpu(self) -> bool:
        return any(node.gpus >= 1 for node in self.nodes)

    def slots(self) -> list[int]:
        """Workers that each node holds."""
        if self.use_gpu:
            return [int(min(node.gpus, node.cpus)) for node in self.nodes]
        return [int(node.cpus) for node in self.nodes]

    def trials_at_once(self, workers: int) -> int:
        """Trials of so many workers that fit at once, each on one node where a node is large enough.

        Raises ValueError where not even one fits.
        """
        slots = self.slots()
        packed = sum(count // workers for count in slots)
        if packed:
            return packed
        if sum(slots) < workers:
            what = "GPUs" if self.use_gpu else "CPUs"
            raise ValueError(
                f"train.workers must fit the cluster, which has {what} for {sum(slots)}, but is {workers}; "
                f"set train.workers to {max(sum(slots), 1)} or add nodes"
            )
        return sum(slots) // workers  # larger than any node: spread


def read() -> Capacity:
    """The capacity of the cluster that this process is connected to."""
    nodes = [node["Resources"] for node in ray.nodes() if node["Alive"]]
    return Capacity(tuple(Node(float(r.get("CPU", 0)), float(r.get("GPU", 0))) for r in nodes))
