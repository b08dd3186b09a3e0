"""What adaptive precision keeps of a model's quality at equal stored bytes: the byte-level model and MiniLM.

    python benchmarks/precision.py [--record] [--models byte,minilm] [--seeds 3] [--state out/precision_adaptive.json]

With --state, every measured loss is kept in that file, and a run that was stopped goes on from it.

The loss is measured on text that was not used for calibration: cross entropy in nats a byte of the byte-level model,
and for MiniLM the mean squared distance of normalised sentence embeddings from the unrounded model's. Closed is
(uniform - variant) / (uniform - full), where uniform stores every block in one integer format, rounded to nearest, and
every variant takes at most uniform's bytes. Seeds draw the calibration data and the sampled labels.

--ways measures other ways of allocation alone, rounding to nearest: smaller blocks, larger groups, factors that are
learned layer by layer, and the second moment of a layer's inputs in place of single samples.

If torchao is installed, its int4 weight-only quantisation (groups of 32) is measured too, and adaptive precision at the
bits that it has with bfloat16 scales, 4.5.
"""

from __future__ import annotations

import importlib.util
import json
import random
import re
import sys
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import attrs
import byte_model
import record
import torch
from hal_precision import (
    AllocationStrategy,
    PrecisionConfig,
    PrecisionFormat,
    QuantizationMode,
    create_ultra_precision_module,
    plan_precision,
)
from torch import Tensor, nn

BARS = {4: 0.40, 3: 0.30}
FORMATS = tuple(PrecisionFormat(f"int{bits}") for bits in (8, 6, 5, 4, 3, 2))
CONFIG = PrecisionConfig(quantization_mode=QuantizationMode.WEIGHT_ONLY, formats=FORMATS)
TOKENS = 16
TORCHAO_BITS = 4.5


class Case(NamedTuple):
    """model; loss(model); calibration(seed), batches; readout of the model's output, or None for its logits."""

    model: nn.Module
    loss: Callable[[Any], float]
    calibration: Callable[[int], list[Any]]
    readout: Callable[[Any], Tensor] | None


def byte_case() -> Case:
    held = byte_model.held_out(7, 8, 1024)

    def calibration(seed: int) -> list[Tensor]:
        rng, text = random.Random(seed), byte_model.sources().training
        rows = [byte_model.excerpt(rng, text, 512) for _ in range(16)]
        return list(byte_model._stacked(rows).split(8))

    return Case(byte_model.load(), lambda model: byte_model.loss(model, held), calibration, None)


def minilm_case() -> Case:
    from hal_compare import models

    found = models.load("minilm", "float32")

    def batches(text: bytes, seed: int, count: int) -> list[Any]:
        """Sentences of docstrings and comments, cut to one length, so that nothing is padded."""
        lines = re.findall(r"^[ #]*([A-Z][A-Za-z ,.'()-]{70,})$", text.decode("utf-8", "replace"), re.MULTILINE)
        random.Random(seed).shuffle(lines)
        tokens = [
            found.tokenizer(line, truncation=True, max_length=TOKENS)["input_ids"] for line in lines[: 20 * count]
        ]
        whole = [row for row in tokens if len(row) == TOKENS][:count]
        rows = torch.tensor(whole)
        return [{"input_ids": each, "attention_mask": torch.ones_like(each)} for each in rows.split(32)]

    held = batches(byte_model.sources().held_out, 1, 96)

    def readout(output: Any) -> Tensor:
        return nn.functional.normalize(output.last_hidden_state.mean(1), dim=-1)

    @torch.no_grad()
    def embedded(model: Any) -> Tensor:
        return torch.cat([readout(model(**batch)) for batch in held])

    clean = embedded(found.network)
    return Case(
        found.network,
        lambda model: float((embedded(model) - clean).square().sum(-1).mean()),
        lambda seed: batches(byte_model.sources().training, seed, 96),
        readout,
    )


CASES = {"byte": byte_case, "minilm": minilm_case}


def torchao_loss(case: Case) -> float:
    """The loss under torchao's int4 weight-only quantisation."""
    import copy

    from torchao.quantization import IntxWeightOnlyConfig, PerGroup, quantize_

    model = copy.deepcopy(case.model)
    tied = getattr(model, "lm_head", None)
    quantize_(
        model,
        IntxWeightOnlyConfig(weight_dtype=torch.int4, granularity=PerGroup(32), scale_dtype=torch.bfloat16),
        filter_fn=lambda module, _: type(module) is nn.Linear and module is not tied,
    )
    return case.loss(model)


