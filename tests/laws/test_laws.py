"""The laws of the interface, for every generative function of `laws.cases`, against densities written by hand."""

from __future__ import annotations

import itertools
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from laws.cases import Case, each_case, each_case_with_parameters

import gjflax
from gjflax import Diff, choice_map, select

KEYS = jax.random.split(jax.random.key(20), 6)
RTOL, ATOL = 2e-5, 2e-4


def total(terms: dict[Any, np.ndarray], of: Any = None) -> float:
    return float(sum(np.sum(value) for address, value in terms.items() if of is None or address in of))


def subsets(addresses: list[Any]) -> list[list[Any]]:
    """Nothing, everything, each one, and all but each one."""
    ones = [[address] for address in addresses]
    rest = [[other for other in addresses if other != address] for address in addresses]
    chosen = [[], addresses, *ones, *rest]
    return [list(part) for part in dict.fromkeys(map(tuple, chosen))]


def only(choices: Any, addresses: list[Any]) -> Any:
    """The part of a choice map at these addresses."""
    return choice_map({address: choices.get_subtree(address) for address in addresses})


def close(got: Any, want: Any) -> None:
    np.testing.assert_allclose(np.asarray(got, np.float64), want, rtol=RTOL, atol=ATOL)


def same_choices(a: Any, b: Any) -> None:
    assert sorted(a.addresses()) == sorted(b.addresses())
    for address in a.addresses():
        np.testing.assert_array_equal(a.get_subtree(address).get_value(), b.get_subtree(address).get_value())


def types(tree: Any) -> Any:
    leaves = [(leaf.shape, leaf.dtype, getattr(leaf, "weak_type", False)) for leaf in jax.tree.leaves(tree)]
    return jax.tree.structure(tree), leaves


def two_traces(case: Case) -> tuple[Any, Any, Any]:
    model = case.bound()
    _, first = model.simulate(KEYS[0], case.args)
    _, second = model.simulate(KEYS[1], case.args)
    return model, first, second


@each_case
def test_simulate_scores_what_it_drew(case: Case):
    model, trace, other = two_traces(case)
    close(trace.get_score(), total(case.oracle(trace.strip())))
    for a, b in zip(jax.tree.leaves(trace.strip()), jax.tree.leaves(other.strip()), strict=True):
        if jnp.issubdtype(a.dtype, jnp.floating):
            assert not np.any(np.asarray(a) == np.asarray(b)), "two keys drew the same value"
            assert len(np.unique(np.asarray(a))) == a.size, "two elements share their randomness"


@each_case
def test_assess_agrees_with_simulate_and_with_the_hand(case: Case):
    model, trace, _ = two_traces(case)
    for args in (case.args, case.other_args):
        _, (retval, score) = model.assess(KEYS[2], trace.strip(), args)
        close(score, total(case.oracle(trace.strip(), args)))
    _, (retval, score) = model.assess(KEYS[2], trace.strip().to_dict(), case.args)
    close(score, trace.get_score())
    jax.tree.map(np.testing.assert_array_equal, retval, trace.get_retval())


@each_case
def test_propose_is_simulate(case: Case):
    model, trace, _ = two_traces(case)
    _, (choices, score, retval) = model.propose(KEYS[0], case.args)
    same_choices(choices, trace.strip())
    close(score, trace.get_score())
    jax.tree.map(np.testing.assert_array_equal, retval, trace.get_retval())


@each_case
def test_importance_weighs_the_constraints(case: Case):
    """w = log p(all) − log q(the rest), and with ancestral sampling that is the sum of the constrained terms."""
    model, trace, _ = two_traces(case)
    for addresses in subsets(trace.strip().addresses()):
        constraints = only(trace.strip(), addresses)
        _, (weight, new) = model.importance(KEYS[2], constraints, case.args)
        terms = case.oracle(new.strip())
        close(weight, total(terms, of=addresses))
        close(new.get_score(), total(terms))
        same_choices(only(new.strip(), addresses), constraints)


