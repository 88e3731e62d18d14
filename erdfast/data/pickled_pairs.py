"""U-ViT's features, `{i}.npy` holding a pickled pair (moments, label), read without running what a pickle may contain.

An unpickler calls whatever the file names. This one knows the few names of NumPy's arrays, and puts stand-ins of our
own in their place, which only look at shapes, types and bytes: a file cannot make any function of NumPy or Python run.
"""

from __future__ import annotations

import io
import pickle
import pickletools
from typing import Any, NamedTuple

import numpy as np

_TYPES = ("f2", "f4", "f8", "i1", "i2", "i4", "i8", "u1", "u2", "u4", "u8")
# fmt: off
_OPCODES = frozenset((
    "PROTO", "FRAME", "STOP", "MARK", "NONE", "NEWTRUE", "NEWFALSE", "GLOBAL", "STACK_GLOBAL", "REDUCE", "BUILD",
    "MEMOIZE", "BINPUT", "LONG_BINPUT", "BINGET", "LONG_BINGET", "BININT", "BININT1", "BININT2", "LONG1",
    "SHORT_BINUNICODE", "BINUNICODE", "SHORT_BINBYTES", "BINBYTES", "BINBYTES8", "BYTEARRAY8", "SHORT_BINSTRING",
    "BINSTRING", "EMPTY_TUPLE", "TUPLE", "TUPLE1", "TUPLE2", "TUPLE3", "EMPTY_LIST", "APPEND", "APPENDS",
))
# fmt: on
"""What NumPy writes for arrays in protocols 2 to 5. No dict or set: hashing deep keys in C overflows the stack."""
_MOST = 300
"""Opcodes, of which a pair takes about 60; and the largest index of the memo, which is an array that long in memory."""
_MULTIARRAY = ("numpy.core.multiarray", "numpy._core.multiarray")


class _Dtype:
    """numpy.dtype: a name, and a state that says the byte order."""

    def __init__(self, name: str, *_: Any) -> None:
        self.name = name

    def __setstate__(self, state: tuple) -> None:
        if state[1] == ">":
            raise ValueError("numbers in big-endian order")

    def plain(self) -> np.dtype:
        """The type, if it is one of numbers."""
        name = self.name.lstrip("<|=")
        if name not in _TYPES:
            raise ValueError(f"numbers of type {self.name[:100]!r}")
        return np.dtype(name)


class _Array:
    """numpy.ndarray, made by `_reconstruct` and filled by its state: version, shape, dtype, Fortran order, content."""

    content: Any = None

    def __init__(self, *_: Any) -> None: ...

    def __setstate__(self, state: tuple) -> None:
        _, shape, dtype, fortran, content = state
        if dtype.name in ("O", "O8"):
            self.content = list(content)
            return
        if not isinstance(content, bytes) or fortran:
            raise ValueError("an array that is not stored as plain bytes in C order")
        # Sizes that do not suit one another are refused by reshape.
        self.content = np.frombuffer(content, dtype.plain()).reshape(shape)


class _FromBuffer:
    """How protocol 5 makes an array. An object without attributes, unlike a function: a pickle can set attributes."""

    __slots__ = ()

    def __call__(self, content: Any, dtype: _Dtype, shape: tuple[int, ...], order: str) -> _Array:
        if not isinstance(content, (bytes, bytearray)):
            raise ValueError("an array that is made of no bytes")
        array = _Array()
        array.__setstate__((1, shape, dtype, order != "C", bytes(content)))
        return array


class _Scalar:
    __slots__ = ()

    def __call__(self, dtype: _Dtype, content: Any) -> Any:
        if not isinstance(content, (bytes, bytearray)):
            raise ValueError("a number that is made of no bytes")
        return np.frombuffer(content, dtype.plain())[0]


class _Encode:
    """How pickles of protocol 2 and less write bytes."""

    __slots__ = ()

    def __call__(self, text: str, encoding: str) -> bytes:
        if encoding != "latin1":
            raise ValueError(f"bytes in encoding {encoding[:100]!r}")
        return text.encode("latin1")