class Losses:
    """Losses by (model, seed, bits, variant), as JSON in a file where one is given."""

    def __init__(self, path: Path | None) -> None:
        self.path = path
        self.known: dict[str, float] = {}
        if path is not None and path.exists():
            self.known = json.loads(path.read_text(encoding="utf-8"))

    def __call__(self, *key: object, measure: Callable[[], float]) -> float:
        name = " ".join(map(str, key))
        if name not in self.known:
            self.known[name] = measure()
            if self.path is not None:
                self.path.parent.mkdir(parents=True, exist_ok=True)
                part = self.path.with_suffix(".part")
                part.write_text(json.dumps(self.known, indent=1), encoding="utf-8")
                part.replace(self.path)
        print(f"{name} {self.known[name]:.6f}", flush=True)
        return self.known[name]


def packed_loss(case: Case, plan: Any) -> float:
    return case.loss(create_ultra_precision_module(case.model, plan=plan))


def calibrated_losses(
    name: str, case: Case, seed: int, kind: str, sizes: dict[int, int], ao_bytes: int, losses_of: Losses
) -> dict[tuple[int, str], float]:
    """Losses by the keys of `_plans`, calibrated only where one of them is not known yet."""
    plans: dict[tuple[int, str], Any] = {}

    def measure(key: tuple[int, str]) -> float:
        if not plans:
            base = attrs.evolve(CONFIG, compensate=kind == "compensated", seed=seed)
            plans.update(_plans(case, base, case.calibration(seed), sizes, ao_bytes))
            print(f"largest gap of a plan to the optimum: {max(plan.gap for plan in plans.values()):.2g}")
        return packed_loss(case, plans[key])

    return {key: losses_of(name, seed, *key, measure=partial(measure, key)) for key in _keys(kind)}


#: Other ways of allocation: what changes in the config, and whether costs come from the inputs' second moment.
WAYS: dict[str, tuple[dict[str, Any], bool]] = {
    "Fisher, blocks of 16 rows": ({}, False),
    "blocks of 4 rows": ({"block_rows": 4}, False),
    "blocks of 1 row": ({"block_rows": 1}, False),
    "groups of 64, blocks of 4 rows": ({"group_size": 64, "block_rows": 4}, False),
    "second moment of the inputs, blocks of 4 rows": ({"block_rows": 4}, True),
    "learned factors, blocks of 4 rows": (
        {"block_rows": 4, "allocation_strategy": AllocationStrategy.LEARNED},
        False,
    ),
}


def moment_costs(layers: list[Any], measured: Any, config: PrecisionConfig) -> Tensor:
    """[blocks, formats]: half of d M d^T for a row's rounding error d and the inputs' second moment M, weighted by the
    row's share of the squared gradients: the Fisher information if inputs and gradients were independent.
    """
    from hal_precision import sensitivity

    found = []
    for layer in layers:
        seen, columns = measured.layers[layer.name], []
        for form in FORMATS:
            error = sensitivity.rounding_error(layer.module.weight, form, config.group_size)
            columns.append(((error @ seen.moment) * error).sum(1) * seen.gradient / seen.gradient.sum())
        found.append(sensitivity.by_block(torch.stack(columns, 1), config.block_rows) * 0.5 / measured.positions)
    return torch.cat(found)


def measure_ways(name: str, case: Case, seeds: int, sizes: dict[int, int], losses_of: Losses) -> dict[Any, list[float]]:
    """Losses of every way, by (bits, way), over the seeds."""
    from hal_precision import sensitivity
    from hal_precision.adaptive import choose

    def plans(way: str, seed: int) -> dict[int, Any]:
        change, moment = WAYS[way]
        config = attrs.evolve(
            CONFIG,
            **{"compensate": False, "allocation_strategy": AllocationStrategy.FISHER, "seed": seed, **change},
        )
        data = case.calibration(seed)
        layers, left = sensitivity.packable(case.model, config)
        if moment:  # `compensate` asks for moments; what it is measured on is rounded to nearest all the same
            measured = sensitivity.calibrate(
                case.model, layers, FORMATS, data, attrs.evolve(config, compensate=True), case.readout
            )
            costs = moment_costs(layers, measured, config)
        else:
            measured = sensitivity.calibrate(case.model, layers, FORMATS, data, config, case.readout)
            factors = None
            if config.allocation_strategy is AllocationStrategy.LEARNED:
                factors = sensitivity.learned_factors(case.model, layers, FORMATS, measured, data, config, case.readout)
            costs = sensitivity.costs(layers, FORMATS, config, measured, factors)
        table = costs.double().cpu().numpy()
        found = {
            bits: choose(case.model, layers, left, FORMATS, table, config, size, measured)
            for bits, size in sizes.items()
        }
        return {bits: attrs.evolve(plan, moments={}) for bits, plan in found.items()}

    found: dict[Any, list[float]] = {}
    for seed in range(seeds):
        for way in WAYS:
            made: dict[int, Any] = {}

            def measure(bits: int, way: str = way, seed: int = seed, made: dict[int, Any] = made) -> float:
                made.update(made or plans(way, seed))
                return packed_loss(case, made[bits])

            for bits in sizes:
                loss = losses_of(name, "way", seed, bits, way, measure=partial(measure, bits))
                found.setdefault((bits, way), []).append(loss)
    return found


