"""DiT as diffusers' DiTTransformer2DModel: config.json and safetensors, written and read without diffusers.

It is the same network under other names: queries, keys and values are apart, and every block has embedders of time and
label of its own, so that ours are repeated, and read back only where all are equal. Three things are no weights:

- Time. Both networks take the same number as it is, without a factor: `timestep = time`, which may be fractional. But
  diffusers computes its features with the frequencies 10000^(-i/127), i < 128, where the published DiT, on whose
  weights it runs too, has 10000^(-i/128), as all networks here: at time 999 an angle is off by up to 3 radians, and
  no weights make up for it. `use_published_frequencies` sets a loaded network of diffusers right; what was not
  written here is read as a `DiffusersDiT`, which computes as diffusers does.
- The epsilon of a block's second norm: `norm_eps` in the configuration, 1e-6 as published, by default 1e-5.
- The position table, which diffusers computes and does not store: any other than `sincos_table` is refused.

In `train()` mode diffusers replaces labels by the null class at random; its `from_pretrained` gives `eval()`.
"""

from __future__ import annotations

import contextlib
import dataclasses
import json
import math
import os
import shutil
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any, ClassVar, cast

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor, nn

from erdfast.atomic import write_text
from erdfast.models.dit import TIME_FEATURES, DiT, DiTBlock, DiTConfig
from erdfast.models.layers import TimeFeatures, sincos_table
from erdfast.tensor_files import replace_tensors, sync
from erdfast.typed_json import inner_object, read_object

CONFIG, WEIGHTS, PROCESS = "config.json", "diffusion_pytorch_model.safetensors", "erdfast_process.json"
INDEX = f"{WEIGHTS}.index.json"

CONVENTIONS = ("published", "diffusers")
"""How time features and second norms are computed: as in the published DiT, or as diffusers does."""

CONVENTION = "_erdfast_convention"
"""The configuration's field for it. diffusers keeps fields with an underscore and looks at none."""

_FIXED: dict[str, Any] = {
    "norm_type": "ada_norm_zero",
    "activation_fn": "gelu-approximate",
    "attention_bias": True,
    "norm_elementwise_affine": False,
    "dropout": 0.0,
}
"""What our DiT is: fields of diffusers' configuration that have one supported value, which is their default."""

_SIZES = {
    "num_attention_heads": 16,
    "attention_head_dim": 72,
    "in_channels": 4,
    "num_layers": 28,
    "sample_size": 32,
    "patch_size": 2,
    "num_embeds_ada_norm": 1000,
}
"""Fields that are integers, with their defaults."""

_UNUSED = {"norm_num_groups", "upcast_attention", "cross_attention_dim", "num_vector_embeds", "only_cross_attention"}
_UNUSED |= {"double_self_attention", "use_linear_projection", "attention_type", "caption_channels"}
_UNUSED |= {"interpolation_scale", "use_additional_conditions"}
"""Fields that do not change what a DiT computes; most are of Transformer2DModel, as which older folders are saved."""

DTYPES = (torch.float32, torch.bfloat16, torch.float16, torch.float64)
_PUBLISHED_EPS = 1e-6


@dataclasses.dataclass(frozen=True, kw_only=True)
class DiffusersDiTConfig(DiTConfig):
    """Configuration of a DiT that computes as diffusers' does."""

    backbone: ClassVar[str] = "diffusers_dit"

    norm_eps: float = 1e-5
    """Added to the variance in the second norm of every block; the other norms have 1e-6."""

    def __post_init__(self) -> None:
        super().__post_init__()
        if type(self.norm_eps) not in (int, float) or not 0 < self.norm_eps < 1:
            raise ValueError(f"norm_eps is {self.norm_eps!r}; supported: a number between 0 and 1")

    def build(self) -> DiffusersDiT:
        """The network with freshly drawn weights, on the default device (`with torch.device(...)`)."""
        return DiffusersDiT(self)


class DiffusersTimeFeatures(TimeFeatures):
    """`TimeFeatures` with the frequencies of diffusers' DiT, 10000^(-i/(E/2 - 1))."""

    def init_weights(self) -> None:
        half = self.features // 2
        index = torch.arange(half, dtype=torch.float32, device=self.frequencies.device)
        self.frequencies.copy_(torch.exp(-math.log(10000.0) * index / (half - 1)))


