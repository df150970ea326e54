"""What is thrown away is beaten, and only layers that are alike choose together."""

import numpy as np

from kvtuner_sglang.tuner.clustering import Cluster, clusters_of
from kvtuner_sglang.tuner.pruning import pareto, surviving

BITS = [2.0, 3.0, 3.0, 4.0, 8.0]


def test_the_front_has_what_no_other_beats():
    assert pareto(BITS, [0.5, 0.2, 0.3, 0.2, 0.0]) == [0, 1, 4]
    assert pareto(BITS, [0.0, 0.2, 0.3, 0.2, 0.0]) == [0]
    assert pareto([3.0, 3.0], [0.1, 0.1]) == [0]


def test_every_layer_keeps_its_own_front():
    kl = np.array([[0.5, 0.2, 0.3, 0.2, 0.0], [0.5, 0.4, 0.3, 0.1, 0.2]])
    assert surviving(BITS, kl) == [(0, 1, 4), (0, 2, 3)]


def test_layers_with_equal_sets_and_like_errors_are_one_cluster():
    kl = np.array([[0.5, 0.1], [0.51, 0.1], [0.5, 0.001], [0.5, 0.1], [0.505, 0.1]])
    kept = [(0, 1), (0, 1), (0, 1), (1,), (0, 1)]
    assert clusters_of(kept, kl, 0.1) == [Cluster((0, 1, 4), (0, 1)), Cluster((2,), (0, 1)), Cluster((3,), (1,))]
    assert len(clusters_of(kept, kl, 3.0)) == 2  # sets that differ never join
    assert len(clusters_of(kept, kl, 1e-6)) == 5


def test_an_error_of_zero_is_no_infinite_distance():
    assert clusters_of([(0,), (0,)], np.array([[0.0], [1e-12]]), 0.1) == [Cluster((0, 1), (0,))]
