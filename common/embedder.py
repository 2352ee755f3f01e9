"""A trained network for images of one's own: embeddings, classes, distances to the centers.

    from common.embedder import Embedder

    embedder = Embedder('center_loss')
    embedded = embedder(images)  # uint8 (N, 28, 28)
    embedded.embeddings, embedded.classes, embedded.is_unlike_all

Nothing here needs labels, or a run in progress.
"""

from collections.abc import Sequence
import os
from pathlib import Path
from typing import NamedTuple

import numpy as np

from common.environment import mx
from common.checkpoints import Checkpoints
from common.data_facts import check_data_facts
from common.errors import InputError
from common.module import find_center_losses
from common.symbol_file import NOT_IN_NETWORK, parameter_mismatches

# Images embedded at once. More are not faster and take more memory: with LeNet++ 0.3 GB for 100 of
# them, 2.5 GB for 1,000.
BATCH_SIZE = 100
TRAINED = Path(__file__).resolve().parent.parent / 'data' / 'trained' / 'center_loss'
MAX_VALUES = 2**31  # of all layers for one batch: what a network of another program may allocate


def choose_run(model_prefix: str | None) -> str:
    """Return the given prefix, else center_loss if it has a checkpoint, else the included one."""
    if model_prefix is not None:
        return model_prefix
    return 'center_loss' if Checkpoints('center_loss').epochs() else os.path.relpath(TRAINED)


class Embedded(NamedTuple):
    """What a network says of N images.

    Attributes
    ----------
    embeddings
        float32 (N, d).
    probabilities
        float32 (N, K), the softmax over the classes.
    distances
        float32 (N, K), Euclidean, of each embedding to the center of each class; None for a network
        without centers.
    rejection_distance
        See :class:`Embedder`.
    """

    embeddings: np.ndarray
    probabilities: np.ndarray
    distances: np.ndarray | None
    rejection_distance: float | None = None

    @property
    def classes(self) -> np.ndarray:
        """The position in ``Embedder.class_names`` of each image's most probable class, int64 (N,).

        ``Embedder.labels`` has its label in the data: another number with ``--classes``.
        """
        return self.probabilities.argmax(axis=1)

    @property
    def is_unlike_all(self) -> np.ndarray:
        """Whether an image is like none of the classes, bool (N,).

        That is one whose nearest center is farther than ``rejection_distance``; without centers or
        that distance, none is.
        """
        if self.distances is None or self.rejection_distance is None:
            return np.zeros(len(self.embeddings), bool)
        return self.distances.min(axis=1) > self.rejection_distance


