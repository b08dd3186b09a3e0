"""Write a copy of a model with float16 weights, half the size, for machines that the wheel is too big to be carried to.

    python examples/demo/half_precision_copy.py minilm out/minilm-fp16
    hal compare out/minilm-fp16 --text examples/demo/texts

`hal compare` upcasts such weights for the run and for the float64 reference alike, and says so in its table.
"""

from __future__ import annotations

import argparse
import shutil
import sys
from pathlib import Path

import torch
from hal_compare.models import find
from safetensors import safe_open
from safetensors.torch import save_file

from hal_core import HalError

#: Beside the weights: configuration, tokenizer and pooling.
KEPT = (
    "config.json",
    "tokenizer.json",
    "tokenizer_config.json",
    "special_tokens_map.json",
    "vocab.txt",
    "1_Pooling/config.json",
)


def copy(model: str, target: Path) -> int:
    """Write the copy and return its size in bytes. Weights that float16 cannot hold are refused."""
    source = find(model)
    target.mkdir(parents=True, exist_ok=True)
    for file in sorted(source.glob("*.safetensors")):
        weights = {}
        with safe_open(file, framework="pt") as stored:
            for name in stored.keys():  # noqa: SIM118 - not a mapping
                tensor = stored.get_tensor(name)
                weights[name] = tensor.half().contiguous() if tensor.is_floating_point() else tensor
                if not torch.isfinite(weights[name]).all():
                    raise HalError(f"{name} in {file.name} has values beyond float16's range: carry the original")
        save_file(weights, target / file.name, metadata={"format": "pt"})
    for name in KEPT:
        if (source / name).is_file():
            (target / name).parent.mkdir(exist_ok=True)
            shutil.copyfile(source / name, target / name)
    return sum(file.stat().st_size for file in target.rglob("*") if file.is_file())


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("model", help="a folder, an installed wheel, or 'minilm'")
    parser.add_argument("target", type=Path, help="the folder to write")
    arguments = parser.parse_args()
    try:
        size = copy(arguments.model, arguments.target)
    except HalError as error:
        print(f"{type(error).__name__}: {error}", file=sys.stderr)
        return 2
    print(f"{arguments.target}: {size / 2**20:.1f} MiB")
    return 0


if __name__ == "__main__":
    sys.exit(main())
