"""The digits: where they are found, how their files are read and checked, and the iterators that hand them out with two labels.

MNIST and Fashion-MNIST come as four IDX files each. They are looked for in ``--data-dir``, else in ``data/<dataset>/`` beside this file, else (for
Fashion-MNIST) where Debian's package puts them, else they are downloaded. ``--dataset auto`` ends with 5,000 digits that this repository carries.
Checksums are those of the decompressed files, so that any container of the same data passes.
"""

import contextlib
import fcntl
import gzip
import hashlib
import logging
import math
import os
import threading
import zlib
from pathlib import Path
from typing import NamedTuple
from urllib.parse import urljoin, urlsplit

import numpy as np
import requests
import urllib3
from tqdm import tqdm

from runtime import InputError, memory_of, mx

FOLDER = Path(__file__).resolve().parent / 'data'
DEBIAN_FOLDERS = {
    'fashion-mnist': Path('/usr/share/datasets/fashion-mnist')
}  # package dataset-fashion-mnist

FILES = (
    'train-images-idx3-ubyte',
    'train-labels-idx1-ubyte',
    't10k-images-idx3-ubyte',
    't10k-labels-idx1-ubyte',
)
IMAGE_SIZE = (28, 28)
NUM_CLASSES = 10
MAX_EXAMPLES = 1_000_000  # no header makes this program read more
MAX_DOWNLOAD = 64_000_000  # bytes; the largest of the files has 47 million before compression

# A mirror that does not answer, or sends nothing more, is given up after this long: all of them together in less than 20 seconds.
RESPONSE_SECONDS = 4
STALL_SECONDS = 4


class Dataset(NamedTuple):
    """What is known of a data set: SHA-256 of its raw files in the order of ``FILES``, the names of its classes, where it can be downloaded."""

    sha256: tuple
    class_names: tuple
    mirrors: tuple = ()


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
            'T-shirt',
            'Trouser',
            'Pullover',
            'Dress',
            'Coat',
            'Sandal',
            'Shirt',
            'Sneaker',
            'Bag',
            'Ankle boot',
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


class DataError(InputError):
    """Data that cannot be had or cannot be trusted: the file, what is wrong with it, what to do."""


class Digits(NamedTuple):
    """A data set in memory.

    ``train_images`` uint8 (N, 28, 28), ``train_labels`` uint8 (N,), ``val_images``, ``val_labels`` alike; ``class_names`` by label; ``dataset``, the
    name of the data set; ``source``, where it was found.
    """

    train_images: np.ndarray
    train_labels: np.ndarray
    val_images: np.ndarray
    val_labels: np.ndarray
    class_names: tuple
    dataset: str
    source: str


def add_data_arguments(parser):
    """Declare ``--dataset`` and ``--data-dir``."""
    group = parser.add_argument_group('data')
    group.add_argument(
        '--dataset',
        choices=['auto', *DATASETS],
        default='auto',
        help='auto is mnist where it can be found or downloaded, else mnist-5k, the 5,000 digits that come with the program',
    )
    group.add_argument(
        '--data-dir',
        metavar='DIR',
        help='folder of the four IDX files, .gz or not; nothing is downloaded then. Without it: data/<dataset>/, else a download to there',
    )


