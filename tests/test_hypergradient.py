"""The hypergradient equals closed forms and finite differences; the solver is what it claims to be."""

import math

import pytest
import torch
from hypothesis import assume, given, settings
from hypothesis import strategies as st
from torch import nn
from torch.func import functional_call
from torch.utils._python_dispatch import TorchDispatchMode

from benchmarks.textbook import textbook_hypergradient
from ibau.hypergradient import implicit, solvers
from ibau.hypergradient.implicit import (
    implicit_hypergradient,
    kkt_hypergradient,
    project_l2,
    unrolled_hypergradient,
)
from ibau.hypergradient.layers import cheapen, reduced
from ibau.hypergradient.solvers import DENSE_LIMIT, conjugate_gradient, dense, fixed_point, neumann
from ibau.hypergradient.toy import QuadraticBilevel
from ibau.networks.models import SmallVGG

often = settings(max_examples=50, deadline=None)
seeds = st.integers(0, 2**32 - 1)


def gaussian(seed, *shape):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def contraction(seed, n, radius):
    """A symmetric matrix whose eigenvalues lie in [-radius, radius], radius among them."""
    basis, _ = torch.linalg.qr(gaussian(seed, n, n))
    return basis @ torch.diag(torch.linspace(-radius, radius, n, dtype=torch.float64)) @ basis.T


def definite(seed, n, condition):
    """A symmetric matrix whose eigenvalues go from 1 to `condition`."""
    basis, _ = torch.linalg.qr(gaussian(seed, n, n))
    return basis @ torch.diag(torch.linspace(1, condition, n, dtype=torch.float64)) @ basis.T


class Counted:
    """x -> a @ x that counts its calls and refuses a zero vector."""

    def __init__(self, a):
        self.a, self.calls = a, 0

    def __call__(self, x):
        self.calls += 1
        assert x.norm() > 0 or x.isnan().any(), "a product with a zero vector"
        return self.a @ x


def relative(a, b):
    return ((a - b).norm() / b.norm()).item()


# ---- the linear solvers: fixed point


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


@pytest.mark.parametrize("solve", [fixed_point, neumann])
@pytest.mark.parametrize("k", [1, 2, 5])
def test_a_residual_that_is_not_verified_saves_the_last_product(solve, k):
    product, b = Counted(torch.eye(8, dtype=torch.float64) - contraction(0, 8, 0.8)), gaussian(1, 8)
    verified = solve(product, b, maxiter=k)
    product.calls = 0
    found = solve(product, b, maxiter=k, verify=False)
    assert found.products == product.calls == k - 1
    assert torch.equal(found.x, verified.x)
    assert math.isnan(found.residual)


def test_a_series_seen_to_diverge_is_not_believed_unverified():
    found = fixed_point(lambda x: -x, gaussian(0, 5), maxiter=4, verify=False)  # J = 2
    assert torch.equal(found.x, torch.zeros(5, dtype=torch.float64))
    assert found.residual == 1


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


def test_fixed_point_keeps_the_shape_and_refuses_a_negative_maxiter():
    assert fixed_point(lambda x: x, torch.ones(1, 3, 4, 4), maxiter=2).x.shape == (1, 3, 4, 4)
    with pytest.raises(ValueError, match="maxiter is -1"):
        fixed_point(lambda x: x, torch.ones(1), maxiter=-1)


# ---- the linear solvers: conjugate gradients and elimination


@often
@given(seed=seeds, n=st.integers(1, 12), condition=st.floats(1.5, 100))
def test_conjugate_gradient_solves_a_definite_system_in_n_iterations(seed, n, condition):
    a, b = definite(seed, n, condition), gaussian(seed + 1, n)
    assume(b.norm() > 1e-3)
    product = Counted(a)
    found = conjugate_gradient(product, b, maxiter=n)
    assert relative(found.x, torch.linalg.solve(a, b)) < 1e-9  # the converged iterate, not the one before
    assert found.products == product.calls <= n + 1  # the last one is for the true residual
    assert found.residual == pytest.approx(relative(a @ found.x, b), abs=1e-13)
    assert 1 - 1e-9 <= found.curvature <= condition * (1 + 1e-9)


