"""Every model type of transformers on hal's attention against eager, each as a row of `model_types.json`.

python tests/nn/survey.py            every type, and writes the table
python tests/nn/survey.py llama bert prints the rows of these
"""

from __future__ import annotations

import contextlib
import json
import re
import resource
import signal
import sys
import time
import warnings
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import hal_nn
import torch
import transformers
from hal_nn.model_check import OTHER_OPERATIONS, CallWarning, PartWarning
from torch.overrides import TorchFunctionMode

import hal_core as hal
from hal_core import HalError

sys.path.insert(0, str(Path(__file__).parent))

import tiny_inputs
import tiny_models

TABLE = Path(__file__).with_name("model_types.json")
#: ||hal - eager|| / ||eager||, of the outputs and of all gradients together, in float32.
FORWARD, BACKWARD = 1e-5, 1e-4
#: Layers that compute weights which nothing reads.
UNUSED = ("Sam2MultiScaleAttention",)
#: Seconds of the processor for one step with one model, so that a busy machine cuts nothing off.
PATIENCE = 60


class Elsewhere(TorchFunctionMode):
    """Names the layers of a model whose attention is computed outside hal: softmax over keys, torch's attention."""

    SOFTMAX = frozenset({torch.softmax, torch.nn.functional.softmax, torch.Tensor.softmax})
    WHOLE = frozenset(
        {torch.nn.functional.scaled_dot_product_attention, torch.nn.functional.multi_head_attention_forward}
    )

    def __init__(self) -> None:
        super().__init__()
        self.layers: set[str] = set()

    def __torch_function__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        whole = function in self.WHOLE
        if whole or (function in self.SOFTMAX and args[0].ndim >= 3):
            name = self._layer()
            if (
                name is not None
                and not name.endswith((*OTHER_OPERATIONS, *UNUSED))
                and (whole or "attention" in name.lower() or "attn" in name.lower())
            ):
                self.layers.add(name)
        return function(*args, **(kwargs or {}))

    def _layer(self) -> str | None:
        """The model's layer that calls; None inside hal."""
        frame = sys._getframe(2)
        while frame is not None:
            if frame.f_globals.get("__name__", "").startswith(("hal_nn", "hal_core", "hal_cpu")):
                return None
            if "self" in frame.f_locals and "transformers.models." in frame.f_globals.get("__name__", ""):
                return type(frame.f_locals["self"]).__name__
            frame = frame.f_back
        return None


def check(model_type: str, seed: int = 0) -> dict[str, Any]:
    """The row of a model type.

    Returns:
        result: "equal", "refused", "cannot be built" (eager does not run), "not finished" (eager ran, and hal went
        over the limits of time or memory) or "different". class: the model's. reason: of all but the first.
        converted: of a refused type, what `hal_nn.convert` makes of it: "equal", "partly", with what stays on torch,
        why nothing is converted, or "not tried", with why eager itself does not run on any inputs known here.
        forward: "padded", or "unpadded" where the model takes no padding mask. generate, backward: true where eager
        does it too, and hal gives the same. torch: warnings' names, of models and parts whose attention stays on torch.
        reference: "sdpa", where eager gives no finite result.
    """
    hal_nn.register_huggingface()
    try:
        eager, sizes, unrun = _first(model_type, seed)
    except tiny_models.CannotBuildError as error:
        return {"result": "cannot be built", "reason": str(error)}
    row: dict[str, Any] = {"class": type(eager).__name__}
    with warnings.catch_warnings(record=True) as said:
        warnings.simplefilter("always", CallWarning)
        warnings.simplefilter("always", PartWarning)
        try:
            with _limit(PATIENCE):
                ours = tiny_models.build(model_type, "hal", seed, sizes)
            if unrun:  # hal does not refuse it either
                return {"result": "cannot be built", "reason": unrun}
            ours.load_state_dict(eager.state_dict())
            row |= _compared(eager, ours, model_type, sizes, seed)
        except HalError as error:
            converted = f"not tried: {unrun}" if unrun else _converted(eager, seed)
            return row | {"result": "refused", "reason": _short(error), "converted": converted}
        except tiny_models.CannotBuildError as error:
            return row | {"result": "cannot be built", "reason": _short(error)}
        except Exception as error:  # eager ran, or was built at least, so that this is hal's
            return row | {"result": "not finished" if _over_limits(error) else "different", "reason": _short(error)}
    kinds = (CallWarning, PartWarning)
    if named := sorted({str(one.message).split()[0] for one in said if issubclass(one.category, kinds)}):
        row["torch"] = named
    if row.get("elsewhere") and not named:
        return row | {"result": "different", "reason": f"in silence on torch: {', '.join(row['elsewhere'])}"}
    row.pop("elsewhere", None)
    return {"result": "equal"} | row