@each_case
def test_update_weighs_the_difference(case: Case):
    model, trace, other = two_traces(case)
    addresses = trace.strip().addresses()
    for chosen, args in itertools.product(subsets(addresses), (case.args, case.other_args)):
        new_values = only(other.strip(), chosen)
        _, (retdiff, weight, new, discard) = model.update(KEYS[2], trace, new_values, args)
        want_choices = trace.strip().overwrite(new_values)
        same_choices(new.strip(), want_choices)
        same_choices(discard, only(trace.strip(), chosen))
        terms = case.oracle(want_choices, args)
        close(weight, total(terms) - total(case.oracle(trace.strip())))
        close(new.get_score(), total(terms))
        _, (retval, _) = model.assess(KEYS[2], want_choices, args)
        jax.tree.map(np.testing.assert_array_equal, Diff.primal(retdiff), retval)
        jax.tree.map(np.testing.assert_array_equal, new.get_retval(), retval)
        assert types(new) == types(trace), "update changed the types of a trace, which cannot be a scan's carry"


@each_case_with_parameters
def test_changed_parameters_are_one_more_argument(case: Case):
    """Nothing is said of them, so they count as changed; all arguments are said to be the same."""
    _, trace, other = two_traces(case)
    variables = case.variables()
    params = jax.tree.map(lambda leaf: leaf + 0.25, variables.get("params", {}))
    model = case.gen_fn.bind({**variables, "params": params})
    diffs, before = tuple(map(Diff.no_change, case.args)), total(case.oracle(trace.strip()))
    for chosen in ([], trace.strip().addresses()[:1]):
        new_values = only(other.strip(), chosen)
        _, (_, weight, new, _) = model.update(KEYS[2], trace, new_values, diffs)
        after = total(case.oracle(trace.strip().overwrite(new_values), params=params))
        close(weight, after - before)
        close(new.get_score(), after)
    _, (_, weight, new) = model.regenerate(KEYS[2], trace, gjflax.NoneSelection(), diffs)
    after = total(case.oracle(trace.strip(), params=params))
    close(weight, after - before)
    close(new.get_score(), after)


@each_case
def test_discard_is_the_inverse(case: Case):
    model, trace, other = two_traces(case)
    for chosen in subsets(trace.strip().addresses()):
        _, (_, weight, new, discard) = model.update(KEYS[2], trace, only(other.strip(), chosen), case.other_args)
        _, (_, back_weight, back, _) = model.update(KEYS[3], new, discard, case.args)
        close(back_weight, -np.float64(weight))
        same_choices(back.strip(), trace.strip())
        close(back.get_score(), trace.get_score())


@each_case
def test_updates_in_a_row(case: Case):
    """The score that an update leaves behind is the one that the next starts from."""
    model, trace, other = two_traces(case)
    _, third = model.simulate(KEYS[4], case.args)
    for address in trace.strip().addresses():
        current, weights = trace, 0.0
        for source in (other, third, trace):
            _, (_, weight, current, _) = model.update(KEYS[2], current, only(source.strip(), [address]), case.args)
            weights += np.float64(weight)
            close(current.get_score(), total(case.oracle(current.strip())))
        close(weights, 0.0)
        same_choices(current.strip(), trace.strip())


@each_case
def test_regenerate_weighs_what_it_keeps(case: Case):
    """Kept choices contribute new minus old, redrawn ones nothing."""
    model, trace, _ = two_traces(case)
    addresses = trace.strip().addresses()
    for chosen, args in itertools.product(subsets(addresses), (case.args, case.other_args)):
        selection = _select(chosen)
        _, (retdiff, weight, new) = model.regenerate(KEYS[3], trace, selection, args)
        kept = [address for address in addresses if address not in chosen]
        same_choices(only(new.strip(), kept), only(trace.strip(), kept))
        for address in chosen:
            if address not in case.discrete:
                assert not np.any(new.strip()[address] == trace.strip()[address]), "a selected choice was kept"
        after, before = case.oracle(new.strip(), args), case.oracle(trace.strip())
        close(weight, total(after, of=kept) - total(before, of=kept))
        close(new.get_score(), total(after))
        assert types(new) == types(trace)
        jax.tree.map(np.testing.assert_array_equal, Diff.primal(retdiff), new.get_retval())


