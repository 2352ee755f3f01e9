"""The file of a network, MXNet's ``PREFIX-symbol.json``: written with a checksum, read with care.

A network is a program, and MXNet runs what it names: ``_Native`` and ``_NDArray`` call function
pointers at addresses in the file, and numbers in it make others divide by zero or write beyond
their memory. Ordinary layers, arithmetic, changes of shape and the center loss are allowed, and
MXNet is given only what has been checked, not the file.
"""

from collections.abc import Iterable, Iterator, Mapping
import contextlib
import hashlib
import io
import json
import math
import re
import warnings

from common.environment import mx
from center_loss import CenterLossProp  # noqa: F401  (registers the operator)
from common.errors import InputError

# Operators by the least and the greatest number of their inputs.
OPERATORS = {
    (0, 0): 'null _arange _full _ones _zeros',
    (1, 1): """
        Activation BlockGrad Cast Dropout Flatten L2Normalization LRN MakeLoss Pad Pooling Reshape
        SliceChannel SoftmaxActivation SwapAxis UpSampling abs argmax broadcast_axis clip
        depth_to_space erf exp expand_dims hard_sigmoid log log_softmax max mean min negative norm
        ones_like prod reciprocal relu repeat rsqrt sigmoid sign slice slice_axis softmax softsign
        space_to_depth sqrt square squeeze sum tanh tile transpose zeros_like _copy _div_scalar
        _maximum_scalar _minimum_scalar _minus_scalar _mul_scalar _plus_scalar _power_scalar
        _rdiv_scalar _rminus_scalar _rpower_scalar""",
    (1, 2): 'LeakyReLU',
    (2, 2): """
        Embedding LinearRegressionOutput LogisticRegressionOutput MAERegressionOutput
        SoftmaxOutput batch_dot broadcast_add broadcast_div broadcast_like broadcast_maximum
        broadcast_minimum broadcast_mul broadcast_power broadcast_sub dot elemwise_add elemwise_div
        elemwise_mul elemwise_sub slice_like""",
    (2, 3): 'Convolution Deconvolution FullyConnected',
    (3, 3): 'Custom GroupNorm InstanceNorm LayerNorm',
    (5, 5): 'BatchNorm',
    (1, 1000): 'Concat add_n stack',
}
NUM_INPUTS = {name: bounds for bounds, names in OPERATORS.items() for name in names.split()}
DIVISORS = {'block_size', 'dilate', 'num_group', 'num_groups', 'num_outputs', 'step', 'stride'}
MAX_NODES = 10_000
MAX_SIZE = 10**8  # of a number, or of all numbers of a shape together
NOT_IN_NETWORK = 'which the network does not have'


def encode_symbol(symbol: mx.sym.Symbol) -> bytes:
    """Return what ``symbol.save`` writes, with a checksum among the attributes of the graph."""
    return _with_checksum(json.loads(symbol.tojson()))


def _with_checksum(graph):
    attributes = {key: value for key, value in graph['attrs'].items() if key != 'sha256'}
    text = json.dumps({**graph, 'attrs': attributes})
    attributes['sha256'] = ['str', hashlib.sha256(text.encode()).hexdigest()]
    return json.dumps({**graph, 'attrs': attributes}, indent=1, ensure_ascii=False).encode()


def decode_symbol(data: bytes) -> mx.sym.Symbol:
    """Return the network of a file. Before it is bound, :func:`output_shapes` checks it further.

    Raises
    ------
    ValueError
        If ``data`` is not such a file, differs from its checksum, or holds something that is not
        allowed. The text says what.
    """
    try:
        graph = json.loads(data)
        if 'sha256' in graph.get('attrs', {}) and _with_checksum(graph) != data:
            raise ValueError('its checksum differs')
        return mx.sym.load_json(json.dumps(_checked_graph(graph), ensure_ascii=False))
    except mx.MXNetError as error:
        raise ValueError(str(error).strip().splitlines()[-1]) from None
    except (AttributeError, KeyError, OverflowError, RecursionError, TypeError) as error:
        raise ValueError(f'it is not a network of MXNet ({error!r})') from None


def _checked_graph(graph):
    """Return the graph that MXNet is to see."""
    nodes, num_outputs = [], []
    for node in graph['nodes'][: MAX_NODES + 1]:
        nodes.append(_checked_node(node, num_outputs))
        split = nodes[-1]['op'] == 'SliceChannel'
        num_outputs.append(int(nodes[-1]['attrs']['num_outputs']) if split else 1)
    if len(nodes) > MAX_NODES or len({node['name'] for node in nodes}) < len(nodes):
        raise ValueError(f'it has more than {MAX_NODES} operators, or two of one name')
    version = graph.get('attrs', {}).get('mxnet_version')
    return {
        'nodes': nodes,
        'arg_nodes': [index for index, node in enumerate(nodes) if node['op'] == 'null'],
        'heads': [_checked_entry(entry, num_outputs) for entry in graph['heads']],
        'attrs': {} if version is None else {'mxnet_version': ['int', int(version[1])]},
    }


