"""One rank of the tests: reads calls from standard input, runs them with the other ranks, writes what they returned.

Started by `ranks.Ranks`; a call names a function of this file.
"""

from __future__ import annotations

import os
import pickle
import sys
import traceback
from typing import Any
from unittest import mock

import hal_parallel
import torch
import torch.distributed as dist
from hal_parallel import strategies, unshard
from hal_parallel.draws import Draws
from hal_parallel.layout import TokenLayout, make_layout, shard
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh

import hal_core as hal

INFINITY = float("inf")


def draw(case: dict[str, Any]) -> dict[str, Any]:
    """Whole query, key, value, mask and the gradients that flow back, equal on every rank."""
    g = torch.Generator().manual_seed(case.get("seed", 0))
    dtype = getattr(torch, case.get("dtype", "float32"))
    batch, heads, heads_kv, len_q, len_k, dim, dim_v = (
        case.get(name, default)
        for name, default in (
            ("batch", 1),
            ("heads", 4),
            ("heads_kv", 4),
            ("len_q", 24),
            ("len_k", None),
            ("dim", 8),
            ("dim_v", None),
        )
    )
    len_k, dim_v = len_q if len_k is None else len_k, dim if dim_v is None else dim_v

    def normal(*shape: int) -> torch.Tensor:
        return torch.randn(*shape, generator=g, dtype=torch.float64).to(dtype)

    found = {"query": normal(batch, heads, len_q, dim), "key": normal(batch, heads_kv, len_k, dim)}
    found |= {"value": normal(batch, heads_kv, len_k, dim_v), "grad_out": normal(batch, heads, len_q, dim_v)}
    kind, shape = case.get("mask"), (batch, case.get("mask_heads", 1), case.get("mask_rows", len_q), len_k)
    if kind == "boolean":
        found["mask"] = torch.rand(*shape, generator=g) > 0.3
    elif kind == "additive":
        found["mask"] = normal(*shape)
    else:
        found["mask"] = None
    found["grad_lse"] = normal(batch, heads, len_q).to(torch.promote_types(dtype, torch.float32))
    return found


def finite(lse: torch.Tensor) -> torch.Tensor:
    return lse.masked_fill(lse == -INFINITY, 0)


def tables(case: dict[str, Any]) -> dict[str, Any]:
    names = ("cu_seqlens_q", "cu_seqlens_k")
    return {name: torch.tensor(case[name], dtype=torch.int32) for name in names if name in case}


def reference(case: dict[str, Any], tensors: dict[str, Any]) -> dict[str, torch.Tensor]:
    """One process on the CPU device."""
    wanted = [n for n in ("query", "key", "value", "mask") if tensors[n] is not None and tensors[n].is_floating_point()]
    leaves = {
        n: tensors[n].detach().clone().requires_grad_(n in wanted and case.get("grads", True))
        for n in ("query", "key", "value")
    }
    mask = tensors["mask"]
    if mask is not None and mask.is_floating_point():
        mask = leaves["mask"] = mask.detach().clone().requires_grad_(case.get("grads", True))
    options = dict(case.get("options", {}), enable_gqa=True) | tables(case)
    if options.get("dropout_p"):
        out, lse = dense_dropout(leaves, mask, options)
    else:
        out, lse = hal.attention(
            leaves["query"], leaves["key"], leaves["value"], mask, return_lse=True, backend="cpu", **options
        )
    found = {"out": out.detach(), "lse": lse.detach()}
    if case.get("grads", True):
        grads = torch.autograd.grad(
            (out, finite(lse)), list(leaves.values()), (tensors["grad_out"], tensors["grad_lse"])
        )
        found |= dict(zip(leaves, grads, strict=True))
    return found


