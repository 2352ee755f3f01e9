"""The devices that share every batch."""

from collections.abc import Sequence

from common.environment import mx
from common.errors import InputError
from common.mxnet_build import check_single_build


def choose_devices(gpus: Sequence[int] = (), cpus: Sequence[int] = ()) -> list[mx.Context]:
    """Return the contexts of these GPUs, else of these CPU contexts, else the first CPU.

    Raises
    ------
    InputError
        Where this MXNet is built without CUDA, or this machine has no such GPU, or the GPU does not
        compute.
    """
    if gpus:
        option = f'--gpus={",".join(map(str, gpus))}'
        check_single_build()
        if not mx.runtime.Features().is_enabled('CUDA'):
            raise InputError(
                f'{option}: this MXNet is built for the CPU alone: pip install -r '
                'requirements-gpu.txt in a fresh environment (over this one it would break both '
                'builds), or leave --gpus out'
            )
        found = mx.context.num_gpus()
        if max(gpus) >= found:
            which = f'only {", ".join(map(str, range(found)))}' if found else 'none at all'
            raise InputError(
                f'{option}: there is no GPU {max(gpus)}, MXNet finds {which}; nvidia-smi lists '
                'those of this machine, CUDA_VISIBLE_DEVICES may hide some, and the driver has to '
                'be 450.80 or newer'
            )
        for gpu in gpus:
            _check_computes(gpu, option)
    return [mx.gpu(i) for i in gpus] or [mx.cpu(i) for i in cpus] or [mx.cpu()]


def _check_computes(gpu, option):
    """Raise InputError where a first small operation on a GPU fails."""
    try:
        mx.nd.ones(1, ctx=mx.gpu(gpu)).asnumpy()
    except mx.MXNetError as error:
        message = str(error)
        if 'no kernel image' in message:  # CUDA error 209
            raise InputError(
                f'{option}: this MXNet has no machine code for GPU {gpu}: it runs on the '
                'generations Maxwell, Pascal, Volta, Turing, Ampere and Ada, not on Hopper or '
                'Blackwell; leave --gpus out to train on the CPU'
            ) from None
        reason = message.strip().splitlines()[-1].removeprefix('MXNetError: ')
        raise InputError(f'{option}: GPU {gpu} does not compute: {reason}') from None


def check_equal_shares(batch_size: int, devices: Sequence[mx.Context]) -> None:
    """Raise InputError where the devices cannot share a batch equally."""
    if batch_size % len(devices):
        raise InputError(
            f'--batch-size={batch_size} cannot be shared equally by {len(devices)} devices: '
            f'take a multiple of {len(devices)}'
        )


def check_enough_images(batches: mx.io.DataIter, num_devices: int, name: str) -> None:
    """Raise InputError where a batch has fewer images than there are devices.

    ``name`` says what the batches are for, 'training' or 'validation'.
    """
    if num_devices > 1:
        batches.reset()
        smallest = min(len(batch.data[0]) for batch in batches)
        if smallest < num_devices:
            raise InputError(
                f'a {name} batch of {smallest} images cannot be shared by {num_devices} devices: '
                f'take more {name} images, or fewer devices'
            )
