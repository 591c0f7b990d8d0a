"""One program under random calls of the interface: every result against the oracle.

With ancestral sampling every weight is a sum of the log densities of single choices, so from the choices before and
after a call, its constraints and its selection all numbers follow. The choices themselves obey rules: what is
constrained has the given value, what is kept the old one, and the rest is fresh.
"""

from __future__ import annotations

import contextlib
import dataclasses
import zlib
from collections.abc import Callable, Iterable, Iterator
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from sweep import expressions as ex
from sweep.choices import flat, has_discrete, pick, pick_selection
from sweep.draws import Draws
from sweep.generate import Writer
from sweep.interpreter import Staged, interpreted
from sweep.programs import Address, Node, Site, Values, World, built, source

import gjflax
from gjflax import Diff
from gjflax.core.interned import program_key


class Discrepancy(AssertionError):
    """gjflax and the oracle disagree. The text holds the program, the calls and both numbers."""


@dataclasses.dataclass
class State:
    """A trace, its choices and its types as gjflax gives them, and what the oracle knows of it."""

    trace: Any
    choice_map: Any
    types: Any
    args: tuple[Any, ...]
    params: Any
    choices: Values
    sites: dict[Address, Site]
    retval: Any
    found: Any


class Session:
    """A program, its arguments and parameters, and the calls made so far.

    Args:
      node: the program.
      writer: what wrote it, for further decisions.
      draws: where fresh values are taken down; they are looked at together, after many programs.
      runner: how the calls are run.
    """

    def __init__(self, node: Node, writer: Writer, draws: Draws | None = None, runner: Runner = interpreted):
        self.node, self.writer, self.decide, self.draws, self.runner = node, writer, writer.decide, draws, runner
        self.calls: list[str] = []
        self.text = source(node)
        self._seed = zlib.crc32(self.text.encode())
        self.module = built(node)
        self.args = tuple(writer.value(kind) for kind in node.inputs)
        self.params: Any = {}
        if node.has_parameters:
            with self.reporting(f"init(key, *{_shown(self.args)})"):
                variables = self.execute(lambda key, *args: self.module.init(key, *args), *ex.to_jax(self.args))
            self.require("params" in variables, f"init makes no parameters, but {sorted_(variables)}")
            self.params = variables["params"]
        self.state: State | None = None
        self._simulated: Staged | None = None

    # Saying what went wrong -----------------------------------------------------------------------------------------

    @contextlib.contextmanager
    def reporting(self, call: str) -> Iterator[None]:
        """Say in an error which call it was."""
        self.calls.append(call)
        try:
            yield
        except Discrepancy:
            raise
        except Exception as error:
            raise Discrepancy(self.report(f"raised {type(error).__name__}: {error}")) from error

    def report(self, problem: str) -> str:
        """The program, the calls, and the problem."""
        calls = "\n".join(f"  {call}" for call in self.calls)
        return f"\n{self.text}\n\nargs = {_shown(self.args)}\n\ncalls:\n{calls}\n\n{problem}"

    def require(self, holds: Any, problem: str) -> None:
        """A rule."""
        if not holds:
            raise Discrepancy(self.report(problem))

    def equal_numbers(self, what: str, got: Any, want: float, terms: Iterable[float] = ()) -> None:
        """Two numbers, up to the rounding of the terms that the first is a sum of."""
        got = np.asarray(got)
        self.require(got.shape == (), f"{what} has shape {got.shape}, and is one number")
        scale = 1.0 + sum(abs(term) for term in terms if np.isfinite(term))
        same = got == want if not np.isfinite(want) else abs(float(got) - want) <= self.tolerance * scale
        self.require(same, f"{what}: gjflax {float(got)!r}, oracle {want!r}")

    def equal_values(self, what: str, got: Any, want: Any) -> None:
        """Two trees of values. Of those that may be absent, what is there."""
        got = ex.as_possibly(got)
        structures = jax.tree.structure(got), jax.tree.structure(want)
        self.require(structures[0] == structures[1], f"{what}: gjflax {structures[0]}, oracle {structures[1]}")
        for a, b in zip(jax.tree.leaves(got), jax.tree.leaves(want), strict=True):
            a, b = np.asarray(a), np.asarray(b)
            close = a.shape == b.shape and np.allclose(a, b, rtol=self.tolerance, atol=self.tolerance)
            self.require(close, f"{what}: gjflax {a.tolist()}, oracle {b.tolist()}")

    @property
    def tolerance(self) -> float:
        return 1e-9 if jax.config.read("jax_enable_x64") else 2e-4

    # Running --------------------------------------------------------------------------------------------------------

    def execute(self, function: Callable[..., Any], *inputs: Any) -> Any:
        """A function of a random key and inputs."""
        result, self.types = self.runner(lambda words, *rest: function(_key(words), *rest), self.key(), *inputs)
        return result

    def call(self, function: Callable[..., Any], params: Any, *inputs: Any) -> Any:
        """A function of the module with parameters, a random key and inputs."""
        bound = lambda key, params, *rest: function(self.module.bind({"params": params}), key, *rest)
        if self.node.has_parameters:
            return self.execute(bound, params, *inputs)
        return self.execute(lambda key, *rest: function(self.module, key, *rest), *inputs)

    def key(self) -> Any:
        """The words of a new random key: it depends on the program, for else two programs would share their draws."""
        self._seed = zlib.crc32(self._seed.to_bytes(4, "little"))
        return np.asarray([0, self._seed], np.uint32)

    def run(self, choices: Values, args: tuple[Any, ...], params: Any) -> tuple[Any, dict[Address, Site]]:
        """The oracle: what the program returns, and its sites."""
        world = World(choices)
        retval = self.node.run(world, (), ex.to_float64(args), ex.to_float64(params))
        return retval, world.sites

    def visit(self, what: str, seen: Any, args: tuple[Any, ...], params: Any, types: Any) -> State:
        """Read a trace, and check all that it says by itself."""
        trace, choices = seen["trace"], flat(seen["choices"])
        try:
            retval, sites = self.run(choices, args, params)
        except Exception as error:
            raise Discrepancy(self.report(f"{what}: the oracle has no run for {choices}: {error!r}")) from error
        self.require(
            set(sites) == set(choices), f"{what}: the trace has {sorted_(choices)}, the oracle visits {sorted_(sites)}"
        )
        terms = [site.log_density for site in sites.values()]
        self.equal_numbers(f"{what}: score", seen["score"], sum(terms), terms)
        self.equal_values(f"{what}: retval", seen["retval"], retval)
        self.equal_values(f"{what}: args", seen["args"][: len(args)], ex.to_float64(args))
        # An equal program may have been written before, and its module be the one in the trace.
        same = program_key(trace.get_gen_fn()) == program_key(self.module)
        self.require(same, f"{what}: the trace has another generative function")
        return State(trace, seen["choices"], types["trace"], args, params, choices, sites, retval, seen["retval"])

    def fresh(self, what: str, sites: dict[Address, Site], addresses: Iterable[Address]) -> None:
        """Look at values that were drawn."""
        drawn = {address: sites[address] for address in addresses}
        if self.draws is not None:
            shared = self.draws.look(what, drawn)
            self.require(not shared, f"{what}: {shared} share their randomness: {drawn}")

    # Laws -----------------------------------------------------------------------------------------------------------

    def simulate(self) -> None:
        """The score is that of what was drawn."""
        with self.reporting("simulate(key, args)"):
            seen, types = self.simulated(self.args)
        self.state = self.visit("simulate", seen, self.args, self.params, types)
        self.fresh("simulate", self.state.sites, self.state.sites)

    def propose(self) -> None:
        """Choices with their score."""
        with self.reporting("propose(key, args)"):
            choices, score, retval = self.call(
                lambda f, key, args: f.propose(key, args)[1], self.params, ex.to_jax(self.args)
            )
        values = flat(choices)
        expected, sites = self.run(values, self.args, self.params)
        terms = [site.log_density for site in sites.values()]
        self.require(set(sites) == set(values), f"propose: the choices are {sorted_(values)}")
        self.equal_numbers("propose: score", score, sum(terms), terms)
        self.equal_values("propose: retval", retval, expected)

    def importance(self) -> None:
        """w is the density of the constraints, given what was drawn before them."""
        constraints, given = self.constraints(self.donor(self.args))
        with self.reporting(f"importance(key, {_written(constraints, given)}, args)"):

            def run(f: Any, key: Any, constraints: Any, args: Any) -> Any:
                _, (weight, trace) = f.importance(key, constraints, args)
                return {**_seen(trace), "weight": weight}

            seen = self.call(run, self.params, constraints, ex.to_jax(self.args))
        state, weight = self.visit("importance", seen, self.args, self.params, self.types), seen["weight"]
        used = self.taken_up("importance", given, state)
        terms = [state.sites[address].log_density for address in used]
        self.equal_numbers("importance: weight", weight, sum(terms), terms)
        self.fresh("importance", state.sites, [address for address in state.sites if address not in used])
        self.move_to(self.need_state(), state)

    def assess(self) -> None:
        """The density and the return value, of given choices at other arguments."""
        state = self.need_state()
        args = self.other_args()
        choices = state.choice_map
        with self.reporting(f"assess(key, choices, {_shown(args)})"):
            # A dict has no place for addresses that differ by element.
            if self.decide(2) and not _has_masks(choices) and not _has_traced_indices(choices):
                choices = choices.to_dict()
            retval, score = self.call(
                lambda f, key, choices, args: f.assess(key, choices, args)[1], self.params, choices, ex.to_jax(args)
            )
        try:
            expected, sites = self.run(state.choices, args, self.params)
        except Exception:
            return  # other arguments need other choices
        if set(sites) != set(state.choices):
            return
        terms = [site.log_density for site in sites.values()]
        self.equal_numbers("assess: score", score, sum(terms), terms)
        self.equal_values("assess: retval", retval, expected)

    def update(self) -> None:
        """w = log p(t') − log p(t) − log q(fresh); discard is what was overwritten or is gone."""
        old = self.need_state()
        args, argdiffs, shown = self.change_of_arguments()
        params, options = self.change_of_parameters()
        constraints, given = self.constraints(self.donor(args))
        what = f"update(key, trace, {_written(constraints, given)}, {shown}{_options(options)})"
        with self.reporting(what):
            seen = self.updated(old.trace, constraints, argdiffs, params, options)
        new, weight = self.visit("update", seen, args, params, self.types), seen["weight"]
        used = self.taken_up("update", given, new)
        fresh = self.kept_or_fresh("update", old, new, used)
        self.same_types("update", old, new)
        gone = [address for address in old.sites if address not in new.sites]
        self.weighs("update", weight, old, new, without=fresh)
        wanted = {address: old.choices[address] for address in old.sites if address in used or address in gone}
        discarded = flat(seen["discard"])
        self.require(
            set(discarded) == set(wanted),
            f"update: discard has {sorted_(discarded)}; overwritten or gone are {sorted_(wanted)}",
        )
        for address, value in wanted.items():
            self.require(np.array_equal(discarded[address], value), f"update: discard holds another value at {address}")
        self.honest_retdiff("update", seen["retdiff"], old, new)
        self.fresh("update", new.sites, fresh)
        if self.decide(3) == 2 and np.isfinite(np.asarray(weight)):
            self.undo(old, new, weight, seen["discard"], fresh)
        self.move_to(old, new)

    def updated(self, trace: Any, constraints: Any, argdiffs: Any, params: Any, options: dict[str, Any]) -> Any:
        """What `update` gives."""

        def run(f: Any, key: Any, trace: Any, constraints: Any, argdiffs: Any) -> Any:
            _, (retdiff, weight, new, discard) = f.update(key, trace, constraints, argdiffs, **options)
            return {**_seen(new), "retdiff": retdiff, "weight": weight, "discard": discard}

        return self.call(run, params, trace, constraints, argdiffs)

    def undo(self, old: State, new: State, weight: Any, discard: Any, fresh: list[Address]) -> None:
        """Updating with what was discarded gives the old trace and the negative weight."""
        with self.reporting("update(key, new trace, discard, old args)"):
            seen = self.updated(new.trace, discard, ex.to_jax(old.args), old.params, {})
        again, back = self.visit("update back", seen, old.args, old.params, self.types), seen["weight"]
        self.require(
            set(again.choices) == set(old.choices)
            and all(np.array_equal(again.choices[address], old.choices[address]) for address in old.choices),
            f"update back: the choices are {again.choices}, and were {old.choices}",
        )
        # What was fresh is gone again, at its density.
        drawn = [new.sites[address].log_density for address in fresh]
        terms = [site.log_density for state in (old, new) for site in state.sites.values()]
        self.equal_numbers("update back: weight", back, -float(weight) - sum(drawn), terms)
        self.same_types("update back", new, again)

    def regenerate(self) -> None:
        """w is what kept choices gained; what is redrawn, new or gone counts nothing."""
        old = self.need_state()
        args, argdiffs, shown = self.change_of_arguments()
        params, options = self.change_of_parameters()
        selection, selects = pick_selection(old.choice_map, self.decide)
        selected = sorted_(address for address in old.sites if selects(address))
        with self.reporting(f"regenerate(key, trace, select {selected}, {shown}{_options(options)})"):

            def run(f: Any, key: Any, trace: Any, argdiffs: Any) -> Any:
                _, (retdiff, weight, trace) = f.regenerate(key, trace, selection, argdiffs, **options)
                return {**_seen(trace), "retdiff": retdiff, "weight": weight}

            seen = self.call(run, params, old.trace, argdiffs)
        new, weight = self.visit("regenerate", seen, args, params, self.types), seen["weight"]
        redrawn = [address for address in new.sites if address not in old.sites or selects(address)]
        kept = [address for address in new.sites if address not in redrawn]
        for address in kept:
            self.unchanged("regenerate", address, old, new)
        for address in redrawn:
            if address in old.sites and not new.sites[address].family.is_discrete:
                self.require(
                    not np.any(new.choices[address] == old.choices[address]), f"regenerate: kept {address}, selected"
                )
        after, before = ([state.sites[address].log_density for address in kept] for state in (new, old))
        self.equal_differences("regenerate: weight", weight, after, before)
        self.same_types("regenerate", old, new)
        self.honest_retdiff("regenerate", seen["retdiff"], old, new)
        self.fresh("regenerate", new.sites, redrawn)
        self.move_to(old, new)

    def project(self) -> None:
        """The share of the selected choices."""
        state = self.need_state()
        selection, selects = pick_selection(state.choice_map, self.decide)
        selected = [address for address in state.sites if selects(address)]
        with self.reporting(f"project(key, trace, select {selected})"):
            share = self.call(lambda f, key, trace: f.project(key, trace, selection)[1], state.params, state.trace)
        terms = [state.sites[address].log_density for address in selected]
        self.equal_numbers("project", share, sum(terms), terms)

    def transform(self) -> None:
        """To R^n and back: the same choices, and log determinants by each family's own map."""
        state = self.need_state()
        selection, selects = pick_selection(state.choice_map, self.decide)
        selected = [address for address in state.sites if selects(address)]
        sites = {address: state.sites[address] for address in selected}
        indexed = _names_indices(selection)
        if not selected or indexed or has_discrete(state.choice_map.filter(selection)):
            return
        # One that is absent has a map too, or there is an error.
        mapped = self.node.walk() if self.node.may_leave_out else sites.values()
        if any(getattr(site, "mapping", ()) is None for site in mapped):
            return
        with self.reporting(f"unconstrain(trace, select {selected})"):
            points, log_det = self.call(
                lambda f, key, trace: f.unconstrain(trace, selection), state.params, state.trace
            )
        wanted: Values = {}
        terms: list[float] = []
        for address, site in sites.items():
            mapping = site.family.mapping
            assert mapping is not None
            wanted[address] = mapping.inverse(site.value, *site.args)
            terms += np.ravel(-mapping.log_slope(wanted[address], *site.args)).tolist()
        if not np.all(np.isfinite(terms)):
            return
        found = flat(points)
        self.require(set(found) == set(wanted), f"unconstrain: gives {sorted_(found)}, selected are {sorted_(wanted)}")
        for address, value in wanted.items():
            self.equal_values(f"unconstrain: {address}", found[address] / (1 + abs(value)), value / (1 + abs(value)))
        self.equal_numbers("unconstrain: log det", log_det, sum(terms), [1.0, *terms])
        fixed = state.choice_map.filter(~selection)
        with self.reporting("constrain(those, args, fixed=the rest)"):
            choices, back = self.call(
                lambda f, key, points, args, fixed: f.constrain(points, args, fixed=fixed),
                state.params,
                points,
                ex.to_jax(state.args),
                fixed,
            )
        again = flat(choices)
        self.require(set(again) == set(state.choices), f"constrain: gives {sorted_(again)}")
        for address, value in state.choices.items():
            self.equal_values(f"constrain: {address}", again[address], value)
        self.equal_numbers("constrain: log det", back, -sum(terms), [1.0, *terms])

    def gradients(self) -> None:
        """Gradients in choices, arguments and parameters, along a random direction, against central differences."""
        state = self.need_state()
        if not all(np.isfinite(site.log_density) for site in state.sites.values()):
            return
        selection, selects = pick_selection(state.choice_map, self.decide)
        chosen = [a for a, site in state.sites.items() if selects(a) and not site.family.is_discrete]
        try:
            selected = state.choice_map.filter(selection)
        except gjflax.ChoiceMapError:
            return  # different addresses at different elements have no choice map
        any_discrete = has_discrete(selected)
        if self.node.has_computed_addresses and _names_indices(selection):
            return  # which choices these are is not known while tracing
        if chosen and not any_discrete and not any(state.sites[a].family.event for a in chosen):
            with self.reporting(f"choice_grad(key, trace, select {chosen})"):
                gradient = self.call(
                    lambda f, key, trace: f.choice_grad(key, trace, selection)[1], state.params, state.trace
                )
            slopes = flat(gradient)
            self.require(set(slopes) == set(chosen), f"choice_grad: has {sorted_(slopes)}, selected are {chosen}")
            directions = {address: _direction(slopes[address]) for address in chosen}
            self.slope("choice_grad", slopes, directions, lambda step: self.density(state, choices=step), state)
        if state.params:
            with self.reporting("param_grad(key, trace, params)"):
                gradient = self.execute(
                    lambda key, *inputs: self.module.param_grad(key, *inputs)[1], state.trace, state.params
                )
            directions = jax.tree.map(_direction, gradient)
            self.slope("param_grad", gradient, directions, lambda step: self.density(state, params=step), state)
        floats = [place for place, kind in enumerate(self.node.inputs) if _is_real(kind)]
        if floats:
            with self.reporting(f"arg_grad(key, trace, {floats})"):
                gradient = self.call(
                    lambda f, key, trace: f.arg_grad(key, trace, tuple(floats))[1], state.params, state.trace
                )
            directions = jax.tree.map(_direction, gradient)
            self.slope(
                "arg_grad",
                gradient,
                directions,
                lambda step: self.density(state, args=dict(zip(floats, step, strict=True))),
                state,
            )

    def score_params(self) -> None:
        """The density of a trace's choices under other parameters."""
        state = self.need_state()
        if not self.params:
            return
        params = self.moved_parameters()
        with self.reporting("score_params(key, trace, other params)"):
            score = self.execute(lambda key, *inputs: self.module.score_params(key, *inputs)[1], state.trace, params)
        _, sites = self.run(state.choices, state.args, params)
        terms = [site.log_density for site in sites.values()]
        self.equal_numbers("score_params", score, sum(terms), terms)

    def misspelt(self) -> None:
        """A constraint that no choice takes up is an error, and a missing choice of `assess` too."""
        state = self.need_state()
        name = "misspelt"
        if any(name in address for address in state.sites):
            return
        names = [address[0] for address in state.sites if address and isinstance(address[0], str)]
        wrong = {(self.one_of_(names), name) if names and self.decide(2) else name: 1.0}
        method = self.one_of_(("importance", "update", "assess") if state.sites else ("importance", "update"))
        self.calls.append(f"{method}(..., {{}} if assess else {wrong})")
        args, score = ex.to_jax(self.args), None
        try:
            if method == "importance":
                self.call(lambda f, key, args: f.importance(key, wrong, args)[1][0], self.params, args)
            elif method == "update":
                self.updated(state.trace, wrong, ex.to_jax(state.args), state.params, {})
            else:
                score = self.call(lambda f, key, args: f.assess(key, {}, args)[1][1], self.params, args)
        except gjflax.GJFlaxError:
            return
        except Exception as error:
            raise Discrepancy(self.report(f"{method} raised {error!r}, which is no error of gjflax")) from error
        # Whether a choice is there may be known only when running.
        unknown = score is not None and self.node.may_leave_out
        self.require(unknown, f"{method} accepted wrong choices")

    # Parts of laws --------------------------------------------------------------------------------------------------

    def need_state(self) -> State:
        if self.state is None:
            self.simulate()
        assert self.state is not None
        return self.state

    def move_to(self, old: State, new: State) -> None:
        """Go on from the new trace, unless its density is 0: differences from there are undefined."""
        possible = all(np.isfinite(site.log_density) for site in new.sites.values())
        self.state = new if possible else old

    def donor(self, args: tuple[Any, ...]) -> Any:
        """Choices to take values from: of another run."""
        with self.reporting(f"simulate(another key, {_shown(args)})"):
            return self.simulated(args)[0]["choices"]

    def simulated(self, args: tuple[Any, ...]) -> tuple[Any, Any]:
        """What a run says, and its types."""
        inputs = self.key(), self.params, ex.to_jax(args)
        if self.runner is not interpreted:
            return self.runner(self._simulate, *inputs)
        # Traced once for all runs, for tracing is what takes time.
        if self._simulated is None:
            self._simulated = Staged(self._simulate, *inputs)
        return self._simulated(*inputs), self._simulated.types

    def _simulate(self, words: Any, params: Any, args: Any) -> Any:
        module = self.module.bind({"params": params}) if self.node.has_parameters else self.module
        return _seen(module.simulate(_key(words), args)[1])

    def constraints(self, choices: Any) -> tuple[Any, Values]:
        """A part of the choices, as gjflax takes it and as the oracle reads it."""
        part, plain = pick(choices, self.decide)
        if self.decide(4) == 3 and not _has_masks(part) and not _has_traced_indices(part):
            return part.to_dict(), flat(plain)
        return part, flat(plain)

    def taken_up(self, what: str, given: Values, state: State) -> Values:
        """The constraints that choices took up, which have their values."""
        used = {address: value for address, value in given.items() if address in state.sites}
        unused = [address for address in given if address not in used]
        self.require(not unused or self.node.may_leave_out, f"{what}: accepted constraints at {unused}, of no choice")
        for address, value in used.items():
            same = np.array_equal(np.asarray(state.choices[address]), np.asarray(value))
            self.require(same, f"{what}: {address} is {state.choices[address]}, constrained to {value}")
        return used

    def kept_or_fresh(self, what: str, old: State, new: State, used: Values) -> list[Address]:
        """Choices that are not constrained keep their values; the addresses of new ones."""
        for address in new.sites:
            if address not in used and address in old.sites:
                self.unchanged(what, address, old, new)
        return [address for address in new.sites if address not in used and address not in old.sites]

    def unchanged(self, what: str, address: Address, old: State, new: State) -> None:
        same = np.array_equal(old.choices[address], new.choices[address])
        self.require(same, f"{what}: {address} was {old.choices[address]}, and became {new.choices[address]}")

    def weighs(self, what: str, weight: Any, old: State, new: State, without: list[Address]) -> None:
        after = [site.log_density for address, site in new.sites.items() if address not in without]
        before = [site.log_density for site in old.sites.values()]
        self.equal_differences(f"{what}: weight", weight, after, before)

    def equal_differences(self, what: str, got: Any, after: list[float], before: list[float]) -> None:
        self.equal_numbers(what, got, sum(after) - sum(before), [*after, *before])

    def same_types(self, what: str, old: State, new: State) -> None:
        """A trace is a scan's carry, so its structure, shapes and types stay."""
        structures = jax.tree.structure(old.trace), jax.tree.structure(new.trace)
        self.require(structures[0] == structures[1], f"{what}: the trace's structure changed")
        for a, b in zip(jax.tree.leaves(old.types), jax.tree.leaves(new.types), strict=True):
            types = [(leaf.shape, leaf.dtype, getattr(leaf, "weak_type", False)) for leaf in (a, b)]
            self.require(types[0] == types[1], f"{what}: a leaf of the trace was {types[0]} and is {types[1]}")

    def honest_retdiff(self, what: str, retdiff: Any, old: State, new: State) -> None:
        """What is said not to have changed has not."""
        self.equal_values(f"{what}: retdiff", Diff.primal(retdiff), new.retval)
        if Diff.is_unchanged(retdiff) and jax.tree.leaves(retdiff):
            for a, b in zip(
                jax.tree.leaves(old.trace.get_retval()), jax.tree.leaves(Diff.primal(retdiff)), strict=True
            ):
                self.require(np.array_equal(a, b), f"{what}: retdiff says no change; it was {a} and is {b}")

    def other_args(self) -> tuple[Any, ...]:
        """Arguments of which some are others."""
        return tuple(
            self.writer.value(kind) if self.decide(2) else arg
            for kind, arg in zip(self.node.inputs, self.need_state().args, strict=True)
        )

    def change_of_arguments(self) -> tuple[tuple[Any, ...], tuple[Any, ...], str]:
        """New arguments; the same as `Diff`; and as text."""
        state = self.need_state()
        args, diffs, shown = [], [], []
        for kind, arg in zip(self.node.inputs, state.args, strict=True):
            form = self.decide(4)
            new = self.writer.value(kind) if form == 1 else arg
            args.append(new)
            value = ex.to_jax(new)
            diffs.append((value, Diff.unknown_change(value), Diff.no_change(value), Diff.unknown_change(value))[form])
            shown.append(("{}", "unknown_change({})", "no_change({})", "unknown_change({})")[form].format(_shown(new)))
        return tuple(args), tuple(diffs), f"({', '.join(shown)})"

    def change_of_parameters(self) -> tuple[Any, dict[str, Any]]:
        """New parameters, and the options that go with them."""
        state = self.need_state()
        form = self.decide(3) if self.params else self.decide(2)
        if form == 2:
            return self.moved_parameters(), {}
        return state.params, {"param_diff": Diff.no_change} if form == 1 else {}

    def moved_parameters(self) -> Any:
        shift = (0.1, -0.2)[self.decide(2)]
        return jax.tree.map(lambda leaf: leaf + jnp.asarray(shift, leaf.dtype), self.params)

    def one_of_(self, options: Any) -> Any:
        return options[self.decide(len(options))]

    def density(self, state: State, choices: Any = None, args: Any = None, params: Any = None) -> float:
        """The oracle's density, with some choices, arguments or the parameters moved."""
        new_args = tuple((args or {}).get(place, arg) for place, arg in enumerate(ex.to_float64(state.args)))
        values = {**state.choices, **(choices or {})}
        _, sites = self.run(values, new_args, state.params if params is None else params)
        return float(sum(site.log_density for site in sites.values()))

    def slope(self, what: str, got: Any, directions: Any, density: Callable[[Any], float], state: State) -> None:
        """The slope along a direction, by the gradient and by central differences."""
        start = {
            "choice_grad": {address: state.choices[address] for address in directions}
            if what == "choice_grad"
            else None,
            "param_grad": state.params,
            "arg_grad": tuple(
                state.args[place] for place in range(len(state.args)) if _is_real(self.node.inputs[place])
            ),
        }[what]
        start = jax.tree.map(lambda leaf: np.asarray(leaf, np.float64), start)
        steps = (1e-5, 2e-5)
        slopes = []
        for step in steps:
            ends = [density(jax.tree.map(lambda x, d, s=s: x + s * d, start, directions)) for s in (step, -step)]
            slopes.append((ends[0] - ends[1]) / (2 * step))
        if not np.all(np.isfinite(slopes)) or not np.allclose(*slopes, rtol=1e-4, atol=1e-4):
            return  # a kink or the edge of a support is near
        products = jax.tree.map(lambda g, d: float(np.sum(np.asarray(g, np.float64) * d)), got, directions)
        sizes = jax.tree.map(lambda g, d: float(np.sum(np.abs(np.asarray(g, np.float64) * d))), got, directions)
        got_slope, size = sum(jax.tree.leaves(products)), 1.0 + sum(jax.tree.leaves(sizes))
        close = abs(got_slope - slopes[0]) <= 2e-3 * size
        self.require(close, f"{what}: gjflax {got_slope!r}, central differences {slopes[0]!r}")


