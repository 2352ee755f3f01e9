"""What a checkpoint has learned: embeddings, accuracy, compactness of the classes, verification."""

import itertools
import math
from typing import NamedTuple

import numpy as np

from common.environment import mx
from common.checkpoints import Checkpoints
from common.errors import InputError
from common.symbol_file import parameter_mismatches

VERIFIED_IMAGES = 4000  # 8 million pairs: all test images of four digits
FALSE_ACCEPTS = 0.01
MAX_VALUES = 2**31  # of all layers for one batch: what a network of another program may allocate


class ClusterStatistics(NamedTuple):
    """How compact the classes are, and how far apart, in all dimensions of the embedding.

    Attributes
    ----------
    intra
        Mean over the images of the Euclidean distance of an embedding to the mean of its class.
    inter
        Mean over the pairs of classes of the distance between their means.
    ratio
        intra / inter: the smaller, the better the classes are separated.
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
    """Measurements of one checkpoint on labelled images.

    Attributes
    ----------
    embeddings
        float32 (N, d).
    num_seen
        K, the number of classes in training, which are the labels 0 to K-1.
    num_classified
        Number of images of those classes, on which the accuracy is measured.
    accuracy
        Share of them that are classified correctly.
    clusters
        Statistics of all classes.
    verification
        By distance, 'Euclidean' and 'cosine', among the images of unseen classes; empty if there
        are none.
    """

    embeddings: np.ndarray
    num_seen: int
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
    prefix: str | Checkpoints, epoch: int, images: np.ndarray, batch_size: int = 100
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
        Images embedded at once. More are not faster and take more memory: with LeNet++ 0.3 GB for
        100 of them, 2.5 GB for 1,000.

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
    if images.dtype != np.uint8 or images.ndim != 3 or not images.size:
        raise InputError(
            'images to embed have to be uint8 of shape (N, height, width), with pixels from 0 to '
            f'255, not {images.dtype} {images.shape}'
        )
    checkpoints = prefix if isinstance(prefix, Checkpoints) else Checkpoints(prefix)
    arg_params, aux_params = checkpoints.load_params(epoch)
    layers = checkpoints.load_symbol().get_internals()
    height, width = images.shape[1:]
    batch_size = min(batch_size, len(images))
    try:
        # Without the softmax and the center loss no labels are needed.
        outputs = mx.sym.Group(
            [layers['embedding_output'], layers['softmax_output'].get_children()[0]]
        )
        shapes = {'data': (batch_size, 1, height, width)}
        if any(
            why != 'which the network does not have'
            for _, why in parameter_mismatches(
                outputs, shapes, arg_params, aux_params, max_values=MAX_VALUES
            )
        ):
            raise ValueError
        module = mx.mod.Module(outputs, label_names=None, context=mx.cpu())
        # Bound for inference, MXNet would fuse a convolution with its tanh; for 20 and 50 channels
        # that takes twice as long.
        module.bind(list(shapes.items()), for_training=True)
        module.set_params(arg_params, aux_params, allow_extra=True)
    except (mx.MXNetError, RuntimeError, ValueError, TypeError):
        raise InputError(
            f'{checkpoints.symbol_path} and {checkpoints.params_path(epoch)} are not a network of '
            f'train.py for images of {height} x {width} pixels and its parameters: train again, '
            'or choose another prefix'
        ) from None
    results = []
    for first in range(0, len(images), batch_size):
        batch = images[first : first + batch_size, None]  # (B, 1, height, width)
        pixels = np.multiply(batch, np.float32(1 / 256), dtype=np.float32)
        module.forward(mx.io.DataBatch([mx.nd.array(pixels)]), is_train=False)
        results.append([output.asnumpy() for output in module.get_outputs()])
    embeddings, logits = (np.concatenate(arrays) for arrays in zip(*results, strict=True))
    if not np.isfinite(embeddings).all():
        raise InputError(
            f'{checkpoints.params_path(epoch)} embeds images as numbers that are not finite: '
            'choose an earlier epoch'
        )
    return embeddings, logits


def evaluate(
    prefix: str | Checkpoints, epoch: int, images: np.ndarray, labels: np.ndarray
) -> Evaluation:
    """Embed images (N, height, width) with labels (N,) and measure; see :func:`embed`."""
    embeddings, logits = embed(prefix, epoch, images)
    num_seen = logits.shape[1]
    seen = labels < num_seen
    correct = logits[seen].argmax(axis=1) == labels[seen]
    return Evaluation(
        embeddings,
        num_seen,
        num_classified=len(correct),
        accuracy=float(correct.mean()) if len(correct) else math.nan,
        clusters=cluster_statistics(embeddings, labels),
        verification={} if seen.all() else verify_unseen(embeddings, labels, num_seen),
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


def verify_unseen(
    embeddings: np.ndarray, labels: np.ndarray, num_seen: int
) -> dict[str, Verification]:
    """Verify the classes from ``num_seen`` on, by 'Euclidean' and by 'cosine' distance.

    Of more than ``VERIFIED_IMAGES`` images, a fixed random sample of so many is used.
    """
    unseen = np.random.default_rng(0).permutation(np.flatnonzero(labels >= num_seen))
    embeddings, labels = (array[unseen[:VERIFIED_IMAGES]] for array in (embeddings, labels))
    lengths = np.linalg.norm(embeddings, axis=1, keepdims=True)
    directions = embeddings / np.maximum(lengths, np.finfo('f').tiny)
    return {
        'Euclidean': verification(embeddings, labels),
        'cosine': verification(directions, labels),
    }
