"""Writing a folder of files so that a crash at any moment leaves either the old folder or the new one.

One file is replaced atomically by temporary file -> fsync -> rename -> fsync of the folder. Several files are not:
renames happen one after another, and a crash between two of them would leave a configuration beside the weights of
another model. So a save of several files is a small redo log:

    1. every file is written as  <name>.<id>.partial  and fsynced             crash: the old folder, plus debris
    2. lowbit-commit.json, the list of renames to do, appears atomically      <- the save has happened
    3. the partials are renamed, stale files deleted, the folder fsynced      crash: the next opening finishes this
    4. lowbit-manifest.json (size and SHA-256 of every file) is renamed last
    5. lowbit-commit.json is deleted

finish_interrupted(folder) does steps 3 to 5 for a save that stopped there; loading a checkpoint calls it first. Every
one of these steps can be repeated, so a crash while finishing is harmless too.
"""

import contextlib
import errno
import fcntl
import hashlib
import json
import os
import re
import secrets
from collections.abc import Callable, Iterable, Iterator, Mapping
from pathlib import Path

from .strict_json import parse_json

MANIFEST = "lowbit-manifest.json"
COMMIT = "lowbit-commit.json"

_PARTIAL = re.compile(r".+\.[0-9a-f]{16}\.partial")
_MANIFEST_LIMIT = 16 << 20

Buffer = bytes | bytearray | memoryview
Content = Buffer | Callable[[], Iterable[Buffer]]


def write_file(path: str | os.PathLike, content: Content) -> None:
    """Replaces one file atomically. `content` is bytes, or a function that returns an iterable of buffers."""
    path = Path(path)
    partial = _partial_name(path.parent, path.name, secrets.token_hex(8))
    with _removing_on_error([partial]):
        _write_durably(partial, content)
        os.replace(partial, path)
    _sync_folder(path.parent)


@contextlib.contextmanager
def replacing(path: str | os.PathLike) -> Iterator[Path]:
    """Yields the name of a file for another writer to make, which atomically replaces `path` when the block ends.

    The folder is made where there is none. An error inside the block leaves `path` as it was.
    """
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    partial = _partial_name(path.parent, path.name, secrets.token_hex(8))
    with _removing_on_error([partial]):
        yield partial
        with open(partial, "rb") as file:
            os.fsync(file.fileno())
        os.replace(partial, path)
    _sync_folder(path.parent)


def write_files(folder: str | os.PathLike, files: Mapping[str, Content], stale: Iterable[str] = ()) -> None:
    """Replaces all of `files` (name -> content) in `folder` as one step, and deletes the `stale` names.

    Files that are neither in `files` nor in `stale` are left alone. Afterwards the manifest lists `files`.
    An error while writing (a full disk) leaves the folder as it was. Raises ValueError for a name that is not a plain
    file name, BlockingIOError when another process is saving to the same folder, OSError from the system.
    """
    folder = Path(folder)
    for name in [*files, *stale]:
        _check_name(folder, name)
    if MANIFEST in files or COMMIT in files:
        raise ValueError(f"{folder}: {MANIFEST} and {COMMIT} are written by the save itself")
    folder.mkdir(parents=True, exist_ok=True)
    for name in [*files, *stale, MANIFEST, COMMIT]:
        if (folder / name).is_dir():
            raise IsADirectoryError(errno.EISDIR, "expected a file or nothing, found a folder", str(folder / name))
    with _folder_lock(folder, wait=False):
        _finish_locked(folder)
        _remove_debris(folder)
        save_id = secrets.token_hex(8)
        names = [*files, MANIFEST]
        partials = [_partial_name(folder, name, save_id) for name in names]
        entries = {}
        with _removing_on_error([*partials, _partial_name(folder, COMMIT, save_id)]):
            for name, partial in zip(names[:-1], partials[:-1], strict=True):
                size, digest = _write_durably(partial, files[name])
                entries[name] = {"sha256": digest, "size": size}
            _write_durably(partials[-1], _json_bytes({"files": entries}))
            commit = {"id": save_id, "rename": names, "delete": sorted(set(stale) - set(files))}
            commit_partial = _partial_name(folder, COMMIT, save_id)
            _write_durably(commit_partial, _json_bytes(commit))
            _sync_folder(folder)
            os.replace(commit_partial, folder / COMMIT)
        _sync_folder(folder)
        _finish_locked(folder)


def finish_interrupted(folder: str | os.PathLike) -> bool:
    """Completes a save that was cut off after its commit; True if there was one. Waits for a running save.

    Raises ValueError if the commit record is damaged, PermissionError if the folder cannot be written.
    """
    folder = Path(folder)
    if not (folder / COMMIT).exists():
        return False
    with _folder_lock(folder, wait=True):
        return _finish_locked(folder)


