"""The toys' known answers are what they say: checked by search, finite differences and formed Jacobians."""

import math

import pytest
import torch
from hypothesis import assume, given, settings
from hypothesis import strategies as st

from ibau.hypergradient.implicit import kkt_hypergradient, project_l2
from ibau.hypergradient.solvers import dense
from ibau.hypergradient.toy import QuadraticBilevel, SoftplusMinimax

seeds = st.integers(0, 10_000)
radii = st.sampled_from([math.inf, 0.5, 2.0])


@settings(max_examples=30, deadline=None)
@given(seed=seeds, radius=radii)
def test_the_solution_is_the_maximiser_in_the_ball(seed, radius):
    problem = QuadraticBilevel(seed=seed, radius=radius)
    delta, multiplier = problem.solution(problem.theta)
    assert delta.norm() <= radius * (1 + 1e-12)
    assert multiplier >= 0
    if multiplier > 0:
        assert delta.norm() == pytest.approx(radius, rel=1e-12)
    best = problem.inner(delta, [problem.theta])
    generator = torch.Generator().manual_seed(seed)
    for scale in (1e-3, 0.1, 1.0):
        other = delta + scale * torch.randn(6, generator=generator, dtype=torch.float64)
        other = other if radius == math.inf else project_l2(other, radius)
        assert problem.inner(other, [problem.theta]) <= best + 1e-12


