"""The hypergradient equals closed forms and finite differences; the solver is what it claims to be."""

import math

import pytest
import torch
from hypothesis import assume, given, settings
from hypothesis import strategies as st
from torch import nn
from torch.func import functional_call

from ibau.hypergradient import fixed_point, implicit_hypergradient, project_l2

often = settings(max_examples=50, deadline=None)
seeds = st.integers(0, 2**32 - 1)


def gaussian(seed, *shape):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def contraction(seed, n, radius):
    """A symmetric matrix whose eigenvalues lie in [-radius, radius], radius among them."""
    basis, _ = torch.linalg.qr(gaussian(seed, n, n))
    return basis @ torch.diag(torch.linspace(-radius, radius, n, dtype=torch.float64)) @ basis.T


def relative(a, b):
    return ((a - b).norm() / b.norm()).item()


# ---- the linear solver


@often
@given(seed=seeds, n=st.integers(1, 20), radius=st.floats(0.01, 0.9))
def test_fixed_point_solves_a_contraction(seed, n, radius):
    a = torch.eye(n, dtype=torch.float64) - contraction(seed, n, radius)
    b = gaussian(seed + 1, n)
    assume(b.norm() > 0)
    found = fixed_point(lambda x: a @ x, b, maxiter=1000, tol=1e-12)
    assert relative(found.x, torch.linalg.solve(a, b)) < 1e-9
    assert found.residual <= 1e-12
    assert found.residual == pytest.approx(relative(a @ found.x, b), abs=1e-12)  # it is the true residual


@pytest.mark.parametrize("k", [1, 2, 5, 20])
def test_fixed_point_sums_the_first_k_terms_of_the_neumann_series(k):
    j, b = contraction(0, 8, 0.8), gaussian(1, 8)
    found = fixed_point(lambda x: x - j @ x, b, maxiter=k)
    series = sum(torch.linalg.matrix_power(j, i) @ b for i in range(k))
    assert found.products == k
    torch.testing.assert_close(found.x, series, rtol=1e-12, atol=1e-12)


def test_fixed_point_reports_how_fast_it_converges():
    j = contraction(0, 8, 0.7)
    found = fixed_point(lambda x: x - j @ x, gaussian(1, 8), maxiter=60)
    assert found.contraction == pytest.approx(0.7, rel=1e-3)


def test_fixed_point_stops_at_its_tolerance():
    calls = []

    def half(x):
        calls.append(x)
        return 0.5 * x

    found = fixed_point(half, gaussian(0, 4), maxiter=100, tol=0.1)  # residuals 1/2, 1/4, 1/8, 1/16
    assert found.products == len(calls) == 4
    assert found.residual == pytest.approx(1 / 16)


@often
@given(seed=seeds, radius=st.floats(1.0, 1e6), maxiter=st.integers(1, 400))
def test_a_diverging_series_is_never_worse_than_nothing(seed, radius, maxiter):
    j = contraction(seed, 6, radius)
    a, b = torch.eye(6, dtype=torch.float64) - j, gaussian(seed + 1, 6)
    found = fixed_point(lambda x: a @ x, b, maxiter=maxiter)
    assert found.residual <= 1
    assert relative(a @ found.x, b) == pytest.approx(found.residual, rel=1e-6)


def test_a_map_that_diverges_from_the_start_gives_zero():
    found = fixed_point(lambda x: -2 * x, gaussian(0, 5), maxiter=10_000)  # J = 3: overflows on the way
    assert torch.equal(found.x, torch.zeros(5, dtype=torch.float64))
    assert found.residual == 1
    assert found.contraction >= 1


def test_fixed_point_needs_no_product_for_a_zero_right_hand_side():
    found = fixed_point(lambda x: 1 / 0, torch.zeros(3), maxiter=5)
    assert (found.residual, found.products, found.contraction) == (0, 0, 0)
    assert torch.equal(found.x, torch.zeros(3))


@pytest.mark.parametrize("maxiter", [0, 5])
def test_fixed_point_survives_nan(maxiter):
    found = fixed_point(lambda x: x * math.nan, torch.ones(3), maxiter=maxiter)
    assert torch.equal(found.x, torch.zeros(3))
    assert found.residual == 1
    assert found.products <= 1
    assert torch.equal(
        fixed_point(lambda x: x, torch.full((3,), math.nan), maxiter=maxiter).x, torch.zeros(3)
    )