def test_conjugate_gradient_needs_as_many_iterations_as_there_are_distinct_eigenvalues():
    basis, _ = torch.linalg.qr(gaussian(0, 9, 9))
    a = basis @ torch.diag(torch.tensor([1.0, 2.0, 7.0] * 3, dtype=torch.float64)) @ basis.T
    residuals = [conjugate_gradient(Counted(a), gaussian(1, 9), maxiter=k).residual for k in (2, 3)]
    assert residuals[0] > 1e-3
    assert residuals[1] < 1e-13


def test_conjugate_gradient_stops_at_its_tolerance():
    a, b = definite(0, 30, 50.0), gaussian(1, 30)
    found = conjugate_gradient(Counted(a), b, maxiter=100, tol=1e-3)
    assert found.stopped == "tol"
    assert found.residual <= 1e-3
    shorter = conjugate_gradient(Counted(a), b, maxiter=found.products - 1, tol=1e-3)
    assert (shorter.stopped, shorter.residual > 1e-3) == ("maxiter", True)


@often
@given(seed=seeds, n=st.integers(2, 12), maxiter=st.integers(0, 30))
def test_conjugate_gradient_says_that_a_matrix_is_indefinite(seed, n, maxiter):
    a, b = contraction(seed, n, 1.0), gaussian(seed + 1, n)
    found = conjugate_gradient(Counted(a), b, maxiter=maxiter)
    assert found.residual <= 1
    assert relative(a @ found.x, b) == pytest.approx(found.residual, rel=1e-6, abs=1e-12)
    assert found.curvature <= 1e-15 if found.stopped == "curvature" else not found.curvature <= 0


def test_conjugate_gradient_keeps_the_best_iterate_when_curvature_turns_negative():
    a = torch.diag(torch.tensor([1.0, 2.0, 4.0, -0.1], dtype=torch.float64))
    b = torch.tensor([1.0, 1.0, 1.0, 0.01], dtype=torch.float64)
    found = conjugate_gradient(Counted(a), b, maxiter=20)
    assert found.stopped == "curvature"
    assert found.curvature <= 0
    assert found.residual < 0.1  # what was gained before that direction came up
    assert conjugate_gradient(Counted(-a), b, maxiter=20).residual == 1


@pytest.mark.parametrize("least", [0.0, 1e-17, -1e-17])
def test_conjugate_gradient_does_not_step_along_a_direction_without_curvature(least):
    a = torch.diag(torch.tensor([1.0, 2.0, 4.0, least], dtype=torch.float64))
    found = conjugate_gradient(Counted(a), torch.ones(4, dtype=torch.float64), maxiter=20)
    assert found.stopped == "curvature"
    assert found.x.norm() < 1e3
    assert found.residual == pytest.approx(relative(a @ found.x, torch.ones(4)), rel=1e-9)
    assert found.residual <= 1


def test_conjugate_gradient_reports_the_true_residual_in_float32():
    a, b = definite(0, 40, 1e5).float(), gaussian(1, 40).float()
    found = conjugate_gradient(Counted(a), b, maxiter=2000, tol=1e-7)
    assert found.residual == pytest.approx(relative(a @ found.x, b), rel=0.3)
    assert found.stopped == "rounding"


def test_conjugate_gradient_solves_for_a_tiny_right_hand_side():
    a, b = definite(0, 5, 3.0).float(), gaussian(1, 5).float()
    found = conjugate_gradient(Counted(a), 1e-18 * b, maxiter=10)
    assert relative(found.x, 1e-18 * torch.linalg.solve(a, b)) < 1e-5


@often
@given(seed=seeds, n=st.integers(1, 12), radius=st.floats(0.01, 0.9))
def test_dense_solves_exactly_whatever_else_it_is_told(seed, n, radius):
    a = torch.eye(n, dtype=torch.float64) - contraction(seed, n, radius) + torch.ones(n, n).double().triu(1)
    b = gaussian(seed + 1, n)
    assume(b.norm() > 0)
    product = Counted(a)
    found = dense(product, b, maxiter=0, tol=1.0)
    assert relative(a @ found.x, b) < 1e-9
    assert found.products == product.calls == n
    assert found.curvature == pytest.approx(torch.linalg.eigvalsh((a + a.T) / 2)[0].item(), abs=1e-9)


