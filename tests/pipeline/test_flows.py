"""The flows against closed forms, finer integrators, dense Hessians and gradient descent itself."""

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

from pipeline.errors import InputError
from pipeline.flows import CentralFlow, central, gradient_flow
from pipeline.flows.complementarity import complementary
from pipeline.gradient import FullBatch
from pipeline.losses import mse
from pipeline.operators import HessianOperator
from pipeline.spectra import NonFiniteKernel


def problem(n=20, d=3, width=6, c=1, seed=0, dtype=torch.float64):
    """A tanh network with two hidden layers, examples and targets."""
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        layers = [nn.Linear(d, width), nn.Tanh(), nn.Linear(width, width), nn.Tanh(), nn.Linear(width, c)]
        model = nn.Sequential(*layers).to(dtype)
        return model, torch.randn(n, d, dtype=torch.float64).to(dtype), torch.randn(n, c, dtype=torch.float64).to(dtype)


def linear(seed=0, n=9, d=4):
    """A linear model without bias, whose loss is quadratic, and its Hessian."""
    generator = torch.Generator().manual_seed(seed)
    x, y = (torch.randn(n, m, generator=generator, dtype=torch.float64) for m in (d, 1))
    model = nn.Linear(d, 1, bias=False).double()
    return model, x, y, (x.T @ x / n).numpy()


class RankOne(nn.Module):
    """f = α X w: a two-layer linear network on its invariant manifold of rank one, s = α²."""

    def __init__(self, alpha, w):
        super().__init__()
        self.alpha = nn.Parameter(torch.tensor([[alpha]], dtype=torch.float64))
        self.w = nn.Parameter(torch.tensor(w, dtype=torch.float64)[:, None])

    def forward(self, x):
        return x @ self.w @ self.alpha


def theta(model):
    return torch.cat([tensor.detach().reshape(-1) for tensor in model.parameters()]).double().numpy()


def move(model, by):
    vector = torch.as_tensor(by)
    with torch.no_grad():
        for tensor, piece in zip(
            model.parameters(), vector.split([t.numel() for t in model.parameters()]), strict=True
        ):
            tensor += piece.view_as(tensor)


def loss_gradient(model, x, y):
    return np.concatenate([g.reshape(-1).numpy() for g in torch.autograd.grad(mse(model(x), y), model.parameters())])


def descend(model, x, y, learning_rate):
    move(model, -learning_rate * loss_gradient(model, x, y))


def hessian(model, x, y):
    """Dense, from products with all unit vectors."""
    return HessianOperator(model, mse, x, y) @ np.eye(len(theta(model)))


# --- gradient flow ---------------------------------------------------------------------------------------------------


def flow(model, x, y, learning_rate, time=1, **options):
    batch = FullBatch(model, mse, x, y)
    return sum(gradient_flow(batch, list(model.parameters()), learning_rate, **options) for _ in range(time))


@pytest.mark.parametrize("learning_rate", [0.1, 3.0, 100.0])
def test_on_a_quadratic_gradient_flow_decays_exponentially(learning_rate):
    model, x, y, h = linear()
    start, rest = theta(model), np.linalg.lstsq(x.numpy(), y.numpy()[:, 0])[0]
    values, vectors = np.linalg.eigh(h)
    flow(model, x, y, learning_rate, time=3)
    exact = rest + vectors @ (np.exp(-3 * learning_rate * values) * (vectors.T @ (start - rest)))
    np.testing.assert_allclose(theta(model), exact, atol=1e-5 * np.linalg.norm(start))


def test_the_error_follows_the_tolerance():
    """The step is of order tolerance^(1/3), the error of a step of order 4 in it: the sum goes with the tolerance."""
    errors, evaluations, tolerances = [], [], np.array([1e-4, 1e-6, 1e-8, 1e-10])
    for tolerance in tolerances:
        model, x, y, h = linear()
        start, rest = theta(model), np.linalg.lstsq(x.numpy(), y.numpy()[:, 0])[0]
        values, vectors = np.linalg.eigh(h)
        evaluations.append(flow(model, x, y, 3.0, tolerance=tolerance))
        exact = rest + vectors @ (np.exp(-3 * values) * (vectors.T @ (start - rest)))
        errors.append(np.linalg.norm(theta(model) - exact))
    slope = np.polyfit(np.log(tolerances), np.log(errors), 1)[0]
    assert 0.8 < slope < 1.2
    cost = np.polyfit(np.log(tolerances), np.log(evaluations), 1)[0]
    assert -0.4 < cost < -0.2


