"""Files of caches: whole or not at all, and never an error."""

from __future__ import annotations

from pathlib import Path

from hal_compute.cache import keep


def test_a_file_is_kept_whole_and_replaced_whole(tmp_path: Path) -> None:
    path = tmp_path / "new" / "kernels.bin"
    keep(path, b"old and long")
    keep(path, b"new")
    assert path.read_bytes() == b"new"
    assert list(path.parent.iterdir()) == [path]


def test_a_folder_that_cannot_be_written_costs_the_file_alone(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("in the way")
    keep(tmp_path / "file" / "kernels.bin", b"data")
    assert (tmp_path / "file").read_text() == "in the way"
