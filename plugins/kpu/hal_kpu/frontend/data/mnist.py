"""MNIST, from files that are there or from its mirrors: checked by MD5, and never half a file under its final name."""

from __future__ import annotations

import hashlib
import os
import tempfile
import urllib.request
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from http.client import HTTPException
from pathlib import Path
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from hal_core.plugin_api import ContractError, HalError, Progress, cache_dir

from .idx import IdxError, read_idx

#: Where the files are asked for, in this order.
MIRRORS = (
    "https://ossci-datasets.s3.amazonaws.com/mnist/",
    "https://storage.googleapis.com/cvdf-datasets/mnist/",
    "http://yann.lecun.com/exdb/mnist/",
)
#: The data's folder; the project's cache where it is not set.
ROOT_VARIABLE = "HAL_KPU_DATA"
_TIMEOUT = 30.0  # s without a byte
_CHUNK = 1 << 16


class DatasetError(HalError, RuntimeError):
    """Data that is not here and cannot be had: says what to download and where to put it."""


class DataFile(NamedTuple):
    """One of the four files.

    Attributes:
        name: of the gzip file at a mirror. md5: of that. magic: of the IDX inside. shape: of its values.
    """

    name: str
    md5: str
    magic: int
    shape: tuple[int, ...]


#: (images, labels) by split.
FILES = {
    "train": (
        DataFile("train-images-idx3-ubyte.gz", "f68b3c2dcbeaaa9fbdd348bbdeb94873", 2051, (60000, 28, 28)),
        DataFile("train-labels-idx1-ubyte.gz", "d53e105ee54ea40749a09fcbcd1e9432", 2049, (60000,)),
    ),
    "test": (
        DataFile("t10k-images-idx3-ubyte.gz", "9fb629c4189551a2d022fa330f9573f3", 2051, (10000, 28, 28)),
        DataFile("t10k-labels-idx1-ubyte.gz", "ec29112dd5afa0611ce80d1b7f02629c", 2049, (10000,)),
    ),
}


def _silent(text: str, share: float) -> None:
    """No progress is shown."""


def load_mnist(
    split: str = "test",
    normalize: bool = True,
    flatten: bool = False,
    limit: int | None = None,
    *,
    root: str | Path | None = None,
    mirrors: Sequence[str] = MIRRORS,
    files: dict[str, tuple[DataFile, DataFile]] | None = None,
    progress: Progress = _silent,
) -> tuple[NDArray[np.generic], NDArray[np.int64]]:
    """Handwritten digits, 28 x 28.

    Args:
        split: "train" (60,000) or "test" (10,000). normalize: float32 from 0 to 1 instead of uint8 from 0 to 255.
        flatten: [n, 784] instead of [n, 1, 28, 28]. limit: the first so many; None for all.
        root: folder that holds the files, in itself or as torchvision's MNIST/raw, packed or not; what is missing is
            downloaded to MNIST/raw. None for HAL_KPU_DATA, or the project's cache. mirrors: URLs, tried in order.
        files: what is wanted of each split, for data that is laid out like MNIST; None for MNIST itself.
        progress: called with the URL that is downloaded and the fraction of it that has arrived, 0 to 1.

    Returns:
        (images, labels): float32 or uint8, and int64 [n].

    Raises:
        ContractError: an unknown split, or a negative limit. DatasetError: the files are not here, and no mirror gave
            them.
    """
    known = files or FILES
    if split not in known:
        raise ContractError(f"split {split!r} was given: use {' or '.join(map(repr, known))}")
    if limit is not None and (not isinstance(limit, int) or limit < 0):
        raise ContractError(f"limit {limit!r} was given: pass a whole number from 0 on, or None for all")
    folder = data_root(root)
    images, labels = (_values(file, folder, mirrors, progress)[:limit] for file in known[split])
    images = images.reshape(len(images), -1) if flatten else images[:, None]
    if normalize:
        images = images.astype(np.float32) / np.float32(255)
    return images, labels.astype(np.int64)


def data_root(root: str | Path | None = None) -> Path:
    """The folder of the data: the one given, HAL_KPU_DATA, or `datasets` in the project's cache."""
    return Path(root or os.environ.get(ROOT_VARIABLE) or cache_dir() / "datasets").expanduser()