def test_dense_keeps_the_shape_and_refuses_what_it_cannot_do():
    assert torch.equal(dense(lambda x: 2 * x, torch.ones(1, 3, 2, 2)).x, torch.full((1, 3, 2, 2), 0.5))
    with pytest.raises(ValueError, match=f"{DENSE_LIMIT + 1} unknowns are more than its limit"):
        dense(lambda x: 1 / 0, torch.ones(DENSE_LIMIT + 1))
    singular = dense(Counted(torch.diag(torch.tensor([1.0, 0.0]))), torch.ones(2))
    assert (singular.stopped, singular.residual, singular.x.tolist()) == ("singular", 1, [0, 0])


# ---- the linear solvers: what they share

SOLVERS = [fixed_point, conjugate_gradient, dense]
ITERATIVE = SOLVERS[:2]


@pytest.mark.parametrize("solve", SOLVERS)
def test_nothing_is_done_for_a_zero_right_hand_side(solve):
    found = solve(lambda x: 1 / 0, torch.zeros(3), maxiter=5)
    assert (found.residual, found.products, found.contraction) == (0, 0, 0)
    assert found.stopped == ("" if solve is fixed_point else "tol")
    assert torch.equal(found.x, torch.zeros(3))


@pytest.mark.parametrize("solve", SOLVERS)
@pytest.mark.parametrize("value", [math.nan, math.inf])
def test_numbers_that_are_not_finite_give_zero_and_are_reported(solve, value):
    for matvec, b in ((lambda x: x * value, torch.ones(3)), (lambda x: x, torch.full((3,), value))):
        found = solve(matvec, b, maxiter=5)
        assert torch.equal(found.x, torch.zeros(3))
        assert found.residual == 1
        if solve is fixed_point:  # which does not say why it stopped
            assert not math.isfinite(found.contraction)
        else:
            assert found.stopped == "not finite"


@often
@given(seed=seeds, radius=st.floats(0.1, 5), maxiter=st.integers(0, 30))
@pytest.mark.parametrize("solve", ITERATIVE)
def test_no_solver_is_worse_than_nothing(solve, seed, radius, maxiter):
    a, b = torch.eye(6, dtype=torch.float64) - contraction(seed, 6, radius), gaussian(seed + 1, 6)
    product = Counted(a)
    found = solve(product, b, maxiter=maxiter)
    assert found.products == product.calls <= maxiter + 1
    assert relative(a @ found.x, b) <= 1 + 1e-9


@pytest.mark.parametrize("solve", ITERATIVE)
def test_the_iterations_refuse_a_negative_number(solve):
    with pytest.raises(ValueError, match="maxiter is -1"):
        solve(lambda x: x, torch.ones(1), maxiter=-1)


# ---- a quadratic bilevel problem with its closed form, unconstrained and on the boundary of the ball

RADII = [math.inf, 1.0]  # |delta*| is 5.1 without the constraint


class Quadratic(QuadraticBilevel):
    """The toy at its own theta, with all that is known there."""

    def __init__(self, radius=math.inf):
        super().__init__(radius=radius)
        self.delta, self.multiplier = self.solution(self.theta)
        self.direct, self.implicit = self.terms(self.theta)
        self.exact = self.direct + self.implicit

    def estimate(self, maxiter, **options):
        return implicit_hypergradient(
            self.outer, self.phi, self.delta, [self.theta], maxiter=maxiter, **options
        )

    def kkt(self, **options):
        options = {"radius": self.radius, "maxiter": 50, **options}
        return kkt_hypergradient(self.outer, self.inner, self.delta, [self.theta], **options)


