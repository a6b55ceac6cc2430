"""A save that stops anywhere, by an error or by SIGKILL, leaves the old folder or the new one."""

import errno
import fcntl
import hashlib
import json
import os
import signal

import pytest

from lowbit.checkpoint import safe_write
from lowbit.checkpoint.safe_write import (
    COMMIT,
    MANIFEST,
    finish_interrupted,
    read_manifest,
    replacing,
    verify,
    write_file,
    write_files,
)

OLD = {
    "config.json": b"old config",
    "model-00001-of-00002.safetensors": b"old a",
    "model-00002-of-00002.safetensors": b"old b",
}
NEW = {"config.json": b"new config", "model.safetensors": b"new weights" * 1000}
STALE = [name for name in OLD if name not in NEW]

# Every call that changes the disk; a save is cut off before each of them in turn.
STEPS = ("replace", "unlink", "fsync")


def contents(folder):
    return {
        path.name: path.read_bytes()
        for path in folder.iterdir()
        if path.name != MANIFEST and not path.name.endswith(".partial")
    }


def stop_before(step, how):
    """Patches os so that disk-changing call number `step` calls how() instead."""
    count = [0]

    def stopping(real):
        def call(*arguments, **keywords):
            count[0] += 1
            if count[0] == step:
                how()
            return real(*arguments, **keywords)

        return call

    return {name: stopping(getattr(os, name)) for name in STEPS}, count


def save_and_die(folder, step):
    """Saves NEW in a child process that is killed before disk-changing call `step`; False once it ran to the end."""
    child = os.fork()
    if child == 0:
        try:
            patched, _ = stop_before(step, lambda: os.kill(os.getpid(), signal.SIGKILL))
            for name, call in patched.items():
                setattr(os, name, call)
            write_files(folder, NEW, STALE)
        finally:
            os._exit(0)
    _, status = os.waitpid(child, 0)
    return os.WIFSIGNALED(status)


def test_kill_at_every_step_leaves_old_or_new(tmp_path):
    seen, step = [], 0
    while True:
        step += 1
        folder = tmp_path / str(step)
        write_files(folder, OLD)
        killed = save_and_die(folder, step)
        finish_interrupted(folder)
        found = contents(folder)
        assert found in (OLD, NEW), f"after a kill before step {step}: {sorted(found)}"
        assert sorted(verify(folder)) == sorted(found)
        seen.append(found == NEW)
        if not killed:
            break
    assert step > 10
    assert seen[0] is False and seen[-1] is True
    assert seen == sorted(seen), "once a save has happened, later steps do not lose it"


def test_kill_while_finishing_can_be_finished_again(tmp_path):
    write_files(tmp_path, OLD)
    step = next(s for s in range(1, 50) if commit_exists_after(tmp_path, s))
    for again in range(1, 30):
        child = os.fork()
        if child == 0:
            try:
                patched, _ = stop_before(again, lambda: os.kill(os.getpid(), signal.SIGKILL))
                for name, call in patched.items():
                    setattr(os, name, call)
                finish_interrupted(tmp_path)
            finally:
                os._exit(0)
        _, status = os.waitpid(child, 0)
        if not os.WIFSIGNALED(status):
            break
    assert step > 1 and contents(tmp_path) == NEW
    assert not (tmp_path / COMMIT).exists()
    verify(tmp_path)


def commit_exists_after(folder, step):
    save_and_die(folder, step)
    return (folder / COMMIT).exists()


@pytest.mark.parametrize("error", [OSError(errno.ENOSPC, "No space left on device"), KeyboardInterrupt()])
def test_error_before_the_commit_leaves_no_trace(tmp_path, monkeypatch, error):
    write_files(tmp_path, OLD)
    before = {path.name: path.read_bytes() for path in tmp_path.iterdir()}

    def fail():
        raise error

    for step in range(1, 5):
        with monkeypatch.context() as patch:
            patched, _ = stop_before(step, fail)
            for name, call in patched.items():
                patch.setattr(os, name, call)
            with pytest.raises(type(error)):
                write_files(tmp_path, NEW, STALE)
        assert {path.name: path.read_bytes() for path in tmp_path.iterdir()} == before


def test_error_in_the_content_leaves_no_trace(tmp_path):
    write_files(tmp_path, OLD)
    before = sorted(os.listdir(tmp_path))

    def broken():
        yield b"half"
        raise RuntimeError("the model went away")

    with pytest.raises(RuntimeError):
        write_files(tmp_path, {**NEW, "model.safetensors": broken}, STALE)
    assert sorted(os.listdir(tmp_path)) == before


def test_manifest_lists_size_and_digest_and_other_files_stay(tmp_path):
    (tmp_path / "README.md").write_bytes(b"mine")
    write_files(tmp_path, {"a": b"12345", "b": lambda: iter([b"6", memoryview(b"78")])})
    assert read_manifest(tmp_path) == {
        "a": {"size": 5, "sha256": hashlib.sha256(b"12345").hexdigest()},
        "b": {"size": 3, "sha256": hashlib.sha256(b"678").hexdigest()},
    }
    assert (tmp_path / "README.md").read_bytes() == b"mine"
    assert sorted(os.listdir(tmp_path)) == sorted(["README.md", "a", "b", MANIFEST])