class DiffusersDiTBlock(DiTBlock):
    """`DiTBlock` with an epsilon for its second norm."""

    def __init__(self, config: DiffusersDiTConfig) -> None:
        super().__init__(config)
        self.norm2_eps = config.norm_eps


class DiffusersDiT(DiT):
    """`DiT` as diffusers computes it: other time frequencies, other epsilon. Its state_dict looks like a DiT's."""

    def __init__(self, config: DiffusersDiTConfig) -> None:
        super().__init__(config)
        self.t_embedder.features = DiffusersTimeFeatures(TIME_FEATURES)
        self.blocks = nn.ModuleList(DiffusersDiTBlock(config) for _ in range(config.depth))
        self.init_weights()


def use_published_frequencies(transformer: nn.Module) -> None:
    """Make a DiTTransformer2DModel of diffusers compute time features as the published DiT and ours do, in place.

    For weights that were written here, and for those that were converted from published checkpoints. It lasts as long
    as the object: what is saved and loaded again needs it again.

    Raises:
        ValueError: it is no such model.
    """
    changed = [module for module in transformer.modules() if hasattr(module, "downscale_freq_shift")]
    if not changed:
        raise ValueError(f"{type(transformer).__name__} has no time features of diffusers' DiTTransformer2DModel")
    for module in changed:
        cast(Any, module).downscale_freq_shift = 0


def to_diffusers(model: DiT) -> tuple[dict[str, Any], dict[str, Tensor]]:
    """What diffusers needs to build and fill a DiTTransformer2DModel that computes what `model` does.

    Its outputs are equal after `use_published_frequencies`, which a `DiffusersDiT` does not need.
    Without labels (num_classes 0) it wants `class_labels` of zeros.

    Args:
        model: an unsharded network, on any device and in any dtype.

    Returns:
        The fields of config.json, and copies of the weights on the CPU, in their dtype.

    Raises:
        ValueError: another backbone, or one that diffusers' has no counterpart of: inputs that are not square, a
            hidden width other than 4 times the width, another position table, renamed or replaced layers.
    """
    if not isinstance(model, DiT):
        raise ValueError(f"a {type(model).__name__} has no counterpart in diffusers; a DiT has")
    config, state = diffusers_config(model), model.state_dict()
    with torch.device("meta"):
        plain = model.config.build().state_dict().keys()
    if odd := sorted(plain ^ state.keys()):
        raise ValueError(f"this DiT has layers that are not its own ({odd[0]}): write it without what was added to it")
    _check_position_table(model)
    return config, {
        name: value.detach().to("cpu", copy=True, memory_format=torch.contiguous_format)
        for name, value in _to_theirs(state, model.config.depth).items()
    }


def diffusers_config(model: DiT) -> dict[str, Any]:
    """The fields of diffusers' config.json, with the convention as one more; raises ValueError as `to_diffusers`."""
    config = model.config
    channels, height, width = config.input_shape
    if height != width:
        raise ValueError(f"diffusers' DiT takes square inputs alone, not {height} x {width}")
    if config.mlp_width != 4 * config.width:
        raise ValueError(f"diffusers' DiT has mlp_ratio 4, not {config.mlp_ratio}")
    as_diffusers = isinstance(config, DiffusersDiTConfig)
    return {
        "_class_name": "DiTTransformer2DModel",
        CONVENTION: "diffusers" if as_diffusers else "published",
        **_FIXED,
        "num_attention_heads": config.num_heads,
        "attention_head_dim": config.width // config.num_heads,
        "in_channels": channels,
        "out_channels": config.out_channels,
        "num_layers": config.depth,
        "sample_size": height,
        "patch_size": config.patch_size,
        "num_embeds_ada_norm": config.num_classes,
        "norm_eps": config.norm_eps if as_diffusers else _PUBLISHED_EPS,
    }


