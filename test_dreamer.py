"""Tests of dreamer.py. Every name is a claim; most expected numbers are known in closed form."""

import __future__

import concurrent.futures
import contextlib
import itertools
import json
import os
import re
import resource
import signal
import subprocess
import sys
import time
import types
from pathlib import Path

import gymnasium as gym
import numpy as np
import pygame
import pytest
import torch
from gymnasium.utils.env_checker import check_env
from PIL import Image
from torch.distributions import Categorical, Independent, Normal, OneHotCategorical
from torch.distributions import kl_divergence as torch_kl

import dreamer
from dreamer import (
    Agent,
    Config,
    DreamerError,
    PixelEnv,
    ReplayBuffer,
    episode_seed,
    evaluate,
    imagine,
    kl_divergence,
    lambda_return,
    load_agent,
    play,
    return_scale,
    symexp,
    symlog,
    train,
    twohot_decode,
    twohot_encode,
    update_behavior,
    update_world_model,
)

HERE = Path(__file__).resolve().parent
torch.set_num_threads(1)  # networks this small only wait for a second thread
os.environ["OMP_NUM_THREADS"] = "1"  # the same for child processes
SMALL = dict(  # a config whose every part is small
    depth=2, hidden=16, groups=4, classes=4, units=16, batch_size=4, batch_length=6, horizon=5,
    prefill=60, pretrain=5, train_ratio=16.0, capacity=500,
    log_every=50, eval_every=100, eval_episodes=1, held_out=160, lr_decay=0.0,
)
A, D, Z, S, K = 2, 16, 16, 4, 4  # sizes under SMALL
BINS = dreamer.TwoHotHead(1, 1, 1).bins


class Corridor(gym.Env):
    """Six cells; action 1 moves right, 0 left; every step in the last cell pays 1.

    The frame shows the cell as a bright column. The time limit of 16 steps leaves 12 to be had.
    """

    metadata = {"render_modes": ["rgb_array"], "render_fps": 10}
    observation_space = gym.spaces.Box(0, 5, (1,))
    action_space = gym.spaces.Discrete(2)

    def __init__(self, render_mode=None):
        self.render_mode = render_mode

    def reset(self, *, seed=None, options=None):
        super().reset(seed=seed)
        self.cell = 0
        return np.array([0], np.float32), {}

    def step(self, action):
        self.cell = int(np.clip(self.cell + (1 if action == 1 else -1), 0, 5))
        return np.array([self.cell], np.float32), float(self.cell == 5), False, False, {}

    def render(self):
        frame = np.full((96, 96, 3), 30, np.uint8)
        frame[:, 16 * self.cell : 16 * (self.cell + 1)] = 220
        return frame


class Counting(gym.Env):
    """Frame t is filled with 10 t, reward t is t; the episode ends after `length` steps."""

    metadata = {"render_modes": ["rgb_array"], "render_fps": 10}
    observation_space = gym.spaces.Box(0, 255, (1,))
    action_space = gym.spaces.Discrete(3, start=5)

    def __init__(self, render_mode=None, length=4, ends_by="terminated"):
        self.render_mode, self.length, self.ends_by = render_mode, length, ends_by

    def reset(self, *, seed=None, options=None):
        super().reset(seed=seed)
        self.t = 0
        return np.zeros(1, np.float32), {}

    def step(self, action):
        self.t += 1
        end = self.ends_by if self.t == self.length else None
        flags = end == "terminated", end == "truncated"
        return np.zeros(1, np.float32), float(self.t), *flags, {}

    def render(self):
        return np.full((80, 120, 3), 10 * self.t, np.uint8)


class Blind(Counting):
    def render(self):
        return "only text"


class Broken(Counting):
    def reset(self, *, seed=None, options=None):
        raise RuntimeError("no display,\n    no luck")


class Buttons(Counting):
    action_space = gym.spaces.MultiDiscrete([2, 2])


gym.register("Corridor-v0", Corridor, max_episode_steps=16)
gym.register("Counting-v0", Counting)
gym.register("Truncated-v0", Counting, kwargs={"ends_by": "truncated"})
gym.register("Blind-v0", Blind)
gym.register("Broken-v0", Broken)
gym.register("Buttons-v0", Buttons)


@pytest.fixture
def agent():
    torch.manual_seed(0)
    return Agent(gym.spaces.Discrete(A), Config(**SMALL))


def random_batch(B=4, T=6):
    g = torch.Generator().manual_seed(0)
    action = torch.nn.functional.one_hot(torch.randint(A, (B, T), generator=g), A).float()
    return {
        "obs": torch.randint(256, (B, T, 64, 64, 3), generator=g).to(torch.uint8),
        "prev_action": action, "reward": torch.randn(B, T, generator=g),
        "terminated": torch.zeros(B, T, dtype=torch.bool),
        "is_first": torch.zeros(B, T, dtype=torch.bool),
    }


def snapshot(module):
    return {name: p.detach().clone() for name, p in module.named_parameters()}


def changed(module, before):
    return {name for name, p in module.named_parameters() if not torch.equal(p, before[name])}


# Section 1.2: small tools
def test_symexp_inverts_symlog():
    x = torch.tensor([-1e4, -1.0, -1e-3, 0.0, 0.5, 3.0, 1e4], dtype=torch.float64)
    assert torch.allclose(symexp(symlog(x)), x)
    assert symlog(torch.tensor(np.e - 1)).item() == pytest.approx(1.0)


def test_twohot_round_trips_from_minus_1e5_to_1e5():
    bins = BINS
    x = torch.cat([-torch.logspace(5, -3, 200), torch.zeros(1), torch.logspace(-3, 5, 200)])
    target = twohot_encode(x, bins)
    assert target.shape == (401, 255)
    assert torch.allclose(target.sum(-1), torch.ones(401))
    assert ((target > 0).sum(-1) <= 2).all()
    mean = (target.double() * bins.double()).sum(-1).float()
    assert torch.allclose(mean, x, rtol=1e-4, atol=1e-6)
    assert torch.allclose(twohot_decode(torch.log(target), bins), x, rtol=1e-3, atol=1e-5)


def test_twohot_clamps_what_lies_outside_the_bins():
    bins = torch.tensor([-1.0, 0.0, 1.0])
    assert twohot_encode(torch.tensor([-7.0, 9.0]), bins).tolist() == [[1, 0, 0], [0, 0, 1]]


def test_zero_logits_decode_to_exactly_zero():
    assert twohot_decode(torch.zeros(3, 255), BINS).tolist() == [0.0, 0.0, 0.0]


# Section 1.3: pixel wrapper
@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("env_id", ["CartPole-v1", "Pendulum-v1"])
def test_pixel_env_passes_gymnasiums_checker(env_id):
    env = PixelEnv(env_id)
    check_env(env)
    obs, _ = env.reset(seed=3)
    assert obs.shape == (64, 64, 3) and obs.dtype == np.uint8


def test_pixels_are_averages_over_areas():
    env = PixelEnv("CartPole-v1")
    obs, _ = env.reset(seed=0)
    frame = env.render().astype(float)  # [400, 600, 3]
    wide = frame.repeat(4, 0).repeat(8, 1)  # 1600 = 64 * 25 rows, 4800 = 64 * 75 columns
    mean = wide.reshape(64, 25, 64, 75, 3).mean((1, 3))
    assert np.abs(obs - mean).max() < 4  # of 255: smoothscale rounds down
    assert len(np.unique(obs)) > 20  # no nearest neighbour: the pole has intermediate shades


def test_box_actions_are_rescaled_from_minus_one_to_one():
    env = PixelEnv("Pendulum-v1")  # torque in [-2, 2]
    for action, torque in [(1.0, 2.0), (-0.5, -1.0), (7.0, 2.0)]:
        env.reset(seed=0)
        env.step(np.array([action], np.float32))
        assert env.env.unwrapped.last_u == pytest.approx(torque)


def test_rewards_of_repeated_actions_are_summed():
    env = PixelEnv("Counting-v0", action_repeat=3)
    env.reset()
    _, reward, terminated, _, _ = env.step(5)
    assert reward == 1 + 2 + 3 and not terminated
    _, reward, terminated, _, _ = env.step(5)
    assert reward == 4 and terminated  # it stops where the episode ends


def test_an_id_may_name_the_module_to_import(tmp_path, monkeypatch):
    source = "import gymnasium as gym\ngym.register('Late-v0', 'test_dreamer:Counting')\n"
    (tmp_path / "late_module.py").write_text(source)
    monkeypatch.syspath_prepend(tmp_path)
    obs, _ = PixelEnv("late_module:Late-v0").reset(seed=0)
    assert obs.shape == (64, 64, 3)
    folder = train(Config(**SMALL, env="late_module:Late-v0", steps=2, runs=str(tmp_path)))
    assert folder.name == "late_module-Late-v0-0"  # Windows allows no colon


class Endless(Counting):
    """Never ends by itself."""

    def __init__(self, render_mode=None):
        super().__init__(render_mode, length=10**9)

    def render(self):
        return np.full((64, 64, 3), self.t % 250, np.uint8)


gym.register("Endless-v0", Endless)


def test_an_episode_without_an_end_is_cut():
    *_, (row, is_last) = play(PixelEnv("Endless-v0"), lambda obs, state: (5, None), seed=0)
    assert row["reward"] == 1_000 and is_last and not row["terminated"]


