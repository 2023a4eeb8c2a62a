"""Tests of the recipes, each run small. They are meant to become a part of test_dreamer.py."""

import importlib.util
import json
import os

import gymnasium as gym
import numpy as np
import pytest
import torch
from gymnasium.utils.env_checker import check_env

import dreamer
from dreamer import Agent, Config, PixelEnv, train
from recipes import dream_env, dynamics_gradient, gaussian_latents, pendulum

SMALL = dict(
    depth=2, hidden=16, groups=4, classes=4, units=16, batch_size=4, batch_length=6, horizon=5,
    prefill=60, pretrain=5, train_ratio=16.0, posttrain=5, eval_every=100, episodes=1,
)  # fmt: skip
A, D, S = 2, 16, 4  # sizes under SMALL


@pytest.fixture(scope="session")
def small_run(tmp_path_factory):
    return train(Config(**SMALL, steps=160, runs=str(tmp_path_factory.mktemp("runs"))))


@pytest.fixture
def recipe(tmp_path, monkeypatch):
    """Runs the main of a recipe in an empty folder. What it replaces is put back."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("SDL_VIDEODRIVER", "dummy")
    for name in ("TwoHotHead", "Critic", "update_behavior"):
        monkeypatch.setattr(dreamer, name, getattr(dreamer, name))
    return lambda name, *argv: importlib.import_module(f"recipes.{name}").main(list(argv))


@pytest.mark.parametrize("command", ["film --seed 3", "latents --steps 5", "probe --episodes 4"])
def test_a_recipe_reads_a_run_and_refuses_what_is_none(command, recipe, small_run, capsys):
    name, *options = command.split()
    recipe(name, str(small_run), *options)
    files = {"film": ["dream.gif"], "latents": ["latents.png"], "probe": []}
    assert os.listdir() == files[name] and capsys.readouterr().out
    with pytest.raises(SystemExit, match=f"recipes.{name}: error: nowhere holds no checkpoint"):
        recipe(name, "nowhere")


@pytest.mark.parametrize(
    "command",
    "dreamer_v1, dreamer_v2, gaussian_latents, dynamics_gradient, squared_heads".split(", "),
)
def test_an_older_choice_trains_and_is_evaluated(command, recipe, brief, capsys):
    argv = command.split() + [f"--{k.replace('_', '-')}={v}" for k, v in SMALL.items()]
    reinforce = dreamer.update_behavior
    recipe(*argv, "--steps=80", "--runs=small", "--seed=1")
    metrics = json.loads("{" + capsys.readouterr().out.partition("{")[2])
    assert np.isfinite(list(metrics.values())).all() and metrics["eval/return"] > 0
    checkpoint = torch.load("small/CartPole-v1-1/checkpoint.pt")
    assert metrics == {k: v for k, v in checkpoint["lines"][-1].items() if k != "env/step"}
    weights = checkpoint["agent"]
    gaussian = len(weights["world_model.rssm.prior_net.3.bias"]) == 2 * S
    ideas = [gaussian, dreamer.update_behavior is not reinforce]
    assert ideas == [command == "dreamer_v1" or x in command for x in ("gaussian", "dynamics")]
    with pytest.raises(SystemExit, match=f"recipes.{argv[0]}: error: .* exists"):
        recipe(*argv, "--steps=80", "--runs=small", "--seed=1")


def test_each_command_of_v1_has_a_folder_of_its_own(recipe, monkeypatch, capsys):
    folders = []
    monkeypatch.setattr(dreamer, "train", lambda config, agent: folders.append(config.runs))
    monkeypatch.setattr(dreamer, "evaluate", lambda agent, episodes, seed: {})
    for argv in ([], ["--only", "gaussian"], ["--only", "dynamics"]):
        recipe("dreamer_v1", *argv)
    assert folders == ["runs-v1", "runs-v1-gaussian", "runs-v1-dynamics"]
    with pytest.raises(SystemExit):
        recipe("dreamer_v1", "--help")
    assert "--only dynamics" in capsys.readouterr().out


def test_ppo_learns_in_the_dream_and_on_pixels(recipe, small_run, capsys):
    pytest.importorskip("stable_baselines3")
    recipe("ppo_in_dream", str(small_run), *"--steps 64 --episodes 1".split())
    recipe("ppo", str(small_run), *"--seeds 1 --steps 64 --every 32 --episodes 1".split())
    said = capsys.readouterr().out
    assert "real return" in said and "PPO, seed 0" in said


@pytest.fixture
def gaussian():
    return gaussian_latents.gaussian_agent(Config(**SMALL)).world_model.rssm


def test_gaussian_kl_and_entropy_in_closed_form(gaussian):
    wide, narrow = torch.tensor([[0.0, 2.0]]), torch.tensor([[1.0, 1.0]])  # mean, deviation
    kl = (4 + 1 - 1) / 2 - np.log(2)  # of the first from the second, not the other way round
    assert gaussian.kl(wide.expand(3, S, 2), narrow).tolist() == pytest.approx(3 * [S * kl])
    assert gaussian.entropy(wide).item() == pytest.approx(np.log(2 * np.pi * np.e * 4) / 2)


def test_gaussian_samples_have_mean_and_deviation_and_pass_gradients(gaussian):
    params = torch.stack([torch.arange(S) - 1.5, torch.arange(1, S + 1)], -1).requires_grad_()
    noise = (gaussian.sample(params.expand(50_000, S, 2)) - params[:, 0]) / params[:, 1]
    assert noise.shape == (50_000, S) and abs(noise.mean()) < 0.01 and abs(noise.std() - 1) < 0.01
    (gradient,) = torch.autograd.grad(noise[0].sum(), params)
    assert torch.allclose(gradient, torch.zeros(S, 2), atol=1e-5)  # z = mean + std * noise


def test_a_gaussian_state_has_a_number_a_variable_and_no_vanishing_deviation(gaussian):
    inputs = torch.randn(3, 7, 256), torch.randn(3, 7, A), torch.zeros(3, 7, dtype=torch.bool)
    feat, post, prior = gaussian.observe(*inputs, gaussian.initial(3))
    assert feat.shape == (3, 7, D + S) and post.shape == prior.shape == (3, 7, S, 2)
    mean, std = gaussian.params(torch.tensor(S * [-7.0, -1e4])).T
    assert mean.tolist() == S * [-7] and std.tolist() == pytest.approx(S * [0.1])


def test_the_dynamics_gradient_is_that_of_the_discounted_lambda_return(monkeypatch):
    """Against finite differences, in a dream that is smooth: Box actions, gaussian z."""
    config = Config(**SMALL | dict(entropy=0.0, return_rate=0.0, critic_rate=0.0))
    rssm, space = gaussian_latents.GaussianRSSM(256, A, config), gym.spaces.Box(-1, 1, (A,))
    torch.manual_seed(0)
    agent, losses = Agent(space, config, rssm=rssm).double(), {}
    for net in (agent.world_model.reward_head.net, agent.critic.net):
        net[-1].weight.data.normal_(0, 0.1)
    agent.world_model.cont_head[-1].weight.data.zero_()  # else the weights of Eq. 3.3 move, too
    agent.actor.net[-1].weight.data.zero_()  # no gradient passes the state that the actor sees
    start, weight = torch.randn(5, D + S).double(), agent.actor.net[-1].bias
    weight.data[A:] = -4.0  # deviations of 0.2, so that no action is clipped
    record = lambda agent, part, loss, _: losses.update({part: loss})  # noqa: E731
    monkeypatch.setattr(dynamics_gradient, "gradient_step", record)

    def actor_loss(_):
        torch.manual_seed(1)
        dynamics_gradient.update_behavior(agent, start)
        return losses["actor"]

    assert torch.autograd.gradcheck(actor_loss, (weight,), eps=1e-5, rtol=1e-3, atol=1e-8)
    assert torch.autograd.grad(actor_loss(weight), weight)[0].abs().min() > 1e-6


@pytest.fixture
def dream():
    torch.manual_seed(0)
    return dream_env.DreamEnv(Agent(gym.spaces.Discrete(2), Config(**SMALL)))


@pytest.mark.filterwarnings("ignore")
def test_the_dream_is_an_environment_like_any_other(dream):
    check_env(dream, skip_render_check=True)


def test_a_dream_follows_its_seed_over_episodes_and_leaves_the_random_state(dream):
    state, films = torch.get_rng_state(), []
    for _ in range(2):
        first = [dream.reset(seed=3)[0], dream.step(1)[0]]
        dream.action_space.sample()
        films.append([*first, dream.reset()[0], dream.step(1)[0]])  # without a seed: goes on
    assert np.array_equal(*films) and not np.array_equal(films[0][0], films[0][2])
    assert torch.equal(torch.get_rng_state(), state)


def test_a_dream_step_is_prior_reward_head_continue_head_and_decoder(dream):
    dream.reset(seed=1)
    model, frame = dream.model, PixelEnv("CartPole-v1").reset(seed=1)[0]
    h = model.rssm.recur(dream.feat, torch.tensor([[0.0, 1.0]]))
    model.cont_head[-1].weight.data.zero_()
    model.cont_head[-1].bias.data.fill_(-20.0)  # the end, for certain
    obs, reward, terminated, truncated, _ = dream.step(1)
    assert torch.allclose(dream.feat[:, :D], h) and terminated and not truncated
    assert reward == model.reward_head(dream.feat).item()
    assert np.array_equal(obs, (model.decoder(dream.feat)[0].detach() * 255).byte().numpy())
    assert np.array_equal(frame, dream.env.row["obs"])  # the real environment has not moved


def test_playing_in_the_dream_needs_a_window(recipe, small_run, monkeypatch):
    monkeypatch.setattr(dream_env.pygame.display, "init", lambda: None)
    monkeypatch.setattr(dream_env.pygame.display, "get_driver", lambda: "offscreen")
    with pytest.raises(SystemExit, match="there is no display"):
        recipe("dream_env", str(small_run))
    monkeypatch.setattr(dream_env.pygame.display, "get_driver", lambda: "x11")
    monkeypatch.setattr(dream_env, "play", lambda env, **options: env.reset(seed=0))
    recipe("dream_env", str(small_run))


def test_pendulums_planner_knows_the_physics_and_plays_with_it(recipe, monkeypatch, capsys):
    env, torque = gym.make("Pendulum-v1"), np.array([-1.3])
    env.reset(seed=5)
    for _ in range(20):  # through fast turns
        *expected, reward = pendulum.simulate(*env.unwrapped.state, torque[0])
        assert sum(env.step(torque)[1] for _ in range(2)) == pytest.approx(reward)
        assert env.unwrapped.state == pytest.approx(np.array(expected))

    monkeypatch.setattr(pendulum, "ANGLES", np.linspace(-np.pi, np.pi, 101))  # a coarser grid
    monkeypatch.setattr(pendulum, "SPEEDS", np.linspace(-8, 8, 81))
    plane = pendulum.ANGLES[:, None] + 10 * pendulum.SPEEDS
    assert pendulum.interpolate(plane, np.array(0.52), np.array(-3.37)) == pytest.approx(-33.18)
    values = pendulum.plan(steps=2)
    assert [x.shape for x in values] == 3 * [(101, 81)]
    best = values[2].argmax(), values[2].max()
    assert best == (50 * 81 + 40, pytest.approx(0, abs=1e-12))  # upright and at rest
    # Hanging still at first: pi^2, then pi - 0.015 at a speed of 0.3, for the torque of 2.
    one = -(np.pi**2) - (np.pi - 0.015) ** 2 - 0.1 * 0.3**2 - 2 * 0.001 * 2**2
    assert values[1][0, 40] == pytest.approx(one)

    recipe("pendulum", "--episodes", "3")
    assert -160 < float(capsys.readouterr().out.split()[-1]) < -100  # random play: -1,192


def test_the_close_up_follows_the_lander():
    pytest.importorskip("Box2D")
    env = PixelEnv("recipes.lander:CloseUp-v0", action_repeat=2)
    env.reset(seed=0)
    frames = np.stack([env.step(0)[0] for _ in range(40)]).astype(int)  # it falls
    lander = (frames[-1, ..., 2] > 150) & (frames[-1, ..., 1] < 150)  # no ground, no sky
    assert all(abs(x.mean() - 32) < 2 for x in lander.nonzero())  # and stays in the middle
    y = env.unwrapped.view[0].start + 2.5 * np.arange(20) + 0.75  # lines of the task's own frame
    sky = 255 * (0.4 * y / 400 + 0.3 * np.sin(y / 12) + 0.3)
    assert y[0] > 1 and np.abs(frames[-1, :20, 0, 1] - sky).max() < 4  # to a fraction of a pixel


def test_deepmind_control_is_square_and_follows_its_seed():
    if not importlib.util.find_spec("dm_control"):  # to import it would choose a renderer
        pytest.skip("needs DeepMind Control")
    env = PixelEnv("recipes.dm_control:cartpole-swingup-v0", action_repeat=8)
    films = [[env.reset(seed=3)[0], env.step(np.ones(1))[0]] for _ in range(2)]
    assert np.array_equal(*films) and env.env.render().shape == (128, 128, 3)
    env.close()
