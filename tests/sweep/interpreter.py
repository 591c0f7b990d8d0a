"""Running JAX's programs in NumPy, without compiling anything.

XLA needs a tenth of a second to compile even a small program, and a sweep runs each of its programs once. So what gjflax
does is traced to a jaxpr, as ``jax.jit`` would, and the jaxpr is evaluated here, equation by equation. A primitive that
is not in the table is left to JAX. A random key is one number of 64 bits.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.extend.core import ClosedJaxpr, Jaxpr, Literal
from scipy import special


class Staged:
    """A function traced once at the types of some inputs, to be run at any inputs of these types.

    Attributes:
      types: the types of its result.
    """

    def __init__(self, function: Callable[..., Any], *inputs: Any):
        self._jaxpr, self.types = jax.make_jaxpr(function, return_shape=True)(*inputs)

    def __call__(self, *inputs: Any) -> Any:
        with np.errstate(all="ignore"):
            outputs = _run_closed(self._jaxpr, list(map(_constant, jax.tree.leaves(inputs))))
        return jax.tree.structure(self.types).unflatten([np.array(output) for output in outputs])


def interpreted(function: Callable[..., Any], *inputs: Any) -> tuple[Any, Any]:
    """The function's result, a tree of NumPy arrays, and the types of that. It sees tracers in the place of arrays."""
    staged = Staged(function, *inputs)
    return staged(*inputs), staged.types


def eager(function: Callable[..., Any], *inputs: Any) -> tuple[Any, Any]:
    """The same by JAX, operation by operation."""
    result = function(*jax.tree.map(jnp.asarray, inputs))
    return jax.tree.map(jnp.asarray, result), jax.tree.map(jnp.asarray, result)


def compiled(function: Callable[..., Any], *inputs: Any) -> tuple[Any, Any]:
    """The same, compiled by JAX."""
    result = jax.jit(function)(*inputs)
    return result, result


def _run_closed(closed: Any, inputs: list[Any]) -> list[Any]:
    return _run(closed.jaxpr, [_constant(const) for const in closed.consts], inputs)


def _constant(value: Any) -> Any:
    if hasattr(value, "dtype") and jnp.issubdtype(value.dtype, jax.dtypes.prng_key):
        return _packed(np.asarray(jax.random.key_data(value)))
    return np.asarray(value)


def _run(jaxpr: Any, consts: list[Any], inputs: list[Any]) -> list[Any]:
    values: dict[Any, Any] = dict(zip(jaxpr.constvars, consts, strict=True))
    values.update(zip(jaxpr.invars, inputs, strict=True))

    def read(atom: Any) -> Any:
        return np.asarray(atom.val, _dtype(atom)) if isinstance(atom, Literal) else values[atom]

    for equation in jaxpr.eqns:
        operands = [read(atom) for atom in equation.invars]
        results = _apply(equation, operands)
        for variable, result in zip(equation.outvars, results, strict=True):
            values[variable] = result
    return [read(atom) for atom in jaxpr.outvars]


def _dtype(atom: Any) -> Any:
    return atom.aval.dtype


def _apply(equation: Any, operands: list[Any]) -> list[Any]:
    name, params = equation.primitive.name, equation.params
    control = _CONTROL.get(name)
    if control is not None:
        return control(operands, params)
    simple = _SIMPLE.get(name)
    if simple is not None:
        (variable,) = equation.outvars
        dtype = variable.aval.dtype
        result = simple(*operands, **params)
        return [np.asarray(result, np.uint64 if jnp.issubdtype(dtype, jax.dtypes.prng_key) else dtype)]
    below = [value for value in params.values() if isinstance(value, (ClosedJaxpr, Jaxpr))]
    if len(below) == 1:
        return _call(below[0], operands)
    arrays = [_as_jax(operand, atom.aval) for operand, atom in zip(operands, equation.invars, strict=True)]
    results = equation.primitive.bind(*arrays, **params)
    return list(map(_constant, results if equation.primitive.multiple_results else [results]))


