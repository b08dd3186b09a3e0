"""What `hal bench cuda:0` adds: this package's kernels and the installed peers as columns, clocks, power and ceilings.

Peers are other attention kernels, timed beside this package's own; none of them is a dependency. Torch's cuDNN and
FlashAttention-2 are always there; FlashAttention-4, FlashInfer and cuDNN's own frontend where they are installed.
"""

from __future__ import annotations

import importlib
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from importlib.metadata import PackageNotFoundError, version
from importlib.util import find_spec
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel

from hal_core.plugin_api import AttentionRequest, BenchSetup, Call, Causal, Ceilings, Device, SequenceMetadata

from . import paths
from .calibrate import on_path
from .cost import OWN, Rates
from .discovery import Chip
from .runtime import nvml

_SDPA = torch._C._nn.scaled_dot_product_attention  # torch's, whatever took its place in torch.nn.functional


class Library(NamedTuple):
    """An optional library: its name, the module that is imported, the distribution that holds it, what it is timed
    for.
    """

    name: str
    module: str
    distribution: str
    purpose: str


LIBRARIES = (
    Library("FlashAttention-4", "flash_attn.cute", "flash-attn-4", "full and causal calls, packed lengths"),
    Library("FlashInfer", "flashinfer", "flashinfer-python", "decode, packed lengths"),
    Library("cuDNN frontend", "cudnn", "nvidia-cudnn-frontend", "sliding windows"),
)