def ways(given: Any) -> None:
    """Measure and record the ways."""
    losses_of, rows = Losses(given.state), []
    for name in given.models.split(","):
        case = CASES[name]()
        full, sizes, worst = losses_of(name, "full", measure=partial(case.loss, case.model)), {}, {}
        for bits in BARS:
            only = attrs.evolve(
                CONFIG,
                formats=(PrecisionFormat(f"int{bits}"),),
                allocation_strategy=AllocationStrategy.UNIFORM,
                target_memory_reduction=0.01,
            )
            plan = plan_precision(case.model, only)
            sizes[bits] = plan.stored_bytes
            worst[bits] = losses_of(name, bits, "uniform, to nearest", measure=partial(packed_loss, case, plan))
        for (bits, way), losses in sorted(
            measure_ways(name, case, given.seeds, sizes, losses_of).items(), key=lambda item: -item[0][0]
        ):
            shares = [(worst[bits] - loss) / (worst[bits] - full) for loss in losses]
            held = "held" if min(shares) >= BARS[bits] else "missed"
            rows.append([name, str(bits), way, " ".join(f"{share:.0%}" for share in shares), f"{BARS[bits]:.0%}", held])
    title = "Other ways of allocation alone"
    notes = ["Closed of the gap between uniform and full precision at equal stored bytes, rounded to nearest, by seed."]
    record.publish(given, "precision", title, ["model", "bits", "way", "closed", "bar", ""], rows, notes, title)


def main() -> int:
    options = record.parser(__doc__)
    options.add_argument("--state", type=Path, help="a file that keeps the losses of a run that may be stopped")
    options.add_argument("--models", default="byte,minilm")
    options.add_argument("--seeds", type=int, default=3)
    options.add_argument("--ways", action="store_true", help="other ways of allocation alone, and nothing else")
    given = options.parse_args()
    if given.ways:
        ways(given)
        return 0
    losses_of, rows, missed = Losses(given.state), [], False
    for name in given.models.split(","):
        case = CASES[name]()
        full = losses_of(name, "full", measure=partial(case.loss, case.model))
        found: dict[tuple[int, str], list[float]] = {}
        uniform: dict[int, tuple[float, int, float]] = {}

        for bits in BARS:
            config = attrs.evolve(
                CONFIG,
                formats=(PrecisionFormat(f"int{bits}"),),
                allocation_strategy=AllocationStrategy.UNIFORM,
                target_memory_reduction=0.01,
            )
            plan = plan_precision(case.model, config)
            loss = losses_of(name, bits, "uniform, to nearest", measure=partial(packed_loss, case, plan))
            uniform[bits] = loss, plan.stored_bytes, plan.average_bits
            config = attrs.evolve(CONFIG, allocation_strategy=AllocationStrategy.ENTROPY_BASED)
            plan = plan_precision(case.model, config, budget_bytes=plan.stored_bytes)
            found[bits, "entropy alone"] = [
                losses_of(name, bits, "entropy alone", measure=partial(packed_loss, case, plan))
            ]
        ao = None
        if importlib.util.find_spec("torchao") is not None:
            ao = losses_of(name, TORCHAO_BITS, "torchao int4", measure=partial(torchao_loss, case))
        weights = sum(layer.rows * layer.columns for layer in plan.layers)
        ao_bytes = int(plan.stored_bytes - plan.average_bits / 8 * weights + TORCHAO_BITS / 8 * weights)
        at_ao: dict[str, list[float]] = {"compensated": [], "to nearest": []}
        sizes = {bits: size for bits, (_, size, _) in uniform.items()}
        for seed in range(given.seeds):
            for kind in at_ao:
                for key, loss in calibrated_losses(name, case, seed, kind, sizes, ao_bytes, losses_of).items():
                    (found.setdefault(key, []) if key[0] else at_ao[kind]).append(loss)
        for (bits, variant), losses in sorted(found.items(), key=lambda item: -item[0][0]):
            worst, _, average = uniform[bits]
            shares = [(worst - loss) / (worst - full) for loss in losses]
            # Two verdicts: allocation with compensated rounding, and allocation alone.
            barred = variant in ("Fisher, compensated", "Fisher, to nearest")
            missed |= barred and min(shares) < BARS[bits]
            verdict = ("held" if min(shares) >= BARS[bits] else "missed") if barred else ""
            alone = "" if variant != "Fisher, to nearest" else " by allocation alone"
            rows.append(
                [
                    name,
                    f"{bits} ({average:.2f} stored)",
                    variant,
                    f"{full:.5f}",
                    f"{worst:.5f}",
                    " ".join(f"{loss:.5f}" for loss in losses),
                    " ".join(f"{share:.0%}" for share in shares),
                    f"{BARS[bits]:.0%}" if barred else "",
                    verdict + (alone or " with compensated rounding" if barred else ""),
                ]
            )
        for kind, losses in at_ao.items() if ao is not None else ():
            better = max(losses) <= ao
            missed |= not better and kind == "compensated"
            rows.append(
                [
                    name,
                    f"{TORCHAO_BITS:g}",
                    f"ours ({kind}), torchao int4 in the column uniform",
                    f"{full:.5f}",
                    f"{ao:.5f}",
                    " ".join(f"{loss:.5f}" for loss in losses),
                    "",
                    "better",
                    "held" if better else "missed",
                ]
            )
    columns = ["model", "bits", "variant", "full", "uniform", "variant's loss", "closed, by seed", "bar", ""]
    notes = [
        "Loss: nats a byte on sources that the model was not trained on; of minilm the mean squared distance of "
        "embeddings. Closed: (uniform - variant) / (uniform - full) at equal stored bytes, uniform rounded to nearest. "
        "'Fisher, to nearest' is allocation alone; 'uniform, compensated' is one format with compensated rounding: "
        "what it closes comes from the rounding and not from the allocation. "
        f"The byte-level model was {byte_model.described()}",
    ]
    record.publish(
        given,
        "precision",
        "Adaptive precision at equal stored bytes",
        columns,
        rows,
        notes,
        section="Adaptive precision",
    )
    return int(missed)


