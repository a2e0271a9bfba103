"""A place that nobody will use is given back, and no other."""

import os
import subprocess
import sys

import pytest

pytestmark = [pytest.mark.slow, pytest.mark.ray]
# As a controller of Ray Train reserves its workers' places: it dies before they are there, or with them at work.
LEAVE = """
import json, os, time
import ray
from ray.util import placement_group, placement_group_table
from ray.util.scheduling_strategies import PlacementGroupSchedulingStrategy
from cluster import connect
from cluster.leftovers import Leftovers

class Worker:
    pass

class Controller:
    def reserve(self, bundles):
        self.group = placement_group(bundles)
        self.group.wait(60)
        return self.group.id.hex()

    def start(self):
        place = PlacementGroupSchedulingStrategy(self.group)
        self.worker = ray.remote(num_cpus=1)(Worker).options(scheduling_strategy=place).remote()
        ray.get(self.worker.__ray_ready__.remote())

    def die(self):
        os._exit(1)

with connect.connected():
    actors = [ray.remote(num_cpus=0)(Controller).remote() for _ in range(3)]
    asked = ([{"CPU": 1}], [{"CPU": 1}], [{"memory": 1}])
    dead, at_work, trial = (ray.get(a.reserve.remote(bundles)) for a, bundles in zip(actors, asked))
    ray.get(actors[1].start.remote())
    waiting = placement_group([{"CPU": 1}] * (os.cpu_count() + 1)).id.hex()  # for more than there is
    try:
        ray.get(actors[0].die.remote())
    except ray.exceptions.RayActorError:
        pass
    end, found = time.monotonic() + 60, []
    leftovers = Leftovers({"CPU": 1.0})
    first = leftovers.look(patience_s=2)
    while not found and time.monotonic() < end:
        time.sleep(1)
        found = leftovers.look(patience_s=2)
    time.sleep(3)
    states = {key: group["state"] for key, group in placement_group_table().items()}
    print(json.dumps([first, found == [dead], states[dead], states[at_work], states[trial], leftovers.look(2)]))
    print(json.dumps([leftovers.clear() == [waiting], leftovers.clear()]))
"""


def test_what_a_dead_controller_reserved_is_given_back_and_what_is_used_or_a_trial_s_is_not(tmp_path, tmp_path_factory):
    environment = {**os.environ, "HOME": str(tmp_path), "RAY_TMPDIR": str(tmp_path_factory.mktemp("r"))}
    said = subprocess.run((sys.executable, "-c", LEAVE), env=environment, capture_output=True, text=True, timeout=200)
    assert said.stdout.splitlines()[-2:] == [
        '[[], true, "REMOVED", "CREATED", "CREATED", []]',
        "[true, []]",
    ], said.stderr