def test_training_and_evaluation_never_share_an_episode():
    seeds = [episode_seed(s, n, e) for s in range(3) for n in range(500) for e in (False, True)]
    assert len(set(seeds)) == len(seeds)


# Section 1.4 and 1.5: CNN, RSSM
def test_encoder_and_decoder_keep_leading_axes(agent):
    model = agent.world_model
    assert model.encoder(torch.zeros(2, 3, 64, 64, 3, dtype=torch.uint8)).shape == (2, 3, 256)
    frames = model.decoder(torch.zeros(2, 3, D + Z))
    assert frames.shape == (2, 3, 64, 64, 3) and 0 <= frames.min() and frames.max() <= 1


def test_kl_is_the_sum_of_categorical_kls():
    p, q = torch.randn(2, 5, S, K).log_softmax(-1)
    expected = torch_kl(Categorical(logits=p), Categorical(logits=q)).sum(-1)
    assert torch.allclose(kl_divergence(p, q), expected, atol=1e-6)


def test_no_class_is_less_likely_than_its_share_of_unimix(agent):
    logits = torch.full((Z,), -1e4).index_fill(0, torch.tensor([0, 4, 8, 12]), 1e4)
    probs = agent.world_model.rssm.log_probs(logits).exp()
    assert probs.min().item() == pytest.approx(0.01 / K)
    assert probs.max().item() == pytest.approx(0.99 + 0.01 / K)


def test_samples_are_one_hot_and_gradients_go_straight_through(agent):
    log_probs = torch.randn(7, S, K).log_softmax(-1).requires_grad_()
    weight = torch.randn(7, Z)
    z = agent.world_model.rssm.sample(log_probs)
    hot = z.detach().unflatten(-1, (S, K))
    assert torch.allclose(hot.max(-1).values, torch.ones(7, S), atol=1e-6)
    assert torch.allclose(hot.sum(-1), torch.ones(7, S), atol=1e-6)
    (gradient,) = torch.autograd.grad((z * weight).sum(), log_probs)
    (expected,) = torch.autograd.grad((log_probs.exp().flatten(-2) * weight).sum(), log_probs)
    assert torch.allclose(gradient, expected)


def test_samples_follow_the_probabilities(agent):
    probs = torch.tensor([0.1, 0.2, 0.3, 0.4])
    z = agent.world_model.rssm.sample(probs.log().expand(20_000, S, K)).unflatten(-1, (S, K))
    assert torch.allclose(z.mean((0, 1)), probs, atol=0.01)


def test_acting_and_observe_reach_the_same_h_on_the_same_history(agent):
    frames = random_batch(1, 6)["obs"]
    torch.manual_seed(7)
    state, acted, actions = None, [], [torch.zeros(A)]
    for t in range(6):
        action, state = agent.act(frames[0, t].numpy(), state)
        acted.append(state[0][0])
        actions.append(torch.eye(A)[action])
    torch.manual_seed(7)
    first = torch.tensor([[True] + 5 * [False]])
    embed = agent.world_model.encoder(frames)
    h, z, *_ = agent.world_model.rssm.observe(embed, torch.stack(actions[:6])[None], first)
    assert torch.allclose(torch.stack(acted), h[0], atol=1e-5)
    assert torch.allclose(state[1], z[:, -1], atol=1e-5)


def sequence(agent, first=()):
    """Random inputs that want gradients, and what the RSSM makes of them."""
    embed = torch.randn(3, 8, 256, requires_grad=True)
    action = torch.randn(3, 8, A, requires_grad=True)
    is_first = torch.zeros(3, 8, dtype=torch.bool)
    is_first[:, list(first)] = True
    return embed, action, agent.world_model.rssm.observe(embed, action, is_first)


def test_is_first_erases_all_history(agent):
    embed, action, (h, z, post, prior) = sequence(agent, first=[5])
    later = sum((x[:, 5:] * torch.randn_like(x[:, 5:])).sum() for x in (h, z, post, prior))
    by_embed, by_action = torch.autograd.grad(later, [embed, action])
    assert (by_embed[:, :5] == 0).all() and (by_action[:, :6] == 0).all()
    assert (by_embed[:, 5:] != 0).any() and (by_action[:, 6:] != 0).any()
    torch.testing.assert_close(h[:, 5], h[:, 5][:1].expand(3, -1))  # the same for every history
    _, _, (unbroken, *_) = sequence(agent)
    assert not torch.allclose(unbroken[0, 5], unbroken[1, 5])


def test_a_future_frame_cannot_change_a_past_state(agent):
    embed, action, (h, z, post, prior) = sequence(agent, first=[0])
    early = sum((x[:, :5] * torch.randn_like(x[:, :5])).sum() for x in (h, z, post, prior))
    by_embed, by_action = torch.autograd.grad(early, [embed, action], retain_graph=True)
    assert (by_embed[:, 5:] == 0).all() and (by_action[:, 5:] == 0).all()
    assert (by_action[:, 4] != 0).any()  # row 4's action led to row 4
    # The frame of row 4 enters the posterior of row 4, but h and the prior only from row 5 on.
    (by_embed,) = torch.autograd.grad((h[:, 4] * torch.randn(3, D)).sum(), embed, retain_graph=True)
    assert (by_embed[:, 4] == 0).all() and (by_embed[:, 3] != 0).any()
    (by_embed,) = torch.autograd.grad((post[:, 4] * torch.randn(3, S, K)).sum(), embed)
    assert (by_embed[:, 4] != 0).any()


# Section 1.7 and 1.8: actor, replay
def test_box_actor_is_a_bounded_normal():
    actor = dreamer.Actor(4, gym.spaces.Box(-1, 1, (3,)), 8)
    actor.net[-1].weight.data.normal_(0, 100)
    policy = actor(torch.randn(50, 4))
    assert policy.mean.abs().max() <= 1
    assert 0.1 <= policy.stddev.min() and policy.stddev.max() <= 1
    action = policy.sample()
    expected = Independent(Normal(policy.mean, policy.stddev), 1).log_prob(action)
    assert policy.log_prob(action).shape == (50,)
    assert torch.allclose(policy.log_prob(action), expected)


def filled_replay(count, capacity):
    replay = ReplayBuffer(capacity, 1)
    frame = np.zeros((64, 64, 3), np.uint8)
    for i in range(count):
        replay.add(dict(obs=frame, prev_action=[0.0], reward=i, terminated=False, is_first=False))
    return replay


@pytest.mark.parametrize("count", [20, 50, 73, 100, 149])
def test_replay_never_mixes_across_the_write_position(count):
    replay = filled_replay(count, capacity=50)
    torch.manual_seed(0)
    reward = replay.sample(1000, 8, "cpu")["reward"]
    assert (reward.diff(dim=1) == 1).all()
    starts = set(reward[:, 0].int().tolist())
    assert starts == set(range(max(0, count - 50), count - 7))  # every window, and no other


def test_replay_samples_starts_uniformly():
    torch.manual_seed(0)
    reward = filled_replay(73, capacity=50).sample(4_300, 8, "cpu")["reward"]
    counts = torch.bincount(reward[:, 0].int() - 23)
    assert len(counts) == 43 and (counts - 100).abs().max() < 50  # five sigma


def test_replay_memory_is_bounded_and_frames_stay_uint8():
    replay = filled_replay(200, capacity=50)
    assert replay.count == 200 and replay.rows["obs"].dtype == np.uint8
    assert all(len(rows) == 50 for rows in replay.rows.values())


# Section 2: world model update
def test_dyn_trains_the_prior_alone_and_rep_the_posterior_alone():
    cases = [("dyn", "prior_net", "post_net"), ("rep", "post_net", "prior_net")]
    for name, trained, still in cases:
        scales = {f"scale_{x}": float(x == name) for x in ("recon", "reward", "cont", "dyn", "rep")}
        model = Agent(gym.spaces.Discrete(A), Config(**SMALL | scales, free_nats=0.0)).world_model
        model.loss(random_batch(T=1))[0].backward()  # one step: no path through earlier samples
        rssm = model.rssm
        assert all(p.grad.abs().sum() > 0 for p in getattr(rssm, trained)[-1].parameters())
        assert all(p.grad is None or (p.grad == 0).all() for p in getattr(rssm, still).parameters())


def test_free_nats_are_per_step_after_the_sum_over_groups():
    batch = random_batch()
    model = Agent(gym.spaces.Discrete(A), Config(**SMALL)).world_model
    with torch.no_grad():
        torch.manual_seed(3)
        embed = model.encoder(batch["obs"])
        *_, post, prior = model.rssm.observe(embed, batch["prev_action"], batch["is_first"])
        kl = torch_kl(Categorical(logits=post), Categorical(logits=prior)).sum(-1)
        model.config.free_nats = free = kl.median().item()  # half of the steps lie below
        torch.manual_seed(3)
        *_, metrics = model.loss(batch)
    expected = torch.where(kl > free, kl, free).mean()
    assert metrics["wm/dyn"].item() == pytest.approx(expected.item(), rel=1e-5)
    assert metrics["wm/rep"].item() == pytest.approx(expected.item(), rel=1e-5)
    assert metrics["wm/kl"].item() == pytest.approx(kl.mean().item(), rel=1e-5)
    assert abs(expected - kl.mean().clamp(min=free)) > 1e-3  # the mean would give another number