def test_fixed_point_keeps_the_shape_and_refuses_a_negative_maxiter():
    assert fixed_point(lambda x: x, torch.ones(1, 3, 4, 4), maxiter=2).x.shape == (1, 3, 4, 4)
    with pytest.raises(ValueError, match="maxiter is -1"):
        fixed_point(lambda x: x, torch.ones(1), maxiter=-1)


# ---- a quadratic bilevel problem: delta* = M^-1 B theta minimises delta^T M delta / 2 - delta^T B theta


class Quadratic:
    """psi(theta) = |delta* - a|^2 / 2 + c . theta + theta^T delta*[:m]; Phi descends with step eta."""

    n, m, eta = 6, 4, 0.2

    def __init__(self):
        basis, _ = torch.linalg.qr(gaussian(0, self.n, self.n))
        self.M = basis @ torch.diag(torch.linspace(1.0, 4.0, self.n, dtype=torch.float64)) @ basis.T
        self.B, self.a, self.c = gaussian(1, self.n, self.m), gaussian(2, self.n), gaussian(3, self.m)
        self.theta = gaussian(4, self.m)
        self.delta = torch.linalg.solve(self.M, self.B @ self.theta)
        self.rate = 1 - self.eta  # spectral radius of I - eta M: the slowest eigenvalue of M is 1

    def phi(self, delta, params):
        return delta - self.eta * (self.M @ delta - self.B @ params[0])

    def outer(self, delta, params):
        theta = params[0]
        return ((delta - self.a) ** 2).sum() / 2 + self.c @ theta + theta @ delta[: self.m]

    def closed_form(self):
        """The direct and the implicit term."""
        b = self.delta - self.a
        b[: self.m] += self.theta
        return self.c + self.delta[: self.m], self.B.T @ torch.linalg.solve(self.M, b)

    def estimate(self, maxiter):
        return implicit_hypergradient(self.outer, self.phi, self.delta, [self.theta], maxiter=maxiter)


def test_the_quadratic_problem_has_its_closed_form():
    problem = Quadratic()
    direct, implicit = problem.closed_form()
    found = problem.estimate(200)
    assert relative(found.direct[0], direct) < 1e-12
    assert relative(found.implicit[0], implicit) < 1e-10
    assert relative(found.total[0], direct + implicit) < 1e-10
    assert found.stationarity < 1e-12
    assert found.ratio == pytest.approx((implicit.norm() / direct.norm()).item())
    assert found.loss == pytest.approx(problem.outer(problem.delta, [problem.theta]).item())


def test_the_closed_form_is_the_derivative_of_psi():
    problem = Quadratic()

    def psi(theta):
        return problem.outer(torch.linalg.solve(problem.M, problem.B @ theta), [theta])

    assert relative(torch.func.grad(psi)(problem.theta), sum(problem.closed_form())) < 1e-12


def test_the_error_falls_with_k_at_the_rate_of_the_spectral_radius():
    problem = Quadratic()
    exact = sum(problem.closed_form())
    errors = [relative(problem.estimate(k).total[0], exact) for k in range(0, 61, 5)]
    assert all(b < a for a, b in zip(errors, errors[1:], strict=False))
    measured = (errors[-1] / errors[-3]) ** (1 / 10)
    assert measured == pytest.approx(problem.rate, rel=1e-3)


def test_without_iterations_the_implicit_term_is_left_out():
    problem = Quadratic()
    found = implicit_hypergradient(
        problem.outer, lambda *_: 1 / 0, problem.delta, [problem.theta], maxiter=0
    )  # phi is not even called
    assert relative(found.direct[0], problem.closed_form()[0]) < 1e-12
    assert torch.equal(found.total[0], found.direct[0])
    assert found.ratio == 0
    assert found.solution.residual == 1
    assert math.isnan(found.stationarity)