def _checked_node(node, num_outputs):
    operator, name, attributes = str(node['op']), str(node['name']), {}
    for key in ('param', 'attr', 'attrs'):  # of MXNet before 0.9, before 1.0, and since
        attributes.update({str(key): str(value) for key, value in node.get(key, {}).items()})
    inputs = [_checked_entry(entry, num_outputs) for entry in node['inputs']]
    fewest, most = NUM_INPUTS.get(operator, (0, -1))
    if operator == 'Custom' and attributes.get('op_type') != 'centerloss':
        operator, most = f'Custom({attributes.get("op_type")})', -1
    if most < 0 or node.get('subgraphs') or node.get('control_deps'):
        raise ValueError(f'the operator {operator} of {name} is not allowed')
    if not fewest <= len(inputs) <= most:
        raise ValueError(f'the operator {operator} of {name} has {len(inputs)} inputs')
    for key, value in attributes.items():
        numbers = [float(number) for number in re.findall(r'(?<![\d.e])-?\d+(?![\d.e])', value)]
        largest = max(map(abs, [0, *numbers, math.prod(number or 1 for number in numbers)]))
        too_large = largest > (1000 if key == 'num_outputs' else MAX_SIZE)
        if too_large or (key in DIVISORS and min(numbers, default=1) < 1) or key == 'self':
            raise ValueError(f'the attribute {key}={value} of {name} is not allowed')
    return {'op': operator, 'name': name, 'attrs': attributes, 'inputs': inputs}


def _checked_entry(entry, num_outputs):
    """Return [node, output, version], which has to be an output of one of the nodes so far."""
    node, output, version = (int(number) for number in [*entry, 0][:3])
    if not (0 <= node < len(num_outputs) and 0 <= output < num_outputs[node] and version >= 0):
        raise ValueError(f'{entry} is not an output of an earlier operator')
    return [node, output, version]


def output_shapes(
    network: mx.sym.Symbol, data_shapes: Mapping[str, tuple], max_values: float = math.inf
) -> dict[str, tuple]:
    """Return the shapes of all variables and outputs by name, given those of the inputs.

    Raises
    ------
    InputError
        If the network does not fit the inputs, or has more than ``max_values`` in all for them.
    """
    internals, printed = network.get_internals(), io.StringIO()
    try:
        # MXNet warns of shapes that it cannot infer and prints them, beside what is wrong with an
        # operator in Python.
        with warnings.catch_warnings(), contextlib.redirect_stdout(printed):
            warnings.simplefilter('ignore')
            _, shapes, _ = internals.infer_shape(**data_shapes)
        if shapes is None:
            raise ValueError('shapes of other inputs are needed')
        names = internals.list_outputs()
        shapes = dict(zip(names, shapes, strict=True))
        if len(shapes) < len(names):
            raise ValueError('two of its outputs have one name')
        if sum(map(math.prod, shapes.values())) > max_values:
            raise ValueError(f'its outputs have more than {max_values} values')
        nodes = json.loads(network.tojson())['nodes']
        for node in nodes:
            if node['op'] == 'Reshape':  # MXNet does not compare sizes, and writes beyond memory
                source, index, _ = node['inputs'][0]
                source, result = nodes[source]['name'], node['name']
                names = (source, f'{source}_output', f'{source}_output{index}')
                sizes = [math.prod(shapes[name]) for name in names if name in shapes]
                if any(size != math.prod(shapes[f'{result}_output']) for size in sizes):
                    raise ValueError(f'{result} changes the number of values')
    except (mx.MXNetError, ValueError) as error:
        lines = [line for line in printed.getvalue().splitlines() if 'centerloss: ' in line]
        reason = [*str(error).strip().splitlines(), *lines][-1]
        raise InputError(f'the network does not take {dict(data_shapes)}: {reason}') from None
    return shapes


def parameter_mismatches(
    network: mx.sym.Symbol,
    data_shapes: Mapping[str, tuple] | Iterable[tuple[str, tuple]],
    arg_params: Mapping,
    aux_params: Mapping,
    max_values: float = math.inf,
) -> Iterator[tuple[str, str]]:
    """Yield (name, why) of parameters that are too many, missing or of another shape.

    ``data_shapes`` are the shapes of its inputs by name; labels may be left out. A network from a
    file has to be checked by this before it is bound. Raises InputError as :func:`output_shapes`.
    """
    data_shapes = dict(data_shapes)
    shapes = output_shapes(network, data_shapes, max_values)
    wanted = {
        name: shapes[name]
        for name in network.list_arguments() + network.list_auxiliary_states()
        if name not in data_shapes and not name.endswith('label')
    }
    given = {name: value.shape for name, value in {**arg_params, **aux_params}.items()}
    for name in sorted(given.keys() - wanted.keys()):
        yield name, NOT_IN_NETWORK
    for name in sorted(wanted.keys() - given.keys()):
        yield name, 'which is not there'
    for name in sorted(given.keys() & wanted.keys()):
        if given[name] != wanted[name]:
            yield name, f'of shape {given[name]} where the network has {wanted[name]}'
