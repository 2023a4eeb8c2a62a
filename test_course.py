"""Tests of what the course needs: names, its environments, dashboard, weights of P01 and P02."""

import importlib
import inspect
import json
import os

import gymnasium as gym
import numpy as np
import pytest
import torch

import dreamer
from dreamer import Agent, Config, PixelEnv, load_agent, train
from recipes import lesson_parts, open_loop
from recipes.earlier_lessons import LessonEncoder, LessonRSSM, load

SMALL = dict(
    depth=2, hidden=16, groups=4, classes=4, units=16, batch_size=4, batch_length=6, horizon=5,
    prefill=60, pretrain=5, train_ratio=16.0, posttrain=5, eval_every=100, episodes=1,
    runs="r", steps=120,
)  # fmt: skip
FLAGS = [f"--{k.replace('_', '-')}={v}" for k, v in SMALL.items()]
E, R = LessonEncoder().state_dict(), LessonRSSM().state_dict()


@pytest.fixture
def recipe(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    return lambda name, *argv: importlib.import_module(f"recipes.{name}").main(list(argv))


@pytest.mark.parametrize(
    "call",
    "symexp(x); twohot_encode(x, bins); twohot_decode(logits, bins); kl_divergence(p, q); "
    "lambda_return(reward, value, cont, gamma, lam); imagine(model, actor, feat, horizon); "
    "update_world_model(agent, batch); update_behavior(agent, start); train(config); "
    "evaluate(agent, episodes, seed); load_agent(path); Config(); PixelEnv(env_id); "
    "Encoder(depth); Decoder(feat_size, depth); RSSM(embed_size, action_size, config); "
    "WorldModel(action_size, config); Actor(feat_size, action_space, units); "
    "Critic(feat_size, units, layers); ReplayBuffer()".split("; "),
)
def test_names_and_arguments_that_other_lessons_use_stay(call):
    name, *arguments = call.rstrip(")").replace("(", ", ").rstrip(", ").split(", ")
    parameters = inspect.signature(getattr(dreamer, name)).parameters.values()
    assert [x.name for x in parameters][: len(arguments)] == arguments
    assert all(x.default is not x.empty for x in list(parameters)[len(arguments) :])


@pytest.mark.parametrize("name, pixels, red", [("Bar", 5 * 64, 255), ("Circle", 197, 229)])
def test_the_courses_environments(name, pixels, red):
    env, films = PixelEnv(f"recipes.course:{name}-v0"), []
    for _ in range(2):
        films.append([env.reset(seed=3)[0]])
        while not env.row["is_last"]:
            films[-1].append(env.step(1)[0])
    assert np.array_equal(*films) and len(films[0]) == 21 and not env.row["terminated"]
    assert np.array_equal(env.env.render(), env.env.render())
    assert (films[0][0][..., 0] > 100).sum() == pixels and films[0][0].max() == red
    assert env.row["reward"] == {"Bar": -1, "Circle": 0}[name]  # at the wall


def test_returns_at_random_and_of_the_best_rule(recipe, capsys):
    recipe("course")
    means = [float(line.split()[3].strip(",")) for line in capsys.readouterr().out.splitlines()]
    assert np.allclose(means, [-1.2, 3.5, 9.7, 19.4], atol=0.4)


def test_the_dashboard_measures_and_draws(recipe, brief, capsys):
    run = train(Config(**SMALL))
    recipe("dashboard", str(run), "--episodes=3", "--out=d.png")
    said = capsys.readouterr().out.partition("\nstep")[2]
    assert "drift, same episode" in said and os.path.exists("d.png")
    assert said.split()[:11] == [*map(str, range(1, 11)), "20"]
    with pytest.raises(SystemExit, match="recipes.dashboard: error: nowhere holds no checkpoint"):
        recipe("dashboard", "nowhere")
    m = open_loop.measure(load_agent(run), 6)
    (real, imagined), rho = m["rewards"], m["reward rho"]["dream"][-1]
    assert torch.equal(real, m["same"].float())  # 1 for every step, and after the end 0
    frames, dreamed = m["films"]
    for k in (1, 3, 5, 10):
        errors = [(x[k] - y[k]).square().mean() for x, y in zip(frames, dreamed, strict=True)]
        psnr = [-10 * x.log10() for x, same in zip(errors, m["same"], strict=True) if same[k - 1]]
        assert m["PSNR in dB"]["dreamed"][k - 1].item() == pytest.approx(np.mean(psnr), rel=1e-4)
    if np.isfinite(rho):
        assert rho == pytest.approx(np.corrcoef(real.flatten(), imagined.flatten())[0, 1], 1e-3)


def test_after_a_time_limit_no_reward_is_known_to_the_dashboard():
    gym.register("Cut-v0", gym.spec("CartPole-v1").entry_point, max_episode_steps=6)
    m = open_loop.measure(Agent(gym.spaces.Discrete(2), Config(**SMALL | {"env": "Cut-v0"})), 3)
    real, imagined = m["rewards"]
    assert real.tolist() == m["same"].tolist() == 3 * [6 * [1] + 14 * [0]]
    assert not imagined[:, 6:].any() and np.isnan(m["reward rho"]["dream"]).all()


LOG_VAR = {f"fc_{x}.bias": torch.zeros(32) for x in ("log_var", "logvar", "var")}
VAE = {f"encoder.{k}": x for k, x in (E | LOG_VAR).items()} | {"decoder.fc.bias": torch.zeros(9)}
VAES = {"model_state_dict": VAE, "latent_dim": 32}, {"encoder": E, "decoder": {}}, VAE, E
RSSMS = {"rssm_state_dict": R, "hidden_dim": 128}, {"rssm": R}, R | {"recon.bias": torch.zeros(32)}


@pytest.mark.parametrize("state", VAES + RSSMS)
def test_every_spelling_of_the_files(state, tmp_path):
    torch.save(state, tmp_path / "x.pt")
    if any(state is x for x in VAES):
        part, names = LessonEncoder(), ("model_state_dict", "encoder")
    else:
        part, names = LessonRSSM(), ("rssm_state_dict", "rssm")
    load(part, tmp_path / "x.pt", *names)
    assert all(torch.equal(x, (E | R)[name]) for name, x in part.state_dict().items())


def test_the_networks_compute_what_the_projects_do():
    encoder, rssm, action = LessonEncoder(), LessonRSSM(), torch.eye(2)[[0, 1, 1]]
    obs, feat = torch.randint(256, (2, 3, 64, 64, 3), dtype=torch.uint8), torch.randn(3, 160)
    x = encoder.conv((obs[1] / 255).movedim(-1, 1).contiguous()).reshape(3, 4096)
    assert torch.allclose(encoder(obs)[1], encoder.fc_mu(x), atol=1e-6)
    number = torch.tensor([[0.0], [1.0], [1.0]])
    h = rssm.gru(torch.cat([feat[:, 128:], number], 1), feat[:, :128])
    mean, std = rssm.prior_net(h).split(32, 1)
    prior = torch.stack([mean, torch.nn.functional.softplus(std) + 0.1], 2)
    assert torch.equal(rssm.recur(feat, action), h) and torch.equal(rssm.prior(h), prior)


@pytest.mark.parametrize(
    "parts, freeze", [({"encoder": E, "rssm": R}, False), ({"encoder": E}, True)]
)
def test_training_with_the_files(parts, freeze, recipe, brief, capsys):
    argv = FLAGS + ["--freeze"] * freeze
    for name, state in parts.items():
        torch.save(state, f"{name}.pt")
        argv = argv + [f"--{name}", f"{name}.pt"] if freeze else argv
    files = [] if freeze else ["encoder.pt", "rssm.pt"]  # in this order they need no names
    recipe("earlier_lessons", *files, *argv)
    said = capsys.readouterr().out
    assert np.isfinite(list(json.loads(said[said.index("{") :]).values())).all()
    weights = torch.load("r/CartPole-v1-0/checkpoint.pt")["agent"]
    for name, state in parts.items():
        same = {torch.equal(x, weights[f"world_model.{name}.{key}"]) for key, x in state.items()}
        assert same == {freeze}

    recipe("dashboard", "r/CartPole-v1-0", "--episodes", "2")
    loaded = lesson_parts.load_agent("r/CartPole-v1-0").state_dict()
    assert all(torch.equal(x, weights[name]) for name, x in loaded.items())
    with pytest.raises(SystemExit, match="the agent of .*CartPole-v1-0") as error:
        dreamer.main(["--eval", "r/CartPole-v1-0"])
    assert "\n" not in str(error.value) and len(str(error.value)) < 600


REFUSALS = [
    ({"a": 3}, "--encoder x.pt", r"x.pt: conv.0.weight \[32, 3, 4, 4\] was expected, .* holds a$"),
    (torch.zeros(2), "--encoder x.pt", "x.pt: conv.0.weight .* it holds no weights$"),
    (R | {"gru.bias_hh": torch.zeros(9)}, "--rssm x.pt", r"gru.bias_hh is \[9\], but \[384\] was"),
    (E, "--rssm x.pt", "gru.weight_ih .* was expected, it holds conv.0.weight, conv.0.bias"),
    (LessonRSSM(), "--rssm x.pt", "x.pt holds no checkpoint that can be used: Weights only"),
    (R, "--rssm y.pt", "y.pt holds no checkpoint"),
    (R, "--rssm x.pt --env Acrobot-v1", r"0 and 1, but Acrobot-v1 has Discrete\(3\)$"),
    (R, "--rssm x.pt --env Pendulum-v1", "0 and 1, but Pendulum-v1 has Box"),
]


@pytest.mark.parametrize("state, argv, said", REFUSALS)
def test_refusals_are_one_clear_line(state, argv, said, recipe):
    torch.save(state, "x.pt")
    with pytest.raises(SystemExit, match=f"^recipes.earlier_lessons: error: .*{said}") as error:
        recipe("earlier_lessons", *FLAGS, *argv.split())
    assert "\n" not in str(error.value)


def test_help_names_the_options_of_the_recipe_and_of_dreamer(recipe, capsys):
    with pytest.raises(SystemExit):
        recipe("earlier_lessons", "--help")
    said = capsys.readouterr().out
    assert all(option in said for option in ("--rssm", "--freeze", "--train-ratio"))