def dense_dropout(leaves: dict[str, Any], mask: Any, options: dict[str, Any]) -> tuple[torch.Tensor, torch.Tensor]:
    """Attention whose dropped pairs are those of `hal_parallel.draws`, all pairs at once."""
    query, key, value = (leaves[name].double() for name in ("query", "key", "value"))
    group = query.shape[1] // key.shape[1]
    scores = query @ key.repeat_interleave(group, 1).mT * query.shape[3] ** -0.5
    rows, keys = torch.arange(scores.shape[2]), torch.arange(scores.shape[3])
    if options.get("is_causal"):
        scores = scores.masked_fill(keys > rows[:, None], -INFINITY)
    if mask is not None:
        scores = scores + mask if mask.is_floating_point() else scores.masked_fill(~mask, -INFINITY)
    lse = scores.logsumexp(-1)
    keep = Draws(options["dropout_p"], options["rng"]).keep(*scores.shape[:2], rows, keys)
    weights = (scores - finite(lse)[..., None]).exp() * keep / (1 - options["dropout_p"])
    out = weights @ value.repeat_interleave(group, 1)
    return out.to(leaves["query"].dtype), lse.to(torch.promote_types(leaves["query"].dtype, torch.float32))


def layouts(case: dict[str, Any], world: int) -> tuple[TokenLayout, TokenLayout]:
    if "indices" in case:
        return TokenLayout.of(case["indices"]), TokenLayout.of(case["indices"])
    name, len_q = case.get("layout", "contiguous"), case.get("len_q", 24)
    len_k = case.get("len_k", len_q)
    names = name if isinstance(name, tuple) else (name, name)
    return make_layout(names[0], len_q, world), make_layout(names[1], len_k, world)


def sharded(case: dict[str, Any], mesh: Any, tensors: dict[str, Any], rank: int, world: int) -> dict[str, torch.Tensor]:
    """The same call on this rank's tokens."""
    rows, columns = layouts(case, world)
    parts = {"query": shard(tensors["query"], rows, rank)}
    parts |= {n: shard(tensors[n], columns, rank) for n in ("key", "value")}
    mask = tensors["mask"]
    if mask is not None:
        parts["mask"] = mask if mask.shape[2] == 1 else shard(mask, rows, rank)
    grads = case.get("grads", True)
    leaves = {n: t.detach().clone().requires_grad_(grads and t.is_floating_point()) for n, t in parts.items()}
    out, lse = hal_parallel.attention(
        leaves["query"],
        leaves["key"],
        leaves["value"],
        mesh,
        leaves.get("mask"),
        layout=(rows, columns) if "indices" in case else case.get("layout", "contiguous"),
        strategy=case.get("strategy", "ring"),
        length=(rows.length, columns.length),
        return_lse=True,
        backend=case.get("backend", "cpu"),
        enable_gqa=True,
        timeout=case.get("timeout", 60),
        **case.get("options", {}),
        **tables(case),
    )
    found = {"out": out.detach(), "lse": lse.detach()}
    if grads:
        flowing = shard(tensors["grad_out"], rows, rank), shard(tensors["grad_lse"], rows, rank)
        needed = {n: t for n, t in leaves.items() if t.requires_grad}
        found |= dict(zip(needed, torch.autograd.grad((out, finite(lse)), list(needed.values()), flowing), strict=True))
    return found


def compare(case: dict[str, Any], mesh: Any, rank: int, world: int) -> dict[str, float]:
    """Errors of this rank's results against its part of one process's: ||x - reference|| / ||whole reference||."""
    tensors = draw(case)
    got, want = sharded(case, mesh, tensors, rank, world), reference(case, tensors)
    rows, columns = layouts(case, world)
    errors = {}
    for name, whole in want.items():
        layout = columns if name in ("key", "value") else rows
        held = layout.indices(rank) >= 0
        part = whole
        if not (name == "mask" and whole.shape[2] == 1):
            part = shard(whole, layout, rank)[:, :, held]
            assert got[name].shape[2] == layout.local
            padding = got[name][:, :, ~held]
            assert (padding == (-INFINITY if name == "lse" else 0)).all(), f"{name} of padding"
            got[name] = got[name][:, :, held]
        if name == "lse":
            assert ((part == -INFINITY) == (got[name] == -INFINITY)).all()
            part, got[name], whole = finite(part), finite(got[name]), finite(whole)
        if name == "mask" and whole.shape[2] == 1:
            total = got[name].clone()
            dist.all_reduce(total, group=mesh if not isinstance(mesh, DeviceMesh) else None)
            got[name] = total
        norm = float(whole.double().norm())
        errors[name] = float((got[name].double() - part.double()).norm()) / (norm or 1.0)
    return errors