def test_kl_below_the_free_nats_has_no_gradient():
    scales = {f"scale_{x}": 0.0 for x in ("recon", "reward", "cont")}
    model = Agent(gym.spaces.Discrete(A), Config(**SMALL | scales, free_nats=100.0)).world_model
    loss, *_ = model.loss(random_batch())
    loss.backward()
    assert loss.item() == pytest.approx(1.0 * 100 + 0.1 * 100)
    assert all(p.grad is None or (p.grad == 0).all() for p in model.parameters())


def test_reconstruction_is_summed_over_pixels_and_averaged_over_steps(agent):
    batch = random_batch()
    torch.manual_seed(1)
    _, h, z, metrics = agent.world_model.loss(batch)
    frames = agent.world_model.decoder(torch.cat([h, z], -1))
    expected = ((frames - batch["obs"] / 255) ** 2).sum() / (4 * 6)
    assert metrics["wm/recon"].item() == pytest.approx(expected.item(), rel=1e-5)


def test_loss_is_the_weighted_sum_of_its_terms(agent):
    loss, _, _, m = agent.world_model.loss(random_batch())
    weights = {"recon": 1, "reward": 1, "cont": 1, "dyn": 1, "rep": 0.1}
    expected = sum(weight * m[f"wm/{name}"].item() for name, weight in weights.items())
    assert loss.item() == pytest.approx(expected, rel=1e-5)


# Section 3: behavior learning
def brute_force_return(reward, value, cont, gamma, lam):
    """The lambda-weighted mean of all n-step returns, each summed term by term."""
    H, returns = len(value) - 1, []
    for t in range(H):
        n_step = []
        for n in range(1, H - t + 1):
            alive, total = 1.0, 0.0
            for k in range(t + 1, t + n + 1):
                total += alive * reward[k]
                alive *= gamma * cont[k]
            n_step.append(total + alive * value[t + n])
        mixed = sum((1 - lam) * lam**i * x for i, x in enumerate(n_step[:-1]))
        returns.append(mixed + lam ** (H - t - 1) * n_step[-1])
    return returns


@pytest.mark.parametrize("lam", [0.0, 0.5, 0.95, 1.0])
def test_lambda_return_equals_the_brute_force_sum(lam):
    torch.manual_seed(0)
    reward, value = torch.randn(2, 8, 3, dtype=torch.float64)
    cont = torch.rand(8, 3, dtype=torch.float64)
    cont[4, 1] = 0.0  # a terminal state inside
    returns = lambda_return(reward, value, cont, 0.9, lam)
    assert returns.shape == (7, 3)
    for i in range(3):
        expected = brute_force_return(*(x[:, i].tolist() for x in (reward, value, cont)), 0.9, lam)
        assert returns[:, i].tolist() == pytest.approx(expected)


def test_lambda_zero_is_one_step_and_lambda_one_is_the_discounted_sum():
    reward, value, cont = torch.tensor([[9.0, 1, 2, 4], [9, 10, 20, 30], [0, 1, 1, 1]])
    one_step = lambda_return(reward, value, cont, 0.5, 0.0)
    assert one_step.tolist() == [1 + 5, 2 + 10, 4 + 15]
    all_steps = lambda_return(reward, value, cont, 0.5, 1.0)
    assert all_steps.tolist() == [1 + (2 + 19 / 2) / 2, 2 + (4 + 15) / 2, 4 + 15]


def test_nothing_after_a_terminal_state_counts():
    reward, value, cont = torch.rand(3, 6)
    cont[2] = 0.0
    before = lambda_return(reward, value, cont, 0.9, 0.95)[:2].clone()
    value[2:], reward[3:] = 1e6, 1e6
    assert torch.equal(lambda_return(reward, value, cont, 0.9, 0.95)[:2], before)


def test_imagination_follows_prior_and_actor(agent):
    model, D = agent.world_model, 16
    h, z = torch.randn(5, D), torch.randn(5, Z)
    with torch.no_grad():
        feat, action = imagine(model, agent.actor, h, z, 4)
        assert feat.shape == (5, 5, D + Z) and action.shape == (4, 5, A)
        assert torch.equal(feat[0], torch.cat([h, z], -1))  # the start comes first
        for t in range(4):  # action t leads from state t to state t + 1
            expected = model.rssm.recur(feat[t, :, :D], feat[t, :, D:], action[t])
            assert torch.allclose(feat[t + 1, :, :D], expected, atol=1e-6)
    assert set(action.unique().tolist()) == {0.0, 1.0} and (action.sum(-1) == 1).all()


def test_imagination_takes_no_environment_step(agent, monkeypatch):
    def forbidden(*args, **kwargs):
        raise AssertionError("the dream asked the environment")

    for name in ("reset", "step", "render"):
        monkeypatch.setattr(PixelEnv, name, forbidden)
        monkeypatch.setattr(gym.Wrapper, name, forbidden)
    metrics = update_behavior(agent, torch.randn(6, D), torch.randn(6, Z))
    assert np.isfinite([float(x) for x in metrics.values()]).all()


def test_the_behavior_losses_are_those_of_the_equations(agent, monkeypatch):
    """Eq. 3.2 to 3.6, a state at a time, on a dream that is given."""
    H, N, gamma, lam = 5, 4, agent.config.gamma, agent.config.lam
    agent.config.entropy = 0.3
    agent.actor.net[-1].weight.data.normal_()
    agent.critic.net[-1].weight.data.normal_(0, 0.1)
    agent.slow_critic.net[-1].weight.data.normal_(0, 0.1)
    agent.world_model.reward_head.net[-1].weight.data.normal_(0, 0.1)
    feat = torch.randn(H + 1, N, D + Z)
    action = torch.nn.functional.one_hot(torch.randint(A, (H, N)), A).float()
    losses = {}
    monkeypatch.setattr(dreamer, "imagine", lambda *args: (feat, action))
    monkeypatch.setattr(dreamer, "gradient_step", lambda loss, name, agent, metrics:
                        losses.update({name: loss.item()}))
    with torch.no_grad():
        reward, cont = (x.tolist() for x in agent.world_model.predict(feat))
        value, slow = agent.critic(feat).tolist(), agent.slow_critic(feat[:-1])
        policy = OneHotCategorical(logits=agent.actor.net(feat[:-1]))
        log_pi, entropy = policy.log_prob(action).tolist(), policy.entropy().tolist()
        columns = [[[x[t][n] for t in range(H + 1)] for x in (reward, value, cont)]
                   for n in range(N)]
        returns = np.transpose([brute_force_return(*x, gamma, lam) for x in columns])
        scale = max(1.0, 0.01 * (np.quantile(returns, 0.95) - np.quantile(returns, 0.05)))
        log_probs = agent.critic.net(feat[:-1]).log_softmax(-1)
        targets = torch.stack([torch.tensor(returns.copy()).float(), slow])
        fits = (twohot_encode(targets, BINS).sum(0) * log_probs).sum(-1).tolist()
        actor_loss = critic_loss = 0.0
        for n in range(N):
            weight = 1.0
            for t in range(H):
                weight *= cont[0][n] if t == 0 else gamma * cont[t][n]
                advantage = (returns[t][n] - value[t][n]) / scale
                actor_loss -= weight * (advantage * log_pi[t][n] + 0.3 * entropy[t][n]) / (H * N)
                critic_loss -= weight * fits[t][n] / (H * N)
    metrics = update_behavior(agent, torch.zeros(N, D), torch.zeros(N, Z))
    assert losses == {"actor": pytest.approx(actor_loss, rel=1e-4),
                      "critic": pytest.approx(critic_loss, rel=1e-4)}
    assert metrics["ac/actor"].item() == losses["actor"]
    assert metrics["ac/critic"].item() == losses["critic"]
    assert metrics["ac/entropy"].item() == pytest.approx(np.mean(entropy), rel=1e-5)
    assert metrics["ac/return"].item() == pytest.approx(np.mean(returns), rel=1e-4)


def test_return_scale_is_a_running_percentile_range_of_at_least_one():
    running, returns = torch.zeros(2), torch.linspace(0, 1000, 10_001)
    assert return_scale(running, returns, 0.01).item() == pytest.approx(9.5 - 0.5, rel=1e-4)
    assert running.tolist() == pytest.approx([0.5, 9.5], rel=1e-3)
    for _ in range(2000):
        scale = return_scale(running, returns, 0.01)
    assert scale.item() == pytest.approx(900, rel=1e-3)
    assert return_scale(torch.zeros(2), torch.rand(100), 1.0).item() == 1.0