def _as_jax(value: Any, aval: Any) -> Any:
    if jnp.issubdtype(aval.dtype, jax.dtypes.prng_key):
        return jax.random.wrap_key_data(jnp.asarray(np.stack(_words(value), -1)))
    return jnp.asarray(value)


def _call(jaxpr: Any, operands: list[Any]) -> list[Any]:
    return _run_closed(jaxpr, operands) if isinstance(jaxpr, ClosedJaxpr) else _run(jaxpr, [], operands)


# Control flow --------------------------------------------------------------------------------------------------------


def _scan(operands: list[Any], params: Any) -> list[Any]:
    consts, carry = operands[: params["num_consts"]], operands[params["num_consts"] :][: params["num_carry"]]
    xs = operands[params["num_consts"] + params["num_carry"] :]
    rows: list[Any] = [None] * params["length"]
    for index in reversed(range(len(rows))) if params["reverse"] else range(len(rows)):
        outputs = _call(params["jaxpr"], [*consts, *carry, *(x[index] for x in xs)])
        carry, rows[index] = outputs[: len(carry)], outputs[len(carry) :]
    if not rows:
        avals = params["jaxpr"].out_avals[len(carry) :]
        return [*carry, *(np.zeros((0, *aval.shape), aval.dtype) for aval in avals)]
    return [*carry, *(np.stack(column) for column in zip(*rows, strict=True))]


def _while(operands: list[Any], params: Any) -> list[Any]:
    first, second = params["cond_nconsts"], params["cond_nconsts"] + params["body_nconsts"]
    of_condition, of_body, carry = operands[:first], operands[first:second], operands[second:]
    while np.any(going := _call(params["cond_jaxpr"], [*of_condition, *carry])[0]):
        after = _call(params["body_jaxpr"], [*of_body, *carry])
        # Of a batch of loops, those stay as they are that have ended.
        carry = [_where_leading(going, new, old) for new, old in zip(after, carry, strict=True)]
    return carry


def _where_leading(flag: Any, new: Any, old: Any) -> Any:
    return np.where(np.reshape(flag, np.shape(flag) + (1,) * (np.ndim(new) - np.ndim(flag))), new, old)


def _cond(operands: list[Any], params: Any) -> list[Any]:
    index, *rest = operands
    return _call(params["branches"][int(np.clip(index, 0, len(params["branches"]) - 1))], rest)


def _split(operands: list[Any], params: Any) -> list[Any]:
    return np.split(operands[0], np.cumsum(params["sizes"])[:-1], params["axis"])


def _sort(operands: list[Any], params: Any) -> list[Any]:
    keys = operands[: params["num_keys"]][::-1]
    order = np.lexsort([np.moveaxis(key, params["dimension"], -1) for key in keys], axis=-1)
    order = np.moveaxis(order, -1, params["dimension"])
    return [np.take_along_axis(operand, order, params["dimension"]) for operand in operands]


def _threefry_pair(operands: list[Any], params: Any) -> list[Any]:
    return list(_threefry(*operands))


def _top(operands: list[Any], params: Any) -> list[Any]:
    return list(operands)


_CONTROL: dict[str, Callable[[list[Any], Any], list[Any]]] = {
    "scan": _scan,
    "while": _while,
    "cond": _cond,
    "split": _split,
    "sort": _sort,
    "threefry2x32": _threefry_pair,
    "optimization_barrier": _top,
    "custom_jvp_call": lambda operands, params: _call(params["call_jaxpr"], operands),
    "custom_vjp_call": lambda operands, params: _call(params["call_jaxpr"], operands),
    "custom_lin": _top,
}

# Random numbers ------------------------------------------------------------------------------------------------------

_ROTATIONS = ((13, 15, 26, 6), (17, 29, 16, 24))


