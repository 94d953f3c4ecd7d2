"""The implicit hypergradient: pure mathematics, no images.

An outer objective psi(theta) = H_out(delta*(theta), theta) looks at the solution of an inner problem. If the
solution is written as a fixed point, delta* = Phi(delta*, theta), differentiating it gives the total
derivative, the paper's hypergradient (Zeng et al. 2022, section 3):

    d psi / d theta = dH_out/dtheta  +  (dPhi/dtheta)^T v,    (I - dPhi/ddelta)^T v = dH_out/ddelta
                      direct term       implicit term         a linear system of delta's size

`implicit_hypergradient` is this formula, `unrolled_hypergradient` the same limit reached by differentiating
through the iteration, and `kkt_hypergradient` the formula for a maximiser in an l2 ball, interior or on the
sphere, from the optimality conditions themselves.

Nothing larger than delta is ever inverted and, save in `dense`, no matrix is formed: every product with a
Jacobian or a Hessian is a single backward pass through one recorded evaluation.

Every solver is called as `solve(matvec, b, *, maxiter, tol=0.0, verify=True) -> Solution`, and starts at
x = 0. None but `neumann` returns anything worse than that, and on a CPU none multiplies a zero vector. With
`verify` False no product is spent on nothing but the residual of the x that is returned: a caller who
multiplies x anyway, as the hypergradient does, gets that residual for nothing.

Losses, residuals and the like of the default solver stay on the device until they are read.
"""

import math
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, replace

import torch
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel

from ibau.hypergradient.solvers import Solution, Solver, conjugate_gradient, fixed_point, neumann, settled

ON_SPHERE = 1e-4  # |delta| within this share of the radius lies on the sphere


@dataclass(frozen=True)
class Hypergradient:
    """The two terms of d psi / d theta, one tensor a parameter, and how far they can be trusted.

    loss          H_out(delta, theta)
    stationarity  how far delta is from what the theory assumes, 0 being exact; relative, and defined by the
                  function that made this
    solution      of the linear system; its residual bounds the implicit term's relative truncation error,
                  up to the system's condition number
    multiplier    lambda of the constraint |delta| <= radius; 0 in its interior and where there is none

    The first two may lie on delta's device, as `value` and `gap`. To read a number as a float waits for the
    device; `numbers` has those of an algorithm's history in one tensor, without a wait.
    """

    direct: tuple[Tensor, ...]
    implicit: tuple[Tensor, ...]
    value: float | Tensor
    gap: float | Tensor
    solution: Solution
    multiplier: float = 0.0

    @property
    def loss(self) -> float:
        return float(self.value)

    @property
    def stationarity(self) -> float:
        return float(self.gap)

    @property
    def total(self) -> tuple[Tensor, ...]:
        """direct + implicit: the gradient to step along."""
        return tuple(d + i for d, i in zip(self.direct, self.implicit, strict=True))

    @property
    def ratio(self) -> float:
        """|implicit| / |direct|."""
        return self._ratio().item()

    def numbers(self) -> Tensor:
        """(4,), on the device: loss, |implicit| / |direct|, the linear system's residual and contraction."""
        ratio = self._ratio()
        found = (self.value, ratio, self.solution.rest, self.solution.factor)
        return torch.stack(
            [n.to(ratio) if isinstance(n, Tensor) else torch.full_like(ratio, n) for n in found]
        )

    def _ratio(self) -> Tensor:
        return _norm(self.implicit) / _norm(self.direct).clamp_min(1e-30)


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
    products: AbstractContextManager | None = None,
) -> Hypergradient:
    """d psi / d theta at an (almost) fixed point `delta` of `phi`: (I - dPhi/ddelta)^T v = dH_out/ddelta.

    outer(delta, params) -> scalar; phi(delta, params) -> like delta. Both must use the tensors they are
    handed. Phi must be differentiable at delta: a projected gradient step is, save exactly on the
    constraint's edge. With maxiter = 0 the implicit term is left out, and phi is not evaluated.
    `products` is a context to compute products with Phi's Jacobians in, such as one of lower precision.

    Costs one evaluation of `outer` with its gradient, one of Phi, the solver's products, and one backward
    pass through Phi that gives both (dPhi/dtheta)^T v and, with (dPhi/ddelta)^T v, the residual of v: the
    fixed-point iteration needs K - 1 products for K terms.

    Needs delta = Phi(delta); reported: stationarity |Phi(delta) - delta| / max(|delta|, 1e-12).
    `fixed_point` needs Phi to contract near delta; reported: solution.contraction.
    `conjugate_gradient` needs dPhi/ddelta symmetric with eigenvalues below 1: true of a gradient step, but
    not of a projected one on the sphere, for which `kkt_hypergradient` is.
    """
    delta, params, loss, b, direct = _outer_gradients(outer, delta, params)
    if maxiter == 0:
        return _direct_alone(direct, loss, b)
    with _twice_differentiable():
        step = phi(delta, params)
    stationarity = (step - delta).detach().norm() / delta.detach().norm().clamp_min(1e-12)

    def i_minus_jt(v: Tensor) -> Tensor:
        """(I - dPhi/ddelta)^T v"""
        return v - _vjp(step, [delta], v)[0]

    with products or nullcontext():
        solution = solve(i_minus_jt, b, maxiter=maxiter, tol=tol, verify=False)
        jt_v, *implicit = _vjp(step, [delta, *params], solution.x)
    residual = torch.where(b.any(), (b - solution.x + jt_v).norm() / b.norm(), 0.0)
    solution = replace(solution, rest=residual)
    better = residual <= 1  # than v = 0
    if solve is not neumann and not settled(better):
        implicit = [torch.where(better, i, 0.0) for i in implicit]
        x, rest = torch.where(better, solution.x, 0.0), torch.where(better, residual, 1.0)
        solution = replace(solution, x=x, rest=rest)
    return Hypergradient(direct, tuple(implicit), loss, stationarity, solution)


