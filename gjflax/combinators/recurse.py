r"""`Recurse`: recursion over a tree, down to a depth that is part of the program.

Every node of the tree has an input u. From it a production kernel draws the node's value v, and says which of its at most
B children there are, and their inputs u_1, …, u_B. When all below is done, an aggregation kernel makes the node's result w
of v and the children's results. At the last level D there are leaves, whose result a third function draws from the input.
With choices t_n of the production, s_n of the aggregation and l_n of the leaf at node n,

    p(tree; u) = Π_{inner nodes n} p_P(t_n; u_n) p_A(s_n; v_n, w of its children) · Π_{leaves n} p_L(l_n; u_n),

where the products are over the nodes that are there: the root, and every child that its parent's production asks for. An
inner node is one of the levels 0, …, D − 1; it may well have no children. The return value is the root's result.

So nothing is cut at the last level, and the density is normalised whatever the production does: a tree that would go on
there goes on by what the leaf function says. Trees that end above the last level have the density of the recursion
without a bound. Where that one is meant, let the leaf function make a choice that says that the bound was reached, and
constrain it to say no: what is left is the recursion without a bound, on the trees that end above level D.

The tree is stored as if it were complete: level l has B^l nodes, and the children of node i are B i, …, B i + B − 1 of the
next level. Those that are not there are masked. So it costs what the complete tree costs, B^D leaves in all.

After the `Recurse` combinator of Gen (M. Cusumano-Towner et al., PLDI 2019).
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np

from gjflax.combinators.branch_arguments import check_branches
from gjflax.combinators.map import Map
from gjflax.combinators.mask import Mask
from gjflax.combinators.presence import types
from gjflax.core.context import at_body, current_address
from gjflax.core.errors import ArgumentError, BranchMismatchError, show_address
from gjflax.core.trace import canonical, plain
from gjflax.language.gen import GenModule, trace


class Recurse(GenModule):
    """Recursion over a tree: called with ``(input, *shared)``. See the text of this file.

    The choices of node i of level l stand at ``("level_l", "production", i, ...)`` and ``("level_l", "aggregation", i,
    ...)``, those of the last level at ``("level_D", "leaf", i, ...)``. Each is a `Masked` value, there where the node is.
    When a choice changes which nodes there are, new ones are drawn or constrained and others are gone, as in `Mask`; those
    that are there before and after stay.

    Attributes:
      production: a generative function that is called with ``(input, *shared)`` and returns ``(value, inputs, exists)``: the
        node's value, its children's inputs (like the input, with a leading axis of `max_branch`), and which children there
        are: booleans, one for each, or how many, an integer.
      aggregation: a generative function that is called with ``(value, results, exists, *shared)``: the node's value, the
        children's results with a leading axis of `max_branch`, zero where there is no child, and the booleans. It
        returns the node's result.
      leaf: a generative function that is called with ``(input, *shared)`` and returns the result of a node of the last level.
      max_branch: how many children a node may have.
      max_depth: the last level; the root is level 0.

    The three are submodules ``production``, ``aggregation`` and ``leaf``: all nodes share their parameters.

    Raises:
      ArgumentError: if the production does not return these three, or inputs that are not like its own.
      BranchMismatchError: if the aggregation's result has another type than the leaf's.

    A tree whose nodes split with probability 0.4, and its number of leaves:

    >>> import gjflax, jax, jax.numpy as jnp
    >>> @gjflax.gen
    ... def split(size):
    ...     splits = gjflax.trace("splits", gjflax.Bernoulli)(probs=0.4)
    ...     return splits, jnp.stack([size / 2, size / 2]), 2 * splits
    >>> @gjflax.gen
    ... def count(splits, counts, exists):
    ...     return jnp.where(jnp.any(exists), jnp.sum(counts), 1)
    >>> @gjflax.gen
    ... def stop(size):
    ...     return jnp.int32(1)
    >>> tree = gjflax.Recurse(split, count, stop, max_branch=2, max_depth=3)
    >>> splits = {("level_0", "production", 0, "splits"): 1, ("level_1", "production"): {"splits": jnp.array([0, 0])}}
    >>> key, (weight, tr) = tree.importance(jax.random.key(0), splits, (1.0,))
    >>> int(tr.get_retval()), round(float(jnp.exp(weight)), 4)
    (2, 0.144)
    >>> tr["level_2", "production", 3, "splits"].flag
    Array(False, dtype=bool)
    """

    production: Any
    aggregation: Any
    leaf: Any
    max_branch: int
    max_depth: int

    def __post_init__(self) -> None:
        check_branches([self.production, self.aggregation, self.leaf], "Recurse")
        for name, least in (("max_branch", 1), ("max_depth", 0)):
            number = getattr(self, name)
            if not isinstance(number, int) or isinstance(number, bool) or number < least:
                raise ArgumentError(f"`{name}` of a Recurse is an integer from {least}; got {number!r}.")
        super().__post_init__()

    @nn.compact
    def __call__(self, *args: Any) -> Any:
        if not args:
            raise ArgumentError("The first argument of a Recurse is the root's input; got no arguments.")
        root, *shared = args
        inputs, there = jax.tree.map(lambda leaf: leaf[None], canonical(root)), jnp.ones(1, bool)
        levels = []
        for depth in range(self.max_depth):
            produced = self._at_nodes(self.production, depth, "production", there, (plain(inputs),), shared)
            with at_body():
                value, children, exists = self._children(produced, root, there)
            levels.append((there, value, exists))
            inputs, there = children, exists.reshape(-1)
        results = self._at_nodes(self.leaf, self.max_depth, "leaf", there, (plain(inputs),), shared)
        for depth, (there, value, exists) in reversed(list(enumerate(levels))):
            below = jax.tree.map(lambda leaf: leaf.reshape(-1, self.max_branch, *leaf.shape[1:]), canonical(results))
            own = (value, plain(below), exists)
            above = self._at_nodes(self.aggregation, depth, "aggregation", there, own, shared)
            with at_body():
                self._check_results(above, results)
            results = above
        return plain(jax.tree.map(lambda leaf: leaf[0], canonical(results)))

    @nn.nowrap
    def variables_of(self, trace: Any) -> Mapping[str, Any]:
        params: dict[str, Any] = {}
        for (_, kind), part in trace.by_path.items():
            known = part.get_gen_fn().variables_of(part).get("params")
            if known and kind not in params:
                params[kind] = known
        return {"params": params} if params else {}

    @nn.nowrap
    def _at_nodes(self, kernel: Any, depth: int, kind: str, there: Any, own: Any, shared: Any) -> Any:
        """What a kernel returns at all nodes of a level, zero where there is none."""
        in_axes = (0,) * (1 + len(own)) + (None,) * len(shared)
        nodes = Map(Mask(kernel), in_axes=in_axes)
        return trace((f"level_{depth}", kind), nodes)(there, *own, *shared).value

    @nn.nowrap
    def _children(self, produced: Any, root: Any, there: Any) -> tuple[Any, Any, Any]:
        """The values of a level, the inputs of the next one, and the flags of the children that there are."""
        at, branch = show_address(current_address()), self.max_branch
        if not isinstance(produced, tuple) or len(produced) != 3:
            raise ArgumentError(
                f"The production of the Recurse at {at} returns (value, inputs, exists); got {types(produced):.200}."
            )
        value, inputs, exists = produced
        inputs, exists = canonical(inputs), jnp.asarray(exists)
        given = types(jax.tree.map(lambda leaf: jax.ShapeDtypeStruct(leaf.shape[1:], leaf.dtype), inputs))
        like = jax.tree.map(lambda leaf: jax.ShapeDtypeStruct((branch, *leaf.shape), leaf.dtype), canonical(root))
        if given != types(like):
            raise ArgumentError(
                f"The production of the Recurse at {at} returns its children's inputs, like its own with a leading axis of "
                f"{branch}: {types(like)}; got {given}."
            )
        if exists.ndim == 1 and jnp.issubdtype(exists.dtype, jnp.integer):
            exists = np.arange(branch, dtype=np.int32)[None] < exists[:, None].astype(np.int32)
        elif exists.shape[1:] != (branch,) or exists.dtype != jnp.bool_:
            raise ArgumentError(
                f"The production of the Recurse at {at} says which of its {branch} children there are by as many booleans, "
                f"or by one integer, how many; got {types(jax.ShapeDtypeStruct(exists.shape[1:], exists.dtype))}."
            )
        inputs = jax.tree.map(lambda leaf: leaf.reshape(-1, *leaf.shape[2:]), inputs)
        return value, inputs, exists & there[:, None]

    @nn.nowrap
    def _check_results(self, above: Any, below: Any) -> None:
        shown, expected = (
            types(jax.tree.map(lambda leaf: jax.ShapeDtypeStruct(leaf.shape[1:], leaf.dtype), canonical(results)))
            for results in (above, below)
        )
        if shown != expected:
            raise BranchMismatchError(
                f"The aggregation of the Recurse at {show_address(current_address())} returns {shown}, and its children's "
                f"results are {expected}: the leaf function and the aggregation return one type."
            )
