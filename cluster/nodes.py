"""A function run on every node of the cluster, and what is installed there."""

import importlib.metadata
import platform
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import ray
from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy


@dataclass(frozen=True)
class Node:
    """A living node; `name` is its host, with the start of Ray's id where several nodes share a host."""

    id: str
    name: str
    gpus: int


def living() -> list[Node]:
    """The nodes of the cluster that this process is connected to."""
    alive = sorted((node for node in ray.nodes() if node["Alive"]), key=lambda node: node["NodeID"])
    hosts = [node["NodeManagerHostname"] for node in alive]
    return [
        Node(
            node["NodeID"],
            host if hosts.count(host) == 1 else f"{host}/{node['NodeID'][:6]}",
            int(node["Resources"].get("GPU", 0)),
        )
        for node, host in zip(alive, hosts, strict=True)
    ]


class NodeGoneError(Exception):
    """The node has died, or left the cluster, before it could answer."""


def on_each(nodes: Sequence[Node], function: Callable[..., Any], *arguments: Any, timeout_s: float = 120) -> list[Any]:
    """What function(*arguments) gives on each node, or the exception it raised there. It waits for no CPU or GPU."""
    remote = ray.remote(num_cpus=0, max_retries=0)(lambda: function(*arguments))
    tasks = [
        remote.options(scheduling_strategy=NodeAffinitySchedulingStrategy(node.id, soft=False)).remote()
        for node in nodes
    ]
    end = time.monotonic() + timeout_s
    outcomes = [_outcome(task, end - time.monotonic()) for task in tasks]
    # Ray takes a while to notice that a node has died, and names it among the living until then.
    alive = {node.id for node in living()} if any(isinstance(outcome, Exception) for outcome in outcomes) else set()
    return [
        NodeGoneError("it has left the cluster") if isinstance(outcome, Exception) and node.id not in alive else outcome
        for node, outcome in zip(nodes, outcomes, strict=True)
    ]


def _outcome(task: Any, seconds: float) -> Any:
    try:
        return ray.get(task, timeout=max(0.0, seconds))
    except ray.exceptions.GetTimeoutError:
        ray.cancel(task, force=True)
        return TimeoutError("no answer in time")
    except ray.exceptions.RayTaskError as error:
        return error.cause
    except ray.exceptions.RayError as error:
        return error


def versions() -> dict[str, str]:
    """Of what has to be the same on all nodes; torch without its build, such as +cu128 or +cpu."""
    try:
        torch = importlib.metadata.version("torch").partition("+")[0]
    except importlib.metadata.PackageNotFoundError:
        torch = "not installed"
    return {"Ray": ray.__version__, "Python": platform.python_version(), "torch": torch}


def differences(here: dict[str, str], there: dict[str, str]) -> str:
    """Such as "torch 2.9.0 instead of 2.14.1"; empty where all is the same."""
    return ", ".join(f"{name} {there[name]} instead of {here[name]}" for name in here if there[name] != here[name])