_KNOWN: dict[tuple[str, str], Any] = {("numpy", "ndarray"): _Array, ("numpy", "dtype"): _Dtype}
_KNOWN |= {(module, "_reconstruct"): _Array for module in _MULTIARRAY}
_KNOWN |= {(module, "scalar"): _Scalar() for module in _MULTIARRAY}
_KNOWN |= {(f"{package}.numeric", "_frombuffer"): _FromBuffer() for package in ("numpy.core", "numpy._core")}
_KNOWN |= {("_codecs", "encode"): _Encode()}


class _Arrays(pickle.Unpickler):
    """Arrays of numbers and nothing else."""

    def find_class(self, module: str, name: str) -> Any:
        if (module, name) not in _KNOWN:
            named = f"{module}.{name}"[:100]
            raise ValueError(f"it names {named}, which is refused: only arrays of numbers are read")
        return _KNOWN[module, name]

    def persistent_load(self, pid: Any) -> Any:
        raise ValueError("it refers to objects outside the file, which is refused")


class Pair(NamedTuple):
    """One file."""

    mean_and_std: np.ndarray
    """(2C, H, W) float32: the mean, then the standard deviation of the VAE's posterior."""
    label: int


def is_pickled(head: bytes) -> bool:
    """Whether a .npy file, by its first bytes, holds Python objects."""
    try:
        stream = io.BytesIO(head)
        readers = {(1, 0): np.lib.format.read_array_header_1_0, (2, 0): np.lib.format.read_array_header_2_0}
        return readers[np.lib.format.read_magic(stream)](stream)[2].hasobject
    except (ValueError, KeyError):
        return False


def _check_opcodes(stream: io.BytesIO) -> None:
    """Raise ValueError unless a pickle is made of what arrays are made of: others can crash an unpickler."""
    try:
        for number, (opcode, argument, _) in enumerate(pickletools.genops(stream)):
            if opcode.name not in _OPCODES:
                raise ValueError(f"it holds a {opcode.name}, which is refused: only arrays of numbers are read")
            index = int(argument or 0) if opcode.name in ("BINPUT", "LONG_BINPUT") else 0
            if max(number, index) > _MOST:
                raise ValueError("it holds more than a pair")
    except ValueError as error:
        text = str(error)[:200]
        raise ValueError(text if text.startswith("it holds") else f"its pickle is broken: {text}") from error


def decode_pair(data: bytes) -> Pair:
    """The content of one of U-ViT's files.

    The second half of the moments is a log-variance there: std = exp(logvar/2), clamped to [-30, 20] as in its VAE.

    Raises:
        ValueError: it holds anything but such a pair; says what.
    """
    stream = io.BytesIO(data)
    if np.lib.format.read_magic(stream) != (1, 0) or not np.lib.format.read_array_header_1_0(stream)[2].hasobject:
        raise ValueError("it holds no pickled pair")
    start = stream.tell()
    try:
        _check_opcodes(stream)
        stream.seek(start)
        array = _Arrays(stream).load()
    except ValueError:
        raise
    except Exception as error:  # an unpickler raises anything for broken bytes
        raise ValueError(f"its pickle is broken: {str(error)[:200] or type(error).__name__}") from error
    content = array.content if isinstance(array, _Array) else None
    if not isinstance(content, list) or len(content) != 2 or not isinstance(content[0], _Array):
        raise ValueError("it holds something else than a pair (moments, label)")
    moments, label = content[0].content, content[1]
    label = label.content if isinstance(label, _Array) else label
    if not isinstance(moments, np.ndarray) or moments.ndim != 3 or moments.dtype.kind != "f" or len(moments) % 2:
        raise ValueError("the moments must be floats of shape (2C, H, W)")
    whole = np.asarray(label).dtype.kind in "iu" if isinstance(label, (int, np.integer, np.ndarray)) else False
    if not whole or np.size(label) != 1:
        raise ValueError(f"the label is no whole number but a {type(label).__name__}")
    mean, logvar = np.split(moments.astype(np.float32), 2)
    std = np.exp(0.5 * np.clip(logvar, -30.0, 20.0))
    return Pair(np.concatenate([mean, std]), int(np.asarray(label).reshape(-1)[0]))


def decode_moments(data: bytes) -> np.ndarray:
    """`decode_pair(data).mean_and_std`."""
    return decode_pair(data).mean_and_std
