"""Random calls, sound and damaged: a right result or a `HalError`, every refusal met, and nothing left behind."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

import pytest
import torch
from fakes import FakeBackend, draw as draw_tensors, full, kept, plain

import hal_core as hal
from hal_core import BlockPlan, Choice, Code, Range, Refusal, SequenceMetadata
from hal_core.decision import Policy
from hal_core.options import merged_policy
from hal_core.registry import registry
from hal_core.testing import reference, reference_gradients

hypothesis = pytest.importorskip("hypothesis", reason="hypothesis is not installed here")
st = hypothesis.strategies

DTYPES = (torch.float32, torch.float32, torch.float32, torch.float64, torch.bfloat16, torch.float16)
#: Who shall run a call. "" is automatic; the CPU stands for itself more often.
DEVICES = (
    *["cpu"] * 4,
    "full",
    *["explicit"] * 2,
    *[""] * 2,
    *["narrow"] * 2,
    "partial",
    "moody",
    "small",
    "model",
    "shut",
    "far",
    "ghost",
    "unknown",
)
Fake = Callable[..., FakeBackend]


class Call(NamedTuple):
    """A call of `hal.attention`, what it should give, and what was damaged ("" for nothing)."""

    tensors: tuple[Any, Any, Any]
    options: dict[str, Any]
    lse: bool
    grads: str
    damage: str


# What damages a sound call. Each changes tensors or options.

DAMAGE: dict[str, Callable[[list[Any], dict[str, Any]], None]] = {
    "rank": lambda t, o: t.__setitem__(0, t[0].flatten(0, 1)),
    "rank of the value": lambda t, o: t.__setitem__(2, t[2].unsqueeze(0)),
    "no tensor": lambda t, o: t.__setitem__(1, None),
    "another length": lambda t, o: t.__setitem__(
        2, torch.cat([t[2], t[2][:, :, :1], t[2].new_zeros(t[2].shape)[:, :, :1]], 2)
    ),
    "another head size": lambda t, o: t.__setitem__(1, torch.cat([t[1], t[1]], 3)),
    "another batch": lambda t, o: t.__setitem__(0, torch.cat([t[0], t[0], t[0]])),
    "three heads too many": lambda t, o: t.__setitem__(1, torch.cat([t[1]] * 7, 1)),
    "another dtype": lambda t, o: t.__setitem__(
        2, t[2].to(torch.float64 if t[0].dtype != torch.float64 else torch.float32)
    ),
    "integers": lambda t, o: t.__setitem__(slice(None), [x.to(torch.int32) for x in t]),
    "another device": lambda t, o: t.__setitem__(1, t[1].to("meta")),
    "a mask of another shape": lambda t, o: o.update(attn_mask=torch.ones(t[0].shape[2] + 1, t[1].shape[2] + 3) > 0),
    "a mask of integers": lambda t, o: o.update(attn_mask=torch.ones(1, 1, dtype=torch.int64)),
    "NaN scale": lambda t, o: o.update(scale=math.nan),
    "negative window": lambda t, o: o.update(window=(-1, 2)),
    "softcap of 0": lambda t, o: o.update(softcap=0.0),
    "dropout of 1": lambda t, o: o.update(dropout_p=1.0),
    "causal in words": lambda t, o: o.update(causal="yes please"),
    "half a table": lambda t, o: o.update(cu_seqlens_q=torch.tensor([0, 1], dtype=torch.int32)),
    "a plan past its end": lambda t, o: o.update(
        block_plan=BlockPlan(1, 1, torch.zeros(1, 1, 99, 1), torch.zeros(1, 1, 99))
    ),
    "an objective in words": lambda t, o: o.update(objective="speed"),
}


def wider(tensors: list[Any]) -> dict[str, Any]:
    tensors[2] = torch.cat([tensors[2], tensors[2]], 3)
    return {}


def eighths(tensors: list[Any]) -> dict[str, Any]:
    tensors[1:] = [t.to(torch.float8_e5m2) for t in tensors[1:]]
    return {"key_scale": torch.ones(1), "value_scale": torch.ones(1)}


#: What chance rarely brings together, and is called beside what it does: (who, options, gradients).
AIMS: tuple[tuple[str, Callable[[list[Any]], dict[str, Any]], str], ...] = (
    ("narrow", lambda t: {"window": (2, 2)}, ""),
    ("narrow", lambda t: {"softcap": 3.0}, ""),
    ("narrow", lambda t: {"diagonal": 1}, ""),
    ("narrow", lambda t: {"cache_seqlens": torch.tensor([1, 3], dtype=torch.int32)}, ""),
    ("narrow", lambda t: {"deterministic": True}, ""),
    ("narrow", lambda t: {"dropout_p": 0.2}, ""),
    ("narrow", lambda t: {"max_error": 1e-9}, ""),
    ("narrow", wider, ""),
    ("narrow", eighths, ""),
    ("partial", lambda t: {"attn_mask": torch.zeros(1, 1)}, "qm"),
    ("full", lambda t: {"dropout_p": 0.3, "rng": (1, 2)}, "qkv"),
    ("cpu", eighths, ""),
    ("narrow", lambda t: {}, ""),
    ("explicit", lambda t: {"dropout_p": 0.3, "rng": (3, 4)}, "qkv"),
    ("cpu", lambda t: {"dropout_p": 0.5, "rng": (5, 6)}, ""),
    ("explicit", lambda t: {"window": (2, 1), "softcap": 1.0}, "qkv"),
)


@st.composite
def calls(draw: Any) -> Call:
    """Mostly sound calls; options pile up slowly, so that devices with few features can run many."""
    simple = draw(st.integers(0, 3)) == 3  # what a device without features can run, more often than chance has it
    rare = lambda odds=5: not simple and draw(st.integers(0, odds)) == odds  # noqa: E731
    generator = torch.Generator().manual_seed(draw(st.integers(0, 2**31)))
    batch, heads_kv, group = draw(st.sampled_from([1, 1, 2, 3])), draw(st.integers(1, 3)), 1
    len_q, len_k = draw(st.integers(1, 12)), draw(st.integers(1, 12))
    dim = draw(st.sampled_from([4, 8, 8, 5]))
    options: dict[str, Any] = {}
    if rare():
        group = draw(st.integers(2, 3))
    if rare(12):
        batch, heads_kv = draw(st.sampled_from([(0, 1), (1, 0), (0, 0)]))
    if rare(9):
        len_q, len_k = draw(st.sampled_from([(0, len_k), (len_q, 0), (0, 0), (len_q, 70)]))
    dim_v = draw(st.integers(1, 9)) if rare() else dim
    dtype = torch.float32 if simple else draw(st.sampled_from(DTYPES))
    heads = heads_kv * group
    randn = lambda *shape: torch.randn(shape, generator=generator, dtype=torch.float64).to(dtype)  # noqa: E731
    tensors = [
        randn(batch, heads, len_q, dim),
        randn(batch, heads_kv, len_k, dim),
        randn(batch, heads_kv, len_k, dim_v),
    ]
    layout = "" if simple else draw(st.sampled_from(["", "", "", "interleaved", "strided"]))
    if layout == "interleaved":
        tensors = [t.transpose(1, 2).contiguous().transpose(1, 2) for t in tensors]
    elif layout == "strided":
        tensors = [t.mT.contiguous().mT for t in tensors]
    if group > 1 or rare():
        options["enable_gqa"] = True
    if rare(3):
        options |= draw(st.sampled_from([{"is_causal": True}, {"causal": "top_left"}, {"causal": "bottom_right"}]))
    if rare(9):
        options["diagonal"] = draw(st.integers(-3, 3))
    if rare():
        options["window"] = draw(st.tuples(st.none() | st.integers(0, 5), st.none() | st.integers(0, 5)))
    if rare(8):
        options["softcap"] = draw(st.sampled_from([0.5, 2.0, 30.0]))
    if rare():
        options["scale"] = draw(st.sampled_from([0.0, 0.1, 1.0, -0.5]))
    if rare(9):
        options["dropout_p"], options["rng"] = 0.3, (draw(st.integers(0, 9)), 0)
    if rare(15):
        options["deterministic"] = True
    if rare(15):
        options["max_error"] = draw(st.sampled_from([1e-15, 1e-4, 0.5]))
    kinds = ["", "", "", "", "boolean", "additive", "additive", "plan", "packed", "paged", "fp8"]
    kind = "" if simple else draw(st.sampled_from(kinds))
    shape = (batch, heads, len_q, len_k)
    if kind in ("boolean", "additive"):
        kept_axes = [size if draw(st.booleans()) else 1 for size in shape]
        mask = torch.rand(kept_axes, generator=generator) < 0.7
        options["attn_mask"] = mask
        if kind == "additive":
            options["attn_mask"] = randn(*kept_axes).masked_fill(~mask, -math.inf)
    elif kind == "plan":
        options["block_plan"] = random_plan(shape, generator)
    elif kind == "packed" and heads:
        tensors, tables = packed(tensors, generator)
        options |= tables
    elif kind == "paged" and batch:
        tensors, tables = paged(tensors, generator)
        options |= tables
    elif kind == "fp8" and batch and heads:
        eighth = draw(st.sampled_from([torch.float8_e4m3fn, torch.float8_e5m2]))
        tensors[1:] = [t.to(eighth) for t in tensors[1:]]
        scales = torch.rand(2, batch, heads_kv, 1, 1, generator=generator) + 0.5
        options |= {"key_scale": scales[0], "value_scale": scales[1]}
    lse, grads = rare(3), ""
    if rare(2):
        grads = draw(st.sampled_from(["qkvm", "m"] if kind == "additive" else ["qkv", "q", "kv"]))
    damage, backend = "", draw(st.sampled_from(DEVICES))
    if rare(4):
        damage = draw(st.sampled_from(sorted(DAMAGE)))
        DAMAGE[damage](tensors, options)
    if backend:
        options["backend"] = backend
    if backend == "far":
        options["transfer"] = False
    return Call(tuple(tensors), options, lse, grads, damage)  # type: ignore[arg-type]


def aimed(generator: torch.Generator) -> Iterator[Call]:
    for backend, change, grads in AIMS:
        tensors = list(draw_tensors(generator, 2, 2, 3, 4, 8))
        options = change(tensors)
        yield Call(tuple(tensors), options | {"backend": backend}, False, grads, "")  # type: ignore[arg-type]


def random_plan(shape: tuple[int, ...], generator: torch.Generator) -> BlockPlan:
    len_q, len_k = shape[2:]
    rows, columns = -(-len_q // 4), -(-len_k // 3)
    most = max(min(columns, 2), 1)
    lists = torch.stack([torch.randperm(max(columns, 1), generator=generator)[:most] for _ in range(max(rows, 1))])
    counts = torch.randint(0, min(most, columns) + 1, (1, 1, rows), generator=generator)
    return BlockPlan(4, 3, lists[None, None, :rows].int().contiguous(), counts.int())


def packed(tensors: list[torch.Tensor], generator: torch.Generator) -> tuple[list[torch.Tensor], dict[str, Any]]:
    """The first of the batch, cut into three sequences, one perhaps empty."""
    tensors = [t[:1] if t.shape[0] else t.new_zeros((1, *t.shape[1:])) for t in tensors]
    ends = []
    for t in tensors[:2]:
        cuts = torch.randint(0, t.shape[2] + 1, (2,), generator=generator).sort().values
        ends.append(torch.cat([torch.zeros(1), cuts, torch.tensor([t.shape[2]])]).int())
    longest = [int(e.diff().max()) for e in ends]
    return tensors, {
        "cu_seqlens_q": ends[0],
        "cu_seqlens_k": ends[1],
        "max_seqlen_q": longest[0],
        "max_seqlen_k": longest[1],
    }


def paged(tensors: list[torch.Tensor], generator: torch.Generator) -> tuple[list[torch.Tensor], dict[str, Any]]:
    """Keys and values spread over pages of 3 in random order."""
    query, key, value = tensors
    batch, heads, length, _ = key.shape
    per = -(-length // 3)
    order = torch.randperm(batch * per + 2, generator=generator)
    cache = [t.new_full((batch * per + 2, heads, 3, t.shape[3]), math.nan) for t in (key, value)]
    for number in range(batch * per):
        sequence, page = divmod(number, per)
        for pages, t in zip(cache, (key, value), strict=True):
            part = t[sequence, :, 3 * page : 3 * page + 3]
            pages[order[number], :, : part.shape[1]] = part
    table = order[: batch * per].view(batch, per).int()
    return [query, *cache], {"page_table": table, "cache_seqlens": torch.full((batch,), length, dtype=torch.int32)}


@pytest.fixture
def devices(fake: Fake) -> dict[str, FakeBackend]:
    """One fake for each kind of refusal, beside the CPU."""

    def moody(request: hal.AttentionRequest, device: hal.Device) -> list[Refusal]:
        return [Refusal("device", "len_k", str(request.len_k), "even lengths")] if request.len_k % 2 else []

    def shut(backend: FakeBackend, device: hal.Device) -> Any:
        raise OSError("the card fell off the bus")

    some = {"lse", "backward", "grouped_heads", "strides", "value_dim"}
    return {
        "full": fake("full", time=1e-3),
        "explicit": fake("explicit", time=1e-3, autograd="explicit", capabilities=full(dtypes={"float32", "float64"})),
        "narrow": fake(
            "narrow",
            time=1e-9,
            capabilities=plain(head_dim=Choice({4, 8}), batch=Range(1, 2), heads=Range(1, 4), length=Range(1, 10)),
        ),
        "partial": fake("partial", time=1e-3, capabilities=full(features=some)),
        "moody": fake("moody", time=1e-3, check=moody),
        "small": fake("small", time=1e-3, memory=lambda r: 100 * r.len_q, device_memory=900),
        "model": fake("model", time=1e-12, fidelity="simulated"),
        "shut": fake("shut", time=1e-13, open=shut),
        "far": fake("far", time=1e-13, reads=("elsewhere",)),
        "ghost": fake("ghost", absent="no /dev/ghost0"),
    }


def close(x: torch.Tensor, want: torch.Tensor, bound: float, floor: float) -> bool:
    """||x - want|| <= bound * max(||want||, floor), infinities at the same places."""
    x, want = x.detach().double(), want.detach().double()
    infinite = want.isinf()
    if x.shape != want.shape or bool(x.isnan().any()) or not torch.equal(x[infinite], want[infinite]):
        return False
    return float((x - want)[~infinite].norm()) <= bound * max(float(want[~infinite].norm()), floor)


class Checker:
    """Runs a call, judges what comes of it, and counts."""

    def __init__(self) -> None:
        self.valid: Counter[str] = Counter()
        self.kinds: Counter[str] = Counter()
        self.codes: Counter[Code] = Counter()
        self.judged: Counter[str] = Counter()

    def state(self) -> Any:
        """What no call may change: plugins, selection, memory in use."""
        names = [(entry.spec.name, entry.failure) for entry in registry.entries()]
        used = {
            d.id: s.memory.stats().in_use
            for d in registry.devices()
            if (s := registry.entry(d.id).sessions.get(d.id)) is not None
        }
        return names, merged_policy(None, None, None, None) == Policy(), used

    def __call__(self, call: Call) -> None:
        tensors, options = list(call.tensors), dict(call.options)
        if call.grads:
            tensors = [
                t.detach().requires_grad_()
                if name in call.grads and isinstance(t, torch.Tensor) and t.dtype.itemsize > 1 and t.is_floating_point()
                else t
                for name, t in zip("qkv", tensors, strict=True)
            ]
            mask = options.get("attn_mask")
            if "m" in call.grads and mask is not None and mask.is_floating_point():
                options["attn_mask"] = mask.detach().requires_grad_()
        watched = [t for t in (*tensors, *options.values()) if isinstance(t, torch.Tensor) and t.device.type == "cpu"]
        before = [(t.detach().clone(), t._version) for t in watched]
        state, rng = self.state(), torch.get_rng_state()
        try:
            decision = hal.explain(*tensors, return_lse=call.lse, **options)
            self.codes.update({r.code for c in decision.candidates for r in c.refusals})
            result = hal.attention(*tensors, return_lse=call.lse, **options)
        except hal.HalError as error:
            failure: hal.HalError | None = error
        else:
            failure = None
        if failure is not None:
            self.kinds[type(failure).__name__] += 1
            assert str(failure).strip()
            assert torch.equal(torch.get_rng_state(), rng)
        else:
            assert not call.damage or self.harmless(call), f"{call.damage} was taken"
            self.valid[decision.chosen or ""] += 1
            self.judge(call, tensors, options, result, decision)
        for tensor, (copy, version) in zip(watched, before, strict=True):
            assert tensor._version == version
            now, was = ((t.float() if t.is_floating_point() else t).nan_to_num() for t in (tensor.detach(), copy))
            assert torch.equal(now, was)
        found = self.state()
        assert found[:2] == state[:2]
        assert all(found[2][name] == bytes_used for name, bytes_used in state[2].items())

    def harmless(self, call: Call) -> bool:
        """Damage that happens to give another sound call."""
        shapes = [tuple(t.shape) for t in call.tensors if isinstance(t, torch.Tensor)]
        return 0 in [size for shape in shapes for size in shape] or call.damage == "three heads too many"

    def judge(
        self, call: Call, tensors: list[Any], options: dict[str, Any], result: Any, decision: hal.Decision
    ) -> None:
        out, lse = result if call.lse else (result, None)
        request, winner = decision.request, decision.winner
        numerics = registry.backend_of(winner.device).capabilities(winner.device).numerics[request.dtype]
        named = {name: options[name] for name in SequenceMetadata._fields if name in options}
        given: dict[str, Any] = {"request": request, "plan": options.get("block_plan")}
        given["tables"] = SequenceMetadata(**named) if named else None
        if request.dropout:
            if winner.device.vendor != "fake":  # nobody but a fake tells which weights it keeps: they must repeat
                again = hal.attention(*tensors, return_lse=call.lse, **options)
                assert torch.equal((again.out if call.lse else again).nan_to_num(), out.nan_to_num())
                return
            shape = (request.batch, request.heads_q, request.len_q, request.len_k)
            given["keep"] = kept(shape, request, options["rng"]) != 0
        detached = [t.detach() for t in tensors]
        mask = options.get("attn_mask")
        want = reference(*detached, None if mask is None else mask.detach(), **given)
        assert out.dtype == tensors[0].dtype
        assert close(out, want.out, 2 * numerics.relative, 1e-3 * math.sqrt(out.numel()))
        if lse is not None:
            assert close(lse, want.lse, 2 * numerics.lse, math.sqrt(lse.numel()))
        told = {
            "dropout": request.dropout,
            "packed": request.packed,
            "paged": request.page_size,
            "plan": request.block_plan,
            "FP8": request.cache_dtype,
            "lse": request.lse,
            "gradients": request.grads,
            "mask": mask is not None,
        }
        self.judged.update(name for name, asked in told.items() if asked)
        if not request.grads:
            return
        leaves = [t for t in (*tensors, mask) if isinstance(t, torch.Tensor) and t.requires_grad]
        outs = [out] if lse is None else [out, lse]
        flowing = [torch.ones_like(o) for o in outs]
        assert out.requires_grad
        through = [
            (o, f) for o, f in zip(outs, flowing, strict=True) if o.requires_grad
        ]  # of no keys, lse is a constant
        got = torch.autograd.grad(
            [o for o, _ in through], leaves, [f for _, f in through], allow_unused=True, materialize_grads=True
        )
        wanted = reference_gradients(
            *detached,
            None if mask is None else mask.detach(),
            grad_out=flowing[0],
            grad_lse=flowing[1] if lse is not None else None,
            **given,
        )
        bound = 4 * (numerics.gradient or numerics.relative)
        present = [g for g in wanted if g is not None]
        for leaf, mine, theirs in zip(leaves, got, present, strict=True):
            assert close(mine, theirs, bound, math.sqrt(leaf.numel())), (leaf.shape, call)


def test_random_calls_give_a_right_result_or_an_error(
    cpu: str, devices: dict[str, FakeBackend], generator: torch.Generator
) -> None:
    checker = Checker()
    for call in aimed(generator):
        checker(call)

    @hypothesis.given(calls())
    def check(call: Call) -> None:
        checker(call)

    check()
    runs, valid = sum(checker.kinds.values()) + sum(checker.valid.values()), sum(checker.valid.values())
    refused = {str(code): count for code, count in checker.codes.items()}
    print(f"{runs} calls, {valid} valid: {dict(checker.valid)}")
    print(f"compared: {dict(checker.judged)}; errors: {dict(checker.kinds)}")
    print(f"refusals: {refused}")
    assert runs >= hypothesis.settings.default.max_examples
    assert valid >= 0.4 * runs
    asked_by_use = {Code.ACCESS, Code.OPTION, Code.TILING}  # no argument of a plain call: tested where they are set
    assert set(checker.codes) == set(Code) - asked_by_use
    assert {"cpu:0", "full:0", "explicit:0", "narrow:0", "partial:0", "moody:0", "small:0", "model:0"} <= set(
        checker.valid
    )
    assert set(checker.judged) == {"dropout", "packed", "paged", "plan", "FP8", "lse", "gradients", "mask"}
    assert set(checker.kinds) == {"ContractError", "UnsupportedError", "UnknownBackendError", "DeviceUnavailableError"}
