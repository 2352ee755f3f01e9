"""The digits: where they are found, how their files are checked and read, and the iterators.

MNIST and Fashion-MNIST come as four IDX files each. They are looked for in ``--data-dir``, else in
``data/<dataset>/`` beside this file, else (Fashion-MNIST) where Debian's package puts them, else
they are downloaded. ``--dataset auto`` falls back to the 5,000 digits in ``data/mnist-5k/``.
Checksums are those of the decompressed files, so that any container of the same data passes.
Other data under the same four names are taken as they are, with their own image size and classes.
"""

import argparse
import gzip
import hashlib
import io
import logging
import math
import os
import struct
import time
import zlib
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import BinaryIO, NamedTuple
from urllib.parse import urljoin, urlsplit

import numpy as np

from common.download import DownloadError, SlowNetworkError, fetch
from common.environment import mx
from common.errors import InputError
from common.files import replace_when_whole

FOLDER = Path(__file__).resolve().parent / 'data'
DEBIAN_FOLDERS = {'fashion-mnist': Path('/usr/share/datasets/fashion-mnist')}

FILES = (
    'train-images-idx3-ubyte',
    'train-labels-idx1-ubyte',
    't10k-images-idx3-ubyte',
    't10k-labels-idx1-ubyte',
)
MAX_FILE_SIZE = 1 << 30  # bytes before compression; EMNIST's largest file has half of it
MAX_DOWNLOAD_SIZE = 64_000_000  # bytes; the largest of the files has 47 million uncompressed
MAX_DOWNLOAD_SECONDS = 300


class Dataset(NamedTuple):
    """What is known of a data set: SHA-256 of its raw ``FILES``, class names, mirrors."""

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
        ('T-shirt', 'Trouser', 'Pullover', 'Dress', 'Coat')
        + ('Sandal', 'Shirt', 'Sneaker', 'Bag', 'Ankle boot'),
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
    """A data set in memory.

    Images are uint8 (N, H, W), labels uint8 (N,); ``class_names`` are in the order of the labels;
    ``dataset`` is a name in ``DATASETS`` or 'custom', ``source`` where the files were found.
    """

    train_images: np.ndarray
    train_labels: np.ndarray
    val_images: np.ndarray
    val_labels: np.ndarray
    class_names: tuple[str, ...]
    dataset: str
    source: str


