"""`hal precision`: which formats a model's weights could be stored in, before anything is changed."""

from __future__ import annotations

import argparse
import json
from pathlib import Path
from typing import Any

from hal_core import ContractError
from hal_core.plugin_api import CommandResult, Table

_ABOUT = "plan in which formats a model's weights are stored within a budget, and what that costs; changes nothing"
_BATCHES, _ROWS = 4, 4


def add_parser(subparsers: Any) -> None:
    """Add `precision` to the subparsers of `hal`."""
    parser = subparsers.add_parser("precision", help=_ABOUT, description=_ABOUT)
    parser.add_argument("model", metavar="FOLDER", help="with config.json and *.safetensors, as transformers saves it")
    parser.add_argument(
        "--text",
        metavar="FILE",
        type=Path,
        action="append",
        default=[],
        help="calibration data, for the folder's tokenizer (bytes where it has none and 256 tokens); repeatable",
    )
    parser.add_argument("--strategy", help="fisher with --text, else entropy; or another of AllocationStrategy")
    parser.add_argument(
        "--save", metavar="SHARE", type=float, default=0.4, help="of the model's bytes (default: 0.4)", dest="share"
    )
    parser.add_argument("--max-rise", metavar="NATS", type=float, help="of the loss: the smallest model within it")
    parser.add_argument("--formats", metavar="LIST", help="int8,int4,...; default: all that the device has")
    parser.add_argument("--length", metavar="N", type=int, default=128, help="tokens of a sample (default: 128)")
    parser.add_argument("--top", metavar="N", type=int, default=10, help="layers in the table (default: 10)")
    parser.add_argument("--out", metavar="FILE", type=Path, help="write the plan, for PrecisionPlan.from_json")
    parser.set_defaults(run=run)


def run(options: argparse.Namespace) -> CommandResult:
    """Plan, and show bytes, formats and layers.

    Raises:
        ContractError: a folder, text, format, strategy or budget that cannot be; nothing was written then.
    """
    from .adaptive import analyze_precision_opportunities, plan_precision
    from .config import AllocationStrategy, PrecisionConfig, QuantizationMode
    from .formats import PrecisionFormat

    strategy = _one_of(AllocationStrategy, options.strategy or ("fisher" if options.text else "entropy"), "--strategy")
    names = [each.strip() for each in (options.formats or "").split(",") if each.strip()]
    formats = tuple(_one_of(PrecisionFormat, name, "--formats") for name in names)
    if strategy.needs_data and not options.text:
        raise ContractError(f"--strategy {strategy.value} reads calibration data: give --text FILE. Nothing was done.")
    if options.length < 2:
        raise ContractError(f"--length is {options.length}: give 2 or more.")
    config = PrecisionConfig(
        allocation_strategy=strategy,
        quantization_mode=QuantizationMode.WEIGHT_ONLY,
        target_memory_reduction=options.share,
        max_loss_increase=options.max_rise,
        compensate=False,  # a plan's text has no moments, so that it is applied by rounding to nearest
        formats=formats or None,
    )
    model = _load(Path(options.model))
    layers: list[dict[str, Any]] = []
    if options.text:
        found = analyze_precision_opportunities(model, _samples(options, model), config=config)
        plan, layers = found["plan"], found["layers"]
    else:
        plan = plan_precision(model, config)
    sizes, weights = plan.histogram(by="bytes"), plan.histogram()
    formats_table = Table(
        "Planned formats",
        ["format", "weights", "bytes"],
        [[name, f"{weights[name]:,}", f"{size:,}"] for name, size in sizes.items()],
        [
            f"{plan.memory_reduction:.1%} less: {plan.stored_bytes:,} bytes instead of {plan.original_bytes:,}. "
            f"Strategy {strategy.value}; {plan.average_bits:.2f} bits a packed weight, scales included; "
            f"gap to the best plan {plan.gap:.2g}."
        ],
    )
    tables = [formats_table]
    if layers:
        worst = sorted(layers, key=lambda row: -row["rise"])[: max(options.top, 0)]
        rows = [[row["name"], f"{row['bits']:.2f}", f"{row['entropy']:.2f}", f"{row['rise']:.3g}"] for row in worst]
        note = "Rise: predicted, of the loss for each output position, were the whole layer stored in about 4 bits."
        tables.append(Table("Most sensitive layers", ["layer", "bits planned", "entropy, bits", "rise"], rows, [note]))
    text = [f"{len(plan.left)} layers stay as they are: {'; '.join(f'{n} {why}' for n, why in plan.left.items())}."]
    text = text if plan.left else []
    data = {**json.loads(plan.to_json()), "memory_reduction": plan.memory_reduction, "sensitivity": layers}
    data |= {"average_bits": plan.average_bits, "bytes": sizes, "strategy": strategy.value}
    if options.out is not None:
        part = options.out.with_name(f"{options.out.name}.part")
        part.write_text(plan.to_json(), encoding="utf-8")
        part.replace(options.out)
        text.append(f"plan: {options.out}")
    return CommandResult(data, tables, text)


def _one_of(kind: Any, name: str, option: str) -> Any:
    known = [each.value for each in kind]
    if name not in known:
        raise ContractError(f"{option} has {name!r}: give {', '.join(known)}.")
    return kind(name)


def _load(folder: Path) -> Any:
    """The model of a folder. Nothing is fetched, nothing unpickled, no code of the folder runs."""
    if not (folder / "config.json").is_file() or not list(folder.glob("*.safetensors")):
        raise ContractError(
            f"{folder} has no model: give a folder with config.json and *.safetensors, as save_pretrained writes it."
        )
    try:
        import transformers
    except ImportError:
        raise ContractError("hal precision reads models with transformers: pip install transformers.") from None
    quiet: Any = transformers.utils.logging
    quiet.disable_progress_bar()
    try:
        config = transformers.AutoConfig.from_pretrained(folder, local_files_only=True, trust_remote_code=False)
        name = next(iter(getattr(config, "architectures", None) or ()), "AutoModel")
        model: Any = getattr(transformers, name, transformers.AutoModel)
        return model.from_pretrained(folder, local_files_only=True, use_safetensors=True).eval()
    except (OSError, ValueError, KeyError) as error:
        raise ContractError(f"{folder} cannot be read as a model: {str(error).splitlines()[0]}") from error


def _samples(options: argparse.Namespace, model: Any) -> list[Any]:
    """Batches of token rows from the texts, int64 [rows, length] each, evenly spread over them."""
    import torch

    try:
        text = b"\n".join(path.read_bytes() for path in options.text)
    except OSError as error:
        raise ContractError(f"--text {error.filename} cannot be read: {error.strerror}.") from error
    if any(Path(options.model).glob("tokenizer*")):
        import transformers

        tokenizer: Any = transformers.AutoTokenizer.from_pretrained(options.model, local_files_only=True)
        tokens = torch.tensor(tokenizer(text.decode("utf-8", "replace"), verbose=False)["input_ids"])
    elif model.config.vocab_size == 256:
        tokens = torch.frombuffer(bytearray(text or b"\0"), dtype=torch.uint8).long()
    else:
        raise ContractError(f"{options.model} has no tokenizer and {model.config.vocab_size} tokens, not 256 bytes.")
    count = min(_BATCHES * _ROWS, len(tokens) // options.length)
    if count < 2:
        raise ContractError(
            f"--text has {len(tokens)} tokens: calibration takes at least {2 * options.length}, two samples of "
            f"--length {options.length}."
        )
    starts = torch.linspace(0, len(tokens) - options.length, count).long().tolist()
    return list(torch.stack([tokens[at : at + options.length] for at in starts]).split(_ROWS))
