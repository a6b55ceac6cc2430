"""JSON from files that nobody has checked: bounded size and depth, no duplicate keys, no NaN, one kind of error."""

import json
import os
from pathlib import Path

CONFIG_LIMIT = 16 << 20


def parse_json(path: str | os.PathLike, limit: int = CONFIG_LIMIT) -> dict:
    """The JSON object in a file of at most `limit` bytes. Raises FileNotFoundError, or ValueError naming the file."""
    path = Path(path)
    if not path.is_file():
        raise FileNotFoundError(f"{path}: not found")
    with open(path, "rb") as file:
        data = file.read(limit + 1)
    if len(data) > limit:
        raise ValueError(f"{path}: expected at most {limit} bytes of JSON, got {path.stat().st_size}")
    return parse_json_bytes(data, str(path))


def parse_json_bytes(data: bytes, where: str) -> dict:
    """The JSON object in `data`. Raises ValueError that begins with `where`."""

    def unique(pairs: list[tuple[str, object]]) -> dict:
        result: dict = {}
        for name, value in pairs:
            if name in result:
                raise ValueError(f"key {name!r} appears twice")
            result[name] = value
        return result

    def refuse(constant: str) -> None:
        raise ValueError(f"{constant} is not JSON")

    try:
        value = json.loads(data.decode("utf-8"), object_pairs_hook=unique, parse_constant=refuse)
    except RecursionError:
        raise ValueError(f"{where}: JSON nested too deeply") from None
    except ValueError as error:
        raise ValueError(f"{where}: not valid JSON: {error}") from None
    if not isinstance(value, dict):
        raise ValueError(f"{where}: expected a JSON object, got {type(value).__name__}")
    return value