def mnist_iterator(
    batch_size,
    input_shape=(1, 28, 28),
    dataset='auto',
    data_dir=None,
    seed=0,
    num_examples=None,
    num_classes=None,
    num_parts=1,
    part_index=0,
    first_epoch=0,
):
    """Iterators over the training and the validation images.

    Parameters
    ----------
    batch_size : int
        B, images in a batch of this worker.
    input_shape : tuple of int
        Shape of one image in a batch: (1, 28, 28), or (784,) for flat ones.
    dataset, data_dir : str
        As in :func:`load_digits`.
    seed : int
        Of the shuffles. The order of an epoch depends on the seed and on the number of the epoch alone.
    num_examples : int, optional
        Use only the first so many training images (of the classes that are used).
    num_classes : int, optional
        Use only the images, training and validation, of the classes 0 to ``num_classes`` - 1.
    num_parts, part_index : int
        Number of workers, and which of them this is: every total batch of ``num_parts * batch_size`` images is shared among the workers.
    first_epoch : int
        The epoch to begin with, counted from 0.

    Returns
    -------
    train, val : DualLabelIter
        ``train``: every epoch a fresh shuffle, full batches only. ``val``: every image exactly once, in batches of up to B.

    Raises
    ------
    DataError
        For data that cannot be had, and where there are too few images for a batch.
    """
    if math.prod(input_shape) != math.prod(IMAGE_SIZE):
        raise DataError(
            f'input shape {tuple(input_shape)} does not hold an image of {IMAGE_SIZE[0]} x {IMAGE_SIZE[1]} pixels'
        )
    digits = load_digits(dataset, data_dir)
    images, labels = (
        array[:num_examples]
        for array in of_classes(digits.train_images, digits.train_labels, num_classes)
    )
    val_images, val_labels = of_classes(digits.val_images, digits.val_labels, num_classes)
    total_batch = num_parts * batch_size
    num_batches = len(images) // total_batch
    if num_batches == 0:
        taken = (
            f'{num_parts} workers take {total_batch} images'
            if num_parts > 1
            else 'it takes more images'
        )
        raise DataError(
            f'--batch-size={batch_size} is too large: {taken} than the {len(images)} there are to train on ({digits.dataset})'
        )
    if not len(val_images):
        raise DataError(
            f'--num-classes={num_classes}: {digits.dataset} has no validation images of the classes 0 to {num_classes - 1}'
        )
    logging.info(
        'data: %s, %d training and %d validation images, from %s',
        digits.dataset,
        len(images),
        len(val_images),
        digits.source,
    )

    def shuffled(epoch):
        order = np.random.default_rng((seed, epoch)).permutation(len(images))[
            : num_batches * total_batch
        ]
        return order.reshape(num_batches, num_parts, batch_size)[:, part_index]

    def each_once(epoch):
        # Of nearly equal size: a last batch of an image or two could not be shared by several devices.
        return np.array_split(np.arange(len(val_images)), math.ceil(len(val_images) / batch_size))

    return (
        DualLabelIter(images, labels, input_shape, shuffled, first_epoch),
        DualLabelIter(val_images, val_labels, input_shape, each_once),
    )


def of_classes(images, labels, num_classes):
    """The images and the labels of the classes below ``num_classes`` (None: all), in their order."""
    kept = labels < num_classes if num_classes is not None else slice(None)
    return images[kept], labels[kept]


class DualLabelIter(mx.io.DataIter):
    """Batches of images with their labels twice: ``softmax_label`` and ``center_label``.

    A batch is ``data`` (B, *input_shape), float32, pixel value / 256 as MNISTIter yields it, and two labels (B,), float32. ``reset`` begins the
    next epoch.

    Parameters
    ----------
    images : numpy.ndarray
        uint8 (N, 28, 28). They stay bytes until their batch is due.
    labels : numpy.ndarray
        uint8 (N,).
    input_shape : tuple of int
        Shape of one image in a batch.
    batches_of_epoch : callable
        ``batches_of_epoch(epoch)``: the positions of the images of every batch, a sequence of int arrays.
    first_epoch : int
        The epoch to begin with, counted from 0.
    """

    def __init__(self, images, labels, input_shape, batches_of_epoch, first_epoch=0):
        self.images = images.reshape(len(images), -1)
        self.labels = labels.astype(np.float32)
        self.input_shape = tuple(input_shape)
        self.batches_of_epoch = batches_of_epoch
        self.epoch = first_epoch
        self.batches = list(batches_of_epoch(first_epoch))
        self.position = 0
        self.num_batches = len(self.batches)
        super().__init__(len(self.batches[0]))
        self.provide_data, self.provide_label = self._provide(self.batch_size)

    def _provide(self, size):
        """Names and shapes of a batch of that size."""
        return (
            [mx.io.DataDesc('data', (size, *self.input_shape))],
            [mx.io.DataDesc('softmax_label', (size,)), mx.io.DataDesc('center_label', (size,))],
        )

    def reset(self):
        self.epoch += 1
        self.batches = list(self.batches_of_epoch(self.epoch))
        self.position = 0

    def next(self):
        if self.position == self.num_batches:
            raise StopIteration
        index = self.batches[self.position]
        self.position += 1
        # Written straight to the memory of new arrays: mx.nd.array would wait until the device has done all that is queued for it.
        pixels, label = (
            mx.nd.empty((len(index), *self.input_shape), mx.cpu()),
            mx.nd.empty((len(index),), mx.cpu()),
        )
        np.multiply(
            self.images.take(index, axis=0),
            np.float32(1 / 256),
            out=memory_of(pixels).reshape(len(index), -1),
        )
        memory_of(label)[:] = self.labels[index]
        provide_data, provide_label = self._provide(len(index))
        return mx.io.DataBatch(
            [pixels],
            [label, label],
            pad=0,
            index=index,
            provide_data=provide_data,
            provide_label=provide_label,
        )


