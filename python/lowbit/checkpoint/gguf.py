"""GGUF files: a reader that maps and trusts nothing, and a writer of ternary models (through the `gguf` package).

    24 bytes       "GGUF", version uint32, number of tensors uint64, number of metadata pairs uint64; little endian
    the pairs      key (a string), type uint32, value; a string is its length uint64 and UTF-8 bytes; an array is its
                   elements' type uint32, their number uint64, and they
    the tensors    name, number of dimensions uint32, dimensions uint64 (columns first), type uint32, offset uint64
    padding        to a multiple of general.alignment (32 without that key), where the data begins; offsets count from
                   there and are multiples of it too

The reader checks every count, length, type and offset against the file's size before anything is made of it: a tensor
lies inside the file and overlaps none. A type that it does not know is listed and refused only when it is read.
"""

import math
import mmap
import os
import struct
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch

from ..matrix import PackedMatrix, as_tensor
from .safe_write import replacing
from .ternary_blocks import BLOCKS, WRITABLE, decode, decode_i2_s, encode
from .ternary_matrix import TernaryMatrix

# Metadata becomes Python objects, several times their size; vocabularies of a quarter million tokens take 20 MB.
HEADER_LIMIT = 64 << 20

_VERSIONS = (2, 3)
_ALIGNMENT = 32
_DIMENSIONS = 4
_NAME_LIMIT = 63  # bytes; readers keep 64 with the closing zero

_STRING, _ARRAY, _BOOL = 8, 9, 7
_NUMBERS = {
    0: np.dtype("<u1"),
    1: np.dtype("<i1"),
    2: np.dtype("<u2"),
    3: np.dtype("<i2"),
    4: np.dtype("<u4"),
    5: np.dtype("<i4"),
    6: np.dtype("<f4"),
    _BOOL: np.dtype("<u1"),
    10: np.dtype("<u8"),
    11: np.dtype("<i8"),
    12: np.dtype("<f8"),
}