@pytest.mark.parametrize("radius", RADII)
def test_the_solution_maximises_and_obeys_the_constraint(radius):
    problem = Quadratic(radius)
    assert problem.delta.norm() <= radius * (1 + 1e-12)
    assert (problem.multiplier > 0) == (radius == 1)
    best = problem.inner(problem.delta, [problem.theta])
    for i in range(100):
        other = problem.delta + 0.1 * gaussian(i, 6)
        other = other if radius == math.inf else project_l2(other, radius)
        assert problem.inner(other, [problem.theta]) < best


@pytest.mark.parametrize("radius", RADII)
def test_all_ways_to_the_hypergradient_agree(radius):
    problem = Quadratic(radius)
    h, basis = 1e-5, torch.eye(4, dtype=torch.float64)
    shifted = [[problem.psi(problem.theta + sign * h * e) for e in basis] for sign in (1, -1)]
    differences = (torch.stack(shifted[0]) - torch.stack(shifted[1])) / (2 * h)
    assert relative(problem.exact, differences) < 1e-6
    start = problem.delta / 3
    found = {
        "fixed point": problem.estimate(200),
        "fixed point, dense": problem.estimate(1, solve=dense),
        "kkt, cg": problem.kkt(),
        "kkt, dense": problem.kkt(solve=dense),
        "unrolled": unrolled_hypergradient(problem.outer, problem.phi, start, [problem.theta], steps=150),
    }
    if radius == math.inf:  # on the sphere dPhi/ddelta is not symmetric
        found["fixed point, cg"] = problem.estimate(50, solve=conjugate_gradient)
    for name, gradient in found.items():
        assert relative(gradient.total[0], problem.exact) < 1e-10, name
        assert relative(gradient.direct[0], problem.direct) < 1e-10, name
        assert gradient.stationarity < 1e-10, name
        assert gradient.loss == pytest.approx(problem.psi(problem.theta).item()), name
    assert problem.implicit.norm() > problem.direct.norm() / 20  # there is an implicit term to get wrong
    assert found["kkt, cg"].multiplier == pytest.approx(problem.multiplier)
    assert found["kkt, cg"].solution.curvature > 0


@pytest.mark.parametrize("radius", RADII)
def test_the_error_falls_with_k_at_the_predicted_rate(radius):
    problem = Quadratic(radius)
    rate = problem.rate(problem.theta)
    assert rate == pytest.approx(0.8) if radius == math.inf else 0.3 < rate < 0.5
    last = 60 if radius == math.inf else 25  # before rounding
    errors = [relative(problem.estimate(k).total[0], problem.exact) for k in range(last + 1)]
    assert all(b < a for a, b in zip(errors, errors[1:], strict=False))
    assert (errors[last] / errors[last - 10]) ** (1 / 10) == pytest.approx(rate, rel=1e-2)
    assert problem.estimate(last).solution.contraction == pytest.approx(rate, rel=1e-2)


def test_unrolling_reports_how_fast_phi_contracts():
    problem = Quadratic()
    gradient = unrolled_hypergradient(
        problem.outer, problem.phi, problem.delta / 3, [problem.theta], steps=60
    )
    assert gradient.solution.contraction == pytest.approx(0.8, rel=1e-3)
    assert gradient.solution.products == 60


def test_unrolling_nothing_leaves_the_direct_term():
    problem = Quadratic()
    gradient = unrolled_hypergradient(problem.outer, problem.phi, problem.delta, [problem.theta], steps=0)
    assert relative(gradient.total[0], problem.direct) < 1e-12
    assert gradient.ratio == 0
    with pytest.raises(ValueError, match="steps is -1"):
        unrolled_hypergradient(problem.outer, problem.phi, problem.delta, [problem.theta], steps=-1)


@pytest.mark.parametrize("radius", RADII)
def test_danskin_the_implicit_term_vanishes_where_inner_and_outer_agree(radius):
    """In the interior and on the boundary; the direct term alone equals finite differences."""
    problem = Quadratic(radius)
    found = kkt_hypergradient(
        problem.inner, problem.inner, problem.delta, [problem.theta], radius=radius, maxiter=50
    )
    assert found.ratio < 1e-12
    step = 1e-5 * gaussian(9, 4)
    values = [
        problem.inner(problem.solution(t)[0], [t]) for t in (problem.theta + step, problem.theta - step)
    ]
    assert (found.direct[0] @ step).item() == pytest.approx((values[0] - values[1]).item() / 2, rel=1e-8)
    by_phi = implicit_hypergradient(problem.inner, problem.phi, problem.delta, [problem.theta], maxiter=300)
    assert by_phi.ratio < 1e-10