LAWS = (
    "update",
    "regenerate",
    "importance",
    "update",
    "regenerate",
    "project",
    "assess",
    "update",
    "transform",
    "propose",
    "misspelt",
    "score_params",
    "gradients",
)
"""The calls to choose from; what changes a trace more than once."""


Runner = Callable[..., tuple[Any, Any]]
"""``runner(function, *inputs)`` gives the function's result and its types."""


def _key(words: Any) -> Any:
    return jax.random.wrap_key_data(words)


def _seen(trace: Any) -> dict[str, Any]:
    """What a trace says."""
    choices, score = trace.strip(), trace.get_score()
    return {"trace": trace, "choices": choices, "score": score, "retval": trace.get_retval(), "args": trace.get_args()}


def _names_indices(selection: Any) -> bool:
    return selection.mentions_indices or any(isinstance(part, int) for a in selection.addresses for part in a)


def _direction(like: Any) -> Any:
    """Fixed numbers that are not equal, of a shape."""
    count = int(np.prod(np.shape(like)))
    return np.cos(1.0 + np.arange(count)).reshape(np.shape(like))


def _is_real(kind: Any) -> bool:
    return all(not array.is_discrete for _, array in ex.leaves(kind))


def _has_masks(choices: Any) -> bool:
    leaves = jax.tree.leaves(choices, is_leaf=lambda node: isinstance(node, gjflax.Masked))
    return any(isinstance(leaf, gjflax.Masked) for leaf in leaves)


def _has_traced_indices(choices: Any) -> bool:
    is_vector = lambda node: isinstance(node, gjflax.VectorChoiceMap)
    vectors = [node for node in jax.tree.leaves(choices, is_leaf=is_vector) if is_vector(node)]
    return any(part.static_indices is None or _has_traced_indices(part.inner) for part in vectors)


def sorted_(addresses: Iterable[Address]) -> list[Address]:
    return sorted(addresses, key=repr)


def _options(options: dict[str, Any]) -> str:
    return "".join(f", {name}={value!r}" for name, value in options.items())


def _written(constraints: Any, given: Values) -> str:
    """Constraints as text: what they give, and the structure that they are written in."""
    return f"{_shown(given)} as {jax.tree.map(np.shape, constraints) if given else {}!r}"


def _shown(value: Any) -> str:
    """Values as text that can be read."""
    if isinstance(value, dict):
        return "{" + ", ".join(f"{key!r}: {_shown(part)}" for key, part in value.items()) + "}"
    if isinstance(value, tuple):
        return "(" + "".join(f"{_shown(part)}, " for part in value) + ")"
    return repr(np.asarray(value).tolist())
