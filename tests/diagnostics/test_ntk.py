"""The tangent kernel against loops of autograd.grad, and what is made of it against definitions."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn

from erdfast.diagnostics.ntk import cosines, coupling, eigenvalues, jacobian, ntk, ntk_of_linear_layers, traced
from erdfast.diagnostics.toy_training import ToyNetwork


class Tiny(nn.Module):
    """Two inputs, a buffer, a layer without bias: (B, 3) and (B,) => (B, 2)."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.first, self.second = nn.Linear(4, 5), nn.Linear(5, 2, bias=False)
        self.register_buffer("shift", torch.tensor(0.3))
        self.double()

    def forward(self, x: Tensor, t: Tensor) -> Tensor:
        h = torch.tanh(self.first(torch.cat([x, t[:, None] + self.get_buffer("shift")], dim=1)))
        return self.second(h)


class Gained(Tiny):
    """With a parameter that is no layer's, and one that is not trained."""

    def __init__(self) -> None:
        super().__init__()
        self.gain = nn.Parameter(torch.tensor(0.7, dtype=torch.float64))
        self.second.weight.requires_grad_(False)

    def forward(self, x: Tensor, t: Tensor) -> Tensor:
        return self.gain * super().forward(x, t)


def points(count: int = 7) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(1)
    x = torch.randn(count, 3, generator=generator, dtype=torch.float64)
    return x, torch.rand(count, generator=generator, dtype=torch.float64)


def by_loops(network: nn.Module, inputs: tuple[Tensor, ...]) -> Tensor:
    """(N, C, P), one backward pass for each output of each point."""
    trained = [p for p in network.parameters() if p.requires_grad]
    rows = []
    for number in range(len(inputs[0])):
        out = network(*(part[number : number + 1] for part in inputs)).flatten()
        grads = [torch.autograd.grad(value, trained, retain_graph=True) for value in out]
        rows.append(torch.stack([torch.cat([g.flatten() for g in own]) for own in grads]))
    return torch.stack(rows)


@pytest.mark.parametrize("make", [Tiny, Gained])
@pytest.mark.parametrize("chunk", [1, 3, 64])
def test_the_kernel_is_that_of_autograd(make, chunk):
    network, inputs = make(), points()
    wanted = by_loops(network, inputs)
    torch.testing.assert_close(jacobian(network, inputs), wanted, rtol=1e-10, atol=1e-12)
    found = ntk(network, inputs, chunk=chunk)
    assert found.shape == (7, 2, 7, 2)
    torch.testing.assert_close(found, torch.einsum("iap,jbp->iajb", wanted, wanted), rtol=1e-10, atol=1e-12)


def test_linear_layers_give_the_same_kernel():
    network, inputs = Tiny(), points()
    found = ntk_of_linear_layers(network, inputs)
    torch.testing.assert_close(found, ntk(network, inputs), rtol=1e-10, atol=1e-12)
    assert not found.requires_grad
    assert all(p.grad is None for p in network.parameters())
    assert not network.first._forward_hooks


class Heads(Tiny):
    """Each output has a layer of its own."""

    def __init__(self) -> None:
        super().__init__()
        self.second = nn.Linear(5, 1).double()
        self.third = nn.Linear(5, 1).double()

    def forward(self, x: Tensor, t: Tensor) -> Tensor:
        h = torch.tanh(self.first(torch.cat([x, t[:, None]], dim=1)))
        return torch.cat([self.second(h), self.third(h)], dim=1)


def test_outputs_may_have_layers_of_their_own():
    network, inputs = Heads(), points()
    torch.testing.assert_close(ntk_of_linear_layers(network, inputs), ntk(network, inputs), rtol=1e-10, atol=1e-12)


def test_linear_layers_give_the_kernel_of_the_toy():
    """The toy's own network as the measurements see it, with its four-dimensional points, also without gradients."""
    torch.manual_seed(0)
    network = ToyNetwork(width=24)
    x, t = torch.randn(9, 2, 1, 1), torch.rand(9)
    wanted = ntk(network, (x, t), chunk=4)
    with torch.no_grad():
        found = ntk_of_linear_layers(network, (x, t))
    torch.testing.assert_close(found, wanted, rtol=1e-4, atol=1e-5)


class Twice(Tiny):
    def forward(self, x: Tensor, t: Tensor) -> Tensor:
        return super().forward(x, t) + super().forward(x, 2 * t)


class PerElement(nn.Module):
    """Its layer sees rows that are no points."""

    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.Linear(1, 2).double()

    def forward(self, x: Tensor, t: Tensor) -> Tensor:
        return self.layer(x.unsqueeze(2)).sum(1)


@pytest.mark.parametrize(
    ("network", "message"),
    [
        (Gained(), "gain.*second.weight|second.weight.*gain"),
        (Twice(), "first is called twice"),
        (PerElement(), "layer were not"),
    ],
)
def test_networks_of_another_structure_are_refused(network, message):
    with pytest.raises(ValueError, match=message):
        ntk_of_linear_layers(network, points())


def test_inputs_that_do_not_fit_are_refused():
    x, t = points()
    with pytest.raises(ValueError, match=r"\[7, 6\]"):
        ntk(Tiny(), (x, t[:6]))
    with pytest.raises(ValueError, match="chunk is 0"):
        ntk(Tiny(), (x, t), chunk=0)


def test_eigenvalues_are_those_of_the_operator():
    """Power iteration on functions of the points, each with the share 1/N; and twice the points change nothing."""
    network, (x, t) = Tiny(), points()
    kernel = ntk(network, (x, t))
    values = eigenvalues(kernel)
    assert values.shape == (14,)
    assert bool((values.diff() <= 0).all())
    f = torch.ones(7, 2, dtype=torch.float64)
    for _ in range(500):
        f = torch.einsum("iajb,jb->ia", kernel, f) / 7
        f = f / f.norm()
    largest = (f * torch.einsum("iajb,jb->ia", kernel, f) / 7).sum()
    assert float(values[0]) == pytest.approx(float(largest), rel=1e-9)
    doubled = eigenvalues(ntk(network, (torch.cat([x, x]), torch.cat([t, t]))))
    torch.testing.assert_close(doubled[:14], values, rtol=1e-9, atol=1e-12)


def test_traces_and_cosines():
    flat = by_loops(Tiny(), points()).flatten(1)
    gram = traced(ntk(Tiny(), points()))
    torch.testing.assert_close(gram, flat @ flat.T, rtol=1e-10, atol=1e-12)
    wanted = torch.nn.functional.cosine_similarity(flat[:, None], flat[None, :], dim=2)
    torch.testing.assert_close(cosines(gram), wanted, rtol=1e-10, atol=1e-12)


def test_the_coupling_is_the_cosine_of_the_gauss_newton_matrices():
    jacobians = by_loops(Tiny(), points(6))
    kernel = ntk(Tiny(), points(6))
    matrices = [own.flatten(0, 1).T @ own.flatten(0, 1) for own in jacobians.split(2)]
    wanted = [[float((a * b).sum() / (a.norm() * b.norm())) for b in matrices] for a in matrices]
    torch.testing.assert_close(coupling(kernel, 3), torch.tensor(wanted, dtype=torch.float64), rtol=1e-10, atol=1e-12)
    with pytest.raises(ValueError, match="6 points are not 4 groups"):
        coupling(kernel, 4)
