"""Transformers on hal: the Hugging Face bridge.

    import hal_nn
    hal_nn.register_huggingface()
    model = AutoModel.from_pretrained(path, attn_implementation="hal")

Importing this package imports neither torch nor transformers.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from hal_core import __version__ as __version__

if TYPE_CHECKING:
    from torch import nn

__all__ = ["register_huggingface", "set_device", "unregister_huggingface"]


def register_huggingface() -> None:
    """Make `attn_implementation="hal"` known to transformers. `import hal_nn.huggingface` does the same; twice is
    harmless.

    Raises:
        HalError: transformers is not installed, or is older than its attention interface.
    """
    from . import huggingface

    huggingface.register()


def unregister_huggingface() -> None:
    """Take back what `register_huggingface` did: transformers' own methods and tables are as they were."""
    from . import huggingface

    huggingface.unregister()


def set_device(model: nn.Module, device: str | None) -> nn.Module:
    """Send the attention of `model`, or of a part of it, to `device`; see `hal_nn.huggingface.set_device`."""
    from . import huggingface

    return huggingface.set_device(model, device)