def test_danskin_needs_stationarity():
    problem = Quadratic(1.0)
    off = project_l2(problem.delta + 0.3 * gaussian(7, 6), 1.0)
    found = kkt_hypergradient(problem.inner, problem.inner, off, [problem.theta], radius=1.001, maxiter=50)
    assert found.stationarity > 0.1
    assert found.ratio > 0.1


@often
@given(seed=seeds, angle=st.floats(0.0, 1.5))
def test_stationarity_on_the_sphere_is_the_sine_of_an_angle(seed, angle):
    problem = QuadraticBilevel(low=1e-9, high=1e-9, radius=2.0, seed=seed)  # the gradient is B theta
    g = problem.B @ problem.theta
    side = gaussian(seed + 1, 6)
    side = side - g * (side @ g) / (g @ g)
    assume(min(g.norm(), side.norm()) > 1e-3)
    delta = 2 * (math.cos(angle) * g / g.norm() + math.sin(angle) * side / side.norm())
    found = kkt_hypergradient(problem.outer, problem.inner, delta, [problem.theta], radius=2.0, maxiter=1)
    assert found.stationarity == pytest.approx(math.sin(angle), abs=1e-6)
    assert found.multiplier == pytest.approx((g.norm() * math.cos(angle) / 2).item(), rel=1e-6)


def test_stationarity_inside_is_the_distance_that_is_left():
    problem = QuadraticBilevel(low=3.0, high=3.0)
    delta, _ = problem.solution(problem.theta)
    found = kkt_hypergradient(
        problem.outer, problem.inner, 1.1 * delta, [problem.theta], radius=100, maxiter=1
    )
    assert found.stationarity == pytest.approx(0.1 / 1.1)
    zero = torch.zeros_like(delta)
    found = kkt_hypergradient(problem.outer, problem.inner, zero, [problem.theta], radius=100, maxiter=1)
    assert found.stationarity == math.inf


def test_a_point_on_the_sphere_that_is_pulled_inwards_is_an_interior_one():
    problem = Quadratic()
    outside = 2 * problem.delta
    found = kkt_hypergradient(
        problem.outer, problem.inner, outside, [problem.theta], radius=outside.norm().item(), maxiter=50
    )
    assert found.multiplier == 0
    assert found.stationarity > 0.1
    assert (
        relative(found.implicit[0], problem.B.T @ torch.linalg.solve(problem.M, outside - problem.a)) < 1e-9
    )


def test_a_saddle_is_reported_by_its_curvature():
    problem = Quadratic()
    found = kkt_hypergradient(
        problem.outer,
        lambda delta, params: -problem.inner(delta, params),
        problem.delta,
        [problem.theta],
        radius=math.inf,
        maxiter=50,
    )
    assert (found.solution.stopped, found.solution.curvature < 0) == ("curvature", True)
    assert found.ratio == 0  # the best iterate is x = 0


def test_a_perturbation_outside_the_ball_is_refused():
    problem = Quadratic()
    with pytest.raises(ValueError, match="outside the ball of radius 1"):
        problem.kkt(radius=1.0)


def test_the_gradients_survive_a_nan():
    problem = Quadratic(1.0)
    found = kkt_hypergradient(
        problem.outer,
        lambda delta, params: problem.inner(delta, params) * math.nan,
        problem.delta,
        [problem.theta],
        radius=1.0,
        maxiter=5,
    )
    assert found.solution.stopped == "not finite"
    assert torch.equal(found.total[0], found.direct[0])
    assert math.isnan(found.stationarity)


