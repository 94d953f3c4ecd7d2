"""A bilevel problem with a closed form, for the derivation to be read against and the tests to be held to."""

import math
from collections.abc import Sequence

import torch
from torch import Tensor

from ibau.hypergradient.implicit import project_l2


class QuadraticBilevel:
    """psi(theta) = H_out(delta*(theta), theta) where everything is quadratic, in float64.

    inner   h(delta, theta) = delta^T B theta - delta^T M delta / 2, maximised over |delta| <= radius
    outer   H_out(delta, theta) = |delta - a|^2 / 2 + ridge |theta - c|^2 / 2

    M is symmetric with `n` eigenvalues from `low` to `high` in equal steps, theta has `m` entries, and `phi`
    is a projected gradient step of size `eta`; inside the ball dPhi/ddelta = I - eta M.
    """

    def __init__(self, n=6, m=4, *, low=1.0, high=4.0, eta=0.2, ridge=0.5, radius=math.inf, seed: int = 0):
        generator = torch.Generator().manual_seed(seed)

        def gaussian(*shape: int) -> Tensor:
            return torch.randn(*shape, generator=generator, dtype=torch.float64)

        basis, _ = torch.linalg.qr(gaussian(n, n))
        self.eigenvalues = torch.linspace(low, high, n, dtype=torch.float64)
        self.M = basis @ torch.diag(self.eigenvalues) @ basis.T
        self.B, self.a, self.c, self.theta = gaussian(n, m), gaussian(n), gaussian(m), gaussian(m)
        self.eta, self.ridge, self.radius = eta, ridge, radius

    def inner(self, delta: Tensor, params: Sequence[Tensor]) -> Tensor:
        return delta @ self.B @ params[0] - delta @ self.M @ delta / 2

    def outer(self, delta: Tensor, params: Sequence[Tensor]) -> Tensor:
        return (delta - self.a).square().sum() / 2 + self.ridge * (params[0] - self.c).square().sum() / 2

    def phi(self, delta: Tensor, params: Sequence[Tensor]) -> Tensor:
        moved = delta + self.eta * (self.B @ params[0] - self.M @ delta)
        return moved if self.radius == math.inf else project_l2(moved, self.radius)

    def solution(self, theta: Tensor) -> tuple[Tensor, float]:
        """delta*(theta) and its multiplier: (M + lambda I) delta* = B theta, on the sphere if lambda > 0."""

        def at(multiplier: float) -> Tensor:
            return torch.linalg.solve(self._shifted(multiplier), self.B @ theta)

        if at(0.0).norm() <= self.radius:
            return at(0.0), 0.0
        low, high = 0.0, (self.B @ theta).norm().item() / self.radius
        for _ in range(100):  # |at(lambda)| falls with lambda: bisect until the interval cannot be halved
            middle = (low + high) / 2
            low, high = (middle, high) if at(middle).norm() > self.radius else (low, middle)
        return at(high), high

    def psi(self, theta: Tensor) -> Tensor:
        return self.outer(self.solution(theta)[0], [theta])

    def terms(self, theta: Tensor) -> tuple[Tensor, Tensor]:
        """The direct and the implicit term of d psi / d theta, in closed form.

        With S = (M + lambda I)^-1, d delta* / d theta = S B inside; on the sphere it is
        (S - S delta delta^T S / delta^T S delta) B, so that |delta*| stays.
        """
        delta, multiplier = self.solution(theta)
        s = torch.linalg.inv(self._shifted(multiplier))
        if multiplier > 0:
            s = s - torch.outer(s @ delta, s @ delta) / (delta @ s @ delta)
        return self.ridge * (theta - self.c), self.B.T @ s @ (delta - self.a)

    def rate(self, theta: Tensor) -> float:
        """The spectral radius of dPhi/ddelta at delta*: the factor by which Phi shrinks errors."""
        delta, multiplier = self.solution(theta)
        identity = torch.eye(len(delta), dtype=torch.float64)
        jacobian = (identity - self.eta * self.M) / (1 + self.eta * multiplier)
        if multiplier > 0:
            jacobian = jacobian - torch.outer(delta, delta @ jacobian) / (delta @ delta)
        return torch.linalg.eigvals(jacobian).abs().max().item()

    def _shifted(self, multiplier: float) -> Tensor:
        return self.M + multiplier * torch.eye(len(self.M), dtype=torch.float64)
