"""Figures without a display, and how they become files: pictures and animations.

Figures are drawn with matplotlib's Agg, never with pyplot: no window system is asked for, and
nothing changes for a program that uses pyplot itself.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
import contextlib
import functools
import os
from pathlib import Path
import subprocess
from types import ModuleType
from typing import TYPE_CHECKING, NamedTuple, TypeVar
import warnings

import numpy as np
from PIL import Image

from common.errors import InputError
from common.files import check_output, replace_when_whole

if TYPE_CHECKING:
    from matplotlib.figure import Figure

DPI = 110
FRAME_DPI = 80  # with so few pixels and colors, twenty frames take some hundred kB
FRAME_COLORS = 128
FRAMES_PER_SECOND = 3
ANIMATIONS = ('gif', 'mp4')
STYLE = {
    'text.parse_math': False,  # the names of files and classes are shown as they are
    'grid.color': '0.93',
    'axes.edgecolor': '0.8',
    'text.color': '0.15',
    'axes.labelcolor': '0.4',
    'xtick.color': '0.4',
    'ytick.color': '0.4',
    'xtick.labelsize': 10,
    'ytick.labelsize': 10,
    'axes.labelsize': 10,
    'axes.titlesize': 13,
    'axes.titlepad': 10,
}

Item = TypeVar('Item')


class Plane(NamedTuple):
    """A plane to view embeddings in: ``origin`` (d,), orthonormal ``axes`` (2, d), their names."""

    origin: np.ndarray
    axes: np.ndarray
    names: tuple[str, str]


@functools.cache
def import_seaborn() -> ModuleType:
    """Import seaborn, and with it matplotlib; MPLBACKEND is ignored, whatever it says.

    They take a second, which ``--help`` and a wrong option should not take. matplotlib cannot be
    imported while MPLBACKEND has a value that it does not know.
    """
    backend = os.environ.pop('MPLBACKEND', None)
    try:
        import matplotlib
        import seaborn

        if backend is not None:  # for pyplot in a program that imports this one
            with contextlib.suppress(ValueError):
                matplotlib.rcParams['backend'] = backend
    finally:
        if backend is not None:
            os.environ['MPLBACKEND'] = backend
    return seaborn


@contextlib.contextmanager
def picture_style() -> Iterator[None]:
    """Draw in the style of this project's pictures within the block."""
    seaborn = import_seaborn()
    from matplotlib import rc_context

    with rc_context():
        seaborn.set_theme(style='whitegrid', rc=STYLE)
        yield


def new_figure(rows: int, columns: int, width: float, height: float) -> tuple[Figure, np.ndarray]:
    """Return a figure of panels of ``width`` x ``height`` inches, and its axes (rows, columns)."""
    import_seaborn()
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(width * columns, height * rows), layout='constrained')
    FigureCanvasAgg(figure)
    figure.get_layout_engine().set(w_pad=0.12, h_pad=0.12, wspace=0.03, hspace=0.03)
    return figure, figure.subplots(rows, columns, squeeze=False)


def distinct_colors(count: int) -> list[tuple[float, float, float]]:
    """Return so many RGB colors; beyond 20, neighboring hues differ in lightness."""
    seaborn = import_seaborn()
    if count <= 20:
        return seaborn.color_palette('tab10' if count <= 10 else 'tab20', count)
    palettes = [seaborn.husl_palette(count, l=lightness) for lightness in (0.45, 0.6, 0.75)]
    return [palettes[i % 3][i] for i in range(count)]


def viewing_plane(embeddings: np.ndarray, variance: str = 'the variance') -> Plane:
    """Return the plane of embeddings (N, 2), or of the first two principal components of (N, d).

    The names of these say how much of ``variance``, that of the embeddings, they have.
    """
    dimensions = embeddings.shape[1]
    if dimensions == 2:
        names = ('activation of the 1st neuron', 'activation of the 2nd neuron')
        return Plane(np.zeros(2), np.eye(2), names)
    # The covariance has the axes of the centered embeddings, and is d x d instead of N x d.
    _, variances, axes = np.linalg.svd(np.cov(embeddings, rowvar=False, bias=True))
    axes = axes[:2]
    # An axis and its opposite are equally good: always take the same.
    axes *= np.sign(axes[range(2), abs(axes).argmax(axis=1)])[:, None]
    shares = variances[:2] / max(variances.sum(), np.finfo(float).tiny)
    first, second = (
        f'principal component {i} of {dimensions} dimensions ({share:.0%} of {variance})'
        for i, share in enumerate(shares, 1)
    )
    return Plane(embeddings.mean(axis=0, dtype=np.float64), axes, (first, second))