def _over_limits(error: BaseException) -> bool:
    """Whether a step was stopped by the limit of time or of memory; torch's allocator says the second in words."""
    return isinstance(error, TimeoutError | MemoryError) or "can't allocate memory" in str(error)


def _converted(eager: Any, seed: int) -> str:
    """What `hal_nn.convert` makes of a model."""
    given = tiny_inputs.inputs(eager, seed)
    want = _run(eager, given, seed)
    try:
        with _limit(PATIENCE):
            _, report = hal_nn.convert(eager, given)
        if (error := difference(_run(eager, given, seed), want, given.get("attention_mask"))) > FORWARD:
            return f"different: {error:.1e}"
    except HalError as error:
        text, nothing, why = " ".join(str(error).split()).partition(" has nothing to convert (")
        return f"nothing: {why.partition('): pass a model')[0]}"[:160] if nothing else f"refused: {text[:150]}"
    except Exception as error:
        return f"{'not finished' if _over_limits(error) else 'different'}: {_short(error)}"
    kinds = sorted({f"{layer.kind}: {layer.reason}" for layer in report.skipped})
    return "partly: " + "; ".join(kinds)[:160] if kinds else "equal"


_WIDTHS = re.compile(r"mat1 and mat2 shapes cannot be multiplied \(\d+x\d+ and (\d+)x\d+\)")


def _first(model_type: str, seed: int) -> tuple[Any, Any, str]:
    """(an eager model, the sizes it was built with, why it does not run on any inputs known here; "" where it does).

    Raises:
        CannotBuildError: no eager model is built.
    """
    reasons: list[str] = []
    unrun: list[str] = []
    built = None
    for sizes in tiny_models.CHOICES:
        if sizes.place and built is not None:
            break  # the first class builds
        try:
            with _limit(PATIENCE):
                eager = tiny_models.build(model_type, "eager", seed, sizes)
        except Exception as error:
            reasons.append(_short(error))
            continue
        built = built or (eager, sizes)
        for variant in (*tiny_inputs.VARIANTS, None):
            if variant is None:  # rows of the width that its first layer multiplies
                if (found := _WIDTHS.search(" ".join((*reasons, *unrun)))) is None:
                    break
                eager.tiny_width, variant = int(found[1]), 0
            eager.tiny_variant = variant
            try:
                with _limit(PATIENCE), torch.no_grad():
                    if not tensors(eager(**tiny_inputs.inputs(eager, seed))):
                        raise tiny_models.CannotBuildError("no output to compare")
                return eager, sizes, ""
            except Exception as error:
                unrun.append(_short(error))
    if built is None:
        raise tiny_models.CannotBuildError(reasons[0])
    return *built, unrun[0]  # what hal refuses needs no inputs


