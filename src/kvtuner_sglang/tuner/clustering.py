"""Layers that are alike choose together: the same surviving pairs, and errors of the same size."""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

SMALLEST = 1e-9  # a KL below it is noise


@dataclass(frozen=True)
class Cluster:
    """Layers, ascending, and the pairs they choose one of for all, as indices into the menu's pairs."""

    layers: tuple[int, ...]
    pairs: tuple[int, ...]


def clusters_of(surviving: Sequence[tuple[int, ...]], kl: np.ndarray, eps: float) -> list[Cluster]:
    """DBSCAN within layers of equal surviving sets, on log10 of their KL (layers, pairs), ordered by first layer.

    eps: the RMS distance over pairs below which two layers are neighbours.  A layer without one is its own cluster.
    """
    from sklearn.cluster import DBSCAN

    found = []
    for pairs in dict.fromkeys(surviving):
        layers = [i for i, own in enumerate(surviving) if own == pairs]
        points = np.log10(np.maximum(kl[np.ix_(layers, pairs)], SMALLEST)) / np.sqrt(len(pairs))
        labels = DBSCAN(eps=eps, min_samples=2).fit_predict(points)
        for label in sorted(set(labels) - {-1}):
            members = [layer for layer, own in zip(layers, labels, strict=True) if own == label]
            found.append(Cluster(tuple(members), pairs))
        found += [Cluster((layer,), pairs) for layer, own in zip(layers, labels, strict=True) if own == -1]
    return sorted(found, key=lambda cluster: cluster.layers)