def _threefry(key0: Any, key1: Any, x0: Any, x1: Any) -> tuple[Any, Any]:
    """Twenty rounds of Threefry-2x32."""
    keys = (key0, key1, key0 ^ key1 ^ np.uint32(0x1BD11BDA))
    x0, x1 = x0 + keys[0], x1 + keys[1]
    for group in range(5):
        for distance in _ROTATIONS[group % 2]:
            x0 = x0 + x1
            x1 = (x1 << np.uint32(distance)) | (x1 >> np.uint32(32 - distance))
            x1 = x0 ^ x1
        x0 = x0 + keys[(group + 1) % 3]
        x1 = x1 + keys[(group + 2) % 3] + np.uint32(group + 1)
    return x0, x1


def _packed(words: Any) -> Any:
    """Keys of their two words, which stand on the last axis."""
    return (words[..., 0].astype(np.uint64) << np.uint64(32)) | words[..., 1].astype(np.uint64)


def _words(keys: Any) -> tuple[Any, Any]:
    keys = np.asarray(keys, np.uint64)
    return (keys >> np.uint64(32)).astype(np.uint32), keys.astype(np.uint32)


def _counted(keys: Any, shape: tuple[int, ...]) -> tuple[Any, Any]:
    """The two halves of so many random words for each key."""
    counts = np.arange(math.prod(shape), dtype=np.uint32).reshape(shape)
    key0, key1 = (word.reshape(word.shape + (1,) * len(shape)) for word in _words(keys))
    return _threefry(key0, key1, np.zeros_like(counts), counts)


def _random_bits(keys: Any, *, bit_width: int, shape: tuple[int, ...]) -> Any:
    high, low = _counted(keys, shape)
    if bit_width == 64:
        return (high.astype(np.uint64) << np.uint64(32)) | low
    return (high ^ low).astype(f"uint{bit_width}")


def _random_fold_in(keys: Any, messages: Any) -> Any:
    messages = np.asarray(messages).astype(np.uint32)
    return _packed(np.stack(_threefry(*_words(keys), np.zeros_like(messages), messages), -1))


def _random_seed(seeds: Any, *, impl: Any) -> Any:
    return np.asarray(seeds).astype(np.uint32 if np.asarray(seeds).dtype.itemsize <= 4 else np.uint64).astype(np.uint64)


# Arrays --------------------------------------------------------------------------------------------------------------


def _broadcast_in_dim(x: Any, *, shape: tuple[int, ...], broadcast_dimensions: tuple[int, ...], **_: Any) -> Any:
    aligned = [1] * len(shape)
    for axis, size in zip(broadcast_dimensions, np.shape(x), strict=False):
        aligned[axis] = size
    extra = np.shape(x)[len(broadcast_dimensions) :]
    return np.broadcast_to(np.reshape(x, (*aligned, *extra)), (*shape, *extra))


def _dot_general(x: Any, y: Any, *, dimension_numbers: Any, **_: Any) -> Any:
    (contract_x, contract_y), (batch_x, batch_y) = dimension_numbers
    letters = iter(range(x.ndim + y.ndim))
    names_x = [next(letters) for _ in range(x.ndim)]
    names_y = [next(letters) for _ in range(y.ndim)]
    for one, other in zip((*contract_x, *batch_x), (*contract_y, *batch_y), strict=True):
        names_y[other] = names_x[one]
    out = [names_x[axis] for axis in batch_x]
    out += [name for axis, name in enumerate(names_x) if axis not in (*contract_x, *batch_x)]
    out += [name for axis, name in enumerate(names_y) if axis not in (*contract_y, *batch_y)]
    return np.einsum(x, names_x, y, names_y, out)


def _dynamic_slice(x: Any, *starts: Any, slice_sizes: tuple[int, ...], **_: Any) -> Any:
    return x[_window(x.shape, starts, slice_sizes)]


def _dynamic_update_slice(x: Any, update: Any, *starts: Any) -> Any:
    result = np.array(x)
    result[_window(x.shape, starts, update.shape)] = update
    return result


