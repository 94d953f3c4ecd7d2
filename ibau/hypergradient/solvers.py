"""Linear solvers for A x = b that need only products A v, and say how near they came and why they stopped."""

import math
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

Matvec = Callable[[Tensor], Tensor]


Solver = Callable[..., "Solution"]


DENSE_LIMIT = 4096  # unknowns of `dense`: a float64 matrix of 128 MiB


@dataclass(frozen=True)
class Solution:
    """What a linear solver returns: x, how near it came, and the products A cost.

    residual     |b - A x| / |b|; nan where it was not verified
    contraction  the last factor by which an iteration shrank the residual; 1 or more means that a fixed-point
                 iteration does not converge. It is 0 when there was nothing to iterate
    curvature    the smallest p^T A p / p^T p seen, where the solver needs A definite; nan where it does not.
                 0 or less proves that A is not positive definite
    stopped      why: "tol" (it is reached), "maxiter", "rounding" (no nearer in this precision),
                 "not finite", "curvature" (A is not positive definite), "singular"; "" from `fixed_point`
                 and `neumann`, which do not wait for the device to know it

    The first two may lie on x's device, as `rest` and `factor`; to read them as floats waits for it.
    """

    x: Tensor
    rest: float | Tensor
    products: int
    factor: float | Tensor
    curvature: float = math.nan
    stopped: str = ""

    @property
    def residual(self) -> float:
        return float(self.rest)

    @property
    def contraction(self) -> float:
        return float(self.factor)


def settled(flag: Tensor) -> bool:
    """Whether `flag` is known to hold, so that work can be spared.

    On a CPU it is known. On a GPU, asking would wait for all that was asked of it before, which takes longer
    than the work that might be spared: the answer is no, and what is computed in vain is masked out.
    """
    return flag.device.type == "cpu" and bool(flag)


def fixed_point(
    matvec: Matvec,
    b: Tensor,
    *,
    maxiter: int,
    tol: float = 0.0,
    verify: bool = True,
) -> Solution:
    """Solve A x = b by x <- x + (b - A x), the truncated Neumann series of A = I - J.

    Needs the spectral radius of J = I - A below 1; then the residual falls by that factor an iteration.
    Where it does not fall, the best iterate seen is returned, so a series that diverges cannot do harm
    unnoticed: never worse than x = 0, where it starts and whose residual is 1. Keeps the first x with a
    relative residual of at most `tol`, and on a CPU stops there. `maxiter` iterations sum the series' first
    `maxiter` terms, the paper's K. The last product serves the residual alone, and is left out where that is
    not to be verified.
    """
    _check(maxiter)
    size = _length(b)
    x = best = torch.zeros_like(b)
    r, residual, contraction, products = b, (size != 0).to(size), torch.zeros_like(size), 0
    least, done = residual, residual <= tol
    for k in range(maxiter):
        if settled(done):
            break
        x = x + r
        if k == maxiter - 1 and not verify:
            believed = ~done & (contraction < 1)
            best, least = torch.where(believed, x, best), torch.where(believed, math.nan, least)
            break
        r = r - matvec(r)  # the residual of the new x, without a second product: b - A(x + r) = r - A r
        products += 1
        previous, residual = residual, _length(r) / size
        contraction = torch.where(done, contraction, residual / previous)
        better = ~done & (residual < least)
        best, least = torch.where(better, x, best), torch.where(better, residual, least)
        done = done | (least <= tol) | ~(residual < math.inf)  # after overflow or NaN nothing better follows
    return Solution(best, least, products, contraction)


def neumann(
    matvec: Matvec,
    b: Tensor,
    *,
    maxiter: int,
    tol: float = 0.0,
    verify: bool = True,
) -> Solution:
    """The first `maxiter` terms of the Neumann series of A = I - J, whether it converges or not.

    What the I-BAU authors' code sums, for comparison; `tol` is accepted and ignored. The residual is that of
    the sum, and has no bound: `fixed_point` is the same series under control.
    """
    size = _length(b)
    nothing = size == 0
    x, r, residual = torch.zeros_like(b), b, (~nothing).to(size)
    if settled(nothing) or maxiter == 0:
        return Solution(x, residual, 0, 0.0)
    previous, products = residual, maxiter if verify else maxiter - 1
    for _ in range(products):
        x = x + r
        r = r - matvec(r)
        previous, residual = residual, torch.where(nothing, 0.0, _length(r) / size)
    contraction = residual / previous.clamp_min(1e-30)
    if not verify:
        x, residual = x + r, math.nan
    return Solution(x, residual, products, contraction)


