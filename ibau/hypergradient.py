"""The implicit hypergradient: pure mathematics, no images.

An outer objective psi(theta) = H_out(delta*(theta), theta) looks at the solution of an inner problem that is
written as a fixed point, delta* = Phi(delta*, theta). Differentiating the fixed point gives the total
derivative, the paper's hypergradient (Zeng et al. 2022, section 3):

    d psi / d theta = dH_out/dtheta  +  (dPhi/dtheta)^T v,    (I - dPhi/ddelta)^T v = dH_out/ddelta
                      direct term       implicit term         a linear system of delta's size

Nothing larger than delta is ever inverted and no Jacobian is formed: both products with Phi's Jacobians are
single backward passes through one recorded evaluation of Phi.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

Matvec = Callable[[Tensor], Tensor]
Solver = Callable[..., "Solution"]


@dataclass(frozen=True)
class Solution:
    """What a linear solver returns: x, the relative residual |b - A x| / |b|, and the products A cost.

    `contraction` is the last factor by which an iteration shrank the residual; 1 or more means that the
    iteration does not converge. It is 0 when there was nothing to iterate.
    """

    x: Tensor
    residual: float
    products: int
    contraction: float


def fixed_point(matvec: Matvec, b: Tensor, *, maxiter: int, tol: float = 0.0) -> Solution:
    """Solve A x = b by x <- x + (b - A x), the truncated Neumann series of A = I - J.

    Needs the spectral radius of J = I - A below 1; then the residual falls by that factor an iteration.
    Where it does not fall, the best iterate seen is returned (x = 0 at worst, whose residual is 1), so a
    series that diverges cannot do harm unnoticed. Stops early at a relative residual of `tol`.
    `maxiter` iterations from x = 0 sum the series' first `maxiter` terms, the paper's K.
    """
    if maxiter < 0:
        raise ValueError(f"maxiter is {maxiter}; it must be at least 0")
    x, r = torch.zeros_like(b), b
    size = b.norm().item()
    best, best_residual, residual, contraction, products = x, 1.0, 1.0, 0.0, 0
    if size == 0:
        return Solution(x, 0.0, 0, 0.0)
    while products < maxiter and best_residual > tol:
        x = x + r
        r = r - matvec(r)  # the residual of the new x, without a second product: b - A(x + r) = r - A r
        products += 1
        previous, residual = residual, r.norm().item() / size
        contraction = residual / previous if previous > 0 else 0.0
        if not residual < float("inf"):  # overflow or NaN: nothing better can follow
            break
        if residual < best_residual:
            best, best_residual = x, residual
    return Solution(best, best_residual, products, contraction)


@dataclass(frozen=True)
class Hypergradient:
    """The two terms of d psi / d theta, one tensor a parameter, and how far they can be trusted.

    stationarity  |Phi(delta) - delta| / max(|delta|, 1e-12): 0 at a fixed point, which the theory assumes
    solution      of the linear system; its residual bounds the implicit term's relative truncation error
    """

    direct: tuple[Tensor, ...]
    implicit: tuple[Tensor, ...]
    loss: float
    stationarity: float
    solution: Solution

    @property
    def total(self) -> tuple[Tensor, ...]:
        """direct + implicit: the gradient to step along."""
        return tuple(d + i for d, i in zip(self.direct, self.implicit, strict=True))

    @property
    def ratio(self) -> float:
        """|implicit| / |direct|."""
        return (_norm(self.implicit) / max(_norm(self.direct), 1e-30)).item()


@torch.enable_grad()
def implicit_hypergradient(
    outer: Callable[[Tensor, Sequence[Tensor]], Tensor],
    phi: Callable[[Tensor, Sequence[Tensor]], Tensor],
    delta: Tensor,
    params: Sequence[Tensor],
    *,
    solve: Solver = fixed_point,
    maxiter: int = 5,
    tol: float = 0.0,
) -> Hypergradient:
    """d psi / d theta at an (almost) fixed point `delta` of `phi`.

    outer(delta, params) -> scalar; phi(delta, params) -> like delta. Both must use the tensors they are
    handed. Phi must be differentiable at delta: a projected gradient step is, save exactly on the
    constraint's edge. With maxiter = 0 the implicit term is left out, and phi is not evaluated.
    The result is as good as delta is stationary: see `Hypergradient.stationarity`.
    """
    delta = delta.detach().requires_grad_()
    params = [p.detach().requires_grad_() for p in params]
    loss = outer(delta, params)
    b, *direct = torch.autograd.grad(loss, [delta, *params], materialize_grads=True)
    if maxiter == 0:
        nothing = Solution(torch.zeros_like(b), 1.0, 0, 0.0)
        zeros = tuple(torch.zeros_like(p) for p in params)
        return Hypergradient(tuple(direct), zeros, loss.item(), float("nan"), nothing)

    step = phi(delta, params)
    stationarity = ((step - delta).norm() / delta.norm().clamp_min(1e-12)).item()

    def i_minus_jt(v: Tensor) -> Tensor:
        """(I - dPhi/ddelta)^T v"""
        return v - torch.autograd.grad(step, delta, v, retain_graph=True, materialize_grads=True)[0]

    solution = solve(i_minus_jt, b, maxiter=maxiter, tol=tol)
    implicit = torch.autograd.grad(step, params, solution.x, materialize_grads=True)
    return Hypergradient(tuple(direct), implicit, loss.item(), stationarity, solution)


def project_l2(x: Tensor, radius: float) -> Tensor:
    """The closest point to x in the l2 ball of this radius around 0; differentiable off the sphere."""
    return x * (radius / x.norm().clamp_min(1e-12)).clamp_max(1.0)


def _norm(tensors: Sequence[Tensor]) -> Tensor:
    return torch.stack([t.norm() for t in tensors]).norm()
