"""Route attention by what it takes on this machine, and serve many requests over the devices that are here."""

from __future__ import annotations

import hal_router
import torch

import hal_core as hal


def main() -> None:
    torch.manual_seed(0)
    hal_router.enable()
    shapes = [(1, 4, length, 64) for length in (16, 64, 128)]
    tensors = [tuple(torch.randn(shape) for _ in range(3)) for shape in shapes]
    with torch.no_grad():
        for _ in range(20):
            for q, k, v in tensors:
                hal.attention(q, k, v)
        q, k, v = tensors[-1]
        print(hal.explain(q, k, v).reason)
        with hal_router.Pool(limit=32) as pool:
            futures = [pool.submit(*tensors[n % 3], priority=n % 2) for n in range(30)]
            right = sum(
                torch.allclose(f.result(), hal.attention(*tensors[n % 3]), atol=1e-5) for n, f in enumerate(futures)
            )
    print(f"{right} of 30 requests answered right")
    for name, arm in hal_router.state()["arms"].items():
        print(f"{name}: time over the device's own estimate x{arm['factor']:.2f}, {arm['calls']:.0f} calls count")
    hal_router.disable()


if __name__ == "__main__":
    main()