def test_debris_of_a_killed_save_is_removed_by_the_next(tmp_path):
    write_files(tmp_path, OLD)
    assert save_and_die(tmp_path, 3)
    assert any(name.endswith(".partial") for name in os.listdir(tmp_path))
    write_files(tmp_path, NEW, STALE)
    assert sorted(os.listdir(tmp_path)) == sorted([*NEW, MANIFEST])


def test_verify_names_what_differs(tmp_path):
    with pytest.raises(FileNotFoundError, match=MANIFEST):
        verify(tmp_path)
    write_files(tmp_path, {"a": b"12345", "b": b"678"})
    (tmp_path / "a").write_bytes(b"1234")
    with pytest.raises(ValueError, match=r"a: size: expected 5, got 4"):
        verify(tmp_path)
    (tmp_path / "a").write_bytes(b"12346")
    with pytest.raises(ValueError, match=r"a: sha256: expected 5994"):
        verify(tmp_path)
    (tmp_path / "a").unlink()
    with pytest.raises(FileNotFoundError, match="a"):
        verify(tmp_path)


def test_two_saves_at_once_are_refused(tmp_path):
    holder = os.open(tmp_path, os.O_RDONLY)
    try:
        fcntl.flock(holder, fcntl.LOCK_EX)
        with pytest.raises(BlockingIOError, match="another process"):
            write_files(tmp_path, NEW)
    finally:
        os.close(holder)
    write_files(tmp_path, NEW)


@pytest.mark.parametrize("name", ["../up", "a/b", "", ".", "..", "a\0b", "a\\b"])
def test_names_that_leave_the_folder_are_refused(tmp_path, name):
    with pytest.raises(ValueError, match="plain file name"):
        write_files(tmp_path, {name: b""})
    with pytest.raises(ValueError, match="plain file name"):
        write_files(tmp_path, NEW, stale=[name])
    assert os.listdir(tmp_path) == []


def test_names_of_the_save_itself_and_folders_are_refused(tmp_path):
    with pytest.raises(ValueError, match="written by the save itself"):
        write_files(tmp_path, {MANIFEST: b""})
    (tmp_path / "config.json").mkdir()
    with pytest.raises(IsADirectoryError, match=r"config.json"):
        write_files(tmp_path, NEW)
    assert os.listdir(tmp_path) == ["config.json"]


@pytest.mark.parametrize(
    ("record", "message"),
    [
        ("{", "not valid JSON"),
        ('{"id": "x", "rename": [], "delete": []}', "id: expected 16 hexadecimal"),
        ('{"id": "0123456789abcdef", "rename": 1, "delete": []}', "expected lists"),
        ('{"id": "0123456789abcdef", "rename": ["../x"], "delete": []}', "plain file name"),
        ('{"id": "0123456789abcdef", "rename": [], "delete": ["/etc/passwd"]}', "plain file name"),
        ('{"id": "0123456789abcdef", "rename": ["gone"], "delete": []}', "found neither"),
    ],
)
def test_a_damaged_commit_record_is_an_error(tmp_path, record, message):
    (tmp_path / COMMIT).write_text(record)
    with pytest.raises(ValueError, match=message):
        finish_interrupted(tmp_path)
    assert os.listdir(tmp_path) == [COMMIT]


@pytest.mark.parametrize(
    "text", ["[]", '{"files": 1}', '{"files": {"a": 1}}', '{"files": {"../a": {}}}', '{"files": {}, "files": {}}']
)
def test_a_damaged_manifest_is_an_error(tmp_path, text):
    (tmp_path / MANIFEST).write_text(text)
    with pytest.raises(ValueError, match=MANIFEST):
        read_manifest(tmp_path)


def test_one_file_is_replaced_whole(tmp_path, monkeypatch):
    path = tmp_path / "report.json"
    write_file(path, b"old")
    write_file(path, lambda: iter([b"n", b"ew"]))
    assert path.read_bytes() == b"new"

    def full(*_):
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(safe_write.os, "replace", full)
    with pytest.raises(OSError, match="No space"):
        write_file(path, json.dumps({}).encode())
    assert path.read_bytes() == b"new" and os.listdir(tmp_path) == ["report.json"]


def test_a_file_that_another_writer_makes_replaces_the_old_one_when_it_is_complete(tmp_path):
    path = tmp_path / "a"
    path.write_bytes(b"old")
    with pytest.raises(RuntimeError, match="half way"), replacing(path) as partial:
        partial.write_bytes(b"half")
        raise RuntimeError("half way")
    assert {entry.name: entry.read_bytes() for entry in tmp_path.iterdir()} == {"a": b"old"}
    with replacing(path) as partial:
        partial.write_bytes(b"new")
        assert path.read_bytes() == b"old"
    assert {entry.name: entry.read_bytes() for entry in tmp_path.iterdir()} == {"a": b"new"}
