"""Write a trained network for other programs: plain MXNet, and ONNX.

    python -m tools.export --output digits                         the newest epoch of center_loss
    python -m tools.export --model-prefix=softmax --epoch=8 --output digits

    digits-symbol.json, digits-0000.params    for MXNet alone: plain layers, no labels
    digits.onnx                               for ONNX; needs pip install -r requirements-onnx.txt

Outputs are ``embedding`` (B, d) and ``probability`` (B, K) for any number B of images. The input is
float32 (B, 1, height, width), pixels from 0 to 255 divided by 256: ``data`` in MXNet, ``image`` in
ONNX. docs/export.md has a program for each.
"""

from collections.abc import Sequence
import contextlib
import hashlib
import json
import os
from pathlib import Path
import warnings

from common.environment import mx
from common.array_file import encode_arrays, tagged
from common.checkpoints import Checkpoints
from common.command_line import ArgumentParser, add_run_arguments, run_script
from common.embedder import Embedder, choose_run
from common.errors import InputError
from common.evaluation import center_loss_weight
from common.files import replace_when_whole, write_synced
from common.log_file import log_to_stderr

OPSET = 13  # the newest that MXNet's converter knows; it would claim that of the installed onnx
SUFFIXES = ('-symbol.json', '-0000.params', '.onnx')


def inference_network(embedder: Embedder) -> tuple[mx.sym.Symbol, dict, dict]:
    """Return a network of plain layers with its weights and other states by name.

    Its outputs are ``embedding_output`` (B, d) and ``probability_output`` (B, K), its only input is
    ``data`` (B, 1, height, width).
    """
    (embedding, logits), *params = embedder.network()
    return mx.sym.Group([embedding, mx.sym.softmax(logits, name='probability')]), *params


def write_mxnet(network: mx.sym.Symbol, arg_params: dict, aux_params: dict, output: Path) -> str:
    """Write ``OUTPUT-symbol.json`` and ``OUTPUT-0000.params``, both or none; return their names."""
    symbol_path, params_path = (Path(f'{output}{suffix}') for suffix in SUFFIXES[:2])
    contents = {
        symbol_path: [network.tojson().encode()],
        params_path: encode_arrays(tagged(arg_params, aux_params)),
    }
    with contextlib.ExitStack() as stack:
        for path, chunks in contents.items():
            write_synced(stack.enter_context(replace_when_whole(path)), chunks)
    return f'{symbol_path} and {params_path}'


def write_onnx(
    network: mx.sym.Symbol, arg_params: dict, aux_params: dict, embedder: Embedder, path: Path
) -> None:
    """Write an ONNX file with a free batch dimension and :func:`metadata`.

    Raises
    ------
    InputError
        If no suitable onnx is installed, or MXNet has no converter for a layer.
    """
    try:
        import onnx
        from onnx import checker, helper, mapping  # noqa: F401  (gone in onnx 1.19)
    except ImportError:
        raise InputError(
            f"{path} is not written: MXNet's converter needs onnx 1.13 to 1.18, which "
            'pip install -r requirements-onnx.txt installs'
        ) from None
    shape = (1, *embedder.image_shape)
    network = network(data=mx.sym.var('image'))
    _, shapes, _ = network.infer_shape(image=(1, *shape))
    with replace_when_whole(path) as temporary, warnings.catch_warnings():
        warnings.simplefilter('ignore')  # of NumPy and onnx, in MXNet's converter
        try:
            mx.onnx.export_model(
                network,
                [arg_params, aux_params],
                in_shapes=[(1, *shape)],
                onnx_file_path=str(temporary),
                dynamic=True,
                dynamic_input_shapes=[(None, *shape)],
            )
            graph = onnx.load(temporary).graph
            for values, sizes in (
                (graph.input, {'image': shape}),
                (graph.output, {'embedding': shapes[0][1:], 'probability': shapes[1][1:]}),
            ):
                del values[:]
                values.extend(
                    helper.make_tensor_value_info(name, onnx.TensorProto.FLOAT, ['batch', *size])
                    for name, size in sizes.items()
                )
            used = {name for node in graph.node for name in node.input}
            for unused in [value for value in graph.initializer if value.name not in used]:
                graph.initializer.remove(unused)  # onnxruntime would warn of it
            opset = helper.make_opsetid('', OPSET)
            model = helper.make_model_gen_version(graph, opset_imports=[opset])
            helper.set_model_props(model, metadata(embedder))
            checker.check_model(model, full_check=True)
        except OSError:
            raise
        except Exception as error:  # the converter and the checker raise any kind
            reason = (str(error).strip() or repr(error)).splitlines()[-1]
            raise InputError(f'{path} is not written: {reason}') from None
        write_synced(temporary, [model.SerializeToString()])


def metadata(embedder: Embedder) -> dict[str, str]:
    """Return what a user of the network has to know, as JSON by name."""
    params_path = embedder.checkpoints.params_path(embedder.epoch)
    facts = {
        'pixel_scale': 1 / 256,
        'image_shape': embedder.image_shape,
        'class_names': embedder.class_names,
        'centers': None if embedder.centers is None else embedder.centers.tolist(),
        'rejection_distance': embedder.rejection_distance,
        'run': {
            'dataset': embedder.dataset,
            'center_loss_weight': center_loss_weight(embedder.checkpoints.prefix),
            'checkpoint': params_path.name,
            'sha256': hashlib.sha256(params_path.read_bytes()).hexdigest(),
        },
    }
    return {name: json.dumps(value) for name, value in facts.items() if value is not None}


def check_names(output: Path) -> None:
    """Raise InputError for a name that is no beginning of a file name, or that of a run."""
    folders = [f'{output}{suffix}' for suffix in SUFFIXES if os.path.isdir(f'{output}{suffix}')]
    problem = None
    if output.suffix == '.onnx':
        problem = 'leave out .onnx, which is added'
    elif os.path.isdir(output):
        problem = 'it is a folder, and has to be the beginning of a file name'
    elif not os.path.isdir(output.parent):
        problem = f'there is no folder {output.parent}'
    elif folders:
        problem = f'{folders[0]} is a folder'
    elif any(epoch > 0 for epoch in Checkpoints(output).epochs()):  # 0 is an earlier export
        problem = 'a run has its checkpoints there'
    if problem:
        raise InputError(f'cannot write to --output={output}: {problem}')


def main(argv: Sequence[str] = ()) -> None:
    """Export what the command line names."""
    parser = ArgumentParser(prog='python -m tools.export', description=__doc__)
    add_run_arguments(parser)
    parser.add_argument(
        '--output',
        type=Path,
        required=True,
        metavar='NAME',
        help='beginning of the names of the files, with or without a folder, which has to exist',
    )
    args = parser.parse_args(list(argv))
    check_names(args.output)
    with log_to_stderr():
        embedder = Embedder(choose_run(args.model_prefix), args.epoch)
    network, path = inference_network(embedder), Path(f'{args.output}.onnx')
    print(embedder.description)
    try:
        written = write_mxnet(*network, args.output)
        print(f'wrote {written} for MXNet')
        write_onnx(*network, embedder, path)
        print(f'wrote {path} for ONNX')
    except OSError as error:
        raise InputError(f'cannot write to --output={args.output}: {error.strerror}') from None


if __name__ == '__main__':
    run_script(main)
