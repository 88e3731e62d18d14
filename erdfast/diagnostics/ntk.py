"""The empirical neural tangent kernel of a network: how a step on one point moves the output at another.

    Theta[i, a, j, b] = < d f_a(x_i)/d theta, d f_b(x_j)/d theta >

Outputs are kept, so the kernel of N points and C outputs is (N, C, N, C): its eigenvalues are those of the (NC x NC)
matrix. `traced` sums over a = b where one number per pair of points is wanted. Times enter like any other input, so
that the joint kernel across noise levels (ERD, definition A.1) is the same function.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import Tensor, nn
from torch.func import functional_call, jacrev, vmap


def ntk(network: nn.Module, inputs: Sequence[Tensor], *, chunk: int = 64) -> Tensor:
    """The kernel over all parameters that require a gradient, exact, through torch.func.

    Two chunks of Jacobians are held at a time: 4 * chunk * C * P bytes in float32 for P parameters.

    Args:
        network: called with batches of one, (1, ...) each; must be vmap's to trace: plain PyTorch operators.
        inputs: what the network is called with, (N, ...) each.
        chunk: points whose Jacobians are held together.

    Returns:
        (N, C, N, C) in the dtype of the network, C its outputs per point.

    Raises:
        ValueError: inputs of different lengths, or a chunk below 1.
    """
    count = _length(inputs)
    if chunk < 1:
        raise ValueError(f"chunk is {chunk}; it must be at least 1")
    parts = [[part[first : first + chunk] for part in inputs] for first in range(0, count, chunk)]
    rows: list[list[Tensor]] = [[] for _ in parts]
    for number, (part, row) in enumerate(zip(parts, rows, strict=True)):
        right = jacobian(network, part)
        for other in range(number):  # made anew, not kept: memory does not grow with the number of points
            block = torch.einsum("iap,jbp->iajb", jacobian(network, parts[other]), right)
            rows[other].append(block)
            row.append(block.permute(2, 3, 0, 1))
        row.append(torch.einsum("iap,jbp->iajb", right, right))
    return torch.cat([torch.cat(row, dim=2) for row in rows])


def jacobian(network: nn.Module, inputs: Sequence[Tensor]) -> Tensor:
    """(N, C, P): the gradient of every output of every point in all parameters that require one, in their order; inputs
    as for `ntk`."""
    count = _length(inputs)
    tensors = {name: p.detach() for name, p in network.named_parameters() if p.requires_grad}
    fixed = {name: p.detach() for name, p in network.named_parameters() if not p.requires_grad}
    fixed |= dict(network.named_buffers())

    def outputs(tensors: dict[str, Tensor], *point: Tensor) -> Tensor:
        return functional_call(network, tensors | fixed, tuple(part[None] for part in point)).flatten()

    parts = vmap(jacrev(outputs), (None, *[0] * len(inputs)))(tensors, *inputs)
    return torch.cat([part.reshape(count, part.shape[1], -1) for part in parts.values()], dim=2)


def ntk_of_linear_layers(network: nn.Module, inputs: Sequence[Tensor]) -> Tensor:
    """The same kernel, for a network whose parameters are those of nn.Linear layers: hundreds of times as fast.

    The gradient of output a in a layer's weight is the outer product of its back-propagated error d_a and its input h,
    so with no Jacobian ever made

        Theta[i, a, j, b] = sum over layers of  <d_ia, d_jb> * (<h_i, h_j> + 1),   1 for a bias.

    Args:
        network: each point must be treated alone, and each layer called once, on (N, features).
        inputs: as for `ntk`, (N, ...) each; the network is called with all of them at once.

    Returns:
        (N, C, N, C) in the dtype of the network.

    Raises:
        ValueError: a parameter of another kind of layer, or a layer that is called differently.
    """
    count = _length(inputs)
    layers = _linear_layers(network)
    seen: dict[str, tuple[Tensor, Tensor]] = {}
    with torch.enable_grad():
        outputs = _recorded(network, layers, inputs, seen).reshape(count, -1)
        wrong = [name for name in layers if name not in seen or seen[name][0].ndim != 2 or len(seen[name][0]) != count]
        if wrong:
            raise ValueError(f"layers {', '.join(wrong)} were not called with one row of features per point")
        ends = [after for _, after in seen.values()]
        gradients = [
            torch.autograd.grad(column.sum(), ends, retain_graph=True, allow_unused=True, materialize_grads=True)
            for column in outputs.unbind(1)
        ]
    kernel = outputs.new_zeros(count, outputs.shape[1], count, outputs.shape[1])
    for (name, (before, _)), errors in zip(seen.items(), zip(*gradients, strict=True), strict=True):
        products = before @ before.T + (0.0 if layers[name].bias is None else 1.0)
        stacked = torch.stack(errors, dim=1)
        kernel += torch.einsum("iam,jbm->iajb", stacked, stacked) * products[:, None, :, None]
    return kernel.detach()


def _linear_layers(network: nn.Module) -> dict[str, nn.Linear]:
    layers = {name: module for name, module in network.named_modules() if type(module) is nn.Linear}
    own = {id(p) for layer in layers.values() for p in layer.parameters()}
    strange = [name for name, p in network.named_parameters() if id(p) not in own or not p.requires_grad]
    if strange or not layers:
        raise ValueError(f"ntk_of_linear_layers needs trained nn.Linear layers alone; use ntk for {strange or network}")
    return layers


def _recorded(
    network: nn.Module, layers: dict[str, nn.Linear], inputs: Sequence[Tensor], seen: dict[str, tuple[Tensor, Tensor]]
) -> Tensor:
    """Call the network; `seen` then holds each layer's input and output."""

    def recorder(name: str) -> Callable[[nn.Module, tuple[Tensor, ...], Tensor], None]:
        def keep(_: nn.Module, before: tuple[Tensor, ...], after: Tensor) -> None:
            if name in seen:
                raise ValueError(f"layer {name} is called twice; use ntk")
            seen[name] = (before[0].detach(), after)

        return keep

    hooks = [layer.register_forward_hook(recorder(name)) for name, layer in layers.items()]
    try:
        return network(*inputs)
    finally:
        for hook in hooks:
            hook.remove()


