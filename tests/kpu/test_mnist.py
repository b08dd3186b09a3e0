"""MNIST's loader against mirrors on this machine: good, corrupt, cut, missing and offline; and files that are there
already.
"""

from __future__ import annotations

import gzip
import hashlib
import http.server
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hal_kpu.frontend.data.datasets import MNIST
from hal_kpu.frontend.data.idx import IdxError, read_idx, write_idx
from hal_kpu.frontend.data.mnist import DataFile, DatasetError, load_mnist

from hal_core import ContractError

_COUNT = 30


@pytest.fixture
def images(seed: int) -> np.ndarray:
    return np.random.default_rng(seed).integers(0, 256, (_COUNT, 28, 28), dtype=np.uint8)


@pytest.fixture
def labels(seed: int) -> np.ndarray:
    return np.random.default_rng(seed + 1).integers(0, 10, _COUNT, dtype=np.uint8)


@pytest.fixture
def mirror(tmp_path: Path, images: np.ndarray, labels: np.ndarray) -> Path:
    """A folder with two files laid out like MNIST's test split."""
    folder = tmp_path / "mirror"
    folder.mkdir()
    write_idx(folder / "t10k-images-idx3-ubyte.gz", images)
    write_idx(folder / "t10k-labels-idx1-ubyte.gz", labels)
    return folder


@pytest.fixture
def files(mirror: Path) -> dict[str, tuple[DataFile, DataFile]]:
    def of(name: str, magic: int, shape: tuple[int, ...]) -> DataFile:
        return DataFile(name, hashlib.md5((mirror / name).read_bytes()).hexdigest(), magic, shape)

    pair = of("t10k-images-idx3-ubyte.gz", 2051, (_COUNT, 28, 28)), of("t10k-labels-idx1-ubyte.gz", 2049, (_COUNT,))
    return {"test": pair}


