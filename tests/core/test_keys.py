"""Keys: legacy and typed ones, and one stream per address."""

from __future__ import annotations

import itertools
from typing import Any

import jax
import numpy as np
import pytest

import gjflax
from gjflax import Normal, gen, slash, trace
from gjflax.core.keys import KeySource, is_typed_key, like_key, typed_key


def data(key: Any) -> tuple[int, ...]:
    return tuple(np.asarray(jax.random.key_data(key)).tolist())


TYPED, LEGACY = jax.random.key(3), jax.random.PRNGKey(3)


def test_legacy_keys_become_typed_ones_and_return_in_kind():
    assert is_typed_key(TYPED) and not is_typed_key(LEGACY)
    assert typed_key(TYPED) is TYPED
    assert data(typed_key(LEGACY)) == data(TYPED)
    assert data(typed_key(np.asarray(LEGACY))) == data(TYPED)
    assert is_typed_key(like_key(TYPED, TYPED)) and not is_typed_key(like_key(TYPED, LEGACY))
    np.testing.assert_array_equal(like_key(TYPED, LEGACY), LEGACY)


@pytest.mark.parametrize("implementation", ["rbg", "unsafe_rbg"])
def test_typed_keys_of_other_generators_are_kept(implementation: str):
    key, tr = Normal.simulate(jax.random.key(0, impl=implementation), (0.0, 1.0))
    assert str(implementation) in str(jax.random.key_impl(key))
    assert np.isfinite(tr.get_score())


@pytest.mark.parametrize("key", [TYPED, LEGACY], ids=["typed", "legacy"])
def test_slash_gives_a_key_to_go_on_and_keys_to_use(key: Any):
    carry, keys = slash(key, 5)
    assert keys.shape[0] == 5
    assert is_typed_key(carry) == is_typed_key(keys) == is_typed_key(key)
    assert len({data(key), data(carry), *map(data, keys)}) == 7


def test_a_source_depends_on_the_address_not_on_the_order():
    addresses = [("x",), ("y",), ("y", "z"), "x", ("a", "b", "c")]
    first = {}
    for order in itertools.permutations(addresses):
        source = KeySource(TYPED)
        keys = {address: data(source.at(address)) for address in order}
        first = first or keys
        assert keys == first
        assert len(set(keys.values())) == len(addresses), "two addresses share a key"
    assert data(KeySource(jax.random.key(4)).at(("x",))) != first["x",]


def test_addresses_whose_checksums_collide_have_keys_of_their_own(monkeypatch):
    monkeypatch.setattr("zlib.crc32", lambda _: 7)
    source = KeySource(TYPED)
    keys = [data(source.at(f"x{i}")) for i in range(20)]
    assert len({*keys, data(source.end())}) == 21


def test_no_address_has_the_key_to_go_on_with(monkeypatch):
    from gjflax.core import keys

    monkeypatch.setattr("zlib.crc32", lambda _: keys._END)
    source = KeySource(TYPED)
    assert data(source.at("x")) != data(source.end())


def test_a_source_that_was_not_asked_gives_its_key_back():
    assert KeySource(TYPED).end() is TYPED
    source = KeySource(TYPED)
    source.at("x")
    assert data(source.end()) != data(TYPED)


def test_another_choice_leaves_the_draws_of_the_others_alone():
    def model(names):
        @gen
        def body():
            return [trace(name, Normal)(0.0, 1.0) for name in names]

        return body.simulate(TYPED, ())[1].strip()

    one, other = model(["a", "b"]), model(["new", "b", "a"])
    assert one["a"] == other["a"] and one["b"] == other["b"]
    assert len({float(other[name]) for name in ("a", "b", "new")}) == 3


def test_methods_of_one_key_draw_independently_of_the_callee():
    """Two callees with the same addresses inside draw different values."""

    @gen
    def inner():
        return trace("x", Normal)(0.0, 1.0)

    @gen
    def outer():
        return trace("left", inner)(), trace("right", inner)(), trace("x", Normal)(0.0, 1.0)

    key, tr = outer.simulate(TYPED, ())
    assert len(set(map(float, tr.get_retval()))) == 3
    assert data(key) != data(TYPED)
    next_key, next_tr = outer.simulate(key, ())
    assert not set(map(float, tr.get_retval())) & set(map(float, next_tr.get_retval()))
    assert data(next_key) not in (data(key), data(TYPED))


def test_what_draws_nothing_leaves_the_key():
    @gen
    def nothing():
        return 1.0

    key, _ = nothing.simulate(TYPED, ())
    assert data(key) == data(TYPED)
    key, _ = Normal.assess(TYPED, 0.0, (0.0, 1.0))
    assert data(key) == data(TYPED)
    key, _ = gjflax.Map(Normal, in_axes=(0, None)).project(
        LEGACY,
        gjflax.Map(Normal, in_axes=(0, None)).simulate(LEGACY, (np.zeros(2, np.float32), 1.0))[1],
        gjflax.AllSelection(),
    )
    np.testing.assert_array_equal(key, LEGACY)