def _compared(eager: Any, ours: Any, model_type: str, sizes: Any, seed: int) -> dict[str, Any]:
    """Forward, with and without padding, generate and backward. Raises AssertionError where hal differs."""
    given = tiny_inputs.inputs(eager, seed)
    row: dict[str, Any] = {"forward": "padded" if "attention_mask" in given else "unpadded"}
    elsewhere = Elsewhere()
    want = _run(eager, given, seed)
    with elsewhere:
        _run(ours, given, seed)
    if not all(bool(one.isfinite().all()) for one in tensors(want).values()):
        other = tiny_models.build(model_type, "sdpa", seed, sizes)
        other.load_state_dict(eager.state_dict())
        eager = other
        row["reference"] = "sdpa"
    if elsewhere.layers:
        row["elsewhere"] = sorted(elsewhere.layers)
    mask = given.get("attention_mask")
    _agree("forward", eager, ours, given, seed)
    others = [{name: one for name, one in given.items() if name != "attention_mask"}] if mask is not None else []
    causal = eager.can_generate() and not eager.config.is_encoder_decoder and "input_ids" in given
    if causal and mask is not None:
        others.append(tiny_inputs.inputs(eager, seed + 1, "left"))
    for other in others:
        with contextlib.suppress(_EagerNeedsItError):
            _agree("forward without padding or padded left", eager, ours, other, seed)
    if eager.can_generate() and "input_ids" in given and _generated(eager, ours, seed):
        row["generate"] = True
    if _trained(eager, ours, given, seed):
        row["backward"] = True
    return row


def _run(model: Any, given: dict[str, Any], seed: int) -> Any:
    with _limit(PATIENCE), torch.no_grad(), _device(model):
        torch.manual_seed(seed)
        return model(**_cast(given, model.dtype))


def _device(model: Any) -> Any:
    ours = model.config._attn_implementation == "hal"
    return hal.use("cpu:0") if ours else contextlib.nullcontext()


def _both(eager: Any, ours: Any, step: Callable[[Any], Any]) -> tuple[Any, Any] | None:
    """What a step gives with either model; None where eager cannot do it."""
    try:
        with _limit(PATIENCE):
            want = step(eager)
    except Exception:
        return None
    with _limit(PATIENCE), _device(ours):
        return want, step(ours)


def _generated(eager: Any, ours: Any, seed: int) -> bool:
    side = "right" if eager.config.is_encoder_decoder else "left"
    given = tiny_inputs.inputs(eager, seed, side)
    given = {name: one for name, one in given.items() if name in ("input_ids", "attention_mask")}

    def step(model: Any) -> Any:
        torch.manual_seed(seed)
        return model.generate(**given, max_new_tokens=5, do_sample=False, eos_token_id=None, pad_token_id=0).tolist()

    found = _both(eager, ours, step)
    assert found is None or found[0] == found[1], "generate gives other tokens"
    return found is not None


def _trained(eager: Any, ours: Any, given: dict[str, Any], seed: int) -> bool:
    mask = given.get("attention_mask")

    def step(model: Any) -> dict[str, torch.Tensor]:
        torch.manual_seed(seed)
        generator = torch.Generator().manual_seed(seed)
        loss = torch.zeros((), dtype=torch.float64)
        for _, value in sorted(tensors(model(**_cast(given, model.dtype))).items()):
            if value.requires_grad:
                value = seen(value, mask)
                loss = loss + (value.double() * torch.randn(value.shape, generator=generator)).mean()
        model.zero_grad()
        loss.backward()
        return {name: one.grad.double() for name, one in model.named_parameters() if one.grad is not None}

    found = _both(eager, ours, step)
    if found is None or not found[0]:
        return False
    error = _gradient_error(*found)
    if error > BACKWARD:  # where float32 itself is this far from float64, float64 decides
        found = _both(eager.double(), ours.double(), step)
        error = error if found is None else _gradient_error(*found)
    assert error <= BACKWARD, f"backward: {error:.1e} from eager"
    return True


def _gradient_error(want: dict[str, torch.Tensor], got: dict[str, torch.Tensor]) -> float:
    assert want.keys() == got.keys(), "other parameters have a gradient"
    total = sum(float(one.norm()) ** 2 for one in want.values()) ** 0.5
    apart = sum(float((one - got[name]).norm()) ** 2 for name, one in want.items()) ** 0.5
    return apart / max(total, 1e-30)


class _EagerNeedsItError(Exception):
    """Eager does not run on such inputs."""


def _agree(what: str, eager: Any, ours: Any, given: dict[str, Any], seed: int) -> None:
    """Assert that two models give the same; where float32 is not exact enough to say, in float64."""
    error = 0.0
    for dtype in (torch.float32, torch.float64):
        cast = _cast(given, dtype)
        try:
            want = _run(eager.to(dtype), cast, seed)
        except Exception as failed:
            if dtype is torch.float32:
                raise _EagerNeedsItError from failed
            break
        if dtype is torch.float64 and not all(bool(one.isfinite().all()) for one in tensors(want).values()):
            break  # eager has no result for rows without a key in float64
        error = difference(_run(ours.to(dtype), cast, seed), want, given.get("attention_mask"))
        if error <= FORWARD:
            break
    eager.float(), ours.float()
    assert error <= FORWARD, f"{what}: {error:.1e} from eager"