def test_gradient_table(agent, monkeypatch):
    """World model loss: world model. Actor loss: actor. Critic loss: critic. And nothing else."""
    model, others = agent.world_model, [agent.actor, agent.critic, agent.slow_critic]
    agent.actor.net[-1].weight.data.normal_()  # at zero or nearly so, gradients stop short
    agent.critic.net[-1].weight.data.normal_(0, 0.1)
    model.reward_head.net[-1].weight.data.normal_(0, 0.1)

    def touched(module):
        gradients = {name: p.grad for name, p in module.named_parameters()}
        return {n for n, g in gradients.items() if g is not None and (g != 0).any()}, set(gradients)

    loss, h, z, _ = model.loss(random_batch())
    loss.backward()
    reached, every = touched(model)
    assert reached == every
    assert all(not touched(other)[0] for other in others)

    def backward_only(loss, name, agent, metrics):
        agent.zero_grad()
        loss.backward(retain_graph=True)
        for part in ("world_model", "actor", "critic", "slow_critic"):
            reached, every = touched(getattr(agent, part))
            assert reached == (every if part == name else set()), (name, part)
        seen.append(name)

    seen = []
    monkeypatch.setattr(dreamer, "gradient_step", backward_only)
    monkeypatch.setattr(torch, "no_grad", contextlib.nullcontext)  # sg alone has to cut
    update_behavior(agent, h.flatten(0, 1), z.flatten(0, 1))
    assert seen == ["actor", "critic"]


def test_each_update_moves_its_own_part_and_the_slow_critic_follows(agent):
    slow = snapshot(agent.slow_critic)
    before = {name: snapshot(getattr(agent, name)) for name in ("world_model", "actor", "critic")}
    h, z, _ = update_world_model(agent, random_batch())
    assert h.shape == (24, D) and z.shape == (24, Z) and not h.requires_grad
    assert changed(agent.world_model, before["world_model"])
    assert not changed(agent.actor, before["actor"]) and not changed(agent.critic, before["critic"])
    before["world_model"] = snapshot(agent.world_model)
    update_behavior(agent, h, z)
    assert not changed(agent.world_model, before["world_model"])
    assert changed(agent.actor, before["actor"]) and changed(agent.critic, before["critic"])
    for name, p in agent.slow_critic.named_parameters():
        fast = dict(agent.critic.named_parameters())[name]
        assert torch.allclose(p, 0.98 * slow[name] + 0.02 * fast, atol=1e-7)


# Section 4: training loop
def test_rows_hold_the_action_that_led_to_their_frame():
    env = PixelEnv("Counting-v0")
    chosen = iter([5, 7, 6, 5])
    rows, is_last = zip(*play(env, lambda obs, state: (next(chosen), None), seed=0), strict=True)
    assert is_last == (False, False, False, False, True)
    assert [round(row["obs"].mean() / 10) for row in rows] == [0, 1, 2, 3, 4]
    assert [row["reward"] for row in rows] == [0, 1, 2, 3, 4]
    assert [row["prev_action"].tolist() for row in rows] == [
        [0, 0, 0], [1, 0, 0], [0, 0, 1], [0, 1, 0], [1, 0, 0]]
    assert [row["is_first"] for row in rows] == [True, False, False, False, False]
    assert [row["terminated"] for row in rows] == [False, False, False, False, True]


def test_the_policy_sees_each_frame_once_and_gets_its_state_back():
    seen = []

    def act(obs, state):
        seen.append((round(obs.mean() / 10), state))
        return 5, (state or 0) + 1

    list(play(PixelEnv("Counting-v0"), act, seed=0))
    assert seen == [(0, None), (1, 1), (2, 2), (3, 3)]


@pytest.mark.parametrize("env_id, ends", [("Counting-v0", True), ("Truncated-v0", False)])
def test_truncation_keeps_continue_at_one(agent, env_id, ends):
    replay = ReplayBuffer(100, 3)
    for row, _ in play(PixelEnv(env_id), lambda obs, state: (5, None), seed=0):
        replay.add(row)
    batch = {name: torch.from_numpy(rows[None, :5]) for name, rows in replay.rows.items()}
    batch["prev_action"] = batch["prev_action"][..., :A]
    head = agent.world_model.cont_head[-1]
    head.weight.data.zero_()
    head.bias.data.fill_(5.0)  # it says: the episode goes on, with probability sigmoid(5)
    *_, metrics = agent.world_model.loss(batch)
    goes_on, stops = np.log1p(np.exp(-5)), np.log1p(np.exp(5))
    expected = (4 * goes_on + (stops if ends else goes_on)) / 5
    assert metrics["wm/cont"].item() == pytest.approx(expected, rel=1e-5)


def lines_of(folder):
    lines = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    return [{k: v for k, v in line.items() if not k.startswith("time/")} for line in lines]


def test_same_seed_same_metrics_and_checkpoint_round_trip(tmp_path):
    config = dict(SMALL, steps=130, eval_every=1_000)
    runs = [train(Config(**config, seed=s, runs=str(tmp_path / d))) for s, d in
            [(3, "a"), (3, "b"), (4, "c")]]
    first, again, other = map(lines_of, runs)
    assert [line["env/step"] for line in first] == [50, 100, 130]
    assert first == again and first != other
    one, two = load_agent(runs[0]), load_agent(runs[1] / "checkpoint.pt.gz")
    for (name, a), b in zip(one.state_dict().items(), two.state_dict().values(), strict=True):
        assert torch.equal(a, b), name
    assert evaluate(one, 1, seed=3)["eval/return"] == first[-1]["eval/return"]


def test_evaluation_is_a_function_of_its_seed_and_leaves_the_random_state(tmp_path):
    agent = Agent(gym.spaces.Discrete(2), Config(**SMALL))
    torch.manual_seed(1)
    state = torch.get_rng_state()
    assert evaluate(agent, 2, seed=5) == evaluate(agent, 2, seed=5)
    assert torch.equal(torch.get_rng_state(), state)


def test_an_evaluation_of_no_episodes_is_refused(agent):
    with pytest.raises(DreamerError, match="at least 1, not 0"):
        evaluate(agent, 0)


def test_continuous_actions_train_too(tmp_path):
    config = dict(SMALL, env="Pendulum-v1", action_repeat=2, steps=120, eval_every=1_000)
    agent = load_agent(train(Config(**config, runs=str(tmp_path))))
    env = PixelEnv("Pendulum-v1")
    action, _ = agent.act(env.reset(seed=0)[0])
    assert env.action_space.contains(action)


def flags(options):
    return [x for k, v in options.items() for x in (f"--{k.replace('_', '-')}", str(v))]


def test_a_run_from_the_command_line_leaves_every_file_and_explained_metrics(tmp_path):
    command = [sys.executable, str(HERE / "dreamer.py"), "--device", "cpu", "--steps", "200"]
    run = subprocess.run(command + flags(SMALL), cwd=tmp_path, capture_output=True, text=True)
    assert run.returncode == 0, run.stderr
    folder = tmp_path / "runs" / "CartPole-v1-0"
    files = {"config.json", "metrics.jsonl", "curves.png", "dream.gif", "latents.png",
             "checkpoint.pt.gz", "checkpoint-before.pt.gz", "in-use.lock"}
    assert {path.name for path in folder.iterdir()} == files
    assert (folder / "curves.png").read_bytes()[:4] == b"\x89PNG"
    assert json.loads((folder / "config.json").read_text())["steps"] == 200
    lines = (folder / "metrics.jsonl").read_text().splitlines()
    keys = {key for line in lines for key in json.loads(line)}
    assert {k.split("/")[0] for k in keys} == {"env", "wm", "ac", "eval", "time"}
    readme = (HERE / "README.md").read_text(encoding="utf-8")
    assert not [key for key in keys if f"`{re.sub('_[0-9]+$', '_k', key)}`" not in readme]
    again = subprocess.run(
        command[:2] + ["--eval", str(folder), "--episodes", "2"], capture_output=True, text=True)
    assert re.search(r"eval/return +[\d.]+\neval/return_std +[\d.]+\n", again.stdout), again.stderr


BAD_INPUT = [
    (["--stepz", "3"], "unrecognized arguments: --stepz"),
    (["--steps", "many"], "invalid int value: 'many'"),
    (["--steps", "0"], "steps has to be between 1"),
    (["--gamma", "1.5"], "gamma has to be between 0 and 1"),
    (["--gamma", "0"], "gamma exceed 0"),
    (["--lr", "nan"], "lr has to be"),
    (["--batch-length", "64", "--prefill", "10"], "prefill and capacity must reach batch_length"),
    (["--env", "CartPol-v1"], "Did you mean: `CartPole`?"),
    (["--env", "no_such_module:Thing-v0"], "No module named 'no_such_module'"),
    (["--env", "Blind-v0"], "cannot render"),
    (["--env", "Broken-v0"], "--env Broken-v0: no display, no luck"),
    (["--env", "Buttons-v0"], "neither Discrete nor a bounded Box"),
    (["--device", "tpu"], "no device tpu"),
    (["--eval", "nowhere"], "nowhere is no checkpoint"),
    (["--eval", ""], "no checkpoint"),
    (["--resume", ""], "no checkpoint"),
    (["--eval", "broken.pt"], "broken.pt is no checkpoint"),
    (["--eval", "foreign.pt"], "foreign.pt is no checkpoint"),
    (["--runs", "occupied"], "exists: --resume it, or choose another seed or runs"),
    (["--runs", "broken.pt"], "broken.pt"),
]


