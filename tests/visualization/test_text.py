"""Graphs as text for graphviz and mermaid."""

from __future__ import annotations

import re

from gjflax.language.graph import ARGUMENT, CHOICE, NETWORK, PARAMETER, Edge, ModelGraph, Node, NodeGroup
from gjflax.visualization.text import graphviz, mermaid

GRAPH = ModelGraph(
    (
        Node("x", ARGUMENT, 'x "1"', shape=(4,)),
        Node("mu", PARAMETER, "mu", shape=()),
        Node("net", NETWORK, "Dense_0", "8 parameters", group="steps"),
        Node("z", CHOICE, "z", "Normal", (2,), group="steps"),
        Node("a", CHOICE, "y", "Cauchy", (), observed="yes", group="first"),
        Node("b", CHOICE, "y", "Poisson", (), discrete=True, observed="partly", group="second"),
    ),
    (
        NodeGroup("steps", "steps", "chain", 5),
        NodeGroup("switch", "switch", "y: Switch", None, "steps"),
        NodeGroup("first", "branch", "branch 0", None, "switch"),
        NodeGroup("second", "branch", "branch 1", None, "switch"),
    ),
    (Edge("x", "net"), Edge("net", "z"), Edge("mu", "z"), Edge("z", "z", True), Edge("z", "switch")),
)


def test_mermaid():
    text, classes = mermaid(GRAPH).split("  classDef choice")
    assert (
        text
        == """\
flowchart TB
  n0[/"x &quot;1&quot;<br/>[4]"/]:::input
  n1("mu"):::input
  subgraph g0["chain: 5 steps"]
    n2["Dense_0<br/>8 parameters"]:::network
    n3(["z<br/>Normal [2]"]):::choice
    subgraph g1["y: Switch"]
      subgraph g2["branch 0"]
        n4(["y<br/>Cauchy"]):::observed
      end
      subgraph g3["branch 1"]
        n5(["y<br/>Poisson"]):::partly
      end
    end
  end
  n0 --> n2
  n2 --> n3
  n1 --> n3
  n3 -. "t−1" .-> n3
  n3 --> g1
"""
    )
    used = set(re.findall(r":::(\w+)", text))
    assert used <= {"choice", *re.findall(r"classDef (\w+)", classes)}


def test_graphviz():
    text = graphviz(GRAPH)
    assert text.startswith("digraph model {\n  compound=true;") and text.endswith("}\n")
    assert text.count("{") == text.count("}") == 5
    assert 'n0 [label="x \\"1\\"\\n[4]", shape=plaintext' in text
    assert 'n4 [label="y\\nCauchy", shape=ellipse, style=filled, fillcolor="#bcc6cf"];' in text
    assert 'n5 [label="y\\nPoisson", shape=ellipse, style=filled, fillcolor="#e4e8ec"];' in text
    edges = [line.strip() for line in text.split("\n") if "->" in line]
    assert edges == [
        "n0 -> n2;",
        "n2 -> n3;",
        "n1 -> n3;",
        'n3 -> n3 [style=dashed, label="t−1"];',
        "n3 -> n4 [lhead=cluster_g1];",
    ]
    assert text.index("cluster_g0") < text.index("cluster_g1") < text.index("cluster_g2")
    assert 'label="branch 1"; labeljust=r; labelloc=b; style="rounded,dashed";' in text