def _window(shape: tuple[int, ...], starts: Any, sizes: tuple[int, ...]) -> tuple[slice, ...]:
    first = [int(np.clip(start, 0, n - size)) for start, n, size in zip(starts, shape, sizes, strict=True)]
    return tuple(slice(start, start + size) for start, size in zip(first, sizes, strict=True))


def _inside(shape: tuple[int, ...], starts: Any, sizes: Any) -> bool:
    return all(0 <= start <= n - size for start, n, size in zip(starts, shape, sizes, strict=True))


def _gather(
    x: Any, indices: Any, *, dimension_numbers: Any, slice_sizes: Any, mode: Any, fill_value: Any, **_: Any
) -> Any:
    numbers = dimension_numbers
    batch = indices.shape[:-1]
    dropped = (*numbers.collapsed_slice_dims, *numbers.operand_batching_dims)
    kept = [size for axis, size in enumerate(slice_sizes) if axis not in dropped]
    result = np.zeros((*batch, *kept), x.dtype)
    fills = "FILL" in str(mode)
    for at in np.ndindex(*batch):
        start = [0] * x.ndim
        for place, axis in enumerate(numbers.start_index_map):
            start[axis] = int(indices[at][place])
        for axis, of in zip(numbers.operand_batching_dims, numbers.start_indices_batching_dims, strict=True):
            start[axis] = at[of]
        if fills and not _inside(x.shape, start, slice_sizes):
            result[at] = _fill(x.dtype) if fill_value is None else fill_value
        else:
            result[at] = x[_window(x.shape, start, slice_sizes)].reshape(kept)
    rank = result.ndim
    others = [axis for axis in range(rank) if axis not in numbers.offset_dims]
    return np.moveaxis(result, range(rank), [*others, *numbers.offset_dims])


def _fill(dtype: Any) -> Any:
    if np.issubdtype(dtype, np.inexact):
        return np.nan
    return (
        np.iinfo(dtype).min
        if np.issubdtype(dtype, np.signedinteger)
        else True
        if dtype.kind == "b"
        else np.iinfo(dtype).max
    )


def _scatter(combine: Callable[[Any, Any], Any]) -> Callable[..., Any]:
    def scatter(x: Any, indices: Any, updates: Any, *, dimension_numbers: Any, mode: Any, **_: Any) -> Any:
        numbers = dimension_numbers
        inserted = (*numbers.inserted_window_dims, *numbers.operand_batching_dims)
        others = [axis for axis in range(updates.ndim) if axis not in numbers.update_window_dims]
        updates = np.transpose(updates, [*others, *numbers.update_window_dims])
        window = list(updates.shape[len(others) :])
        sizes = [1 if axis in inserted else window.pop(0) for axis in range(x.ndim)]
        result = np.array(x)
        for at in np.ndindex(*indices.shape[:-1]):
            start = [0] * x.ndim
            for place, axis in enumerate(numbers.scatter_dims_to_operand_dims):
                start[axis] = int(indices[at][place])
            for axis, of in zip(numbers.operand_batching_dims, numbers.scatter_indices_batching_dims, strict=True):
                start[axis] = at[of]
            if "CLIP" not in str(mode) and not _inside(x.shape, start, sizes):
                continue
            here = _window(x.shape, start, tuple(sizes))
            result[here] = combine(result[here], updates[at].reshape(sizes))
        return result

    return scatter


def _select_n(which: Any, *cases: Any) -> Any:
    if len(cases) == 2 and which.dtype == bool:
        return np.where(which, cases[1], cases[0])
    return np.choose(np.broadcast_to(which, cases[0].shape), cases)


def _reduce(function: Callable[..., Any]) -> Callable[..., Any]:
    return lambda x, *, axes, **_: function(x, axis=tuple(axes))


def _elementwise(function: Callable[..., Any]) -> Callable[..., Any]:
    return lambda *operands, **_: function(*operands)


def _cumulative(function: Callable[..., Any]) -> Callable[..., Any]:
    def run(x: Any, *, axis: int, reverse: bool, **_: Any) -> Any:
        return np.flip(function(np.flip(x, axis), axis=axis), axis) if reverse else function(x, axis=axis)

    return run