STRATEGIES = {
    "Fisher": AllocationStrategy.FISHER,
    "entropy x Fisher": AllocationStrategy.ENTROPY_FISHER,
    "gradient": AllocationStrategy.GRADIENT,
}


def _keys(kind: str) -> list[tuple[int, str]]:
    """The keys of `_plans`, the ones with a bar first."""
    found = [(bits, f"Fisher, {kind}") for bits in BARS]
    if kind == "compensated":
        found += [(bits, "uniform, compensated") for bits in BARS]
    found.append((0, f"at torchao's bits, {kind}"))
    return found + [(bits, f"{name}, {kind}") for name in STRATEGIES if name != "Fisher" for bits in BARS]


def _plans(
    case: Case, base: PrecisionConfig, data: list[Any], sizes: dict[int, int], ao_bytes: int
) -> dict[tuple[int, str], Any]:
    """Plans of one calibration by (bits, variant); bits 0 for torchao's bytes."""
    from hal_precision import sensitivity
    from hal_precision.adaptive import choose

    layers, left = sensitivity.packable(case.model, base)
    measured = sensitivity.calibrate(case.model, layers, FORMATS, data, base, case.readout)
    kind = "compensated" if base.compensate else "to nearest"
    found = {}
    for name, strategy in STRATEGIES.items():
        config = attrs.evolve(base, allocation_strategy=strategy)
        costs = sensitivity.costs(layers, FORMATS, config, measured).double().numpy()
        for bits, size in sizes.items():
            found[bits, f"{name}, {kind}"] = choose(case.model, layers, left, FORMATS, costs, config, size, measured)
            if name == "Fisher" and base.compensate:
                only = FORMATS.index(PrecisionFormat(f"int{bits}"))
                one = attrs.evolve(config, allocation_strategy=AllocationStrategy.UNIFORM)
                form = FORMATS[only : only + 1]
                plan = choose(case.model, layers, left, form, costs[:, only : only + 1], one, size, measured)
                found[bits, "uniform, compensated"] = plan
        if name == "Fisher":
            found[0, f"at torchao's bits, {kind}"] = choose(
                case.model, layers, left, FORMATS, costs, config, ao_bytes, measured
            )
    return found


if __name__ == "__main__":
    sys.exit(main())
