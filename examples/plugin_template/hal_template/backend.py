"""What the device is, what it can do, and what a call costs."""

from collections.abc import Iterable, Sequence

from hal_core import plugin_api as hal

from .session import BLOCK, TemplateSession

CAPABILITIES = hal.Capabilities(
    dtypes={"float32"},
    numerics={"float32": hal.Numerics(relative=4e-6, lse=4e-7)},  # twice what the whole kit finds
    head_dim=hal.Range(1, 512),
    masks={hal.MaskKind.NONE, hal.MaskKind.BOOLEAN},
    causal={hal.Causal.NONE, hal.Causal.TOP_LEFT, hal.Causal.BOTTOM_RIGHT},
    features={"grouped_heads", "lse", "diagonal", "window"},
    tile_sizes=hal.Range(1, BLOCK),  # of a tiling that the caller brings
)


class TemplateBackend:
    def devices(self) -> Sequence[hal.Device]:
        """The devices that are present: an empty list where there are none, never an exception."""
        return [hal.Device(id="template:0", family="template", vendor="you", model="tiles", fidelity="emulated")]

    def capabilities(self, device: hal.Device) -> hal.Capabilities:
        return CAPABILITIES

    def check(self, request: hal.AttentionRequest, device: hal.Device) -> Iterable[hal.Refusal]:
        """Refusals that the capabilities cannot express: none here."""
        return ()

    def estimate(self, request: hal.AttentionRequest, device: hal.Device) -> hal.Estimate:
        """From 1 to 100 GFLOP/s, two per MAC, after 20 us to 2 ms per call: assumed, and declared as such."""
        time = hal.Quantity(2e-5 + request.macs / 5e10, 2e-3 + request.macs / 5e8, "declared", "assumed")
        rows = request.batch * request.heads_q * request.len_q
        tile = min(request.len_q, BLOCK) * min(request.len_k, BLOCK)
        return hal.Estimate(time=time, memory=4 * (rows * (request.dim_v + 1 + request.lse) + tile))

    def open(self, device: hal.Device) -> hal.Session:
        return TemplateSession()