def _cast(given: dict[str, Any], dtype: torch.dtype) -> dict[str, Any]:
    """A copy of arguments, what is floating-point in another dtype."""
    return {name: one.to(dtype, copy=True) if one.is_floating_point() else one.clone() for name, one in given.items()}


def tensors(output: Any) -> dict[str, torch.Tensor]:
    """The floating-point tensors of an output, caches left out, and weights that a model gives without being asked."""
    pairs: Any = ()
    if hasattr(output, "items"):
        pairs = output.items()
    elif isinstance(output, tuple | list):
        pairs = enumerate(output)
    found: dict[str, torch.Tensor] = {}
    for name, value in pairs:
        if isinstance(value, torch.Tensor) and value.is_floating_point():
            found[str(name)] = value
        elif "past" not in str(name) and str(name) != "attentions":
            found |= {f"{name}.{inner}": one for inner, one in tensors(value).items()}
    return found


def seen(value: torch.Tensor, mask: torch.Tensor | None) -> torch.Tensor:
    """The positions that a padding mask leaves, of a tensor that has them; no value that is not finite."""
    if mask is not None and value.ndim >= 2 and value.shape[:2] == mask.shape:
        value = value[mask.bool()]
    return value[value.isfinite()]


def difference(got: Any, want: Any, mask: torch.Tensor | None) -> float:
    """The largest relative error over the tensors of an output, positions that the mask hides left out."""
    ours, theirs = tensors(got), tensors(want)
    assert ours.keys() == theirs.keys(), "other outputs"
    errors = []
    for name, right in theirs.items():
        left, right = seen(ours[name], mask).double(), seen(right, mask).double()
        assert left.shape == right.shape, f"{name}: other shape, or other values that are not finite"
        if float(right.norm()) > 0:
            errors.append(float((left - right).norm() / right.norm()))
    if not errors:
        raise tiny_models.CannotBuildError("no output to compare")
    return max(errors)


@contextlib.contextmanager
def _limit(seconds: int) -> Iterator[None]:
    def stop(*_: Any) -> None:
        raise TimeoutError(f"over {seconds} s")

    before = signal.signal(signal.SIGPROF, stop)
    signal.setitimer(signal.ITIMER_PROF, seconds)
    try:
        yield
    finally:
        signal.setitimer(signal.ITIMER_PROF, 0)
        signal.signal(signal.SIGPROF, before)


def _short(error: BaseException) -> str:
    text = " ".join(str(error).split())
    known = isinstance(error, HalError | tiny_models.CannotBuildError | AssertionError)
    return (text.partition(". Use attn_implementation")[0] if known else f"{type(error).__name__}: {text}")[:160]


def main(chosen: list[str]) -> None:
    warnings.simplefilter("ignore")
    transformers.logging.set_verbosity_error()
    torch.set_num_threads(1)
    resource.setrlimit(resource.RLIMIT_AS, (8 << 30, 8 << 30))
    rows: dict[str, Any] = {}
    for model_type in chosen or tiny_models.model_types():
        start = time.perf_counter()
        rows[model_type] = check(model_type)
        print(model_type, f"{time.perf_counter() - start:.1f} s", json.dumps(rows[model_type]), flush=True)
    if not chosen:
        write(rows)


def write(rows: dict[str, Any]) -> None:
    """The table, one type a line."""
    lines = ",\n".join(
        f"  {json.dumps(name)}: {json.dumps(row, ensure_ascii=False)}" for name, row in sorted(rows.items())
    )
    head = json.dumps(transformers.__version__)
    TABLE.write_text(f'{{"transformers": {head}, "types": {{\n{lines}\n}}}}\n', encoding="utf-8")


if __name__ == "__main__":
    main(sys.argv[1:])
