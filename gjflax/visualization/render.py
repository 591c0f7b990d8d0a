"""`render_model`: a model as a graph, in text and as a picture."""

from __future__ import annotations

import dataclasses
import importlib.util
import os
from pathlib import Path
from typing import Any

from gjflax.core.errors import ArgumentError
from gjflax.language.graph import ModelGraph, model_graph
from gjflax.visualization import draw, text
from gjflax.visualization.observed import with_observed


@dataclasses.dataclass(frozen=True, repr=False)
class RenderedModel:
    """A model as a graph. Made by `render_model`; a notebook shows its picture.

    Attributes:
      graph: the nodes, groups and edges.
    """

    graph: ModelGraph

    @property
    def mermaid(self) -> str:
        """The graph in mermaid's language."""
        return text.mermaid(self.graph)

    @property
    def graphviz(self) -> str:
        """The graph in graphviz's language."""
        return text.graphviz(self.graph)

    def figure(self) -> Any:
        """The picture, a matplotlib figure."""
        return draw.draw(self.graph)

    def save(self, path: str | os.PathLike[str], *, resolution: int = 160) -> None:
        """Write the picture, or the text, as the name of the file says.

        Args:
          path: a name that ends in ``.png``, ``.svg`` or ``.pdf``, which need matplotlib; or in ``.dot``, ``.gv``, ``.mmd`` or
            ``.mermaid``.
          resolution: dots per inch of a ``.png``.

        Raises:
          ArgumentError: if it ends in something else.
        """
        ending = Path(path).suffix.lower()
        if ending in (".dot", ".gv"):
            Path(path).write_text(self.graphviz, encoding="utf-8")
        elif ending in (".mmd", ".mermaid"):
            Path(path).write_text(self.mermaid, encoding="utf-8")
        elif ending in (".png", ".svg", ".pdf"):
            draw.save(self.graph, path, ending[1:], resolution)
        else:
            raise ArgumentError(
                f"A picture of a model is saved as .png, .svg or .pdf, its text as .dot or .mmd; got {Path(path).name!r:.80}."
            )

    def _repr_svg_(self) -> str | None:
        return draw.svg(self.graph) if importlib.util.find_spec("matplotlib") is not None else None

    def __repr__(self) -> str:
        return self.mermaid


def render_model(model: Any, args: Any = (), *, variables: Any = None, observed: Any = None) -> RenderedModel:
    r"""A model as a graph: choices, what they depend on, and the plates that they stand in. Nothing is computed.

    An edge leads from a choice, an argument or a parameter to a choice whose distribution depends on it with no other
    choice in between: through deterministic code, or through a network, which is a box of its own. In the steps of an
    `Unfold` or a `Scan` a dashed edge comes from the step before. What decides a `Switch` leads to its frame.

    Args:
      model: a generative function, bound or not.
      args: its arguments, a tuple of values, or of shapes (``jax.ShapeDtypeStruct``). Integers and flags of Python are part
        of the program.
      variables: its Flax variables. By default those that it is bound to, or the shapes of those that `init` would make.
      observed: the choices that are shaded: a choice map, a nested dict, a trace, a selection or an address.

    Returns:
      The graph, with texts ``mermaid`` and ``graphviz``, and ``save("model.png")``.

    Raises:
      CalleeError: if the model is not a generative function.
      ArgumentError: if `args` is not a tuple, or does not fit the model.
      UnboundParametersError: if `variables` lacks some.

    >>> import gjflax
    >>> @gjflax.gen
    ... def model():
    ...     mean = gjflax.trace("mean", gjflax.Normal)(0.0, 1.0)
    ...     return gjflax.trace("y", gjflax.Repeat(gjflax.Normal, 10))(mean, 1.0)
    >>> rendered = render_model(model, observed="y")
    >>> [(edge.source, edge.target) for edge in rendered.graph.edges]
    [('mean', 'y')]
    >>> print(rendered.mermaid[:95])
    flowchart TB
      n0(["mean<br/>Normal"]):::choice
      subgraph g0["y: 10"]
        n1(["y<br/>Normal"])
    """
    return RenderedModel(with_observed(model_graph(model, args, variables=variables), observed))
