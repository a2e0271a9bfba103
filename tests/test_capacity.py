"""How many trials a cluster holds at once."""

import pytest

from cluster import capacity as cluster_capacity
from cluster.capacity import Capacity, NoRoomError, Resources, trials_per_gpu, with_room
from search.cluster_verbs import placement_lines
from search.config import UserError

GIB = 2**30
MIB = 2**20
WORKER = 1023 * MIB  # so that 16 of them leave something of 16 GiB


def capacity(*nodes: tuple[float, ...]) -> Capacity:
    """Of nodes of (cpus, gpus) or (cpus, gpus, bytes of memory)."""
    return Capacity(tuple(Resources(*node) for node in nodes))


@pytest.mark.parametrize(
    ("nodes", "workers", "at_once"),
    [
        ([(1, 0)], 1, 1),
        ([(2, 0)], 1, 2),
        ([(2, 0)], 2, 1),
        ([(3, 0)], 2, 1),
        ([(8, 0), (8, 0)], 3, 4),  # 2 on each node, none across
        ([(2.5, 0)], 1, 2),
        ([(16, 4)], 1, 4),
        ([(16, 8), (16, 8)], 4, 4),
        ([(2, 4)], 1, 2),  # every worker needs a CPU too
        ([(64, 0), (8, 2)], 1, 2),  # beside GPUs, nodes without one train nothing
        ([(64, 0.5)], 2, 32),  # half a GPU is none
        ([(4, 4), (4, 4)], 8, 1),  # larger than any node: spread
        ([(4, 4), (4, 4), (4, 4)], 6, 2),
    ],
)
def test_trials_at_once(nodes, workers, at_once):
    assert capacity(*nodes).place(workers).at_once == at_once


@pytest.mark.parametrize(("nodes", "workers", "what", "most"), [([(2, 0)], 3, "CPUs", 2), ([(8, 1)], 2, "GPUs", 1)])
def test_what_fits_nowhere_is_refused_with_what_would_fit(nodes, workers, what, most):
    with pytest.raises(ValueError, match=rf"{what} for {most}, but is {workers}; set train.workers to {most} or add"):
        capacity(*nodes).place(workers)


def test_no_node_at_all_is_refused():
    with pytest.raises(ValueError, match="add nodes"):
        capacity().place(1)


def test_as_many_workers_as_slots_never_overlap():
    for nodes in ([(3, 0), (5, 0)], [(9, 2), (9, 7)], [(1, 0), (1, 0)]):
        cluster = capacity(*nodes)
        total = sum(cluster.slots())
        for workers in range(1, total + 1):
            assert 1 <= cluster.place(workers).at_once <= total // workers


@pytest.mark.parametrize(
    ("nodes", "workers", "strategy"),
    [
        ([(2, 0), (4, 0)], 3, "STRICT_PACK"),
        ([(2, 0), (2, 0)], 3, "PACK"),
        ([(8, 4)], 4, "STRICT_PACK"),
        ([(64, 0), (2, 2), (2, 2)], 3, "PACK"),  # a node without GPUs holds none
    ],
)
def test_workers_are_spread_only_where_no_node_holds_them(nodes, workers, strategy):
    cluster = capacity(*nodes)
    assert cluster.strategy(workers, cluster.worker()) == strategy


@pytest.mark.parametrize(
    ("begun", "now", "slots"),
    [
        ([(8, 0), (8, 4)], [(8, 0)], [0]),  # the node with GPUs is gone: what is left is none of their place
        ([(8, 0), (8, 4)], [(8, 0), (8, 2)], [0, 2]),
        ([(4, 0)], [(4, 0), (8, 2)], [4, 8]),  # trials that reserve CPUs do so beside GPUs too
    ],
)
def test_slots_are_of_what_a_search_s_workers_reserve_whatever_nodes_there_are_by_now(begun, now, slots):
    assert capacity(*now).slots(capacity(*begun).worker()) == slots


def test_trials_share_a_gpu_and_each_has_a_cpu():
    shared = capacity((16, 2), (3, 2)).place(1, per_gpu=4)
    assert shared.at_once == 8 + 3
    assert shared.worker == {"CPU": 1.0, "GPU": 0.25}
    assert capacity((4, 0)).place(1, per_gpu=4).worker == {"CPU": 1.0}


def test_workers_of_one_trial_never_share_a_gpu():
    with pytest.raises(ValueError, match=r"needs train.workers: 1, .* trials_per_gpu is 2 and train.workers 3"):
        capacity((8, 8)).place(3, per_gpu=2)


