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

    def prepare_attention(self, query: Tensor, key: Tensor, value: Tensor, tile_size: Any = None, **call: Any) -> Any:
        tiling = DenseTiling(tile_size, cut_by="template") if tile_size else self.tiling
        return query, key, value, call["request"], call.get("plan"), tiling

    def compute_attention(self, prepared: Any, mask: Tensor | None = None, **call: Any) -> AttentionOutput:
        query, key, value, request, plan, tiling = prepared
        query, out = query if call.get("query") is None else call["query"], call.get("out")
        own = tiling.plan(replace(request, len_q=query.shape[2], len_k=key.shape[2]), {"maximum": BLOCK})
        plan = plan if plan and plan.len_q == query.shape[2] else own  # a plan is for the query that was prepared
        mask = None if mask is None else mask.expand(*query.shape[:3], key.shape[2])
        out = query.new_empty((*query.shape[:3], value.shape[3])) if out is None else out
        with self.scratch(query.shape[:3], "float32") as lse:  # from the session's memory: it is no result
            self._attend(plan, request, query, key, value, mask, out, lse)
            kept = lse.clone() if request.lse else None
            del lse  # the pool reuses memory that nobody holds: views of it lived in _attend alone
        return AttentionOutput(out, kept)

    def _attend(self, plan: TilePlan, request: Any, query: Any, key: Any, value: Any, mask: Any, *into: Tensor) -> None:
        out, lse = into[0].zero_(), into[1].fill_(-torch.inf)  # which a row keeps that may read no key
        for b, h in ((b, h) for b in range(query.shape[0]) for h in range(request.heads_q)):
            kv = h // (request.heads_q // request.heads_kv)  # the key head that query head h reads
            operands = query[b, h], key[b, kv], value[b, kv], out[b, h], lse[b, h]
            for tile in plan.tiles():
                self._tile(plan, tile, None if mask is None else mask[b, h], request.effective_scale, *operands)

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