def add_data_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare ``--dataset``, ``--data-dir`` and ``--validate-on``."""
    group = parser.add_argument_group('data')
    group.add_argument(
        '--dataset',
        choices=['auto', *DATASETS],
        default='auto',
        help='data set: auto is mnist where it is found or can be downloaded, else mnist-5k, the '
        '5,000 digits that come with the program; with --data-dir, whatever is in there',
    )
    group.add_argument(
        '--data-dir',
        metavar='DIR',
        help='folder of the four IDX files, .gz or not, of any image size and up to 256 classes; '
        'nothing is downloaded then (default: data/<dataset>/, else a download to there)',
    )
    group.add_argument(
        '--validate-on',
        choices=['test', 'held-out'],
        default='test',
        help='images that every epoch is validated on: the test images, or a sixth of the training '
        'images, the same for every --seed, which are not trained on: use these to choose options',
    )


def mnist_iterator(
    batch_size: int,
    input_shape: tuple[int, ...] | None = None,
    dataset: str = 'auto',
    data_dir: str | os.PathLike | None = None,
    seed: int = 0,
    num_examples: int | None = None,
    num_classes: int | None = None,
    validate_on: str = 'test',
    num_parts: int = 1,
    part_index: int = 0,
) -> tuple['DualLabelIter', 'DualLabelIter']:
    """Return iterators over the training and the validation images.

    Parameters
    ----------
    batch_size
        B, images in a batch of this worker.
    input_shape
        Shape of one image in a batch, (784,) for flat ones; (1, H, W) by default.
    dataset, data_dir
        As in :func:`load_digits`.
    seed
        Of the shuffles. The order of an epoch depends on the seed and the epoch alone.
    num_examples
        Train only on the first so many images (of the classes that are used).
    num_classes
        Train and validate only on the images of the classes 0 to ``num_classes`` - 1.
    validate_on
        'test': the test images. 'held-out': a sixth of the training images, the same for every
        seed, which are not trained on.
    num_parts, part_index
        Number of workers, and which of them this is: they share every total batch of
        ``num_parts * batch_size`` images.

    Returns
    -------
    train, val : DualLabelIter
        ``train``: a fresh shuffle every epoch, full batches only. ``val``: every image exactly
        once, in batches of up to B.

    Raises
    ------
    InputError
        For data that are unavailable or invalid, and for too few images to fill a batch.
    """
    digits = load_digits(dataset, data_dir)
    image_shape = digits.train_images.shape[1:]
    input_shape = (1, *image_shape) if input_shape is None else tuple(input_shape)
    if math.prod(input_shape) != math.prod(image_shape):
        raise InputError(
            f'input shape {input_shape} does not hold an image of {_product(image_shape)} pixels'
        )
    held_out = validate_on == 'held-out'
    train_positions = np.arange(len(digits.train_images))
    val_positions = np.arange(len(digits.val_images))
    if held_out:
        train_positions, val_positions = hold_out(len(digits.train_images))
        digits = digits._replace(val_images=digits.train_images, val_labels=digits.train_labels)
    elif validate_on != 'test':
        raise InputError(f"validate_on={validate_on!r} is neither 'test' nor 'held-out'")
    if num_classes is not None:
        train_positions = train_positions[digits.train_labels[train_positions] < num_classes]
        val_positions = val_positions[digits.val_labels[val_positions] < num_classes]
    train_positions = train_positions[:num_examples]

    total_batch = num_parts * batch_size
    num_batches = len(train_positions) // total_batch
    if num_batches == 0:
        taken = f'{num_parts} workers take {total_batch}' if num_parts > 1 else 'it takes more'
        raise InputError(
            f'--batch-size={batch_size} is too large: {taken} images than the '
            f'{len(train_positions)} there are to train on ({digits.dataset})'
        )
    val_name = 'held-out training images' if held_out else 'test images'
    if not len(val_positions):
        of_classes = '' if num_classes is None else f' of the classes 0 to {num_classes - 1}'
        raise InputError(f'{digits.dataset} has no {val_name}{of_classes} to validate on')
    logging.info(
        'data: %s, %d training images, validation on %d %s, from %s',
        digits.dataset,
        len(train_positions),
        len(val_positions),
        val_name,
        digits.source,
    )

    def shuffled(epoch):
        order = np.random.default_rng((seed, epoch)).permutation(len(train_positions))
        order = train_positions[order[: num_batches * total_batch]]
        return order.reshape(num_batches, num_parts, batch_size)[:, part_index]

    def each_once(epoch):
        # Of nearly equal size: several devices could not share a last batch of an image or two.
        return np.array_split(val_positions, math.ceil(len(val_positions) / batch_size))

    return (
        DualLabelIter(digits.train_images, digits.train_labels, input_shape, shuffled),
        DualLabelIter(digits.val_images, digits.val_labels, input_shape, each_once),
    )


def hold_out(num_images: int) -> tuple[np.ndarray, np.ndarray]:
    """Return the positions to train on and those of the sixth that is held out, both ascending."""
    order = np.random.default_rng(0).permutation(num_images)
    num_held_out = num_images // 6
    return np.sort(order[num_held_out:]), np.sort(order[:num_held_out])


def _dual_label_descriptions(shape, dtype=np.float32):
    return [mx.io.DataDesc(name, shape, dtype) for name in ('softmax_label', 'center_label')]


class DualLabelIter(mx.io.DataIter):
    """Batches of images with their labels twice: ``softmax_label`` and ``center_label``.

    A batch is ``data`` (B, *input_shape), float32, the pixel values / 256 as MNISTIter has them,
    and two labels (B,), float32. ``num_batches`` is the number of batches in an epoch.

    Parameters
    ----------
    images
        uint8 (N, H, W). They stay bytes until their batch is due.
    labels
        uint8 (N,).
    input_shape
        Shape of one image in a batch.
    batches_of_epoch
        ``batches_of_epoch(epoch)`` returns the positions of the images of every batch, a sequence
        of int arrays.
    """

    def __init__(
        self,
        images: np.ndarray,
        labels: np.ndarray,
        input_shape: tuple[int, ...],
        batches_of_epoch: Callable[[int], Sequence[np.ndarray]],
    ):
        self.images = images.reshape(len(images), -1)
        self.labels = labels.astype(np.float32)
        self.input_shape = input_shape
        self.batches_of_epoch = batches_of_epoch
        self.start_epoch(0)
        self.num_batches = len(self.batches)
        super().__init__(len(self.batches[0]))
        self.provide_data = [mx.io.DataDesc('data', (self.batch_size, *input_shape))]
        self.provide_label = _dual_label_descriptions((self.batch_size,))

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
        pixels = np.multiply(self.images[index], 1 / 256, dtype=np.float32)
        data = mx.nd.array(pixels.reshape(-1, *self.input_shape))
        label = mx.nd.array(self.labels[index])
        return mx.io.DataBatch(
            [data],
            [label, label],
            pad=0,
            index=index,
            provide_data=[mx.io.DataDesc('data', data.shape)],
            provide_label=_dual_label_descriptions(label.shape),
        )


class DualLabelWrapper(mx.io.DataIter):
    """Any iterator with one label, as one that yields it twice: softmax_label and center_label.

    The images that pad a batch are cut off, so that every image is counted once: a Module binds
    itself for the size of each batch. ``num_batches`` and ``start_epoch`` exist if the iterator has
    them.

    Parameters
    ----------
    iterator
        Yields one label for each image: MNISTIter, ImageRecordIter, NDArrayIter, CSVIter,
        PrefetchingIter, ...
    num_classes
        K; if given, a label that is not a whole number from 0 to K - 1 raises an InputError.
    """

    def __init__(self, iterator: mx.io.DataIter, num_classes: int | None = None):
        super().__init__(iterator.batch_size)
        if len(iterator.provide_label) != 1 or math.prod(iterator.provide_label[0].shape[1:]) != 1:
            found = ', '.join(f'{name} {shape}' for name, shape in iterator.provide_label) or 'none'
            raise InputError(f'the iterator has to yield one label for each image, not: {found}')
        self.iterator = iterator
        self.num_classes = num_classes
        self.provide_data = iterator.provide_data
        self.provide_label = _dual_label_descriptions(
            (self.batch_size,), iterator.provide_label[0].dtype
        )
        for name in ('num_batches', 'start_epoch'):
            if hasattr(iterator, name):
                setattr(self, name, getattr(iterator, name))

    def reset(self) -> None:
        """Go to the beginning of the next epoch."""
        self.iterator.reset()

    def next(self) -> mx.io.DataBatch:
        """Return the next batch of this epoch, without padding."""
        batch = self.iterator.next()
        size = self.batch_size - (batch.pad or 0)
        data = [array[:size] for array in batch.data]
        label = batch.label[0][:size].reshape((size,))
        if self.num_classes is not None:
            self._check(label.asnumpy())
        return mx.io.DataBatch(
            data,
            [label, label],
            pad=0,
            index=None if batch.index is None else batch.index[:size],
            provide_data=[
                mx.io.DataDesc(desc.name, array.shape, array.dtype)
                for desc, array in zip(self.provide_data, data, strict=True)
            ],
            provide_label=_dual_label_descriptions(label.shape, label.dtype),
        )

    def _check(self, labels):
        wrong = ~((labels >= 0) & (labels < self.num_classes) & (labels == np.trunc(labels)))
        if wrong.any():
            position = int(wrong.argmax())
            raise InputError(
                f'label {labels[position]:g} at position {position} of a batch is not a whole '
                f'number from 0 to {self.num_classes - 1}'
            )


def load_digits(dataset: str = 'auto', data_dir: str | os.PathLike | None = None) -> Digits:
    """Find, check and read a data set.

    Parameters
    ----------
    dataset
        'mnist', 'fashion-mnist' or 'mnist-5k'. 'auto' is MNIST, with the embedded digits as the
        last resort; in a ``data_dir``, whatever is there.
    data_dir
        Folder of the four IDX files, each as NAME.gz or NAME. Without it: ``data/<dataset>/``,
        Debian's folder, a download.

    Raises
    ------
    InputError
        With all that was tried.
    """
    if dataset not in ('auto', *DATASETS):
        raise InputError(f'dataset {dataset!r} is not one of auto, {", ".join(DATASETS)}')
    if data_dir is not None:
        try:
            folder = Path(data_dir).expanduser()
        except RuntimeError as error:  # no home directory
            raise InputError(f'--data-dir={_printable(data_dir)}: {error}') from None
        return read_folder(folder, None if dataset == 'auto' else dataset)
    name = 'mnist' if dataset == 'auto' else dataset
    failures = []
    for folder in filter(None, (FOLDER / name, DEBIAN_FOLDERS.get(name))):
        if any(find_file(folder, file) for file in FILES):
            try:
                return read_folder(folder, name)
            except InputError as error:
                logging.warning('%s', error)
                failures.append(str(error))
    if DATASETS[name].mirrors:
        try:
            download(name)
            return read_folder(FOLDER / name, name)
        except InputError as error:
            failures.append(str(error))
    reasons = '; '.join(failures)
    what_to_do = f'put its four IDX files into {_printable(FOLDER / name)} or use --data-dir'
    if dataset != 'auto':
        raise InputError(f'--dataset={name} is unavailable ({reasons}): {what_to_do}')
    logging.warning(
        'MNIST is unavailable (%s): falling back to mnist-5k, 5,000 of its digits; for all of '
        'them, %s',
        reasons,
        what_to_do,
    )
    return read_folder(FOLDER / 'mnist-5k', 'mnist-5k')


def read_folder(folder: Path, name: str | None) -> Digits:
    """Read the four files of a folder and compare them with the checksums of data set ``name``.

    None stands for whatever is there: a known data set, or images of any size and their labels.
    """
    arrays, digests = [], []
    for file in FILES:
        path = find_file(folder, file)
        if path is None:
            raise InputError(f'{_printable(folder)} has no {file}.gz and no {file}')
        array, digest = read_idx(path, 3 if 'images' in file else 1)
        if name is not None and digest != DATASETS[name].sha256[len(digests)]:
            raise InputError(
                f'{_printable(path)} is not the file of {name}: its SHA-256 is {digest}, '
                f'not {DATASETS[name].sha256[len(digests)]}'
            )
        arrays.append(array)
        digests.append(digest)
    source = _printable(folder)
    if name is None:
        known = {dataset.sha256: known_name for known_name, dataset in DATASETS.items()}
        name = known.get(tuple(digests))
    if name is not None:
        return Digits(*arrays, DATASETS[name].class_names, name, source)
    num_classes = _check_arrays(arrays, source)
    logging.warning(
        'the files in %s are of no known data set; they are used as they are: images of %s '
        'pixels, %d classes',
        source,
        _product(arrays[0].shape[1:]),
        num_classes,
    )
    return Digits(*arrays, tuple(map(str, range(num_classes))), 'custom', source)


def _check_arrays(arrays, source):
    """Check that four arrays of unknown origin fit each other; return the number of classes."""
    train_images, train_labels, val_images, val_labels = arrays
    for images, labels, file in (
        (train_images, train_labels, FILES[1]),
        (val_images, val_labels, FILES[3]),
    ):
        if len(images) != len(labels):
            raise InputError(f'{source}: {file} has {len(labels)} labels for {len(images)} images')
    if train_images.shape[1:] != val_images.shape[1:]:
        raise InputError(
            f'{source}: {FILES[0]} has images of {_product(train_images.shape[1:])} pixels, '
            f'{FILES[2]} of {_product(val_images.shape[1:])}'
        )
    num_classes = int(train_labels.max()) + 1
    if val_labels.max() >= num_classes:
        position = int(val_labels.argmax())
        raise InputError(
            f'{source}: label {val_labels[position]} at position {position} of {FILES[3]} is not '
            f'a class from 0 to {num_classes - 1}, those of {FILES[1]}'
        )
    return num_classes


def find_file(folder: Path, file: str) -> Path | None:
    """Return the path of ``file.gz`` or ``file`` in a folder, or None."""
    paths = (folder / f'{file}.gz', folder / file)
    return next((path for path in paths if os.path.lexists(path)), None)


def read_idx(path: Path, num_dims: int) -> tuple[np.ndarray, str]:
    """Read an IDX file of unsigned bytes, http://yann.lecun.com/exdb/mnist, and check all of it.

    A file whose size is not what its header announces is refused before its content is read.

    Parameters
    ----------
    path
        A raw file, or a compressed one that ends in .gz.
    num_dims
        3 for images, 1 for labels.

    Returns
    -------
    array : numpy.ndarray
        uint8 with ``num_dims`` dimensions, none of them 0, of up to ``MAX_FILE_SIZE`` bytes.
    digest : str
        SHA-256 of the raw file.

    Raises
    ------
    InputError
        For anything else than such a file.
    """
    name = _printable(path)
    try:
        if not path.is_file():
            raise InputError(f'{name} is not a regular file')
        with open(path, 'rb') as file:
            return _read_idx(file, name, path.suffix == '.gz', num_dims)
    except OSError as error:
        raise InputError(f'{name} cannot be read: {error.strerror or error}') from None


def _read_idx(file: BinaryIO, name: str, compressed: bool, num_dims: int) -> tuple[np.ndarray, str]:
    size = file.seek(0, os.SEEK_END)
    if compressed and size >= 18:
        # A gzip file ends with the size of its content, modulo 2**32.
        file.seek(-4, os.SEEK_END)
        (size,) = struct.unpack('<I', file.read(4))
    file.seek(0)
    try:
        return _read_content(gzip.open(file) if compressed else file, name, size, num_dims)
    except gzip.BadGzipFile:
        raise InputError(f'{name} is not a gzip file, or is damaged') from None
    except (EOFError, zlib.error) as error:
        raise InputError(f'{name} is damaged: {error}') from None


def _read_content(
    file: BinaryIO, name: str, file_size: int, num_dims: int
) -> tuple[np.ndarray, str]:
    header_size = 4 * (1 + num_dims)
    header = file.read(header_size)
    magic = bytes([0, 0, 8, num_dims])  # unsigned bytes, so many dimensions
    if header[:4] != magic:
        raise InputError(
            f'{name} is not an IDX file of {"images" if num_dims == 3 else "labels"}: it begins '
            f'with {header[:4].hex(" ") or "nothing"}, not with {magic.hex(" ")}'
        )
    if len(header) < header_size:
        raise InputError(
            f'{name} is truncated: its header has {len(header)} of {header_size} bytes'
        )
    shape = struct.unpack(f'>{num_dims}I', header[4:])
    size = math.prod(shape)
    if size == 0 or header_size + size > MAX_FILE_SIZE:
        raise InputError(
            f'{name} announces {_product(shape)} bytes: it has to be from 1 byte to '
            f'{MAX_FILE_SIZE >> 30} GiB'
        )
    wrong_size = f'{name} announces {_product(shape)} bytes, but that is not its size'
    if file_size != header_size + size:
        raise InputError(wrong_size)
    array = np.empty(shape, np.uint8)
    sha256 = hashlib.sha256(header)
    content = memoryview(array.reshape(-1))
    while content and (count := file.readinto(content[: 1 << 20])):
        sha256.update(content[:count])
        content = content[count:]
    if content or file.read(1):  # reading on to the end also checks gzip's own checksum
        raise InputError(wrong_size)
    return array, sha256.hexdigest()


def download(name: str) -> None:
    """Download what is missing of a data set to ``data/<name>/``, each file checked first.

    Several processes may do so at once: each moves whole files into place.

    Raises
    ------
    InputError
        With the reason for each mirror.
    """
    folder = FOLDER / name
    deadline = time.monotonic() + MAX_DOWNLOAD_SECONDS
    failures = []
    for mirror in DATASETS[name].mirrors:
        host = urlsplit(mirror).hostname
        notice = f'looking for {name} at {host}'
        try:
            folder.mkdir(parents=True, exist_ok=True)
            for file, sha256 in zip(FILES, DATASETS[name].sha256, strict=True):
                path = find_file(folder, file)
                if path is not None and _sha256(path, file) == sha256:
                    continue
                target = folder / f'{file}.gz'
                # Opened first: a folder that cannot be written to is not worth a download.
                with replace_when_whole(target) as temporary, open(temporary, 'wb') as output:
                    body = fetch(urljoin(mirror, target.name), MAX_DOWNLOAD_SIZE, deadline, notice)
                    notice = None
                    if _sha256(io.BytesIO(body), file) != sha256:
                        raise DownloadError(f'{host}: what it sends is not {target.name}')
                    output.write(body)
            return
        except OSError as error:
            raise InputError(
                f'cannot write to {_printable(folder)}: {error.strerror or error}'
            ) from None
        except DownloadError as error:
            failures.append(str(error))
            if isinstance(error, SlowNetworkError):
                break
    raise InputError('; '.join(failures))


def _sha256(source, file):
    """Return the SHA-256 of a path's or a compressed stream's raw content, None if not IDX."""
    num_dims = 3 if 'images' in file else 1
    try:
        if isinstance(source, Path):
            return read_idx(source, num_dims)[1]
        return _read_idx(source, file, True, num_dims)[1]
    except InputError:
        return None


def _product(shape):
    return ' x '.join(map(str, shape))


def _printable(path):
    """Return a path as text that any log can hold, whatever the bytes of its name."""
    return os.fsencode(path).decode('utf-8', 'backslashreplace')
