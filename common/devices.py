"""The devices that share every batch."""

from collections.abc import Sequence

from common.environment import mx
from common.errors import InputError


def choose_devices(gpus: Sequence[int] = (), cpus: Sequence[int] = ()) -> list[mx.Context]:
    """Return the contexts of these GPUs, else of these CPU contexts, else the first CPU.

    Raises
    ------
    InputError
        Where this MXNet is built without CUDA, or this machine has no such GPU.
    """
    if gpus:
        option = f'--gpus={",".join(map(str, gpus))}'
        if not mx.runtime.Features().is_enabled('CUDA'):
            raise InputError(
                f'{option}: this MXNet is built for the CPU alone; install a CUDA build in its '
                'place (pip install mxnet-cu117, say), or leave --gpus out'
            )
        if max(gpus) >= mx.context.num_gpus():
            raise InputError(
                f'{option}: there is no GPU {max(gpus)}, MXNet sees {mx.context.num_gpus()} on '
                'this machine'
            )
    return [mx.gpu(i) for i in gpus] or [mx.cpu(i) for i in cpus] or [mx.cpu()]


def check_equal_shares(batch_size: int, devices: Sequence[mx.Context]) -> None:
    """Raise InputError where the devices cannot share a batch equally."""
    if batch_size % len(devices):
        raise InputError(
            f'--batch-size={batch_size} cannot be shared equally by {len(devices)} devices: '
            f'take a multiple of {len(devices)}'
        )


def check_divisible(val: mx.io.DataIter, num_devices: int) -> None:
    """Raise InputError where a validation batch has fewer images than there are devices."""
    if num_devices > 1:
        val.reset()
        smallest = min(len(batch.data[0]) for batch in val)
        if smallest < num_devices:
            raise InputError(
                f'a validation batch of {smallest} images cannot be shared by {num_devices} '
                'devices: take more validation images, or fewer devices'
            )
