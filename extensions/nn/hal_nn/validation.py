"""`ComponentValidator`: layers held to float64 references that are computed from their own weights."""

from __future__ import annotations

import inspect
import math
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from hal_core import ContractError, DeviceUnavailableError
from hal_core.testing import relative_error

from .arguments import need_module, need_whole, shown, torch_device
from .hardware.devices import detect_available_devices

#: Largest ||x - reference|| / ||reference|| of a dtype.
LIMITS = {torch.float64: 1e-10, torch.float32: 1e-5, torch.bfloat16: 2e-2, torch.float16: 4e-3}
Projection = tuple[Tensor, Tensor | None]
#: Names of query, key, value and output projections, as layers have them.
_SEPARATE = (
    ("q_proj", "k_proj", "v_proj", "out_proj"),
    ("q_proj", "k_proj", "v_proj", "o_proj"),
    ("query", "key", "value", "out"),
    ("wq", "wk", "wv", "wo"),
)
_FUSED = (("qkv", "proj"), ("qkv_proj", "out_proj"), ("in_proj", "out_proj"))
_MASKS = ("attention_mask", "attn_mask", "mask")


class ComponentValidator:
    """Runs a layer and compares it with a reference that is computed in float64 from the layer's own weights.

    Args:
        device: where layers are run; they are moved there. seed: of the inputs.

    Raises:
        ContractError: no such kind of torch device, or no seed. DeviceUnavailableError: the device is not present.
    """

    def __init__(self, device: torch.device | str = "cpu", seed: int = 0) -> None:
        need_whole("seed", seed, 0)
        self.device, self.seed = torch_device(device), seed
        present = [each for devices in detect_available_devices().values() for each in devices]
        wanted = self.device
        if wanted.type != "cpu" and wanted not in [*present, *(torch.device(each.type) for each in present)]:
            raise DeviceUnavailableError(f"{wanted} is not present: use one of {', '.join(map(str, present))}")

    def validate_attention_component(
        self,
        layer: nn.Module,
        d_model: int,
        num_heads: int,
        *,
        causal: bool | None = None,
        batch_size: int = 2,
        sequence_length: int = 37,
    ) -> dict[str, Any]:
        """Hold a self-attention layer on [batch, length, d_model] to softmax(Q K^T / sqrt(head_dim)) V.

        The layer is put into evaluation mode meanwhile. Its projections are found by their names: q_proj, k_proj,
        v_proj and out_proj and the like, or a fused one (in_proj_weight, qkv).

        Args:
            causal: whether a token sees none after it; None: the layer's `causal` or `is_causal`, else False.

        Returns:
            "passed"; "checks": by name {"passed", "error", "limit"}, error relative to the reference: "output",
            "second call" (other inputs: nothing of the first call is left), "mask" (where the layer takes one, boolean,
            True: may read, or as nn.MultiheadAttention has it), "input gradient", "weight gradients", "batch"
            (entries do not mix); "limit": of the layer's dtype; "device".

        Raises:
            ContractError: heads that do not divide d_model, a layer without parameters, projections that are not found,
                or a layer that is known to compute something else.
        """
        need_module("layer", layer)
        _need_attention(layer)
        if causal is not None and type(causal) is not bool:
            raise ContractError(f"causal {shown(causal)} was given: use True, False or None")
        sizes = {"d_model": d_model, "num_heads": num_heads, "batch_size": batch_size}
        for name, size in (sizes | {"sequence_length": sequence_length}).items():
            need_whole(name, size)
        if d_model % num_heads:
            raise ContractError(
                f"d_model {d_model} and num_heads {num_heads} were given: use heads that divide d_model"
            )
        _need_data(layer)
        layer = layer.to(self.device)
        projections = _projections(layer, d_model)
        dtype = projections[0][0].dtype
        if causal is None:
            causal = bool(getattr(layer, "causal", getattr(layer, "is_causal", False)))
        generator = torch.Generator().manual_seed(self.seed)
        shape = (batch_size, sequence_length, d_model)
        first, second = (torch.randn(shape, generator=generator).to(self.device, dtype) for _ in range(2))
        report, limit = _Report(LIMITS.get(dtype, 1e-5)), sequence_length
        before = layer.training
        layer.eval()
        try:
            run = _caller(layer)
            report.add("output", run(first, None), _attention(first, projections, num_heads, causal))
            report.add("second call", run(second, None), _attention(second, projections, num_heads, causal))
            alone = torch.cat([run(second[i : i + 1], None) for i in range(batch_size)])
            report.add("batch", alone, _attention(second, projections, num_heads, causal))
            if _mask_name(layer) is not None:
                visible = torch.rand(limit, limit, generator=generator).to(self.device) > 0.4
                visible |= torch.eye(limit, dtype=torch.bool, device=self.device)
                want = _attention(second, projections, num_heads, causal, visible)
                report.add("mask", run(second, visible), want)
            self._gradients(layer, run, first, num_heads, causal, report)
        finally:
            layer.train(before)
        return report.results(self.device)

    def _gradients(
        self, layer: nn.Module, run: Callable[..., Tensor], x: Tensor, heads: int, causal: bool, report: _Report
    ) -> None:
        leaf = x.clone().requires_grad_()
        weights = [p for p in layer.parameters() if p.requires_grad and p.dim() > 1]
        out = run(leaf, None)
        flowing = torch.randn(out.shape, generator=torch.Generator().manual_seed(self.seed + 1)).to(out)
        found = torch.autograd.grad(out, [leaf, *weights], flowing, allow_unused=True)
        exact, kept = x.double().requires_grad_(), {p: p.detach().double().requires_grad_() for p in weights}
        exact_of = {id(p): wide for p, wide in kept.items()}
        projections = _projections(layer, x.shape[-1], lambda p: exact_of.get(id(p), p.detach().double()))
        want = torch.autograd.grad(
            _attention(exact, projections, heads, causal),
            [exact, *kept.values()],
            flowing.double(),
            allow_unused=True,
        )
        report.add("input gradient", found[0], want[0])
        pairs = [(f, w) for f, w in zip(found[1:], want[1:], strict=True) if w is not None]
        if pairs:
            missing = [torch.zeros_like(w) if f is None else f.double() for f, w in pairs]
            report.add(
                "weight gradients",
                torch.cat([f.flatten() for f in missing]),
                torch.cat([w.flatten() for _, w in pairs]),
            )

    def validate_linear_component(
        self, layer: nn.Module, in_features: int, out_features: int, *, batch_size: int = 16
    ) -> dict[str, Any]:
        """Hold a linear layer on [batch, in_features] to x W^T + b.

        Returns:
            As `validate_attention_component`, with the checks "output", "input gradient" and "weight gradients".

        Raises:
            ContractError: the layer has no `weight` of [out_features, in_features].
        """
        need_module("layer", layer)
        for name, size in (("in_features", in_features), ("out_features", out_features), ("batch_size", batch_size)):
            need_whole(name, size)
        _need_data(layer)
        layer = layer.to(self.device)
        weight, bias = getattr(layer, "weight", None), getattr(layer, "bias", None)
        if not isinstance(weight, Tensor):
            raise ContractError(
                f"{type(layer).__name__} has no weight: pass a layer with [{out_features}, {in_features}]"
            )
        if tuple(weight.shape) != (out_features, in_features):
            raise ContractError(
                f"a weight of {list(weight.shape)} was found: pass a layer with [{out_features}, {in_features}]"
            )
        generator = torch.Generator().manual_seed(self.seed)
        x = torch.randn(batch_size, in_features, generator=generator).to(weight).requires_grad_()
        exact, wide = x.detach().double().requires_grad_(), weight.detach().double().requires_grad_()
        report = _Report(LIMITS.get(weight.dtype, 1e-5))
        out, want = layer(x), exact @ wide.mT + (0 if bias is None else bias.detach().double())
        report.add("output", out, want)
        if report.checks["output"]["error"] < math.inf:
            flowing = torch.randn(want.shape, generator=generator).to(weight)
            grads = torch.autograd.grad(out, [x, weight], flowing, allow_unused=True)
            wanted = torch.autograd.grad(want, [exact, wide], flowing.double())
            for name, got, right in zip(("input gradient", "weight gradients"), grads, wanted, strict=True):
                report.add(name, torch.zeros_like(right) if got is None else got, right)
        return report.results(self.device)