def read_manifest(folder: str | os.PathLike) -> dict[str, dict] | None:
    """{name: {"size": bytes, "sha256": hex}} as the last save left it, or None where there is no manifest."""
    path = Path(folder) / MANIFEST
    if not path.exists():
        return None
    files = parse_json(path, limit=_MANIFEST_LIMIT).get("files")
    if not isinstance(files, dict):
        raise ValueError(f"{path}: files: expected an object, got {type(files).__name__}")
    for name, entry in files.items():
        _check_name(path, name)
        if not (isinstance(entry, dict) and type(entry.get("size")) is int and isinstance(entry.get("sha256"), str)):
            raise ValueError(f"{path}: {name}: expected size (an integer) and sha256 (text), got {entry!r}")
    return files


def verify(folder: str | os.PathLike) -> list[str]:
    """Reads every file that the manifest lists and compares size and SHA-256. Returns the names checked.

    Raises FileNotFoundError without a manifest or a listed file, ValueError for a difference.
    """
    folder = Path(folder)
    files = read_manifest(folder)
    if files is None:
        raise FileNotFoundError(f"{folder / MANIFEST}: not found, so there is nothing to verify against")
    for name, entry in files.items():
        size = (folder / name).stat().st_size
        if size != entry["size"]:
            raise ValueError(f"{folder / name}: size: expected {entry['size']}, got {size}")
        with open(folder / name, "rb") as file:
            digest = (
                hashlib.file_digest(file, "sha256").hexdigest() if hasattr(hashlib, "file_digest") else _digest(file)
            )
        if digest != entry["sha256"]:
            raise ValueError(f"{folder / name}: sha256: expected {entry['sha256']}, got {digest}")
    return list(files)


def _digest(file) -> str:
    """hashlib.file_digest for Python 3.10."""
    digest = hashlib.sha256()
    while block := file.read(1 << 20):
        digest.update(block)
    return digest.hexdigest()


def _finish_locked(folder: Path) -> bool:
    path = folder / COMMIT
    if not path.exists():
        return False
    record = parse_json(path, limit=_MANIFEST_LIMIT)
    save_id, renames, deletes = record.get("id"), record.get("rename"), record.get("delete")
    if not (isinstance(save_id, str) and re.fullmatch("[0-9a-f]{16}", save_id)):
        raise ValueError(f"{path}: id: expected 16 hexadecimal digits, got {save_id!r}")
    if not (isinstance(renames, list) and isinstance(deletes, list)):
        raise ValueError(f"{path}: rename and delete: expected lists")
    for name in [*renames, *deletes]:
        _check_name(path, name)
    for name in renames:
        partial = _partial_name(folder, name, save_id)
        if partial.exists():
            os.replace(partial, folder / name)
        elif not (folder / name).exists():
            raise ValueError(f"{path}: {name}: expected it or {partial.name} beside it, found neither")
    _sync_folder(folder)
    for name in deletes:
        with contextlib.suppress(FileNotFoundError):
            os.unlink(folder / name)
    _sync_folder(folder)
    os.unlink(path)
    _sync_folder(folder)
    return True


def _remove_debris(folder: Path) -> None:
    """Partials of saves that never committed; the caller holds the lock, so none of them is being written."""
    for entry in os.listdir(folder):
        if _PARTIAL.fullmatch(entry):
            os.unlink(folder / entry)


def _check_name(where: Path, name: object) -> None:
    if not isinstance(name, str) or name in ("", ".", "..") or "/" in name or "\\" in name or "\0" in name:
        raise ValueError(f"{where}: expected a plain file name inside the folder, got {name!r}")


def _partial_name(folder: Path, name: str, save_id: str) -> Path:
    return folder / f"{name}.{save_id}.partial"


def _json_bytes(value: object) -> bytes:
    return (json.dumps(value, indent=2, sort_keys=True) + "\n").encode()


def _write_durably(path: Path, content: Content) -> tuple[int, str]:
    """Size and SHA-256 of what now lies on the disk under `path`."""
    digest, size = hashlib.sha256(), 0
    with open(path, "xb") as file:
        for buffer in content() if callable(content) else (content,):
            digest.update(buffer)
            size += file.write(buffer)
        file.flush()
        os.fsync(file.fileno())
    return size, digest.hexdigest()


def _sync_folder(folder: Path) -> None:
    descriptor = os.open(folder, os.O_RDONLY | os.O_DIRECTORY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


@contextlib.contextmanager
def _removing_on_error(partials: list[Path]) -> Iterator[None]:
    try:
        yield
    except BaseException:
        for partial in partials:
            with contextlib.suppress(OSError):
                os.unlink(partial)
        raise


@contextlib.contextmanager
def _folder_lock(folder: Path, *, wait: bool) -> Iterator[None]:
    """An advisory lock on the folder itself, so nothing is left behind. File systems without it do without."""
    descriptor = os.open(folder, os.O_RDONLY | os.O_DIRECTORY)
    try:
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX | (0 if wait else fcntl.LOCK_NB))
        except BlockingIOError:
            raise BlockingIOError(errno.EWOULDBLOCK, "another process is saving to this folder", str(folder)) from None
        except OSError as error:
            if error.errno not in (errno.ENOLCK, errno.ENOTSUP, errno.EINVAL, errno.EBADF):
                raise
        yield
    finally:
        os.close(descriptor)
