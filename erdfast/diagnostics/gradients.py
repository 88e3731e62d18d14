"""The gradient of the loss at single noise levels: how long it is, how much of it is noise, and which levels disagree.

g is the gradient of one sample's mean squared error, not weighed, with respect to the network's parameters; at one
level the weighting only multiplies it by w(t). With G groups of m samples, A_j a group's mean gradient, A their mean
and S = sum_j |A_j - A|^2 / (G-1), which is tr Cov(g)/m on average,

    |E g|^2   is estimated by |A|^2 - S/G, as |A|^2 alone is larger by tr Cov(A) = tr Cov(g)/(mG) on average
    tr Cov(g)            by m S
    gradient SNR         by their ratio: |E g|^2 / tr Cov(g), of one sample; of a batch of B it is B times that
    <E g, E g'>          of two levels by <A, A'>: images and noise of levels are independent

All follow from products of the A_j. Standard errors are by leaving out one group after the other (jackknife): right
where there is signal, up to 1.4 times too large for what noise prevails in.

Over all levels the gradient of training is G = sum_i p_i w_i E g_i, where p_i is the chance of drawing a level, and
tr Cov = sum_i p_i w_i^2 (tr Cov(g_i) + |E g_i|^2) - |G|^2; tr Cov / |G|^2 is the noise scale of McCandlish et al.
(2018): the batch size at which signal and noise are equal.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from erdfast.ops import NoiseKey, add_noise, diffusion_loss

from .subject import NOISE_STREAM, Images, Levels, Subject, draw_images

GROUPS = 16
"""Parts that a level's samples are split into: few enough to be fast, enough for a standard error."""
MOST_NUMBERS = 100_000_000
"""Of mean gradients of all levels, or of one level's groups, held at a time; beyond, they are folded."""
FP16_SCALE = 1024.0
"""Of the loss in fp16, where gradients of single parameters fall below the smallest number; taken back afterwards."""
_STREAM, _IMAGES = NOISE_STREAM + (1 << 20), 1 << 20
"""Noise, and places in the order of images: apart from those of the losses."""


class LevelGradients(NamedTuple):
    """(L,) float64 unless said otherwise, on the CPU; of errors that are not weighed."""

    squared_norm: Tensor
    """|E g|^2; noise may make it negative."""
    squared_norm_error: Tensor
    trace: Tensor
    """tr Cov(g)."""
    snr: Tensor
    snr_error: Tensor
    products: Tensor
    """(L, L): <E g, E g'>; the diagonal is `squared_norm`."""
    parameters: int
    kept: int
    """Numbers that a gradient was folded into; as many as parameters where it was not."""


def group_sizes(num: int) -> tuple[int, int]:
    """How many groups, and samples of each: what is left of `num` is not used."""
    groups = min(GROUPS, num)
    return groups, num // groups


