"""Checks of a cluster before money is spent: each says what it found, and what to do where that is wrong."""

import contextlib
import os
import time
import uuid
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any, Literal, Protocol

import ray
from ray._private import state as ray_state
from ray.util.state import list_placement_groups

from cluster import nodes, probes
from cluster.nodes import Node

SKEW_WARN_S, SKEW_FAIL_S = 2.0, 30.0  # a lease is given up after 60 s
SLOW, BUSY = 0.5, 0.9  # of the fastest like node; of a GPU's memory

Verdict = Literal["pass", "warn", "fail"]


@dataclass(frozen=True)
class Finding:
    """One row of what the doctor says; `node` is empty where it is about the cluster."""

    check: str
    node: str
    verdict: Verdict
    found: str
    remedy: str = ""


class Files(Protocol):
    """A folder: the run's storage, which is handed in."""

    uri: str

    def write(self, path: str, content: bytes) -> None: ...
    def read(self, path: str) -> bytes: ...
    def names(self, path: str = "") -> list[str]: ...
    def delete(self, path: str) -> None: ...


def examine(storage: Files, more: dict[str, tuple[Callable[[], str], str]]) -> Iterator[Finding]:
    """Every check, as it is done. more: name → (what is done on each node and says what it found, the remedy)."""
    living = nodes.living()
    yield from check_versions(living)
    answers = nodes.on_each(living, os.getpid)
    found = [node for node, answer in zip(living, answers, strict=True) if not isinstance(answer, Exception)]
    yield from check_devices(found)
    yield from check_storage(storage, found)
    yield from check_clocks(found)
    yield from check_security(found)
    for name, (probe, remedy) in more.items():
        for node, said in zip(found, nodes.on_each(found, probe, timeout_s=600), strict=True):
            broken = isinstance(said, Exception)
            yield Finding(name, node.name, "fail" if broken else "pass", str(said), remedy if broken else "")
    yield from check_placement_groups()


def check_versions(found: Sequence[Node]) -> Iterator[Finding]:
    """Ray, Python and torch of every node against this machine's."""
    here = nodes.versions()
    for node, there in zip(found, nodes.on_each(found, nodes.versions), strict=True):
        if isinstance(there, Exception):
            say = f"runs nothing of ours: {there}"
            yield Finding("versions", node.name, "fail", say, "see the node's runtime_env_setup log")
            continue
        different = nodes.differences(here, there)
        text = ", ".join(f"{name} {number}" for name, number in there.items())
        remedy = "install the versions of the machine that starts searches" if different else ""
        yield Finding("versions", node.name, "fail" if different else "pass", different or text, remedy)


def check_devices(found: Sequence[Node]) -> Iterator[Finding]:
    """CUDA, driver, memory and a timed matmul of every GPU; the CPU's matmul where there is none."""
    measured = list(zip(found, nodes.on_each(found, probes.devices, timeout_s=400), strict=True))
    best: dict[str, float] = {}
    for _, seen in measured:
        for device in [] if isinstance(seen, Exception) else seen["devices"]:
            best[device["name"]] = max(best.get(device["name"], 0.0), device["rate"])
    for node, seen in measured:
        if isinstance(seen, Exception):
            yield Finding("devices", node.name, "fail", f"torch does not compute: {seen}", "install torch anew there")
            continue
        yield judge_devices(node, seen, best)


def judge_devices(node: Node, seen: dict[str, Any], best: dict[str, float]) -> Finding:
    """The verdict on one node's devices; best: a device's name → the highest rate of the cluster, in TFLOP/s."""
    devices = seen["devices"]
    gpus = [device for device in devices if "memory" in device]

    def describe(device: dict[str, Any]) -> str:
        free = ", {:.0f} of {:.0f} GiB free".format(*device["memory"]) if "memory" in device else ""
        return f"{device['name']}, {device['rate']:.3g} TFLOP/s{free}"

    text = "; ".join(describe(device) for device in devices)
    if gpus:
        text += f"; CUDA {seen['cuda']}, driver {seen['driver'] or 'unknown'}"
    if len(gpus) < node.gpus:
        say = f"Ray was told of {node.gpus} GPUs, torch sees {len(gpus)}: {text}"
        return Finding("devices", node.name, "fail", say, "install a torch with CUDA and a driver that it runs on")
    if len(gpus) > node.gpus:
        say = f"torch sees {len(gpus)} GPUs, Ray was told of {node.gpus}: {text}"
        return Finding("devices", node.name, "warn", say, "start the node with ray start --num-gpus")
    if any(d["memory"][0] < BUSY * d["memory"][1] for d in gpus):
        return Finding("devices", node.name, "warn", text, "end what holds the GPU's memory: nvidia-smi shows it")
    if any(d["rate"] < SLOW * best[d["name"]] for d in devices):
        return Finding("devices", node.name, "warn", f"slower than its like: {text}", "end what else runs there")
    return Finding("devices", node.name, "pass", text)