def _select(addresses: list[Any]) -> gjflax.Selection:
    if () in addresses:
        return gjflax.AllSelection()
    return select(list(addresses))


@each_case
def test_project_is_a_share_of_the_score(case: Case):
    model, trace, _ = two_traces(case)
    addresses = trace.strip().addresses()
    for chosen in subsets(addresses):
        _, share = model.project(KEYS[2], trace, _select(chosen))
        close(share, total(case.oracle(trace.strip()), of=chosen))
        choices, weight = _select(chosen).filter(trace)
        close(weight, share)
        same_choices(choices, only(trace.strip(), chosen))
        _, rest = model.project(KEYS[2], trace, ~_select(chosen))
        close(np.float64(share) + np.float64(rest), trace.get_score())


@each_case
def test_unchanged_update_does_nothing(case: Case):
    """Not a bit where the parameters are known to be the same; else they count as changed, and all is computed again."""
    model, trace, _ = two_traces(case)
    diffs = tuple(map(Diff.no_change, case.args))
    _, (_, weight, new, discard) = model.update(KEYS[2], trace, {}, diffs, param_diff=Diff.no_change)
    assert weight == 0.0
    assert discard.is_empty()
    jax.tree.map(np.testing.assert_array_equal, new, trace)
    _, (_, weight, new, discard) = model.update(KEYS[2], trace, {}, diffs)
    close(weight, 0.0)
    assert discard.is_empty()
    same_choices(new.strip(), trace.strip())
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-5, atol=1e-5), new, trace)


@each_case
def test_jit_changes_nothing(case: Case):
    model, trace, other = two_traces(case)
    chosen = trace.strip().addresses()[:1]
    constraints = only(other.strip(), chosen)
    calls = {
        "simulate": lambda key, tr, chm: model.simulate(key, case.args),
        "importance": lambda key, tr, chm: model.importance(key, chm, case.args),
        "assess": lambda key, tr, chm: model.assess(key, tr.strip(), case.args),
        "update": lambda key, tr, chm: model.update(key, tr, chm, case.other_args),
        "regenerate": lambda key, tr, chm: model.regenerate(key, tr, _select(chosen), case.other_args),
    }
    for name, call in calls.items():
        compiled = jax.jit(call)
        plain, fast = call(KEYS[2], trace, constraints), compiled(KEYS[2], trace, constraints)
        assert types(plain) == types(fast), name
        for a, b in zip(jax.tree.leaves(plain), jax.tree.leaves(fast), strict=True):
            if not jnp.issubdtype(a.dtype, jax.dtypes.prng_key):
                np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-4, err_msg=name)
        compiled(KEYS[3], other, constraints)
        compiled(KEYS[3], fast[1] if name == "simulate" else trace, constraints)
        assert compiled._cache_size() == 1, f"{name} was traced again"


@each_case
def test_vmap_is_a_loop(case: Case):
    model, keys = case.bound(), KEYS[:3]
    _, traces = jax.vmap(lambda key: model.simulate(key, case.args))(keys)
    addresses = traces.strip().addresses()

    def move(key, tr):
        _, (_, w, new, _) = model.update(key, tr, {}, case.other_args)
        _, (_, v, newer) = model.regenerate(key, new, _select(addresses[-1:]), case.args)
        return w, v, newer

    batched = jax.vmap(move)(keys, traces)
    close(traces.get_score(), [traces_at(traces, i).get_score() for i in range(len(keys))])
    for i, key in enumerate(keys):
        one = traces_at(traces, i)
        _, alone = model.simulate(key, case.args)
        jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-5), one, alone)
        looped = move(key, one)
        for a, b in zip(jax.tree.leaves(traces_at(batched, i)), jax.tree.leaves(looped), strict=True):
            np.testing.assert_allclose(a, b, rtol=1e-3, atol=1e-3)