@pytest.mark.parametrize("method", ["phi", "kkt"])
def test_without_iterations_the_implicit_term_is_left_out(method):
    problem = Quadratic()

    def never(*_):
        raise AssertionError("phi or inner was evaluated")

    if method == "phi":
        found = implicit_hypergradient(problem.outer, never, problem.delta, [problem.theta], maxiter=0)
    else:
        found = kkt_hypergradient(
            problem.outer, never, problem.delta, [problem.theta], radius=math.inf, maxiter=0
        )
    assert relative(found.direct[0], problem.direct) < 1e-12
    assert torch.equal(found.total[0], found.direct[0])
    assert found.ratio == 0
    assert found.solution.residual == 1
    assert math.isnan(found.stationarity)


def test_stationarity_of_a_fixed_point_is_the_relative_step_of_phi():
    problem = Quadratic()
    problem.delta = problem.delta + 1
    found = problem.estimate(1)
    step = problem.phi(problem.delta, [problem.theta]) - problem.delta
    assert found.stationarity == pytest.approx((step.norm() / problem.delta.norm()).item())


@pytest.mark.parametrize("radius", RADII)
def test_the_arguments_are_left_alone(radius):
    problem = Quadratic(radius)
    delta, theta = problem.delta.clone(), problem.theta.clone()
    problem.estimate(3)
    problem.kkt()
    unrolled_hypergradient(problem.outer, problem.phi, problem.delta, [problem.theta], steps=2)
    assert torch.equal(problem.delta, delta)
    assert torch.equal(problem.theta, theta)
    for tensor in (problem.delta, problem.theta):
        assert not tensor.requires_grad
        assert tensor.grad is None


def test_a_parameter_that_nothing_depends_on_gets_zero():
    problem = Quadratic()
    params = [problem.theta, torch.ones(2)]
    for found in (
        implicit_hypergradient(problem.outer, problem.phi, problem.delta, params, maxiter=200),
        kkt_hypergradient(problem.outer, problem.inner, problem.delta, params, radius=math.inf, maxiter=50),
        unrolled_hypergradient(problem.outer, problem.phi, problem.delta, params, steps=150),
    ):
        assert torch.equal(found.total[1], torch.zeros(2))
        assert relative(found.total[0], problem.exact) < 1e-9


def test_an_inner_problem_that_does_not_know_theta_moves_nothing():
    problem, pull = Quadratic(), gaussian(1, 6)
    for inner in (
        lambda delta, params: pull @ delta,
        lambda delta, params: pull @ delta - (delta**2).sum(),
    ):
        found = kkt_hypergradient(
            problem.outer, inner, pull / pull.norm(), [problem.theta], radius=1.0, maxiter=9
        )
        assert found.ratio == 0


def test_an_outer_objective_without_delta_has_no_implicit_term():
    problem = Quadratic()
    found = implicit_hypergradient(
        lambda delta, params: params[0] @ problem.c, problem.phi, problem.delta, [problem.theta], maxiter=5
    )
    assert torch.equal(found.total[0], problem.c)
    assert found.solution.products == 0


@pytest.mark.parametrize("radius", RADII)
@pytest.mark.parametrize("k", [0, 1, 2, 5])
def test_the_textbook_and_this_are_one_hypergradient(radius, k):
    problem = Quadratic(radius)
    args = (problem.outer, problem.phi, problem.delta, [problem.theta])
    expected, found = textbook_hypergradient(*args, k), implicit_hypergradient(*args, maxiter=k)
    for a, b in ((found.direct, expected.direct), (found.implicit, expected.implicit)):
        torch.testing.assert_close(a, b, rtol=1e-12, atol=1e-14)
    assert found.loss == expected.loss
    if k:
        torch.testing.assert_close(found.solution.x, expected.solution.x, rtol=1e-12, atol=1e-14)
        assert found.solution.products == k - 1 < expected.solution.products == k


class Waits(TorchDispatchMode):
    """Counts what would wait for a GPU: every number that is read from a tensor."""

    count = 0

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        self.count += function is torch.ops.aten._local_scalar_dense.default
        return function(*args, **(kwargs or {}))


@pytest.fixture
def as_on_a_gpu(monkeypatch):
    for module in (implicit, solvers):
        monkeypatch.setattr(module, "settled", lambda flag: False)


