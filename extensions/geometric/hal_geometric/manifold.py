"""Spaces of constant curvature and their products: distances, geodesics, parallel transport and centroids.

Points and tangent vectors are tensors [..., size] of one float dtype; leading dimensions broadcast. `size` is n for
`Euclidean` and `Poincare`, and n + 1 for `Sphere` and `Lorentz`, whose points lie in an ambient space.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Sequence

import torch
from torch import Tensor

from hal_core import ContractError

#: How far off its manifold a point may lie, as a multiple of the dtype's resolution and of its squared length.
_OFF = 64.0


def _dot(x: Tensor, y: Tensor) -> Tensor:
    return (x * y).sum(-1, keepdim=True)


def _length(x: Tensor) -> Tensor:
    """The Euclidean length, with gradient 0 at 0."""
    return _root(_dot(x, x))


def _root(square: Tensor) -> Tensor:
    tiny = torch.finfo(square.dtype).tiny
    return torch.where(square > tiny, square.clamp_min(tiny).sqrt(), torch.zeros_like(square))


def _sinhc(x: Tensor) -> Tensor:
    """sinh(x) / x."""
    return torch.where(x.abs() < 1e-4, 1 + x * x / 6, torch.sinh(x) / torch.where(x == 0, torch.ones_like(x), x))


def _sinc(x: Tensor) -> Tensor:
    """sin(x) / x."""
    return torch.where(x.abs() < 1e-4, 1 - x * x / 6, torch.sin(x) / torch.where(x == 0, torch.ones_like(x), x))


def minkowski(x: Tensor, y: Tensor) -> Tensor:
    """<x, y>_L = x_1 y_1 + ... + x_n y_n - x_0 y_0 of [..., n + 1], [...] (Nickel & Kiela 2018)."""
    return (x[..., 1:] * y[..., 1:]).sum(-1) - x[..., 0] * y[..., 0]


class Manifold(ABC):
    """A Riemannian manifold.

    Args:
        curvature: sectional curvature K of every plane.
        check: whether points are looked at on every call, which waits for an accelerator.

    Raises:
        ContractError: a curvature of the wrong sign; in the methods, a point off the manifold.
    """

    sign = 0  # of the curvature

    def __init__(self, curvature: float = 0.0, *, check: bool = True) -> None:
        wanted = {1: "above 0", 0: "of 0", -1: "below 0"}[self.sign]
        sign = (curvature > 0) - (curvature < 0)
        if sign != self.sign or curvature != curvature or abs(curvature) == float("inf"):
            raise ContractError(f"curvature {curvature} was given to {type(self).__name__}: use one {wanted}")
        self.curvature, self.checks = float(curvature), check
        self._k = abs(curvature) ** 0.5 or 1.0

    def __repr__(self) -> str:
        return f"{type(self).__name__}({self.curvature:g})"

    # Points

    @abstractmethod
    def size(self, n: int) -> int:
        """Numbers of a point of the n-dimensional space."""

    @abstractmethod
    def origin(self, n: int, dtype: torch.dtype = torch.float32) -> Tensor:
        """A point of the n-dimensional space, [size]."""

    @abstractmethod
    def project(self, x: Tensor) -> Tensor:
        """A point of the manifold near x."""

    @abstractmethod
    def to_tangent(self, x: Tensor, v: Tensor) -> Tensor:
        """The tangent vector at x nearest to v, orthogonally in `inner`."""

    @abstractmethod
    def off(self, x: Tensor) -> Tensor:
        """How far x is off the manifold, relative to rounding: [...], at most 1 for a point of it."""

    def require(self, *points: Tensor) -> None:
        """Raise ContractError for points that are off the manifold, where `check` is set."""
        for x in points if self.checks else ():
            if not x.is_floating_point():
                raise ContractError(f"points of {x.dtype} were given: use a float dtype")
            if x.numel() and not bool((worst := self.off(x.detach()).max()) <= 1):
                raise ContractError(
                    f"a point {float(worst):.3g} times as far off {self!r} as rounding allows was given: pass it "
                    "through project(), or, where it is a tangent vector, through exp()"
                )

    # Geometry

    @abstractmethod
    def inner(self, x: Tensor, u: Tensor, v: Tensor) -> Tensor:
        """<u, v> of tangent vectors at x, [...]."""

    @abstractmethod
    def dist(self, x: Tensor, y: Tensor) -> Tensor:
        """Length of the shortest geodesic from x to y, [...]. Its gradient at x = y is given as 0."""

    @abstractmethod
    def exp(self, x: Tensor, v: Tensor) -> Tensor:
        """The point that the geodesic from x with velocity v reaches at time 1."""

    @abstractmethod
    def log(self, x: Tensor, y: Tensor) -> Tensor:
        """The tangent vector v at x with exp(x, v) = y, of length dist(x, y)."""

    @abstractmethod
    def transport(self, x: Tensor, y: Tensor, v: Tensor) -> Tensor:
        """v, tangent at x, moved parallel along the geodesic from x to y."""

    @abstractmethod
    def centroid(self, x: Tensor, weights: Tensor | None = None) -> Tensor:
        """The weighted mean of points x [..., points, size], [..., size]; weights [..., points] of 0 or more."""

    def norm(self, x: Tensor, v: Tensor) -> Tensor:
        """Length of a tangent vector, [...]."""
        return _root(self.inner(x, v, v).clamp_min(0))


def _weighted(x: Tensor, weights: Tensor | None) -> Tensor:
    return x.sum(-2) if weights is None else (weights.unsqueeze(-1) * x).sum(-2)


class Euclidean(Manifold):
    """R^n: dist |x - y|, exp x + v, transport v, centroid sum w x / sum w."""

    def size(self, n: int) -> int:
        return n

    def origin(self, n: int, dtype: torch.dtype = torch.float32) -> Tensor:
        return torch.zeros(n, dtype=dtype)

    def project(self, x: Tensor) -> Tensor:
        return x

    def to_tangent(self, x: Tensor, v: Tensor) -> Tensor:
        return v

    def off(self, x: Tensor) -> Tensor:
        return torch.where(x.isfinite().all(-1), 0.0, torch.inf)

    def inner(self, x: Tensor, u: Tensor, v: Tensor) -> Tensor:
        return (u * v).sum(-1)

    def dist(self, x: Tensor, y: Tensor) -> Tensor:
        self.require(x, y)
        return _length(x - y)[..., 0]

    def exp(self, x: Tensor, v: Tensor) -> Tensor:
        self.require(x)
        return x + v

    def log(self, x: Tensor, y: Tensor) -> Tensor:
        self.require(x, y)
        return y - x

    def transport(self, x: Tensor, y: Tensor, v: Tensor) -> Tensor:
        return v + torch.zeros_like(x + y)

    def centroid(self, x: Tensor, weights: Tensor | None = None) -> Tensor:
        self.require(x)
        total = x.shape[-2] if weights is None else weights.sum(-1, keepdim=True)
        return _weighted(x, weights) / total


class Sphere(Manifold):
    """|x|^2 = 1 / K in R^(n + 1), with the metric of R^(n + 1). For K = 1:

        dist = 2 atan2(|x - y|, |x + y|)        exp = cos|v| x + sin|v| / |v| v
        transport = v - <y, v> / (1 + <x, y>) (x + y)        centroid = sum w x / |sum w x|

    The centroid minimises the weighted squared chords. Antipodes have no log and no transport: NaN or a large vector.
    """

    sign = 1

    def __init__(self, curvature: float = 1.0, *, check: bool = True) -> None:
        super().__init__(curvature, check=check)

    def size(self, n: int) -> int:
        return n + 1

    def origin(self, n: int, dtype: torch.dtype = torch.float32) -> Tensor:
        return torch.eye(1, n + 1, dtype=dtype)[0] / self._k

    def project(self, x: Tensor) -> Tensor:
        return x / (_length(x) * self._k)

    def to_tangent(self, x: Tensor, v: Tensor) -> Tensor:
        return v - _dot(x, v) * x * self._k**2

    def off(self, x: Tensor) -> Tensor:
        error = ((x * x).sum(-1) * self._k**2 - 1).abs() / (_OFF * torch.finfo(x.dtype).eps)
        return error.nan_to_num(torch.inf, torch.inf)

    def inner(self, x: Tensor, u: Tensor, v: Tensor) -> Tensor:
        return (u * v).sum(-1)

    def _dist(self, x: Tensor, y: Tensor) -> Tensor:
        return 2 * torch.atan2(_length(x - y), _length(x + y)) / self._k

    def dist(self, x: Tensor, y: Tensor) -> Tensor:
        self.require(x, y)
        return self._dist(x, y)[..., 0]

    def exp(self, x: Tensor, v: Tensor) -> Tensor:
        self.require(x)
        angle = _length(v) * self._k
        return self.project(torch.cos(angle) * x + _sinc(angle) * v)

    def log(self, x: Tensor, y: Tensor) -> Tensor:
        self.require(x, y)
        angle = self._dist(x, y) * self._k
        away = self.to_tangent(x, y - x)
        return away / _sinc(angle)

    def transport(self, x: Tensor, y: Tensor, v: Tensor) -> Tensor:
        self.require(x, y)
        k = self._k**2
        return v - k * _dot(y, v) / (1 + k * _dot(x, y)) * (x + y)

    def centroid(self, x: Tensor, weights: Tensor | None = None) -> Tensor:
        self.require(x)
        return self.project(_weighted(x, weights))


class Lorentz(Manifold):
    """The sheet x_0 > 0 of <x, x>_L = 1 / K in R^(n + 1), K < 0, with the metric <u, v>_L. For K = -1:

        dist = arcosh(-<x, y>_L)        exp = cosh|v| x + sinh|v| / |v| v
        transport = v + <y, v>_L / (1 - <x, y>_L) (x + y)        centroid = sum w x / sqrt(-<sum w x, sum w x>_L)

    The distance is computed as 2 asinh sqrt(sinh^2((r - s) / 2) + sinh r sinh s |n - m|^2 / 4), with the radii r, s and
    directions n, m of the two points: nothing cancels. The centroid minimises the weighted squared Lorentzian
    distances -2 - 2 <x, y>_L.

    Source: Nickel & Kiela 2018 (model, exp, log); Law et al. 2019 (centroid).
    """

    sign = -1

    def __init__(self, curvature: float = -1.0, *, check: bool = True) -> None:
        super().__init__(curvature, check=check)

    def size(self, n: int) -> int:
        return n + 1

    def origin(self, n: int, dtype: torch.dtype = torch.float32) -> Tensor:
        return torch.eye(1, n + 1, dtype=dtype)[0] / self._k

    def project(self, x: Tensor) -> Tensor:
        """The point with the same x_1 to x_n."""
        space = x[..., 1:]
        return torch.cat([(_dot(space, space) + self._k**-2).sqrt(), space], -1)

    def lift(self, x: Tensor) -> Tensor:
        """The point above x [..., n]: [..., n + 1] with x_1 to x_n = x."""
        return self.project(torch.nn.functional.pad(x, (1, 0)))

    def rescale(self, x: Tensor) -> Tensor:
        """x / sqrt(K <x, x>_L): the point of the manifold on the ray of a time-like x, such as a sum of points."""
        return x / (-minkowski(x, x)).clamp_min(torch.finfo(x.dtype).tiny).sqrt().unsqueeze(-1) / self._k

    def to_tangent(self, x: Tensor, v: Tensor) -> Tensor:
        return v + minkowski(x, v).unsqueeze(-1) * x * self._k**2

    def off(self, x: Tensor) -> Tensor:
        error = (minkowski(x, x) * self._k**2 + 1).abs()
        size = torch.finfo(x.dtype).eps * _OFF * ((x * x).sum(-1) * self._k**2)
        return torch.where(x[..., 0] > 0, error / size, torch.inf).nan_to_num(torch.inf, torch.inf)

    def inner(self, x: Tensor, u: Tensor, v: Tensor) -> Tensor:
        return minkowski(u, v)

    def _half(self, x: Tensor, y: Tensor) -> Tensor:
        """sinh(dist / 2) at unit curvature, [..., 1]."""
        a, b = x[..., 1:] * self._k, y[..., 1:] * self._k
        sinh_r, sinh_s = _length(a), _length(b)
        difference = (torch.asinh(sinh_r) - torch.asinh(sinh_s)) / 2
        n, m = (v / torch.where(w == 0, torch.ones_like(w), w) for v, w in ((a, sinh_r), (b, sinh_s)))
        return _root(torch.sinh(difference) ** 2 + sinh_r * sinh_s * _dot(n - m, n - m) / 4)

    def dist(self, x: Tensor, y: Tensor) -> Tensor:
        self.require(x, y)
        return 2 * torch.asinh(self._half(x, y))[..., 0] / self._k

    def exp(self, x: Tensor, v: Tensor) -> Tensor:
        self.require(x)
        angle = self.norm(x, v).unsqueeze(-1) * self._k
        return self.project(torch.cosh(angle) * x + _sinhc(angle) * v)

    def log(self, x: Tensor, y: Tensor) -> Tensor:
        self.require(x, y)
        half = self._half(x, y)
        away = y - x - 2 * half**2 * x  # y - cosh(dist) x
        return self.to_tangent(x, away) / _sinhc(2 * torch.asinh(half))

    def transport(self, x: Tensor, y: Tensor, v: Tensor) -> Tensor:
        self.require(x, y)
        k = self._k**2
        along = k * minkowski(y, v) / (1 - k * minkowski(x, y))
        return v + along.unsqueeze(-1) * (x + y)

    def centroid(self, x: Tensor, weights: Tensor | None = None) -> Tensor:
        self.require(x)
        return self.rescale(_weighted(x, weights))

    def boost(self, centre: Tensor, x: Tensor) -> Tensor:
        """The isometry that moves `centre` to the origin, applied to x: inner products and distances stay.

        x_0' = c_0 x_0 - c.x, x' = x - x_0 c + (c.x) / (1 + c_0) c, for K = -1 and the spatial parts c and x.
        """
        c = centre * self._k  # linear in x, so x keeps its scale
        c0, c1, x0, x1 = c[..., :1], c[..., 1:], x[..., :1], x[..., 1:]
        along = _dot(c1, x1)
        return torch.cat([c0 * x0 - along, x1 - x0 * c1 + along / (1 + c0) * c1], -1)


class Poincare(Manifold):
    """The ball |x|^2 < -1 / K with the metric lam^2 <u, v>, lam = 2 / (1 + K |x|^2), K < 0. For K = -1:

        dist = 2 asinh(|x - y| / sqrt((1 - |x|^2) (1 - |y|^2)))

    exp, log, transport and centroid are those of `Lorentz` through the isometry x_0 = (1 + |p|^2) / (1 - |p|^2),
    x = 2 p / (1 - |p|^2); the centroid is the Einstein midpoint.
    """

    sign = -1

    def __init__(self, curvature: float = -1.0, *, check: bool = True) -> None:
        super().__init__(curvature, check=check)
        self._lorentz = Lorentz(curvature, check=False)

    def size(self, n: int) -> int:
        return n

    def origin(self, n: int, dtype: torch.dtype = torch.float32) -> Tensor:
        return torch.zeros(n, dtype=dtype)

    def project(self, x: Tensor) -> Tensor:
        """x, pulled inside the ball where it is outside."""
        most = (1 - 16 * torch.finfo(x.dtype).eps) / self._k
        length = _length(x)
        return torch.where(length > most, x / length * most, x)

    def to_tangent(self, x: Tensor, v: Tensor) -> Tensor:
        return v

    def off(self, x: Tensor) -> Tensor:
        return torch.where((x * x).sum(-1) * self._k**2 < 1, 0.0, torch.inf)

    def to_lorentz(self, x: Tensor) -> Tensor:
        """The same point in `Lorentz` of this curvature, [..., n + 1]."""
        p = x * self._k
        square = _dot(p, p)
        return torch.cat([1 + square, 2 * p], -1) / (1 - square) / self._k

    def from_lorentz(self, x: Tensor) -> Tensor:
        """The point of the ball that `to_lorentz` takes to x."""
        return x[..., 1:] / (1 + x[..., :1] * self._k)

    def _push(self, x: Tensor, v: Tensor) -> Tensor:
        """A tangent vector of the ball in `Lorentz`."""
        p = x * self._k
        factor = 2 / (1 - _dot(p, p))
        time = factor**2 * _dot(p, v)
        return torch.cat([time, factor * v + time * p], -1)

    def _pull(self, x: Tensor, v: Tensor) -> Tensor:
        """A tangent vector of `Lorentz` at the image of x, in the ball."""
        p = x * self._k
        return (v[..., 1:] - p * v[..., :1]) * (1 - _dot(p, p)) / 2

    def inner(self, x: Tensor, u: Tensor, v: Tensor) -> Tensor:
        factor = 2 / (1 - (x * x).sum(-1) * self._k**2)
        return factor**2 * (u * v).sum(-1)

    def dist(self, x: Tensor, y: Tensor) -> Tensor:
        self.require(x, y)
        p, q = x * self._k, y * self._k
        ratio = _length(p - q) / ((1 - _dot(p, p)) * (1 - _dot(q, q))).sqrt()
        return 2 * torch.asinh(ratio)[..., 0] / self._k

    def exp(self, x: Tensor, v: Tensor) -> Tensor:
        self.require(x)
        return self.from_lorentz(self._lorentz.exp(self.to_lorentz(x), self._push(x, v)))

    def log(self, x: Tensor, y: Tensor) -> Tensor:
        self.require(x, y)
        return self._pull(x, self._lorentz.log(self.to_lorentz(x), self.to_lorentz(y)))

    def transport(self, x: Tensor, y: Tensor, v: Tensor) -> Tensor:
        self.require(x, y)
        moved = self._lorentz.transport(self.to_lorentz(x), self.to_lorentz(y), self._push(x, v))
        return self._pull(y, moved)

    def centroid(self, x: Tensor, weights: Tensor | None = None) -> Tensor:
        self.require(x)
        return self.from_lorentz(self._lorentz.centroid(self.to_lorentz(x), weights))


class Product(Manifold):
    """The product of manifolds, a point being their points concatenated: dist^2 is the sum of the squared distances.

    Args:
        factors: (manifold, n) with each factor's dimension n.
    """

    def __init__(self, *factors: tuple[Manifold, int]) -> None:
        if not factors:
            raise ContractError("no factors were given: pass (manifold, n) pairs")
        super().__init__(0.0)
        self.factors = factors
        self.sizes = [manifold.size(n) for manifold, n in factors]

    def __repr__(self) -> str:
        return " x ".join(f"{manifold!r}^{n}" for manifold, n in self.factors)

    def parts(self, x: Tensor) -> Sequence[Tensor]:
        """The factors' points (or vectors) of x."""
        if x.shape[-1] != sum(self.sizes):
            raise ContractError(f"{x.shape[-1]} numbers were given: {self!r} has {sum(self.sizes)} ({self.sizes})")
        cut: Sequence[Tensor] = torch.split(x, self.sizes, -1)
        return cut

    def _each(self, name: str, *given: Tensor) -> list[Tensor]:
        cut = zip(*map(self.parts, given), strict=True)
        return [getattr(m, name)(*parts) for (m, _), parts in zip(self.factors, cut, strict=True)]

    def size(self, n: int) -> int:
        if n != sum(k for _, k in self.factors):
            raise ContractError(f"dimension {n} was given: {self!r} has {sum(k for _, k in self.factors)}")
        return sum(self.sizes)

    def origin(self, n: int, dtype: torch.dtype = torch.float32) -> Tensor:
        self.size(n)
        return torch.cat([manifold.origin(k, dtype) for manifold, k in self.factors])

    def project(self, x: Tensor) -> Tensor:
        return torch.cat(self._each("project", x), -1)

    def to_tangent(self, x: Tensor, v: Tensor) -> Tensor:
        return torch.cat(self._each("to_tangent", x, v), -1)

    def off(self, x: Tensor) -> Tensor:
        return torch.stack(self._each("off", x)).amax(0)

    def inner(self, x: Tensor, u: Tensor, v: Tensor) -> Tensor:
        return torch.stack(self._each("inner", x, u, v)).sum(0)

    def dist(self, x: Tensor, y: Tensor) -> Tensor:
        return _length(torch.stack(self._each("dist", x, y), -1))[..., 0]

    def exp(self, x: Tensor, v: Tensor) -> Tensor:
        return torch.cat(self._each("exp", x, v), -1)

    def log(self, x: Tensor, y: Tensor) -> Tensor:
        return torch.cat(self._each("log", x, y), -1)

    def transport(self, x: Tensor, y: Tensor, v: Tensor) -> Tensor:
        return torch.cat(self._each("transport", x, y, v), -1)

    def centroid(self, x: Tensor, weights: Tensor | None = None) -> Tensor:
        return torch.cat([m.centroid(p, weights) for (m, _), p in zip(self.factors, self.parts(x), strict=True)], -1)