# Tensor types: id -> (name, weights a block, bytes a block). Those of IQ1_BN and I2_S have rows and tensors instead.
_TYPES = {
    0: ("F32", 1, 4),
    1: ("F16", 1, 2),
    2: ("Q4_0", 32, 18),
    3: ("Q4_1", 32, 20),
    6: ("Q5_0", 32, 22),
    7: ("Q5_1", 32, 24),
    8: ("Q8_0", 32, 34),
    10: ("Q2_K", 256, 84),
    11: ("Q3_K", 256, 110),
    12: ("Q4_K", 256, 144),
    13: ("Q5_K", 256, 176),
    14: ("Q6_K", 256, 210),
    20: ("IQ4_NL", 32, 18),
    23: ("IQ4_XS", 256, 136),
    24: ("I8", 1, 1),
    25: ("I16", 1, 2),
    26: ("I32", 1, 4),
    27: ("I64", 1, 8),
    28: ("F64", 1, 8),
    30: ("BF16", 1, 2),
    34: ("TQ1_0", 256, 54),
    35: ("TQ2_0", 256, 66),
    36: ("I2_S", 0, 0),
    134: ("IQ1_BN", 0, 0),
    143: ("PTQ1_0", 128, 28),
}
_FLOATS = {"F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16}
TERNARY = (*BLOCKS, "I2_S")


@dataclass(frozen=True)
class GgufTensor:
    """One tensor of a file: type name ("type 99" for one that is not known), shape [rows, cols], where its bytes lie.

    end: None for an unknown type, whose size nobody can tell.
    """

    type: str
    shape: tuple[int, ...]
    begin: int
    end: int | None


class GgufFile:
    """A checked, mapped GGUF file.

    Attributes:
        metadata: {key: text, bool, NumPy number, list of texts, or NumPy array}, each in the type that it has there.
        tensors: {name: GgufTensor}.

    Raises FileNotFoundError, or ValueError naming the file, the thing, what was expected and what was found.
    """

    def __init__(self, path: str | os.PathLike):
        self.path = Path(path)
        if not self.path.is_file():
            raise FileNotFoundError(f"{self.path}: not found")
        with open(self.path, "rb") as file:
            size = os.fstat(file.fileno()).st_size
            if size == 0:
                raise ValueError(f"{self.path}: expected a GGUF file, got 0 bytes")
            self._map = mmap.mmap(file.fileno(), size, access=mmap.ACCESS_COPY)
        header = _Header(self._map, size, self.path)
        tensors, pairs = header.counts()
        self.metadata: dict[str, Any] = {}
        for _ in range(pairs):
            key = header.text("metadata key")
            if key in self.metadata:
                raise ValueError(f"{self.path}: {key}: expected each metadata key once, got it twice")
            self.metadata[key] = header.value(key)
        alignment = self._alignment()
        infos: dict[str, tuple] = {}
        for _ in range(tensors):
            name = header.text("tensor name")
            if name in infos:
                raise ValueError(f"{self.path}: {name}: expected each tensor once, got it twice")
            infos[name] = header.tensor(name)
        start = -(-header.position // alignment) * alignment
        self.tensors = {name: self._placed(name, info, start, size, alignment) for name, info in infos.items()}
        self._check_overlaps()

    def floats(self, name: str) -> torch.Tensor:
        """A tensor of type F32, F16 or BF16: a view of the mapped file, or a copy where it is not aligned.

        Raises KeyError for a name that is not there, ValueError for another type.
        """
        tensor = self._tensor(name, tuple(_FLOATS))
        dtype = _FLOATS[tensor.type]
        data = self._bytes(tensor)
        return (data.clone() if tensor.begin % dtype.itemsize else data).view(dtype).view(tensor.shape)

    def ternary(self, name: str, *, canonicalise: bool = False, i2_s_layout: str | None = None) -> TernaryMatrix:
        """A matrix of type TQ1_0, TQ2_0, PTQ1_0, IQ1_BN or I2_S (checkpoint.ternary_blocks says how they are read).

        canonicalise: take bytes that no writer makes instead of refusing them.
        i2_s_layout: "x86" for I2_S tensors that a build for x86 wrote; the file does not say, so None refuses them.
        Raises KeyError for a name that is not there, ValueError naming file and tensor for contents that are refused.
        """
        tensor = self._tensor(name, TERNARY)
        if len(tensor.shape) != 2:
            raise ValueError(f"{self.path}: {name}: shape: expected [rows, cols], got {list(tensor.shape)}")
        rows, cols = tensor.shape
        data = self._bytes(tensor)
        try:
            if tensor.type == "I2_S":
                return decode_i2_s(data, rows, cols, i2_s_layout)
            return decode(tensor.type, data.view(rows, -1), cols, canonicalise=canonicalise)
        except ValueError as error:
            raise ValueError(f"{self.path}: {name}: {error}") from None

    def packed(self, name: str, *, canonicalise: bool = False, i2_s_layout: str | None = None) -> PackedMatrix:
        """`ternary` as a PackedMatrix in format "trit"."""
        return self.ternary(name, canonicalise=canonicalise, i2_s_layout=i2_s_layout).to_packed()

    def _tensor(self, name: str, types: tuple[str, ...]) -> GgufTensor:
        tensor = self.tensors.get(name)
        if tensor is None:
            raise KeyError(f"{self.path}: {name}: no such tensor")
        if tensor.type not in types:
            raise ValueError(f"{self.path}: {name}: type: expected one of {', '.join(types)}, got {tensor.type}")
        return tensor

    def _bytes(self, tensor: GgufTensor) -> torch.Tensor:
        return torch.frombuffer(self._map, dtype=torch.uint8, count=tensor.end - tensor.begin, offset=tensor.begin)

    def _alignment(self) -> int:
        alignment = self.metadata.get("general.alignment", np.uint32(_ALIGNMENT))
        if not isinstance(alignment, np.uint32) or int(alignment).bit_count() != 1:
            raise ValueError(f"{self.path}: general.alignment: expected a uint32 power of two, got {alignment!r}")
        return int(alignment)

    def _placed(self, name: str, info: tuple, start: int, size: int, alignment: int) -> GgufTensor:
        shape, number, offset = info
        type_name = _TYPES[number][0] if number in _TYPES else f"type {number}"
        if offset % alignment:
            raise ValueError(f"{self.path}: {name}: offset: expected a multiple of {alignment}, got {offset}")
        try:
            nbytes = _nbytes(number, shape)
        except ValueError as error:
            raise ValueError(f"{self.path}: {name}: {error}") from None
        begin = start + offset
        if begin + (nbytes or 0) > size:
            wanted = "a place" if nbytes is None else f"{nbytes} bytes of {type_name} {list(shape)}"
            raise ValueError(f"{self.path}: {name}: expected {wanted} at {begin}, got a file of {size} bytes")
        return GgufTensor(type_name, shape, begin, None if nbytes is None else begin + nbytes)

    def _check_overlaps(self) -> None:
        position = 0
        for name, tensor in sorted(self.tensors.items(), key=lambda item: (item[1].begin, item[1].end or 0)):
            if tensor.begin < position:
                raise ValueError(
                    f"{self.path}: {name}: offset: expected at least {position} bytes into the file, where the tensor "
                    f"before it ends, got {tensor.begin}"
                )
            position = tensor.begin if tensor.end is None else tensor.end


class _Header:
    """Reads a file's header front to back; whatever is longer than what is left of the file is an error."""

    def __init__(self, data: mmap.mmap, size: int, path: Path):
        self.data, self.size, self.path, self.position = data, size, path, 0

    def take(self, count: int, what: str) -> bytes:
        if count > self.size - self.position:
            raise ValueError(
                f"{self.path}: {what}: expected {count} bytes at {self.position}, got a file of {self.size} bytes"
            )
        self.position += count
        if self.position > HEADER_LIMIT:
            raise ValueError(f"{self.path}: header: expected at most {HEADER_LIMIT} bytes, {what} lies beyond")
        return self.data[self.position - count : self.position]

    def counts(self) -> tuple[int, int]:
        """(number of tensors, number of metadata pairs), no more than the file has room for."""
        if (magic := self.take(4, "magic")) != b"GGUF":
            raise ValueError(f"{self.path}: magic: expected b'GGUF', got {magic!r}")
        version, tensors, pairs = struct.unpack("<IQQ", self.take(20, "header"))
        if version not in _VERSIONS:
            raise ValueError(f"{self.path}: version: expected 2 or 3, little endian, got {version}")
        room = self.size - self.position
        for what, count, least in (("tensors", tensors, 24), ("metadata pairs", pairs, 13)):
            if count > room // least:
                raise ValueError(f"{self.path}: number of {what}: expected at most {room // least}, got {count}")
        return tensors, pairs

    def number(self, kind: str, what: str) -> int:
        return struct.unpack(kind, self.take(struct.calcsize(kind), what))[0]

    def text(self, what: str) -> str:
        data = self.take(self.number("<Q", f"length of {what}"), what)
        try:
            return data.decode("utf-8")
        except UnicodeDecodeError as error:
            raise ValueError(f"{self.path}: {what}: expected UTF-8, got {data[:40]!r}: {error.reason}") from None

    def value(self, key: str) -> Any:
        kind = self.number("<I", key)
        if kind == _STRING:
            return self.text(key)
        if kind != _ARRAY:
            value = self.numbers(key, kind, 1)[0]
            return bool(value) if kind == _BOOL else value
        kind, count = self.number("<I", key), self.number("<Q", key)
        if kind != _STRING:
            return self.numbers(key, kind, count)
        if count > (self.size - self.position) // 8:
            raise ValueError(f"{self.path}: {key}: length: expected room for {count} texts, got {self.size} bytes")
        return [self.text(key) for _ in range(count)]

    def numbers(self, key: str, kind: int, count: int) -> np.ndarray:
        if kind not in _NUMBERS:
            raise ValueError(f"{self.path}: {key}: type: expected a number, bool or text, got type {kind}")
        dtype = _NUMBERS[kind]
        values = np.frombuffer(self.take(count * dtype.itemsize, key), dtype)
        if kind != _BOOL:
            return values
        if (values > 1).any():
            raise ValueError(f"{self.path}: {key}: expected booleans (0 or 1), got {values.max()}")
        return values.astype(bool)

    def tensor(self, name: str) -> tuple[tuple[int, ...], int, int]:
        """(shape with the columns last, type, offset)."""
        dimensions = self.number("<I", name)
        if not 1 <= dimensions <= _DIMENSIONS:
            raise ValueError(f"{self.path}: {name}: dimensions: expected 1 to {_DIMENSIONS}, got {dimensions}")
        shape = struct.unpack(f"<{dimensions}Q", self.take(8 * dimensions, name))[::-1]
        if min(shape) < 1:
            raise ValueError(f"{self.path}: {name}: shape: expected positive sizes, got {list(shape)}")
        return shape, self.number("<I", name), self.number("<Q", name)


def _nbytes(number: int, shape: tuple[int, ...]) -> int | None:
    """Bytes of a tensor, or None for a type that is not known. Raises ValueError for a shape the type cannot have."""
    if number not in _TYPES:
        return None
    name, block, block_bytes = _TYPES[number]
    count = math.prod(shape)
    if name == "IQ1_BN":
        return count // shape[-1] * BLOCKS[name].row_bytes(shape[-1])
    if name == "I2_S":
        if count % 4:
            raise ValueError(f"shape: expected a multiple of 4 weights for I2_S, got {list(shape)}")
        return count // 4 + 32
    if shape[-1] % block:
        raise ValueError(f"shape: expected a multiple of {block} columns for {name}, got {list(shape)}")
    return count // block * block_bytes


# ---- writing ----


def write_gguf(
    path: str | os.PathLike,
    tensors: Mapping[str, TernaryMatrix | PackedMatrix | torch.Tensor],
    metadata: Mapping[str, Any],
    *,
    ternary: str = "TQ1_0",
) -> None:
    """Writes a GGUF file as one step, with the `gguf` package (pip install 'lowbit[gguf]').

    tensors: matrices become the type `ternary`, "TQ1_0" or "TQ2_0"; float32, float16 and bfloat16 tensors stay what
        they are: nothing is ternarized here.
    metadata: {key: value} with "general.architecture"; a value is text, a bool, a number or a list or array of one of
        these. A NumPy number keeps its width; others become uint32, int32 or 64-bit integers, and float32.

    Raises ValueError or TypeError naming the tensor or the key that the format cannot hold, ImportError without the
    package.
    """
    try:
        import gguf
    except ImportError as error:
        raise ImportError("writing GGUF files needs the gguf package: pip install 'lowbit[gguf]'") from error
    if ternary not in WRITABLE:
        raise ValueError(f"ternary: expected one of {', '.join(WRITABLE)}, got {ternary!r}")
    if not isinstance(metadata.get("general.architecture"), str):
        raise ValueError("metadata: general.architecture: expected a text, as every GGUF file has")
    values = {key: _typed_value(key, value, gguf.GGUFValueType) for key, value in metadata.items()}
    plans = {name: _planned(name, tensor, ternary) for name, tensor in tensors.items()}
    with replacing(path) as partial:
        writer = gguf.GGUFWriter(partial, metadata["general.architecture"])
        try:
            writer.add_quantization_version(gguf.GGML_QUANT_VERSION)
            for key, (value, kind, element) in values.items():
                if key == "general.alignment":
                    writer.add_custom_alignment(value)
                elif key not in ("general.architecture", "general.quantization_version"):
                    writer.add_key_value(key, value, kind, element)
            for name, (kind, shape, nbytes) in plans.items():
                writer.add_tensor_info(name, shape, np.dtype(np.float32), nbytes, gguf.GGMLQuantizationType[kind])
            writer.write_header_to_file()
            writer.write_kv_data_to_file()
            writer.write_ti_data_to_file()
            for name, tensor in tensors.items():
                writer.write_tensor_data(_contents(name, tensor, ternary))
        finally:
            writer.close()


def _planned(name: str, tensor: object, ternary: str) -> tuple[str, tuple[int, ...], int]:
    """(type, shape, bytes) of a tensor to write."""
    if not name or len(name.encode()) > _NAME_LIMIT:
        raise ValueError(f"{name}: name: expected 1 to {_NAME_LIMIT} bytes, got {len(name.encode())}")
    if isinstance(tensor, TernaryMatrix | PackedMatrix):
        rows, cols = tensor.shape
        try:
            return ternary, (rows, cols), rows * BLOCKS[ternary].row_bytes(cols)
        except ValueError as error:
            raise ValueError(f"{name}: {error}") from None
    tensor = as_tensor(tensor, name)
    kind = next((kind for kind, dtype in _FLOATS.items() if dtype == tensor.dtype), None)
    if kind is None:
        raise TypeError(f"{name}: expected a ternary matrix, float32, float16 or bfloat16, got {tensor.dtype}")
    if not 1 <= tensor.ndim <= _DIMENSIONS or not tensor.numel():
        raise ValueError(f"{name}: shape: expected 1 to {_DIMENSIONS} positive sizes, got {list(tensor.shape)}")
    return kind, tuple(tensor.shape), tensor.numel() * tensor.itemsize


def _contents(name: str, tensor: TernaryMatrix | PackedMatrix | torch.Tensor, ternary: str) -> np.ndarray:
    if isinstance(tensor, TernaryMatrix | PackedMatrix):
        try:
            matrix = tensor if isinstance(tensor, TernaryMatrix) else TernaryMatrix.from_packed(tensor)
            return encode(ternary, matrix).numpy()
        except ValueError as error:
            raise ValueError(f"{name}: {error}") from None
    return as_tensor(tensor, name).contiguous().reshape(-1).view(torch.uint8).numpy()


def _typed_value(key: str, value: object, kinds: Any) -> tuple[Any, Any, Any]:
    """(value, its type, its elements' type or None) for GGUFWriter.add_key_value."""
    if isinstance(value, list | tuple | np.ndarray):
        if len(value) == 0 or np.ndim(value) != 1:
            raise ValueError(f"metadata: {key}: expected a list of one or more values, got {value!r}")
        elements = value.tolist() if isinstance(value, np.ndarray) else list(value)
        found = {_kind(key, element, kinds) for element in (value if isinstance(value, np.ndarray) else elements)}
        return elements, kinds.ARRAY, _widest(key, found, kinds)
    kind = _kind(key, value, kinds)
    return (value.item() if isinstance(value, np.generic) else value), kind, None


def _kind(key: str, value: object, kinds: Any) -> Any:
    if isinstance(value, np.generic):
        number = next((kind for kind, dtype in _NUMBERS.items() if dtype == value.dtype and kind != _BOOL), None)
        if number is None and value.dtype != np.bool_:
            raise TypeError(f"metadata: {key}: expected a number that GGUF has, got {value.dtype}")
        return kinds.BOOL if number is None else kinds(number)
    if isinstance(value, bool):
        return kinds.BOOL
    if isinstance(value, int):
        ranges = ((kinds.UINT32, 0, 1 << 32), (kinds.INT32, -(1 << 31), 0), (kinds.INT64, -(1 << 63), 1 << 63))
        for kind, low, high in (*ranges, (kinds.UINT64, 0, 1 << 64)):
            if low <= value < high:
                return kind
        raise ValueError(f"metadata: {key}: expected an integer of 64 bits, got {value}")
    if isinstance(value, float):
        return kinds.FLOAT32
    if isinstance(value, str):
        return kinds.STRING
    raise TypeError(f"metadata: {key}: expected text, a bool, a number or a list of these, got {type(value).__name__}")


def _widest(key: str, found: set, kinds: Any) -> Any:
    """The one type of a list's elements; integers of several become int64."""
    if len(found) == 1:
        return found.pop()
    if found <= {kinds.UINT32, kinds.INT32, kinds.INT64}:
        return kinds.INT64
    raise TypeError(f"metadata: {key}: expected elements of one type, got {', '.join(sorted(k.name for k in found))}")
