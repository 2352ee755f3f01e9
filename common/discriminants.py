"""An initial embedding that comes from the images: Fisher's linear discriminants."""

import itertools
import logging
import math

import numpy as np

from common.environment import mx
from common.errors import InputError

logger = logging.getLogger(__name__)

NUM_IMAGES = 5000
SHRINKAGE = 0.1


def fisher_discriminants(features: np.ndarray, labels: np.ndarray) -> np.ndarray:
    """Return the directions that separate the classes best, the leading one first.

    Those are the w with the largest ratio of the variance of w^T x between the means of the classes
    to that within a class (Fisher 1936; Rao 1948).

    Parameters
    ----------
    features
        (N, F).
    labels
        (N,).

    Returns
    -------
    np.ndarray
        (m, F), with m one less than the number of classes among the labels.
    """
    classes, index = np.unique(labels, return_inverse=True)
    means = np.stack([features[index == i].mean(axis=0) for i in range(len(classes))])
    deviations = features - means[index]
    within = deviations.T @ deviations / len(features)  # (F, F)
    # Shrunk towards a multiple of the identity, so that it can be inverted from few images; without
    # any variance within a class, that is from one image of each, it is such a multiple.
    variance = np.trace(within) / len(within) or 1
    within += SHRINKAGE * variance * np.eye(len(within))
    between = means - means.mean(axis=0)  # (K, F)
    solved = np.linalg.solve(within, between.T)  # (F, K)
    vectors = np.linalg.eigh(between @ solved)[1][:, ::-1]  # (K, K), the leading one first
    return (solved @ vectors).T[: len(classes) - 1]


def discriminant_params(
    network: mx.sym.Symbol,
    train: mx.io.DataIter,
    initializer: mx.init.Initializer,
    layer: str = 'embedding',
) -> dict[str, mx.nd.NDArray]:
    """Return initial parameters of a network, one of whose layers begins as linear discriminants.

    This layer separates the classes from the first step on, and those that look alike begin as
    neighbors. All other parameters are the initializer's, and so are the lengths of the layer's
    weight vectors. Where there are more of these than discriminants, the others stay random.

    Parameters
    ----------
    network
        Any, with a dense layer.
    train
        The training data, ``NUM_IMAGES`` of which are used; it has to be rewound afterwards.
    initializer
        Of the other parameters.
    layer
        Name of the dense layer.

    Returns
    -------
    dict
        The parameters by name.

    Raises
    ------
    InputError
        If the network has no dense layer of this name.

    Examples
    --------
    >>> module = fit(network, data, initial_params=discriminant_params)
    """
    layers = network.get_internals()
    if not {f'{layer}_output', f'{layer}_weight'} <= {*layers.list_outputs()}:
        raise InputError(f'the network has no layer {layer} to begin as linear discriminants')
    features = mx.sym.flatten(layers[f'{layer}_output'].get_children()[0])
    module = mx.mod.Module(
        mx.sym.Group([network, features]),
        data_names=[name for name, *_ in train.provide_data],
        label_names=[name for name, *_ in train.provide_label],
    )
    module.bind(train.provide_data, train.provide_label, for_training=False)
    module.init_params(initializer)
    found, labels = [], []
    for batch in itertools.islice(train, math.ceil(NUM_IMAGES / train.batch_size)):
        module.forward(batch, is_train=False)
        found.append(module.get_outputs()[-1].asnumpy())
        labels.append(batch.label[0].asnumpy())
    features, labels = np.concatenate(found), np.concatenate(labels)

    logger.info('%s begins as linear discriminants of %d images', layer, len(labels))
    params = module.get_params()[0]
    weight = params[f'{layer}_weight'].asnumpy()  # (d, F)
    if weight.ndim != 2:
        raise InputError(f'the layer {layer} is not dense: it cannot begin as linear discriminants')
    directions = fisher_discriminants(features.astype(float), labels)[: len(weight)]
    norms = np.linalg.norm(directions, axis=1, keepdims=True)
    if norms.all():  # else all images are the same
        lengths = np.linalg.norm(weight[: len(directions)], axis=1, keepdims=True)
        weight[: len(directions)] = lengths * directions / norms
    params[f'{layer}_weight'][:] = weight
    if f'{layer}_bias' in params:  # the embeddings lie around the origin
        params[f'{layer}_bias'][:] = -weight @ features.mean(axis=0)
    return params
