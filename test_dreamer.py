"""Tests of dreamer.py. Every name is a claim; most expected numbers are known in closed form."""

import __future__

import contextlib
import json
import os
import re
import runpy
import shutil
import signal
import subprocess
import sys
import threading
import time
import types
from pathlib import Path

import gymnasium as gym
import numpy as np
import pytest
import torch
from gymnasium.utils.env_checker import check_env
from torch.distributions import Categorical, Independent, Normal, OneHotCategorical
from torch.distributions import OneHotCategoricalStraightThrough as StraightThrough
from torch.distributions import kl_divergence as torch_kl

import dreamer
from dreamer import (
    Agent,
    Config,
    DreamEnv,
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
README = (HERE / "README.md").read_text(encoding="utf-8")
torch.set_num_threads(1)  # networks this small only wait for a second thread
os.environ["OMP_NUM_THREADS"] = "1"  # the same for child processes
SMALL = dict(  # a config whose every part is small
    depth=2, hidden=16, groups=4, classes=4, units=16, batch_size=4, batch_length=6, horizon=5,
    prefill=60, pretrain=5, train_ratio=16.0, capacity=500,
    log_every=50, eval_every=100, eval_episodes=1, held_out=160,
)
A, D, Z, S, K = 2, 16, 16, 4, 4  # sizes under SMALL
BINS = dreamer.TwoHotHead(1, 1, 1).bins
# Most tests train, and only two look at the curves, which take longer to draw
DRAW, dreamer.Figure.savefig = dreamer.Figure.savefig, lambda figure, path, **options: None


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


class Precise(Counting):
    action_space = gym.spaces.Box(-2.0, 2.0, (2,), np.float64)


class Broken(Counting):
    def reset(self, *, seed=None, options=None):
        raise RuntimeError("no display,\n    no luck")


class Buttons(Counting):
    action_space = gym.spaces.MultiDiscrete([2, 2])


gym.register("Corridor-v0", Corridor, max_episode_steps=16)
gym.register("Counting-v0", Counting)
gym.register("Truncated-v0", Counting, kwargs={"ends_by": "truncated"})
gym.register("Blind-v0", Blind)
gym.register("Precise-v0", Precise)
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
    frame = env.env.render().astype(float)  # [400, 600, 3]
    wide = frame.repeat(4, 0).repeat(8, 1)  # 1600 = 64 * 25 rows, 4800 = 64 * 75 columns
    mean = wide.reshape(64, 25, 64, 75, 3).mean((1, 3))
    error = np.abs(obs - mean)  # of 255; Pillow counts every pixel of the frame once
    assert error.max() < 25 and error.mean() < 0.2
    assert len(np.unique(obs)) > 20  # no nearest neighbour: the pole has intermediate shades


def test_box_actions_are_rescaled_from_minus_one_to_one():
    env = PixelEnv("Pendulum-v1")  # torque in [-2, 2]
    for action, torque in [(1.0, 2.0), (-0.5, -1.0), (7.0, 2.0)]:
        env.reset(seed=0)
        env.step(np.array([action], np.float32))
        assert env.env.unwrapped.last_u == pytest.approx(torque)


def test_the_bounds_of_precise_actions_overflow_nowhere(recwarn):
    env = PixelEnv("Precise-v0")
    env.reset(seed=0)
    env.step(env.action_space.sample())
    assert env.action_space.shape == (2,) and not [w for w in recwarn if "overflow" in str(w)]


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
    folder = train(Config(**SMALL, env="late_module:Late-v0", steps=61, runs=str(tmp_path)))
    assert folder.name == "late_module-Late-v0-0"  # Windows allows no colon


class Endless(Counting):
    """Never ends by itself."""

    def __init__(self, render_mode=None):
        super().__init__(render_mode, length=10**9)

    def render(self):
        return np.full((64, 64, 3), self.t % 250, np.uint8)


gym.register("Endless-v0", Endless)


def test_an_episode_without_an_end_is_cut():
    env = PixelEnv("Endless-v0")
    env.reset(seed=0)
    while not env.row["is_last"]:
        env.step(5)
    assert env.row["reward"] == 1_000 and not env.row["terminated"]


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
    p, q = torch.randn(2, 5, S, K).softmax(-1)
    expected = torch_kl(Categorical(probs=p), Categorical(probs=q)).sum(-1)
    assert torch.allclose(kl_divergence(p, q), expected, atol=1e-6)


def test_gaussian_kl_is_the_sum_of_normal_kls_and_takes_the_direction_that_it_says():
    (p_mean, q_mean), (p_std, q_std) = torch.randn(2, 2, 5, S), 0.1 + torch.rand(2, 2, 5, S)
    p, q = torch.stack([p_mean, p_std], -1), torch.stack([q_mean, q_std], -1)
    expected = torch_kl(Normal(p_mean, p_std), Normal(q_mean, q_std)).sum(-1)
    assert torch.allclose(kl_divergence(p, q, gaussian=True), expected)
    wide, narrow = torch.tensor([[0.0, 2.0]]), torch.tensor([[1.0, 1.0]])  # mean, deviation
    kl = kl_divergence(wide, narrow, gaussian=True).item()
    assert kl == pytest.approx((4 + 1 - 1) / 2 - np.log(2))  # in closed form


def gaussian_rssm():
    torch.manual_seed(0)
    return Agent(gym.spaces.Discrete(A), Config(**SMALL, latent="gaussian")).world_model.rssm


def test_gaussian_samples_have_mean_and_deviation_and_pass_gradients():
    rssm = gaussian_rssm()
    params = torch.stack([torch.arange(S) - 1.5, torch.arange(1, S + 1)], -1).requires_grad_()
    z = rssm.sample(params.expand(50_000, S, 2))
    assert z.shape == (50_000, S)
    assert torch.allclose(z.mean(0), params[:, 0], atol=0.1)
    assert torch.allclose(z.std(0), params[:, 1], rtol=0.02)
    torch.manual_seed(1)
    (gradient,) = torch.autograd.grad(rssm.sample(params).sum(), params)
    torch.manual_seed(1)
    expected = torch.stack([torch.ones(S), torch.randn(S)], -1)  # z = mean + deviation * noise
    assert torch.allclose(gradient, expected)


def test_a_gaussian_state_has_a_number_a_variable_and_no_vanishing_deviation():
    rssm = gaussian_rssm()
    embed, action = torch.randn(3, 7, 256), torch.randn(3, 7, A)
    feat, post, prior = rssm.observe(embed, action, torch.zeros(3, 7, dtype=torch.bool))
    assert feat.shape == (3, 7, D + S) and post.shape == prior.shape == (3, 7, S, 2)
    lowest = rssm.params(torch.full((2 * S,), -1e4))
    assert lowest[:, 1].tolist() == pytest.approx(S * [0.1])
    assert rssm.params(torch.arange(2.0 * S))[:, 0].tolist() == [0, 2, 4, 6]  # means as they are


def test_no_class_is_less_likely_than_its_share_of_unimix(agent):
    logits = torch.full((Z,), -1e4).index_fill(0, torch.tensor([0, 4, 8, 12]), 1e4)
    probs = agent.world_model.rssm.params(logits)
    assert probs.min().item() == pytest.approx(0.01 / K)
    assert probs.max().item() == pytest.approx(0.99 + 0.01 / K)


def test_without_unimix_the_kl_stays_finite():
    config = Config(**SMALL | {"unimix": 0.0})
    rssm = Agent(gym.spaces.Discrete(A), config).world_model.rssm
    first, last = torch.full((2, S, K), -1e4)
    first[:, 0], last[:, -1] = 1e4, 1e4
    p, q = (rssm.params(x.flatten()).requires_grad_() for x in (first, last))
    kl = kl_divergence(p, q)
    assert torch.isfinite(kl) and torch.isfinite(torch.cat(torch.autograd.grad(kl, [p, q]))).all()


def test_samples_are_one_hot_and_gradients_go_straight_through(agent):
    probs = torch.randn(7, S, K).softmax(-1).requires_grad_()
    weight = torch.randn(7, Z)
    z = agent.world_model.rssm.sample(probs)
    hot = z.detach().unflatten(-1, (S, K))
    assert torch.allclose(hot.max(-1).values, torch.ones(7, S), atol=1e-6)
    assert torch.allclose(hot.sum(-1), torch.ones(7, S), atol=1e-6)
    (gradient,) = torch.autograd.grad((z * weight).sum(), probs)
    assert torch.equal(gradient.flatten(-2), weight)  # as if z were the probabilities


def test_samples_follow_the_probabilities(agent):
    probs = torch.tensor([0.1, 0.2, 0.3, 0.4])
    z = agent.world_model.rssm.sample(probs.expand(20_000, S, K)).unflatten(-1, (S, K))
    assert torch.allclose(z.mean((0, 1)), probs, atol=0.01)


def test_acting_and_observe_reach_the_same_state_on_the_same_history(agent):
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
    feat, *_ = agent.world_model.rssm.observe(embed, torch.stack(actions[:6])[None], first)
    assert torch.allclose(torch.stack(acted), feat[0], atol=1e-5)


def test_the_model_knows_the_action_as_the_environment_clips_it(agent):
    feat, action = torch.randn(3, D + Z), torch.tensor([[3.0, -7.0]]).expand(3, -1)
    recur = agent.world_model.rssm.recur
    assert torch.equal(recur(feat, action), recur(feat, action.sign()))
    assert not torch.equal(recur(feat, action), recur(feat, -action))


def sequence(agent, first=()):
    """Random inputs that want gradients, and what the RSSM makes of them."""
    embed = torch.randn(3, 8, 256, requires_grad=True)
    action = torch.randn(3, 8, A, requires_grad=True)
    is_first = torch.zeros(3, 8, dtype=torch.bool)
    is_first[:, list(first)] = True
    return embed, action, agent.world_model.rssm.observe(embed, action, is_first)


def test_is_first_erases_all_history(agent):
    embed, action, (feat, post, prior) = sequence(agent, first=[5])
    later = sum((x[:, 5:] * torch.randn_like(x[:, 5:])).sum() for x in (feat, post, prior))
    by_embed, by_action = torch.autograd.grad(later, [embed, action])
    assert (by_embed[:, :5] == 0).all() and (by_action[:, :6] == 0).all()
    assert (by_embed[:, 5:] != 0).any() and (by_action[:, 6:] != 0).any()
    h = feat[..., :D]
    torch.testing.assert_close(h[:, 5], h[:, 5][:1].expand(3, -1))  # the same for every history
    _, _, (unbroken, *_) = sequence(agent)
    assert not torch.allclose(unbroken[0, 5, :D], unbroken[1, 5, :D])


def test_a_future_frame_cannot_change_a_past_state(agent):
    embed, action, (feat, post, prior) = sequence(agent, first=[0])
    early = sum((x[:, :5] * torch.randn_like(x[:, :5])).sum() for x in (feat, post, prior))
    h = feat[..., :D]
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
    replay = ReplayBuffer(capacity)
    for i in range(count):
        replay.add(dict(obs=np.zeros((64, 64, 3), np.uint8), reward=np.float32(i)))
    return replay


@pytest.mark.parametrize("count", [9, 12, 17, 35])
def test_windows_are_consecutive_rows_of_the_newest_that_fit(count):
    replay = filled_replay(count, capacity=12)
    torch.manual_seed(0)
    batch = replay.sample(1000, 8)
    assert batch["obs"].shape == (1000, 8, 64, 64, 3) and batch["obs"].dtype == torch.uint8
    assert (batch["reward"].diff(dim=1) == 1).all()
    starts = set(batch["reward"][:, 0].int().tolist())
    assert starts == set(range(max(0, count - 12), count - 7))  # every window, and no other
    assert len(replay.rows) <= 12


def test_replay_prefers_new_windows_as_the_later_of_two():
    torch.manual_seed(0)
    reward = filled_replay(73, capacity=50).sample(4_300, 8)["reward"]
    counts = torch.bincount(reward[:, 0].int() - 23, minlength=43)
    cumulated = (torch.arange(44) / 43) ** 2  # that both lie below
    expected = 4_300 * cumulated.diff()
    assert len(counts) == 43 and ((counts - expected).abs() < 5 * expected.sqrt() + 5).all()


# Section 2: world model update
def test_dyn_trains_the_prior_alone_and_rep_the_posterior_alone(monkeypatch):
    cases = [("dyn", "prior_net", "post_net"), ("rep", "post_net", "prior_net")]
    for name, trained, still in cases:
        scales = {f"scale_{x}": float(x == name) for x in ("dyn", "rep")}
        model = Agent(gym.spaces.Discrete(A), Config(**SMALL | scales, free_nats=0.0)).world_model
        monkeypatch.setattr(dreamer.F, "mse_loss", lambda x, y, reduction: torch.zeros_like(y))
        monkeypatch.setattr(dreamer.F, "binary_cross_entropy_with_logits",
                            lambda x, y, reduction: torch.zeros_like(y))
        monkeypatch.setattr(model.reward_head, "loss", lambda x, y: torch.zeros_like(y))
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
        _, post, prior = model.rssm.observe(embed, batch["prev_action"], batch["is_first"])
        kl = torch_kl(Categorical(probs=post), Categorical(probs=prior)).sum(-1)
        model.config.free_nats = free = kl.median().item()  # half of the steps lie below
        torch.manual_seed(3)
        *_, metrics = model.loss(batch)
    expected = torch.where(kl > free, kl, free).mean()
    assert metrics["wm/dyn"].item() == pytest.approx(expected.item(), rel=1e-5)
    assert metrics["wm/rep"].item() == pytest.approx(expected.item(), rel=1e-5)
    assert metrics["wm/kl"].item() == pytest.approx(kl.mean().item(), rel=1e-5)
    assert abs(expected - kl.mean().clamp(min=free)) > 1e-3  # the mean would give another number


def test_kl_below_the_free_nats_has_no_gradient():
    batch = random_batch(T=1)
    free, bound = (Agent(gym.spaces.Discrete(A), Config(**SMALL, free_nats=x)) for x in (100, 0))
    for agent in (free, bound):
        loss, _, metrics = agent.world_model.loss(batch)
        loss.backward()
        prior = agent.world_model.rssm.prior_net.parameters()
        moved = any(p.grad is not None and (p.grad != 0).any() for p in prior)
        assert moved == (agent is bound)  # nothing but the KL reaches the prior
        assert metrics["wm/dyn"] == (metrics["wm/kl"] if agent is bound else 100)


def test_reconstruction_is_summed_over_pixels_and_averaged_over_steps(agent):
    batch = random_batch()
    torch.manual_seed(1)
    _, feat, metrics = agent.world_model.loss(batch)
    frames = agent.world_model.decoder(feat)
    expected = ((frames - batch["obs"] / 255) ** 2).sum() / (4 * 6)
    assert metrics["wm/recon"].item() == pytest.approx(expected.item(), rel=1e-5)


def test_loss_is_the_weighted_sum_of_its_terms(agent):
    loss, _, m = agent.world_model.loss(random_batch())
    weights = {"recon": 1, "reward": 1, "cont": 1, "dyn": 1, "rep": 0.05}
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
    agent.actor.net[-1].weight.data.normal_()
    model, start = agent.world_model, torch.randn(5, D + Z)
    with torch.no_grad():
        torch.manual_seed(3)
        feat, action = imagine(model, agent.actor, start, 4)
        assert feat.shape == (5, 5, D + Z) and action.shape == (4, 5, A)
        assert torch.equal(feat[0], start)  # the start comes first
        torch.manual_seed(3)
        for t in range(4):  # action t leads from state t to state t + 1
            expected = OneHotCategorical(logits=agent.actor.net(feat[t])).sample()
            assert torch.equal(action[t], expected)
            h = model.rssm.recur(feat[t], action[t])
            z = model.rssm.sample(model.rssm.prior(h))
            assert torch.equal(feat[t + 1], torch.cat([h, z], -1))


def test_imagination_takes_no_environment_step(agent, monkeypatch):
    def forbidden(*args, **kwargs):
        raise AssertionError("the dream asked the environment")

    for name in ("reset", "step", "render"):
        monkeypatch.setattr(PixelEnv, name, forbidden)
        monkeypatch.setattr(gym.Wrapper, name, forbidden)
    metrics = update_behavior(agent, torch.randn(6, D + Z))
    assert np.isfinite([float(x) for x in metrics.values()]).all()


def test_the_behavior_losses_are_those_of_the_equations(agent, monkeypatch):
    """Eq. 3.2 to 3.6, a state at a time, on a dream that is given."""
    H, N, gamma, lam = 5, 4, agent.config.gamma, agent.config.lam
    agent.config.entropy = 0.3
    agent.actor.net[-1].weight.data.normal_()
    agent.critic.net[-1].weight.data.normal_(0, 0.1)
    agent.slow_critic.net[-1].weight.data.normal_(0, 0.1)
    agent.slow_model.reward_head.net[-1].weight.data.normal_(0, 0.1)
    feat = torch.randn(H + 1, N, D + Z)
    action = torch.nn.functional.one_hot(torch.randint(A, (H, N)), A).float()
    losses = {}
    monkeypatch.setattr(dreamer, "imagine", lambda *args: (feat, action))
    monkeypatch.setattr(dreamer, "gradient_step", lambda agent, part, loss:
                        losses.update({part: loss.item()}))
    with torch.no_grad():
        reward, cont = (x.tolist() for x in agent.slow_model.predict(feat))
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
    metrics = update_behavior(agent, torch.zeros(N, D + Z))
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
    model, slow_model = agent.world_model, agent.slow_model
    others = [agent.actor, agent.critic, slow_model, agent.slow_critic]
    agent.actor.net[-1].weight.data.normal_()  # at zero or nearly so, gradients stop short
    agent.critic.net[-1].weight.data.normal_(0, 0.1)
    model.reward_head.net[-1].weight.data.normal_(0, 0.1)
    slow_model.requires_grad_().load_state_dict(model.state_dict())
    agent.slow_critic.requires_grad_()
    monkeypatch.setattr(dreamer, "follow", lambda *args: None)  # it moves none that want gradients

    def touched(module):
        gradients = {name: p.grad for name, p in module.named_parameters()}
        return {n for n, g in gradients.items() if g is not None and (g != 0).any()}, set(gradients)

    loss, states, _ = model.loss(random_batch())
    loss.backward()
    reached, every = touched(model)
    assert reached == every
    assert all(not touched(other)[0] for other in others)

    def backward_only(agent, name, loss):
        agent.zero_grad()
        loss.backward(retain_graph=True)
        for part in ("world_model", "actor", "critic", "slow_model", "slow_critic"):
            reached, every = touched(getattr(agent, part))
            assert reached == (every if part == name else set()), (name, part)
        seen.append(name)

    seen = []
    monkeypatch.setattr(dreamer, "gradient_step", backward_only)
    monkeypatch.setattr(torch, "set_grad_enabled", contextlib.nullcontext)  # sg alone has to cut
    update_behavior(agent, states.flatten(0, 1))
    assert seen == ["actor", "critic"]


def followed(slow, before, fast):
    fast = dict(fast.named_parameters())
    return all(torch.allclose(p, 0.9 * before[name] + 0.1 * fast[name], atol=1e-7)
               for name, p in slow.named_parameters())


@pytest.mark.parametrize("actor_grad", ["reinforce", "dynamics"])
def test_each_update_moves_its_own_part_and_the_slow_copies_follow(agent, actor_grad):
    agent.config.actor_grad = actor_grad
    slow_model, slow_critic = snapshot(agent.slow_model), snapshot(agent.slow_critic)
    before = {name: snapshot(getattr(agent, name)) for name in ("world_model", "actor", "critic")}
    feat, _ = update_world_model(agent, random_batch())
    assert not feat.requires_grad
    assert changed(agent.world_model, before["world_model"])
    assert not changed(agent.actor, before["actor"]) and not changed(agent.critic, before["critic"])
    assert followed(agent.slow_model, slow_model, agent.world_model)
    assert not changed(agent.slow_critic, slow_critic)
    before["world_model"], slow_model = snapshot(agent.world_model), snapshot(agent.slow_model)
    update_behavior(agent, feat)
    assert not changed(agent.slow_model, slow_model)
    assert not changed(agent.world_model, before["world_model"])
    assert changed(agent.actor, before["actor"]) and changed(agent.critic, before["critic"])
    assert followed(agent.slow_critic, slow_critic, agent.critic)


@pytest.mark.parametrize("action_space", [gym.spaces.Discrete(2), gym.spaces.Box(-1, 1, (2,))])
def test_only_the_dynamics_gradient_passes_from_return_through_model_to_action(
        action_space, monkeypatch):
    """Of an actor that no log-probability and no entropy teaches."""
    monkeypatch.setattr(dreamer, "follow", lambda *args: None)  # before the gradient is taken
    for actor_grad in ("reinforce", "dynamics"):
        torch.manual_seed(0)
        agent = Agent(action_space, Config(**SMALL, entropy=0.0, actor_grad=actor_grad))
        agent.slow_model.reward_head.net[-1].weight.data.normal_(0, 0.1)
        blind = lambda policy, action: torch.zeros(action.shape[:-1])  # noqa: E731
        for kind in (Independent, StraightThrough):
            monkeypatch.setattr(kind, "log_prob", blind)
        losses = []
        monkeypatch.setattr(dreamer, "gradient_step", lambda *args, to=losses: to.append(args[2]))
        update_behavior(agent, torch.randn(6, D + Z))
        if actor_grad == "reinforce":
            assert not losses[0].abs().item() and not agent.return_range.requires_grad
        else:
            losses[0].backward()
            assert all((p.grad != 0).any() for p in agent.actor.parameters())
            moved = {name.split(".")[0] for name, p in agent.named_parameters()
                     if p.grad is not None and (p.grad != 0).any()}
            assert moved == {"actor"}  # and not the critic, whose values it climbs
        assert not agent.return_range.requires_grad


def test_the_dynamics_gradient_is_that_of_the_discounted_lambda_return(monkeypatch):
    """Against finite differences, in a dream that is smooth: Box actions, gaussian z."""
    torch.manual_seed(0)
    config = Config(**SMALL, latent="gaussian", actor_grad="dynamics", entropy=0.0)
    agent = Agent(gym.spaces.Box(-1, 1, (A,)), config).double()
    for net in (agent.slow_model.reward_head.net, agent.slow_critic.net, agent.critic.net):
        net[-1].weight.data.normal_(0, 0.1)
    agent.slow_model.cont_head[-1].weight.data.zero_()  # else the weights of Eq. 3.3 move, too
    agent.actor.net[-1].weight.data.zero_()  # no gradient passes the state that the actor sees
    weight, losses = agent.actor.net[-1].bias, []
    start = torch.randn(5, D + S, dtype=torch.float64)
    monkeypatch.setattr(dreamer, "gradient_step", lambda agent, part, loss:
                        losses.append(loss) if part == "actor" else None)
    monkeypatch.setattr(dreamer, "return_scale", lambda *args: torch.tensor(1.0))
    monkeypatch.setattr(torch.Tensor, "clamp", lambda x, *args, **kw: x if x.shape[-1] == A
                        else torch.clip(x, *args, **kw))  # of actions: it has a kink

    def actor_loss():
        torch.manual_seed(1)
        update_behavior(agent, start)
        return losses[-1]

    monkeypatch.setattr(dreamer, "follow", lambda *args: None)
    (gradient,) = torch.autograd.grad(actor_loss(), weight)
    for i in range(len(weight)):
        ends = []
        for step in (1e-5, -1e-5):
            weight.data[i] += step
            ends.append(actor_loss().item())
            weight.data[i] -= step
        assert gradient[i].item() == pytest.approx((ends[0] - ends[1]) / 2e-5, rel=1e-3), i
        assert abs(gradient[i].item()) > 1e-6


def test_the_slow_model_acts_and_dreams(agent):
    feat = torch.randn(4, D + Z)
    for p in agent.world_model.parameters():
        p.data.fill_(np.nan)
    _, (state, _) = agent.act(np.zeros((64, 64, 3), np.uint8))
    metrics = update_behavior(agent, feat)
    assert torch.isfinite(state).all() and np.isfinite([float(x) for x in metrics.values()]).all()


def test_dreams_start_from_different_states_of_the_batch(agent, monkeypatch):
    states = torch.arange(24 * (D + Z)).view(3, 8, D + Z).float()
    monkeypatch.setattr(agent.world_model, "loss", lambda batch: (torch.zeros(()), states, {}))
    monkeypatch.setattr(dreamer, "gradient_step", lambda *args: 0)
    drawn = []
    for starts in (5, 5, 24, 100):  # at most as many as there are
        agent.config.starts = starts
        feat, _ = update_world_model(agent, {})
        assert feat.shape == (min(starts, 24), D + Z)
        rows = feat[:, 0].int() // (D + Z)
        assert torch.equal(feat, states.flatten(0, 1)[rows]) and len(rows.unique()) == len(rows)
        drawn.append(rows.tolist())
    assert drawn[0] != drawn[1]


@pytest.mark.parametrize("actor_grad", ["reinforce", "dynamics"])
def test_a_step_of_one_part_moves_no_other_though_all_share_an_optimizer(
        agent, actor_grad, monkeypatch):
    agent.config.actor_grad = actor_grad
    for _ in range(2):  # now every part has moments that an optimizer could go on with
        feat, _ = update_world_model(agent, random_batch())
        update_behavior(agent, feat)
    steps, step = [], dreamer.gradient_step

    def watched(agent, part, loss):
        before = {name: snapshot(module) for name, module in agent.named_children()}
        norm = step(agent, part, loss)
        steps.append((part, {n for n, x in before.items() if changed(getattr(agent, n), x)}))
        return norm

    monkeypatch.setattr(dreamer, "gradient_step", watched)
    feat, _ = update_world_model(agent, random_batch())
    update_behavior(agent, feat)
    assert steps == [(part, {part}) for part in ("world_model", "actor", "critic")]


# Section 4: training loop
def episode(env, actions):
    """The rows of an episode of given actions."""
    env.reset(seed=0)
    rows = [env.row]
    for action in actions:
        env.step(action)
        rows.append(env.row)
    return rows


def test_rows_hold_the_action_that_led_to_their_frame():
    rows = episode(PixelEnv("Counting-v0"), [5, 7, 6, 5])
    assert [row["is_last"] for row in rows] == [False, False, False, False, True]
    assert [round(row["obs"].mean() / 10) for row in rows] == [0, 1, 2, 3, 4]
    assert [row["reward"] for row in rows] == [0, 1, 2, 3, 4]
    assert [row["prev_action"].tolist() for row in rows] == [
        [0, 0, 0], [1, 0, 0], [0, 0, 1], [0, 1, 0], [1, 0, 0]]
    assert [row["is_first"] for row in rows] == [True, False, False, False, False]
    assert [row["terminated"] for row in rows] == [False, False, False, False, True]


def test_replay_keeps_the_action_that_the_actor_chose_not_the_clipped_one():
    env = PixelEnv("Pendulum-v1")
    rows = episode(env, [np.array([1.5], np.float32)])
    assert rows[1]["prev_action"] == 1.5 and env.unwrapped.last_u == pytest.approx(2.0)


def test_the_policy_sees_each_frame_once_and_gets_its_state_back():
    seen = []

    class Watched:
        def act(self, obs, state=None):
            count = 0 if state is None else state[0].item()
            seen.append((round(obs.mean() / 10), count))
            return 5, (torch.tensor(count + 1), None)

    assert len(play(Watched(), PixelEnv("Counting-v0"), seed=0)) == 5
    assert seen == [(0, 0), (1, 1), (2, 2), (3, 3)]


@pytest.mark.parametrize("env_id, ends", [("Counting-v0", True), ("Truncated-v0", False)])
def test_truncation_keeps_continue_at_one(agent, env_id, ends):
    rows = episode(PixelEnv(env_id), [5, 5, 5, 5])
    batch = {name: x[None] for name, x in dreamer.stack_rows(rows, "cpu").items()}
    batch["prev_action"] = batch["prev_action"][..., :A]
    head = agent.world_model.cont_head[-1]
    head.weight.data.zero_()
    head.bias.data.fill_(5.0)  # it says: the episode goes on, with probability sigmoid(5)
    *_, metrics = agent.world_model.loss(batch)
    goes_on, stops = np.log1p(np.exp(-5)), np.log1p(np.exp(5))
    expected = (4 * goes_on + (stops if ends else goes_on)) / 5
    assert metrics["wm/cont"].item() == pytest.approx(expected, rel=1e-5)


def test_updates_start_after_the_prefill_and_keep_their_ratio():
    config = Config(prefill=100, steps=200, pretrain=10, batch_size=2, batch_length=8,
                    train_ratio=4.0)  # a quarter of an update for each step
    due = [dreamer.updates_due(config, step) for step in (99, 100, 103, 104, 200, 250)]
    assert due == [0, 10, 10, 11, 35, 35]


def test_an_episode_is_random_or_the_agents_from_its_first_step_on(tmp_path, monkeypatch):
    begun, acted, act, reset = [], [], Agent.act, PixelEnv.reset

    def watched_act(agent, obs, state=None, explore=False):
        if explore:
            acted.append((len(begun), state is None))
        return act(agent, obs, state, explore)

    def watched_reset(env, **options):
        begun.append(options)
        return reset(env, **options)

    monkeypatch.setattr(Agent, "act", watched_act)
    monkeypatch.setattr(PixelEnv, "reset", watched_reset)
    monkeypatch.setattr(dreamer, "evaluate", lambda *args: {})
    train(Config(**SMALL, steps=150, runs=str(tmp_path)))
    first = {}
    for number, without_state in acted:
        first.setdefault(number, without_state)
    assert first and all(first.values())  # the first step of each of its episodes, and no later one
    assert sum(without_state for _, without_state in acted) == len(first)


def test_the_learning_rate_falls_to_zero_in_the_last_third(tmp_path, monkeypatch):
    rates = {}

    def watched(agent, batch):
        rates[len(rates)] = [group["lr"] for group in agent.optimizer.param_groups]
        return update_world_model(agent, batch)

    monkeypatch.setattr(dreamer, "update_world_model", watched)
    monkeypatch.setattr(dreamer, "evaluate", lambda *args: {})
    config = Config(**SMALL, steps=150, runs=str(tmp_path), lr=0.01)
    train(config)
    for update, rate in rates.items():
        step = next(step for step in range(151) if dreamer.updates_due(config, step) > update)
        expected = pytest.approx(0.01 if step <= 100 else 0.01 * (150 - step) / 50)
        assert rate == [expected]
    assert len(rates) == 65


def lines_of(folder):
    lines = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    return [{k: v for k, v in line.items() if not k.startswith("time/")} for line in lines]


def weights_of(folder):
    return dreamer.read_checkpoint(folder)["agent"]


def same_run(a, b):
    assert lines_of(a) == lines_of(b)
    for (name, x), y in zip(weights_of(a).items(), weights_of(b).values(), strict=True):
        assert torch.equal(x, y), name


@pytest.fixture(scope="module")
def undisturbed(tmp_path_factory):
    runs = str(tmp_path_factory.mktemp("undisturbed"))
    return train(Config(**SMALL, steps=160, device="cpu", runs=runs))


def test_same_seed_same_metrics_and_checkpoint_round_trip(undisturbed, tmp_path):
    again = train(Config(**SMALL, steps=160, device="cpu", runs=str(tmp_path)))
    other = train(Config(**SMALL, steps=61, device="cpu", runs=str(tmp_path), seed=1))
    same_run(undisturbed, again)
    assert lines_of(other)[0]["env/return"] != lines_of(again)[0]["env/return"]
    agent = load_agent(undisturbed / "checkpoint.pt.gz", "cpu")
    for name, x in agent.state_dict().items():
        assert torch.equal(x, weights_of(again)[name]), name
    metrics = evaluate(agent, 1, seed=0)
    assert metrics == {key: lines_of(again)[-1][key] for key in metrics}


def test_every_task_and_preset_has_settings_that_are_allowed():
    for env in ("CartPole-v1", *dreamer.SETTINGS):
        for preset in ("v1", "v2", "v3"):
            config = dreamer.settings(env, preset)
            assert (config.env, config.preset) == (env, preset)
    assert dreamer.settings() == Config()
    v1 = dreamer.settings(preset="v1")  # system 002 of the lesson
    assert (v1.groups, v1.hidden, v1.horizon, v1.gamma, v1.lam) == (30, 200, 15, 0.99, 0.95)
    assert v1.scale_dyn == v1.scale_rep == 1.0


def test_the_command_line_wins_over_preset_and_preset_over_task(monkeypatch):
    configs = []
    monkeypatch.setattr(dreamer, "train", configs.append)
    monkeypatch.setitem(dreamer.SETTINGS, "Corridor-v0", dict(horizon=7, hidden=64, gamma=0.9))
    argv = ["--env", "Corridor-v0", "--preset=v1", "--gamma", "0.5", "--latent", "categorical"]
    assert dreamer.main(argv) == 0 and dreamer.main(["--env", "Corridor-v0"]) == 0
    first, second = configs
    assert (first.horizon, first.hidden, first.gamma) == (7, 200, 0.5)
    assert (first.latent, first.actor_grad) == ("categorical", "dynamics")
    assert (second.horizon, second.hidden, second.gamma) == (7, 64, 0.9)
    assert second.actor_grad == "reinforce"


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("env, preset", [("CartPole-v1", "v1"), ("Pendulum-v1", "v1"),
                                         ("CartPole-v1", "v2"), ("Pendulum-v1", "v2")])
def test_each_preset_trains_resumes_exactly_and_evaluates(env, preset, tmp_path, monkeypatch):
    def stopping(agent, batch):
        if len(losses) == 50:
            raise KeyboardInterrupt
        losses.append(update_world_model(agent, batch))
        return losses[-1]

    small = {**SMALL, "steps": 200, "eval_every": 1000, "save_every": 0.0, "device": "cpu",
             "action_repeat": 2}  # so that an episode of Pendulum ends before the run is stopped
    config = vars(dreamer.settings(env, preset)) | small
    folder = train(Config(**config | {"runs": str(tmp_path / "whole")}))
    losses, config = [], Config(**config | {"runs": str(tmp_path)})
    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(dreamer, "update_world_model", stopping)
        train(config)
    stopped = tmp_path / f"{env}-0"
    assert 0 < dreamer.read_checkpoint(stopped)["progress"][0] < 200
    same_run(folder, train(config, stopped))
    metrics = evaluate(load_agent(folder, "cpu"), episodes=2)
    assert np.isfinite(list(metrics.values())).all() and "eval/trajectory_entropy" in metrics


def test_lines_come_at_the_end_of_the_episode_that_passes_their_step(undisturbed):
    lines = lines_of(undisturbed)
    steps = [line["env/step"] for line in lines]
    assert steps[-1] >= 160 and lines[-1]["wm/updates"] == 5 + (160 - 60) * 16 // 24
    pairs = list(zip([0, *steps[:-1]], steps, strict=True))
    assert len(steps) > 2 and all(y // 50 > x // 50 for x, y in pairs[:-1])  # log_every
    for (x, y), line in zip(pairs, lines, strict=True):
        assert ("eval/return" in line) == (y // 100 > x // 100 or y >= 160)  # eval_every


def test_a_line_is_the_mean_since_the_one_before(tmp_path, monkeypatch):
    monkeypatch.setattr(dreamer.Figure, "savefig", DRAW)
    dreamer.Log(tmp_path).write(5, 1, 0)  # before the first update there is little to draw
    log = dreamer.Log(tmp_path)
    log.add({"wm/recon": torch.tensor(1.0)})
    log.add({"wm/recon": 2.0, "env/return": 5.0})
    log.write(10, 1, 2)
    log.add({"wm/recon": torch.tensor(7.0)})
    log.write(20, 2, 4)
    first, second = lines_of(tmp_path)
    assert first == {"env/step": 10, "env/episodes": 1, "wm/updates": 2, "wm/recon": 1.5,
                     "env/return": 5.0}
    assert second["wm/recon"] == 7.0 and "env/return" not in second
    assert (tmp_path / "curves.png").read_bytes()[:4] == b"\x89PNG"


def test_evaluation_is_a_function_of_its_seed_and_leaves_the_random_state():
    agent = Agent(gym.spaces.Discrete(2), Config(**SMALL))
    torch.manual_seed(1)
    state = torch.get_rng_state()
    assert evaluate(agent, 2, seed=5) == evaluate(agent, 2, seed=5) != evaluate(agent, 2, seed=6)
    assert torch.equal(torch.get_rng_state(), state)


def test_an_evaluation_of_no_episodes_is_refused(agent):
    with pytest.raises(DreamerError, match="at least 1, not 0"):
        evaluate(agent, 0)


def test_continuous_actions_train_in_a_full_buffer(tmp_path):
    config = dict(SMALL, env="Pendulum-v1", action_repeat=2, steps=120, capacity=70)
    agent = load_agent(train(Config(**config, runs=str(tmp_path))))
    env = PixelEnv("Pendulum-v1")
    action, _ = agent.act(env.reset(seed=0)[0])
    assert env.action_space.contains(action)
    assert len(dreamer.read_checkpoint(tmp_path / "Pendulum-v1-0")["rows"]["obs"]) == 70


def flags(options):
    return [x for k, v in options.items() for x in (f"--{k.replace('_', '-')}", str(v))]


def test_a_run_from_the_command_line_leaves_every_file_and_explained_metrics(tmp_path):
    command = [sys.executable, str(HERE / "dreamer.py")]
    run = subprocess.run([*command, "--device", "cpu", "--steps", "160", *flags(SMALL)],
                         cwd=tmp_path, capture_output=True, text=True)
    assert run.returncode == 0, run.stderr
    folder = tmp_path / "runs" / "CartPole-v1-0"
    assert f'--resume "{folder.relative_to(tmp_path)}"' in run.stdout
    files = {"config.json", "metrics.jsonl", "curves.png", "checkpoint.pt.gz"}
    assert {path.name for path in folder.iterdir()} == files
    assert "Traceback" not in run.stderr and "Warning" not in run.stderr
    assert "100%" in run.stderr  # the progress bar counted all that was to be done
    assert json.loads((folder / "config.json").read_text())["steps"] == 160
    keys = {key for line in lines_of(folder) for key in line}
    assert {k.split("/")[0] for k in keys} == {"env", "wm", "ac", "eval"}
    assert not [key for key in keys if f"`{re.sub('_[0-9]+$', '_k', key)}`" not in README]
    again = subprocess.run([*command, "--eval", str(folder), "--episodes", "2"],
                           capture_output=True, text=True)
    assert again.returncode == 0, again.stderr
    assert json.loads(again.stdout) == evaluate(load_agent(folder, "cpu"), 2, 0)


BAD_INPUT = [
    (["--stepz", "3"], "Unrecognized options: --stepz"),
    (["--steps", "many"], "invalid literal for int"),
    (["--device", "tpu"], "Expected one of ('auto', 'cpu', 'cuda')"),
    (["--eval", ".", "--held-out", "9"], "Unrecognized options: --held-out"),
    (["--resume", ".", "--gamma", "0.9"], "Unrecognized options: --gamma"),
    (["--steps", "0"], "steps must lie between 1 and 1000000000, not 0"),
    (["--gamma", "1.5"], "gamma must lie between 0 and 1, not 1.5"),
    (["--steps", "1000"], "steps (1000) must exceed prefill (1500)"),
    (["--lr", "nan"], "lr must lie between 0 and"),
    (["--batch-length", "64", "--prefill", "10"], "batch_length must not exceed prefill"),
    (["--env", "CartPol-v1"], "Did you mean: `CartPole`?"),
    (["--env", "no_such_module:Thing-v0"], "No module named 'no_such_module'"),
    (["--env", "Blind-v0"], "Blind-v0"),
    (["--env", "Broken-v0"], "no display, no luck"),
    (["--env", "Buttons-v0"], "neither Discrete nor a bounded Box"),
    (["--eval", "nowhere"], "nowhere holds no checkpoint"),
    (["--eval", ""], "holds no checkpoint"),
    (["--eval", "whole", "--episodes", "0"], "episodes must be at least 1"),
    (["--resume", ""], "holds no checkpoint"),
    (["--resume", "whole", "--steps", "3"], "steps (3) must exceed prefill (60)"),
    (["--resume", "whole/checkpoint.pt.gz"], "holds no checkpoint"),
    (["--hidden", "1000000000"], "networks on --device cpu: "),
    (["--eval", "broken.pt"], "broken.pt holds no checkpoint"),
    (["--eval", "foreign.pt"], "foreign.pt holds no checkpoint"),
    (["--runs", "."], "exists: --resume or delete it, or change --seed or --runs"),
    (["--runs", "broken.pt"], "broken.pt"),
]


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    runs = str(tmp_path_factory.mktemp("whole"))
    return train(Config(**SMALL, steps=61, device="cpu", runs=runs))


@pytest.mark.parametrize("argv, message", BAD_INPUT, ids=[" ".join(argv) for argv, _ in BAD_INPUT])
@pytest.mark.filterwarnings("ignore")
def test_bad_input_ends_in_a_clear_message(argv, message, whole, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    Path("broken.pt").write_bytes(b"PK\x03\x04 not really")
    torch.save({"weights": torch.zeros(3)}, "foreign.pt")
    shutil.copytree(whole, "CartPole-v1-0")
    shutil.copytree(whole, "whole")
    before = {path: path.is_file() and path.read_bytes() for path in tmp_path.rglob("*")}
    try:
        code = dreamer.main(argv)
    except SystemExit as stop:
        code = stop.code
    error = " ".join(re.sub("[│╭╮╰╯─]", " ", capsys.readouterr().err).split())
    assert code == 2 and message in error and "Traceback" not in error
    after = {path: path.is_file() and path.read_bytes() for path in tmp_path.rglob("*")}
    assert after == before  # nothing written, nothing overwritten


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a CUDA device")
def test_cuda_where_there_is_none_is_refused(tmp_path, capsys):
    assert dreamer.main(["--device", "cuda", "--runs", str(tmp_path / "r")]) == 2
    assert "networks on --device cuda: " in capsys.readouterr().err


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
def test_a_cuda_run_trains_and_its_checkpoint_loads_on_the_cpu(tmp_path):
    folder = train(Config(**SMALL, steps=120, runs=str(tmp_path), device="cuda"))
    assert load_agent(folder, "cpu").act(np.zeros((64, 64, 3), np.uint8))[0] in (0, 1)


def test_help_explains_every_option_with_its_default(capsys):
    with pytest.raises(SystemExit) as stop:
        dreamer.main(["--help"])
    text = " ".join(capsys.readouterr().out.replace("│", " ").split())
    assert stop.value.code == 0 and "--resume RUN" in text and "--eval RUN" in text
    for name in vars(Config()):
        option, default = name.replace("_", "-"), re.escape(str(getattr(Config, name)))
        assert re.search(rf"--{option} \S+ \S[^(]+\(default: {default}\)", text), name


@pytest.mark.skipif(os.name != "posix", reason="POSIX signals")
def test_a_process_that_has_rendered_obeys_kill():
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


def test_the_file_can_be_read_in_one_sitting():
    assert len((HERE / "dreamer.py").read_text(encoding="utf-8").splitlines()) <= 850


# Section 4.4: nothing is lost
ON_POSIX = pytest.mark.skipif(os.name != "posix", reason="needs fork and POSIX signals")


def in_child(*argv, after=None, number=None, limit=None):
    """dreamer.main(argv) in a child process, which a signal may stop -> exit code, its output."""
    reader, writer = os.pipe()
    child = os.fork()
    if child == 0:
        os.close(reader)
        # tqdm's own lock is shared with forks: a child killed while it holds it stops all others
        dreamer.tqdm.set_lock(threading.RLock())
        signal.alarm(300)  # a child that hangs fails its test
        sys.stdout = sys.stderr = os.fdopen(writer, "w", buffering=1)
        signal.signal(signal.SIGINT, signal.default_int_handler)
        if limit:
            import resource  # POSIX alone has it

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
            os.read(reader, 1)  # the first line stands: the run has begun, and can be resumed
        time.sleep(after)
        os.kill(child, number)
    with open(reader, errors="replace") as file:
        output = file.read()
    return os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]), output


@ON_POSIX
def test_twenty_kills_in_a_row_change_nothing(tmp_path):
    config = SMALL | dict(device="cpu", steps=160, log_every=10, save_every=0.0)
    undisturbed = train(Config(**config, runs=str(tmp_path / "undisturbed")))
    argv, folder = flags(config | {"runs": tmp_path}), tmp_path / "CartPole-v1-0"
    chance, steps, patience = np.random.default_rng(0), set(), 1.2
    for _ in range(20):
        code, output = in_child(*argv, after=chance.uniform(0.1, patience), number=signal.SIGKILL)
        assert code in (-signal.SIGKILL, 0), output
        if (folder / "checkpoint.pt.gz").exists():
            argv = ["--resume", str(folder)]
            steps.add(dreamer.read_checkpoint(folder)["progress"][0])
        patience *= 1.0 if len(steps) > 1 else 1.2  # a busy machine may get nowhere so soon
    assert in_child(*argv)[0] == 0 and len(steps) > 1
    same_run(undisturbed, folder)


@ON_POSIX
@pytest.mark.parametrize("number, code", [(signal.SIGINT, 130), (signal.SIGTERM, -signal.SIGTERM)])
def test_ctrl_c_and_kill_end_at_once_and_change_nothing(number, code, undisturbed, tmp_path):
    folder = tmp_path / "CartPole-v1-0"
    argv = ["--device", "cpu", "--steps", "160", "--runs", str(tmp_path), *flags(SMALL)]
    stopped, output = in_child(*argv, after=1.0, number=number)
    assert stopped == code and f'--resume "{folder}"'[1:] in output
    if number == signal.SIGINT:
        assert output.splitlines()[-1].startswith("dreamer.py: stopped")
    assert in_child("--resume", str(folder))[0] == 0
    same_run(undisturbed, folder)


@ON_POSIX
def test_a_finished_run_goes_on_with_more_steps_from_where_it_was(tmp_path):
    folder = train(Config(**SMALL, steps=100, device="cpu", runs=str(tmp_path)))
    before = lines_of(folder)
    assert dreamer.main(["--resume", str(folder)]) == 0  # there is nothing left to do
    assert lines_of(folder) == before
    assert dreamer.main(["--resume", str(folder), "--steps", "150"]) == 0
    after = lines_of(folder)
    assert after[: len(before)] == before and after[-1]["env/step"] >= 150
    assert after[-1]["wm/updates"] == 5 + (150 - 60) * 16 // 24
    assert json.loads((folder / "config.json").read_text())["steps"] == 150


def test_a_checkpoint_that_takes_long_is_followed_by_twenty_times_as_long_without(
    agent, tmp_path, monkeypatch
):
    def slow(state, file):
        time.sleep(0.2)

    monkeypatch.setattr(dreamer.torch, "save", slow)
    agent.config.save_every = 1.0
    due = dreamer.save_checkpoint(agent, ReplayBuffer(5), dreamer.Log(tmp_path), 0, 0, 0)
    assert 4 <= due - time.monotonic() < 6
    agent.config.save_every = 60.0
    due = dreamer.save_checkpoint(agent, ReplayBuffer(5), dreamer.Log(tmp_path), 0, 0, 0)
    assert 59 < due - time.monotonic() <= 60


def test_a_damaged_checkpoint_is_recognised(whole, tmp_path):
    path = tmp_path / "checkpoint.pt.gz"
    good, chance = (whole / path.name).read_bytes(), np.random.default_rng(0)
    for _ in range(15):
        path.write_bytes(good[: chance.integers(len(good))])
        with pytest.raises(DreamerError, match="holds no checkpoint that can be used"):
            load_agent(tmp_path)
    recognised = 0
    for _ in range(40):
        damaged = bytearray(good)
        damaged[chance.integers(len(good))] ^= 1 << chance.integers(8)
        path.write_bytes(damaged)
        try:
            weights = weights_of(tmp_path)  # what was hit means nothing, such as a time stamp
            assert all(torch.equal(x, weights_of(whole)[k]) for k, x in weights.items())
        except DreamerError:
            recognised += 1
    assert recognised >= 35


def test_a_checkpoint_runs_no_code(tmp_path):
    class Trap:
        def __reduce__(self):
            return (Path.touch, (tmp_path / "sprung",))

    with dreamer.gzip.open(tmp_path / "checkpoint.pt.gz", "wb") as file:
        torch.save({"config": {}, "agent": Trap()}, file)
    with pytest.raises(DreamerError, match="holds no checkpoint"):
        load_agent(tmp_path)
    assert not (tmp_path / "sprung").exists()


def test_a_run_killed_before_its_first_checkpoint_starts_again(tmp_path, undisturbed):
    config = Config(**SMALL, steps=160, device="cpu", runs=str(tmp_path))
    folder = tmp_path / "CartPole-v1-0"
    folder.mkdir()
    (folder / "config.json").write_text("{")
    (folder / "new.pt.gz").write_bytes(b"half")
    same_run(undisturbed, train(config))
    with pytest.raises(DreamerError, match="exists: --resume or delete it"):
        train(config)


@ON_POSIX
def test_a_full_disk_ends_in_one_line_and_keeps_the_checkpoint(tmp_path):
    folder = train(Config(**SMALL, steps=70, device="cpu", runs=str(tmp_path)))
    before, size = weights_of(folder), (folder / "checkpoint.pt.gz").stat().st_size
    code, output = in_child("--resume", str(folder), "--steps", "100", limit=size // 2)
    assert code == 2 and "dreamer.py: error: " in output and "too large" in output.lower()
    assert all(torch.equal(x, weights_of(folder)[name]) for name, x in before.items())
    assert in_child("--resume", str(folder), "--steps", "100")[0] == 0


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
            return frame[..., :2].repeat(3, 2)
        return frame.astype(np.float32) if self.t == 3 and self.fault == "type" else frame


FAULTS = {"reward": "the reward is nan", "raises": "a wheel came off",
          "shape": "Cannot handle this data type", "type": "Cannot handle this data type"}
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


def test_a_loss_that_is_not_finite_stops_before_any_weight_is_touched(agent):
    agent.world_model.decoder.requires_grad_(False)
    for p in agent.world_model.decoder.parameters():
        p.fill_(np.nan)
    before = {k: v.clone() for k, v in agent.state_dict().items()}
    with pytest.raises(DreamerError, match="the loss of the world_model is nan"):
        update_world_model(agent, random_batch())
    for name, x in agent.state_dict().items():
        assert torch.equal(x, before[name]) or before[name].isnan().all(), name


def test_a_gradient_that_is_not_finite_stops_the_run(tmp_path, monkeypatch):
    def poisoned(agent, batch):
        agent.world_model.decoder[0].weight.register_hook(lambda gradient: gradient * np.inf)
        try:
            return update_world_model(agent, batch)
        finally:
            after.append({k: v.clone() for k, v in agent.state_dict().items()})

    after = []
    monkeypatch.setattr(dreamer, "update_world_model", poisoned)
    with pytest.raises(DreamerError, match="loss of the world_model is .*, its gradient's norm "):
        train(Config(**SMALL, steps=100, runs=str(tmp_path), device="cpu"))
    untouched = weights_of(tmp_path / "CartPole-v1-0")  # the checkpoint from before
    assert all(torch.equal(v, untouched[k]) for k, v in after[-1].items())


class Window(Counting):
    """Counts how many of it are open: a renderer left to the interpreter's end may raise there."""

    opened = set()

    def __init__(self, render_mode=None):
        super().__init__(render_mode, length=20)
        self.opened.add(id(self))

    def close(self):
        self.opened.discard(id(self))


gym.register("Window-v0", Window)


def test_every_environment_is_closed(tmp_path):
    folder = train(Config(**SMALL, env="Window-v0", steps=61, runs=str(tmp_path)))
    evaluate(load_agent(folder), episodes=1)
    assert not Window.opened


class Filmed(Counting):
    """Has a camera, as DeepMind Control has by Shimmy."""

    def __init__(self, render_mode=None, render_kwargs=None):
        super().__init__(render_mode)
        self.render_kwargs = render_kwargs or {}


gym.register("Filmed-v0", Filmed)
gym.register("Filmed-from-the-side-v0", Filmed, kwargs={"render_kwargs": {"camera_id": 2}})


def test_a_camera_is_number_0_unless_the_environment_says_which():
    assert PixelEnv("Filmed-v0").unwrapped.render_kwargs == {"camera_id": 0}
    assert PixelEnv("Filmed-from-the-side-v0").unwrapped.render_kwargs == {"camera_id": 2}


def test_memory_that_the_machine_has_not_got_ends_in_one_line(tmp_path, monkeypatch, capsys):
    def greedy(batch_size, length):
        raise MemoryError("Unable to allocate 9 TiB")

    monkeypatch.setattr(ReplayBuffer, "sample", lambda *args: greedy(*args[1:]))
    assert dreamer.main(["--runs", str(tmp_path), *flags(SMALL)]) == 2
    assert capsys.readouterr().err.strip().endswith("error: Unable to allocate 9 TiB")


def test_an_error_without_a_message_is_called_by_its_name(monkeypatch, capsys):
    with pytest.raises(DreamerError, match=r"^here: AssertionError\(\)$"), dreamer.explain("here"):
        raise AssertionError

    def greedy(*args):
        raise MemoryError

    monkeypatch.setattr(dreamer, "train", greedy)
    assert dreamer.main([]) == 2
    assert capsys.readouterr().err.strip() == "dreamer.py: error: MemoryError()"


def test_a_checkpoint_of_other_networks_ends_in_one_line(undisturbed, monkeypatch, capsys):
    def deeper(*sizes, layers):
        return dreamer.TwoHotHead(*sizes, layers + 1)

    monkeypatch.setattr(dreamer, "Critic", deeper)
    assert dreamer.main(["--eval", str(undisturbed), "--device", "cpu"]) == 2
    assert f"error: the agent of {undisturbed}: Error(s) in loading" in capsys.readouterr().err


def test_rows_of_a_resumed_run_are_freed_one_by_one(undisturbed):
    agent, replay = load_agent(undisturbed, "cpu"), ReplayBuffer(1_000)
    dreamer.load_checkpoint(agent, replay, dreamer.Log(undisturbed))
    assert replay.rows and all(x.base is None for row in replay.rows for x in row.values())


# Section 5: self-evaluation metrics
def test_correlation_is_pearsons_and_nan_without_variance():
    real = torch.tensor([[1.0, 2.0], [4.0, 3.0], [0.0, 5.0]])  # [H,N]
    known = torch.ones(3, 2, dtype=torch.bool)
    same = dreamer.reward_correlation(3 * real + 2, real, known, 0.5)
    assert same == {"reward_rho": pytest.approx(1), "return_rho": pytest.approx(1)}
    opposite = dreamer.reward_correlation(-real, real, known, 0.5)
    assert opposite == {"reward_rho": pytest.approx(-1), "return_rho": pytest.approx(-1)}
    dreamed = torch.tensor([[2.0, 1.0], [3.0, 3.0], [1.0, 0.0]])
    expected = np.corrcoef(dreamed.flatten(), real.flatten())[0, 1]
    rho = dreamer.reward_correlation(dreamed, real, known, 0.5)
    assert rho["reward_rho"] == pytest.approx(expected)
    returns = [[1 + 4 / 2, 2 + 3 / 2 + 5 / 4], [2 + 3 / 2 + 1 / 4, 1 + 3 / 2]]
    assert np.diff(returns)[0] > 0 > np.diff(returns)[1]
    assert rho["return_rho"] == pytest.approx(-1)
    known[1:, 0] = False  # one dream is known for its first step only
    rho = dreamer.reward_correlation(dreamed, real, known, 0.5)
    expected = np.corrcoef(dreamed[known], real[known])[0, 1]
    assert rho["reward_rho"] == pytest.approx(expected) and np.isnan(rho["return_rho"])
    for n in range(2, 60):  # a mean that is rounded must not look like variance
        still = torch.full((1, n), 0.1)
        known = torch.ones(1, n, dtype=torch.bool)
        rho = dreamer.reward_correlation(torch.arange(float(n))[None], still, known, 1.0)
        assert np.isnan(rho["reward_rho"]) and np.isnan(rho["return_rho"])


class Perfect:
    """An agent whose model knows the Counting environment: h is the time, the frame is 10 h."""

    LENGTH = 8

    def __init__(self, horizon=5):
        self.config = Config(horizon=horizon, gamma=0.9, device="cpu")
        self.actor = lambda feat: StraightThrough(logits=torch.zeros(*feat.shape[:-1], 3))
        self.slow_model = self.rssm = self
        self.encoder = lambda obs: (obs[..., 0, 0, :1] / 10).round()  # scaling rounds, too
        self.decoder = lambda feat: (feat[..., :1, None, None] * 10 / 255).expand(
            *feat.shape[:-1], 64, 64, 3)

    def observe(self, embed, prev_action, is_first):
        return torch.cat([embed, 0 * embed], -1), None, None

    def img_step(self, feat, action):
        return torch.stack([feat[:, 0] + 1, action.argmax(-1).float()], -1)

    def predict(self, feat):
        cont = (feat[..., 0] != self.LENGTH).float()
        cont[0] = torch.linspace(0.1, 0.9, cont.shape[1])  # of the start itself: no account
        return feat[..., 0], cont

    def prior(self, h):
        return torch.full((2,), 0.5).expand(*h.shape[:-1], 3, 2)  # three groups


for end in ("terminated", "truncated"):
    gym.register(f"Eight-{end}-v0", Counting, kwargs={"length": Perfect.LENGTH, "ends_by": end})


def counting_rows(ends_by="terminated", episodes=12):
    env, rows = PixelEnv(f"Eight-{ends_by}-v0"), []
    for seed in range(episodes):
        env.reset(seed=seed)
        rows.append(env.row)
        while not env.row["is_last"]:
            env.step(env.action_space.sample())
            rows.append(env.row)
    return rows


@pytest.mark.filterwarnings("ignore")
def test_a_perfect_model_has_correlation_one_and_no_error():
    rows, H = counting_rows(), 5
    metrics = dreamer.dream_metrics(Perfect(H), rows)
    assert metrics["reward_rho"] == pytest.approx(1) and metrics["return_rho"] == pytest.approx(1)
    frames = np.stack([row["obs"] for row in rows[:9]]).reshape(9, -1) / 255
    for k in (1, 5):
        starts = np.arange(0, 8 * 12, 7) % 8  # every seventh row that is not terminated
        starts = starts[starts + k < 9]  # if there is a frame k steps later
        assert metrics[f"pixel_error_{k}"] < 2  # scaling rounds, by up to 1 in 255
        repeat = np.mean(np.sum((frames[starts + k] - frames[starts]) ** 2, 1))
        assert metrics[f"pixel_error_repeat_{k}"] == pytest.approx(repeat, rel=1e-4)
        mean = np.mean(np.sum((frames[starts + k] - frames.mean(0)) ** 2, 1))
        assert metrics[f"pixel_error_mean_{k}"] == pytest.approx(mean, rel=1e-4)
    assert np.isnan(metrics["pixel_error_15"])  # all have ended: there is no frame
    assert metrics["policy_entropy"] == pytest.approx(np.log(3))
    assert metrics["latent_entropy"] == pytest.approx(3 * np.log(2))
    assert metrics["trajectory_entropy"] == pytest.approx(H * (np.log(3) + 3 * np.log(2)))


@pytest.mark.filterwarnings("ignore")
def test_where_a_time_limit_cuts_nothing_is_assumed():
    agent = Perfect(5)
    agent.LENGTH = 100  # the model knows no end
    metrics = dreamer.dream_metrics(agent, counting_rows("truncated"))
    assert metrics["reward_rho"] == pytest.approx(1)  # with zeros after the cut it would not be


@pytest.mark.filterwarnings("ignore")
def test_the_dream_takes_the_actions_that_were_recorded(monkeypatch):
    rows, seen = counting_rows(), []
    monkeypatch.setattr(dreamer, "imagine", lambda *args: seen.append(args) or imagine(*args))
    dreamer.dream_metrics(Perfect(5), rows)
    start, actions = seen[0][2], seen[0][4]
    assert start[:4, 0].tolist() == [0, 7, 6, 5]  # every seventh row that is not terminated
    for n, begin in enumerate((0, 7, 9 + 6, 18 + 5)):  # an episode has nine rows
        for t in range(8 - begin % 9):
            assert actions[t, n].tolist() == rows[begin + t + 1]["prev_action"].tolist()


@pytest.mark.filterwarnings("ignore")
def test_a_model_that_sees_no_end_or_shuffled_rewards_has_less_correlation():
    agent, rows = Perfect(5), counting_rows(episodes=400)
    agent.LENGTH = 100
    assert dreamer.dream_metrics(agent, rows)["reward_rho"] < 0.5
    order = np.random.default_rng(0).permutation(len(rows))
    shuffled = [row | {"reward": rows[i]["reward"]} for row, i in zip(rows, order, strict=True)]
    assert abs(dreamer.dream_metrics(Perfect(1), shuffled)["reward_rho"]) < 0.1


def test_held_out_rows_are_of_unseen_seeds_and_random_actions_take_over(monkeypatch):
    agent, seeds, sizes = Agent(gym.spaces.Discrete(2), Config(**SMALL)), [], []

    def watched(agent, env, seed, chance=0.0):
        seeds.append((seed, chance))
        return play(agent, env, seed, chance)

    monkeypatch.setattr(dreamer, "play", watched)
    monkeypatch.setattr(dreamer, "dream_metrics", lambda agent, rows: sizes.append(len(rows)) or {})
    evaluate(agent, 3, seed=0)
    assert sizes[0] >= 160 and len({seed for seed, _ in seeds}) == len(seeds) > 3
    assert all(seed % 2 == 1 for seed, _ in seeds)
    assert [chance > 0 for _, chance in seeds] == [i >= 3 for i in range(len(seeds))]


def test_random_actions_take_over_for_fifteen_steps_and_the_agent_knows_what_was_done(monkeypatch):
    class Always:
        def act(self, obs, state=None):
            told.append(state and state[1][0].argmax().item())
            return 5, (torch.zeros(1), "what it chose")

    told, env = [], PixelEnv("Long-v0")
    chances = iter([0.9, 0.9, 0.1, *[0.9] * 17])
    monkeypatch.setattr(dreamer.torch, "rand", lambda shape: next(chances))
    rows = play(Always(), env, seed=3, chance=0.5)
    env.action_space.seed(3 + 2**40)
    expected = [5, 5, *(env.action_space.sample() for _ in range(15)), 5, 5, 5]
    assert [5 + row["prev_action"].argmax() for row in rows[1:]] == expected != 20 * [5]
    assert told == [None, *(action - 5 for action in expected[:-1])]


class Still(Counting):
    def step(self, action):
        obs, _, *rest = super().step(action)
        return obs, 1.0, *rest


gym.register("Still-v0", Still, kwargs={"ends_by": "truncated"})
gym.register("Brief-v0", Counting, kwargs={"length": 2})
gym.register("Long-v0", Counting, kwargs={"length": 20})


@pytest.mark.filterwarnings("ignore")
def test_a_metric_that_does_not_exist_is_left_out():
    metrics = evaluate(Agent(gym.spaces.Discrete(3, start=5), Config(**SMALL, env="Still-v0")), 2)
    assert "eval/reward_rho" not in metrics and "eval/latent_entropy" in metrics
    assert all(np.isfinite(value) for value in metrics.values())


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("env, held_out, horizon", [("CartPole-v1", 1, 5), ("Brief-v0", 60, 1)])
def test_the_smallest_held_out_set_does_no_harm(env, held_out, horizon):
    config = Config(**dict(SMALL, held_out=held_out, horizon=horizon), env=env)
    agent = Agent(PixelEnv(env).action_space, config)
    assert np.isfinite(list(evaluate(agent, 1).values())).all()


@pytest.fixture
def dream():
    torch.manual_seed(0)
    return DreamEnv(Agent(gym.spaces.Discrete(2), Config(**SMALL)))


@pytest.mark.filterwarnings("ignore")
def test_the_dream_is_an_environment_like_any_other(dream):
    check_env(dream, skip_render_check=True)
    env = gym.wrappers.RecordEpisodeStatistics(gym.wrappers.TimeLimit(dream, 20))
    for seed in range(3):
        env.reset(seed=seed)
        total, steps, over = 0.0, 0, False
        while not over:
            obs, reward, terminated, truncated, info = env.step(env.action_space.sample())
            total, steps, over = total + reward, steps + 1, terminated or truncated
        assert info["episode"]["r"] == pytest.approx(total) and info["episode"]["l"] == steps
        assert np.array_equal(obs, env.render())


def test_a_dream_leaves_the_random_state_and_follows_its_seed(dream):
    state, films = torch.get_rng_state(), []
    for _ in range(2):
        films.append([dream.reset(seed=3)[0], *(dream.step(1)[0] for _ in range(5))])
        torch.rand(7)
    assert np.array_equal(*films)
    torch.set_rng_state(state)
    dream.reset(seed=3)
    dream.step(0)
    assert torch.equal(torch.get_rng_state(), state)


def test_a_dream_is_reproduced_over_later_episodes_and_whatever_is_sampled(dream):
    films = []
    for samples in (0, 3):
        films.append([dream.reset(seed=3)[0]])
        for _ in range(2):
            for _ in range(samples):
                dream.action_space.sample()
            films[-1] += [dream.step(1)[0], dream.reset()[0]]  # without a seed: goes on
    assert np.array_equal(*films) and not np.array_equal(films[0][0], films[0][2])


def test_a_dream_step_is_prior_reward_head_continue_head_and_decoder(dream):
    dream.reset(seed=1)
    model, frame = dream.agent.slow_model, dream.env.row["obs"]
    assert np.array_equal(frame, PixelEnv("CartPole-v1").reset(seed=1)[0])  # a real first frame
    h = model.rssm.recur(dream.feat, torch.tensor([[0.0, 1.0]]))
    model.cont_head[-1].weight.data.zero_()
    model.cont_head[-1].bias.data.fill_(-20.0)  # the end, for certain
    obs, reward, terminated, truncated, _ = dream.step(1)
    assert torch.allclose(dream.feat[:, :D], h) and terminated and not truncated
    assert reward == model.reward_head(dream.feat).item()
    assert np.array_equal(obs, (model.decoder(dream.feat)[0].detach() * 255).byte().numpy())
    model.cont_head[-1].bias.data.fill_(20.0)
    assert not any(dream.step(0)[2] for _ in range(10))
    assert np.array_equal(frame, dream.env.row["obs"])  # and the real environment has not moved


# The README's recipes
BLOCKS = re.findall(r"```python\n(.*?)```", README, re.DOTALL)


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("number", range(len(BLOCKS)))
def test_every_python_block_of_the_readme_runs(number, undisturbed, tmp_path, monkeypatch):
    block = BLOCKS[number]
    for library in ("stable_baselines3", "jupytext"):
        if library in block:
            pytest.importorskip(library)
    if "box2d" in block:
        pytest.importorskip("Box2D")
    monkeypatch.chdir(tmp_path)
    shutil.copytree(undisturbed, "runs/CartPole-v1-0")
    torch.save(load_agent(undisturbed, "cpu").world_model.encoder.state_dict(), "encoder.pt")
    small = ", ".join(f"{name}={value!r}" for name, value in SMALL.items())
    block = block.replace("Config(", f"Config({small}, steps=61, ")  # quick, and otherwise the same
    block = re.sub(r"total_timesteps=[\d_]+", "total_timesteps=64", block)
    block = re.sub(r"n_steps=\d+", "n_steps=8", block)
    block = re.sub(r"n_eval_episodes=\d+", "n_eval_episodes=1", block)
    block = re.sub(r"eval_freq=[\d_]+", "eval_freq=4", block)
    monkeypatch.setenv("SDL_VIDEODRIVER", "dummy")
    monkeypatch.setattr("gymnasium.utils.play.play", lambda env, **options: env.reset(seed=0))
    Path("block.py").write_text(block)
    # A block may put its own heads in the place of these
    for name in ("TwoHotHead", "Critic"):
        monkeypatch.setattr(dreamer, name, getattr(dreamer, name))
    runpy.run_path("block.py")
    if "CloseUp" in block:
        env = PixelEnv("CloseUp-v0", action_repeat=2)
        frames = np.stack([env.step(0)[0] for _ in range(40)]).astype(int)  # it falls
        lander = (frames[-1, ..., 2] > 150) & (frames[-1, ..., 1] < 150)  # no ground, no sky
        assert all(abs(x.mean() - 32) < 2 for x in lander.nonzero())  # and stays in the middle
        top = env.unwrapped.view[0].start
        assert top > 0 and env.unwrapped.render().shape == (160, 160, 3)
        y = top + 2.5 * np.arange(64) + 0.75  # the middle of each line, in the task's own frame
        sky = 255 * (0.4 * y / 400 + 0.3 * np.sin(y / 12) + 0.3)
        assert np.abs(frames[-1, :20, 0, 1] - sky[:20]).max() < 4  # to a fraction of a pixel


# And all of it together
def test_it_learns_to_walk_the_corridor_from_pixels(tmp_path):
    """Random actions collect about 1 of 12; fails without world model or without actor updates."""
    config = Config(
        env="Corridor-v0", steps=1_000, prefill=400, pretrain=100, train_ratio=48, batch_size=8,
        batch_length=8, horizon=8, depth=2, hidden=32, groups=8, classes=8, units=64,
        capacity=2_000, entropy=1e-2, eval_every=1_000, held_out=50, runs=str(tmp_path))
    env = PixelEnv("Corridor-v0")
    random_returns = []
    for seed in range(40):
        env.reset(seed=seed)
        random_returns.append(0.0)
        while not env.row["is_last"]:
            env.step(env.action_space.sample())
            random_returns[-1] += env.row["reward"]
    assert np.mean(random_returns) < 3
    assert evaluate(load_agent(train(config)), 5, seed=1)["eval/return"] >= 11