def estimates():
    """name -> a hypergradient: by a series that converges, diverges, stops early, ...; by other means."""
    problem, wild = Quadratic(1.0), QuadraticBilevel(eta=5.0)
    there = (problem.delta, [problem.theta])
    flat = (lambda delta, params: params[0].sum(), problem.phi, *there)
    return {
        "converging": lambda: problem.estimate(5, tol=1e-2),
        "diverging": lambda: implicit_hypergradient(wild.outer, wild.phi, *there, maxiter=5),
        "early": lambda: problem.estimate(40, tol=1e-2),
        "nothing": lambda: implicit_hypergradient(*flat, maxiter=5),
        "not finite": lambda: implicit_hypergradient(
            problem.outer, lambda *about: problem.phi(*about) * math.nan, *there, maxiter=5
        ),
        "neumann": lambda: problem.estimate(5, solve=neumann),
        "unrolled": lambda: unrolled_hypergradient(problem.outer, problem.phi, *there, steps=5),
        "direct alone": lambda: problem.estimate(0),
    }


@pytest.mark.parametrize("name", list(estimates()))
def test_a_hypergradient_does_not_wait_for_the_device(name, as_on_a_gpu):
    estimate = estimates()[name]
    with Waits() as waits:
        found = estimate()
        numbers = found.numbers()
    assert waits.count == 0
    expected = [found.loss, found.ratio, found.solution.residual, found.solution.contraction]
    torch.testing.assert_close(numbers, torch.tensor(expected, dtype=torch.float64), equal_nan=True)


def test_a_number_that_is_read_counts_as_a_wait():
    with Waits() as waits:
        float(torch.ones(1)), bool(torch.ones(1)), torch.ones(1).item()
    assert waits.count == 3


@pytest.mark.parametrize("name", list(estimates()))
def test_what_is_computed_in_vain_changes_nothing(name, monkeypatch, request):
    known = estimates()[name]()
    request.getfixturevalue("as_on_a_gpu")
    masked = estimates()[name]()
    assert torch.equal(masked.total[0], known.total[0])
    assert torch.equal(masked.solution.x, known.solution.x)
    torch.testing.assert_close(masked.numbers(), known.numbers(), rtol=0, atol=0, equal_nan=True)


@pytest.mark.parametrize("k", [1, 3])
def test_the_residual_that_comes_with_the_last_pass_is_the_true_one(k):
    problem = Quadratic()
    step = torch.autograd.functional.jacobian(lambda d: problem.phi(d, [problem.theta]), problem.delta)
    b = torch.func.grad(lambda d: problem.outer(d, [problem.theta]))(problem.delta)
    found = problem.estimate(k)
    x = found.solution.x
    assert found.solution.residual == pytest.approx(
        (x - step.T @ x - b).norm().item() / b.norm().item(), rel=1e-9
    )


def test_a_map_that_diverges_leaves_the_direct_term():
    problem = Quadratic()

    def away(delta, params):
        return delta + 3 * (delta - problem.phi(delta, params))

    for k in (1, 5):
        found = implicit_hypergradient(problem.outer, away, problem.delta, [problem.theta], maxiter=k)
        assert found.solution.residual == 1
        assert found.ratio == 0


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


# ---- a convolutional network in float32, inside the ball and on its boundary