@torch.enable_grad()
def kkt_hypergradient(
    outer: Callable[[Tensor, Sequence[Tensor]], Tensor],
    inner: Callable[[Tensor, Sequence[Tensor]], Tensor],
    delta: Tensor,
    params: Sequence[Tensor],
    *,
    radius: float,
    solve: Solver = conjugate_gradient,
    maxiter: int = 5,
    tol: float = 0.0,
) -> Hypergradient:
    """d psi / d theta at an (almost) maximiser `delta` of `inner(delta, params)` over |delta|_2 <= radius.

    With g = d inner/ddelta and H its Hessian, a maximiser obeys g = lambda delta with lambda >= 0, and
    lambda = 0 in the interior. Differentiating this and the constraint gives

        P (lambda I - H) P v = P dH_out/ddelta,     implicit = (d g/dtheta)^T v,

    where P projects onto the sphere's tangent space at delta; in the interior P = I. With maxiter = 0
    the implicit term is left out, and `inner` is not evaluated.

    Needs stationarity, and the system positive definite: delta a strict local maximiser of second order.
    The step size that a Phi would need plays no part, but `fixed_point` then needs eigenvalues in (0, 2).
    On the sphere lambda = <g, delta> / |delta|^2 is reported as `multiplier`; a delta there with lambda <= 0
    is pulled inwards, and treated as an interior point. Reported: stationarity,

        on the sphere   |g - lambda delta| / |g|   the sine of the angle between g and delta
        inside          |g| / |H delta|            one product; near |delta - delta*| / |delta|

    and solution.curvature, 0 or less when the solver met a direction in which delta is no maximiser.
    """
    delta, params, loss, b, direct = _outer_gradients(outer, delta, params)
    norm = delta.detach().norm()
    if norm > radius * (1 + ON_SPHERE):
        raise ValueError(f"|delta| is {norm.item():.6g}, outside the ball of radius {radius:g}")
    if maxiter == 0:
        return _direct_alone(direct, loss, b)
    with _twice_differentiable():
        (g,) = torch.autograd.grad(inner(delta, params), delta, create_graph=True)
    at, slope = delta.detach(), g.detach()
    multiplier = 0.0
    if norm >= radius * (1 - ON_SPHERE):
        multiplier = max(0.0, ((slope * at).sum() / norm**2).item())
    normal = at / norm if multiplier > 0 else torch.zeros_like(at)
    if multiplier > 0:
        rest = slope - multiplier * at
        stationarity = (rest.norm() / slope.norm()).item()
    elif norm > 0:
        stationarity = (slope.norm() / _vjp(g, [delta], at)[0].norm().clamp_min(1e-30)).item()
    else:
        stationarity = 0.0 if slope.norm() == 0 else math.inf

    def tangent(v: Tensor) -> Tensor:
        """P v"""
        return v - normal * (normal * v).sum()

    def system(v: Tensor) -> Tensor:
        """P (lambda I - H) P v + lambda (I - P) v: invertible, and the same on the tangent space."""
        return multiplier * v - tangent(_vjp(g, [delta], tangent(v))[0])

    solution = solve(system, tangent(b), maxiter=maxiter, tol=tol)
    implicit = _vjp(g, params, solution.x)
    return Hypergradient(direct, implicit, loss, stationarity, solution, multiplier)


