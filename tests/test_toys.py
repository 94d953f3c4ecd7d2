"""The toy's closed forms are what they say: checked by search, finite differences and the formed Jacobian."""

import math

import pytest
import torch
from hypothesis import assume, given, settings
from hypothesis import strategies as st

from ibau.hypergradient.implicit import project_l2
from ibau.hypergradient.toy import QuadraticBilevel

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
