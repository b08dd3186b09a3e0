"""Training steps with FP8 layers: accumulation, clipping, skipped steps, statistics, checkpoints."""

from __future__ import annotations

import json
import os
from collections.abc import Callable, Iterable
from typing import Any

import attrs
import torch
from torch import Tensor, nn
from torch.nn.functional import cross_entropy, mse_loss

from hal_core import ContractError

from .files import save_whole
from .fp8 import FP8Config, FP8Format, FP8LinearLayer, is_sharded, make_layers, place_layers
from .sensitivity import run

Loss = Callable[[Any, Any], Tensor]


def default_loss(output: Any, targets: Tensor) -> Tensor:
    """Cross entropy over the last dimension for integer targets, else the mean squared error."""
    found = output if isinstance(output, Tensor) else getattr(output, "logits", None)
    if found is None:
        raise ContractError(f"A {type(output).__name__} has no logits: give loss=, a function of output and targets.")
    if targets.is_floating_point():
        return mse_loss(found.float(), targets.float())
    return cross_entropy(found.float().flatten(0, -2), targets.flatten())


class FP8TrainingEngine:
    """Trains a model whose linear layers multiply in FP8 inside the context, and are nn.Linear's outside of it.

        with FP8TrainingEngine(model, FP8Config()) as trainer:
            loss = trainer.training_step(inputs, targets)
            trainer.optimizer_step(optimizer)
        print(trainer.get_training_statistics())

    With FSDP2, `fully_shard` comes after `setup_fp8_training()`; every process skips the same steps, and a sharded
    model keeps its FP8 layers when the context is left.

    Args:
        model: its parameters stay as they are, in their dtype; an optimizer made before or after has the same ones.
        fp8_config: as `FP8Config`. device: where the model is moved; None leaves it.
        loss: of (output, targets), a scalar; `default_loss` where None.
        accumulate: training steps to a step of the optimizer; the loss is divided by it.
        clip_norm: largest norm of all gradients. sample: batches, for FP8Config.max_error.

    Raises:
        As `convert_model_to_fp8`, when the context is entered.
    """

    def __init__(
        self,
        model: nn.Module,
        fp8_config: FP8Config | None = None,
        device: torch.device | str | None = None,
        *,
        loss: Loss | None = None,
        accumulate: int = 1,
        clip_norm: float | None = None,
        sample: Iterable[Any] | None = None,
    ) -> None:
        if accumulate < 1 or (clip_norm is not None and not clip_norm > 0):
            raise ContractError(
                f"accumulate is {accumulate} and clip_norm {clip_norm}: give 1 or more, and a positive norm."
            )
        self.model = model if device is None else model.to(device)
        self.config = fp8_config or FP8Config()
        self.loss, self.accumulate, self.clip_norm, self._sample = loss or default_loss, accumulate, clip_norm, sample
        self.steps = self.skipped = self.micro_steps = 0
        self.layers: dict[str, FP8LinearLayer] = {}
        self.left: dict[str, str] = {}
        self.inside = False

    def setup_fp8_training(self) -> FP8TrainingEngine:
        """Convert the layers; the context does it by itself. Twice is harmless."""
        if self.inside:
            return self
        if not self.layers:
            self.layers, self.left = make_layers(self.model, self.config, self._sample)
        place_layers(self.model, self.layers)
        self.inside = True
        return self

    def __enter__(self) -> FP8TrainingEngine:
        return self.setup_fp8_training()

    def __exit__(self, *error: object) -> None:
        if not is_sharded(self.model):
            place_layers(self.model, {name: layer.to_linear() for name, layer in self.layers.items()})
        self.inside = False

    def training_step(self, inputs: Any, targets: Any) -> Tensor:
        """Forward and backward; gradients add up. Returns the loss, detached, not divided.

        Args:
            inputs: a tensor, a tuple or a dict of the model's arguments. targets: what the loss takes.
        """
        self._need_inside("training_step")
        loss = self.loss(run(self.model, inputs), targets)
        (loss / self.accumulate).backward()
        self.micro_steps += 1
        return loss.detach()

    def optimizer_step(self, optimizer: torch.optim.Optimizer) -> bool:
        """Clip, step and clear the gradients. True where the optimizer stepped.

        False before `accumulate` training steps are done, and where gradients are not finite: then they are cleared,
        the step is skipped, and counted.

        Raises:
            ContractError: the optimizer lacks parameters of the model, with their names.
        """
        self._need_inside("optimizer_step")
        held = {id(parameter) for group in optimizer.param_groups for parameter in group["params"]}
        named = [(name, each) for name, each in self.model.named_parameters() if each.requires_grad]
        lacking = [name for name, each in named if id(each) not in held]
        if lacking:
            raise ContractError(
                f"The optimizer lacks {len(lacking)} of {len(named)} parameters of the model: {', '.join(lacking[:8])}"
                f"{', ...' if len(lacking) > 8 else ''}. Make it from model.parameters(), after the model was moved. "
                "No step was done."
            )
        if self.micro_steps < self.accumulate:
            return False
        self.micro_steps = 0
        gradients = [each.grad for _, each in named if each.grad is not None]
        norm = torch.nn.utils.get_total_norm(gradients)
        good = bool((norm.full_tensor() if is_sharded(self.model) else norm).isfinite())  # type: ignore[attr-defined]
        if good:
            if self.clip_norm is not None:
                torch.nn.utils.clip_grads_with_norm_([each for _, each in named], self.clip_norm, norm)
            optimizer.step()
            self.steps += 1
        else:
            self.skipped += 1
        optimizer.zero_grad(set_to_none=True)
        return good

    def get_training_statistics(self) -> dict[str, Any]:
        """overflows: values that saturated, and steps skipped for gradients that are not finite (also alone, as
        skipped_steps). underflows: values other than 0 that became 0. steps: of the optimizer. scales: of each layer's
        operands, the last and largest. emulated: no FP8 hardware, nothing is faster. fp8_layers; other_layers, and why.
        """
        counts = [layer.counts.tolist() for layer in self.layers.values()]
        emulated = any(layer.emulated for layer in self.layers.values())
        return {
            "overflows": sum(over for over, _ in counts) + self.skipped,
            "underflows": sum(under for _, under in counts),
            "steps": self.steps,
            "skipped_steps": self.skipped,
            "scales": {
                name: {key: float(each) for key, each in layer.last_scales.items()}
                for name, layer in self.layers.items()
            },
            "emulated": emulated,
            "note": "emulated: operands are rounded to FP8 and multiplied in float32, without a gain in speed"
            if emulated
            else "FP8 hardware",
            "granularity": self.config.granularity,
            "scaling": self.config.scaling,
            "fp8_layers": len(self.layers),
            "other_layers": dict(self.left),
        }

    def save_checkpoint(self, path: str | os.PathLike[str], optimizer: torch.optim.Optimizer) -> None:
        """Write model, optimizer, histories, counters and random states to one safetensors file, whole or not at all.

        Between steps of the optimizer only: gradients are not written. Sharded models are refused.
        """
        if is_sharded(self.model):
            raise ContractError("The model is sharded: save its state by torch.distributed.checkpoint.")
        if self.micro_steps:
            raise ContractError(f"{self.micro_steps} training steps wait for optimizer_step: save after it.")
        tensors = {f"model.{name}": each for name, each in self.model.state_dict().items()}
        for name, layer in self.layers.items():
            tensors |= {f"amax.{name}": layer.amax, f"counts.{name}": layer.counts}
        state = optimizer.state_dict()
        plain: dict[str, Any] = {}
        for place, entry in state["state"].items():
            for key, value in entry.items():
                if isinstance(value, Tensor):
                    tensors[f"optimizer.{place}.{key}"] = value
                else:
                    plain[f"{place}.{key}"] = value
        tensors["random.cpu"] = torch.get_rng_state()
        if torch.cuda.is_available():
            tensors["random.cuda"] = torch.cuda.get_rng_state()
        facts = {"groups": state["param_groups"], "plain": plain, "steps": self.steps, "skipped": self.skipped}
        # Copies: safetensors takes no tensors that share memory, as tied weights do.
        copies = {name: each.detach().clone().contiguous() for name, each in tensors.items()}
        save_whole(path, copies, {"hal_precision_fp8": json.dumps(facts)})

    def load_checkpoint(self, path: str | os.PathLike[str], optimizer: torch.optim.Optimizer) -> None:
        """Go on from a checkpoint, bit for bit, with a model, optimizer and config as they were.

        Raises:
            ContractError: not such a file, or of other layers.
        """
        from safetensors import safe_open

        self._need_inside("load_checkpoint")
        with safe_open(path, "pt") as file:
            text = (file.metadata() or {}).get("hal_precision_fp8")
            tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
        if text is None:
            raise ContractError(f"{path} is no checkpoint of FP8TrainingEngine.save_checkpoint.")
        facts = json.loads(text)
        layers = {name.removeprefix("amax.") for name in tensors if name.startswith("amax.")}
        if layers != set(self.layers):
            other = ", ".join(sorted(layers ^ set(self.layers)))
            raise ContractError(
                f"{path} has other FP8 layers; only one of both has {other}. Use the config it was made with."
            )
        self.model.load_state_dict({n.removeprefix("model."): t for n, t in tensors.items() if n.startswith("model.")})
        for name, layer in self.layers.items():
            layer.amax.copy_(tensors[f"amax.{name}"])
            layer.counts.copy_(tensors[f"counts.{name}"])
        state: dict[int, dict[str, Any]] = {}
        for name, tensor in tensors.items():
            if name.startswith("optimizer."):
                _, place, key = name.split(".", 2)
                state.setdefault(int(place), {})[key] = tensor
        for name, value in facts["plain"].items():
            place, key = name.split(".", 1)
            state.setdefault(int(place), {})[key] = value
        optimizer.load_state_dict({"state": state, "param_groups": facts["groups"]})
        torch.set_rng_state(tensors["random.cpu"])
        if "random.cuda" in tensors and torch.cuda.is_available():
            torch.cuda.set_rng_state(tensors["random.cuda"])
        self.steps, self.skipped, self.micro_steps = facts["steps"], facts["skipped"], 0

    def _need_inside(self, what: str) -> None:
        if not self.inside:
            raise ContractError(f"{what} runs inside the context: with trainer: ..., or after setup_fp8_training().")


def create_fp8_trainer(
    model: nn.Module,
    forward_format: FP8Format = FP8Format.E4M3,
    backward_format: FP8Format = FP8Format.E5M2,
    device: torch.device | str | None = None,
    **options: Any,
) -> FP8TrainingEngine:
    """An `FP8TrainingEngine` with these formats; `options` are its other arguments, or fields of `FP8Config`."""
    fields = {each.name for each in attrs.fields(FP8Config)}
    config = FP8Config(
        forward_format=forward_format,
        backward_format=backward_format,
        **{name: value for name, value in options.items() if name in fields},
    )
    return FP8TrainingEngine(
        model, config, device, **{name: value for name, value in options.items() if name not in fields}
    )