@pytest.mark.parametrize("argv, message", BAD_INPUT, ids=[" ".join(argv) for argv, _ in BAD_INPUT])
@pytest.mark.filterwarnings("ignore")
def test_bad_input_ends_in_one_clear_line(argv, message, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    Path("broken.pt").write_bytes(b"PK\x03\x04 not really")
    torch.save({"weights": torch.zeros(3)}, "foreign.pt")
    Path("occupied/CartPole-v1-0").mkdir(parents=True)
    Path("occupied/CartPole-v1-0/metrics.jsonl").touch()
    before = sorted(tmp_path.rglob("*"))
    try:
        code = dreamer.main(argv)
    except SystemExit as stop:
        code = stop.code
    error = capsys.readouterr().err.strip()
    assert code == 2 and message in error
    assert error.startswith("dreamer.py: error: ") and "\n" not in error
    assert sorted(tmp_path.rglob("*")) == before  # nothing written, nothing overwritten


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a CUDA device")
def test_cuda_where_there_is_none_is_refused(tmp_path, capsys):
    assert dreamer.main(["--device", "cuda", "--runs", str(tmp_path / "r")]) == 2
    assert "no device cuda" in capsys.readouterr().err


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
def test_a_cuda_run_trains_and_its_checkpoint_loads_on_the_cpu(tmp_path):
    folder = train(Config(**SMALL, steps=120, runs=str(tmp_path), device="cuda"))
    assert load_agent(folder, "cpu").act(np.zeros((64, 64, 3), np.uint8))[0] in (0, 1)


def test_ctrl_c_ends_in_one_line_and_130(tmp_path, monkeypatch, capsys):
    def interrupt(config, resume):
        raise KeyboardInterrupt

    monkeypatch.setattr(dreamer, "train", interrupt)
    assert dreamer.main(["--runs", str(tmp_path)]) == 130
    assert capsys.readouterr().err.strip().startswith("dreamer.py: stopped")


def test_help_explains_every_option(capsys):
    with pytest.raises(SystemExit) as stop:
        dreamer.main(["--help"])
    text = capsys.readouterr().out
    assert stop.value.code == 0
    for name in vars(Config()):
        default = getattr(Config, name)
        option, default = name.replace("_", "-"), re.escape(str(default))
        assert re.search(rf"--{option} [A-Z]+\s+\w[^(]+\({default}\)", text), name


@pytest.mark.skipif(os.name != "posix", reason="POSIX signals")
def test_a_process_that_has_rendered_obeys_kill(tmp_path):
    code = ("import time, dreamer; dreamer.PixelEnv('CartPole-v1').reset();"
            "print('up', flush=True); time.sleep(60)")
    child = subprocess.Popen([sys.executable, "-c", code], cwd=HERE, stdout=subprocess.PIPE)
    child.stdout.readline()
    child.terminate()
    assert child.wait(10) == -signal.SIGTERM


def test_the_file_opens_as_a_notebook_whose_cells_run_in_order(monkeypatch):
    source = (HERE / "dreamer.py").read_text(encoding="utf-8")
    cells = re.split(r"^# %%.*\n", source, flags=re.MULTILINE)
    notebook = types.ModuleType("notebook")
    monkeypatch.setitem(sys.modules, "notebook", notebook)
    flags = __future__.annotations.compiler_flag  # IPython, too, carries it from cell to cell
    for cell in cells:
        exec(compile(cell, "cell", "exec", flags), vars(notebook))
    assert notebook.Config().env == "CartPole-v1"


def test_errors_are_raised_as_dreamer_errors_for_importers():
    with pytest.raises(DreamerError, match="Did you mean: `Pendulum`"):
        PixelEnv("Pendulumm-v1")


# Section 4.5: nothing is lost
ON_POSIX = pytest.mark.skipif(os.name != "posix", reason="needs fork and POSIX signals")


def in_child(*argv, after=None, number=None, limit=None):
    """dreamer.main(argv) in a child process, which a signal may stop -> exit code, its output."""
    reader, writer = os.pipe()
    child = os.fork()
    if child == 0:
        os.close(reader)
        sys.stdout = sys.stderr = os.fdopen(writer, "w", buffering=1)
        signal.signal(signal.SIGINT, signal.default_int_handler)
        if limit:
            resource.setrlimit(resource.RLIMIT_FSIZE, (limit, limit))
        code = 1
        try:
            code = dreamer.main(list(argv))
        except SystemExit as stop:
            code = stop.code
        except BaseException as error:
            print(repr(error))
        sys.stdout.flush()
        os._exit(code)
    os.close(writer)
    if number:
        if number != signal.SIGKILL:
            os.read(reader, 1)  # the progress bar stands: the run has begun, and can be saved
        time.sleep(after)
        os.kill(child, number)
    with open(reader, errors="replace") as file:
        output = file.read()
    return os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]), output


def weights_of(folder):
    return dreamer.read_checkpoint(folder)["agent"]


def same_run(a, b):
    assert lines_of(a) == lines_of(b)
    for (name, x), y in zip(weights_of(a).items(), weights_of(b).values(), strict=True):
        assert torch.equal(x, y), name


@pytest.fixture(scope="module")
def undisturbed(tmp_path_factory):
    runs = str(tmp_path_factory.mktemp("undisturbed"))
    return train(Config(**SMALL, steps=200, device="cpu", runs=runs))


@ON_POSIX
def test_twenty_kills_in_a_row_change_nothing(undisturbed, tmp_path):
    argv = ["--device", "cpu", "--steps", "200", "--save-every", "0.1", "--runs", str(tmp_path)]
    argv, folder = argv + flags(SMALL), tmp_path / "CartPole-v1-0"
    chance = np.random.default_rng(0)
    for _ in range(20):
        code, output = in_child(*argv, after=chance.uniform(0.1, 0.8), number=signal.SIGKILL)
        assert code in (-signal.SIGKILL, 0), output
        if any((folder / name).exists() for name in dreamer.CHECKPOINTS):
            argv = ["--resume", str(folder)]
    assert in_child(*argv)[0] == 0
    same_run(undisturbed, folder)


@ON_POSIX
@pytest.mark.parametrize("number, code", [(signal.SIGINT, 130), (signal.SIGTERM, 143)])
def test_ctrl_c_and_kill_save_say_how_to_resume_and_change_nothing(
    number, code, undisturbed, tmp_path
):
    folder = tmp_path / "CartPole-v1-0"
    argv = ["--device", "cpu", "--steps", "200", "--runs", str(tmp_path), *flags(SMALL)]
    stopped = in_child(*argv, after=0.5, number=number)
    assert stopped[0] == code and f'python dreamer.py --resume "{folder}"' in stopped[1]
    for after in (0.2, 0.4, 0.3):
        step = dreamer.read_checkpoint(folder)["progress"]["step"]
        assert (folder / "curves.png").exists() and f"stopped at step {step} of 200" in stopped[1]
        stopped = in_child("--resume", str(folder), after=after, number=number)
        assert stopped[0] in (code, 0), stopped[1]
    assert in_child("--resume", str(folder))[0] == 0
    same_run(undisturbed, folder)


@ON_POSIX
def test_a_second_ctrl_c_stops_at_once(tmp_path, monkeypatch):
    run, before = dreamer.Run(Config(**SMALL, steps=10), tmp_path), signal.getsignal(signal.SIGINT)
    signal.signal(signal.SIGINT, run.stop)
    try:
        signal.raise_signal(signal.SIGINT)
        assert run.signal == signal.SIGINT
        with pytest.raises(KeyboardInterrupt):
            signal.raise_signal(signal.SIGINT)
    finally:
        signal.signal(signal.SIGINT, before)


@pytest.mark.parametrize("quiet", [40, 41])
def test_a_signal_between_any_two_looks_finds_the_run_saved(quiet, tmp_path):
    class Late(dreamer.Run):
        looks = 0

        @property
        def signal(self):
            self.looks += 1
            return signal.SIGINT if self.looks > quiet else 0

        @signal.setter
        def signal(self, number):
            pass

    run = Late(Config(**SMALL, steps=100, device="cpu"), tmp_path)
    run.bar = dreamer.tqdm(disable=True)
    run.loop()
    assert run.step > 10
    assert dreamer.read_checkpoint(tmp_path)["progress"]["step"] == run.step


def test_a_resumed_run_may_have_more_steps_and_nothing_else(undisturbed, tmp_path):
    config = dict(SMALL, device="cpu", runs=str(tmp_path))
    folder = train(Config(**config, steps=100))
    assert [line["env/step"] for line in lines_of(folder)] == [50, 100]
    run, saved = dreamer.Run(Config(**config, steps=100), folder), dreamer.read_checkpoint(folder)
    run.load()
    assert saved["progress"]["past"]  # it stopped in mid-episode, so it has to remember
    assert all(torch.equal(*x) for x in zip(run.state, saved["progress"]["state"], strict=True))
    with pytest.raises(DreamerError, match="is not the folder of a run"):
        train(Config(**config, steps=200), tmp_path / "nowhere")
    assert not (tmp_path / "nowhere").exists()
    with pytest.raises(DreamerError, match="has made 100 steps already"):
        train(Config(**config, steps=99), folder)
    with pytest.raises(DreamerError, match="hidden was 16, and cannot change"):
        train(Config(**dict(config, hidden=32), steps=200), folder)
    train(Config(**config, steps=200), folder)
    assert json.loads((folder / "config.json").read_text())["steps"] == 200
    same_run(undisturbed, folder)


