"""Workers' places that nobody uses: Ray frees them when its job ends, and a search would wait for them for ever."""

import math
import time

import ray
from ray.util import placement_group_table, remove_placement_group
from ray.util.placement_group import PlacementGroup

IDLE_SECONDS = 60.0  # from a group's place to its first worker Ray Train takes some 10 s on a busy machine


class Leftovers:
    """Finds the placement groups that controllers of Ray Train left behind, and removes them.

    A controller has its group watched only once its workers run. Where it dies before that, with the trial's own
    process or its node, the group keeps its CPUs and GPUs. Such a one is known by this: it is of this job, its bundles
    are a worker's, and none of them is used for a minute.
    """

    def __init__(self, worker: dict[str, float]):
        self.worker = worker
        self._idle_since: dict[str, float] = {}

    def look(self, patience_s: float = IDLE_SECONDS) -> list[str]:
        """Removes the groups that were idle so long, and returns their ids. To be called every few seconds."""
        now = time.monotonic()
        idle = self._unused("CREATED")
        self._idle_since = {key: self._idle_since.get(key, now) for key in idle}
        return _removed([key for key, since in self._idle_since.items() if now - since >= patience_s])

    def clear(self) -> list[str]:
        """Removes all that are left after the last trial, those too that still wait for their place."""
        return _removed(self._unused("CREATED", "PENDING", "RESCHEDULING"))

    def _unused(self, *states: str) -> list[str]:
        free, job = ray.available_resources(), ray.get_runtime_context().get_job_id()
        return [
            key
            for key, group in placement_group_table().items()
            if key.endswith(job)
            and group["state"] in states
            and all(self._is_a_worker_s(bundle) for bundle in group["bundles"].values())
            and (
                group["state"] != "CREATED"
                or free.get(f"CPU_group_{key}", 0) >= sum(bundle["CPU"] for bundle in group["bundles"].values())
            )
        ]

    def _is_a_worker_s(self, bundle: dict[str, float]) -> bool:
        """Ray cuts a share of a GPU after four digits."""
        return bundle.keys() == self.worker.keys() and all(
            math.isclose(bundle[name], amount, rel_tol=1e-3, abs_tol=1e-4) for name, amount in self.worker.items()
        )


def _removed(keys: list[str]) -> list[str]:
    for key in keys:
        remove_placement_group(PlacementGroup(ray.PlacementGroupID(bytes.fromhex(key))))
    return keys