def _divide(x: Any, y: Any) -> Any:
    if np.issubdtype(x.dtype, np.floating):
        return x / y
    return np.trunc(x / np.where(y == 0, 1, y))


def _slice(x: Any, *, start_indices: Any, limit_indices: Any, strides: Any) -> Any:
    strides = strides or (1,) * x.ndim
    return x[tuple(slice(a, b, c) for a, b, c in zip(start_indices, limit_indices, strides, strict=True))]


def _triangular_solve(
    a: Any, b: Any, *, left_side: bool, lower: bool, transpose_a: bool, unit_diagonal: bool, **_: Any
) -> Any:
    a = np.tril(a) if lower else np.triu(a)
    if unit_diagonal:
        a = a - a * np.eye(a.shape[-1], dtype=a.dtype) + np.eye(a.shape[-1], dtype=a.dtype)
    a = np.swapaxes(a, -1, -2) if transpose_a else a
    if left_side:
        return _or_nan(np.linalg.solve, a, b)
    return np.swapaxes(_or_nan(np.linalg.solve, np.swapaxes(a, -1, -2), np.swapaxes(b, -1, -2)), -1, -2)


def _cholesky(x: Any, **_: Any) -> Any:
    return _or_nan(np.linalg.cholesky, x)


def _or_nan(function: Callable[..., Any], *operands: Any) -> Any:
    """NaN for the matrices for which NumPy raises and XLA does not, as in a branch that is not taken."""
    try:
        return function(*operands)
    except np.linalg.LinAlgError:
        if np.ndim(operands[0]) == 2:
            return np.full_like(operands[-1], np.nan)
        # NumPy raises for all matrices of a batch if one is singular.
        return np.stack([_or_nan(function, *each) for each in zip(*operands, strict=True)])


def _pad(x: Any, value: Any, *, padding_config: Any) -> Any:
    shape = [
        low + n + high + max(n - 1, 0) * inner for n, (low, high, inner) in zip(x.shape, padding_config, strict=True)
    ]
    result = np.full(shape, value, x.dtype)
    at = [
        slice(low, low + n + max(n - 1, 0) * i, i + 1) for n, (low, _, i) in zip(x.shape, padding_config, strict=True)
    ]
    result[tuple(at)] = x
    return result


def _iota(*, dtype: Any, shape: tuple[int, ...], dimension: int, **_: Any) -> Any:
    along = np.arange(shape[dimension], dtype=dtype).reshape(
        [-1 if axis == dimension else 1 for axis in range(len(shape))]
    )
    return np.broadcast_to(along, shape)


def _shift_right(x: Any, y: Any) -> Any:
    return np.where(y < np.asarray(x.dtype.itemsize * 8, y.dtype), x >> y, 0)


def _expand_dims(x: Any, *, dimensions: Any) -> Any:
    return np.expand_dims(x, tuple(dimensions))


@functools.cache
def _plain(function: Callable[..., Any]) -> Callable[..., Any]:
    return _elementwise(function)