def check_picture(path: Path, option: str, kinds: Iterable[str] | None = None) -> None:
    """Raise InputError if no picture can be written to a path, see :func:`check_output`.

    ``kinds`` are by default the suffixes that matplotlib can write.
    """
    if kinds is None:
        import_seaborn()
        from matplotlib.backend_bases import FigureCanvasBase

        kinds = FigureCanvasBase.get_supported_filetypes()
    check_output(path, option, kinds)
    if path.suffix.lower() == '.mp4':
        from matplotlib.animation import FFMpegWriter

        if not FFMpegWriter.isAvailable():
            raise InputError(
                f'{option}={path} cannot be written: an .mp4 needs the program ffmpeg: install it, '
                'or write a .gif'
            )


@contextlib.contextmanager
def _writing(path):
    """Yield a temporary path; move it to ``path`` on success; raise InputError for a failure."""
    try:
        with replace_when_whole(path) as temporary:
            yield temporary
    except subprocess.CalledProcessError as error:
        problem = f'ffmpeg ended with status {error.returncode}'
        raise InputError(f'{path} cannot be written: {problem}') from None
    except (OSError, RuntimeError) as error:
        problem = getattr(error, 'strerror', None) or error
        raise InputError(f'{path} cannot be written: {problem}') from None


def _with_palette(image, colors):
    """Return an image with a palette of so many colors: every class keeps its own, gray is gray."""
    method, dither = Image.Quantize.MAXCOVERAGE, Image.Dither.NONE
    return image.quantize(colors, method, kmeans=2, dither=dither)


def save_picture(figure: Figure, path: Path) -> None:
    """Write a figure as the kind of picture that the suffix of its path names.

    A PNG gets a palette: it has a third of the size and looks the same.
    """
    kind = path.suffix[1:].lower()
    with _writing(path) as temporary, warnings.catch_warnings():
        warnings.filterwarnings('ignore', 'Glyph .* missing from')  # a box is drawn in its place
        figure.savefig(temporary, format=kind, dpi=DPI)
        if kind == 'png':
            with Image.open(temporary) as image:
                smaller = _with_palette(image.convert('RGB'), 256)
            smaller.save(temporary, 'png', dpi=(DPI, DPI), optimize=True)


def save_animation(
    figure: Figure, draw: Callable[[Item], None], items: Iterable[Item], path: Path
) -> None:
    """Write an animation, a .gif or an .mp4, with a frame for each item as ``draw(item)`` draws it.

    Frames of a GIF share one palette, without dithering: a fraction of the size, and no flicker.
    """
    with _writing(path) as temporary:
        if path.suffix.lower() == '.mp4':
            from matplotlib.animation import FFMpegWriter

            writer = FFMpegWriter(FRAMES_PER_SECOND, extra_args=['-f', 'mp4'])
            with writer.saving(figure, temporary, FRAME_DPI):
                for item in items:
                    draw(item)
                    writer.grab_frame()
            return
        frames = []
        for item in items:
            draw(item)
            figure.canvas.draw()
            frames.append(Image.fromarray(np.array(figure.canvas.buffer_rgba())).convert('RGB'))
        palette = _with_palette(frames[-1], FRAME_COLORS)
        first, *rest = (
            frame.quantize(palette=palette, dither=Image.Dither.NONE) for frame in frames
        )
        duration = 1000 // FRAMES_PER_SECOND  # milliseconds; the last frame stays for longer
        durations = [duration] * len(rest) + [6 * duration]
        first.save(temporary, 'gif', save_all=True, append_images=rest, loop=0, duration=durations)