class Served:
    """Folders served from localhost, with what was asked for."""

    def __init__(self) -> None:
        self.asked: list[str] = []
        self.servers: list[http.server.ThreadingHTTPServer] = []

    def __call__(self, folder: Path, *, cut: bool = False) -> str:
        asked = self.asked

        class Handler(http.server.SimpleHTTPRequestHandler):
            def __init__(self, *given: Any) -> None:
                super().__init__(*given, directory=str(folder))

            def do_GET(self) -> None:
                asked.append(f"{folder.name}{self.path}")
                if not cut:
                    return super().do_GET()
                data = (folder / self.path[1:]).read_bytes()
                self.send_response(200)
                self.send_header("Content-Length", str(len(data)))
                self.end_headers()
                self.wfile.write(data[: len(data) // 2])  # and the connection closes

            def log_message(self, *given: Any) -> None:
                pass

        server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        threading.Thread(target=server.serve_forever, args=(0.02,), daemon=True).start()
        self.servers.append(server)
        return f"http://127.0.0.1:{server.server_port}/"


@pytest.fixture
def serve() -> Iterator[Served]:
    served = Served()
    yield served
    for server in served.servers:
        server.shutdown()
        server.server_close()


def test_files_come_from_a_mirror_once_and_are_what_was_written(tmp_path, mirror, files, images, labels, serve):
    root, url = tmp_path / "data", [serve(mirror)]
    got, names = load_mnist("test", False, root=root, mirrors=url, files=files)
    assert np.array_equal(got, images[:, None])
    assert np.array_equal(names, labels)
    assert names.dtype == np.int64
    load_mnist("test", root=root, mirrors=url, files=files)
    assert len(serve.asked) == 2  # the second call found them
    assert sorted(p.name for p in (root / "MNIST" / "raw").iterdir()) == sorted(f.name for f in files["test"])


def test_normalize_flatten_and_limit(tmp_path, mirror, files, images):
    found, names = load_mnist("test", flatten=True, limit=7, root=mirror, mirrors=(), files=files)
    assert found.shape == (7, 784)
    assert len(names) == 7
    assert found.dtype == np.float32
    assert np.array_equal(found, images[:7].reshape(7, 784).astype(np.float32) / np.float32(255))
    assert load_mnist("test", limit=0, root=mirror, mirrors=(), files=files)[0].shape == (0, 1, 28, 28)


def test_a_corrupt_mirror_is_left_for_the_next_one(tmp_path, mirror, files, images, labels, serve):
    bad, root = tmp_path / "bad", tmp_path / "data"
    bad.mkdir()
    write_idx(bad / files["test"][0].name, 255 - images)  # whole, and not what it should be
    write_idx(bad / files["test"][1].name, labels[::-1])
    got, _ = load_mnist("test", False, root=root, mirrors=[serve(bad), serve(mirror)], files=files)
    assert np.array_equal(got, images[:, None])
    left = sorted(p.name for p in (root / "MNIST" / "raw").iterdir())
    assert left == sorted([name for f in files["test"] for name in (f.name, f.name + ".corrupt")])


def test_a_connection_that_breaks_leaves_no_file(tmp_path, mirror, files, serve):
    root = tmp_path / "data"
    with pytest.raises(DatasetError, match=r"bytes came"):
        load_mnist("test", root=root, mirrors=[serve(mirror, cut=True)], files=files)
    assert not list((root / "MNIST" / "raw").iterdir())
    load_mnist("test", root=root, mirrors=[serve(mirror)], files=files)


def test_a_missing_file_names_every_mirror_and_what_to_do(tmp_path, files, serve):
    empty = tmp_path / "empty"
    empty.mkdir()
    first, offline = serve(empty), "http://127.0.0.1:9/"
    with pytest.raises(DatasetError) as caught:
        load_mnist("test", root=tmp_path / "data", mirrors=[first, offline], files=files)
    text, wanted = str(caught.value), files["test"][0]
    assert "404" in text
    assert "refused" in text
    assert f"download {first}{wanted.name}" in text
    assert wanted.md5 in text
    assert f"put it in {tmp_path / 'data' / 'MNIST' / 'raw'}" in text


def test_without_mirrors_nothing_is_made(tmp_path, files):
    with pytest.raises(DatasetError, match="no mirror was given"):
        load_mnist("test", root=tmp_path / "data", mirrors=(), files=files)
    assert not (tmp_path / "data").exists()


@pytest.mark.parametrize("packed", [True, False])
@pytest.mark.parametrize("place", ["", "MNIST/raw"])
def test_files_that_are_there_are_used(tmp_path, mirror, files, images, packed, place):
    folder = tmp_path / "mine" / place
    folder.mkdir(parents=True)
    for file in files["test"]:
        data = (mirror / file.name).read_bytes()
        name = file.name if packed else file.name.removesuffix(".gz")
        (folder / name).write_bytes(data if packed else gzip.decompress(data))
    got, _ = load_mnist("test", False, root=tmp_path / "mine", mirrors=(), files=files)
    assert np.array_equal(got, images[:, None])


@pytest.mark.parametrize("packed", [True, False])
def test_a_cut_file_is_left_aside_and_downloaded_again(tmp_path, mirror, files, images, serve, packed):
    folder, wanted = tmp_path / "MNIST" / "raw", files["test"][0]
    folder.mkdir(parents=True)
    data = (mirror / wanted.name).read_bytes()
    name = wanted.name if packed else wanted.name.removesuffix(".gz")
    (folder / name).write_bytes((data if packed else gzip.decompress(data))[:-100])
    got, _ = load_mnist("test", False, root=tmp_path, mirrors=[serve(mirror)], files=files)
    assert np.array_equal(got, images[:, None])
    assert (folder / f"{name}.corrupt").is_file()


def test_another_shape_is_not_mnist(tmp_path, mirror, files, images):
    write_idx(mirror / "t10k-images-idx3-ubyte", images[:5])
    (mirror / "t10k-images-idx3-ubyte.gz").unlink()
    with pytest.raises(DatasetError, match="5 x 28 x 28 values: 30 x 28 x 28 are wanted"):
        load_mnist("test", root=mirror, mirrors=(), files=files)


@pytest.mark.parametrize("given", [{"split": "validation"}, {"limit": -1}, {"limit": 2.5}])
def test_bad_arguments_are_refused_before_anything_is_asked_for(tmp_path, given):
    with pytest.raises(ContractError):
        load_mnist(**given, root=tmp_path, mirrors=["http://127.0.0.1:9/"])
    assert not list(tmp_path.iterdir())


def test_the_data_set_is_a_sequence_that_a_data_loader_takes(mirror, files, images, labels, monkeypatch):
    from torch.utils.data import DataLoader

    monkeypatch.setattr("hal_kpu.frontend.data.mnist.FILES", files)
    data = MNIST("test", root=mirror, mirrors=())
    batches = list(DataLoader(data, batch_size=8))
    assert len(data) == _COUNT
    assert sum(len(names) for _, names in batches) == _COUNT
    assert batches[0][0].shape == (8, 1, 28, 28)
    assert batches[1][1].tolist() == labels[8:16].tolist()


@pytest.mark.parametrize("kind", ["u1", "i1", "i2", "i4", "f4", "f8"])
@pytest.mark.parametrize("suffix", ["", ".gz"])
def test_idx_gives_back_what_was_written(tmp_path, seed, kind, suffix):
    values = (np.random.default_rng(seed).standard_normal((3, 4, 5)) * 50).astype(kind)
    path = tmp_path / f"values{suffix}"
    write_idx(path, values)
    got = read_idx(path)
    assert np.array_equal(got, values)
    assert got.dtype == values.dtype


def test_idx_is_big_endian_with_the_documented_head(tmp_path):
    write_idx(tmp_path / "x", np.arange(6, dtype=np.int32).reshape(2, 3))
    data = (tmp_path / "x").read_bytes()
    assert data[:16] == bytes([0, 0, 0x0C, 2, 0, 0, 0, 2, 0, 0, 0, 3]) + bytes(4)
    assert data[-4:] == bytes([0, 0, 0, 5])


@pytest.mark.parametrize(
    ("data", "reason"),
    [
        (b"", "0 bytes"),
        (b"\1\0\x08\1", "magic number"),
        (b"\0\0\x07\1\0\0\0\1\0", "magic number"),
        (b"\0\0\x08\0", "magic number"),
        (b"\0\0\x08\3\0\0\0\1", "need a head of 16"),
        (b"\0\0\x08\1\0\0\0\4abc", "need 12"),
        (b"\0\0\x08\1\0\0\0\4abcde", "cut or has a tail"),
    ],
)
def test_what_is_not_idx_is_refused_with_the_place(tmp_path, data, reason):
    (tmp_path / "x").write_bytes(data)
    with pytest.raises(IdxError, match=reason):
        read_idx(tmp_path / "x")


def test_a_gzip_file_that_is_cut_or_none_at_all_is_refused(tmp_path):
    write_idx(tmp_path / "x.gz", np.arange(100, dtype=np.uint8))
    (tmp_path / "y.gz").write_bytes((tmp_path / "x.gz").read_bytes()[:-10])
    (tmp_path / "z.gz").write_bytes(b"no gzip")
    for name in ("y.gz", "z.gz"):
        with pytest.raises(IdxError, match="not a whole gzip file"):
            read_idx(tmp_path / name)


def test_another_magic_number_than_wanted_is_refused(tmp_path):
    write_idx(tmp_path / "x", np.zeros(3, np.uint8))
    with pytest.raises(IdxError, match="2049: 2051 is wanted"):
        read_idx(tmp_path / "x", magic=2051)


def test_idx_has_no_such_type(tmp_path):
    with pytest.raises(ContractError, match="int64"):
        write_idx(tmp_path / "x", np.zeros(3, np.int64))