def measure_gradients(
    subject: Subject, levels: Levels, *, num: int, seed: int, batch_size: int, advance: Callable[[], object]
) -> LevelGradients:
    """Gradients at every level, each by images and noise of its own, the same for all networks.

    Args:
        subject: the network; dropout is off.
        levels: of its process.
        num: samples per level, two or more.
        seed: of images, noise and folding.
        batch_size: images per network call, at most.
        advance: called after each level.

    Raises:
        ArithmeticError: a gradient is not finite.
    """
    groups, per_group = group_sizes(num)
    parameters = [p for p in subject.model.parameters() if p.requires_grad]
    fold = Folding(parameters, MOST_NUMBERS // max(groups, len(levels.logsnr)), seed)
    means, found = [], []
    for number, level in enumerate(levels.logsnr.tolist()):
        images = draw_images(subject.dataset, groups * per_group, seed, _IMAGES + number * num)
        rows = [
            fold(_group_gradient(subject, levels.time[number], images, part, batch_size, number, seed))
            for part in torch.arange(groups * per_group).split(per_group)
        ]
        stacked = torch.stack(rows)
        products = _products(stacked)
        if not bool(products.isfinite().all()):
            raise ArithmeticError(f"{subject.name}: a gradient at log-SNR {level:.2f} is not finite")
        found.append(moments_with_errors(products, per_group))
        means.append(stacked.mean(0).cpu())
        advance()
    columns = torch.tensor(found, dtype=torch.float64).T
    squared_norm, trace, snr, squared_norm_error, _, snr_error = columns
    products = _products(torch.stack(means))
    products.diagonal().copy_(squared_norm)
    sizes = (fold.parameters, fold.kept)
    return LevelGradients(squared_norm, squared_norm_error, trace, snr, snr_error, products, *sizes)


def _group_gradient(
    subject: Subject, time: Tensor, images: Images, places: Tensor, batch_size: int, number: int, seed: int
) -> list[Tensor]:
    """The gradient of the mean error of the images at these places, in a row, by parameter."""
    scale = FP16_SCALE if subject.precision.name == "fp16" else 1.0
    key = NoiseKey(seed, _STREAM + number)
    total: list[Tensor] = []
    for part in places.split(batch_size):
        found = _gradient(subject, time, images, part, key, scale * len(part) / len(places))
        total = [one + other for one, other in zip(total, found, strict=True)] if total else found
    return total if scale == 1.0 else [gradient.div_(scale) for gradient in total]


def _gradient(
    subject: Subject, time: Tensor, images: Images, places: Tensor, key: NoiseKey, scale: float
) -> list[Tensor]:
    """Of `scale` times the mean error of some images in a row."""
    source, y = images.part(int(places[0]), int(places[-1]) + 1, subject.device)
    with torch.no_grad():
        coef = subject.process.coefficients(time.expand(len(places)))
    coef = coef._replace(w=torch.ones_like(coef.w))
    key = key._replace(sample_ids=places.to(y.device))
    with torch.enable_grad():
        x_t = add_noise(source, coef, key, dtype=subject.precision.dtype)
        loss = diffusion_loss(subject.predict(x_t, coef, subject.labels(y)), source, coef, key)
        parameters = [p for p in subject.model.parameters() if p.requires_grad]
        # Embeddings of what a run does not use have no gradient.
        gradients = torch.autograd.grad(loss * scale, parameters, allow_unused=True, materialize_grads=True)
    return [gradient.float() for gradient in gradients]


class Folding:
    """Gradients of all parameters as one row, short enough for all levels to be held at once.

    If there are more than `most` numbers, the row is multiplied with random signs, which depend on the seed, and number
    i is added to number i mod `most`: products of rows keep their mean over the signs, and err by about
    |a||b|/sqrt(most).

    Args:
        parameters: of the network.
        most: numbers of a row, at least 1.
        seed: of the signs.
    """

    def __init__(self, parameters: Sequence[Tensor], most: int, seed: int) -> None:
        self.parameters = sum(p.numel() for p in parameters)
        self.kept = min(self.parameters, most)
        self._seed = seed

    def __call__(self, gradients: Sequence[Tensor]) -> Tensor:
        """(kept,) float32, on their device."""
        if self.kept == self.parameters:
            return torch.cat([gradient.flatten() for gradient in gradients])
        row = gradients[0].new_zeros(self.kept)
        generator = torch.Generator(row.device).manual_seed(self._seed)
        begun = 0
        for gradient in gradients:
            flat = gradient.flatten()
            signs = torch.randint(0, 2, flat.shape, generator=generator, device=flat.device, dtype=torch.int8)
            where = (begun + torch.arange(flat.numel(), device=flat.device)) % self.kept
            row.index_add_(0, where, flat * (2 * signs - 1))
            begun += flat.numel()
        return row


def _products(rows: Tensor) -> Tensor:
    """(N, K) => (N, N) float64 on the CPU: sums of float32 would lose the small difference that is looked for."""
    total = torch.zeros(len(rows), len(rows), dtype=torch.float64, device=rows.device)
    for part in rows.split(1 << 20, dim=1):
        part = part.double()
        total += part @ part.T
    return total.cpu()


def moments(products: Tensor, per_group: int) -> tuple[float, float, float]:
    """(|E g|^2, tr Cov(g), SNR) from the products of group means; see above.

    Args:
        products: (G, G) float64 of <A_i, A_j>, G at least 2.
        per_group: m.
    """
    groups = len(products)
    mean_square = products.sum() / groups**2
    spread = (products.trace() - groups * mean_square) / (groups - 1)
    squared_norm, trace = float(mean_square - spread / groups), float(per_group * spread)
    return squared_norm, trace, squared_norm / trace if trace > 0 else torch.nan


def moments_with_errors(products: Tensor, per_group: int) -> tuple[float, ...]:
    """`moments`, and a standard error of each; NaN of two groups, of which one alone tells nothing."""
    groups = len(products)
    if groups < 3:
        return *moments(products, per_group), torch.nan, torch.nan, torch.nan
    kept = [[i for i in range(groups) if i != left_out] for left_out in range(groups)]
    without = torch.tensor([moments(products[k][:, k], per_group) for k in kept], dtype=torch.float64)
    errors = ((groups - 1) * without.var(0, unbiased=False)).sqrt()
    return *moments(products, per_group), *errors.tolist()


def cosines(gradients: LevelGradients) -> Tensor:
    """(L, L) cosine of the mean gradients of each two levels, corrected for their noise as the squared norms are.

    NaN where a squared norm is not clear of 0 by two standard errors. Noise may make one exceed 1 a little: held there.
    """
    clear = gradients.squared_norm > 2.0 * gradients.squared_norm_error.nan_to_num(0.0)
    norms = torch.where(clear, gradients.squared_norm, torch.nan).sqrt()
    return (gradients.products / torch.outer(norms, norms)).clamp(-1.0, 1.0)


class WholeGradient(NamedTuple):
    """Of the loss as it is trained, over all noise levels."""

    squared_norm: float
    trace: float

    @property
    def noise_scale(self) -> float:
        """The batch size at which signal and noise are equal; NaN where the signal is lost in the noise."""
        return self.trace / self.squared_norm if self.squared_norm > 0 else torch.nan


def whole_gradient(gradients: LevelGradients, probability: Tensor, weight: Tensor) -> WholeGradient:
    """Signal and noise of a training gradient; see above.

    Args:
        gradients: of the levels.
        probability: (L,) chance that a drawn level is nearest to each.
        weight: (L,) w there.
    """
    mean = probability * weight
    squared_norm = float(mean @ gradients.products @ mean)
    second = float((probability * weight.square()) @ (gradients.trace + gradients.squared_norm))
    return WholeGradient(squared_norm, second - squared_norm)