def _values(file: DataFile, root: Path, mirrors: Sequence[str], progress: Progress) -> NDArray[np.generic]:
    """A file's values: from where it lies, else from the first mirror that gives it whole."""
    raw, refused = root / "MNIST" / "raw", []
    for folder in dict.fromkeys((raw, root)):
        for name in (file.name, file.name.removesuffix(".gz")):
            path = folder / name
            if not path.is_file():
                continue
            try:
                return _checked(file, path)
            except IdxError as error:
                refused.append(f"{error}; it was left aside as {_left_aside(path).name}")
    return _downloaded(file, raw, mirrors, refused, progress)


def _checked(file: DataFile, path: Path) -> NDArray[np.generic]:
    """The values of a file that is what it should be.

    Raises:
        IdxError: another MD5 (of a packed file), another magic number or another shape.
    """
    if (
        path.suffix == ".gz"
        and (found := hashlib.md5(path.read_bytes(), usedforsecurity=False).hexdigest()) != file.md5
    ):
        raise IdxError(f"{path}: MD5 {found}: {file.md5} is wanted")
    values = read_idx(path, magic=file.magic)
    if values.shape != file.shape:
        sizes, wanted = (" x ".join(map(str, shape)) for shape in (values.shape, file.shape))
        raise IdxError(f"{path}: {sizes} values: {wanted} are wanted")
    return values


def _left_aside(path: Path) -> Path:
    """Rename a file that failed its checks, so that it is not read again and nothing is lost."""
    aside = path.with_name(path.name + ".corrupt")
    os.replace(path, aside)
    return aside


def _downloaded(
    file: DataFile, folder: Path, mirrors: Sequence[str], refused: list[str], progress: Progress
) -> NDArray[np.generic]:
    """The values from the first mirror that gives the file with the right MD5; it then lies in `folder`."""
    target = folder / file.name
    try:
        if mirrors:
            folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise DatasetError(f"{folder} cannot be made ({error.strerror}): pass root= or set {ROOT_VARIABLE}") from None
    for mirror in mirrors:
        url = f"{mirror.rstrip('/')}/{file.name}"
        try:
            with _fetched(url, target, progress) as part:
                values = _checked(file, part)
                os.replace(part, target)
                return values
        except IdxError as error:
            refused.append(f"{url}: {error}")
        except (OSError, HTTPException, ValueError) as error:
            refused.append(f"{url}: {str(error) or type(error).__name__}")
    reasons = "; ".join(refused) or "no mirror was given"
    where = f"{mirrors[0].rstrip('/')}/" if mirrors else MIRRORS[0]
    raise DatasetError(
        f"MNIST's {file.name} is not in {folder}, and could not be downloaded ({reasons}): download {where}{file.name} "
        f"(MD5 {file.md5}) where there is a network and put it in {folder}, or pass root= a folder that has it"
    )


@contextmanager
def _fetched(url: str, target: Path, progress: Progress) -> Iterator[Path]:
    """Download to a temporary file beside the target, with its ending; gone afterwards, or left aside where it is
    wrong.

    Raises:
        OSError, HTTPException: no answer, an error, or fewer bytes than promised.
    """
    handle, name = tempfile.mkstemp(prefix=".", suffix=f"-{target.name}", dir=target.parent)
    part = Path(name)
    try:
        with os.fdopen(handle, "wb") as file, urllib.request.urlopen(url, timeout=_TIMEOUT) as answer:
            promised, done = int(answer.headers.get("Content-Length") or 0), 0
            while chunk := answer.read(_CHUNK):
                file.write(chunk)
                done += len(chunk)
                progress(url, min(done / promised, 1.0) if promised else 0.0)
        if promised and done != promised:
            raise OSError(f"{done:,} of {promised:,} bytes came")
        yield part
    except IdxError as error:
        aside = target.with_name(target.name + ".corrupt")
        os.replace(part, aside)
        raise IdxError(f"{str(error).replace(str(part), 'what came')}; it was left aside as {aside.name}") from None
    finally:
        part.unlink(missing_ok=True)
