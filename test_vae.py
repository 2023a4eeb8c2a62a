"""Tests of recipes.vae."""

import re
from types import SimpleNamespace

import pytest
import torch
from torch.distributions import Normal, kl_divergence

from recipes import vae
from recipes.earlier_lessons import load
from recipes.lesson_parts import LessonEncoder


def test_drawings_and_frames_of_random_play_follow_the_seed():
    for source in "shapes", "CartPole-v1":
        first, again, other = (vae.frames(source, 20, seed) for seed in (0, 0, 1))
        assert torch.equal(first, again) and not torch.equal(first, other)
        assert first.shape == (20, 3, 64, 64) and 0 <= first.min() <= first.max() <= 1
        if source == "shapes":  # black, but for one color
            assert all(len(x.flatten(1).unique(dim=1).T) == 2 for x in first)


def test_error_and_kl_are_those_of_p01():
    model, x = vae.VAE(), vae.frames("shapes", 3, 0)
    encoder, features = model.encoder, model.encoder.conv(x).flatten(1)
    mean, std = encoder.fc_mu(features), (encoder.fc_log_var(features) / 2).exp()
    picture = model.decoder.deconv(model.decoder.fc(mean).reshape(3, 256, 4, 4))
    error, kl = model(x)
    assert torch.allclose(error, (picture - x).square().sum() / 3)
    expected = kl_divergence(Normal(mean, std), Normal(0.0, 1.0)).sum(1).mean()
    assert torch.allclose(kl, expected, rtol=1e-3)
    agents_view = (255 * x).round().byte().movedim(1, 3)  # the frames as dreamer.py gives them
    assert torch.allclose(encoder(agents_view), mean, atol=1e-5)


def test_it_learns_and_its_file_is_read(tmp_path, monkeypatch, capsys):
    two = torch.zeros(2, 3, 64, 64)
    two[0, :, :, :32] = two[1, :, :, 32:] = 1.0
    data = SimpleNamespace(split=lambda sizes: (two, two))  # to train on, and to test on
    monkeypatch.setattr(vae, "frames", lambda *args: data)
    out = tmp_path / "vae_encoder.pt"
    vae.main(["shapes", "--steps=10", f"--out={out}"])
    error, mean_frame = map(float, re.findall(r"[\d.]+\d", capsys.readouterr().out))
    assert error < 0.5 * mean_frame and mean_frame == 64 * 64 * 3 / 4

    state, encoder = torch.load(out)["model_state_dict"], LessonEncoder()
    load(encoder, out, "model_state_dict", "encoder")
    assert all(torch.equal(x, state[f"encoder.{k}"]) for k, x in encoder.state_dict().items())
    sizes = {"encoder.fc_log_var": [32, 4096], "decoder.fc": [4096, 32]}
    sizes |= {"decoder.deconv.0": [256, 128, 4, 4], "decoder.deconv.6": [32, 3, 4, 4]}
    assert {name: [*state[f"{name}.weight"].shape] for name in sizes} == sizes
    with pytest.raises(SystemExit, match="recipes.vae: error: .*File exists"):
        vae.main(["shapes", f"--out={out}"])


def test_a_wrong_environment_is_one_line(tmp_path):
    with pytest.raises(SystemExit, match="^recipes.vae: error: --env Nowhere-v0: ") as error:
        vae.main(["Nowhere-v0", f"--out={tmp_path}/x.pt"])
    assert "\n" not in str(error.value) and not [*tmp_path.iterdir()]