def conjugate_gradient(
    matvec: Matvec,
    b: Tensor,
    *,
    maxiter: int,
    tol: float = 0.0,
    verify: bool = True,
) -> Solution:
    """Solve A x = b by conjugate gradients.

    Needs A symmetric positive definite; then the error falls at least by (sqrt(k) - 1) / (sqrt(k) + 1) an
    iteration in the norm of A, k its condition number, and vanishes after as many iterations as A has
    distinct eigenvalues. Symmetry is not checked. A direction whose curvature is, up to rounding, not
    positive, or a number that is not finite, ends the iteration; the iterate with the smallest residual is
    returned, and `stopped` and `curvature` say what was met. Stops early at a relative residual of `tol`, or
    of the rounding unit.

    Rounding makes the residual that the iteration carries along drift from the true one. Where it may have by
    more than a thousandth, the true one is computed afresh, by one more product, unless `verify` is False.
    """
    _check(maxiter)
    x, r, size = torch.zeros_like(b), b, b.norm().item()
    residual = 0.0 if size == 0 else 1.0
    unit = torch.finfo(b.dtype).eps
    scale = size if 0 < size < math.inf else 1.0
    r = r / scale  # a tiny b must not underflow when squared
    zero = best = x
    best_residual = residual
    products, contraction, curvature, largest, stopped = 0, 0.0, math.inf, 0.0, "maxiter"
    p = r
    for _ in range(maxiter):
        if best_residual <= max(tol, unit):
            break
        ap = matvec(p)
        products += 1
        pp, pap = p.square().sum().item(), (p * ap).sum().item()
        if not math.isfinite(pap):
            stopped = "not finite"
            break
        curvature, largest = min(curvature, pap / pp), max(largest, pap / pp)
        if pap <= unit * largest * pp:
            stopped = "curvature"
            break
        step = residual**2 / pap
        x, r = x + step * p, r - step * ap
        previous, residual = residual, r.norm().item()
        contraction = residual / previous
        if not math.isfinite(residual):
            stopped = "not finite"
            break
        if residual < best_residual:
            best, best_residual = x, residual
        p = r + contraction**2 * p
    stopped = "tol" if best_residual <= max(tol, unit) else stopped
    if verify and best is not zero and unit * largest * best.norm().item() > 1e-3 * best_residual:
        best_residual = (b / scale - matvec(best)).norm().item()
        products += 1
        if not best_residual < 1:
            best, best_residual = zero, 1.0
        if stopped == "tol" and best_residual > max(tol, 10 * unit):
            stopped = "rounding"
    curvature = curvature if curvature < math.inf else math.nan
    return Solution(best * scale, best_residual, products, contraction, curvature, stopped)


def dense(
    matvec: Matvec,
    b: Tensor,
    *,
    maxiter: int = 0,
    tol: float = 0.0,
    verify: bool = True,
) -> Solution:
    """Solve A x = b exactly: form A by as many products as there are unknowns, then eliminate.

    Needs A invertible; one that is not, or not finite, gives x = 0 and says so in `stopped`. `curvature` is
    the smallest eigenvalue of A's symmetric part. For small problems, as the truth to compare with:
    `maxiter`, `tol` and `verify` are accepted and ignored.
    """
    n, size = b.numel(), b.norm().item()
    if n > DENSE_LIMIT:
        raise ValueError(f"dense forms a matrix: {n} unknowns are more than its limit of {DENSE_LIMIT}")
    zero = torch.zeros_like(b)
    if size == 0:
        return Solution(zero, 0.0, 0, 0.0, stopped="tol")
    basis = torch.eye(n, dtype=b.dtype, device=b.device)
    a = torch.stack([matvec(e.view_as(b)).flatten() for e in basis], dim=1)
    if not (a.isfinite().all() and b.isfinite().all()):
        return Solution(zero, 1.0, n, 0.0, stopped="not finite")
    curvature = torch.linalg.eigvalsh((a + a.T) / 2)[0].item()
    x, failed = torch.linalg.solve_ex(a, b.flatten())
    residual = (b.flatten() - a @ x).norm().item() / size
    if failed or not residual < 1:
        return Solution(zero, 1.0, n, 0.0, curvature, "singular")
    return Solution(x.view_as(b), residual, n, 0.0, curvature, "tol")


def _check(maxiter: int) -> None:
    if maxiter < 0:
        raise ValueError(f"maxiter is {maxiter}; it must be at least 0")


def _length(v: Tensor) -> Tensor:
    """|v| on its device, in float64 where the device has it."""
    length = v.norm()
    return length if length.device.type == "mps" else length.double()
