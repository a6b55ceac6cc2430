"""safetensors files: a reader that maps and trusts nothing, and a writer whose codes can be used where they lie.

    8 bytes   header length H, little endian
    H bytes   JSON: {"name": {"dtype", "shape", "data_offsets": [begin, end]}, ..., "__metadata__": {text: text}}
    the rest  the tensors, without holes; offsets count from here

The writer pads the header with spaces so that the tensors begin on a 64-byte boundary, puts the tensors whose size is
a multiple of 64 first (every matrix of codes is one: each starts on a 64-byte boundary), and the rest after them, the
wider dtypes first, so that every tensor is aligned to its own elements. Order and header depend on the tensors alone:
equal tensors make equal bytes.

The reader checks the header against the file's size before it touches a tensor: offsets in range, without overlap or
hole, and as long as dtype and shape say. Tensors are views of one private (copy-on-write) mapping of the file.
"""

import json
import math
import mmap
import os
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path

import torch

from .strict_json import parse_json, parse_json_bytes

ALIGNMENT = 64
HEADER_LIMIT = 25_000_000  # bytes; safetensors allows 100 MB, whose JSON could grow to gigabytes of Python objects
INDEX = "model.safetensors.index.json"

_MAP_NORESERVE = 0x4000  # Linux's; Python names it from 3.11 on

_DTYPES = {
    "BOOL": torch.bool,
    "U8": torch.uint8,
    "I8": torch.int8,
    "F8_E4M3": torch.float8_e4m3fn,
    "F8_E5M2": torch.float8_e5m2,
    "U16": torch.uint16,
    "I16": torch.int16,
    "F16": torch.float16,
    "BF16": torch.bfloat16,
    "U32": torch.uint32,
    "I32": torch.int32,
    "F32": torch.float32,
    "U64": torch.uint64,
    "I64": torch.int64,
    "F64": torch.float64,
    "C64": torch.complex64,
}
_NAMES = {dtype: name for name, dtype in _DTYPES.items()}


@dataclass(frozen=True)
class Entry:
    """One tensor of a header; begin and end count from the start of the file."""

    dtype: torch.dtype
    shape: tuple[int, ...]
    begin: int
    end: int


