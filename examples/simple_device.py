"""A device in thirty lines, registered at run time: one function, what it can do, what it is."""

import torch

import hal_core as hal


def attend(query, key, value, mask, request):
    scores = query @ key.transpose(-1, -2) * request.effective_scale
    return torch.softmax(scores, dim=-1) @ value, None


class Tiny:
    def devices(self):
        return [
            hal.Device(id="tiny:0", family="tiny", vendor="example", model="softmax", fidelity=hal.Fidelity.EMULATED)
        ]

    def capabilities(self, device):
        numerics = {"float32": hal.Numerics(relative=1e-5)}
        return hal.Capabilities(dtypes={"float32"}, numerics=numerics, head_dim=hal.Range(1, 256))

    def check(self, request, device):
        return ()

    def estimate(self, request, device):
        return hal.Estimate(time=hal.Quantity(1e-5, 1.0, basis="declared", provenance="assumed"))

    def open(self, device):
        return hal.SimpleSession(attend)


if __name__ == "__main__":
    hal.register(Tiny())
    query, key, value = torch.randn(3, 1, 4, 16, 32).unbind(0)
    print(hal.attention(query, key, value, backend="tiny").shape)
    print(hal.explain(query, key, value, is_causal=True, backend="tiny"))
