"""The digits: where they are found, how their files are checked and read, and the iterators.

MNIST and Fashion-MNIST come as four IDX files each. They are read from ``--data-dir`` where it is
given. Without it they are looked for in ``data/<dataset>/`` beside this file, then (Fashion-MNIST)
where Debian's package puts them, and then downloaded; ``--dataset=auto`` falls back to the 5,000
digits in ``data/mnist-5k/``.
Checksums are those of the decompressed files, so that any container of the same data passes.
"""

import argparse
from collections.abc import Callable, Sequence
import hashlib
import logging
import math
import os
from pathlib import Path
from typing import NamedTuple

import numpy as np

from common.environment import mx
from center_loss import memory_view
from common.download import download
from common.errors import InputError
from common.files import printable
from common.idx import read_idx

logger = logging.getLogger(__name__)

FOLDER = Path(__file__).resolve().parent / 'data'
DEBIAN_FOLDERS = {'fashion-mnist': Path('/usr/share/datasets/fashion-mnist')}
FILES = (
    'train-images-idx3-ubyte',
    'train-labels-idx1-ubyte',
    't10k-images-idx3-ubyte',
    't10k-labels-idx1-ubyte',
)


class Dataset(NamedTuple):
    """SHA-256 of the raw ``FILES``, names of the classes, folders to download from."""

    sha256: tuple[str, ...]
    class_names: tuple[str, ...]
    mirrors: tuple[str, ...] = ()


DATASETS = {
    'mnist': Dataset(
        (
            'ba891046e6505d7aadcbbe25680a0738ad16aec93bde7f9b65e87a2fc25776db',
            '65a50cbbf4e906d70832878ad85ccda5333a97f0f4c3dd2ef09a8a9eef7101c5',
            '0fa7898d509279e482958e8ce81c8e77db3f2f8254e26661ceb7762c4d494ce7',
            'ff7bcfd416de33731a308c3f266cc351222c34898ecbeaf847f06e48f7ec33f2',
        ),
        tuple('0123456789'),
        (
            'https://ossci-datasets.s3.amazonaws.com/mnist/',
            'https://storage.googleapis.com/cvdf-datasets/mnist/',
        ),
    ),
    'fashion-mnist': Dataset(
        (
            'c59f468a2f672dc815687fe0f83887768d799fd8a3f3276145d20f83aa44d888',
            'bad3541b69d912435c50bb6ba87bec294ff4f6a2e1246121d8633921760443d9',
            '5b4141f0afbad91edebe8549f8fcffe087ea10ca49f1dbef5c9a5cd8815ce37b',
            '0402a96d92fd2663957122ceb108a494c5af83dab82d92729df917d7dec38c34',
        ),
        (
            *('T-shirt', 'Trouser', 'Pullover', 'Dress', 'Coat'),
            *('Sandal', 'Shirt', 'Sneaker', 'Bag', 'Ankle boot'),
        ),
        (
            'https://storage.googleapis.com/tensorflow/tf-keras-datasets/',
            'https://raw.githubusercontent.com/zalandoresearch/fashion-mnist/master/data/fashion/',
        ),
    ),
    'mnist-5k': Dataset(
        (
            'df907b1daff37d9019b2398e4c0ee537bb81cab90adf5d8abe5aa6f42ce203e2',
            '879f54c9fa7f1c5fce6daf8bba0809d673264cca3d0688e6eae5665679e25665',
            '540509082a594c58eb87c35f1c340847beb6cba219b71d11ad30a3470ebb51db',
            '626d335582945cbb7f23115c77eebce3e88fbccc8458a114bac9a3ce2449a9e7',
        ),
        tuple('0123456789'),
    ),
}


class Digits(NamedTuple):
    """A data set in memory: uint8 images (N, H, W) and labels (N,), class names by label.

    ``dataset`` is a name in ``DATASETS`` or 'custom', ``source`` where the files were found,
    ``sha256`` a digest of all four.
    """

    train_images: np.ndarray
    train_labels: np.ndarray
    val_images: np.ndarray
    val_labels: np.ndarray
    class_names: tuple[str, ...]
    dataset: str
    source: str
    sha256: str


