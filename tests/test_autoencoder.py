"""The autoencoder task: it learns, and what it exports has white latents and the same pictures."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import torch
from diffusers import AutoencoderKL
from safetensors.torch import load_file
from scipy import linalg
from training_kit import captioned, config, records

from mmalign import tasks, train
from mmalign.tasks import autoencoder


def test_an_autoencoder_learns_and_goes_into_a_pipeline(model: Path, tmp_path: Path) -> None:
    table = captioned(tmp_path)
    run = config(
        tmp_path / "run", model, table, task="autoencoder", loss={"kind": "reconstruction"}, lora=None,
        optim__steps=15, optim__lr=3e-3, data__cache="off",
    )  # fmt: skip
    train.run(run)
    losses = [record["loss"] for record in records(run.output)]
    assert np.mean(losses[-3:]) < 0.9 * np.mean(losses[:3])
    later = config(
        tmp_path / "later", model, table, task="sft", loss={"kind": "denoising"}, optim__steps=1,
        model__components={"vae": run.output / "export" / "vae"},
    )  # fmt: skip
    task = tasks.make(later, torch.device("cpu"))
    vae = load_file(run.output / "export" / "vae" / "diffusion_pytorch_model.safetensors")
    assert torch.equal(task.adapter.vae.quant_conv.weight, vae["quant_conv.weight"])
    fetched = task.load([(i, 0) for i in range(4)])["fetched"]
    a, b = (task.inputs.latents(fetched, [torch.Generator().manual_seed(i + j) for i in range(4)]) for j in (0, 9))
    torch.testing.assert_close(a, b, rtol=0, atol=1e-5, msg="the export makes latents noiseless")
    assert 0.01 < a.std().item() < 1.1


def test_whitening_changes_latents_and_no_picture() -> None:
    torch.manual_seed(0)
    vae = AutoencoderKL(block_out_channels=(8, 8), norm_num_groups=4, latent_channels=4, down_block_types=(
        "DownEncoderBlock2D",) * 2, up_block_types=("UpDecoderBlock2D",) * 2).eval()  # fmt: skip
    vae.quant_conv.bias.data = torch.tensor([3.0, -1, 0, 5, -9, -8, -7, -2])
    pixels = torch.rand(16, 3, 32, 32) * 2 - 1
    with torch.no_grad():
        before = vae.encode(pixels).latent_dist
        pictures = vae.decode(before.mean).sample
        autoencoder.whiten(vae, before.mean, before.var)
        after = vae.encode(pixels).latent_dist
        torch.testing.assert_close(vae.decode(after.mean).sample, pictures, rtol=0, atol=1e-4)
    # Independent: the change of variables by least squares, and what it ought to be by way of SciPy's matrix roots.
    old, new = (found.mean.double().movedim(1, -1).reshape(-1, 4) for found in (before, after))
    design = torch.cat([old, torch.ones_like(old[:, :1])], 1)
    map_ = torch.linalg.lstsq(design, new).solution[:4].T.numpy()
    noise = np.diag(before.var.double().mean((0, 2, 3)).numpy())
    white = np.linalg.inv(linalg.sqrtm(np.cov(old.T.numpy(), bias=True) + noise))
    share = 1 - np.diag(white @ noise @ white.T)
    assert share.min() < 0.3 < 0.9 < share.max(), "the example has a channel of noise and one of signal"
    np.testing.assert_allclose(map_, share[:, None] * white, atol=1e-3 * np.abs(white).max())
    assert new.mean(0).abs().max() < 1e-4
    assert after.std.max() < 1e-6, "encoding is deterministic"
    assert vae.config.scaling_factor == 1


def test_a_channel_of_noise_stays_small() -> None:
    """At unit variance it would be most of a denoiser's loss, and none of it could be learnt."""
    torch.manual_seed(0)
    vae = AutoencoderKL(block_out_channels=(8,), norm_num_groups=4, latent_channels=4).eval()
    mean = torch.randn(64, 4, 8, 8) * torch.tensor([3.0, 1, 0.3, 0.1])[:, None, None]
    var = torch.tensor([0.01, 0.01, 0.01, 0.99])[:, None, None].expand_as(mean)
    weight = vae.quant_conv.weight[:4, :, 0, 0].detach().clone()
    autoencoder.whiten(vae, mean, var)
    change = vae.quant_conv.weight[:4, :, 0, 0].detach() @ torch.linalg.pinv(weight)
    latents = torch.einsum("dc,nchw->ndhw", change, mean)
    wanted = torch.tensor([0.9983, 0.9852, 0.8538, 0.001])  # share of signal ** 1.5: scale * std
    torch.testing.assert_close(latents.std((0, 2, 3)), wanted, rtol=0.03, atol=5e-4)
