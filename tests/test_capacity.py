"""How many trials a cluster holds at once."""

import pytest

from cluster.capacity import Capacity, Node, trials_per_gpu


def capacity(*nodes: tuple[float, float]) -> Capacity:
    return Capacity(tuple(Node(cpus, gpus) for cpus, gpus in nodes))


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