def test_stationarity_is_the_relative_step_of_phi():
    problem = Quadratic()
    problem.delta = problem.delta + 1
    found = problem.estimate(1)
    step = problem.phi(problem.delta, [problem.theta]) - problem.delta
    assert found.stationarity == pytest.approx((step.norm() / problem.delta.norm()).item())


def test_the_arguments_are_left_alone():
    problem = Quadratic()
    delta, theta = problem.delta.clone(), problem.theta.clone()
    problem.estimate(3)
    assert torch.equal(problem.delta, delta)
    assert torch.equal(problem.theta, theta)
    for tensor in (problem.delta, problem.theta):
        assert not tensor.requires_grad
        assert tensor.grad is None


def test_a_parameter_that_nothing_depends_on_gets_zero():
    problem = Quadratic()
    found = implicit_hypergradient(
        problem.outer, problem.phi, problem.delta, [problem.theta, torch.ones(2)], maxiter=200
    )
    assert torch.equal(found.total[1], torch.zeros(2))
    assert relative(found.total[0], sum(problem.closed_form())) < 1e-10


def test_an_outer_objective_without_delta_has_no_implicit_term():
    problem = Quadratic()
    found = implicit_hypergradient(
        lambda delta, params: params[0] @ problem.c, problem.phi, problem.delta, [problem.theta], maxiter=5
    )
    assert torch.equal(found.total[0], problem.c)
    assert found.solution.products == 0


# ---- on the boundary: max of delta . g(theta) over |delta| <= C has delta* = C g / |g|


def test_a_maximiser_on_the_sphere_has_its_closed_form():
    radius, eta = 2.0, 0.5
    a, c, theta = gaussian(0, 6, 3), gaussian(1, 6), gaussian(2, 3)

    def g(theta):
        return a @ torch.tanh(theta)

    def outer(delta, params):
        return torch.sin(delta) @ c + (params[0] ** 3).sum()

    def phi(delta, params):
        objective = delta @ g(params[0])
        (gradient,) = torch.autograd.grad(objective, delta, create_graph=True)
        return project_l2(delta + eta * gradient, radius)

    def solution(theta):
        return radius * g(theta) / g(theta).norm()

    delta = solution(theta)
    unit = delta / radius
    sphere = (torch.eye(6, dtype=torch.float64) - torch.outer(unit, unit)) * radius / g(theta).norm()
    moves = sphere @ a @ torch.diag(1 - torch.tanh(theta) ** 2)  # d delta* / d theta
    implicit = moves.T @ (torch.cos(delta) * c)
    found = implicit_hypergradient(outer, phi, delta, [theta], maxiter=300)
    assert found.stationarity < 1e-12
    assert relative(found.direct[0], 3 * theta**2) < 1e-12
    assert relative(found.implicit[0], implicit) < 1e-9
    exact = torch.func.grad(lambda t: outer(solution(t), [t]))(theta)
    assert relative(found.total[0], exact) < 1e-9


def test_danskin_the_implicit_term_vanishes_where_inner_and_outer_agree():
    """At an interior maximiser of the outer objective itself the implicit term is zero."""
    problem = Quadratic()

    def objective(delta, params):
        return delta @ (problem.B @ params[0]) - delta @ problem.M @ delta / 2

    found = implicit_hypergradient(objective, problem.phi, problem.delta, [problem.theta], maxiter=50)
    assert found.ratio < 1e-12


# ---- a network: the total derivative against finite differences of psi, the inner problem solved anew