def traces_at(traces: Any, index: int) -> Any:
    return jax.tree.map(lambda leaf: leaf[index], traces)


@each_case
def test_a_trace_is_a_scan_carry(case: Case):
    model, trace, other = two_traces(case)
    chosen = trace.strip().addresses()[:1]

    def step(carry, value):
        key, tr = carry
        key, (_, _, tr, _) = model.update(key, tr, value, case.other_args)
        key, (_, _, tr) = model.regenerate(key, tr, _select(trace.strip().addresses()), case.args)
        return (key, tr), tr.get_score()

    values = jax.tree.map(lambda leaf: jnp.stack([leaf] * 3), only(other.strip(), chosen))
    (_, last), scores = jax.lax.scan(step, (KEYS[0], trace), values)
    close(scores[-1], total(case.oracle(last.strip())))


@each_case
def test_keys_come_back_in_kind(case: Case):
    model = case.bound()
    legacy = jax.random.PRNGKey(3)
    key, trace = model.simulate(legacy, case.args)
    assert key.dtype == jnp.uint32 and key.shape == (2,)
    assert not np.array_equal(key, legacy)
    typed, again = model.simulate(jax.random.wrap_key_data(legacy), case.args)
    same_choices(trace.strip(), again.strip())
    np.testing.assert_array_equal(jax.random.key_data(typed), key)


@each_case
def test_apply_is_bind(case: Case):
    variables = case.variables()
    model, trace, _ = two_traces(case)
    _, applied = case.gen_fn.apply(variables, KEYS[0], case.args, method="simulate")
    same_choices(applied.strip(), trace.strip())
    _, (_, score) = jax.jit(lambda v: case.gen_fn.apply(v, KEYS[0], trace.strip(), case.args, method="assess"))(
        variables
    )
    close(score, trace.get_score())


@each_case
def test_the_trace_knows_its_origin(case: Case):
    model, trace, other = two_traces(case)
    assert trace.get_gen_fn() == case.gen_fn
    assert trace.get_gen_fn().scope is None
    assert jax.tree.structure(trace) == jax.tree.structure(other)
    given = jax.tree.leaves(trace.get_args()[: len(case.args)])
    jax.tree.map(np.testing.assert_array_equal, given, jax.tree.leaves(case.args))
    assert not any(isinstance(leaf, float) for leaf in jax.tree.leaves(trace))


@each_case_with_parameters
def test_init_makes_the_same_parameters_by_every_method(case: Case):
    """Also under the leak check: parameters made inside a raw transformation would leak out of `init`."""
    expected = case.variables()
    _, trace = case.bound().simulate(KEYS[1], case.args)
    choices = trace.strip()
    calls = {
        "__call__": case.args,
        "simulate": (KEYS[2], case.args),
        "propose": (KEYS[2], case.args),
        "importance": (KEYS[2], choices, case.args),
        "assess": (KEYS[2], choices, case.args),
        "update": (KEYS[2], trace, choices, case.args),
        "regenerate": (KEYS[2], trace, gjflax.AllSelection(), case.args),
    }
    shapes = jax.tree.map(lambda leaf: (leaf.shape, leaf.dtype), expected)
    for method, arguments in calls.items():
        with jax.checking_leaks():
            made = jax.eval_shape(lambda key, m=method, a=arguments: case.gen_fn.init(key, *a, method=m), KEYS[0])
        assert jax.tree.map(lambda leaf: (leaf.shape, leaf.dtype), made) == shapes, method
    made = jax.jit(lambda key: case.gen_fn.init(key, *calls["assess"], method="assess"))(jax.random.key(7))
    jax.tree.map(np.testing.assert_array_equal, made, expected)