def test_a_run_in_another_thread_leaves_the_signals_alone(tmp_path):
    config = Config(**SMALL, env="Counting-v0", steps=3, runs=str(tmp_path))
    with concurrent.futures.ThreadPoolExecutor() as pool:
        folder = pool.submit(train, config).result()
    line = lines_of(folder)[-1]
    assert line["env/step"] == 3 and line["env/episodes"] == 0


def test_an_episode_that_ends_at_a_report_is_counted_in_it(tmp_path):
    config = dict(SMALL, env="Counting-v0", steps=8, log_every=4, runs=str(tmp_path))
    folder = train(Config(**config))
    assert [line["env/episodes"] for line in lines_of(folder)] == [1, 2]
    assert [line["env/return"] for line in lines_of(folder)] == [1 + 2 + 3 + 4] * 2


def test_an_environment_that_goes_another_way_on_resume_does_not_hang(tmp_path):
    config = dict(SMALL, env="Counting-v0", runs=str(tmp_path))
    folder = train(Config(**config, steps=7))
    gym.registry["Counting-v0"].kwargs["length"] = 2  # it had made 3 steps in its episode
    try:
        train(Config(**config, steps=11), folder)
    finally:
        del gym.registry["Counting-v0"].kwargs["length"]
    assert lines_of(folder)[-1]["env/step"] == 11


def test_a_resumed_run_in_a_full_buffer_and_with_box_actions_is_exact(tmp_path):
    config = dict(SMALL, env="Pendulum-v1", device="cpu", capacity=70, steps=120,
                  eval_every=1_000)
    whole = train(Config(**config, runs=str(tmp_path / "a")))
    half = train(Config(**dict(config, steps=90), runs=str(tmp_path / "a" / "b")))
    config["runs"] = str(tmp_path / "a" / "b")
    train(Config(**config), half)
    for name, x in weights_of(whole).items():
        assert torch.equal(x, weights_of(half)[name]), name


def test_a_damaged_checkpoint_is_recognised_and_the_one_before_used(tmp_path, capsys):
    folder = train(Config(**SMALL, steps=70, device="cpu", save_every=0.0, runs=str(tmp_path)))
    newest, before = folder / "checkpoint.pt.gz", folder / "checkpoint-before.pt.gz"
    good, steps = newest.read_bytes(), [70, dreamer.read_checkpoint(before)["progress"]["step"]]
    chance = np.random.default_rng(0)
    for _ in range(15):
        newest.write_bytes(good[: chance.integers(len(good))])
        capsys.readouterr()
        assert dreamer.read_checkpoint(folder)["progress"]["step"] == steps[1]
        assert "checkpoint-before.pt.gz in its place" in capsys.readouterr().err
    recognised = 0
    for _ in range(30):
        damaged = bytearray(good)
        damaged[chance.integers(len(good))] ^= 1 << chance.integers(8)
        newest.write_bytes(damaged)
        state = dreamer.read_checkpoint(folder)
        if state["progress"]["step"] == 70:  # what was hit means nothing, such as a time stamp
            assert all(torch.equal(x, weights_of(folder)[k]) for k, x in state["agent"].items())
        else:
            recognised += 1
    assert recognised >= 25
    newest.write_bytes(b"")
    before.write_bytes(good[:-100])
    with pytest.raises(DreamerError, match="no checkpoint that can be used"):
        train(Config(**SMALL, steps=70, device="cpu", save_every=0.0, runs=str(tmp_path)), folder)


def test_a_run_killed_before_its_first_checkpoint_starts_again(tmp_path, undisturbed):
    config = Config(**SMALL, steps=200, device="cpu", runs=str(tmp_path))
    folder = tmp_path / "CartPole-v1-0"
    folder.mkdir()
    (folder / "config.json").write_text("{")
    (folder / "new.pt.gz").write_bytes(b"half")
    same_run(undisturbed, train(config))
    with pytest.raises(DreamerError, match="exists: --resume it"):
        train(config)