def test_gradient_flow_of_a_network_is_the_limit_of_small_steps():
    learning_rate, time, fine = 2.0, 6, 30
    model, x, y = problem()
    flow(model, x, y, learning_rate, time)
    reference, x, y = problem()
    start, dt = theta(reference), learning_rate / fine
    for _ in range(time * fine):  # the classical method of order 4
        here, slopes = theta(reference), []
        for share in (0, 0.5, 0.5, 1):
            move(reference, here - theta(reference) - (share * dt * slopes[-1] if slopes else 0))
            slopes.append(loss_gradient(reference, x, y))
        k1, k2, k3, k4 = slopes
        move(reference, here - theta(reference) - dt / 6 * (k1 + 2 * k2 + 2 * k3 + k4))
    assert np.linalg.norm(theta(model) - theta(reference)) < 2e-5
    assert np.linalg.norm(theta(model) - start) > 0.5


def test_what_it_counts_is_how_often_the_gradient_was_taken():
    model, x, y = problem()
    calls = []
    model.register_forward_hook(lambda *_: calls.append(1))
    counted = flow(model, x, y, 0.01)
    assert counted == len(calls) == 4, "one step of the integrator where the flow is slow"
    assert flow(model, x, y, 50.0) == len(calls) - counted > 4


def test_gradient_flow_stays_in_the_dtype_of_the_model_and_is_deterministic():
    single, x, y = problem(dtype=torch.float32)
    again, _, _ = problem(dtype=torch.float32)
    double, x64, y64 = problem()
    for model, *data in ((single, x, y), (again, x, y), (double, x64, y64)):
        flow(model, *data, 2.0, time=5)
    assert all(tensor.dtype == torch.float32 for tensor in single.parameters())
    np.testing.assert_array_equal(theta(single), theta(again))
    np.testing.assert_allclose(theta(single), theta(double), atol=2e-5)


def test_a_trial_step_that_overflows_is_no_divergence():
    """Of α = w, dα/dt = -η α³ for one example x = 1, y = 0."""
    model = RankOne(1.0, [1.0]).float()
    x, y = torch.ones(1, 1), torch.zeros(1, 1)
    flow(model, x, y, 1e4)
    np.testing.assert_allclose(theta(model), 2 * [1 / np.sqrt(1 + 2e4)], rtol=1e-3)


def test_gradient_flow_from_nowhere_has_diverged():
    model, x, y = problem()
    with pytest.raises(NonFiniteKernel, match="gradient flow cannot be integrated further"):
        flow(model, x, y * float("nan"), 0.1)


# --- complementarity -------------------------------------------------------------------------------------------------


def random_problem(k, seed):
    """A and B as a flow has them, B from gradients in a space of more dimensions than there are pairs."""
    rng = np.random.default_rng(seed)
    d = rng.normal(size=(k, k, 3 * k * k))
    a = rng.normal(size=(k, k))
    scale = 10.0 ** rng.uniform(-6, 6, size=2)
    d = d + d.swapaxes(0, 1)
    return scale[0] * (a + a.T), scale[1] * np.einsum("ijp,lmp->ijlm", d, d)


def projected_gradient(a, b, steps=1500):
    """X by accelerated steps along -(A + B[X]), with negative eigenvalues cut off after each."""
    k = len(a)
    size = np.linalg.eigvalsh(b.reshape(k * k, k * k))[-1]
    x = ahead = np.zeros_like(a)
    for i in range(steps):
        values, vectors = np.linalg.eigh(ahead - (a + np.einsum("ijlm,lm->ij", b, ahead)) / size)
        previous, x = x, (vectors * np.maximum(values, 0)) @ vectors.T
        ahead = x + i / (i + 3) * (x - previous)
    return x