def traced(kernel: Tensor) -> Tensor:
    """(N, C, N, C) => (N, N): the sum over the outputs, an inner product of whole Jacobians."""
    return kernel.diagonal(dim1=1, dim2=3).sum(-1)


def cosines(gram: Tensor) -> Tensor:
    """A Gram matrix (N, N) of non-zero vectors, normalised to a diagonal of 1."""
    norms = gram.diagonal().sqrt()
    return gram / norms[:, None] / norms[None, :]


def eigenvalues(kernel: Tensor) -> Tensor:
    """Of the kernel as an operator on functions of the points, of which each has the share 1/N: (N*C,) float64, largest
    first. So they do not grow with the number of points."""
    count, outputs = kernel.shape[:2]
    matrix = kernel.double().reshape(count * outputs, count * outputs)
    return torch.linalg.eigvalsh((matrix + matrix.T) / 2).flip(0) / count


def coupling(kernel: Tensor, groups: int) -> Tensor:
    """How much groups of points share the directions in which a step on them moves the parameters.

    The cosine of G_s and G_t, where G_s = sum of J'J over the points of group s (P x P, up to a factor the Gauss-Newton
    matrix of their error): |Theta_st|^2 / (|Theta_ss| |Theta_tt|) in Frobenius norms of the kernel's blocks.

    Args:
        kernel: (N, C, N, C), the points of a group next to each other.
        groups: a divisor of N.

    Returns:
        (groups, groups) float64 in [0, 1], with a diagonal of 1: 1 for groups that are one to the optimiser, 0 for
        those that do not meet.
    """
    count, outputs = kernel.shape[:2]
    if count % groups:
        raise ValueError(f"{count} points are not {groups} groups of one size")
    blocks = kernel.reshape(groups, count // groups * outputs, groups, count // groups * outputs)
    return cosines(blocks.double().square().sum(dim=(1, 3)))


def _length(inputs: Sequence[Tensor]) -> int:
    lengths = {len(part) for part in inputs}
    if len(lengths) != 1 or 0 in lengths:
        raise ValueError(f"inputs must have one number of points, got {[len(part) for part in inputs]}")
    return lengths.pop()
