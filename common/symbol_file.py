"""The file of a network, MXNet's ``PREFIX-symbol.json``: encoded with a checksum, decoded with care.

A network is a program, and MXNet runs whatever it names: ``_Native`` and ``_NDArray`` call function
pointers at addresses in the file. What is loaded here consists of ordinary layers, arithmetic and
changes of shape, and of the center loss. MXNet gets a rendition of what was checked, not the file.
"""

import hashlib
import json
import math
import re

import center_loss  # noqa: F401  (registers the operator)
from common.environment import mx

# Operators by the least and the greatest number of inputs.
OPERATORS = {
    (0, 0): '_zeros _ones _full _arange null',
    (1, 1): """
        Activation BlockGrad Cast Dropout Flatten L2Normalization LRN MakeLoss Pad Pooling Reshape
        SliceChannel SoftmaxActivation SwapAxis UpSampling abs argmax argmin broadcast_axis
        broadcast_to cbrt clip cos depth_to_space erf exp expand_dims expm1 hard_sigmoid identity
        log log1p log_softmax make_loss max mean min negative norm ones_like prod rcbrt reciprocal
        relu repeat reverse round rsqrt sigmoid sign sin slice slice_axis softsign space_to_depth
        sqrt square squeeze sum tan tanh tile transpose zeros_like
        _copy _div_scalar _equal_scalar _greater_equal_scalar _greater_scalar _lesser_equal_scalar
        _lesser_scalar _maximum_scalar _minimum_scalar _minus_scalar _mul_scalar _not_equal_scalar
        _plus_scalar _power_scalar _rdiv_scalar _rminus_scalar _rpower_scalar""",
    (1, 2): 'LeakyReLU softmax',
    (2, 2): """
        Custom Embedding LinearRegressionOutput LogisticRegressionOutput MAERegressionOutput
        SoftmaxOutput batch_dot broadcast_add broadcast_div broadcast_equal broadcast_greater
        broadcast_greater_equal broadcast_lesser broadcast_lesser_equal broadcast_like
        broadcast_maximum broadcast_minimum broadcast_mul broadcast_not_equal broadcast_power
        broadcast_sub dot elemwise_add elemwise_div elemwise_mul elemwise_sub pick reshape_like
        slice_like smooth_l1 softmax_cross_entropy take
        _equal _greater _greater_equal _lesser _lesser_equal _maximum _minimum _not_equal _power""",
    (2, 3): 'Convolution Deconvolution FullyConnected',
    (3, 3): 'GroupNorm InstanceNorm LayerNorm where',
    (5, 5): 'BatchNorm',
    (1, 1000): 'Concat add_n stack',
}
NUM_INPUTS = {name: bounds for bounds, names in OPERATORS.items() for name in names.split()}
# Attributes that MXNet divides by, or takes as the number of something, without a look.
POSITIVE = {
    'block_size', 'dilate', 'kernel', 'nsize', 'num_args', 'num_class', 'num_filter', 'num_group',
    'num_groups', 'num_hidden', 'num_outputs', 'output_dim', 'input_dim', 'step', 'stride',
}  # fmt: skip
MAX_SIZE = 10**8  # of a number or a shape
MAX_NODES = 10_000


def encode_symbol(symbol: mx.sym.Symbol) -> bytes:
    """Return what ``symbol.save`` writes, with its checksum among the attributes of the graph."""
    return _with_checksum(json.loads(symbol.tojson()))


def _with_checksum(graph):
    attributes = {key: value for key, value in graph['attrs'].items() if key != 'sha256'}
    text = json.dumps({**graph, 'attrs': attributes}, indent=1, ensure_ascii=False)
    checksum = hashlib.sha256(text.encode()).hexdigest()
    graph = {**graph, 'attrs': {**attributes, 'sha256': ['str', checksum]}}
    return json.dumps(graph, indent=1, ensure_ascii=False).encode()


def decode_symbol(data: bytes) -> mx.sym.Symbol:
    """Return the network of a file.

    Raises
    ------
    ValueError
        If ``data`` is not such a file, differs from its checksum, or holds an operator or a number
        that is not let through. The text says why.
    """
    try:
        graph = json.loads(data)
        if 'sha256' in graph.get('attrs', {}) and _with_checksum(graph) != data:
            raise ValueError('its checksum differs')
        checked = _checked_graph(graph)
    except (AttributeError, IndexError, KeyError, TypeError, RecursionError) as error:
        raise ValueError(f'it is not a network of MXNet ({error!r})') from None
    try:
        return mx.sym.load_json(json.dumps(checked, ensure_ascii=False))
    except mx.MXNetError as error:
        raise ValueError(f'MXNet refuses it: {str(error).splitlines()[-1]}') from None


def _checked_graph(graph):
    """Return what of a graph MXNet is to see. Raises ValueError for what it must not."""
    if len(graph['nodes']) > MAX_NODES:
        raise ValueError(f'it has {len(graph["nodes"])} operators, more than {MAX_NODES}')
    nodes, num_outputs = [], []
    for node in graph['nodes']:
        nodes.append(_checked_node(node, num_outputs))
        split = node['op'] == 'SliceChannel'
        num_outputs.append(int(nodes[-1]['attrs']['num_outputs']) if split else 1)
    version = graph.get('attrs', {}).get('mxnet_version')
    return {
        'nodes': nodes,
        'arg_nodes': [index for index, node in enumerate(nodes) if node['op'] == 'null'],
        'heads': [_checked_entry(entry, num_outputs) for entry in graph['heads']],
        'attrs': {} if version is None else {'mxnet_version': ['int', int(version[1])]},
    }


def _checked_node(node, num_outputs):
    operator, name = str(node['op']), str(node['name'])
    attributes = {}
    for key in ('param', 'attr', 'attrs'):  # of MXNet before 0.9, before 1.0, and since
        attributes.update({str(key): str(value) for key, value in node.get(key, {}).items()})
    if node.get('subgraphs') or node.get('control_deps'):
        raise ValueError(f'{name} has a graph of its own')
    if operator == 'Custom' and attributes.get('op_type') != 'centerloss':
        operator = f'Custom({attributes.get("op_type")})'
    fewest, most = NUM_INPUTS.get(operator, (0, -1))
    if most < 0:
        raise ValueError(f'{name} is an operator {operator}, which is not let through')
    inputs = [_checked_entry(entry, num_outputs) for entry in node['inputs']]
    if not fewest <= len(inputs) <= most:
        raise ValueError(f'{name} ({operator}) has {len(inputs)} inputs')
    for key, value in attributes.items():
        numbers = [int(number) for number in re.findall(r'(?<![\d.e])-?\d+(?![\d.e])', value)]
        largest = max([abs(number) for number in numbers] + [abs(math.prod(numbers))])
        if largest > MAX_SIZE or (key in POSITIVE and min(numbers, default=1) < 1):
            raise ValueError(f'{name} has {key}={value}')
    return {'op': operator, 'name': name, 'attrs': attributes, 'inputs': inputs}


def _checked_entry(entry, num_outputs):
    """Return [node, output, version] of an output of one of the nodes so far."""
    node, output, version = (*entry, 0)[:3]
    if not (
        0 <= node < len(num_outputs) and 0 <= output < num_outputs[node] and 0 <= version < 1000
    ):
        raise ValueError(f'{entry} is not an output of an earlier operator')
    return [int(node), int(output), int(version)]
