"""The arrangement of the classes in the plane: which of them are neighbors, and which matter.

Two classes are neighbors if an edge of the Delaunay triangulation joins their centers. An image
that looks like two classes lies between their clusters; where these are no neighbors, a third
class has its place there.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from common.checkpoints import Checkpoints
from common.embedder import Embedder
from common.errors import InputError
from data import Digits
from vis import draw_embeddings, make_panel

if TYPE_CHECKING:
    from matplotlib.figure import Figure
    from matplotlib.tri import Triangulation


def triangulation(centers: Sequence[Sequence[float]]) -> Triangulation:
    """Return the Delaunay triangulation of centers (K, 2).

    Raises
    ------
    InputError
        If there is none: fewer than three centers, or all on one line.
    """
    from matplotlib.tri import Triangulation

    try:
        return Triangulation(*np.asarray(centers, float).T)
    except (RuntimeError, ValueError):
        raise InputError(
            f'{len(centers)} centers have no Delaunay triangulation: it takes three that are not '
            'on one line'
        ) from None


def neighbors(centers: Sequence[Sequence[float]]) -> set[tuple[int, int]]:
    """Return the pairs (i, j), i < j, of the centers (K, 2) that are neighbors."""
    return {(min(edge), max(edge)) for edge in triangulation(centers).edges.tolist()}


def confusions(labels: np.ndarray, predicted: np.ndarray) -> dict[str, int]:
    """Count the images of one class that were taken for another: {'4-9': 17}, i < j.

    ``labels`` and ``predicted`` are (N,); both directions of a pair are counted together.
    """
    wrong = labels != predicted
    pairs = np.sort(np.stack([labels[wrong], predicted[wrong]], axis=1).astype(int), axis=1)
    found, counts = np.unique(pairs, axis=0, return_counts=True)
    return {f'{i}-{j}': count for (i, j), count in zip(found, counts.tolist(), strict=True)}


def share_between_neighbors(centers: Sequence[Sequence[float]], reference: dict[str, int]) -> float:
    """Return the share of the confusions whose two classes are neighbors.

    ``reference`` are those of a network with a larger embedding, in which any two classes can be
    neighbors: it confuses digits that look alike. It has to have some.
    """
    if not reference:
        raise InputError('the reference runs have no confusions: none of them is whole')
    adjacent = {f'{i}-{j}' for i, j in neighbors(centers)}
    between = sum(count for pair, count in reference.items() if pair in adjacent)
    return between / sum(reference.values())


def draw_arrangements(
    prefixes: Sequence[Path], names: Sequence[str], shares: Sequence[float], digits: Digits
) -> Figure:
    """Draw the test images as each run's newest checkpoint embeds them, and the neighbors."""
    panels, centers = [], []
    for prefix, name, share in zip(prefixes, names, shares, strict=True):
        checkpoints = Checkpoints(prefix)
        epoch = max(checkpoints.epochs())
        panel = make_panel(checkpoints, epoch, name, digits, 'test')
        caption = f'{panel.caption}\n{share:.1%} of the reference confusions are between neighbors'
        panels.append(panel._replace(caption=caption))
        centers.append(Embedder(checkpoints, epoch).centers)
    figure = draw_embeddings(panels, digits.class_names)
    for ax, points in zip(figure.axes, centers, strict=True):
        ax.triplot(triangulation(points), color='0.7', lw=0.8, zorder=0.5)
    return figure