def compare_all(mesh: Any, rank: int, world: int, cases: list[dict[str, Any]]) -> list[dict[str, float]]:
    return [compare(case, mesh, rank, world) for case in cases]


def compare_by_heads(mesh: Any, rank: int, world: int, cases: list[dict[str, Any]]) -> list[dict[str, float]]:
    """The same where every head travels for itself, as heads of long sequences do."""
    parts, before = [], strategies.cut
    with mock.patch.multiple(
        strategies, _TOGETHER=1, cut=lambda *given: parts.append(len(found := before(*given))) or found
    ):
        errors = compare_all(mesh, rank, world, cases)
    assert max(parts) > 1
    return errors


def results(mesh: Any, rank: int, world: int, cases: list[dict[str, Any]]) -> list[dict[str, torch.Tensor]]:
    """This rank's results, for tests that compare worlds."""
    return [sharded(case, mesh, draw(case), rank, world) for case in cases]


def drawn_dropout(mesh: Any, rank: int, world: int, cases: list[dict[str, Any]]) -> list[float]:
    """The keys' gradients of all ranks together say which pairs every rank dropped."""
    torch.manual_seed(torch.randint(1 << 30, ()).item() + rank)
    parts = [unshard(result["out"], mesh) for result in results(mesh, rank, world, cases)]
    return [float(part.double().sum()) for part in parts]


def refused(mesh: Any, rank: int, world: int, cases: list[list[dict[str, Any]]]) -> list[str]:
    """What each call says that is given other arguments on each rank."""
    said = []
    for case in cases:
        try:
            sharded(case[rank], mesh, draw(case[rank]), rank, world)
            said.append("")
        except hal.HalError as error:
            said.append(f"{type(error).__name__}: {error}")
    return said


def tried(mesh: Any, rank: int, world: int, cases: list[dict[str, Any]]) -> list[Any]:
    """Errors of each call, or what refused it."""
    found: list[Any] = []
    for case in cases:
        try:
            found.append(compare(case, mesh, rank, world))
        except hal.HalError as error:
            found.append(f"{type(error).__name__}: {error}")
    return found


def called(mesh: Any, rank: int, world: int, code: str, **given: Any) -> Any:
    """A function of another test file, named file:function."""
    import importlib.util

    path, _, name = code.rpartition(":")
    spec = importlib.util.spec_from_file_location("called", path)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return getattr(module, name)(mesh, rank, world, **given)


def serve() -> None:
    answers = os.fdopen(os.dup(sys.stdout.fileno()), "wb")
    os.dup2(sys.stderr.fileno(), sys.stdout.fileno())  # what is printed must not disturb the answers
    rank, world = int(os.environ["RANK"]), int(os.environ["WORLD_SIZE"])
    torch.set_num_threads(1)
    dist.init_process_group("gloo")
    groups: dict[Any, Any] = {size: dist.new_group(list(range(size))) for size in (1, 2, world)}
    groups["2x2"] = init_device_mesh("cpu", (2, world // 2), mesh_dim_names=("ring", "heads"))
    groups["mesh"] = init_device_mesh("cpu", (world,), mesh_dim_names=("ring",))
    while True:
        try:
            name, place, arguments = pickle.load(sys.stdin.buffer)
        except EOFError:
            break
        size = place if isinstance(place, int) else world
        try:
            answer = (True, globals()[name](groups[place], rank, size, **arguments) if rank < size else None)
        except BaseException:
            answer = (False, traceback.format_exc())
        pickle.dump(answer, answers)
        answers.flush()
    dist.destroy_process_group()


if __name__ == "__main__":
    serve()
