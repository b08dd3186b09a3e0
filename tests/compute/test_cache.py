"""Files of caches: private, whole or not at all, and never an error."""

from __future__ import annotations

import os
import threading
from pathlib import Path

import pytest
from hal_compute import cache
from hal_compute.cache import keep, private_folder, read

pytestmark = pytest.mark.usefixtures("own_cache")


def test_a_file_is_kept_whole_and_replaced_whole(tmp_path: Path) -> None:
    path = tmp_path / "kernels.bin"
    keep(path, b"old and long")
    keep(path, b"new")
    assert read(path) == b"new"
    assert list(tmp_path.iterdir()) == [path]


def test_a_folder_that_cannot_be_written_costs_the_file_alone(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("in the way")
    keep(tmp_path / "file" / "kernels.bin", b"data")
    assert (tmp_path / "file").read_text() == "in the way"


@pytest.mark.parametrize(
    "damage", [lambda data: data[:-1], lambda data: data[:40] + b"x" + data[41:], lambda data: b""]
)
def test_a_damaged_file_is_not_read(tmp_path: Path, damage: object) -> None:
    path = tmp_path / "kernels.bin"
    keep(path, b"a program of some length")
    path.write_bytes(damage(path.read_bytes()))  # type: ignore[operator]
    assert read(path) is None


def test_a_folder_of_programs_is_the_users_alone() -> None:
    folder = private_folder("opencl")
    assert folder is not None
    assert folder.stat().st_mode & 0o777 == 0o700
    assert folder.parent.stat().st_mode & 0o022 == 0


@pytest.mark.parametrize("mode", [0o777, 0o770, 0o707])
@pytest.mark.parametrize("which", ["root", "folder"])
def test_a_folder_that_others_may_write_to_is_not_used_and_named_once(which: str, mode: int) -> None:
    folder = private_folder("opencl")
    assert folder is not None
    unsafe = folder if which == "folder" else folder.parent
    unsafe.chmod(mode)
    with pytest.warns(RuntimeWarning, match=f"{unsafe} can be written to by others .*chmod 700"):
        assert private_folder("opencl") is None
    assert private_folder("opencl") is None  # without a second warning, which would be an error here
    unsafe.chmod(0o700)


def test_a_folder_of_another_user_is_not_used(monkeypatch: pytest.MonkeyPatch) -> None:
    folder = private_folder("opencl")
    assert folder is not None
    owner = folder.stat().st_uid
    monkeypatch.setattr(os, "geteuid", lambda: owner + 1)
    if owner == 0:
        os.chown(folder, 12345, -1)
    with pytest.warns(RuntimeWarning, match="belongs to user"):
        assert private_folder("opencl") is None


def test_a_fifo_at_a_files_place_is_not_waited_for(tmp_path: Path) -> None:
    path, found = tmp_path / "kernels.bin", list[object]()
    os.mkfifo(path)
    thread = threading.Thread(target=lambda: found.append(read(path)), daemon=True)
    thread.start()
    thread.join(20.0)
    assert found == [None]


def test_a_link_is_neither_followed_nor_written_through(tmp_path: Path) -> None:
    target, path = tmp_path / "elsewhere", tmp_path / "kernels.bin"
    keep(target, b"somebody's")
    path.symlink_to(target)
    assert read(path) is None
    keep(path, b"ours")
    assert read(target) == b"somebody's"
    assert read(path) == b"ours"


def test_a_file_that_others_may_write_to_is_not_read(tmp_path: Path) -> None:
    path = tmp_path / "kernels.bin"
    keep(path, b"a program")
    path.chmod(0o666)
    assert read(path) is None


def test_nothing_is_cached_without_a_folder(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    monkeypatch.setattr(cache, "cache_dir", lambda: tmp_path / "file")
    assert private_folder("opencl") is None
    assert read(None) is None
    keep(None, b"data")
