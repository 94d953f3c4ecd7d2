"""The implicit hypergradient as it is written down, and no faster: the oracle of tests and `make bench`.

Two gradients of the outer objective, one evaluation of Phi recorded with everything that autograd needs, K
products v <- (dPhi/ddelta)^T v + dH_out/ddelta from v = 0, one product with (dPhi/dtheta)^T; all by torch's
own layers in float32. What `hypergradient.implicit_hypergradient` must equal.
"""

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from unittest import mock

import torch
from torch import Tensor

from ibau.hypergradient.implicit import Hypergradient
from ibau.hypergradient.solvers import Solution
from ibau.unlearning import authors, common, ibau


@torch.enable_grad()
def textbook_hypergradient(
    outer: Callable[[Tensor, Sequence[Tensor]], Tensor],
    phi: Callable[[Tensor, Sequence[Tensor]], Tensor],
    delta: Tensor,
    params: Sequence[Tensor],
    K: int,
) -> Hypergradient:
    """dH_out/dtheta + (dPhi/dtheta)^T v, v = the first K terms of the Neumann series (K = 0: v = 0).

    Arguments as of `implicit_hypergradient`. Stationarity and the residual are not computed (nan).
    """
    delta = delta.detach().requires_grad_()
    params = [p.detach().requires_grad_() for p in params]
    loss = outer(delta, params)
    direct = torch.autograd.grad(loss, params, retain_graph=True, materialize_grads=True)
    if K == 0:
        implicit = tuple(torch.zeros_like(p) for p in params)
        nothing = Solution(torch.zeros_like(delta), 1.0, 0, 0.0)
        return Hypergradient(direct, implicit, loss.item(), float("nan"), nothing)
    (b,) = torch.autograd.grad(loss, delta, materialize_grads=True)
    step = phi(delta, params)
    v = torch.zeros_like(b)
    for _ in range(K):
        v = torch.autograd.grad(step, delta, v, retain_graph=True)[0] + b
    implicit = torch.autograd.grad(step, params, v, materialize_grads=True)
    return Hypergradient(direct, implicit, loss.item(), float("nan"), Solution(v, float("nan"), K, 0.0))


def _in_its_place(outer, phi, delta, params, *, maxiter: int, **speed) -> Hypergradient:
    """Called as `implicit_hypergradient` is; solver, tolerance and precision are not heeded."""
    return textbook_hypergradient(outer, phi, delta, params, maxiter)


@contextmanager
def textbook() -> Iterator[None]:
    """Within, `ibau.unlearn` with its series and the authors' recipe take the textbook's hypergradient.

    They also keep torch's own layers, in torch's own memory format.
    """
    layers = {"cheapen": lambda model, images=None: model, "takes_channels_last": lambda model, images: False}
    with (
        mock.patch.object(ibau, "implicit_hypergradient", _in_its_place),
        mock.patch.object(authors, "implicit_hypergradient", _in_its_place),
        mock.patch.multiple(common, **layers),
    ):
        yield