def save_diffusers(model: DiT, folder: str | Path, process: Mapping[str, Any] | None = None) -> None:
    """Write a folder for `DiTTransformer2DModel.from_pretrained(folder)`: config.json and a safetensors file.

    A killed process leaves a new folder complete or absent. In one that was written here before, every file is the
    old one or the complete new one, and all are replaced within an instant. What it was writing stays beside it, as
    .NAME.partial, until the next time.

    Args:
        model: as of `to_diffusers`.
        folder: new, empty, or one that was written here.
        process: what to write as erdfast_process.json; without it, an old one is removed.

    Raises:
        ValueError: as `to_diffusers`, or the folder holds anything else. OSError: it cannot be written.
    """
    check_replaceable(Path(folder))
    config, weights = to_diffusers(model)
    texts = {CONFIG: config} | ({} if process is None else {PROCESS: process})
    folder = Path(folder).resolve()
    staged = folder.with_name(f".{folder.name}.partial")
    shutil.rmtree(staged, ignore_errors=True)
    try:
        replace_tensors(staged / WEIGHTS, weights)
        for name, values in texts.items():
            write_text(staged / name, json.dumps(values, indent=2) + "\n")
        _move(staged, folder, [WEIGHTS, *texts])
    finally:
        shutil.rmtree(staged, ignore_errors=True)


def check_replaceable(folder: Path) -> None:
    """Raise ValueError unless `save_diffusers` may write there: nothing, an empty folder, or what it wrote itself."""
    if not folder.exists():
        return
    if not folder.is_dir():
        raise ValueError(f"{folder} is a file; choose a folder")
    found = sorted(path.name for path in folder.iterdir())
    others = [name for name in found if name not in (CONFIG, WEIGHTS, PROCESS)]
    if found and not others:
        with contextlib.suppress(ValueError):
            values = _read_json(folder / CONFIG)
            found = [] if CONVENTION in values and "_diffusers_version" not in values else found
    if found:
        raise ValueError(f"{folder} holds {(others or found)[0]}, which was not written here; choose another folder")


def _move(staged: Path, folder: Path, names: list[str]) -> None:
    """Bring the complete files to their place; renames alone, so that little can go wrong."""
    sync(staged)
    if not folder.exists() or not any(folder.iterdir()):
        os.rename(staged, folder)
    else:
        for name in names:
            os.replace(staged / name, folder / name)
        if PROCESS not in names:
            (folder / PROCESS).unlink(missing_ok=True)
        sync(folder)
    sync(folder.parent)


def _check_position_table(model: DiT) -> None:
    table = model.pos_embed.detach()
    wanted = sincos_table(model.grid, model.config.width, device=table.device)
    difference = float((table.float() - wanted).abs().max())
    # Tables of other programs differ in the last digits, and low precision rounds.
    if not difference <= max(1e-5, torch.finfo(table.dtype).eps):
        raise ValueError(f"pos_embed is {difference:.2g} from the sine-cosine table, and diffusers' DiT has no other")


_OUTSIDE = {
    "pos_embed.proj": "x_embedder.proj",
    "proj_out_1": "final_layer.adaLN_modulation.1",
    "proj_out_2": "final_layer.linear",
}
_IN_BLOCK = {
    "norm1.linear": "adaLN_modulation.1",
    "attn1.to_out.0": "attn.proj",
    "ff.net.0.proj": "mlp.fc1",
    "ff.net.2": "mlp.fc2",
}
_REPEATED = {
    "norm1.emb.timestep_embedder.linear_1": "t_embedder.mlp.0",
    "norm1.emb.timestep_embedder.linear_2": "t_embedder.mlp.2",
}
_QKV = ("attn1.to_q", "attn1.to_k", "attn1.to_v")
_THEIR_LABELS, _LABELS = "norm1.emb.class_embedder.embedding_table.weight", "y_embedder.embedding_table.weight"
_KINDS = ("weight", "bias")


def _same(depth: int) -> Iterator[tuple[str, str]]:
    """(name in diffusers, name here) of every Linear and convolution but queries, keys and values; ours repeat."""
    yield from _OUTSIDE.items()
    for n in range(depth):
        yield from ((f"transformer_blocks.{n}.{theirs}", f"blocks.{n}.{ours}") for theirs, ours in _IN_BLOCK.items())
        yield from ((f"transformer_blocks.{n}.{theirs}", ours) for theirs, ours in _REPEATED.items())