@given(k=st.integers(1, 4), seed=st.integers(0, 2**31))
@settings(deadline=None, max_examples=15)
def test_the_solution_is_complementary_and_that_of_projected_gradients(k, seed):
    a, b = random_problem(k, seed)
    x = complementary(a, b)
    slack = a + np.einsum("ijlm,lm->ij", b, x)
    size_a, size_x = np.linalg.norm(a), np.linalg.norm(a) / np.linalg.norm(b)
    np.testing.assert_array_equal(x, x.T)
    assert np.linalg.eigvalsh(x)[0] >= -1e-7 * size_x
    assert np.linalg.eigvalsh(slack)[0] >= -1e-7 * size_a
    assert abs(np.sum(x * slack)) <= 1e-7 * size_a * size_x
    np.testing.assert_allclose(x, projected_gradient(a, b), atol=1e-3 * max(size_x, np.linalg.norm(x)))


@given(k=st.integers(1, 4), seed=st.integers(0, 2**31))
@settings(deadline=None, max_examples=15)
def test_where_b_acts_on_each_entry_alone_the_solution_is_its_positive_part(k, seed):
    rng = np.random.default_rng(seed)
    a, weights = np.diag(rng.normal(size=k)), rng.uniform(0.5, 2, size=k)
    b = np.zeros((k, k, k, k))
    for i in range(k):
        for j in range(k):
            b[i, j, i, j] = weights[i] if i == j else 1.0
    np.testing.assert_allclose(complementary(a, b), np.diag(np.maximum(0, -np.diag(a) / weights)), atol=1e-7)


@pytest.mark.parametrize("k", [0, 1, 3])
def test_nothing_is_needed_where_a_has_no_negative_eigenvalue(k):
    np.testing.assert_array_equal(complementary(np.eye(k), np.ones((k, k, k, k))), np.zeros((k, k)))


@pytest.mark.parametrize("k", [1, 2])
def test_where_b_does_not_act_there_is_no_solution(k):
    with pytest.raises(NonFiniteKernel, match="no finite Σ keeps the critical eigenvalues of the Hessian at 2/η"):
        complementary(-np.eye(k), np.zeros((k, k, k, k)))
    if k == 2:
        b = np.zeros((2, 2, 2, 2))
        b[0, 0, 0, 0] = 1
        with pytest.raises(NonFiniteKernel, match="no finite Σ"):
            complementary(-np.eye(2), b)


def test_what_is_not_finite_reaches_no_solver():
    for a, b in ((np.nan, 1.0), (-1.0, np.inf)):
        with pytest.raises(NonFiniteKernel, match="curvature of the critical eigenvalues is not finite"):
            complementary(np.full((2, 2), a), np.full((2, 2, 2, 2), b))


# --- central flow ----------------------------------------------------------------------------------------------------


def test_below_the_edge_it_is_gradient_flow_in_euler_steps():
    model, x, y = problem()
    other, _, _ = problem()
    flow = CentralFlow(model, mse, x, y, 0.05)
    rate = flow.rate()
    assert (rate.critical, rate.variance) == (0, 0.0)
    np.testing.assert_allclose(rate.velocity.numpy(), -0.05 * loss_gradient(model, x, y), rtol=1e-12)
    flow.advance(rate)
    for _ in range(4):
        descend(other, x, y, 0.05 / 4)
    np.testing.assert_allclose(theta(model), theta(other), rtol=1e-12)


def sharpness_gradient(model, x, y, step=1e-5):
    """∇λ_1(H), by central differences of dense eigenvalues."""
    here, slope = theta(model), []
    for unit in np.eye(len(here)):
        above, below = (top_after(model, x, y, here + sign * step * unit) for sign in (1, -1))
        slope.append((above - below) / (2 * step))
    move(model, here - theta(model))
    return np.array(slope)


def top_after(model, x, y, there):
    move(model, there - theta(model))
    return np.linalg.eigvalsh(hessian(model, x, y))[-1]


