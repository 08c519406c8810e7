from __future__ import annotations

import torch

from pixelss._graphs import outside_graphs


@outside_graphs
def kept_out(x: torch.Tensor, *, times: int = 1) -> torch.Tensor:
    """Return x times `times`."""
    assert not torch.compiler.is_compiling()
    return x * times if x.sum().item() > 0 else x  # a branch that no graph has


def around(x: torch.Tensor) -> torch.Tensor:
    return kept_out(x + 1, times=2) * 3


def test_the_function_runs_as_it_is_and_what_is_around_it_is_compiled():
    graphs = []

    def backend(graph, inputs):
        graphs.append([node.target for node in graph.graph.nodes if node.op == "call_function"])
        return graph

    compiled = torch.compile(around, backend=backend)
    for x in (torch.ones(3), torch.full((3,), -9.0)):
        assert compiled(x).equal(around(x))
    assert len(graphs) == 2
    assert (kept_out.__name__, kept_out.__doc__) == ("kept_out", "Return x times `times`.")