def _need_attention(layer: nn.Module) -> None:
    """Raise ContractError for layers of torch that compute more than the reference, which would only fail."""
    name = type(layer).__name__
    if isinstance(layer, nn.TransformerEncoderLayer | nn.TransformerDecoderLayer):
        raise ContractError(f"{name} computes more than self-attention: pass its attention, layer.self_attn")
    if isinstance(layer, nn.MultiheadAttention):
        extras = {
            "add_bias_kv": layer.bias_k is not None,
            "add_zero_attn": layer.add_zero_attn,
            "kdim or vdim": not layer._qkv_same_embed_dim,
        }
        added = [what for what, there in extras.items() if there]
        if added:
            raise ContractError(
                f"{name} with {' and '.join(added)} was given: the reference is self-attention without them, compare "
                "such a layer with nn.MultiheadAttention itself"
            )


def _need_data(layer: nn.Module) -> None:
    if any(parameter.is_meta for parameter in layer.parameters()):
        raise ContractError(f"{type(layer).__name__} is on the meta device, where nothing runs: give it weights")


class _Report:
    """Checks by name, each against one limit."""

    def __init__(self, limit: float) -> None:
        self.limit, self.checks = limit, dict[str, dict[str, Any]]()

    def add(self, name: str, got: Tensor, want: Tensor) -> None:
        fits = got.shape == want.shape
        error = float(relative_error(got.detach(), want.detach())) if fits else math.inf
        self.checks[name] = {"passed": error <= self.limit, "error": error, "limit": self.limit}

    def results(self, device: torch.device) -> dict[str, Any]:
        passed = all(check["passed"] for check in self.checks.values())
        return {"passed": passed, "checks": self.checks, "limit": self.limit, "device": str(device)}