@pytest.mark.parametrize(("seed", "rises"), [(2, True), (7, True), (1, False)])
def test_at_the_edge_the_gradient_loses_its_part_along_the_gradient_of_the_sharpness(seed, rises, monkeypatch):
    monkeypatch.setattr(central, "TOLERANCE", 1e-10)
    model, x, y = problem(d=2, width=3, seed=seed)
    y *= 2
    learning_rate = 2 / np.linalg.eigvalsh(hessian(model, x, y))[-1]
    slope, gradient = sharpness_gradient(model, x, y), loss_gradient(model, x, y)
    along = gradient @ slope / (slope @ slope)
    assert (along < 0) == rises, "whether gradient flow would raise the sharpness"
    rate = CentralFlow(model, mse, x, y, learning_rate).rate()
    assert rate.critical == 1
    assert rate.variance == pytest.approx(-2 * along if rises else 0, rel=1e-5)
    expected = -learning_rate * (gradient - along * slope if rises else gradient)
    np.testing.assert_allclose(rate.velocity.numpy(), expected, atol=1e-6 * np.abs(expected).max())


def test_with_two_critical_eigenvalues_both_stay_at_the_line_and_the_loss_falls():
    model, x, y = problem(n=12, width=4, c=3, seed=2)
    learning_rate, start = 0.916, None
    flow, losses, critical = CentralFlow(model, mse, x, y, learning_rate), [], []
    for _ in range(20):
        rate = flow.rate(start)
        losses.append(mse(model(x), y).item())
        critical.append(rate.critical)
        share = np.linalg.eigvalsh(hessian(model, x, y))[::-1] * learning_rate / 2
        assert share[0] < 1.001, "the error of an Euler step"
        assert (share > 0.975).sum() == rate.critical
        assert (rate.variance > 0) == (rate.critical > 0)
        start = flow.advance(rate)
    assert (np.diff(losses) < 0).all()
    assert critical[0] == 0
    assert critical[-8:] == 8 * [2]
    np.testing.assert_allclose(share[:2], 1, atol=1e-3)


def test_in_float32_it_is_the_flow_of_float64_rounded():
    (single, *data), (double, *exact) = problem(dtype=torch.float32), problem()
    learning_rate = 2 / np.linalg.eigvalsh(hessian(double, *exact))[-1]
    rate = CentralFlow(single, mse, *data, learning_rate).rate()
    wanted = CentralFlow(double, mse, *exact, learning_rate).rate()
    assert rate.velocity.dtype == rate.vectors.dtype == torch.float32
    assert rate.variance == pytest.approx(wanted.variance, rel=1e-2, abs=1e-4)
    torch.testing.assert_close(rate.velocity.double(), wanted.velocity, rtol=1e-2, atol=1e-4)


def test_gradient_descent_follows_it_on_average():
    """From a point on the flow, displaced by √tr Σ along the critical eigenvector as the oscillation would be."""
    rng, n, learning_rate = np.random.default_rng(0), 10, 0.4
    left, right = (np.linalg.qr(rng.normal(size=(m, 2)))[0] for m in (n, 2))
    x = torch.from_numpy(np.sqrt(n) * left * [3, 0.4] @ right.T)  # a direction that is sharp, one that learns slowly
    y = torch.from_numpy(np.sqrt(n) * left @ [[0.1], [1]])
    model, iterate = (RankOne(0.5, 0.5 * right @ [0.1, 1]) for _ in range(2))
    flow, start = CentralFlow(model, mse, x, y, learning_rate), None
    for _ in range(20):
        start = flow.advance(flow.rate(start))
    rate = flow.rate(start)
    displaced = theta(model) + np.sqrt(rate.variance) * rate.vectors[:, 0].numpy()
    move(iterate, displaced - theta(iterate))
    centre, variances, loss, iterates, iterate_loss = [], [], [], [], []
    for _ in range(60):
        centre.append(theta(model))
        loss.append(mse(model(x), y).item())
        iterates.append(theta(iterate))
        iterate_loss.append(mse(iterate(x), y).item())
        rate = flow.rate(start)
        variances.append(rate.variance)
        start = flow.advance(rate)
        descend(iterate, x, y, learning_rate)
    iterates, centre = np.array(iterates), np.array(centre)[1:-1]
    midpoints = (iterates[:-2] + 2 * iterates[1:-1] + iterates[2:]) / 4
    predicted = np.array(loss) + np.array(variances) / learning_rate
    assert predicted.mean() > 3 * np.mean(loss), "most of the loss is the oscillation"
    assert np.mean(iterate_loss) == pytest.approx(predicted.mean(), rel=0.03)
    assert np.mean(np.sum((iterates[1:-1] - midpoints) ** 2, axis=1)) == pytest.approx(np.mean(variances), rel=0.05)
    s, expected = (np.square(at[:, 0]).mean() for at in (midpoints, centre))
    assert s == pytest.approx(expected, rel=0.02)
    of_midpoints, of_iterates = (np.linalg.norm(at - centre, axis=1).mean() for at in (midpoints, iterates[1:-1]))
    assert of_midpoints < 0.25 * of_iterates