@pytest.mark.parametrize(("peak", "trials"), [(80, 1), (100, 1), (20, 4), (9, 10), (45, 2)])
def test_a_measured_peak_says_how_many_trials_share_a_gpu(peak, trials):
    assert trials_per_gpu(peak, 100) == trials


@pytest.mark.parametrize(
    ("nodes", "slots", "reserved"),
    [
        ([(64, 0, 16 * GIB)], [16], WORKER),
        ([(64, 0, 16 * GIB), (8, 0, 64 * GIB)], [16, 8], WORKER),
        ([(8, 0, 16 * GIB)], [8], None),  # of what is not scarce nothing is reserved
        ([(8, 0, 8 * GIB), (2, 0)], [8, 2], None),  # one that was told of no memory
        ([(8, 0, 6 * GIB), (2, 0)], [6, 0], WORKER),  # Ray lends none of it there
        ([(4, 0, GIB / 2)], [1], GIB / 2 - MIB),  # too little for one: tried all the same
        ([(16, 1, 4 * GIB), (64, 0, GIB / 2)], [1, 0], None),
        ([(2, 2, GIB / 4), (64, 0, 9 * GIB)], [1, 0], GIB / 4 - MIB),
    ],
)
def test_workers_are_as_many_as_a_node_has_memory_for(nodes, slots, reserved):
    cluster = capacity(*nodes)
    assert cluster.slots() == slots
    assert cluster.place(1).worker.get("memory") == reserved


@pytest.mark.parametrize("memory", [GIB / 2, GIB, 2 * WORKER, 4 * GIB, 16 * GIB + 1])
def test_workers_leave_the_trials_own_processes_some_of_a_node_s_memory(memory):
    """Each reserves a byte; where it has none left, no worker of its trial ever starts."""
    cluster = capacity((64, 0, memory))
    placement = cluster.place(1)
    assert placement.at_once * (placement.worker["memory"] + 1) <= memory


def test_memory_limits_trials_that_share_a_gpu():
    shared = capacity((64, 1, 4 * GIB)).place(1, per_gpu=10)
    assert shared.at_once == 4
    assert shared.worker == {"CPU": 1.0, "GPU": 0.1, "memory": WORKER}


@pytest.mark.parametrize(("min_workers", "at_once"), [(1, 1), (3, 1), (None, None), (4, None)])
def test_an_elastic_trial_runs_where_its_fewest_workers_fit(min_workers, at_once):
    cluster = capacity((2, 0), (1, 0))
    if at_once:
        assert cluster.place(5, min_workers=min_workers).at_once == at_once
    else:
        with pytest.raises(NoRoomError, match=f"for 3, but is {min_workers or 5}; set .*workers to 3 or add nodes"):
            cluster.place(5, min_workers=min_workers)


def test_nodes_that_start_are_waited_for_and_that_is_said_once(monkeypatch):
    monkeypatch.setattr(cluster_capacity, "LOOK_SECONDS", 0.0)
    seen, said = iter([capacity(), capacity((1, 0)), capacity((1, 0), (2, 0))]), []
    assert with_room((2, 1, None), said.append, look=lambda: next(seen)).slots() == [1, 2]
    assert said == [
        "Waiting for nodes, for 10 minutes at most: no node has room for a worker, which takes a CPU; add nodes"
    ]


def test_what_began_on_a_gpu_waits_for_one(monkeypatch):
    monkeypatch.setattr(cluster_capacity, "LOOK_SECONDS", 0.0)
    looks = iter([capacity((4, 0)), capacity((4, 0), (8, 1))])
    assert with_room((1, 1, None), lambda _: None, look=lambda: next(looks), use_gpu=True).use_gpu
    with pytest.raises(NoRoomError, match="has no GPU by now"):
        with_room((1, 1, None), print, timeout_s=0, look=lambda: capacity((4, 0)), use_gpu=True)


@pytest.mark.parametrize(("room", "wrong"), [((3, 1, None), NoRoomError), ((3, 2, None), ValueError)])
def test_a_cluster_that_will_not_do_is_refused_at_the_end_of_the_wait_or_at_once(room, wrong):
    looks = iter([capacity((2, 0))])
    with pytest.raises(wrong):
        with_room(room, print, timeout_s=0, look=lambda: next(looks))


def test_what_is_said_of_a_cluster_is_said_whole_or_not_at_all():
    assert placement_lines(capacity((4, 0), (1, 0)), 2) == [
        "node 0: 4 workers, one CPU each",
        "node 1: 1 worker, one CPU each",
        "2 trials of 2 workers at once",
    ]
    with pytest.raises(UserError, match=r"for 2, but is 3; set train\.workers to 2 or add nodes"):
        placement_lines(capacity((2, 0)), 3)