class ConcaveVGG:
    """SmallVGG on images + delta; the inner objective is made concave and given a maximiser at `start`.

    inner = CE(delta) - pull . delta - mu |delta - start|^2 / 2, with the constant pull such that its gradient
    at `start` is `push` * start. Without the pull the maximiser of a network with max-pooling tends to lie on
    a kink, where two inputs of a pool tie and no derivative exists: gradient steps then jump about it.
    """

    mu = 0.03  # more than the cross-entropy's curvature

    def __init__(self, push, dtype=torch.float64):
        torch.manual_seed(0)
        self.net = SmallVGG(10, width=0.25)
        self.x, self.y = torch.rand(4, 3, 32, 32), torch.arange(4)
        self.net.train()(self.x)  # BatchNorm has seen data
        self.net.classifier.weight.data *= 30  # and the logits vary
        self.net.eval().to(dtype)
        self.x, self.carries = self.x.to(dtype), torch.tensor([1, 1, 0, 0], dtype=dtype).view(4, 1, 1, 1)
        self.names = [name for name, _ in self.net.named_parameters()]
        self.params = [p.detach() for p in self.net.parameters()]
        self.start = gaussian(0, 1, 3, 32, 32).to(dtype) / 100  # l2 norm 0.55
        self.radius = self.start.norm().item() if push else math.inf
        at = self.start.clone().requires_grad_()
        (gradient,) = torch.autograd.grad(self.loss(self.x + at, self.params), at)
        self.pull = gradient - push * self.start

    def loss(self, images, params):
        logits = functional_call(self.net, dict(zip(self.names, params, strict=True)), (images,))
        return nn.functional.cross_entropy(logits, self.y)

    def inner(self, delta, params):
        concave = (self.pull * delta).sum() + self.mu * (delta - self.start).square().sum() / 2
        return self.loss(self.x + delta, params) - concave

    def outer(self, delta, params):
        return self.loss(self.x.flip(0) + self.carries * delta, params)

    def phi(self, delta, params):
        (gradient,) = torch.autograd.grad(self.inner(delta, params), delta, create_graph=True)
        moved = delta + gradient / self.mu
        return moved if self.radius == math.inf else project_l2(moved, self.radius)

    def solve(self, params):
        delta = self.start
        for _ in range(100):
            moved = self.phi(delta.requires_grad_(), params).detach()
            if (moved - delta).norm() < 1e-14:
                break
            delta = moved
        return delta.detach()


@pytest.mark.parametrize("push", [0.0, 0.02])
def test_a_float32_network_equals_float64_finite_differences(push):
    exact, single = ConcaveVGG(push), ConcaveVGG(push, torch.float32)
    options = {"maxiter": 50, "tol": 1e-5}
    by_kkt = kkt_hypergradient(
        single.outer, single.inner, single.start, single.params, radius=single.radius, **options
    )
    by_phi = implicit_hypergradient(single.outer, single.phi, single.start, single.params, **options)
    assert by_kkt.solution.stopped == "tol"
    assert by_phi.solution.residual <= 2e-5
    assert by_kkt.multiplier == pytest.approx(push, rel=1e-4)
    direction = [gaussian(i, *p.shape) * p.norm() / p.numel() ** 0.5 for i, p in enumerate(exact.params)]
    h, values = 1e-6, []
    for sign in (1, -1):
        params = [p + sign * h * d for p, d in zip(exact.params, direction, strict=True)]
        values.append(exact.outer(exact.solve(params), params).item())
    difference = (values[0] - values[1]) / (2 * h)

    def along(gradient):
        return sum((g.double() * d).sum() for g, d in zip(gradient, direction, strict=True)).item()

    for found in (by_kkt, by_phi):
        assert found.stationarity < 1e-4
        assert along(found.total) == pytest.approx(difference, rel=1e-3)
        assert abs(along(found.implicit)) > 0.05 * abs(difference)  # the direct term alone would not do


@pytest.mark.parametrize("push", [0.0, 0.02])
def test_cheap_layers_and_reduced_products_give_the_textbooks_hypergradient(push):
    plain, cheap = ConcaveVGG(push, torch.float32), ConcaveVGG(push, torch.float32)
    cheapen(cheap.net, cheap.x)
    expected = textbook_hypergradient(plain.outer, plain.phi, plain.start, plain.params, 5)
    for products, error in ((None, 1e-4), (reduced(), 5e-3)):  # Phi's step of 1 / mu = 33 magnifies rounding
        found = implicit_hypergradient(
            cheap.outer, cheap.phi, cheap.start, cheap.params, maxiter=5, products=products
        )
        total, truth = (torch.cat([t.flatten() for t in g.total]) for g in (found, expected))
        assert relative(total, truth) < error
        assert found.ratio == pytest.approx(expected.ratio, rel=1e-2)
        assert expected.ratio > 0.01


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