class TinyNetwork:
    """Linear-ELU-Linear on images + delta; the inner problem is made concave by -mu |delta|^2 / 2."""

    mu, eta = 6.0, 0.1

    def __init__(self):
        self.net = nn.Sequential(nn.Linear(4, 5), nn.ELU(), nn.Linear(5, 3)).double()
        for i, p in enumerate(self.net.parameters()):
            p.data = gaussian(i, *p.shape) * 0.7
        self.names = [name for name, _ in self.net.named_parameters()]
        self.params = [p.detach() for p in self.net.parameters()]
        self.x, self.y = gaussian(10, 8, 4), torch.arange(8) % 3
        self.x_outer, self.y_outer = gaussian(11, 8, 4), (torch.arange(8) + 1) % 3

    def loss(self, delta, params, x, y):
        logits = functional_call(self.net, dict(zip(self.names, params, strict=True)), (x + delta,))
        return nn.functional.cross_entropy(logits, y)

    def outer(self, delta, params):
        return self.loss(delta, params, self.x_outer, self.y_outer)

    def phi(self, delta, params):
        with torch.enable_grad():
            delta = delta if delta.requires_grad else delta.requires_grad_()
            inner = self.loss(delta, params, self.x, self.y) - self.mu * (delta**2).sum() / 2
            (gradient,) = torch.autograd.grad(inner, delta, create_graph=True)
        return delta + self.eta * gradient

    def solve(self, params):
        delta = torch.zeros(1, 4, dtype=torch.float64)
        for _ in range(400):
            moved = self.phi(delta, params).detach()
            if (moved - delta).norm() < 1e-15:
                break
            delta = moved
        return delta.detach()

    def psi(self, params):
        return self.outer(self.solve(params), params).item()


def test_the_hypergradient_of_a_network_equals_finite_differences():
    problem = TinyNetwork()
    delta = problem.solve(problem.params)
    found = implicit_hypergradient(problem.outer, problem.phi, delta, problem.params, maxiter=200)
    assert found.stationarity < 1e-12
    assert found.ratio > 0.02  # there is an implicit term to get wrong
    h, differences = 1e-5, []
    for i, p in enumerate(problem.params):
        for j in range(p.numel()):
            shifted = []
            for sign in (1, -1):
                params = [q.clone() for q in problem.params]
                params[i].view(-1)[j] += sign * h
                shifted.append(problem.psi(params))
            differences.append((shifted[0] - shifted[1]) / (2 * h))
    differences = torch.tensor(differences, dtype=torch.float64)
    total = torch.cat([t.flatten() for t in found.total])
    direct = torch.cat([t.flatten() for t in found.direct])
    assert relative(total, differences) < 1e-6
    assert relative(direct, differences) > 1e-3  # and the direct term alone is wrong


# ---- the projection


vectors = st.lists(st.floats(-1e3, 1e3), min_size=1, max_size=8).map(
    lambda values: torch.tensor(values, dtype=torch.float64)
)
radii = st.floats(1e-3, 1e3)


@often
@given(x=vectors, radius=radii)
def test_the_projection_stays_in_the_ball_and_is_idempotent(x, radius):
    once = project_l2(x, radius)
    assert once.norm() <= radius * (1 + 1e-12)
    torch.testing.assert_close(project_l2(once, radius), once, rtol=1e-12, atol=0)
    if x.norm() <= radius * (1 - 1e-12):
        assert torch.equal(once, x)
    else:  # it only shortens
        torch.testing.assert_close(once * x.norm(), x * once.norm(), rtol=1e-9, atol=1e-9)


@often
@given(x=vectors, radius=radii, seed=seeds)
def test_the_projection_is_the_closest_point(x, radius, seed):
    other = gaussian(seed, len(x))
    other = other * radius / max(other.norm().item(), 1e-9)
    assert (x - project_l2(x, radius)).norm() <= (x - other).norm() * (1 + 1e-12) + 1e-12


@often
@given(seed=seeds, n=st.integers(1, 8), radius=radii)
def test_the_projection_brings_no_two_points_further_apart(seed, n, radius):
    x, y = 2 * radius * gaussian(seed, n), 2 * radius * gaussian(seed + 1, n)
    apart = (project_l2(x, radius) - project_l2(y, radius)).norm()
    assert apart <= (x - y).norm() * (1 + 1e-12) + 1e-12


def test_the_projection_of_nothing_is_nothing_with_a_gradient():
    x = torch.zeros(3, dtype=torch.float64, requires_grad=True)
    (gradient,) = torch.autograd.grad(project_l2(x, 2.0).sum(), x)
    assert torch.equal(gradient, torch.ones(3, dtype=torch.float64))


def test_the_projection_is_differentiated_right_off_the_sphere():
    for scale in (0.1, 10.0):
        x = (scale * gaussian(0, 5)).requires_grad_()
        assert torch.autograd.gradcheck(lambda x: project_l2(x, 2.0), x)
        assert torch.autograd.gradgradcheck(lambda x: project_l2(x, 2.0), x)