def load_digits(dataset='auto', data_dir=None):
    """Find, check and read a data set.

    Parameters
    ----------
    dataset : {'auto', 'mnist', 'fashion-mnist', 'mnist-5k'}
        'auto' is MNIST, with the embedded digits as the last resort; in a ``data_dir``, whatever is there.
    data_dir : str or Path, optional
        Folder of the four IDX files, each as NAME or NAME.gz. Without it: ``data/<dataset>/``, Debian's folder, a download.

    Returns
    -------
    Digits

    Raises
    ------
    DataError
        With all that was tried.
    """
    if data_dir is not None:
        return read_folder(Path(data_dir), None if dataset == 'auto' else dataset)
    name = 'mnist' if dataset == 'auto' else dataset
    tried = []
    for folder in filter(None, (FOLDER / name, DEBIAN_FOLDERS.get(name))):
        if any(find_file(folder, file) for file in FILES):
            try:
                return read_folder(folder, name)
            except DataError as error:
                logging.warning('%s', error)
                tried.append(str(error))
    for mirror in DATASETS[name].mirrors:
        try:
            download(name, mirror)
            return read_folder(FOLDER / name, name)
        except DataError as error:
            tried.append(str(error))
    what_to_do = f'put its four files ({", ".join(FILES)}, .gz or not) into {FOLDER / name}, or name their folder with --data-dir'
    if dataset != 'auto':
        raise DataError(f'--dataset={name} cannot be had ({"; ".join(tried)}): {what_to_do}')
    logging.warning(
        'no MNIST (%s): going on with mnist-5k, the 5,000 of its digits that come with the program; for all of them, %s',
        '; '.join(tried),
        what_to_do,
    )
    return read_folder(FOLDER / 'mnist-5k', 'mnist-5k')


def read_folder(folder, name):
    """Read the four files of a folder and hold them against the checksums of the data set ``name``; of any known one, or none, for None."""
    arrays, digests = [], []
    for file in FILES:
        path = find_file(folder, file)
        if path is None:
            raise DataError(f'{folder} has no {file} and no {file}.gz')
        array, digest = read_idx(path, IMAGE_SIZE if 'images' in file else ())
        arrays.append(array)
        digests.append(digest)
    for images, labels, file in (
        (arrays[0], arrays[1], FILES[1]),
        (arrays[2], arrays[3], FILES[3]),
    ):
        if len(images) != len(labels):
            raise DataError(
                f'{folder}: {len(labels)} labels in {file} do not belong to {len(images)} images'
            )
        if labels.max() >= NUM_CLASSES:
            position = int(labels.argmax())
            raise DataError(
                f'{folder}: label {labels[position]} at position {position} of {file} is not a class from 0 to {NUM_CLASSES - 1}'
            )
    if name is None:
        name = next(
            (known for known, dataset in DATASETS.items() if dataset.sha256 == tuple(digests)), None
        )
        if name is None:
            logging.warning(
                'the files in %s are of no data set known here: they are used as they are', folder
            )
            return Digits(*arrays, DATASETS['mnist'].class_names, 'custom', str(folder))
    for file, digest, expected in zip(FILES, digests, DATASETS[name].sha256):
        if digest != expected:
            raise DataError(
                f'{find_file(folder, file)} is not the file of {name}: its SHA-256 is {digest}, not {expected}'
            )
    return Digits(*arrays, DATASETS[name].class_names, name, str(folder))