def _to_theirs(ours: Mapping[str, Tensor], depth: int) -> dict[str, Tensor]:
    """Our state_dict under their names, mostly as views; on the meta device too."""
    theirs = {f"{there}.{kind}": ours[f"{here}.{kind}"] for there, here in _same(depth) for kind in _KINDS}
    # Without labels their table still has the row of the null class.
    labels = ours[_LABELS] if _LABELS in ours else torch.zeros_like(ours["pos_embed"][0, :1])
    for n in range(depth):
        theirs[f"transformer_blocks.{n}.{_THEIR_LABELS}"] = labels
        for kind in _KINDS:
            parts = ours[f"blocks.{n}.attn.qkv.{kind}"].chunk(3)
            theirs |= {f"transformer_blocks.{n}.{name}.{kind}": p for name, p in zip(_QKV, parts, strict=True)}
    return theirs


def _to_ours(theirs: Mapping[str, Tensor], config: DiTConfig) -> dict[str, Tensor]:
    """Copies of their weights, complete and of the right shapes, under our names; ValueError if embedders differ."""
    pairs = [(f"{there}.{kind}", f"{here}.{kind}") for there, here in _same(config.depth) for kind in _KINDS]
    pairs += [(f"transformer_blocks.{n}.{_THEIR_LABELS}", _LABELS) for n in range(config.depth)]
    ours: dict[str, Tensor] = {}
    for there, here in pairs:
        if not torch.equal(ours.setdefault(here, theirs[there]), theirs[there]):
            raise ValueError(
                f"{there} is not that of transformer_blocks.0; supported: the same embedders in all blocks"
            )
    if not config.num_classes and ours.pop(_LABELS).any():
        raise ValueError("num_embeds_ada_norm is 0 with an embedding that is not zero; supported: one of zeros")
    for n in range(config.depth):
        for kind in _KINDS:
            parts = [theirs[f"transformer_blocks.{n}.{name}.{kind}"] for name in _QKV]
            ours[f"blocks.{n}.attn.qkv.{kind}"] = torch.cat(parts)
    table = sincos_table(config.grid, config.width, device=torch.device("cpu"))
    ours["pos_embed"] = table.to(ours["final_layer.linear.weight"].dtype)
    # What safetensors reads is the file's memory, which would change with the file.
    return {name: value.clone() for name, value in ours.items()}


def from_diffusers(folder: str | Path, convention: str | None = None) -> DiT:
    """The DiT in a folder that `DiTTransformer2DModel.save_pretrained` or `save_diffusers` wrote, sharded or not.

    Args:
        folder: with config.json and safetensors. Nothing is downloaded, and nothing pickled is read.
        convention: of CONVENTIONS. "diffusers" gives the outputs of diffusers (a `DiffusersDiT`), "published" those of
            the DiT that was trained where weights were converted from published checkpoints, such as DiT-XL-2-256. By
            default what was written here is what it was, and all else as "diffusers".

    Returns:
        The network on the CPU, in the dtype of the file.

    Raises:
        ValueError: it is another network or damaged; names the folder, what differs, and what is supported.
    """
    folder = Path(folder)
    try:
        config = _our_config(_read_json(folder / CONFIG), convention)
        with torch.device("meta"):
            model = config.build()
        theirs = _read_weights(folder)
        _check_weights(theirs, _to_theirs(model.state_dict(), config.depth))
        model.load_state_dict(_to_ours(theirs, config), assign=True)
    except (ValueError, RuntimeError) as error:  # the latter: sizes beyond all memory
        raise ValueError(f"{folder}: {error}") from error
    features = model.t_embedder.features.to_empty(device="cpu")
    features.init_weights()
    return model


