"""Images and sound from folders, as batches of a model's inputs."""

from __future__ import annotations

import hashlib
import wave
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from hal_core import HalError

from .batches import Batch, Tokens
from .texts import TextFile

IMAGES = (".png", ".jpg", ".jpeg", ".bmp", ".gif", ".webp", ".tif", ".tiff")
SOUNDS = (".wav",)


def read(folders: Sequence[Path], endings: Sequence[str], what: str) -> list[TextFile]:
    """The files of each folder, as one `TextFile` whose texts are their paths, in the order of their names.

    Args:
        endings: of the files that count. what: what they are, as "images".

    Raises:
        HalError: no such folder, none of these files in it, or fewer than two in all.
    """
    found = []
    for folder in folders:
        if not folder.is_dir():
            raise HalError(f"{folder} is not a folder: give one that holds {what} ({', '.join(endings)})")
        files = sorted(file for file in folder.iterdir() if file.suffix.lower() in endings)
        if not files:
            raise HalError(f"the folder {folder} has no {what}: put files there that end with {', '.join(endings)}")
        digest = hashlib.sha256()
        for file in files:
            digest.update(file.read_bytes())
        found.append(TextFile(str(folder), tuple(map(str, files)), digest.hexdigest()))
    if sum(len(one.texts) for one in found) < 2:
        raise HalError(f"{found[0].name} has one file: give two or more {what}")
    return found


def batches(files: Sequence[TextFile], model: Any, batch_size: int) -> Tokens:
    """What the model's own processor makes of the files, in batches of neighbours of equal shape, without padding.

    Raises:
        HalError: a file that cannot be read, or a processor that does not take it.
    """
    one = _image if model.task.modality == "image" else _sound
    made, first = [], 0
    for group, file in enumerate(files):
        features = [one(Path(path), model) for path in file.texts]
        by_shape: dict[tuple[int, ...], list[int]] = {}
        for index, value in enumerate(features):
            by_shape.setdefault(tuple(value.shape), []).append(index)
        for members in by_shape.values():
            for start in range(0, len(members), batch_size):
                chosen = members[start : start + batch_size]
                made.append(_batch(group, first, chosen, [features[i] for i in chosen], model))
        first += len(file.texts)
    return Tokens(tuple(made), (1,) * first, (0,) * len(files))


def _batch(group: int, first: int, chosen: Sequence[int], features: list[Tensor], model: Any) -> Batch:
    inputs = {model.task.main: torch.stack(features)}
    if model.task.kind == "seq2seq":  # one decision for a clip: what follows the start
        inputs["decoder_input_ids"] = torch.full((len(chosen), 1), model.start)
    none = torch.zeros(len(chosen), 1, dtype=torch.long)
    return Batch(group, tuple(first + i for i in chosen), none, torch.ones_like(none), inputs)


def _image(path: Path, model: Any) -> Tensor:
    try:
        from PIL import Image
    except ImportError as error:
        raise HalError(
            "hal compare reads images with Pillow, which is not installed: pip install 'hal-compare[images]'"
        ) from error
    try:
        image = Image.open(path).convert("RGB")
    except (OSError, ValueError, SyntaxError) as error:
        raise HalError(f"{path} is not an image that Pillow reads ({error}): replace or remove it") from error
    return _processed(path, model, lambda: model.processor([image], return_tensors="pt"))


def _sound(path: Path, model: Any) -> Tensor:
    samples, rate = read_wav(path)
    wanted = int(model.processor.sampling_rate)
    if rate != wanted:
        length = max(round(len(samples) * wanted / rate), 1)
        resampled = torch.nn.functional.interpolate(samples.view(1, 1, -1), length, mode="linear", align_corners=False)
        samples = resampled.view(-1)
    return _processed(
        path, model, lambda: model.processor([samples.numpy()], sampling_rate=wanted, return_tensors="pt")
    )


def _processed(path: Path, model: Any, run: Callable[[], Any]) -> Tensor:
    try:
        made = run()[model.task.main]
    except Exception as error:  # processors raise whatever their libraries raise
        what = " ".join(str(error).split())[:160]
        raise HalError(
            f"{type(model.processor).__name__} does not take {path} ({what}): replace or remove it"
        ) from error
    value: Tensor = torch.as_tensor(made)[0]
    return value


def read_wav(path: Path) -> tuple[Tensor, int]:
    """(samples, rate) of a wav file: float32 between -1 and 1, the mean of its channels; samples a second.

    Raises:
        HalError: it cannot be read, is empty, or holds something else than PCM of 8, 16, 24 or 32 bits.
    """
    try:
        with wave.open(str(path)) as sound:
            width, channels, rate = sound.getsampwidth(), sound.getnchannels(), sound.getframerate()
            raw = sound.readframes(sound.getnframes())
    except (OSError, EOFError, wave.Error) as error:
        raise HalError(
            f"{path} is not a wav file that can be read ({error}): give PCM of 8, 16, 24 or 32 bits"
        ) from error
    whole = raw[: len(raw) - len(raw) % (width * channels)]
    if not whole or width not in (1, 2, 3, 4):
        raise HalError(f"{path} holds no sound, or samples of {8 * width} bits: give PCM of 8, 16, 24 or 32 bits")
    values = torch.frombuffer(bytearray(whole), dtype=torch.uint8).view(-1, width).long()
    if width == 1:
        samples = values[:, 0] - 128  # 8 bits have no sign
    else:
        samples = sum(values[:, place] << (8 * place) for place in range(width))  # type: ignore[assignment]
        samples = torch.where(samples >= 1 << (8 * width - 1), samples - (1 << 8 * width), samples)
    return (samples.view(-1, channels).double().mean(1) / (1 << (8 * width - 1))).float(), rate