@torch.enable_grad()
def unrolled_hypergradient(
    outer: Callable[[Tensor, Sequence[Tensor]], Tensor],
    phi: Callable[[Tensor, Sequence[Tensor]], Tensor],
    delta0: Tensor,
    params: Sequence[Tensor],
    *,
    steps: int,
) -> Hypergradient:
    """The exact derivative of H_out(delta_steps(theta), theta), delta_k+1 = Phi(delta_k, theta) from delta0.

    Needs nothing but smoothness; where Phi contracts it tends to d psi / d theta as `steps` grows. Memory
    grows with `steps`: every one is kept. Implicit is the part that passes through delta.
    No system is solved: solution.x is 0 and its residual nan; products are the steps. Reported:
    stationarity |delta_steps - delta_steps-1| / |delta_steps|, and in solution.contraction the ratio of the
    last two moves.
    """
    if steps < 0:
        raise ValueError(f"steps is {steps}; it must be at least 0")
    theta = [p.detach().requires_grad_() for p in params]
    delta, contraction = delta0.detach().requires_grad_(), math.nan
    move = torch.full_like(delta0.detach().norm(), math.nan)
    for _ in range(steps):
        with _twice_differentiable():
            before, delta = delta, phi(delta, theta)
        previous, move = move, (delta - before).detach().norm()
        contraction = torch.where(previous > 0, move / previous, 0.0)
    _, _, loss, b, direct = _outer_gradients(outer, delta, params)
    stationarity = move / delta.detach().norm().clamp_min(1e-12)
    nothing = Solution(torch.zeros_like(b), math.nan, steps, contraction)
    return Hypergradient(direct, _vjp(delta, theta, b), loss, stationarity, nothing)


@torch.enable_grad()
def curvature(
    inner: Callable[[Tensor, Sequence[Tensor]], Tensor],
    delta: Tensor,
    params: Sequence[Tensor],
    *,
    products: int = 8,
) -> Tensor:
    """|d2 inner / d delta2|, the largest absolute eigenvalue of the Hessian, by power iteration; scalar.

    At a maximiser a gradient step on `inner` of size eta contracts along every curved direction where
    eta < 2 / |d2 inner / d delta2|. The iteration starts at the gradient and approaches the norm from below;
    it is 0 where the gradient is, or the Hessian has nothing of its direction.
    """
    delta = delta.detach().requires_grad_()
    with _twice_differentiable():
        (g,) = torch.autograd.grad(inner(delta, params), delta, create_graph=True)
    v = g.detach()
    for _ in range(products):
        (v,) = _vjp(g, [delta], v / v.norm().clamp_min(1e-30))
    return v.norm()


def project_l2(x: Tensor, radius: float) -> Tensor:
    """The closest point to x in the l2 ball of this radius around 0; differentiable off the sphere."""
    if math.isinf(radius):
        return x
    return x * (radius / x.norm().clamp_min(1e-12)).clamp_max(1.0)


def _twice_differentiable():
    """Within, attention is computed by matrix products: torch's fused kernels have no second derivative."""
    return sdpa_kernel(SDPBackend.MATH)


def _outer_gradients(outer, delta: Tensor, params: Sequence[Tensor]):
    """Fresh leaves for delta and params, the outer loss there, and its gradients in one backward pass."""
    delta = delta.detach().requires_grad_()
    params = [p.detach().requires_grad_() for p in params]
    loss = outer(delta, params)
    b, *direct = torch.autograd.grad(loss, [delta, *params], materialize_grads=True)
    return delta, params, loss.detach(), b, tuple(direct)


def _direct_alone(direct: tuple[Tensor, ...], loss: Tensor, b: Tensor) -> Hypergradient:
    nothing = Solution(torch.zeros_like(b), 1.0, 0, 0.0, stopped="maxiter")
    return Hypergradient(direct, tuple(torch.zeros_like(d) for d in direct), loss, math.nan, nothing)


def _vjp(output: Tensor, inputs: Sequence[Tensor], v: Tensor) -> tuple[Tensor, ...]:
    """(d output / d inputs)^T v: one backward pass, or none where it is known to be 0."""
    if not output.requires_grad or settled(~v.any()):
        return tuple(torch.zeros_like(i) for i in inputs)
    return torch.autograd.grad(output, inputs, v, retain_graph=True, materialize_grads=True)


def _norm(tensors: Sequence[Tensor]) -> Tensor:
    return torch.stack([t.norm() for t in tensors]).norm()