@ON_POSIX
def test_a_full_disk_ends_in_one_line_and_keeps_the_checkpoint(tmp_path):
    config = Config(**SMALL, steps=70, device="cpu", runs=str(tmp_path))
    folder = train(config)
    before = weights_of(folder)
    size = (folder / "checkpoint.pt.gz").stat().st_size
    code, output = in_child("--resume", str(folder), "--steps", "150", limit=size // 2)
    assert code == 2 and "dreamer.py: error: " in output and "too large" in output.lower()
    assert all(torch.equal(x, weights_of(folder)[name]) for name, x in before.items())
    assert in_child("--resume", str(folder), "--steps", "150")[0] == 0


class Faulty(Counting):
    """Goes wrong in the way that its id says, in the third step of every episode."""

    def __init__(self, render_mode=None, fault=None):
        super().__init__(render_mode, length=10)
        self.fault = fault

    def step(self, action):
        obs, reward, *rest = super().step(action)
        if self.t == 3 and self.fault == "raises":
            raise RuntimeError("a wheel came off")
        return obs, np.nan if self.t == 3 and self.fault == "reward" else reward, *rest

    def render(self):
        frame = super().render()
        if self.t == 3 and self.fault == "shape":
            return frame[..., 0]
        return frame.astype(np.float32) if self.t == 3 and self.fault == "type" else frame


FAULTS = {"reward": "the reward is nan", "raises": "a wheel came off",
          "shape": "cannot render uint8", "type": "cannot render uint8"}
for fault in FAULTS:
    gym.register(f"Faulty-{fault}-v0", Faulty, kwargs={"fault": fault})


@pytest.mark.parametrize("fault", FAULTS)
@pytest.mark.filterwarnings("ignore")
def test_what_an_environment_does_wrong_is_named_with_episode_and_step(fault, tmp_path, capsys):
    argv = ["--env", f"Faulty-{fault}-v0", "--runs", str(tmp_path), "--seed", "2", *flags(SMALL)]
    assert dreamer.main(argv) == 2
    error = capsys.readouterr().err.splitlines()[-1]
    assert f"Faulty-{fault}-v0, episode with seed 4000000, step 3: " in error
    assert FAULTS[fault] in error


@pytest.mark.parametrize("part, term", [("decoder", "wm/recon"), ("reward_head", "wm/reward")])
def test_a_loss_that_is_not_finite_stops_before_any_weight_is_touched(agent, part, term):
    getattr(agent.world_model, part).requires_grad_(False)
    for p in getattr(agent.world_model, part).parameters():
        p.fill_(np.nan)
    before = {k: v.clone() for k, v in agent.state_dict().items()}
    with pytest.raises(FloatingPointError, match=f"not finite: {term}$"):
        update_world_model(agent, random_batch())
    assert all(torch.equal(v, before[k]) or v.isnan().all() for k, v in agent.state_dict().items())


def test_the_learning_rate_falls_to_zero_over_the_last_share_of_the_steps(tmp_path):
    run = dreamer.Run(Config(**dict(SMALL, lr_decay=0.5), steps=100, lr=0.1), tmp_path)
    run.bar = dreamer.tqdm(disable=True)
    for _ in itertools.islice(run.episode(), 6):
        pass
    rates = []
    for run.step in (10, 50, 75, 100):
        run.update()
        rates.append([x["lr"] for x in run.agent.optimizer.param_groups])
    assert np.allclose(rates, [[0.1], [0.1], [0.05], [0.0]])


def test_a_gradient_that_is_not_finite_stops_the_run_and_names_the_step(tmp_path, monkeypatch):
    def poisoned(agent, batch):
        weight = agent.world_model.decoder[0].weight
        hook = weight.register_hook(lambda gradient: gradient * np.inf)
        try:
            return update_world_model(agent, batch)
        finally:
            hook.remove()
            after.append({k: v.clone() for k, v in agent.state_dict().items()})

    after = []
    monkeypatch.setattr(dreamer, "update_world_model", poisoned)
    with pytest.raises(DreamerError, match="step 60, update 0: .* the gradient of world_model"):
        train(Config(**SMALL, steps=100, runs=str(tmp_path), device="cpu"))
    untouched = weights_of(tmp_path / "CartPole-v1-0")  # the checkpoint from before
    assert all(torch.equal(v, untouched[k]) for k, v in after[-1].items())


def test_two_runs_in_one_folder_are_refused(undisturbed):
    config = Config(**SMALL, steps=200, device="cpu", runs=str(undisturbed.parent))
    with dreamer.FileLock(undisturbed / "in-use.lock"):
        with pytest.raises(OSError, match="could not be acquired"):
            train(config, undisturbed)


def test_memory_that_the_machine_has_not_got_is_refused_at_the_start(tmp_path):
    with pytest.raises(DreamerError, match="replay needs .* GB of memory: lower --capacity"):
        train(Config(capacity=10**9, steps=10**9, runs=str(tmp_path / "r")))
    assert not (tmp_path / "r").exists()


# Section 5: self-evaluation metrics
def test_correlation_is_pearsons_and_absent_without_variance():
    x = torch.tensor([1.0, 2.0, 4.0, 3.0])
    assert dreamer.correlation(x, 3 * x - 7) == pytest.approx(1)
    assert dreamer.correlation(x, -x) == pytest.approx(-1)
    y = torch.tensor([2.0, 1.0, 3.0, 3.0])
    assert dreamer.correlation(x, y) == pytest.approx(np.corrcoef(x, y)[0, 1])
    for n in range(2, 60):  # a mean that is rounded must not look like variance
        assert np.isnan(dreamer.correlation(torch.arange(float(n)), torch.full((n,), 0.1)))
    assert np.isnan(dreamer.correlation(x[:0], x[:0]))


def test_frechet_distance_of_gaussians_is_known():
    x = torch.randn(400, 5, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    x = x - x.mean(0)
    x = x @ torch.linalg.inv(torch.linalg.cholesky(torch.cov(x.T))).T  # covariance 1, mean 0
    shift, scale = torch.tensor([1.0, 2, 0, 0, 0]), torch.tensor([1.0, 1, 1, 1, 3])
    assert dreamer.frechet_distance(x, x) == pytest.approx(0, abs=1e-6)
    assert dreamer.frechet_distance(x, x + shift) == pytest.approx(5)
    assert dreamer.frechet_distance(x, scale * x + shift) == pytest.approx(5 + (3 - 1) ** 2)


class Perfect:
    """An agent whose model knows the Counting environment: h is the time, the frame is 10 h."""

    LENGTH, V = 8, 2.0

    def __init__(self, horizon=5):
        self.config = Config(horizon=horizon, gamma=0.9, device="cpu")
        self.actor = lambda feat: OneHotCategorical(logits=torch.zeros(*feat.shape[:-1], 3))
        self.critic = lambda feat: torch.full(feat.shape[:-1], self.V)
        self.world_model = self.rssm = self
        self.encoder = lambda obs: (obs[..., 0, 0, :1] / 10).round()  # scaling rounds, too
        self.decoder = lambda feat: (feat[..., :1, None, None] * 10 / 255).expand(
            *feat.shape[:-1], 64, 64, 3)

    def observe(self, embed, prev_action, is_first):
        return embed, torch.zeros_like(embed), None, None

    def img_step(self, h, z, action):
        return h + 1, z

    def predict(self, feat):
        cont = (feat[..., 0] != self.LENGTH).float()
        cont[0] = 0.3  # what the head says of the start itself is of no account
        return feat[..., 0], cont

    def prior(self, h):
        return torch.tensor([0.5, 0.5]).log().expand(*h.shape[:-1], 3, 2)  # three groups


for end in ("terminated", "truncated"):
    gym.register(f"Eight-{end}-v0", Counting, kwargs={"length": Perfect.LENGTH, "ends_by": end})


def counting_rows(ends_by="terminated", episodes=12):
    env, rows = PixelEnv(f"Eight-{ends_by}-v0"), []
    for seed in range(episodes):
        rows += [row for row, _ in play(env, lambda o, s: (env.action_space.sample(), s), seed)]
    replay = ReplayBuffer(len(rows), 3)
    for row in rows:
        replay.add(row)
    return {name: torch.from_numpy(x) for name, x in replay.rows.items()}


@pytest.mark.filterwarnings("ignore")
def test_a_perfect_model_has_correlation_one_and_no_error():
    rows, H = counting_rows(), 5
    metrics = dreamer.dream_metrics(Perfect(H), rows, 18)
    assert metrics["reward_rho"] == pytest.approx(1) and metrics["return_rho"] == pytest.approx(1)
    frames = rows["obs"][:9].reshape(9, -1).numpy() / 255
    for k in (1, 5):
        starts = np.arange(0, 9 - k, 2)  # every second row, if there is a frame k steps later
        times = starts + k
        assert metrics[f"reward_error_{k}"] == pytest.approx(0, abs=1e-6)
        assert metrics[f"pixel_error_{k}"] < 2  # scaling rounds, by up to 1 in 255
        repeat = np.mean(np.sum((frames[times] - frames[starts]) ** 2, 1))
        assert metrics[f"pixel_error_repeat_{k}"] == pytest.approx(repeat, rel=1e-4)
        mean = np.mean(np.sum((frames[times] - frames.mean(0)) ** 2, 1))
        assert metrics[f"pixel_error_mean_{k}"] == pytest.approx(mean, rel=1e-4)
    assert metrics["reward_error_15"] == 0  # all have ended: nothing is alive, in both
    assert np.isnan(metrics["pixel_error_15"])  # and there is no frame
    assert metrics["policy_entropy"] == pytest.approx(np.log(3))
    assert metrics["trajectory_entropy"] == pytest.approx(H * (np.log(3) + 3 * np.log(2)))
    assert metrics["latent_entropy"] == pytest.approx(3 * np.log(2))
    came = [sum(0.9**i * r for i, r in enumerate(range(t + 1, 9))) for t in range(8)]
    assert metrics["value_real"] == pytest.approx(np.mean(came), rel=1e-5)
    assert metrics["value_error"] == pytest.approx(np.mean(np.abs(np.subtract(came, 2))), rel=1e-5)


@pytest.mark.filterwarnings("ignore")
def test_where_a_time_limit_cuts_nothing_is_assumed_and_the_critic_stands_in():
    agent, rows = Perfect(5), counting_rows("truncated")
    agent.LENGTH = 100  # the model knows no end
    metrics = dreamer.dream_metrics(agent, rows, 18)
    assert metrics["reward_rho"] == pytest.approx(1)  # with zeros after the cut it would not be
    assert np.isnan(metrics["reward_error_15"])
    came = [sum(0.9**i * r for i, r in enumerate(range(t + 1, 9))) + 0.9 ** (8 - t) * 2
            for t in range(8)]
    assert metrics["value_real"] == pytest.approx(np.mean(came), rel=1e-5)


@pytest.mark.filterwarnings("ignore")
def test_the_dream_takes_the_actions_that_were_recorded_until_the_episode_ends():
    agent, rows = Perfect(), counting_rows(episodes=2)  # nine rows each
    agent.img_step = lambda h, z, action: (h + 1, action.argmax(-1, keepdim=True).float())
    h, z = torch.zeros(18, 1), torch.zeros(18, 1)
    start = torch.tensor([0, 6, 12])
    feat, row, lasted = dreamer.dream_along(agent, rows, h, z, start, 4)
    assert row.T.tolist() == [[0, 1, 2, 3, 4], [6, 7, 8, 9, 10], [12, 13, 14, 15, 16]]
    assert lasted.sum(0).tolist() == [5, 3, 5]
    assert torch.equal(feat[1:, :, 1], rows["prev_action"][row[1:]].argmax(-1).float())
    assert feat[:, 0, 0].tolist() == [0, 1, 2, 3, 4]


@pytest.mark.filterwarnings("ignore")
def test_shuffled_rewards_have_no_correlation():
    rows = dict(counting_rows(episodes=200))
    order = torch.randperm(1800, generator=torch.Generator().manual_seed(0))
    rows["reward"] = rows["reward"][order]
    metrics = dreamer.dream_metrics(Perfect(1), rows, 18)
    assert abs(metrics["reward_rho"]) < 0.1


def test_a_model_that_sees_no_end_has_the_rewards_after_it_wrong():
    agent, rows = Perfect(5), counting_rows()
    agent.LENGTH = 100
    metrics = dreamer.dream_metrics(agent, rows, 18)
    assert metrics["reward_rho"] < 0.5
    # Starts at 0, 2, 4, 6 and five steps: 5 and 7 are right, 9 and 11 come after the end
    assert metrics["reward_error_5"] == pytest.approx((9 + 11) / 4)


def test_held_out_rows_are_of_unseen_seeds_and_their_number_is_fixed(tmp_path, monkeypatch):
    agent = Agent(gym.spaces.Discrete(2), Config(**SMALL))
    seeds, sizes = [], []
    monkeypatch.setattr(
        dreamer, "play", lambda env, act, seed: seeds.append(seed) or play(env, act, seed))
    monkeypatch.setattr(dreamer, "dream_metrics", lambda agent, rows, policy_rows, folder:
                        sizes.append((len(rows["obs"]), policy_rows)) or {})
    evaluate(agent, 30, seed=0)
    assert sizes == [(160, 80)] and len(set(seeds)) == len(seeds) > 30
    assert all(seed % 2 == 1 for seed in seeds)


class Still(Counting):
    def step(self, action):
        obs, _, *rest = super().step(action)
        return obs, 1.0, *rest


gym.register("Still-v0", Still, kwargs={"ends_by": "truncated"})


def test_a_correlation_that_does_not_exist_is_left_out_and_said(capsys):
    metrics = evaluate(Agent(gym.spaces.Discrete(3, start=5), Config(**SMALL, env="Still-v0")), 2)
    assert "eval/reward_rho" not in metrics and "eval/latent_entropy" in metrics
    assert all(np.isfinite(value) for value in metrics.values())
    assert "not defined on these episodes: reward_rho, return_rho" in capsys.readouterr().err


gym.register("Brief-v0", Counting, kwargs={"length": 2})


def test_the_smallest_held_out_set_and_episodes_too_short_for_a_film_do_no_harm(tmp_path):
    for env, held_out, horizon in [("CartPole-v1", 4, 5), ("Brief-v0", 60, 1)]:
        config = Config(**dict(SMALL, held_out=held_out, horizon=horizon), env=env)
        agent = Agent(PixelEnv(env).action_space, config)
        assert np.isfinite(list(evaluate(agent, 1, 0, tmp_path).values())).all()
    assert not (tmp_path / "dream.gif").exists()


def test_pictures_show_five_frames_seen_and_forty_five_dreamed(undisturbed):
    with Image.open(undisturbed / "dream.gif") as film:
        assert film.n_frames == 50 and film.size == (512, 400)
        bars = []
        for t in range(50):
            film.seek(t)
            bars.append(film.convert("RGB").getpixel((500, 3)))
    assert len(set(bars[:5])) == 1 and len(set(bars[5:])) == 1 and bars[4] != bars[5]
    assert (undisturbed / "latents.png").read_bytes()[:4] == b"\x89PNG"


@pytest.fixture
def dream():
    torch.manual_seed(0)
    return dreamer.DreamEnv(Agent(gym.spaces.Discrete(2), Config(**SMALL)))


@pytest.mark.filterwarnings("ignore")
def test_the_dream_is_an_environment_like_any_other(dream):
    check_env(dream, skip_render_check=True)
    env = gym.wrappers.RecordEpisodeStatistics(gym.wrappers.TimeLimit(dream, 20))
    for seed in range(3):
        obs, _ = env.reset(seed=seed)
        total, steps, over = 0.0, 0, False
        while not over:
            obs, reward, terminated, truncated, info = env.step(env.action_space.sample())
            total, steps, over = total + reward, steps + 1, terminated or truncated
        assert info["episode"]["r"] == pytest.approx(total) and info["episode"]["l"] == steps
        assert np.array_equal(obs, env.render())


def test_a_dream_step_is_prior_reward_head_continue_head_and_decoder(dream):
    first, _ = dream.reset(seed=1)
    model, frame = dream.agent.world_model, dream.observation()
    assert np.array_equal(frame, PixelEnv("CartPole-v1").reset(seed=1)[0])  # a real first frame
    h = model.rssm.recur(dream.h, dream.z, torch.tensor([[0.0, 1.0]]))
    model.cont_head[-1].weight.data.zero_()
    model.cont_head[-1].bias.data.fill_(-20.0)  # the end, for certain
    obs, reward, terminated, truncated, _ = dream.step(1)
    assert torch.allclose(dream.h, h) and terminated and not truncated
    feat = torch.cat([dream.h, dream.z], -1)
    assert reward == model.reward_head(feat).item()
    assert np.array_equal(obs, (model.decoder(feat)[0].detach() * 255).byte().numpy())
    model.cont_head[-1].bias.data.fill_(20.0)
    assert not any(dream.step(0)[2] for _ in range(10))
    assert np.array_equal(frame, dream.observation())  # and the real environment has not moved


def test_playing_takes_arrow_keys_else_the_agent_and_closes(dream, monkeypatch, tmp_path):
    monkeypatch.setattr(dreamer, "HEADLESS", False)
    monkeypatch.setenv("SDL_VIDEODRIVER", "dummy")
    taken = []

    class Watched(dreamer.SideBySide):
        def step(self, action):
            taken.append(action)
            assert self.render().shape == (64, 128, 3)
            key, kind = [(pygame.K_RIGHT, pygame.KEYDOWN), (pygame.K_RIGHT, pygame.KEYUP),
                         (pygame.K_LEFT, pygame.KEYDOWN), (pygame.K_ESCAPE, pygame.KEYDOWN)][
                             min(len(taken) - 1, 3)]
            pygame.event.post(pygame.event.Event(kind, key=key))
            return super().step(action)

    monkeypatch.setattr(dreamer, "SideBySide", Watched)
    dreamer.play_dream(dream.agent)
    assert taken == [None, 1, None, 0] and not pygame.display.get_init()


def test_playing_without_a_screen_is_refused(undisturbed, monkeypatch, capsys):
    monkeypatch.setattr(dreamer, "HEADLESS", True)
    assert dreamer.main(["--play", str(undisturbed)]) == 2
    assert "needs a screen" in capsys.readouterr().err


def test_json_holds_every_metric_of_the_section(undisturbed, capsys):
    assert dreamer.main(["--eval", str(undisturbed), "--episodes", "2", "--json"]) == 0
    metrics = json.loads(capsys.readouterr().out)
    assert metrics == evaluate(load_agent(undisturbed, "cpu"), 2, 0)
    assert {"eval/return", "eval/return_rho", "eval/latent_fid", "eval/value_error"} <= set(metrics)


def test_init_from_loads_what_is_there_and_names_what_does_not_fit(tmp_path, agent, capsys):
    torch.manual_seed(1)
    other = Agent(gym.spaces.Discrete(A), Config(**SMALL))
    encoder, rssm, critic = other.world_model.encoder, other.world_model.rssm, other.critic
    actor = dict(other.actor.state_dict(), extra=torch.zeros(1))
    parts = {"encoder": encoder, "rssm": rssm, "critic": critic}
    decoder = {k: x[..., :1] for k, x in other.world_model.decoder.state_dict().items()}
    saved = {name: part.state_dict() for name, part in parts.items()}
    torch.save(dict(saved, actor=actor, decoder=decoder, step=3), tmp_path / "some.pt")
    before = snapshot(agent.actor), snapshot(agent.world_model.decoder)
    dreamer.init_from(agent, str(tmp_path / "some.pt"))
    said = sorted(line.split(": ", 1)[1] for line in capsys.readouterr().out.splitlines())
    assert said[0] == "actor does not fit: extra" and said[1] == "critic is loaded"
    assert said[2].startswith("decoder does not fit: 0.bias, 0.weight, ")
    assert said[3:] == ["encoder is loaded", "rssm is loaded"]
    assert not changed(agent.actor, before[0])
    assert not changed(agent.world_model.decoder, before[1])  # all of a part, or nothing
    for mine, theirs in ((agent.world_model.encoder, encoder), (agent.world_model.rssm, rssm),
                         (agent.critic, critic), (agent.slow_critic, critic)):
        assert not changed(mine, snapshot(theirs))


def test_init_from_takes_the_weights_of_one_part_alone(tmp_path, agent, capsys):
    torch.manual_seed(1)
    other = Agent(gym.spaces.Discrete(A), Config(**SMALL))
    torch.save(other.world_model.encoder.state_dict(), tmp_path / "encoder.pt")
    dreamer.init_from(agent, str(tmp_path / "encoder.pt"))
    assert capsys.readouterr().out.endswith("encoder.pt: encoder is loaded\n")
    assert not changed(agent.world_model.encoder, snapshot(other.world_model.encoder))


def test_init_from_a_run_takes_all_its_parts(undisturbed, agent, capsys):
    for path in (undisturbed, undisturbed / "checkpoint.pt.gz"):
        dreamer.init_from(agent, str(path))
        assert capsys.readouterr().out.count("is loaded") == 7
    theirs = weights_of(undisturbed)
    for name, x in agent.state_dict().items():
        if name != "return_range" and "slow" not in name:
            assert torch.equal(x, theirs[name]), name


def test_init_from_a_file_that_holds_no_part_is_refused(tmp_path, capsys):
    torch.save({"layer.weight": torch.zeros(3)}, tmp_path / "foreign.pt")
    (tmp_path / "broken.pt").write_bytes(b"PK not really")
    for name, message in (("foreign.pt", "holds no encoder, rssm, decoder"), ("broken.pt", ""),
                          ("nowhere", "nowhere is no checkpoint")):
        argv = ["--init-from", str(tmp_path / name), "--runs", str(tmp_path / "runs")]
        assert dreamer.main(argv) == 2
        error = capsys.readouterr().err
        assert error.startswith("dreamer.py: error: --init-from") and message in error
    assert not (tmp_path / "runs").exists()


def test_a_run_starts_from_given_weights_and_does_so_once(agent, tmp_path, capsys):
    torch.save({"encoder": agent.world_model.encoder.state_dict()}, tmp_path / "encoder.pt")
    config = Config(**SMALL, steps=1, runs=str(tmp_path), init_from=str(tmp_path / "encoder.pt"))
    folder = train(config)
    assert "encoder is loaded" in capsys.readouterr().out
    theirs = weights_of(folder)
    for name, x in agent.world_model.encoder.state_dict().items():
        assert torch.equal(x, theirs[f"world_model.encoder.{name}"])
    train(config, folder)  # its own checkpoint has them now: nothing is loaded from there again
    assert "is loaded" not in capsys.readouterr().out


# And all of it together
def test_it_learns_to_walk_the_corridor_from_pixels(tmp_path):
    """Random actions collect about 1 of 12; fails without world model or without actor updates."""
    config = Config(
        env="Corridor-v0", steps=1_000, prefill=400, pretrain=100, train_ratio=48, batch_size=8,
        batch_length=8, horizon=8, depth=2, hidden=32, groups=8, classes=8, units=64,
        capacity=2_000, entropy=1e-2, eval_every=1_000,
        runs=str(tmp_path))
    env = PixelEnv("Corridor-v0")

    def at_random(obs, state):
        return env.action_space.sample(), None

    random_returns = [sum(row["reward"] for row, _ in play(env, at_random, s)) for s in range(40)]
    assert np.mean(random_returns) < 3
    assert evaluate(load_agent(train(config)), 5, seed=1)["eval/return"] >= 11
