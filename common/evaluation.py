"""What a checkpoint has learned: embeddings, accuracy, compactness of the classes, verification."""

import itertools
import math
from typing import NamedTuple

import numpy as np

from common.checkpoints import Checkpoints
from common.embedder import BATCH_SIZE, Embedder

VERIFIED_IMAGES = 4000  # 8 million pairs; four digits have some 4,000 test images
FALSE_ACCEPTS = 0.01


class ClusterStatistics(NamedTuple):
    """How compact the classes are, and how far apart, in all dimensions of the embedding.

    Attributes
    ----------
    intra
        Mean over the images of the Euclidean distance of an embedding to the mean of its class.
    inter
        Mean over the pairs of classes of the distance between their means.
    ratio
        intra / inter: the smaller, the more compact the clusters are for their distance.
    """

    intra: float
    inter: float
    ratio: float


class Verification(NamedTuple):
    """How well distance separates pairs of images of one class from pairs of two classes.

    Attributes
    ----------
    auc
        Probability that a pair of one class is closer than a pair of two; 0.5 is chance.
    true_accepts
        Share of the pairs of one class that are closer than all but ``FALSE_ACCEPTS`` of the
        pairs of two.
    """

    auc: float
    true_accepts: float


class Evaluation(NamedTuple):
    """Measurements of one checkpoint on labeled images.

    Attributes
    ----------
    embeddings
        float32 (N, d).
    predicted
        The label (N,) that each image is given, one of ``seen``.
    seen
        The labels of the K classes in training.
    num_classified
        Number of images of those classes, on which the accuracy is measured.
    accuracy
        Share of them that are classified correctly.
    clusters
        Statistics of all classes.
    verification
        By distance, 'Euclidean' and 'cosine', among the images of unseen classes; empty if there
        are fewer than two of them.
    """

    embeddings: np.ndarray
    predicted: np.ndarray
    seen: tuple[int, ...]
    num_classified: int
    accuracy: float
    clusters: ClusterStatistics
    verification: dict[str, Verification]


def center_loss_weight(prefix: str) -> float | None:
    """Return lambda of a run, the operator's ``scale``; None for a network without center loss."""
    for attributes in Checkpoints(prefix).load_symbol().attr_dict().values():
        if attributes.get('op_type') == 'centerloss':
            try:
                return float(attributes.get('scale', 1))
            except ValueError:
                return None
    return None


def embed(
    prefix: str | Checkpoints, epoch: int, images: np.ndarray, batch_size: int = BATCH_SIZE
) -> tuple[np.ndarray, np.ndarray]:
    """Embed images with a checkpoint, on the CPU.

    Parameters
    ----------
    prefix
        Prefix of the checkpoints, or these.
    epoch
        Which of them, counted from 1.
    images
        uint8 (N, height, width), pixels from 0 to 255.
    batch_size
        Images embedded at once, see ``common.embedder.BATCH_SIZE``.

    Returns
    -------
    embeddings : numpy.ndarray
        float32 (N, d).
    logits : numpy.ndarray
        float32 (N, K), one for each class seen in training. The most probable class has the
        largest.

    Raises
    ------
    InputError
        If there is no such checkpoint, if it is not of a network with the layers ``embedding`` and
        ``softmax``, or if the images are not of the right kind.
    """
    image_shape = images.shape[1:] if images.ndim == 3 else None
    return Embedder(prefix, epoch, image_shape).forward(images, batch_size)


def evaluate(
    prefix: str | Checkpoints, epoch: int, images: np.ndarray, labels: np.ndarray
) -> Evaluation:
    """Embed images (N, height, width) with labels (N,) and measure; see :func:`embed`."""
    embedder = Embedder(prefix, epoch, images.shape[1:])
    embeddings, logits = embedder.forward(images)
    is_seen = np.isin(labels, embedder.labels)
    predicted = np.take(embedder.labels, logits.argmax(axis=1))
    correct = (predicted == labels)[is_seen]
    num_unseen = len(np.unique(labels[~is_seen]))
    return Evaluation(
        embeddings,
        predicted,
        embedder.labels,
        num_classified=len(correct),
        accuracy=float(correct.mean()) if len(correct) else math.nan,
        clusters=cluster_statistics(embeddings, labels),
        verification=verify(embeddings[~is_seen], labels[~is_seen]) if num_unseen > 1 else {},
    )


def cluster_statistics(embeddings: np.ndarray, labels: np.ndarray) -> ClusterStatistics:
    """Measure embeddings (N, d) with labels (N,).

    nan stands for what is undefined: inter of a single class, the ratio if all means are equal.
    """
    classes, members = np.unique(labels, return_inverse=True)
    means = np.stack(
        [embeddings[labels == label].mean(axis=0, dtype=np.float64) for label in classes]
    )  # (K, d)
    intra = float(np.linalg.norm(embeddings - means[members], axis=1).mean())
    distances = [np.linalg.norm(one - other) for one, other in itertools.combinations(means, 2)]
    inter = float(np.mean(distances)) if distances else math.nan
    return ClusterStatistics(intra, inter, intra / inter if inter else math.nan)


def verification(embeddings: np.ndarray, labels: np.ndarray) -> Verification:
    """Verify all pairs of embeddings (N, d) with labels (N,) by Euclidean distance.

    On embeddings of length 1 it is verification by cosine: ||x - y||^2 = 2 - 2 cos(x, y), and only
    the order of the distances counts. nan if there are no pairs of one class, or none of two.
    """
    embeddings = embeddings.astype(np.float64)
    same, different = [np.empty(0)], [np.empty(0)]
    for i in range(len(labels) - 1):
        distances = np.linalg.norm(embeddings[i + 1 :] - embeddings[i], axis=1)
        is_same = labels[i + 1 :] == labels[i]
        same.append(distances[is_same])
        different.append(distances[~is_same])
    same, different = np.sort(np.concatenate(same)), np.sort(np.concatenate(different))
    if not len(same) or not len(different):
        return Verification(math.nan, math.nan)
    # For each pair of one class the number of pairs of two that are farther, and equally far.
    farther = len(different) - np.searchsorted(different, same, 'right')
    as_far = len(different) - np.searchsorted(different, same, 'left') - farther
    auc = np.mean(farther + as_far / 2) / len(different)
    # Of several pairs at exactly this distance none is accepted.
    first_reject = different[int(FALSE_ACCEPTS * len(different))]
    true_accepts = np.searchsorted(same, first_reject, 'left') / len(same)
    return Verification(float(auc), float(true_accepts))


def verify(embeddings: np.ndarray, labels: np.ndarray) -> dict[str, Verification]:
    """Verify embeddings (N, d) with labels (N,) by 'Euclidean' and by 'cosine' distance.

    Of more than ``VERIFIED_IMAGES`` images, a fixed random sample of so many is used.
    """
    sample = np.random.default_rng(0).permutation(len(labels))[:VERIFIED_IMAGES]
    embeddings, labels = embeddings[sample], labels[sample]
    lengths = np.linalg.norm(embeddings, axis=1, keepdims=True)
    directions = embeddings / np.maximum(lengths, np.finfo('f').tiny)
    return {
        'Euclidean': verification(embeddings, labels),
        'cosine': verification(directions, labels),
    }