def find_file(folder, file):
    """The path of ``file`` or ``file.gz`` in a folder, or None."""
    return next(
        (path for path in (folder / file, folder / f'{file}.gz') if os.path.lexists(path)), None
    )


def read_idx(path, item_shape):
    """Read an IDX file of unsigned bytes, http://yann.lecun.com/exdb/mnist, and check all of it.

    Never more is read, or inflated, than the header announces and one byte.

    Parameters
    ----------
    path : Path
        A raw file, or a compressed one that ends in .gz.
    item_shape : tuple of int
        Shape of one item: (28, 28) for images, () for labels.

    Returns
    -------
    array : numpy.ndarray
        uint8 (N, *item_shape), N from 1 to ``MAX_EXAMPLES``.
    digest : str
        SHA-256 of the raw file.

    Raises
    ------
    DataError
        For anything else than such a file.
    """
    try:
        if not path.is_file():
            raise DataError(f'{path} is not a file')
        with (gzip.open if path.suffix == '.gz' else open)(path, 'rb') as file:
            return _read_idx(path, file, item_shape)
    except gzip.BadGzipFile:
        raise DataError(f'{path} is not a gzip file, or a damaged one') from None
    except (EOFError, zlib.error) as error:
        raise DataError(f'{path} is damaged: {error}') from None
    except OSError as error:
        raise DataError(f'{path} cannot be read: {error.strerror}') from None


def _read_idx(path, file, item_shape):
    header_size = 4 * (2 + len(item_shape))
    header = file.read(header_size)
    magic = bytes([0, 0, 8, 1 + len(item_shape)])  # unsigned bytes, so many dimensions
    if header[:4] != magic:
        raise DataError(
            f'{path} is not an IDX file of {"images" if item_shape else "labels"}: it begins with '
            f'{header[:4].hex(" ") or "nothing"}, not with {magic.hex(" ")}'
        )
    if len(header) < header_size:
        raise DataError(f'{path} is truncated: its header has {len(header)} of {header_size} bytes')
    count, *shape = np.frombuffer(header, '>u4', offset=4).tolist()
    if tuple(shape) != item_shape:
        raise DataError(
            f'{path} holds images of {" x ".join(map(str, shape))} pixels, not of {" x ".join(map(str, item_shape))}'
        )
    if not 1 <= count <= MAX_EXAMPLES:
        raise DataError(f'{path} announces {count} items: it has to be from 1 to {MAX_EXAMPLES}')
    size = count * math.prod(shape)
    content = bytearray()
    while chunk := file.read(
        min(1 << 20, size + 1 - len(content))
    ):  # one byte more than there may be, so that it shows
        content += chunk
    if len(content) != size:
        found = f'has only {len(content)}' if len(content) < size else 'goes on after them'
        raise DataError(f'{path} announces {size} bytes and {found}')
    return np.frombuffer(content, np.uint8).reshape(count, *shape), hashlib.sha256(
        header + content
    ).hexdigest()


def download(name, mirror):
    """Download what is missing of a data set to ``data/<name>/`` from one mirror; every file is checked before it gets its name.

    A second process that wants the same waits, and finds the files there. What was received before a stop is kept, and continued.
    """
    folder = FOLDER / name
    try:
        with open(FOLDER / f'.{name}.lock', 'w') as lock:
            fcntl.flock(lock, fcntl.LOCK_EX)
            for file, sha256 in zip(FILES, DATASETS[name].sha256):
                path, target = find_file(folder, file), folder / f'{file}.gz'
                if path is None or read_digest(path, file) != sha256:
                    download_file(urljoin(mirror, target.name), target, sha256)
                    if path not in (
                        None,
                        target,
                    ):  # a damaged raw file would be found before the compressed one
                        path.rename(folder / f'{file}.damaged')
    except OSError as error:
        raise DataError(f'cannot write to {folder}: {error.strerror}') from None