class Embedder:
    """A trained network, bound once for inference on the CPU. It is not thread-safe.

    Parameters
    ----------
    checkpoints
        Prefix of the checkpoints, or these.
    epoch
        Which of them, counted from 1; by default the newest.
    image_shape
        (height, width), where the checkpoint does not say it.

    Attributes
    ----------
    dataset
        What the run was trained on: 'mnist', 'mnist-5k', 'fashion-mnist', 'custom'. 'mnist' where
        an older checkpoint does not say it.
    class_names, labels
        K names, and the labels that these classes have in the data set.
    image_shape
        (height, width); (28, 28) where an older checkpoint does not say it.
    centers
        float32 (K, d), or None for a network without center loss.
    rejection_distance
        The 99th percentile of the distance of a validation image to the center of its own class.
        None where an older checkpoint does not say it.

    Raises
    ------
    InputError
        If there is no such checkpoint, or if it is not of a network with the layers ``embedding``
        and ``softmax``.
    """

    def __init__(
        self,
        checkpoints: str | os.PathLike | Checkpoints,
        epoch: int | None = None,
        image_shape: Sequence[int] | None = None,
    ):
        if not isinstance(checkpoints, Checkpoints):
            checkpoints = Checkpoints(checkpoints)
        if epoch is None:
            epoch = max(checkpoints.epochs(), default=None)
            if epoch is None:
                raise InputError(
                    f'there is no checkpoint of {checkpoints.prefix}: run python train.py first, '
                    'or name another run'
                )
        self.checkpoints, self.epoch = checkpoints, epoch
        facts, source = checkpoints.load_inference(epoch), str(checkpoints.params_path(epoch))
        check_data_facts(facts, source)
        trained_shape = tuple(facts.get('image_shape', image_shape or (28, 28)))
        self.image_shape = tuple(image_shape or trained_shape)
        if self.image_shape != trained_shape:
            raise InputError(
                '{} was trained on images of {} x {} pixels, and these have {} x {}: take others, '
                'or another run'.format(source, *trained_shape, *self.image_shape)
            )
        arg_params, aux_params = checkpoints.load_params(epoch)
        network = checkpoints.load_symbol()
        self.dataset = facts.get('dataset', 'mnist')
        self.rejection_distance = facts.get('rejection_distance')
        self._module = self._bind(network, arg_params, aux_params)
        (_, (_, dimension)), (_, (_, num_classes)) = self._module.output_shapes
        check_data_facts(facts, source, num_classes)
        names = [*facts.get('class_names', ())]
        names += map(str, range(len(names), num_classes))
        self.class_names = tuple(names[:num_classes])
        self.labels = tuple(facts.get('classes', range(num_classes)))
        centers = [aux_params.get(name) for name, _ in find_center_losses(network)]
        self.centers = next(
            (c.asnumpy() for c in centers if c is not None and c.shape == (num_classes, dimension)),
            None,
        )

    @property
    def description(self) -> str:
        """One line about the network: its file, its data, and the rejection distance."""
        unlike = 'it was saved without the distance beyond which images are like none of them'
        if self.rejection_distance is not None:
            unlike = f'like none of them beyond a distance of {self.rejection_distance:.3f}'
        return (
            f'{self.checkpoints.params_path(self.epoch)}: trained on {self.dataset}, '
            f'{len(self.class_names)} classes, {unlike}'
        )

    def _bind(self, network, arg_params, aux_params):
        """Return a Module with the outputs embeddings (B, d) and logits (B, K)."""
        layers = network.get_internals()
        shapes = {'data': (BATCH_SIZE, 1, *self.image_shape)}
        try:
            # Without the softmax and the center loss no labels are needed.
            outputs = mx.sym.Group(
                [layers['embedding_output'], layers['softmax_output'].get_children()[0]]
            )
            mismatches = parameter_mismatches(
                outputs, shapes, arg_params, aux_params, max_values=MAX_VALUES
            )
            if any(why != NOT_IN_NETWORK for _, why in mismatches):  # as the centers are
                raise ValueError
            module = mx.mod.Module(outputs, label_names=None, context=mx.cpu())
            # Bound for inference, MXNet would fuse a convolution with its tanh; for 20 and 50
            # channels that takes twice as long.
            module.bind(list(shapes.items()), for_training=True)
            module.set_params(arg_params, aux_params, allow_extra=True)
            if any(len(shape) != 2 for _, shape in module.output_shapes):
                raise ValueError
        except (mx.MXNetError, RuntimeError, ValueError, TypeError):
            height, width = self.image_shape
            raise InputError(
                f'{self.checkpoints.symbol_path} and {self.checkpoints.params_path(self.epoch)} '
                f'are not a network of train.py for images of {height} x {width} pixels and its '
                'parameters: train again, or choose another prefix'
            ) from None
        return module

    def __call__(self, images: np.ndarray) -> Embedded:
        """Embed images.

        Parameters
        ----------
        images
            uint8 (N, height, width), pixels from 0 to 255 as the network was trained on: of MNIST,
            light digits on black.

        Raises
        ------
        InputError
            If the images are not of this type and shape, or their embeddings are not finite.
        """
        embeddings, logits = self.forward(images)
        powers = np.exp(logits - logits.max(axis=1, keepdims=True))
        probabilities = powers / powers.sum(axis=1, keepdims=True)
        distances = None
        if self.centers is not None:
            distances = np.linalg.norm(embeddings[:, None] - self.centers, axis=2)
        return Embedded(embeddings, probabilities, distances, self.rejection_distance)

    def forward(
        self, images: np.ndarray, batch_size: int = BATCH_SIZE
    ) -> tuple[np.ndarray, np.ndarray]:
        """Return embeddings (N, d) and logits (N, K) of images; for errors see ``__call__``."""
        images = np.asarray(images)
        wanted = 'uint8 of shape (N, {}, {}), with pixels from 0 to 255'.format(*self.image_shape)
        if images.dtype != np.uint8 or images.shape[1:] != self.image_shape or not len(images):
            raise InputError(
                f'images to embed have to be {wanted}, not {images.dtype} {images.shape}'
            )
        if images.min() == 0 and images.max() == 1:
            raise InputError(f'images to embed have to be {wanted}, not from 0 to 1')
        results = []
        for first in range(0, len(images), batch_size):
            batch = images[first : first + batch_size, None]  # (B, 1, height, width)
            pixels = np.multiply(batch, np.float32(1 / 256), dtype=np.float32)
            self._module.forward(mx.io.DataBatch([mx.nd.array(pixels)]), is_train=False)
            results.append([output.asnumpy() for output in self._module.get_outputs()])
        embeddings, logits = (np.concatenate(arrays) for arrays in zip(*results, strict=True))
        if not np.isfinite(embeddings).all():
            raise InputError(
                f'{self.checkpoints.params_path(self.epoch)} embeds images as numbers that are not '
                'finite: choose an earlier epoch'
            )
        return embeddings, logits

    def network(self) -> tuple[mx.sym.Symbol, dict, dict]:
        """Return the network up to embedding and logits, its weights and its other states."""
        return (self._module.symbol, *self._module.get_params())