class SafetensorsFile:
    """A checked, mapped safetensors file: `entries` {name: Entry}, `metadata` {text: text}, tensor(name), drop(name).

    Raises FileNotFoundError, or ValueError naming the file, the tensor, what was expected and what was found.
    """

    def __init__(self, path: str | os.PathLike):
        self.path = Path(path)
        if not self.path.is_file():
            raise FileNotFoundError(f"{self.path}: not found")
        with open(self.path, "rb") as file:
            size = os.fstat(file.fileno()).st_size
            prefix = file.read(8)
            if len(prefix) < 8:
                raise ValueError(f"{self.path}: expected at least 8 bytes, got {size}")
            length = int.from_bytes(prefix, "little")
            if length > HEADER_LIMIT:
                raise ValueError(f"{self.path}: header length: expected at most {HEADER_LIMIT}, got {length}")
            if length > size - 8:
                raise ValueError(
                    f"{self.path}: header length: expected at most {size - 8} (the file's rest), got {length}"
                )
            header = parse_json_bytes(file.read(length), f"{self.path}: header")
            self.metadata = self._checked_metadata(header.pop("__metadata__", {}))
            self.entries = {name: self._checked_entry(name, value, 8 + length, size) for name, value in header.items()}
            self._check_cover(8 + length, size)
            # Private and writable, as torch wants its memory; not reserved, so that a file larger than memory maps.
            self._map = mmap.mmap(
                file.fileno(), size, mmap.MAP_PRIVATE | _MAP_NORESERVE, mmap.PROT_READ | mmap.PROT_WRITE
            )

    def tensor(self, name: str) -> torch.Tensor:
        """A view of the mapped file, or a copy where the file does not align the tensor to its elements."""
        entry = self.entries[name]
        if entry.begin == entry.end:
            return torch.empty(entry.shape, dtype=entry.dtype)
        if entry.begin % entry.dtype.itemsize:
            copied = bytearray(memoryview(self._map)[entry.begin : entry.end])
            return torch.frombuffer(copied, dtype=entry.dtype).view(entry.shape)
        count = (entry.end - entry.begin) // entry.dtype.itemsize
        return torch.frombuffer(self._map, dtype=entry.dtype, count=count, offset=entry.begin).view(entry.shape)

    def drop(self, name: str) -> None:
        """Gives the tensor's resident pages back; whatever was written to its views is forgotten."""
        entry = self.entries[name]
        begin = -(-entry.begin // mmap.PAGESIZE) * mmap.PAGESIZE
        end = entry.end // mmap.PAGESIZE * mmap.PAGESIZE
        if end > begin:
            self._map.madvise(mmap.MADV_DONTNEED, begin, end - begin)

    def _checked_metadata(self, value: object) -> dict[str, str]:
        if not (isinstance(value, dict) and all(isinstance(text, str) for text in value.values())):
            raise ValueError(f"{self.path}: __metadata__: expected an object of texts, got {_shown(value)}")
        return value

    def _checked_entry(self, name: str, value: object, start: int, size: int) -> Entry:
        where = f"{self.path}: {name}"
        if not (isinstance(value, dict) and value.keys() == {"dtype", "shape", "data_offsets"}):
            raise ValueError(f"{where}: expected an object of dtype, shape and data_offsets, got {_shown(value)}")
        dtype, shape, offsets = value["dtype"], value["shape"], value["data_offsets"]
        if not isinstance(dtype, str) or dtype not in _DTYPES:
            raise ValueError(f"{where}: dtype: expected one of {', '.join(_DTYPES)}, got {_shown(dtype)}")
        if not _is_sizes(shape) or len(shape) > 64:
            raise ValueError(f"{where}: shape: expected a list of sizes, got {_shown(shape)}")
        if not _is_sizes(offsets) or len(offsets) != 2 or not offsets[0] <= offsets[1] <= size - start:
            data = f"the {size - start} bytes of data"
            raise ValueError(f"{where}: data_offsets: expected [begin, end] within {data}, got {_shown(offsets)}")
        expected, stored = math.prod(shape) * _DTYPES[dtype].itemsize, offsets[1] - offsets[0]
        if stored != expected:
            what = f"{dtype} {_shown(shape)}"
            raise ValueError(f"{where}: data_offsets: expected {expected} bytes for {what}, got {stored}")
        return Entry(_DTYPES[dtype], tuple(shape), start + offsets[0], start + offsets[1])

    def _check_cover(self, start: int, size: int) -> None:
        position = start
        for name, entry in sorted(self.entries.items(), key=lambda item: (item[1].begin, item[1].end)):
            if entry.begin != position:
                fault = "overlaps the tensor before it" if entry.begin < position else "leaves a hole before it"
                raise ValueError(
                    f"{self.path}: {name}: data_offsets: expected to begin at {position - start}, "
                    f"got {entry.begin - start}: it {fault}"
                )
            position = entry.end
        if position != size:
            raise ValueError(f"{self.path}: size: expected {position} bytes by its header, got {size}")


class Weights(Mapping[str, torch.Tensor]):
    """The tensors of a checkpoint, one file or shards with an index, by name. weights[name] is a view of its file."""

    def __init__(self, folder: str | os.PathLike, single_names: tuple[str, ...] = ("model.safetensors",)):
        folder = Path(folder)
        single = next((folder / name for name in single_names if (folder / name).is_file()), None)
        if single is not None:
            opened = SafetensorsFile(single)
            self._home = dict.fromkeys(opened.entries, opened)
        elif (folder / INDEX).is_file():
            self._home = _shards(folder)
        else:
            raise FileNotFoundError(f"{folder}: expected {' or '.join(single_names)} or {INDEX}, found none of them")
        self.files = list(dict.fromkeys(self._home.values()))

    def __getitem__(self, name: str) -> torch.Tensor:
        return self._home[name].tensor(name)

    def __iter__(self) -> Iterator[str]:
        return iter(self._home)

    def __len__(self) -> int:
        return len(self._home)

    def __contains__(self, name: object) -> bool:
        return name in self._home

    def entry(self, name: str) -> Entry:
        return self._home[name].entries[name]

    def path(self, name: str) -> Path:
        """The file that holds the tensor."""
        return self._home[name].path

    def drop(self, name: str) -> None:
        self._home[name].drop(name)


def _shards(folder: Path) -> dict[str, SafetensorsFile]:
    path = folder / INDEX
    weight_map = parse_json(path, limit=HEADER_LIMIT).get("weight_map")
    if not isinstance(weight_map, dict) or not weight_map:
        raise ValueError(f"{path}: weight_map: expected a non-empty object, got {_shown(weight_map)}")
    opened: dict[str, SafetensorsFile] = {}
    home = {}
    for name, shard in weight_map.items():
        if not isinstance(shard, str) or not shard.endswith(".safetensors") or set(shard) & set("/\\\0"):
            raise ValueError(f"{path}: {name}: expected the name of a .safetensors file beside it, got {_shown(shard)}")
        if shard not in opened:
            if not (folder / shard).is_file():
                raise FileNotFoundError(f"{folder / shard}: not found, but {INDEX} says that it holds {name}")
            opened[shard] = SafetensorsFile(folder / shard)
        if name not in opened[shard].entries:
            raise ValueError(f"{folder / shard}: {name}: expected by {INDEX}, not found in the file")
        home[name] = opened[shard]
    return home


def serialized_size(tensors: Mapping[str, torch.Tensor]) -> int:
    """Bytes of data (without the header) that the tensors take in a file."""
    return sum(tensor.numel() * tensor.itemsize for tensor in tensors.values())


def serialize(tensors: Mapping[str, torch.Tensor], metadata: Mapping[str, str]) -> Callable[[], Iterator[memoryview]]:
    """A function that yields the bytes of the file, for safe_write; tensors are read only when it runs.

    Raises TypeError for a dtype that safetensors lacks, ValueError for a header longer than the limit.
    """
    names = sorted(tensors, key=lambda name: _order(name, tensors[name]))
    entries, position = {}, 0
    for name in names:
        tensor = tensors[name]
        if tensor.dtype not in _NAMES:
            raise TypeError(f"{name}: dtype: expected one that safetensors has, got {tensor.dtype}")
        end = position + tensor.numel() * tensor.itemsize
        entries[name] = {"dtype": _NAMES[tensor.dtype], "shape": list(tensor.shape), "data_offsets": [position, end]}
        position = end
    described = {"__metadata__": dict(sorted(metadata.items())), **entries}
    header = json.dumps(described, separators=(",", ":"), ensure_ascii=False).encode()
    header += b" " * (-(8 + len(header)) % ALIGNMENT)
    if len(header) > HEADER_LIMIT:
        raise ValueError(f"header: expected at most {HEADER_LIMIT} bytes, got {len(header)}: save with max_shard_size")

    def buffers() -> Iterator[memoryview]:
        yield memoryview(len(header).to_bytes(8, "little") + header)
        for name in names:
            tensor = tensors[name].detach().to("cpu").contiguous()
            if tensor.numel():
                yield memoryview(tensor.reshape(-1).view(torch.uint8).numpy())

    return buffers


def _order(name: str, tensor: torch.Tensor) -> tuple[bool, int, str]:
    whole_lines = tensor.numel() * tensor.itemsize % ALIGNMENT == 0
    return (not whole_lines, 0 if whole_lines else -tensor.itemsize, name)


def _is_sizes(value: object) -> bool:
    return isinstance(value, list) and all(type(size) is int and 0 <= size < 1 << 63 for size in value)


def _shown(value: object) -> str:
    text = repr(value)
    return text if len(text) <= 80 else text[:77] + "..."