def test_its_steps_depend_on_nothing_but_the_parameters_and_the_start():
    model, x, y = problem(n=10, d=4, width=5, c=2)
    flow, start = CentralFlow(model, mse, x, y, 0.956), None
    for step in range(12):
        if step == 9:
            middle, kept = theta(model), start.clone()
        start = flow.advance(flow.rate(start))
    other, _, _ = problem(n=10, d=4, width=5, c=2)
    torch.nn.utils.vector_to_parameters(torch.from_numpy(middle), other.parameters())
    flow, again = CentralFlow(other, mse, x, y, 0.956), kept
    for _ in range(3):
        again = flow.advance(flow.rate(again))
    np.testing.assert_array_equal(theta(other), theta(model))
    torch.testing.assert_close(again, start, rtol=0, atol=0)


def test_a_sharpness_that_nothing_can_lower_has_no_central_flow():
    model, x, y, h = linear()
    flow = CentralFlow(model, mse, x, y, 3 / np.linalg.eigvalsh(h)[-1])
    with pytest.raises(NonFiniteKernel, match="no finite Σ keeps the critical eigenvalues of the Hessian at 2/η"):
        flow.rate()


def test_a_model_with_the_layer_norm_of_torch_is_refused():
    model, x, y = problem()
    model = nn.Sequential(*model[:2], nn.LayerNorm(6, dtype=torch.float64), *model[2:])
    with pytest.raises(InputError, match=r"torch.nn.LayerNorm \(2\): its third derivatives are wrong in torch; use"):
        CentralFlow(model, mse, x, y, 0.1)
    gradients, slopes = third_derivatives(model, x, y)
    assert np.abs(gradients - slopes).max() > 1e-2 * np.abs(slopes).max(), "torch is mended: take the refusal away"


def third_derivatives(model, x, y, step=1e-5):
    """∇(uᵀHv) for random u and v, by the operator and by central differences."""
    u = torch.randn(len(theta(model)), 2, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    gradients = HessianOperator(model, mse, x, y).gradients(u).numpy()
    here, slopes = theta(model), np.empty_like(gradients)
    for i, unit in enumerate(np.eye(len(here))):
        forms = []
        for sign in (1, -1):
            move(model, here + sign * step * unit - theta(model))
            operator = HessianOperator(model, mse, x, y)
            forms.append(torch.stack([operator.apply(column) for column in u.T]) @ u)
        slopes[:, :, i] = (forms[0] - forms[1]).numpy() / (2 * step)
    move(model, here - theta(model))
    return gradients, slopes


@pytest.mark.parametrize("seed", range(2))
def test_gradients_of_the_hessian_are_those_of_finite_differences(seed):
    model, x, y = problem(c=2, seed=seed)
    model[1] = nn.SiLU()
    gradients, slopes = third_derivatives(model, x, y)
    np.testing.assert_array_equal(gradients, gradients.swapaxes(0, 1))
    np.testing.assert_allclose(gradients, slopes, atol=1e-7 * np.abs(slopes).max())