def read_digest(path, file):
    """SHA-256 of the raw file, or None for one that is no IDX file."""
    with contextlib.suppress(DataError):
        return read_idx(path, IMAGE_SIZE if 'images' in file else ())[1]


def download_file(url, target, sha256):
    """Download one .gz file, check what is in it, and move it into place. What an earlier try received is continued, once."""
    part = target.with_name(f'{target.stem}.part.gz')
    continuing = True
    while continuing:
        received = part.stat().st_size if part.exists() else 0
        continuing = received > 0
        try:
            receive(url, part, received)
        except (requests.RequestException, urllib3.exceptions.HTTPError) as error:
            raise DataError(f'{url}: {reason(error)}') from None
        if read_digest(part, target.stem) == sha256:
            os.replace(part, target)
            return
        part.unlink()
    raise DataError(
        f'{url}: what it sends is not {target.stem} (SHA-256 {sha256} when decompressed)'
    )


def receive(url, part, received):
    """Append the bytes of ``url`` from position ``received`` on to the file ``part``; from the beginning where the server cannot continue."""
    response = open_url(url, {'Range': f'bytes={received}-'} if received else {})
    with response:
        if response.status_code == requests.codes.requested_range_not_satisfiable:
            return  # all of it is there already: the checksum will tell
        response.raise_for_status()
        continued = response.status_code == requests.codes.partial_content
        received = received if continued else 0
        part.parent.mkdir(exist_ok=True)
        length = (
            int(response.raw.length_remaining or 0) + received
        )  # 0: the server does not say, or not as a number
        with (
            open(part, 'ab' if continued else 'wb') as file,
            tqdm(
                total=length if length > received else None,
                initial=received,
                desc=part.name.replace('.part', ''),
                unit='B',
                unit_scale=True,
                disable=None,
            ) as progress,
        ):
            for chunk in response.raw.stream(1 << 16, decode_content=False):
                received += len(chunk)
                if received > MAX_DOWNLOAD:
                    file.truncate(0)
                    raise DataError(f'{url}: it sends more than {MAX_DOWNLOAD} bytes')
                file.write(chunk)
                progress.update(len(chunk))


class SecureSession(requests.Session):
    """A session that goes to https addresses only (or to this machine), wherever it is redirected."""

    def get_redirect_target(self, response):
        target = super().get_redirect_target(response)
        if target:
            require_tls(urljoin(response.url, target))
        return target


def require_tls(url):
    address = urlsplit(url)
    if address.scheme != 'https' and address.hostname not in ('127.0.0.1', 'localhost', '::1'):
        raise requests.exceptions.InvalidURL(f'{url} is not an https address')


def open_url(url, headers):
    """The response to a GET, its body still to be read. Not even a name server that hangs holds it up for longer than RESPONSE_SECONDS."""
    require_tls(url)
    result = []

    def get():
        try:
            result.append(
                SecureSession().get(
                    url,
                    headers={'Accept-Encoding': 'identity', **headers},
                    stream=True,
                    timeout=(RESPONSE_SECONDS, STALL_SECONDS),
                )
            )
        except Exception as error:  # whatever it is, it belongs to the thread that waits for it
            result.append(error)

    thread = threading.Thread(target=get, daemon=True)
    thread.start()
    thread.join(RESPONSE_SECONDS)
    if not result:
        raise requests.exceptions.Timeout(f'no answer in {RESPONSE_SECONDS} s')
    if isinstance(result[0], Exception):
        raise result[0]
    return result[0]


def reason(error):
    """A network error in a few words, without the chain of objects that its text names."""
    if isinstance(error, requests.exceptions.HTTPError):
        return f'{error.response.status_code} {error.response.reason}'
    if isinstance(error, requests.exceptions.InvalidURL):
        return str(error)
    if isinstance(error, requests.exceptions.Timeout) or 'timed out' in str(error):
        return f'no answer in {RESPONSE_SECONDS} s'
    if isinstance(error, requests.exceptions.ConnectionError) and not isinstance(
        error, requests.exceptions.ChunkedEncodingError
    ):
        return 'no connection'
    return 'the connection broke off'
