"""Lifted attention on every device against the definition of its score in float64."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from hal_geometric import lift
from hal_geometric.manifold import Lorentz, Poincare
from torch import Tensor

import hal_core as hal
from hal_core import ContractError
from hal_core.testing import relative_error

N = 7


def draw(seed: int, count: int = 3, dim: int = N, spread: float = 0.5) -> list[Tensor]:
    generator = torch.Generator().manual_seed(seed)
    return [spread * torch.randn(2, 3, 40, dim, generator=generator, dtype=torch.float64) for _ in range(count)]


def metric(seed: int) -> Tensor:
    g = torch.randn(N, N, generator=torch.Generator().manual_seed(seed + 1), dtype=torch.float64)
    return g @ g.T / N


def pair(q: Tensor, k: Tensor) -> tuple[Tensor, Tensor]:
    return q.unsqueeze(-2), k.unsqueeze(-3)


def squared(q: Tensor, k: Tensor, g: Tensor) -> Tensor:
    a, b = pair(q, k)
    return torch.einsum("...i,ij,...j->...", a - b, g, a - b)


def case(name: str, seed: int) -> tuple[Callable[..., Any], Callable[..., Tensor], list[Tensor]]:
    """(lift, its score by definition, query key value)."""
    q, k, v = draw(seed)
    g, sheet = metric(seed), Lorentz()
    if name == "lorentz":
        points = [sheet.lift(q), sheet.lift(k)]
        return lambda a, b: lift.lorentz(a, b, 0.8), lambda a, b: lift.lorentz_scores(a, b, 0.8), [*points, v]
    if name == "product":
        first = lambda a, b: lift.euclidean(a[..., :3], b[..., :3], 0.6)  # noqa: E731
        second = lambda a, b: lift.spherical(a[..., 3:], b[..., 3:], 1.5)  # noqa: E731

        def together(a: Tensor, b: Tensor) -> Tensor:
            near = -0.6 * squared(a[..., :3], b[..., :3], torch.eye(3).double())
            return near + 1.5 * torch.cosine_similarity(*pair(a[..., 3:], b[..., 3:]), dim=-1)

        return lambda a, b: lift.product(first(a, b), second(a, b)), together, [q, k, v]
    found: dict[str, tuple[Callable[..., Any], Callable[..., Tensor]]] = {
        "spherical": (
            lambda a, b: lift.spherical(a, b, 3.0),
            lambda a, b: 3.0 * torch.cosine_similarity(*pair(a, b), dim=-1),
        ),
        "euclidean": (
            lambda a, b: lift.euclidean(a, b, 0.7),
            lambda a, b: -0.7 * squared(a, b, torch.eye(N).double()),
        ),
        "mahalanobis": (lambda a, b: lift.mahalanobis(a, b, g, 0.7), lambda a, b: -0.7 * squared(a, b, g)),
        "fidelity": (lambda a, b: lift.fidelity(a, b, 0.5), lambda a, b: 0.5 * (a @ b.mT).square()),
    }
    return *found[name], [q, k, v]


NAMES = ("spherical", "euclidean", "mahalanobis", "fidelity", "lorentz", "product")


@pytest.mark.parametrize("name", NAMES)
def test_a_lift_gives_the_attention_of_its_score(device: str, name: str, seed: int) -> None:
    lifted, score, (q, k, v) = case(name, seed)
    want = score(q, k).softmax(-1) @ v
    a, b = lifted(q, k)
    width = a.shape[-1]
    values = torch.nn.functional.pad(v, (0, width - v.shape[-1])).float()
    out = hal.attention(a.float(), b.float(), values, scale=1.0, backend=device, allow_simulated=True)
    assert relative_error(out[..., : v.shape[-1]], want) <= 2e-6
    exact = hal.attention(a, b, v, scale=1.0, backend="cpu:0")
    assert relative_error(exact, want) <= 1e-12


@pytest.mark.parametrize("name", NAMES)
def test_a_lift_trains_on_every_device_with_a_backward(device: str, name: str, seed: int) -> None:
    if "backward" not in hal.capabilities(device).features:
        pytest.skip(f"{device} has no backward")
    lifted, score, (q, k, v) = case(name, seed)
    given = [t.clone().requires_grad_() for t in (q, k)]
    (score(*given).softmax(-1) @ v).square().sum().backward()
    want = [t.grad for t in given]
    again = [t.clone().requires_grad_() for t in (q, k)]
    a, b = lifted(*again)
    values = torch.nn.functional.pad(v, (0, a.shape[-1] - v.shape[-1])).float()
    out = hal.attention(a.float(), b.float(), values, scale=1.0, backend=device, allow_simulated=True)
    out.square().sum().backward()
    for x, y in zip(again, want, strict=True):
        assert relative_error(x.grad, y) <= (1e-5 if name == "lorentz" else 2e-5)


def test_complex_states_attend_by_their_fidelity(seed: int) -> None:
    re_q, re_k, im_q, im_k, v = draw(seed, 5, 4)
    q, k = torch.complex(re_q, im_q), torch.complex(re_k, im_k)
    a, b = lift.fidelity(q, k, 2.0)
    assert a.shape[-1] == 16
    want = (2.0 * (q.conj() @ k.mT).abs().square()).softmax(-1) @ v
    assert relative_error(hal.attention(a, b, v, scale=1.0, backend="cpu:0"), want) <= 1e-12


def test_values_of_the_sheet_give_their_centroid(seed: int) -> None:
    sheet = Lorentz()
    q, k, v = map(sheet.lift, draw(seed))
    a, b = lift.lorentz(q, k)
    out = sheet.rescale(hal.attention(a, b, v, scale=1.0, backend="cpu:0"))
    weights = lift.lorentz_scores(q, k).softmax(-1)
    want = sheet.centroid(v.unsqueeze(-3).expand(2, 3, 40, 40, N + 1), weights)
    assert relative_error(out, want) <= 1e-12


def test_curvature_scales_the_lorentz_score(seed: int) -> None:
    space = Lorentz(-2.0)
    q, k, v = draw(seed)
    q, k = space.lift(q), space.lift(k)
    a, b = lift.lorentz(q, k, 0.8, space=space)
    want = (-0.8 * torch.cosh(2**0.5 * space.dist(*pair(q, k)))).softmax(-1) @ v
    assert relative_error(hal.attention(a, b, v, scale=1.0, backend="cpu:0"), want) <= 1e-11


def test_a_mask_stands_for_the_longer_head_of_euclidean_scores(device: str, seed: int) -> None:
    q, k, v = draw(seed)
    g = metric(seed)
    want = (-0.7 * squared(q, k, g)).softmax(-1) @ v
    mask = lift.euclidean_mask(k, 0.7, g).float()
    tensors = [t.float() for t in ((q @ g), k, v)]
    out = hal.attention(*tensors, mask, scale=1.4, backend=device, allow_simulated=True)
    assert relative_error(out, want) <= 2e-6


@pytest.mark.parametrize("power", [1, 2])
def test_distances_without_a_lift_run_as_a_mask(device: str, power: int, seed: int) -> None:
    ball = Poincare()
    q, k, v = draw(seed, spread=0.1)
    want = (-1.3 * ball.dist(*pair(q, k)) ** power).softmax(-1) @ v
    mask = lift.distance_mask(q, k, ball, 1.3, power).float()
    zeros = torch.zeros_like(v).float()
    out = hal.attention(zeros, zeros, v.float(), mask, backend=device, allow_simulated=True)
    assert relative_error(out, want) <= 4e-6


def test_distances_train_where_the_device_differentiates_masks(device: str, seed: int) -> None:
    if "mask_grad" not in hal.capabilities(device).features:
        pytest.skip(f"{device} has no gradient of masks")
    ball = Poincare()
    q, k, v = draw(seed, spread=0.1)

    def gradients(run: Callable[[Tensor], Tensor]) -> list[Any]:
        given = [t.clone().requires_grad_() for t in (q, k)]
        run(lift.distance_mask(*given, ball, 1.3)).square().sum().backward()
        return [t.grad for t in given]

    def on_device(mask: Tensor) -> Tensor:
        zeros = torch.zeros_like(v).float()
        found: Tensor = hal.attention(zeros, zeros, v.float(), mask.float(), backend=device, allow_simulated=True)
        return found

    want = gradients(lambda mask: mask.softmax(-1) @ v)
    assert all(relative_error(x, y) <= 2e-5 for x, y in zip(gradients(on_device), want, strict=True))


def test_scores_that_cancel_beyond_the_declared_error_are_refused_with_the_fix(seed: int) -> None:
    sheet = Lorentz()
    drawn = torch.randn(1, 1, 8, 3, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
    far = sheet.lift(drawn * 200)
    for dtype, fix in ((torch.float32, "use float64"), (torch.bfloat16, "use float32 or float64")):
        with pytest.raises(ContractError, match=f"Lorentz scores of {dtype} at radius .* above 0.01; {fix}"):
            lift.lorentz(far, far, dtype=dtype)
    lift.lorentz(far, far)


def test_the_declared_error_of_lorentz_scores_is_what_rounding_gives(seed: int) -> None:
    sheet, generator = Lorentz(), torch.Generator().manual_seed(seed)
    way = torch.nn.functional.normalize(torch.randn(1, 1, 200, 8, generator=generator).double(), dim=-1)
    for dtype, radius in ((torch.float32, 5.0), (torch.bfloat16, 1.0)):
        x = sheet.lift(torch.sinh(torch.tensor(radius).double()) * way)
        a, b = (t.to(dtype).double() for t in (x, x))
        error = float((lift.lorentz_scores(a, b) - lift.lorentz_scores(x, x)).abs().max())
        c, u = lift.CANCELLATION[dtype], torch.finfo(dtype).eps / 2
        assert error <= c * u * float(torch.cosh(torch.tensor(radius))) ** 2


def test_a_metric_that_is_not_symmetric_is_refused() -> None:
    x = torch.randn(1, 1, 3, 2)
    with pytest.raises(ContractError, match="use a symmetric one"):
        lift.mahalanobis(x, x, torch.tensor([[1.0, 1.0], [0.0, 1.0]]))
