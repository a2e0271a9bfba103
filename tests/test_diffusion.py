"""Laws of trainer/diffusion.py."""

import numpy as np
import pytest
import torch
from diffusers import DDIMScheduler, DDPMScheduler

from evaluation.sampling import timesteps
from trainer import schedules
from trainer.diffusion import Diffusion, epsilon_mse

CURVES = [("linear", 1e-4, 0.02, 1.0), ("cosine", 0, 1, 1.0), ("sigmoid", -3, 3, 1.0), ("polynomial", 0, 1, 2.0)]
SHAPE = (3, 2, 4, 4)


def normal(seed, dtype=torch.float64):
    return torch.randn(SHAPE, generator=torch.Generator().manual_seed(seed), dtype=dtype)


def index(t):
    return torch.full(SHAPE[:1], t)


def in_float64(scheduler, betas):
    """diffusers keeps float32 tables: with float64 ones only the formulas are compared."""
    scheduler.alphas_cumprod = torch.from_numpy(schedules.alpha_bar(betas))
    scheduler.one = scheduler.final_alpha_cumprod = torch.ones((), dtype=torch.float64)
    return scheduler


@pytest.mark.parametrize("steps", [1000, 50, 10])
@pytest.mark.parametrize("variance", ["fixed_small", "fixed_large"])
@pytest.mark.parametrize("curve", CURVES)
def test_p_sample_matches_diffusers_ddpm_scheduler(curve, variance, steps):
    betas = schedules.betas(*curve)
    theirs = DDPMScheduler(
        1000, trained_betas=betas, variance_type=variance, clip_sample=True, timestep_spacing="trailing"
    )
    in_float64(theirs, betas).set_timesteps(steps)
    visited = timesteps(1000, steps)
    assert theirs.timesteps.tolist() == visited.tolist()
    spaced = Diffusion(betas).spaced(visited)
    for k in {steps - 1, steps - 2, steps // 2, 1, 0}:
        t = int(visited[steps - 1 - k])
        x_t, eps = normal(t), normal(t + 1)
        noise = torch.randn(SHAPE, generator=torch.Generator().manual_seed(7), dtype=torch.float64)
        expected = theirs.step(eps, t, x_t, generator=torch.Generator().manual_seed(7)).prev_sample
        if k == 0 and t > 0:  # diffusers adds noise to the finished image where the last visit is not index 0
            beta = spaced.betas[0] if variance == "fixed_large" else 1e-20
            expected = expected - beta**0.5 * noise
        ours = spaced.p_sample(x_t, index(k), eps, noise if k else None, variance)
        torch.testing.assert_close(ours, expected, rtol=1e-8, atol=1e-9)


@pytest.mark.parametrize("steps", [1000, 50, 10])
@pytest.mark.parametrize("eta", [0.0, 0.5, 1.0])
@pytest.mark.parametrize("curve", CURVES)
def test_ddim_sample_matches_diffusers_ddim_scheduler(curve, eta, steps):
    betas = schedules.betas(*curve)
    theirs = in_float64(DDIMScheduler(1000, trained_betas=betas, timestep_spacing="trailing"), betas)
    theirs.set_timesteps(steps)
    visited = timesteps(1000, steps)
    spaced = Diffusion(betas).spaced(visited)
    for k in {steps - 1, steps // 2, 1, 0}:
        t = int(visited[steps - 1 - k])
        x_t, eps, noise = normal(t), normal(t + 1), normal(t + 2)
        expected = theirs.step(eps, t, x_t, eta=eta, variance_noise=noise if eta else None).prev_sample
        ours = spaced.ddim_sample(x_t, index(k), eps, noise if k and eta else None, eta)
        torch.testing.assert_close(ours, expected, rtol=1e-8, atol=1e-8)


@pytest.mark.parametrize("curve", CURVES)
def test_q_sample_matches_diffusers_add_noise(curve):
    betas = schedules.betas(*curve)
    t = torch.tensor([0, 500, 999])
    theirs = in_float64(DDPMScheduler(1000, trained_betas=betas), betas).add_noise(normal(0), normal(1), t)
    torch.testing.assert_close(Diffusion(betas).q_sample(normal(0), t, normal(1)), theirs, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("curve", CURVES)
def test_predict_x_0_undoes_q_sample(curve):
    diffusion = Diffusion(schedules.betas(*curve))
    t = torch.tensor([0, 300, 900])
    x_t = diffusion.q_sample(normal(0), t, normal(1))
    torch.testing.assert_close(diffusion.predict_x_0(x_t, t, normal(1)), normal(0), rtol=0, atol=1e-9)


def test_q_posterior_is_bayes_rule():
    """q(x_{t-1} | x_t, x_0): product of the Gaussians q(x_{t-1} | x_0) and q(x_t | x_{t-1}), by precisions."""
    betas = schedules.betas("cosine", 0, 1)
    alpha_bar = schedules.alpha_bar(betas)
    t, x_0, x_t = 400, normal(0), normal(1)
    precision = 1 / (1 - alpha_bar[t - 1]) + (1 - betas[t]) / betas[t]
    mean = (alpha_bar[t - 1] ** 0.5 / (1 - alpha_bar[t - 1]) * x_0 + (1 - betas[t]) ** 0.5 / betas[t] * x_t) / precision
    ours, variance, log_variance = Diffusion(betas).q_posterior(x_0, x_t, index(t))
    torch.testing.assert_close(ours, mean, rtol=1e-10, atol=1e-12)
    assert variance.flatten()[0].item() == pytest.approx(1 / precision, rel=1e-10)
    torch.testing.assert_close(log_variance.exp(), variance)


def test_last_step_ends_at_the_clipped_x_0():
    diffusion = Diffusion(schedules.betas("linear", 1e-4, 0.02))
    x_t, eps = 3 * normal(0), normal(1)
    clipped = diffusion.predict_x_0(x_t, index(0), eps).clamp(-1, 1)
    torch.testing.assert_close(diffusion.p_sample(x_t, index(0), eps, None, "fixed_small"), clipped)
    torch.testing.assert_close(diffusion.ddim_sample(x_t, index(0), eps, None, 0.0), clipped)


def test_spaced_process_keeps_alpha_bar_where_it_is_visited():
    diffusion = Diffusion(schedules.betas("cosine", 0, 1, 10.0))  # 1e-50 at the end: 1 - beta would round to 0
    visited = [999, 10, 500]
    spaced = diffusion.spaced(visited)
    np.testing.assert_array_equal(spaced.log_alpha_bar, diffusion.log_alpha_bar[[10, 500, 999]])
    assert spaced.steps == 3


def test_spacing_by_every_index_changes_nothing():
    diffusion = Diffusion(schedules.betas("sigmoid", -3, 3))
    np.testing.assert_array_equal(diffusion.spaced(range(1000)).log_alpha_bar, diffusion.log_alpha_bar)
    np.testing.assert_allclose(diffusion.betas, schedules.betas("sigmoid", -3, 3), rtol=1e-6, atol=1e-15)


@pytest.mark.parametrize("visited", [[], [1, 1], [-1, 3], [1000]])
def test_spacing_refuses_what_is_no_set_of_indices(visited):
    with pytest.raises(ValueError, match=r"distinct indices in 0\.\.999"):
        Diffusion(schedules.betas("cosine", 0, 1)).spaced(visited)


@pytest.mark.parametrize("betas", [[], [0.1, 0.0], [1.0], [np.nan], [[0.5, 0.5]]])
def test_betas_outside_0_1_are_refused(betas):
    with pytest.raises(ValueError, match=r"betas must be \(T,\) numbers in \(0, 1\)"):
        Diffusion(np.array(betas))


def test_tables_asked_for_in_inference_mode_serve_training():
    diffusion = Diffusion(schedules.betas("cosine", 0, 1))
    with torch.inference_mode():
        diffusion.q_sample(normal(0), index(5), normal(1))
    x_0 = normal(0).requires_grad_()
    diffusion.q_sample(x_0, index(5), normal(1)).sum().backward()
    assert x_0.grad is not None


def test_half_precision_images_meet_float32_tables():
    diffusion = Diffusion(schedules.betas("polynomial", 0, 1, 2.0))
    x_t = diffusion.q_sample(normal(0).bfloat16(), index(0), normal(1).bfloat16())
    assert x_t.dtype == torch.float32
    assert torch.isfinite(x_t).all()


def test_loss_is_taken_in_float32_an_image_each():
    predicted, noise = normal(0), normal(1)
    loss = epsilon_mse(predicted.bfloat16(), noise.float())
    assert loss.dtype == torch.float32
    assert loss.shape == (3,)
    expected = ((predicted.bfloat16().double() - noise.float().double()) ** 2).mean((1, 2, 3))
    torch.testing.assert_close(loss.double(), expected, rtol=1e-6, atol=0)