def _our_config(values: Mapping[str, Any], convention: str | None) -> DiTConfig:
    _require("_class_name", values.get("_class_name"), ("DiTTransformer2DModel", "Transformer2DModel"))
    for field, wanted in _FIXED.items():
        _require(field, values.get(field, wanted), (wanted,))
    known = {*_FIXED, *_SIZES, *_UNUSED, "out_channels", "norm_eps"}
    if unknown := sorted(field for field in values if field not in known and not field.startswith("_")):
        raise ValueError(f"unknown field {unknown[0]}; supported: those of diffusers 0.42's DiTTransformer2DModel")
    sizes = {field: values.get(field, default) for field, default in _SIZES.items()}
    for field, value in sizes.items():
        if type(value) is not int or not (field != "num_embeds_ada_norm") <= value < 1 << 31:
            raise ValueError(f"{field} is {value!r}; supported: a positive integer")
    channels, side = sizes["in_channels"], sizes["sample_size"]
    out_channels = values.get("out_channels")
    _require("out_channels", out_channels, (channels, 2 * channels, None))
    eps = values.get("norm_eps", DiffusersDiTConfig.norm_eps)
    fields = {
        "input_shape": (channels, side, side),
        "patch_size": sizes["patch_size"],
        "width": sizes["num_attention_heads"] * sizes["attention_head_dim"],
        "depth": sizes["num_layers"],
        "num_heads": sizes["num_attention_heads"],
        "num_classes": sizes["num_embeds_ada_norm"],
        "learn_sigma": out_channels == 2 * channels,
    }
    chosen = convention or values.get(CONVENTION, "diffusers")
    _require("convention" if convention else CONVENTION, chosen, CONVENTIONS)
    if chosen == "diffusers":
        return DiffusersDiTConfig(**fields, norm_eps=eps)
    if not convention:
        _require("norm_eps", eps, (_PUBLISHED_EPS,))
    return DiTConfig(**fields)


def _require(field: str, value: Any, supported: tuple[Any, ...]) -> None:
    if value not in supported:
        raise ValueError(f"{field} is {value!r}; supported: {', '.join(map(repr, supported))}")


def _read_json(path: Path) -> dict[str, Any]:
    if not path.is_file():
        raise ValueError(f"there is no {path.name}; expected what DiTTransformer2DModel.save_pretrained writes")
    try:
        return read_object(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise ValueError(f"{path.name} cannot be read: {error}") from error


def _read_weights(folder: Path) -> dict[str, Tensor]:
    single, index = (folder / WEIGHTS).exists(), (folder / INDEX).exists()
    if single and index:
        raise ValueError(f"it holds both {WEIGHTS} and {INDEX}: remove the one that is out of date")
    if single:
        return _read_tensors(folder / WEIGHTS)
    if not index:
        found = ", ".join(sorted(path.name for path in folder.glob("*model*")))
        raise ValueError(f"there is neither {WEIGHTS} nor {INDEX}, but {found or 'nothing'}; supported: safetensors")
    places = inner_object(_read_json(folder / INDEX), "weight_map")
    theirs: dict[str, Tensor] = {}
    for shard in sorted({*map(str, places.values())}):
        if Path(shard).name != shard or not shard.endswith(".safetensors"):
            raise ValueError(f"{INDEX} names {shard!r}; supported: safetensors files beside it")
        theirs |= {name: value for name, value in _read_tensors(folder / shard).items() if places.get(name) == shard}
    if lost := sorted(places.keys() - theirs.keys()):
        raise ValueError(f"{lost[0]} is not in {places[lost[0]]}, where {INDEX} says it is")
    return theirs


def _read_tensors(path: Path) -> dict[str, Tensor]:
    try:
        with safe_open(path, framework="pt") as file:
            return {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
    except (OSError, SafetensorError) as error:
        raise ValueError(f"{path.name} cannot be read: {error}") from error


def _check_weights(found: Mapping[str, Tensor], wanted: Mapping[str, Tensor]) -> None:
    """Raise ValueError unless names and shapes are those wanted, all in one dtype."""
    for names, what in ((wanted.keys() - found.keys(), "is missing"), (found.keys() - wanted.keys(), "is unknown")):
        if names:
            raise ValueError(f"weight {min(names)} {what} (one of {len(names)}); supported: those of its config.json")
    for name, value in wanted.items():
        if found[name].shape != value.shape:
            raise ValueError(f"{name} is {tuple(found[name].shape)}; supported: {tuple(value.shape)}")
    dtypes = {value.dtype for value in found.values()}
    if len(dtypes) > 1 or not dtypes <= {*DTYPES}:
        raise ValueError(f"the weights are {', '.join(sorted(map(str, dtypes)))}; supported: one of {DTYPES} for all")
