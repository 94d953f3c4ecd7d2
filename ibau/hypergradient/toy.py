"""Bilevel problems with known answers, for the derivation to be read against and the tests to be held to."""

import math
from collections.abc import Sequence

import torch
import torch.nn.functional as F
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

    def slope(self, delta: Tensor, theta: Tensor) -> Tensor:
        """The gradient of the inner objective by delta."""
        return self.B @ theta - self.M @ delta

    def curvature(self, delta: Tensor, theta: Tensor) -> Tensor:
        """Minus the Hessian of the inner objective by delta."""
        return self.M

    def phi(self, delta: Tensor, params: Sequence[Tensor]) -> Tensor:
        return project_l2(delta + self.eta * self.slope(delta, params[0]), self.radius)

    def solution(self, theta: Tensor) -> tuple[Tensor, float]:
        """delta*(theta) and its multiplier: slope = lambda delta*, on the sphere if lambda > 0.

        For the quadratic this is (M + lambda I) delta* = B theta.
        """

        def at(multiplier: float) -> Tensor:
            return self._maximiser(theta, multiplier)

        if at(0.0).norm() <= self.radius:
            return at(0.0), 0.0
        # The inner objective is concave: <slope(delta), delta> <= <slope(0), delta>, which bounds lambda.
        low, high = 0.0, self.slope(torch.zeros_like(self.a), theta).norm().item() / self.radius
        for _ in range(100):  # |at(lambda)| falls with lambda: bisect until the interval cannot be halved
            middle = (low + high) / 2
            if not low < middle < high:
                break
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
        s = torch.linalg.inv(self.M + multiplier * torch.eye(len(self.M), dtype=torch.float64))
        if multiplier > 0:
            s = s - torch.outer(s @ delta, s @ delta) / (delta @ s @ delta)
        return self.ridge * (theta - self.c), self.B.T @ s @ (delta - self.a)

    def rate(self, theta: Tensor) -> float:
        """The spectral radius of dPhi/ddelta at delta*: the factor by which Phi shrinks errors."""
        delta, multiplier = self.solution(theta)
        identity = torch.eye(len(delta), dtype=torch.float64)
        jacobian = (identity - self.eta * self.curvature(delta, theta)) / (1 + self.eta * multiplier)
        if multiplier > 0:
            jacobian = jacobian - torch.outer(delta, delta @ jacobian) / (delta @ delta)
        return torch.linalg.eigvals(jacobian).abs().max().item()

    def _maximiser(self, theta: Tensor, multiplier: float) -> Tensor:
        """The delta that maximises the inner objective less multiplier |delta|^2 / 2, in all of space."""
        return self._newton_step(torch.zeros_like(self.a), theta, multiplier)

    def _newton_step(self, delta: Tensor, theta: Tensor, multiplier: float) -> Tensor:
        """The step to where slope = multiplier delta would be, were the inner objective a quadratic."""
        shift = multiplier * torch.eye(len(delta), dtype=torch.float64)
        rest = self.slope(delta, theta) - multiplier * delta
        return torch.linalg.solve(self.curvature(delta, theta) + shift, rest)


class SoftplusMinimax(QuadraticBilevel):
    """psi(theta) = max over |delta| <= radius of H(delta, theta): one objective, which is not quadratic.

    H(delta, theta) = delta^T B theta - delta^T M delta / 2 - sum_i softplus(2 (delta_i - (A theta)_i))

    H is the inner and the outer objective. It is strongly concave in delta: the softplus adds between 0 and 1
    to the curvatures, those of M. delta* is known to the precision of float64, and by Danskin's theorem
    d psi / d theta is dH/dtheta there. `ridge`, a and c play no part.
    """

    def __init__(self, n=6, m=4, *, low=1.0, high=4.0, eta=0.2, radius=math.inf, seed: int = 0):
        super().__init__(n, m, low=low, high=high, eta=eta, radius=radius, seed=seed)
        generator = torch.Generator().manual_seed(seed + 1)
        self.A = torch.randn(n, m, generator=generator, dtype=torch.float64) / math.sqrt(m)

    def inner(self, delta: Tensor, params: Sequence[Tensor]) -> Tensor:
        return super().inner(delta, params) - F.softplus(2 * (delta - self.A @ params[0])).sum()

    def outer(self, delta: Tensor, params: Sequence[Tensor]) -> Tensor:
        return self.inner(delta, params)

    def slope(self, delta: Tensor, theta: Tensor) -> Tensor:
        return super().slope(delta, theta) - 2 * torch.sigmoid(2 * (delta - self.A @ theta))

    def curvature(self, delta: Tensor, theta: Tensor) -> Tensor:
        s = torch.sigmoid(2 * (delta - self.A @ theta))
        return self.M + torch.diag(4 * s * (1 - s))

    def terms(self, theta: Tensor) -> tuple[Tensor, Tensor]:
        """The direct and the implicit term of d psi / d theta: by Danskin's theorem the second is 0."""
        delta, _ = self.solution(theta)
        s = torch.sigmoid(2 * (delta - self.A @ theta))
        return self.B.T @ delta + 2 * self.A.T @ s, torch.zeros_like(theta)

    def _maximiser(self, theta: Tensor, multiplier: float) -> Tensor:
        delta = torch.zeros_like(self.a)
        for _ in range(50):  # Newton's method, until its steps are rounding errors: about six
            step = self._newton_step(delta, theta, multiplier)
            delta = delta + step
            if step.norm() <= 1e-14 * (1 + delta.norm()):
                return delta
        raise ArithmeticError("Newton's method did not converge")
