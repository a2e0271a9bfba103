"""How many trials a cluster holds at once."""

import pytest

from cluster.capacity import Capacity, Node


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
    assert capacity(*nodes).trials_at_once(workers) == at_once


@pytest.mark.parametrize(("nodes", "workers", "what", "most"), [([(2, 0)], 3, "CPUs", 2), ([(8, 1)], 2, "GPUs", 1)])
def test_what_fits_nowhere_is_refused_with_what_would_fit(nodes, workers, what, most):
    with pytest.raises(ValueError, match=rf"{what} for {most}, but is {workers}; set train.workers to {most} or add"):
        capacity(*nodes).trials_at_once(workers)


def test_no_node_at_all_is_refused():
    with pytest.raises(ValueError, match="add nodes"):
        capacity().trials_at_once(1)


def test_as_many_workers_as_slots_never_overlap():
    for nodes in ([(3, 0), (5, 0)], [(9, 2), (9, 7)], [(1, 0), (1, 0)]):
        cluster = capacity(*nodes)
        total = sum(cluster.slots())
        for workers in range(1, total + 1):
            assert 1 <= cluster.trials_at_once(workers) <= total // workers