class Peers:
    """The peers of this process.

    Attributes:
        versions: the distribution's version of each installed library, by name, with torch's own two.
        notes: a sentence for each library that is not installed, and for each call that a peer refused.
    """

    def __init__(self) -> None:
        self.versions = {"FA2": f"torch {torch.__version__}", "cuDNN": str(torch.backends.cudnn.version())}
        self.notes: list[str] = []
        self._modules: dict[str, Any] = {}
        for library in LIBRARIES:
            module = _import(library, self.notes)
            if module is not None:
                self._modules[library.name] = module
                self.versions[library.name] = _version(library)

    def dense(self, query: Tensor, key: Tensor, value: Tensor, causal: bool = False) -> dict[str, Call]:
        """Peers that run a full or top-left causal call on [batch, heads, length, dim] of equal head counts, by
        name.
        """
        return self._running(
            list(query.shape),
            _torch_calls(query, key, value, is_causal=causal) | self._fa4(query, key, value, causal=causal),
        )

    def window(self, query: Tensor, key: Tensor, value: Tensor, left: int) -> dict[str, Call]:
        """Peers that let each query read its own key and the `left` keys before it."""
        flash, length = torch.ops.aten._flash_attention_forward, query.shape[2]
        rows = [t.transpose(1, 2).contiguous() for t in (query, key, value)]
        calls: dict[str, Call] = {
            "FA2": lambda: flash(
                *rows, None, None, length, length, 0.0, True, False, window_size_left=left, window_size_right=0
            )
        }
        if cudnn := self._modules.get("cuDNN frontend"):
            try:
                calls["cuDNN"] = _window_graph(cudnn, query, key, value, left)
            except Exception as error:
                self.notes.append(f"cuDNN did not plan a window of {left + 1}: {_first_line(error)}")
        return self._running(list(query.shape), calls | self._fa4(query, key, value, window_size=(left, 0)))

    def decode(self, query: Tensor, key: Tensor, value: Tensor) -> dict[str, Call]:
        """Peers of one query token on contiguous keys; FlashInfer reads the same keys in pages of 16."""
        calls = _torch_calls(query, key, value, enable_gqa=True)
        if "FlashInfer" in self._modules and not key.shape[2] % 16:
            batch, heads, length, dim = key.shape
            pages = [
                t.view(batch, heads, -1, 16, dim).transpose(1, 2).reshape(-1, heads, 16, dim) for t in (key, value)
            ]
            table = torch.arange(batch * length // 16, dtype=torch.int32, device=key.device).view(batch, -1)
            held = torch.full((batch,), length, dtype=torch.int32, device=key.device)
            calls |= self._flashinfer(query, pages[0], pages[1], SequenceMetadata(page_table=table, cache_seqlens=held))
        return self._running(list(query.shape), calls)

    def paged(self, query: Tensor, key: Tensor, value: Tensor, tables: SequenceMetadata) -> dict[str, Call]:
        """Peers of one query token on pages [pages, heads, page size, dim]: FlashInfer, on either of its two
        kernels.
        """
        calls = self._flashinfer(query, key, value, tables) if "FlashInfer" in self._modules else {}
        return self._running(list(query.shape), calls)

    def packed(
        self, query: Tensor, key: Tensor, value: Tensor, ends: Tensor, longest: int, causal: bool
    ) -> dict[str, Call]:
        """Peers over sequences side by side in a batch of 1, equally long in queries and keys.

        Args:
            query, key, value: [1, heads, tokens, dim]. ends: int32 [sequences + 1], cumulative lengths; longest: of
                them.
        """
        flash = torch.ops.aten._flash_attention_forward
        rows = [t[0].transpose(0, 1).contiguous() for t in (query, key, value)]
        calls: dict[str, Call] = {
            "FA2": lambda: _packed_result(flash(*rows, ends, ends, longest, longest, 0.0, causal, False)[0])
        }
        module = self._modules.get("FlashAttention-4")
        varlen = getattr(module, "flash_attn_varlen_func", None)
        if varlen is not None:
            calls["FA4"] = lambda: _packed_result(
                varlen(
                    *rows,
                    cu_seqlens_q=ends,
                    cu_seqlens_k=ends,
                    max_seqlen_q=longest,
                    max_seqlen_k=longest,
                    causal=causal,
                )[0]
            )
        elif module is not None:
            self.notes.append("FlashAttention-4 has no call for packed lengths in this installation")
        if "FlashInfer" in self._modules and (run := self._flashinfer_packed(query, key, ends, causal)) is not None:
            calls["FlashInfer"] = lambda: _packed_result(run(*rows))
        return self._running(list(query.shape), calls)

    def _fa4(self, query: Tensor, key: Tensor, value: Tensor, **options: Any) -> dict[str, Call]:
        module = self._modules.get("FlashAttention-4")
        if module is None:
            return {}
        rows = [t.transpose(1, 2).contiguous() for t in (query, key, value)]
        return {"FA4": lambda: module.flash_attn_func(*rows, **options)[0].transpose(1, 2)}

    def _flashinfer(self, query: Tensor, key: Tensor, value: Tensor, tables: SequenceMetadata) -> dict[str, Call]:
        """Both kernels that FlashInfer has for decode, planned as its users plan them: once for many layers."""
        calls: dict[str, Call] = {}
        table, held = tables.page_table.cpu(), tables.cache_seqlens.cpu()
        page, rows = key.shape[2], query[:, :, 0].contiguous()
        pages = (held + page - 1) // page
        ends = torch.cat([pages.new_zeros(1), pages.cumsum(0)]).to(torch.int32)
        indices = torch.cat([row[:count] for row, count in zip(table, pages.tolist(), strict=True)]).to(query.device)
        last = ((held - 1) % page + 1).to(torch.int32)
        for name, tensor_cores in (("FlashInfer", False), ("FlashInfer, tensor cores", True)):
            workspace = torch.empty(128 << 20, dtype=torch.uint8, device=query.device)
            try:
                wrapper = self._modules["FlashInfer"].BatchDecodeWithPagedKVCacheWrapper(
                    workspace, "HND", use_tensor_cores=tensor_cores
                )
                wrapper.plan(
                    ends.to(query.device),
                    indices,
                    last.to(query.device),
                    query.shape[1],
                    key.shape[1],
                    query.shape[3],
                    page,
                    q_data_type=query.dtype,
                    kv_data_type=key.dtype,
                )
            except Exception as error:
                self.notes.append(f"{name} did not plan {list(query.shape)}: {_first_line(error)}")
                continue
            calls[name] = partial(_unsqueezed, wrapper, rows, (key, value))
        return calls

    def _flashinfer_packed(
        self, query: Tensor, key: Tensor, ends: Tensor, causal: bool
    ) -> Callable[..., Tensor] | None:
        """FlashInfer's call on [tokens, heads, dim], by the kernel it prefers or else its FlashAttention-2, or None."""
        for backend in ("auto", "fa2"):
            workspace = torch.empty(128 << 20, dtype=torch.uint8, device=query.device)
            try:
                wrapper = self._modules["FlashInfer"].BatchPrefillWithRaggedKVCacheWrapper(
                    workspace, "NHD", backend=backend
                )
                wrapper.plan(
                    ends,
                    ends,
                    query.shape[1],
                    key.shape[1],
                    query.shape[3],
                    causal=causal,
                    q_data_type=query.dtype,
                    kv_data_type=key.dtype,
                )
            except Exception as error:
                dim, reason = query.shape[3], _first_line(error)[:150]
                self.notes.append(f"FlashInfer ({backend}) did not plan packed lengths of head size {dim}: {reason}")
                continue
            return wrapper.run  # type: ignore[no-any-return]
        return None

    def _running(self, shape: list[int], calls: Mapping[str, Call]) -> dict[str, Call]:
        """Calls that run; a sentence is noted for each that does not."""
        found = {}
        for name, call in calls.items():
            try:
                call()
                torch.cuda.synchronize()
                found[name] = call
            except Exception as error:
                self.notes.append(f"{name} does not run {shape}: {_first_line(error)}")
        return found


def _torch_calls(query: Tensor, key: Tensor, value: Tensor, **options: Any) -> dict[str, Call]:
    return {
        "cuDNN": partial(_native, SDPBackend.CUDNN_ATTENTION, query, key, value, **options),
        "FA2": partial(_native, SDPBackend.FLASH_ATTENTION, query, key, value, **options),
    }


def _native(backend: SDPBackend, query: Tensor, key: Tensor, value: Tensor, **options: Any) -> Any:
    with sdpa_kernel(backend):
        return _SDPA(query, key, value, **options)


def _unsqueezed(wrapper: Any, rows: Tensor, cache: tuple[Tensor, Tensor]) -> Tensor:
    out: Tensor = wrapper.run(rows, cache)
    return out[:, :, None]


def _packed_result(rows: Tensor) -> Tensor:
    """[tokens, heads, dim] as [1, heads, tokens, dim]."""
    return rows.transpose(0, 1)[None]


def _window_graph(cudnn: Any, query: Tensor, key: Tensor, value: Tensor, left: int) -> Call:
    """A cuDNN graph of attention in a sliding window; its left bound counts the query's own key."""
    handle = cudnn.create_handle()
    cudnn.set_stream(handle=handle, stream=torch.cuda.current_stream().cuda_stream)
    kind = {torch.bfloat16: cudnn.data_type.BFLOAT16, torch.float16: cudnn.data_type.HALF}[query.dtype]
    wide = cudnn.data_type.FLOAT
    graph = cudnn.pygraph(io_data_type=kind, intermediate_data_type=wide, compute_data_type=wide, handle=handle)
    given = [graph.tensor_like(t) for t in (query, key, value)]
    out, _ = graph.sdpa(
        name="window",
        q=given[0],
        k=given[1],
        v=given[2],
        generate_stats=False,
        attn_scale=query.shape[3] ** -0.5,
        diagonal_alignment=cudnn.diagonal_alignment.TOP_LEFT,
        diagonal_band_left_bound=left + 1,
        diagonal_band_right_bound=0,
    )
    result = torch.empty_like(query)
    out.set_output(True).set_dim(result.size()).set_stride(result.stride())
    graph.validate()
    graph.build_operation_graph()
    graph.create_execution_plans([cudnn.heur_mode.A])
    graph.check_support()
    graph.build_plans()
    workspace = torch.empty(max(graph.get_workspace_size(), 1), dtype=torch.uint8, device=query.device)
    tensors = dict(zip([*given, out], [query, key, value, result], strict=True))

    def run() -> Tensor:
        graph.execute(tensors, workspace, handle=handle)
        return result

    return run


def _import(library: Library, notes: list[str]) -> Any:
    """The library's module; None, with a sentence in `notes`, where it is not installed or fails to import."""
    try:
        present = find_spec(library.module) is not None
    except ModuleNotFoundError:
        present = False
    if not present:
        notes.append(
            f"{library.name} is not installed (timed for {library.purpose}): pip install {library.distribution}"
        )
        return None
    try:
        return importlib.import_module(library.module)
    except Exception as error:  # a broken installation is as good as none
        notes.append(f"{library.name} is installed and fails to import: {_first_line(error)}")
        return None


def _version(library: Library) -> str:
    try:
        return version(library.distribution)
    except PackageNotFoundError:
        return "of unknown version"


def _first_line(error: Exception) -> str:
    return f"{type(error).__name__}: {str(error).splitlines()[0] if str(error) else 'no message'}"


#: Columns of the own kernels, by path.
COLUMNS = {"hopper": "own Hopper", "masked": "own Hopper", "portable": "own Triton"}


class CudaBench:
    """One GPU under `hal bench`. The second-level cache is flushed before each call, so that every read comes from
    memory.
    """

    def __init__(
        self, device: Device, chip: Chip, rates: Rates, gpu: nvml.Gpu | None, peers: Peers | None = None
    ) -> None:
        self._device, self._chip, self._rates, self._gpu = device, chip, rates, gpu
        self._peers = peers or Peers()

    def setup(self) -> BenchSetup:
        cache = torch.empty(256 << 20, dtype=torch.uint8, device=self._device.reads[0])
        ceilings = Ceilings(self._rates.matrix, self._rates.bandwidth, self._rates.source)
        flush = partial(
            cache.random_, 0, 7
        )  # slower than zeros: the device is still busy when a call has been prepared
        return BenchSetup(self.calls, self.conditions, self.notes, flush, ceilings)

    def calls(self, request: AttentionRequest, query: Tensor, key: Tensor, value: Tensor) -> dict[str, Call]:
        """Every own kernel that is right for the request, each alone, then the peers."""
        given = (query, key, value)
        names = [path for path in paths.candidates(request, self._chip) if path in OWN]
        own = {COLUMNS[path]: self._bound(path, request, given) for path in names}
        if request.dtype not in ("bfloat16", "float16") or request.causal is Causal.BOTTOM_RIGHT:
            return own
        return own | self._peers.dense(*given, causal=request.causal is Causal.TOP_LEFT)

    def _bound(self, path: str, request: AttentionRequest, given: Sequence[Tensor]) -> Callable[[], Any]:
        return partial(on_path(self._device, self._chip, self._rates, path, request), *given)

    def conditions(self) -> dict[str, Any]:
        """Clocks in MHz and board power in watts as they are now, and the driver; nothing where NVML does not
        answer.
        """
        if self._gpu is None:
            return {}
        try:
            return {
                "SM MHz": self._gpu.clock("sm"),
                "memory MHz": self._gpu.clock("memory"),
                "W": round(self._gpu.power()),
                "driver": self._device.driver,
            }
        except nvml.NvmlError:
            return {}

    def notes(self) -> list[str]:
        versions = ", ".join(f"{name} {version}" for name, version in self._peers.versions.items())
        return [
            f"own columns run one kernel of this package alone, hal and bound what dispatch chose; peers: {versions}",
            "second-level cache flushed before each call",
            *self._peers.notes,
        ]
