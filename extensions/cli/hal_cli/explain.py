"""`hal explain`: the decision for a call that is described in words. No tensor is made, so torch is not
imported, unless --plan opens the device.
"""

from __future__ import annotations

import argparse
import math

import attrs

import hal_core as hal
from hal_core.plugin_api import (
    DTYPE_BYTES,
    AttentionRequest,
    Causal,
    CommandResult,
    ContractError,
    decide,
    merged_policy,
    plan_text,
)

from .parser import whole_numbers


def run(options: argparse.Namespace) -> CommandResult:
    """Decide, without running anything; exit code 1 where no device can."""
    request = request_of(options)
    with hal.use(options.backend, objective=options.objective, allow_simulated=options.allow_simulated or None):
        decision = decide(request, merged_policy(None, None, None, None))
        if options.plan:
            decision = attrs.evolve(decision, plan=plan_text(request, decision))
    return CommandResult(decision.to_dict(), (), str(decision).splitlines(), 0 if decision.chosen else 1)


def request_of(options: argparse.Namespace) -> AttentionRequest:
    """The call that the options describe.

    Raises:
        ContractError: an option that no call could have; every such option is named.
    """
    batch, heads, length, dim = whole_numbers(options.shape, 4, "--shape", "batch,heads,length,head_dim")
    window = None if options.window is None else whole_numbers(options.window, 2, "--window", "left,right")
    kv_heads = heads if options.kv_heads is None else options.kv_heads
    kv_length = length if options.kv_length is None else options.kv_length
    wrong = []
    if min(batch, heads, length, dim, kv_heads, kv_length) < 1 or heads % kv_heads:
        wrong.append(
            f"--shape {options.shape} with {heads} query heads, {kv_heads} key heads and {kv_length} keys was given: "
            "use 1 or more of each, and query heads that are a multiple of key heads"
        )
    if options.dtype not in DTYPE_BYTES:
        wrong.append(f"--dtype {options.dtype!r} was given: use {', '.join(DTYPE_BYTES)}")
    if options.softcap is not None and not 0 < options.softcap < math.inf:
        wrong.append(f"--softcap {options.softcap} was given: use a positive finite number")
    if wrong:
        raise ContractError("; ".join(wrong))
    return AttentionRequest(
        batch=batch,
        heads_q=heads,
        heads_kv=kv_heads,
        len_q=length,
        len_k=kv_length,
        dim_qk=dim,
        dim_v=dim,
        softcap=options.softcap,
        dtype=options.dtype,
        causal=Causal(options.causal),
        window=None if window is None else (window[0], window[1]),
        grads=frozenset("qkv" if options.grad else ""),
    )
