"""The computation, tile by tile as the session's tiling cuts it. Change `_tile` to call your device."""

from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from hal_core.plugin_api import AttentionOutput, DenseTiling, SessionBase, Tile, TilePlan

BLOCK = 128


class TemplateSession(SessionBase):
    def __init__(self) -> None:
        super().__init__(tiling=DenseTiling(cut_by="template"))

    def prepare_attention(
        self, query: Tensor, key: Tensor, value: Tensor, tile_size: int | None = None, **call: Any
    ) -> Any:
        tiling = DenseTiling(tile_size, cut_by="template") if tile_size else self.tiling
        return query, key, value, call["request"], call.get("plan"), tiling

    def compute_attention(self, prepared: Any, mask: Tensor | None = None, **call: Any) -> AttentionOutput:
        query, key, value, request, plan, tiling = prepared
        query, out = query if call.get("query") is None else call["query"], call.get("out")
        batch, heads, len_q, _ = query.shape
        plan = plan or tiling.plan(replace(request, len_q=len_q, len_k=key.shape[2]), {"maximum": BLOCK})
        mask = None if mask is None else mask.expand(batch, heads, len_q, key.shape[2])
        out = query.new_zeros((batch, heads, len_q, value.shape[3])) if out is None else out.zero_()
        with self.scratch((batch, heads, len_q), "float32") as lse:  # from the session's memory: it is no result
            lse.fill_(-torch.inf)  # a row that may read no key keeps it, and its output of 0
            for b, h in ((b, h) for b in range(batch) for h in range(heads)):
                kv = h * request.heads_kv // heads  # query head h reads key head h // (heads_q // heads_kv)
                operands = query[b, h], key[b, kv], value[b, kv], out[b, h], lse[b, h]
                for tile in plan.tiles():
                    self._tile(plan, tile, None if mask is None else mask[b, h], request.effective_scale, *operands)
            return AttentionOutput(out, lse.clone() if request.lse else None)

    def _tile(self, plan: TilePlan, tile: Tile, mask: Tensor | None, scale: float, *operands: Tensor) -> None:
        """Merge one tile into out [len_q, dim_v] and lse [len_q]: the online softmax of Milakov & Gimelshein 2018."""
        rows, keys = slice(tile.q_start, tile.q_stop), slice(tile.k_start, tile.k_stop)
        query, key, value, out, lse = (x[keys if i in (1, 2) else rows] for i, x in enumerate(operands))
        scores = torch.mm(query, key.T).mul_(scale)
        if not tile.full:  # causal or window hide a part of it
            spans = torch.tensor([plan.visible(row) for row in range(rows.start, rows.stop)]).unsqueeze(-1)
            columns = torch.arange(keys.start, keys.stop)
            scores.masked_fill_((columns < spans[:, 0]) | (columns >= spans[:, 1]), -torch.inf)
        if mask is not None:
            scores.masked_fill_(~mask[rows, keys], -torch.inf)
        total = torch.logaddexp(lse, torch.logsumexp(scores, dim=-1))
        finite = total.clamp(min=torch.finfo(total.dtype).min).unsqueeze(-1)
        out.mul_(torch.exp(lse.unsqueeze(-1) - finite)).addmm_(scores.sub_(finite).exp_(), value)
        lse.copy_(total)