def add_data_arguments(parser: argparse.ArgumentParser, of_run: bool = False) -> None:
    """Declare ``--dataset`` and ``--data-dir``, which :func:`load_digits` takes.

    ``of_run`` is for a program that shows a trained network, see :func:`load_digits_of_run`.
    """
    group = parser.add_argument_group('data')
    auto = 'mnist, or if that is unavailable mnist-5k'
    if of_run:
        auto = 'the data set of the run, or, if that is mnist and unavailable, mnist-5k'
    group.add_argument(
        '--dataset',
        choices=['auto', *DATASETS],
        default='auto',
        help=f'auto: {auto}, the 5,000 digits that come with the program; with --data-dir, '
        'whatever is there',
    )
    group.add_argument(
        '--data-dir',
        metavar='DIR',
        help='folder of the four IDX files, .gz or not, of any image size and up to 256 classes; '
        'nothing is downloaded then (without it: data/<dataset>/, downloaded if missing)',
    )


def mnist_iterator(
    batch_size: int,
    input_shape: tuple[int, ...] | None = None,
    dataset: str = 'auto',
    data_dir: str | os.PathLike | None = None,
    seed: int = 0,
    num_examples: int | None = None,
    num_classes: int | None = None,
    classes: Sequence[int] | None = None,
    validate_on: str = 'test',
    num_parts: int = 1,
    part_index: int = 0,
) -> tuple['DualLabelIter', 'DualLabelIter']:
    """Return iterators over the training and the validation images.

    Training: full batches in an order that depends on the seed and the epoch alone. Validation:
    every image once. Data that are unavailable or too few raise an InputError. ``train.data_facts``
    is what a checkpoint says of the data, for the use of the network: the name of the data set, the
    classes that are used and their names, the shape of the images.

    Parameters
    ----------
    batch_size
        Images in a batch of this worker.
    input_shape
        Shape of one image in a batch: (1, H, W) by default, (784,) for flat ones.
    dataset, data_dir
        As in :func:`load_digits`.
    num_examples
        Train on the first N images only (of the classes that are used).
    num_classes, classes
        Use only the images of these classes, or of the classes 0 to ``num_classes`` - 1. A batch
        has them as labels 0, 1, ..., in the order that is given.
    validate_on
        'test', or 'held-out': a sixth of the training images, the same for every seed, which are
        not trained on.
    num_parts, part_index
        Number of workers, which share the images of a step, and which of them this is.
    """
    digits = load_digits(dataset, data_dir)
    images, labels, val_images, val_labels = digits[:4]
    if classes is None:
        classes = range(num_classes or len(digits.class_names))
    if max(classes) >= len(digits.class_names):
        raise InputError(
            f'{digits.dataset} has the classes 0 to {len(digits.class_names) - 1}, and no class '
            f'{max(classes)}'
        )
    positions = np.full(len(digits.class_names), -1)
    positions[list(classes)] = np.arange(len(classes))
    labels, val_labels = positions[labels], positions[val_labels]
    input_shape = (1, *images.shape[1:]) if input_shape is None else tuple(input_shape)
    if math.prod(input_shape) != images[0].size:
        raise InputError(f'input shape {input_shape} does not hold {_size(images)} pixels')
    index, val_index, val_name = np.arange(len(labels)), np.arange(len(val_labels)), 'test images'
    if validate_on == 'held-out':
        order = np.random.default_rng(0).permutation(len(labels))
        index, val_index = np.sort(order[len(order) // 6 :]), np.sort(order[: len(order) // 6])
        val_images, val_labels, val_name = images, labels, 'held-out training images'
    elif validate_on != 'test':
        raise InputError(f'--validate-on={validate_on} is neither test nor held-out')
    index = index[labels[index] >= 0][:num_examples]
    val_index = val_index[val_labels[val_index] >= 0]
    num_batches = len(index) // (num_parts * batch_size)
    if num_batches == 0:
        total = num_parts * batch_size
        taken = f'{num_parts} workers take {total}, more' if num_parts > 1 else 'it takes more'
        raise InputError(
            f'--batch-size={batch_size} is too large: {taken} images than the {len(index)} there '
            f'are to train on ({digits.dataset})'
        )
    if not len(val_index):
        named = ', '.join(map(str, classes))
        raise InputError(f'{digits.dataset} has no {val_name} of the classes {named}')
    logger.info(
        f'data: {digits.dataset}, {len(index)} training images, validation on {len(val_index)} '
        f'{val_name}, from {digits.source}'
    )

    def shuffled(epoch):
        order = np.random.default_rng((seed, epoch)).permutation(len(index))
        order = order[: num_batches * num_parts * batch_size]
        return index[order].reshape(num_batches, num_parts, batch_size)[:, part_index]

    def each_once(epoch):
        # Of nearly equal size: several devices could not share a last batch of an image or two.
        return np.array_split(val_index, math.ceil(len(val_index) / batch_size))

    train = DualLabelIter(images, labels, input_shape, shuffled)
    train.data_facts = {
        'dataset': digits.dataset,
        'sha256': digits.sha256,
        'classes': list(classes),
        'class_names': [digits.class_names[label] for label in classes],
        'image_shape': list(images.shape[1:]),
    }
    return train, DualLabelIter(val_images, val_labels, input_shape, each_once)


def _described(inputs):
    """Return the inputs of an iterator, which may be plain tuples, as MXNet describes its own."""
    return [desc if isinstance(desc, mx.io.DataDesc) else mx.io.DataDesc(*desc) for desc in inputs]


def _dual_label(shape, dtype=np.float32):
    return [mx.io.DataDesc(name, shape, dtype) for name in ('softmax_label', 'center_label')]


def _check_labels(labels, num_classes):
    """Raise InputError for a label that is no class; any is one where ``num_classes`` is None."""
    if num_classes is None:
        return
    valid = (labels >= 0) & (labels < num_classes) & (labels == np.trunc(labels))
    if not valid.all():
        raise InputError(
            f'label {labels[~valid][0]:.9g} is not a whole number from 0 to {num_classes - 1}'
        )


class DualLabelIter(mx.io.DataIter):
    """Batches of images with their labels twice: ``softmax_label`` and ``center_label``.

    A batch is ``data`` (B, *input_shape), float32, the pixel values / 256 as MNISTIter has them,
    and two labels (B,), float32. ``num_batches`` is the number of batches in an epoch.

    Parameters
    ----------
    images, labels
        uint8 (N, H, W) and (N,).
    input_shape
        Shape of one image in a batch.
    batches_of_epoch
        ``batches_of_epoch(epoch)`` returns the positions of the images of each batch.
    num_classes
        K; if given, a label that is not a whole number from 0 to K - 1 raises an InputError here.
    """

    def __init__(
        self,
        images: np.ndarray,
        labels: np.ndarray,
        input_shape: tuple[int, ...],
        batches_of_epoch: Callable[[int], Sequence[np.ndarray]],
        num_classes: int | None = None,
    ):
        _check_labels(labels, num_classes)
        self.images = images.reshape(len(images), *input_shape)
        self.labels = labels.astype(np.float32)
        self.batches_of_epoch = batches_of_epoch
        self.start_epoch(0)
        self.num_batches = len(self.batches)
        super().__init__(len(self.batches[0]))
        self.provide_data = [mx.io.DataDesc('data', (self.batch_size, *input_shape))]
        self.provide_label = _dual_label((self.batch_size,))

    def start_epoch(self, epoch: int) -> None:
        """Go to the beginning of an epoch, counted from 0."""
        self.epoch = epoch
        self.batches = self.batches_of_epoch(epoch)
        self.position = 0

    def reset(self) -> None:
        """Go to the beginning of the next epoch."""
        self.start_epoch(self.epoch + 1)

    def next(self) -> mx.io.DataBatch:
        """Return the next batch of this epoch."""
        if self.position == self.num_batches:
            raise StopIteration
        index = self.batches[self.position]
        self.position += 1
        # mx.nd.array would wait for the engine: 0.3 ms, 3% of a step of LeNet with 32 images.
        data = mx.nd.empty((len(index), *self.images.shape[1:]), ctx=mx.cpu())
        label = mx.nd.empty(len(index), ctx=mx.cpu())
        np.multiply(self.images[index], 1 / 256, out=memory_view(data), dtype=np.float32)
        memory_view(label)[:] = self.labels[index]
        return mx.io.DataBatch([data], [label, label], pad=0)


class DualLabelWrapper(mx.io.DataIter):
    """An iterator with one label as one that has it twice: ``softmax_label``, ``center_label``.

    Every image counts once: what pads a batch is cut off (a Module binds itself for the size of
    each batch). ``num_batches`` and ``start_epoch`` exist if the iterator has them.

    Parameters
    ----------
    iterator
        NDArrayIter, MNISTIter, ImageRecordIter and CSVIter (with round_batch, their default),
        PrefetchingIter, or any other that yields one label for each image. MXNet cannot rewind
        MNISTIter, ImageRecordIter and CSVIter for sure: wrap them before anything is read.
    num_classes
        K; if given, a label that is not a whole number from 0 to K - 1 raises an InputError.
    """

    def __init__(self, iterator: mx.io.DataIter, num_classes: int | None = None):
        label, *more = _described(iterator.provide_label) or [mx.io.DataDesc('none', (0, 0))]
        batch_size, *rest = label.shape
        if more or math.prod(rest) != 1:
            raise InputError(f'one label for each image is needed, not {iterator.provide_label}')
        super().__init__(batch_size)
        self.iterator = iterator
        self.num_classes = num_classes
        self.provide_data = _described(iterator.provide_data)
        self.provide_label = _dual_label((batch_size,), label.dtype)
        for name in ('num_batches', 'start_epoch'):
            if hasattr(iterator, name):
                setattr(self, name, getattr(iterator, name))
        # MXNet's iterators in C++ pad the last batch with the first images of the next epoch, which
        # then begins behind them, and after the first epoch ImageRecordIter's `pad` may be wrong.
        # So they are read as an endless stream of images, of which every epoch takes as many as the
        # first one had; what is left of a batch is carried over.
        source = getattr(iterator, 'iters', [iterator])[0]  # of a PrefetchingIter
        self.is_endless = isinstance(source, mx.io.MXDataIter)
        self.num_images, self.num_read, self.num_seen, self.carried = math.inf, 0, 0, None
        # What NDArrayIter calls `pad` then are images that the last epoch has left out.
        self.rolls_over = getattr(source, 'last_batch_handle', None) == 'roll_over'

    def reset(self) -> None:
        """Go to the beginning of the next epoch."""
        self.num_seen = 0
        if not self.is_endless:
            self.iterator.reset()

    def next(self) -> mx.io.DataBatch:
        """Return the next batch of this epoch, without padding."""
        if self.num_seen == self.num_images:
            raise StopIteration
        arrays, self.carried = self.carried or self._read(), None
        size = min(len(arrays[-1]), self.num_images - self.num_seen)
        if size < len(arrays[-1]):
            self.carried = [array[size:].copy() for array in arrays]
        self.num_seen += size
        *data, label = (array[:size] for array in arrays)
        if self.num_classes is not None:
            _check_labels(label.asnumpy(), self.num_classes)
        return mx.io.DataBatch(data, [label, label], pad=0)

    def _read(self):
        """Return the data and the label of a batch."""
        try:
            batch = self.iterator.next()
        except StopIteration:
            if not self.is_endless:
                raise
            self.iterator.reset()
            self.num_images = min(self.num_images, self.num_read)
            if self.num_seen == self.num_images:
                raise
            batch = self.iterator.next()
        arrays = [*batch.data, batch.label[0].reshape((-1,))]
        size = self.batch_size - (0 if self.rolls_over else batch.pad or 0)
        if not self.is_endless:
            return [array[:size] for array in arrays]
        self.num_read += size
        if size < self.batch_size:
            self.num_images = min(self.num_images, self.num_read)
        return arrays


def load_digits(dataset: str = 'auto', data_dir: str | os.PathLike | None = None) -> Digits:
    """Find, check and read a data set. If there is none, an InputError says what was tried.

    Parameters
    ----------
    dataset
        A name in ``DATASETS``. 'auto' is MNIST, with the bundled digits as the last resort; in a
        ``data_dir``, whatever is there.
    data_dir
        Folder of the four IDX files, each as NAME.gz or NAME. Without it: ``data/<dataset>/``,
        Debian's folder, a download.
    """
    name = 'mnist' if dataset == 'auto' else dataset
    if name not in DATASETS:
        raise InputError(f'--dataset={name} is not one of auto, {", ".join(DATASETS)}')
    if data_dir is not None:
        return read_folder(Path(os.path.expanduser(data_dir)), None if dataset == 'auto' else name)
    folder, failures = FOLDER / name, []
    for place in filter(None, (folder, DEBIAN_FOLDERS.get(name))):
        if any(os.path.lexists(find_file(place, file)) for file in FILES):
            try:
                return read_folder(place, name)
            except InputError as error:
                logger.warning(str(error))
                failures.append(str(error))
    if DATASETS[name].mirrors:
        sha256 = zip((f'{file}.gz' for file in FILES), DATASETS[name].sha256, strict=True)
        try:
            download(name, DATASETS[name].mirrors, folder, dict(sha256), digest_of)
            return read_folder(folder, name)
        except InputError as error:
            failures.append(str(error))
    what_to_do = f'put its four IDX files into {printable(folder)} or use --data-dir'
    if dataset != 'auto':
        raise InputError(f'{name} is unavailable ({"; ".join(failures)}): {what_to_do}')
    logger.warning(
        f'MNIST is unavailable ({"; ".join(failures)}): falling back to mnist-5k, 5,000 of its '
        f'digits. For all of them, {what_to_do}'
    )
    return read_folder(FOLDER / 'mnist-5k', 'mnist-5k')


def load_digits_of_run(
    run: str,
    trained_on: str | None,
    dataset: str = 'auto',
    data_dir: str | os.PathLike | None = None,
) -> Digits:
    """Read the data that a command line names, else those that a run was trained on.

    Where that was MNIST and it is not found, the bundled digits take its place. A run of an
    earlier version does not know its data (None): they are taken for MNIST. ``run`` is its name
    in the InputError where the data have to be named.
    """
    if dataset == 'auto' and data_dir is None and trained_on not in (None, 'mnist'):
        if trained_on not in DATASETS:  # 'custom', or what a program of the user calls its data
            raise InputError(
                f'{run} was trained on data of your own: name their folder with --data-dir'
            )
        dataset = trained_on
    return load_digits(dataset, data_dir)


def read_folder(folder: Path, name: str | None) -> Digits:
    """Read the four files of a folder and compare them with the checksums of data set ``name``.

    None stands for whatever is there: a known data set, or images of any size and their labels.
    """
    paths = [find_file(folder, file) for file in FILES]
    arrays, digests = zip(*map(read_idx, paths), strict=True)
    source, sha256 = printable(folder), hashlib.sha256(''.join(digests).encode()).hexdigest()
    for known in DATASETS if name is None else [name]:
        if DATASETS[known].sha256 == digests:
            return Digits(*arrays, DATASETS[known].class_names, known, source, sha256)
    if name is not None:
        for path, digest, expected in zip(paths, digests, DATASETS[name].sha256, strict=True):
            if digest != expected:
                raise InputError(
                    f'{printable(path)} is not of {name}: its SHA-256 is {digest}, not {expected}'
                )
    images, labels, val_images, val_labels = arrays
    if [array.ndim for array in arrays] != [3, 1, 3, 1]:
        raise InputError(f'{source}: images need 3 dimensions, labels 1')
    if (len(images), len(val_images)) != (len(labels), len(val_labels)):
        raise InputError(
            f'{source}: {len(images)} + {len(val_images)} images do not fit {len(labels)} + '
            f'{len(val_labels)} labels'
        )
    if images[0].shape != val_images[0].shape:
        raise InputError(f'{source}: images of {_size(images)} and of {_size(val_images)} pixels')
    if images.max() == 1:
        raise InputError(
            f'{source}: the pixels of the training images are from 0 to 1, not from 0 to 255: '
            'multiply them by 255'
        )
    num_classes = int(labels.max()) + 1
    if val_labels.max() >= num_classes:
        raise InputError(
            f'{source}: label {val_labels.max()} at position {val_labels.argmax()} of {FILES[3]} '
            f'is larger than those of {FILES[1]}'
        )
    logger.warning(
        f'the files in {source} are of no data set known here and used as they are: images of '
        f'{_size(images)} pixels, {num_classes} classes'
    )
    return Digits(*arrays, tuple(map(str, range(num_classes))), 'custom', source, sha256)


def find_file(folder: Path, file: str) -> Path:
    """Return the path of a file that may be there as ``file.gz``, else that of ``file``."""
    compressed = folder / f'{file}.gz'
    return compressed if os.path.lexists(compressed) else folder / file


def _size(images):
    return ' x '.join(map(str, images.shape[1:]))


def digest_of(path: Path) -> str | None:
    """Return the SHA-256 of the raw form of an IDX file, or None if it is not one."""
    try:
        return read_idx(path)[1]
    except InputError:
        return None