@settings(max_examples=30, deadline=None)
@given(seed=seeds, radius=radii)
def test_the_terms_add_up_to_the_derivative_of_psi(seed, radius):
    problem = QuadraticBilevel(seed=seed, radius=radius)
    unconstrained = torch.linalg.solve(problem.M, problem.B @ problem.theta).norm()
    assume(abs(unconstrained - radius) > 0.01 or radius == math.inf)  # psi has a kink where they are equal
    h = 1e-5
    basis = torch.eye(4, dtype=torch.float64)
    up, down = ([problem.psi(problem.theta + s * h * e) for e in basis] for s in (1, -1))
    differences = (torch.stack(up) - torch.stack(down)) / (2 * h)
    torch.testing.assert_close(sum(problem.terms(problem.theta)), differences, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("radius", [math.inf, 0.5])
def test_the_rate_is_the_spectral_radius_of_phi(radius):
    problem = QuadraticBilevel(radius=radius)
    delta, _ = problem.solution(problem.theta)
    torch.testing.assert_close(problem.phi(delta, [problem.theta]), delta, rtol=1e-12, atol=1e-12)
    jacobian = torch.func.jacrev(problem.phi)(delta, [problem.theta])
    expected = torch.linalg.eigvals(jacobian).abs().max().item()
    assert problem.rate(problem.theta) == pytest.approx(expected, rel=1e-9)


def test_the_eigenvalues_are_those_of_m():
    problem = QuadraticBilevel(low=0.5, high=3.0)
    torch.testing.assert_close(torch.linalg.eigvalsh(problem.M), problem.eigenvalues)
    assert QuadraticBilevel().rate(QuadraticBilevel().theta) == pytest.approx(0.8)


# SoftplusMinimax: one objective, not quadratic


@settings(max_examples=15, deadline=None)
@given(seed=seeds, radius=radii)
def test_the_minimax_solution_is_the_maximiser_to_rounding(seed, radius):
    problem = SoftplusMinimax(seed=seed, radius=radius)
    delta, multiplier = problem.solution(problem.theta)
    assert multiplier >= 0
    assert delta.norm() <= radius * (1 + 1e-12)
    if multiplier > 0:
        assert delta.norm() == pytest.approx(radius, rel=1e-12)
    slope = torch.func.grad(problem.inner)(delta, [problem.theta])  # by autograd, not by `slope`
    assert (slope - multiplier * delta).norm() <= 1e-12 * (1 + multiplier + problem.a.norm())


@settings(max_examples=15, deadline=None)
@given(seed=seeds)
def test_the_minimax_slope_and_curvature_are_the_derivatives_of_its_objective(seed):
    problem = SoftplusMinimax(seed=seed)
    delta = torch.randn(6, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
    params = [problem.theta]
    assert problem.outer(delta, params) == problem.inner(delta, params)
    slope, hessian = torch.func.grad(problem.inner), torch.func.hessian(problem.inner)
    torch.testing.assert_close(problem.slope(delta, problem.theta), slope(delta, params))
    torch.testing.assert_close(problem.curvature(delta, problem.theta), -hessian(delta, params))


@pytest.mark.parametrize("radius", [math.inf, 0.5])
def test_the_minimax_rate_is_the_spectral_radius_of_phi(radius):
    problem = SoftplusMinimax(radius=radius)
    delta, _ = problem.solution(problem.theta)
    torch.testing.assert_close(problem.phi(delta, [problem.theta]), delta, rtol=1e-12, atol=1e-12)
    jacobian = torch.func.jacrev(problem.phi)(delta, [problem.theta])
    expected = torch.linalg.eigvals(jacobian).abs().max().item()
    assert problem.rate(problem.theta) == pytest.approx(expected, rel=1e-9)


@pytest.mark.parametrize("radius", [math.inf, 0.3])
@pytest.mark.parametrize("seed", range(3))
def test_the_minimax_gradient_is_the_difference_quotient_of_psi(radius, seed):
    """Danskin's theorem, against an inner problem solved anew for each difference."""
    problem = SoftplusMinimax(seed=seed, radius=radius)
    assert (problem.solution(problem.theta)[1] > 0) == (radius < math.inf)
    h = 1e-5
    basis = torch.eye(4, dtype=torch.float64)
    up, down = ([problem.psi(problem.theta + s * h * e) for e in basis] for s in (1, -1))
    differences = (torch.stack(up) - torch.stack(down)) / (2 * h)
    direct, implicit = problem.terms(problem.theta)
    assert not implicit.any()
    torch.testing.assert_close(direct, differences, rtol=1e-6, atol=1e-6)


def errors_away(problem, exact, seed, lengths):
    """|delta - delta*|, and the errors of direct alone and of direct + implicit there, where outer = inner.

    On the sphere delta moves along it.
    """
    star, multiplier = problem.solution(problem.theta)
    push = torch.randn(len(star), generator=torch.Generator().manual_seed(seed + 1), dtype=torch.float64)
    if multiplier > 0:
        push = push - star * (push @ star) / (star @ star)
    rows = []
    for length in lengths:
        delta = star + length * push / push.norm()
        delta = delta * (problem.radius / delta.norm()) if multiplier > 0 else delta
        h = kkt_hypergradient(
            problem.inner, problem.inner, delta, [problem.theta], radius=problem.radius, solve=dense
        )
        rows.append([x.norm() for x in (delta - star, h.direct[0] - exact, h.total[0] - exact)])
    return torch.tensor(rows, dtype=torch.float64)


@pytest.mark.parametrize("radius", [math.inf, 0.3])
@pytest.mark.parametrize("seed", range(4))
def test_the_implicit_term_removes_the_first_order_of_an_inexact_solution(radius, seed):
    """One objective: the error is of order |e| without the term and of order |e|^2 with it."""
    problem = SoftplusMinimax(seed=seed, radius=radius)
    exact = problem.terms(problem.theta)[0]
    away = errors_away(problem, exact, seed, (1e-2, 1e-3, 1e-4)).log()
    slopes = (away[0] - away[-1]) / (away[0, 0] - away[-1, 0])
    assert slopes[1].item() == pytest.approx(1, abs=0.05)
    assert slopes[2].item() == pytest.approx(2, abs=0.05)


@settings(max_examples=20, deadline=None)
@given(seed=seeds, length=st.floats(1e-4, 10))
def test_on_a_quadratic_direct_and_implicit_are_exact_at_any_delta(seed, length):
    problem = QuadraticBilevel(seed=seed)
    star, _ = problem.solution(problem.theta)
    exact = problem.B.T @ star  # Danskin: dh/dtheta at delta*
    _, direct, both = errors_away(problem, exact, seed, [length])[0]
    assert both < 1e-12 * (1 + length + exact.norm())
    assert direct > 1e-3 * length


def test_on_a_quadratic_the_sphere_leaves_an_error_of_second_order():
    problem = QuadraticBilevel(radius=0.5)
    star, multiplier = problem.solution(problem.theta)
    assert multiplier > 0
    away = errors_away(problem, problem.B.T @ star, 0, (1e-2, 1e-3)).log()
    slopes = (away[0] - away[1]) / (away[0, 0] - away[1, 0])
    assert slopes[1:].tolist() == pytest.approx([1, 2], abs=0.05)