_SIMPLE: dict[str, Callable[..., Any]] = {
    # Keys
    "random_bits": _random_bits,
    "random_split": lambda keys, *, shape: _packed(np.stack(_counted(keys, shape), -1)),
    "random_fold_in": _random_fold_in,
    "random_seed": _random_seed,
    "random_wrap": lambda words, *, impl: _packed(words),
    "random_unwrap": lambda keys: np.stack(_words(keys), -1),
    # Elementwise
    **{
        name: _plain(function)
        for name, function in {
            "abs": np.abs,
            "acos": np.arccos,
            "add": np.add,
            "add_any": np.add,
            "and": np.bitwise_and,
            "asin": np.arcsin,
            "atan": np.arctan,
            "atan2": np.arctan2,
            "bessel_i0e": special.i0e,
            "bessel_i1e": special.i1e,
            "ceil": np.ceil,
            "clamp": lambda low, x, high: np.minimum(np.maximum(x, low), high),
            "copy": np.array,
            "copy_p": np.array,
            "cos": np.cos,
            "cosh": np.cosh,
            "digamma": special.digamma,
            "div": _divide,
            "eq": np.equal,
            "erf": special.erf,
            "erfc": special.erfc,
            "erf_inv": special.erfinv,
            "exp": np.exp,
            "exp2": np.exp2,
            "expm1": np.expm1,
            "floor": np.floor,
            "ge": np.greater_equal,
            "gt": np.greater,
            "igamma": special.gammainc,
            "igammac": special.gammaincc,
            "is_finite": np.isfinite,
            "le": np.less_equal,
            "lgamma": special.gammaln,
            "log": np.log,
            "log1p": np.log1p,
            "logistic": special.expit,
            "lt": np.less,
            "max": np.maximum,
            "min": np.minimum,
            "mul": np.multiply,
            "ne": np.not_equal,
            "neg": np.negative,
            "nextafter": np.nextafter,
            "not": np.invert,
            "or": np.bitwise_or,
            "pow": np.power,
            "real": np.real,
            "regularized_incomplete_beta": special.betainc,
            "rem": np.fmod,
            "round": np.round,
            "rsqrt": lambda x: 1 / np.sqrt(x),
            "shift_left": np.left_shift,
            "shift_right_logical": _shift_right,
            "sign": np.sign,
            "sin": np.sin,
            "sinh": np.sinh,
            "sqrt": np.sqrt,
            "square": np.square,
            "stop_gradient": np.array,
            "sub": np.subtract,
            "tan": np.tan,
            "tanh": np.tanh,
            "xor": np.bitwise_xor,
        }.items()
    },
    "integer_pow": lambda x, *, y: np.power(x, np.asarray(y, x.dtype)) if y >= 0 else 1 / np.power(x, -y),
    "select_n": _select_n,
    "convert_element_type": lambda x, *, new_dtype, **_: np.asarray(x).astype(new_dtype),
    "bitcast_convert_type": lambda x, *, new_dtype: np.asarray(x).view(new_dtype),
    "reduce_precision": lambda x, **_: x,
    # Shapes
    "broadcast_in_dim": _broadcast_in_dim,
    "concatenate": lambda *xs, dimension: np.concatenate(xs, dimension),
    "expand_dims": _expand_dims,
    "iota": _iota,
    "pad": _pad,
    "reshape": lambda x, *, new_sizes, **_: np.reshape(x, new_sizes),
    "rev": lambda x, *, dimensions: np.flip(x, tuple(dimensions)),
    "slice": _slice,
    "squeeze": lambda x, *, dimensions: np.squeeze(x, tuple(dimensions)),
    "transpose": lambda x, *, permutation: np.transpose(x, permutation),
    # Indices
    "dynamic_slice": _dynamic_slice,
    "dynamic_update_slice": _dynamic_update_slice,
    "gather": _gather,
    "scatter": _scatter(lambda old, new: new),
    "scatter-add": _scatter(np.add),
    "scatter_add": _scatter(np.add),
    "scatter_mul": _scatter(np.multiply),
    # Reductions
    "argmax": lambda x, *, axes, index_dtype: np.argmax(x, axes[0]),
    "argmin": lambda x, *, axes, index_dtype: np.argmin(x, axes[0]),
    "reduce_and": _reduce(np.all),
    "reduce_max": _reduce(np.max),
    "reduce_min": _reduce(np.min),
    "reduce_or": _reduce(np.any),
    "reduce_prod": _reduce(np.prod),
    "reduce_sum": _reduce(np.sum),
    "cumsum": _cumulative(np.cumsum),
    "cumprod": _cumulative(np.cumprod),
    "cummax": _cumulative(np.maximum.accumulate),
    "cummin": _cumulative(np.minimum.accumulate),
    # Matrices
    "dot_general": _dot_general,
    "triangular_solve": _triangular_solve,
    "cholesky": _cholesky,
}