def _attention(
    x: Tensor, projections: list[Projection], heads: int, causal: bool, visible: Tensor | None = None
) -> Tensor:
    """Self-attention in float64; `visible`: bool [length, length], True: may read."""
    x = x.double()
    query, key, value = (
        _linear(x, one).unflatten(-1, (-1, x.shape[-1] // heads)).transpose(1, 2) for one in projections[:3]
    )
    group = query.shape[1] // key.shape[1]
    key, value = key.repeat_interleave(group, 1), value.repeat_interleave(group, 1)
    scores = query @ key.mT / math.sqrt(query.shape[-1])
    if causal:
        seen = torch.ones(x.shape[1], x.shape[1], dtype=torch.bool, device=x.device).tril()
        visible = seen if visible is None else visible & seen
    if visible is not None:
        scores = scores.masked_fill(~visible, -math.inf)
    return _linear((scores.softmax(-1) @ value).transpose(1, 2).flatten(2), projections[3])


def _linear(x: Tensor, projection: Projection) -> Tensor:
    weight, bias = projection
    out = x @ weight.double().mT
    return out if bias is None else out + bias.double()


def _projections(layer: nn.Module, d_model: int, convert: Callable[[Tensor], Tensor] = lambda p: p) -> list[Projection]:
    """(weight, bias) of query, key, value and output."""

    def of(module: Any) -> Projection:
        bias = getattr(module, "bias", None)
        return convert(module.weight), None if bias is None else convert(bias)

    def third(weight: Tensor, bias: Tensor | None) -> list[Projection]:
        wide = convert(weight)
        parts = wide.chunk(3)
        biases = (None, None, None) if bias is None else convert(bias).chunk(3)
        return list(zip(parts, biases, strict=True))

    for module in layer.modules():
        if getattr(module, "in_proj_weight", None) is not None and hasattr(module, "out_proj"):
            return [*third(module.in_proj_weight, getattr(module, "in_proj_bias", None)), of(module.out_proj)]  # type: ignore[arg-type]
        for names in _SEPARATE:
            if all(getattr(getattr(module, name, None), "weight", None) is not None for name in names):
                return [of(getattr(module, name)) for name in names]
        for fused, last in _FUSED:
            weight = getattr(getattr(module, fused, None), "weight", None)
            if weight is not None and hasattr(module, last) and weight.shape[0] == 3 * d_model:
                return [*third(weight, getattr(module, fused).bias), of(getattr(module, last))]
    raise ContractError(
        f"no query, key, value and output projections were found in {type(layer).__name__}: name them q_proj, k_proj, "
        f"v_proj and out_proj, or give it nn.MultiheadAttention's in_proj_weight"
    )


def _mask_name(layer: nn.Module) -> str | None:
    takes = inspect.signature(layer.forward).parameters
    return next((name for name in _MASKS if name in takes), None)


def _caller(layer: nn.Module) -> Callable[[Tensor, Tensor | None], Tensor]:
    """The layer as a function of x and of which pairs are visible, whatever its arguments are called."""
    takes, mask_name = inspect.signature(layer.forward).parameters, _mask_name(layer)
    # nn.MultiheadAttention takes query, key and value, and its boolean mask says what may not be read.
    torch_style = {"query", "key", "value"} <= set(takes) and takes["key"].default is inspect.Parameter.empty
    batch_first = getattr(layer, "batch_first", True)

    def run(x: Tensor, visible: Tensor | None) -> Tensor:
        named: dict[str, Any] = {}
        if visible is not None and mask_name is not None:
            named[mask_name] = ~visible if torch_style else visible
        if torch_style and "need_weights" in takes:
            named["need_weights"] = False
        given = x if batch_first else x.transpose(0, 1)
        out = layer(given, given, given, **named) if torch_style else layer(given, **named)
        out = out[0] if isinstance(out, tuple) else out
        found: Tensor = out if batch_first else out.transpose(0, 1)
        return found

    return run
