"""From options to the network and the data of a run."""

from __future__ import annotations

import dataclasses

import torch

from erdfast import presets
from erdfast.config import TrainConfig
from erdfast.data import Dataset, open_dataset
from erdfast.models import Backbone, BackboneConfig
from erdfast.models.flops import parameter_count, training_flops
from erdfast.ops import attention_reason


def open_data(config: TrainConfig) -> Dataset:
    """The data set of a resolved configuration.

    Raises:
        ValueError: it cannot be read, or does not suit the network; names the file.
    """
    network = presets.model_config(config.model)
    assert config.data is not None
    # A mixture can have any number of classes, so it takes the network's; files and digits have their own.
    mixture = config.data == "mixture" or config.data.startswith("mixture:")  # "mixture.npz" is a file
    num_classes = network.num_classes if mixture else None
    dataset = open_dataset(
        config.data,
        shape=network.input_shape,
        num_classes=num_classes,
        seed=config.seed,
        latent_scale=config.latent_scale,
    )
    if len(dataset) < 1:
        raise ValueError(f"data {config.data} is empty")
    return dataset


def network_config(config: TrainConfig, dataset: Dataset | None = None) -> BackboneConfig:
    """The preset, with as many classes as the data has."""
    network = presets.model_config(config.model, attention=config.attention)
    return network if dataset is None else dataclasses.replace(network, num_classes=dataset.num_classes)


def build_network(config: TrainConfig, dataset: Dataset) -> Backbone:
    """The network with freshly drawn weights; without label drop it has no null class to guide with.

    Raises:
        ValueError: labels shall be dropped, but the network has no null class that could take their place.
    """
    model = network_config(config, dataset).build()
    if config.label_drop == 0:
        model.null_class = None
    elif model.num_classes and model.null_class is None:
        raise ValueError(
            f"label_drop {config.label_drop} needs a null class, which {config.model} does not have; "
            "choose label_drop 0"
        )
    return model


def check_attention(network: BackboneConfig, dtype: torch.dtype, device: torch.device) -> None:
    """Raise ValueError, saying why, if the attention back end that was asked for cannot serve this network here."""
    if network.attention == "auto":
        return
    for heads in network.accounting().attentions:
        q, k, v = (torch.zeros((1, *heads), dtype=dtype, device=device, requires_grad=True) for _ in range(3))
        if reason := attention_reason(network.attention, q, k, v):
            raise ValueError(f"attention {network.attention!r} is not available here: {reason}")


def describe_network(config: TrainConfig, dataset: Dataset | None = None) -> str:
    """One line: "uvit_h2: 500,832,164 parameters, 799 GFLOP per image"."""
    base = network_config(config, dataset)
    return f"{config.model}: {parameter_count(base):,} parameters, {training_flops(base) / 1e9:.3g} GFLOP per image"
