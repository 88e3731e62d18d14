"""Features of a network, as rows."""

from __future__ import annotations

import torch

from erdfast.diagnostics.features import TOKENS_PER_IMAGE, FeatureProbe, feature_rows
from erdfast.presets import build_model


def inputs(model, batch=5):
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(batch, *model.input_shape, generator=generator)
    return x, torch.linspace(0.1, 0.9, batch), torch.arange(batch)


@torch.no_grad()
def test_a_probe_sees_the_newest_features_and_leaves_nothing_behind():
    for name, wanted in (("dit_tiny", (5, 16, 64)), ("adm_unet_tiny", (5, 256, 32))):
        model = build_model(name).eval()
        arguments = inputs(model)
        before = model(*arguments)
        with FeatureProbe(model) as probe:
            assert torch.equal(model(*arguments), before)
            first = probe.features
            model(2 * arguments[0], *arguments[1:])
            assert tuple(first.shape) == tuple(probe.features.shape) == wanted
            assert not torch.equal(first, probe.features)
        assert not model.readout()._forward_pre_hooks


@torch.no_grad()
def test_a_unets_features_are_its_places():
    model = build_model("adm_unet_tiny").eval()
    x, time, y = inputs(model)
    with FeatureProbe(model) as probe:
        model(x, time, y)
        seen = []
        hook = model.readout().register_forward_pre_hook(lambda _, given: seen.append(given[0]))
        model(x, time, y)
        hook.remove()
        assert torch.equal(probe.features[2, 17], seen[0][2, :, 1, 1])


def test_rows():
    """Feature (b, l) holds b and l: places go round."""
    batch, length = 6, 10
    b, place = torch.meshgrid(torch.arange(batch), torch.arange(length), indexing="ij")
    features = torch.stack([b, place], dim=2).half()
    rows = feature_rows(features, first=8)
    assert rows.pooled.dtype == rows.tokens.dtype == torch.float32
    torch.testing.assert_close(rows.pooled, torch.stack([torch.arange(6.0), torch.full((6,), 4.5)], dim=1))
    assert rows.tokens.view(batch, TOKENS_PER_IMAGE, 2)[:, :, 1].tolist() == [
        [8, 0, 2, 4], [9, 1, 3, 5], [0, 2, 4, 6], [1, 3, 5, 7], [2, 4, 6, 8], [3, 5, 7, 9],
    ]  # fmt: skip
    assert rows.tokens[:, 0].tolist() == [float(n) for n in range(6) for _ in range(TOKENS_PER_IMAGE)]
    halves = [feature_rows(features[:2], 8), feature_rows(features[2:], 10)]
    assert torch.equal(torch.cat([half.tokens for half in halves]), rows.tokens)
    assert feature_rows(features[:, :1], 3).tokens.shape == (6, 2)