def check_storage(storage: Files, found: Sequence[Node]) -> Iterator[Finding]:
    """Each node writes a file, and every one reads all of them."""
    folder, names = f".doctor-{uuid.uuid4().hex}", [node.id for node in found]

    def write() -> None:
        own = ray.get_runtime_context().get_node_id()
        storage.write(f"{folder}/{own}", own.encode())

    def missing() -> list[str]:
        seen = set(storage.names(folder))
        return [name for name in names if name not in seen or storage.read(f"{folder}/{name}") != name.encode()]

    try:
        writing, reading = nodes.on_each(found, write), nodes.on_each(found, missing)
        storage.write(f"{folder}/driver", b"")
        here = missing()
    except OSError as error:
        yield Finding("storage", "", "fail", f"{storage.uri}: {error}", "give a --storage that can be written")
        return
    finally:
        nodes.on_each(found, lambda: storage.delete(folder))
        with contextlib.suppress(OSError):  # what is wrong with it has been said
            storage.delete(folder)
    named = {node.id: node.name for node in found}
    share = "give a --storage that all share: NFS, s3://bucket/folder or gs://bucket/folder"
    for node, wrote, lacks in zip(found, writing, reading, strict=True):
        if isinstance(wrote, Exception) or isinstance(lacks, Exception):
            problem = wrote if isinstance(wrote, Exception) else lacks
            yield Finding("storage", node.name, "fail", f"cannot use {storage.uri}: {problem}", share)
        elif lacks or node.id in here:
            unseen = [named[name] for name in lacks] + ["this machine"] * (node.id in here)
            yield Finding("storage", node.name, "fail", f"{storage.uri} is not shared with {', '.join(unseen)}", share)
        else:
            yield Finding("storage", node.name, "pass", f"{storage.uri} is read and written")


def check_clocks(found: Sequence[Node]) -> Iterator[Finding]:
    """Every node's clock against this machine's."""
    for node in found:
        asked = time.time()
        (told,) = nodes.on_each([node], time.time)
        if not isinstance(told, Exception):
            yield judge_clock(node.name, told - (asked + time.time()) / 2, (time.time() - asked) / 2)


def judge_clock(name: str, skew: float, uncertainty: float) -> Finding:
    """skew: seconds that a node is ahead; the way there and back makes it uncertain."""
    off = max(0.0, abs(skew) - uncertainty)
    verdict: Verdict = "fail" if off > SKEW_FAIL_S else "warn" if off > SKEW_WARN_S else "pass"
    remedy = "" if verdict == "pass" else "let chrony or systemd-timesyncd set the clock"
    return Finding("clock", name, verdict, f"{skew:+.2f} s ± {uncertainty:.2f} s from this machine's", remedy)


def check_security(found: Sequence[Node]) -> Iterator[Finding]:
    """Token authentication, and what listens beyond the node itself."""
    for node, seen in zip(found, nodes.on_each(found, probes.security), strict=True):
        if isinstance(seen, Exception):
            yield Finding("security", node.name, "fail", str(seen), "run the doctor again")
            continue
        beyond = {ip: names for ip, names in seen["listening"].items() if ip not in ("127.0.0.1", "::1")}
        text = "token " + ("asked for" if seen["token"] else "not asked for") + "; listens on "
        text += ", ".join(sorted({*beyond} or {"loopback alone"}))
        if seen["mode"] is not None and seen["mode"] & 0o077:
            say = f"others can read the token file (mode {seen['mode']:o}); {text}"
            yield Finding("security", node.name, "fail", say, "chmod 600 ~/.ray/auth_token")
        elif not seen["token"] and beyond:
            how = "who reaches a port runs code there: start every node with RAY_AUTH_MODE=token and the same token"
            yield Finding("security", node.name, "fail", text, how)
        elif any("dashboard" in name.lower() and "agent" not in name.lower() for ip in beyond for name in beyond[ip]):
            how = "ray start --dashboard-host 127.0.0.1, and reach it through ssh -L 8265:127.0.0.1:8265"
            yield Finding("security", node.name, "warn", f"the dashboard is open; {text}", how)
        else:
            yield Finding("security", node.name, "pass", text)


def check_placement_groups() -> Iterator[Finding]:
    """Placement groups that outlived the run that made them hold CPUs and GPUs for ever."""
    try:
        groups = list_placement_groups(address=ray.get_runtime_context().gcs_address, detail=True, limit=10_000)
    except Exception as error:
        yield Finding("placement groups", "", "warn", f"cannot be listed: {error}", "start the head's dashboard")
        return
    kept = [group for group in groups if group.state != "REMOVED"]
    over = {job["JobID"] for job in ray_state.jobs() if job["IsDead"]}
    left = [group for group in kept if group.creator_job_id in over]
    if left:
        how = "; ".join(f"ray.util.remove_placement_group of {group.placement_group_id}" for group in left[:3])
        yield Finding("placement groups", "", "fail", f"{len(left)} left by runs that are over", how)
    elif len(kept):
        say = f"{len(kept)} of runs that are at work"
        yield Finding("placement groups", "", "warn", say, "wait for them, or share the cluster knowingly")
    else:
        yield Finding("placement groups", "", "pass", "none")
