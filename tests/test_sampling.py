"""Laws of evaluation/sampling.py."""

import copy
import gc
import weakref
from pathlib import Path

import numpy as np
import pytest
import torch
from diffusers import (
    DDIMPipeline,
    DDIMScheduler,
    DDPMPipeline,
    DDPMScheduler,
    DPMSolverMultistepScheduler,
    UNet2DModel,
)

from evaluation.config import SamplerConfig
from evaluation.sampling import Sampler, block_seed, timesteps
from search import config_file
from trainer import schedules

COSINE = schedules.betas("cosine", 0, 1)
LINEAR = schedules.betas("linear", 1e-4, 0.02)
SHAPE = (3, 8, 8)
MEAN, VARIANCE = 0.3, 0.01  # of Gaussian data whose x_0 is seven standard deviations from being clipped


@pytest.fixture(scope="module", autouse=True)
def one_thread():
    """Tensors this small are slower on many threads, many times so where other processes want the cores too."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


@pytest.fixture(scope="module")
def unet():
    torch.manual_seed(0)
    return UNet2DModel(
        sample_size=8,
        in_channels=3,
        out_channels=3,
        block_out_channels=(8, 8),
        layers_per_block=1,
        norm_num_groups=4,
        down_block_types=("DownBlock2D", "DownBlock2D"),
        up_block_types=("UpBlock2D", "UpBlock2D"),
        dropout=0.5,
    )


def shipped_schedules():
    """The known points of all shipped configurations."""
    configs = [config_file.load(path.stem) for path in Path(config_file.__file__).parent.glob("configs/*.yaml")]
    return {
        (point.family, point.start, point.end, point.tau, point.train.get("schedule.space", each.train.schedule.space))
        for each in configs
        for point in each.known_points
    }


def gaussian_denoiser(betas, mean=MEAN, variance=VARIANCE):
    """E[eps | x_t] for pixels N(mean, variance): what a perfect model of such data predicts."""
    alpha_bar = torch.from_numpy(schedules.alpha_bar(betas))

    def denoise(x_t, t):
        a = alpha_bar[t].view(-1, 1, 1, 1)
        return ((1 - a).sqrt() * (x_t - a.sqrt() * mean) / (a * variance + 1 - a)).to(x_t.dtype)

    return denoise


def gaussian_recursion(betas, sampler):
    """Mean and variance of what the sampler draws with `gaussian_denoiser`: every step is linear in x."""
    visited = timesteps(len(betas), sampler.steps)
    alpha_bar = schedules.alpha_bar(betas)[visited]
    previous = np.append(alpha_bar[1:], 1.0)
    mean, variance = 0.0, 1.0
    for k, (a, p) in enumerate(zip(alpha_bar, previous, strict=True)):
        gain = np.sqrt(a) * VARIANCE / (a * VARIANCE + 1 - a)  # d x_0 / d x_t
        offset = MEAN - gain * np.sqrt(a) * MEAN
        beta = 1 - a / p
        sigma2 = beta * (1 - p) / (1 - a)
        if sampler.name == "ddpm":
            on_x_0, on_x_t = np.sqrt(p) * beta / (1 - a), np.sqrt(a / p) * (1 - p) / (1 - a)
            sigma2 = beta if sampler.variance == "fixed_large" else sigma2
        else:  # eps = (x_t - sqrt(a) x_0) / sqrt(1 - a)
            sigma2 *= sampler.eta**2
            on_x_t = np.sqrt((1 - p - sigma2) / (1 - a))
            on_x_0 = np.sqrt(p) - on_x_t * np.sqrt(a)
        slope = on_x_0 * gain + on_x_t
        mean = slope * mean + on_x_0 * offset
        variance = slope**2 * variance + (sigma2 if k < len(visited) - 1 else 0.0)
    return mean, variance


@pytest.mark.parametrize("sampler", [("ddim", 0.0), ("ddim", 0.5), ("ddpm", 0.0)])
@pytest.mark.parametrize("betas", [COSINE, LINEAR])
def test_a_block_is_what_diffusers_pipelines_draw(unet, betas, sampler):
    name, eta = sampler
    config = SamplerConfig(name=name, eta=eta, steps=10, block_size=4, seed=3)
    generator = torch.Generator().manual_seed(block_seed(3, 2))
    options = {"trained_betas": betas, "timestep_spacing": "trailing", "clip_sample": True}
    call = {"batch_size": 4, "generator": generator, "num_inference_steps": 10, "output_type": "np"}
    if name == "ddim":
        pipeline = DDIMPipeline(unet.eval(), DDIMScheduler(1000, **options))
        call["eta"] = eta
    else:
        pipeline = DDPMPipeline(unet.eval(), DDPMScheduler(1000, variance_type="fixed_small", **options))
    pipeline.set_progress_bar_config(disable=True)
    theirs = np.round(pipeline(**call).images * 255)
    ours = Sampler(unet, betas, SHAPE, config, "cpu").block(2)
    assert ours.shape == (4, 8, 8, 3)
    assert ours.dtype == np.uint8
    assert np.ptp(ours) > 50
    assert np.abs(ours - theirs).max() <= 1  # diffusers keeps its tables in float32


@pytest.mark.parametrize("steps", [1000, 10])
@pytest.mark.parametrize("variance", ["fixed_small", "fixed_large"])
@pytest.mark.parametrize("betas", [COSINE, LINEAR])
def test_ddpm_draws_the_gaussian_that_the_exact_recursion_gives(betas, variance, steps):
    sampler = SamplerConfig(name="ddpm", steps=steps, variance=variance, block_size=20)
    x = Sampler(gaussian_denoiser(betas), betas, (3, 16, 16), sampler, "cpu").denoised(0).double()  # 15,360 pixels
    mean, true_variance = gaussian_recursion(betas, sampler)
    assert x.mean().item() == pytest.approx(mean, abs=4 * (true_variance / x.numel()) ** 0.5)
    assert x.var().item() == pytest.approx(true_variance, rel=4 * (2 / x.numel()) ** 0.5)
    if steps == 1000:
        assert mean == pytest.approx(MEAN, abs=2e-3)
        assert true_variance == pytest.approx(VARIANCE, rel=0.1)


@pytest.mark.parametrize("betas", [COSINE, LINEAR])
def test_fixed_small_spreads_too_little_and_fixed_large_too_much(betas):
    sampler = SamplerConfig(name="ddpm", steps=100, block_size=50)
    small, large = (
        Sampler(gaussian_denoiser(betas), betas, (3, 16, 16), config, "cpu").denoised(0).var()
        for config in (sampler, sampler.model_copy(update={"variance": "fixed_large"}))
    )
    assert 0.5 * VARIANCE < small < 0.9 * VARIANCE
    assert 1.05 * VARIANCE < large < 1.5 * VARIANCE


@pytest.mark.parametrize("eta", [0.0, 0.5, 1.0])
@pytest.mark.parametrize("steps", [200, 7])
def test_ddim_draws_the_gaussian_that_the_exact_recursion_gives(eta, steps):
    sampler = SamplerConfig(name="ddim", steps=steps, eta=eta, block_size=20)
    x = Sampler(gaussian_denoiser(LINEAR), LINEAR, (3, 16, 16), sampler, "cpu").denoised(0).double()
    mean, true_variance = gaussian_recursion(LINEAR, sampler)
    assert x.mean().item() == pytest.approx(mean, abs=4 * (true_variance / x.numel()) ** 0.5)
    assert x.var().item() == pytest.approx(true_variance, rel=4 * (2 / x.numel()) ** 0.5)


@pytest.mark.parametrize("steps", [4, 20])
@pytest.mark.parametrize("curve", [("cosine", 0, 1), ("cosine", 0.2, 1, 2.0), ("linear", 1e-4, 0.02)])
def test_dpm_solver_is_diffusers_with_x_0_clipped(curve, steps):
    betas = schedules.betas(*curve)
    model = gaussian_denoiser(betas)
    x = torch.randn((4, *SHAPE), generator=torch.Generator().manual_seed(block_seed(3, 2)))
    scheduler = DPMSolverMultistepScheduler(
        1000, trained_betas=betas, timestep_spacing="trailing", thresholding=True, sample_max_value=1.0
    )
    scheduler.set_timesteps(steps)
    for t in scheduler.timesteps:
        x = scheduler.step(model(x, t.repeat(4)), t, x).prev_sample
    config = SamplerConfig(name="dpm++", steps=steps, block_size=4, seed=3)
    ours = Sampler(model, betas, SHAPE, config, "cpu").denoised(2)
    torch.testing.assert_close(ours, x, rtol=0, atol=1e-4)  # diffusers keeps its tables in float32


@pytest.mark.parametrize("curve", sorted(shipped_schedules()), ids=str)
def test_dpm_solver_nears_the_true_gaussian_as_steps_grow_on_every_shipped_schedule(curve):
    family, start, end, tau, space = curve
    betas = schedules.betas(family, start, end, tau, space=space)
    errors = []
    for steps in (10, 100, 1000):
        config = SamplerConfig(name="dpm++", steps=steps, block_size=4)
        x = Sampler(gaussian_denoiser(betas), betas, (3, 16, 16), config, "cpu").denoised(0).double()  # 3,072 pixels
        assert x.mean().item() == pytest.approx(MEAN, abs=4 * (VARIANCE / x.numel()) ** 0.5)
        errors.append(abs(x.var().item() - VARIANCE))
    assert errors[0] > errors[1] > errors[2] - 0.05 * VARIANCE  # which 3,072 pixels can tell
    assert errors[2] < 0.2 * VARIANCE


@pytest.mark.parametrize("name", ["ddpm", "ddim", "dpm++"])
def test_memory_does_not_grow_with_the_number_of_steps(name):
    """How many of the images on the way are still held when the model is asked for the last time."""
    alive = []
    for steps in (5, 50):
        seen = []

        def model(x, t, seen=seen):
            seen.append(weakref.ref(x))
            return x * 0.5

        Sampler(model, COSINE, (1, 2, 2), SamplerConfig(name=name, steps=steps, block_size=1), "cpu").denoised(0)
        assert len(seen) == steps
        alive.append(sum(x() is not None for x in seen))
    assert alive[0] == alive[1] <= 1


def test_a_model_s_memory_is_free_as_soon_as_its_sampler_is_let_go(unet):
    """Not when Python next looks for cycles: every rung and every candidate has a sampler of its own."""
    model = copy.deepcopy(unet)
    held = weakref.ref(model)
    gc.disable()
    try:
        Sampler(model, COSINE, SHAPE, SamplerConfig(steps=2, block_size=1), "cpu").block(0)
        del model
        assert held() is None
    finally:
        gc.enable()


@pytest.mark.parametrize("spacing", ["trailing", "leading", "linspace"])
@pytest.mark.parametrize("steps", [1, 7, 50, 1000])
def test_spacings_are_diffusers(spacing, steps):
    scheduler = DDIMScheduler(1000, timestep_spacing=spacing)
    scheduler.set_timesteps(steps)
    np.testing.assert_array_equal(timesteps(1000, steps, spacing), scheduler.timesteps.numpy())


def test_the_spacing_of_the_settings_is_used():
    visited = []
    for spacing in ("trailing", "leading"):
        config = SamplerConfig(steps=4, spacing=spacing, block_size=1)
        Sampler(lambda x, t: visited.append(int(t[0])) or x, COSINE, (1, 1, 1), config, "cpu").denoised(0)
    assert visited == [999, 749, 499, 249, 750, 500, 250, 0]


@pytest.mark.parametrize(("T", "steps"), [(1000, 50), (1000, 1000), (1000, 7), (1000, 1), (10, 7), (3, 2), (1, 1)])
def test_timesteps_fall_strictly_from_the_last_index(T, steps):
    visited = timesteps(T, steps)
    assert visited.shape == (steps,)
    assert visited[0] == T - 1
    assert visited[-1] >= 0
    assert (np.diff(visited) < 0).all()


def test_more_steps_than_the_schedule_has_visit_every_index():
    assert timesteps(4, 50).tolist() == [3, 2, 1, 0]


@pytest.mark.parametrize(("T", "steps"), [(0, 1), (10, 0)])
def test_no_steps_are_refused(T, steps):
    with pytest.raises(ValueError, match="must be >= 1"):
        timesteps(T, steps)


@pytest.mark.parametrize("sampler", [("ddpm", 0.0), ("ddim", 0.0), ("ddim", 0.5), ("dpm++", 0.0)])
def test_images_do_not_depend_on_shards(unet, sampler):
    config = SamplerConfig(name=sampler[0], eta=sampler[1], steps=3, block_size=4)
    whole = Sampler(unet, COSINE, SHAPE, config, "cpu").images(0, 13)
    for first, count in [(0, 4), (4, 9), (3, 2), (12, 1), (5, 0)]:
        shard = Sampler(unet, COSINE, SHAPE, config, "cpu").images(first, count)
        assert shard.shape == (count, 8, 8, 3)
        np.testing.assert_array_equal(shard, whole[first : first + count])


def test_another_seed_or_block_is_other_noise():
    seeds = {block_seed(seed, block) for seed in range(30) for block in range(30)}
    assert len(seeds) == 900


def test_all_models_see_the_same_noise():
    """Deterministic DDIM, one step: the image is a function of x_T alone, whatever came before in the process."""
    config = SamplerConfig(steps=1, block_size=2)
    seen = []
    for _ in range(2):
        Sampler(lambda x, t: seen.append(x.clone()) or x, COSINE, SHAPE, config, "cpu").block(5)
        torch.randn(3)
    assert torch.equal(*seen)
    expected = torch.randn((2, *SHAPE), generator=torch.Generator().manual_seed(block_seed(0, 5)))
    assert torch.equal(seen[0], expected)


@pytest.mark.parametrize("name", ["ddpm", "ddim", "dpm++"])
def test_sampling_consumes_no_global_random_numbers(unet, name):
    before = torch.get_rng_state(), np.random.get_state()[1].copy()
    Sampler(unet.train(), COSINE, SHAPE, SamplerConfig(name=name, eta=1.0, steps=2, block_size=2), "cpu").block(0)
    assert torch.equal(torch.get_rng_state(), before[0])
    np.testing.assert_array_equal(np.random.get_state()[1], before[1])


def test_dropout_is_off_and_every_training_flag_comes_back(unet):
    config = SamplerConfig(steps=2, block_size=2)
    unet.eval()
    expected = Sampler(unet, COSINE, SHAPE, config, "cpu").block(0)
    unet.train()
    unet.mid_block.eval()  # frozen by its owner
    np.testing.assert_array_equal(Sampler(unet, COSINE, SHAPE, config, "cpu").block(0), expected)
    assert unet.training
    assert not unet.mid_block.training

    def fails(x, t):
        raise RuntimeError("no device")

    unet.forward = fails
    try:
        with pytest.raises(RuntimeError, match="no device"):
            Sampler(unet, COSINE, SHAPE, config, "cpu").block(0)
    finally:
        del unet.forward  # the class's own again
    assert unet.training


@pytest.mark.parametrize(
    "sampler",
    [
        ("ddpm", "fixed_small", 0.0),
        ("ddpm", "fixed_large", 0.0),
        ("ddim", "fixed_small", 0.5),
        ("dpm++", "fixed_small", 0.0),
    ],
)
@pytest.mark.parametrize("curve", [("polynomial", 0, 1, 2.0), ("cosine", 0, 1, 20.0), ("sigmoid", 0, 3, 1e-3)])
def test_float32_sampling_is_finite_where_alpha_bar_meets_0_or_1(curve, sampler):
    name, variance, eta = sampler
    betas = schedules.betas(*curve)
    for steps in (1000, 20):
        config = SamplerConfig(name=name, variance=variance, eta=eta, steps=steps, block_size=2)
        x = Sampler(lambda x, t: torch.zeros_like(x), betas, (1, 2, 2), config, "cpu").denoised(0)
        assert x.dtype == torch.float32
        assert torch.isfinite(x).all()


def test_a_diverged_model_is_an_error_and_no_image():
    with pytest.raises(FloatingPointError, match="block 3"):
        Sampler(lambda x, t: x * torch.nan, COSINE, SHAPE, SamplerConfig(steps=2, block_size=2), "cpu").block(3)


def test_pixels_are_clamped_and_rounded():
    """A model that sees x_0 = level everywhere: black, the middle rounded up, white, and beyond white."""
    for level, pixel in [(-1.0, 0), (0.0, 128), (1.0, 255), (3.0, 255), (0.3, 166)]:  # 127.5 and 165.75 before rounding

        def denoise(x_t, t, level=level):
            a = torch.from_numpy(schedules.alpha_bar(LINEAR))[t].view(-1, 1, 1, 1)
            return (x_t - a.sqrt() * level) / (1 - a).sqrt()

        image = Sampler(denoise, LINEAR, (1, 2, 2), SamplerConfig(steps=5, block_size=1), "cpu").block(0)
        assert np.abs(image.astype(int) - pixel).max() <= (level == 0.0)


def test_progress_counts_images():
    done = []
    config = SamplerConfig(steps=1, block_size=4)
    Sampler(lambda x, t: x, COSINE, SHAPE, config, "cpu").images(2, 7, progress=done.append)
    assert done == [2, 6, 7]


def test_negative_ranges_are_refused():
    with pytest.raises(ValueError, match=r"first >= 0 and count >= 0 must hold.*first=-1"):
        Sampler(lambda x, t: x, COSINE, SHAPE, SamplerConfig(), "cpu").images(-1, 2)


def test_auto_is_bf16_on_gpus_alone_and_part_of_what_the_images_are():
    assert SamplerConfig().on("cuda") == SamplerConfig(bf16=True)
    assert SamplerConfig().on("cpu") == SamplerConfig(bf16=False)
    assert SamplerConfig(bf16=False).on("cuda") == SamplerConfig(bf16=False)


def test_bf16_is_of_the_model_alone_and_changes_images_by_its_rounding(unet):
    seen = set()
    hook = unet.conv_out.register_forward_hook(lambda module, x, output: seen.add(output.dtype))
    exact, rounded = (
        Sampler(unet, LINEAR, SHAPE, SamplerConfig(name="ddpm", steps=10, block_size=4, bf16=bf16), "cpu").denoised(0)
        for bf16 in (False, True)
    )
    hook.remove()
    assert seen == {torch.float32, torch.bfloat16}
    assert exact.dtype == rounded.dtype == torch.float32
    assert 0 < (exact - rounded).abs().mean() < 2**-6  # bf16 has 8 bits


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA GPU")
@pytest.mark.parametrize("bf16", [False, True])
def test_on_cuda_a_graph_draws_the_same_images_also_after_its_weights_change(unet, bf16, capfd):
    config = SamplerConfig(name="ddpm", steps=10, block_size=4, bf16=bf16)
    model = copy.deepcopy(unet).cuda()
    graphed, eager = (Sampler(model, LINEAR, SHAPE, config, "cuda") for _ in range(2))
    eager._fast = eager._eager
    for block in range(3):
        np.testing.assert_array_equal(graphed.block(block), eager.block(block))
        with torch.no_grad():
            for parameter in model.parameters():
                parameter.mul_(1.1)
    assert graphed._fast.__name__ == "replay"
    assert "no CUDA graph" not in capfd.readouterr().out
