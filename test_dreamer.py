"""Tests of dreamer.py. Every name is a claim; most expected numbers are known in closed form."""

import __future__

import contextlib
import json
import math
import os
import re
import runpy
import shutil
import signal
import subprocess
import sys
import threading
import types
from pathlib import Path
from unittest.mock import Mock

import gymnasium as gym
import numpy as np
import pytest
import torch
from gymnasium.spaces import Box, Discrete, MultiDiscrete
from gymnasium.utils.env_checker import check_env
from torch.distributions import Categorical, OneHotCategorical
from torch.distributions import kl_divergence as torch_kl

import dreamer
from dreamer import RSSM, Agent, Config, PixelEnv, ReplayBuffer, evaluate, load_agent, play, train

HERE = Path(__file__).resolve().parent
README = (HERE / "README.md").read_text(encoding="utf-8")
RECIPES = sorted(x for x in (HERE / "recipes").glob("*.py") if x.name != "__init__.py")
os.environ["OMP_NUM_THREADS"] = "1"  # networks this small only wait for a second thread
torch.set_num_threads(1)
A, D, Z, S, K = 2, 16, 16, 4, 4  # the sizes of SMALL
SMALL = dict(depth=2, hidden=D, groups=S, classes=K, units=16, batch_size=3, batch_length=6)
SMALL |= dict(horizon=3, prefill=40, pretrain=3, train_ratio=6.0, posttrain=4)
SMALL |= dict(eval_every=32, episodes=1)
RUN = SMALL | dict(env="Corridor-v0", steps=96)  # 25 updates
BLACK = np.zeros((64, 64, 3), np.uint8)
BINS, twohot_encode = dreamer.TwoHotHead(1, 1, 1).bins, dreamer.twohot_encode
pytestmark = pytest.mark.filterwarnings("ignore::UserWarning")


# Environments that are known in closed form
class Corridor(gym.Env):
    """Six cells; action 1 moves right from the first, 0 left; every step into the third pays 1.
    The cell is a column whose brightness is random. 16 steps leave 8 to be had, by turning."""

    metadata = {"render_modes": ["rgb_array"], "render_fps": 10}
    observation_space = Box(0, 5, (1,))
    action_space = Discrete(2)

    def __init__(self, render_mode=None):
        self.render_mode = render_mode

    def reset(self, *, seed=None, options=None):
        super().reset(seed=seed)
        self.cell, self.light = 0, self.np_random.integers(180, 250)
        return np.array([0], np.float32), {}

    def step(self, action):
        self.cell = int(np.clip(self.cell + (1 if action == 1 else -1), 0, 5))
        return np.array([self.cell], np.float32), float(self.cell == 2), False, False, {}

    def render(self):
        frame = np.full((96, 96, 3), 30, np.uint8)
        frame[:, 16 * self.cell : 16 * (self.cell + 1)] = self.light
        return frame


class Counting(gym.Env):
    """Frame t is filled with 10 t, reward t is t; the episode ends after `length` steps."""

    metadata = {"render_modes": ["rgb_array"], "render_fps": 10}
    observation_space = Box(0, 255, (1,))
    opened = set()

    def __init__(self, render_mode=None, length=4, ends_by="terminated", space=None, gives=None):
        self.render_mode, self.length, self.ends_by = render_mode, length, ends_by
        self.action_space, self.gives = space or Discrete(3, start=5), gives or {}
        self.opened.add(id(self))

    def reset(self, *, seed=None, options=None):
        super().reset(seed=seed)
        self.t = 0
        return np.zeros(1, np.float32), {}

    def step(self, action):
        self.t, self.action = self.t + 1, action
        end = self.ends_by if self.t == self.length else None
        result = float(self.t), end == "terminated", end == "truncated"
        convert = self.gives.get("step", lambda *result: result)
        return np.zeros(1, np.float32), *convert(*result), {}

    def render(self):
        frame = np.full((80, 120, 3), 10 * self.t % 250, np.uint8)
        if self.t != self.gives.get("at", 3):
            return frame
        if "error" in self.gives:
            raise self.gives["error"]
        return self.gives.get("frame", lambda frame: frame)(frame)

    def close(self):
        self.opened.discard(id(self))


def register(name, entry=Counting, limit=None, **options):
    gym.register(f"{name}-v0", entry, max_episode_steps=limit, kwargs=options)


register("Corridor", Corridor, 16)
register("Counting")
register("Numbers", gives=dict(step=lambda r, *ends: (np.array([r]), np.bool_(ends[0]), 0)))
register("Arrays", gives=dict(step=lambda r, end, cut: (int(r), int(end), np.array([[cut]]))))
register("Truncated", ends_by="truncated")
register("Endless", length=10**9)
register("Long", length=20)
register("Ten", length=10)
register("TenCut", length=10, ends_by="truncated")
register("Box", space=Box(-2.0, 2.0, (2,), np.float64))
register("Unbounded", space=Box(-np.inf, np.inf, (2,)))
register("Buttons", space=MultiDiscrete([2, 2]))


@pytest.fixture(autouse=True, scope="module")
def curves():
    """Curves take longer to draw than a test to train: only one test, which asks, draws them."""
    dreamer.Figure = Mock(**{"return_value.subplots.return_value.flat": 8 * [Mock()]})


def new_agent(seed=0, space=None, **config):
    torch.manual_seed(seed)
    return Agent(space or Discrete(A), Config(**SMALL | {"horizon": 5} | config))


@pytest.fixture
def agent():
    return new_agent()


def lively(agent):
    """Heads that begin at zero, or nearly so, would stop gradients and hide mistakes."""
    agent.actor.net[-1].weight.data.normal_()
    for head in (agent.critic, agent.slow_critic, agent.world_model.reward_head):
        head.net[-1].weight.data.normal_(0, 0.1)
    return agent


def random_batch(B=4, T=6):
    g = torch.Generator().manual_seed(0)
    action = torch.nn.functional.one_hot(torch.randint(A, (B, T), generator=g), A).float()
    never = torch.zeros(B, T, dtype=torch.bool)
    obs = torch.randint(256, (B, T, 64, 64, 3), generator=g).to(torch.uint8)
    batch = dict(obs=obs, prev_action=action, terminated=never, is_first=never)
    batch["reward"] = torch.randn(B, T, generator=g)
    return batch | dict(prev_feat=torch.randn(B, T, D + Z, generator=g))


def snapshot(module):
    return {name: p.detach().clone() for name, p in module.state_dict().items()}


def changed(module, before):
    return {name for name, p in module.state_dict().items() if not torch.equal(p, before[name])}


def spy(monkeypatch, owner, name, note):
    function = getattr(owner, name)

    def watched(*args, **options):
        note(*args, **options)
        return function(*args, **options)

    monkeypatch.setattr(owner, name, watched)


def episode(env, actions):
    env.reset(seed=0)
    rows = [env.row]
    for action in actions:
        env.step(action)
        rows.append(env.row)
    return rows


# Section 1.1: small tools
def test_twohot_round_trips_from_minus_1e5_to_1e5_and_clamps_what_lies_outside():
    x = torch.cat([-torch.logspace(5, -3, 200), torch.zeros(1), torch.logspace(-3, 5, 200)])
    target = twohot_encode(x, BINS)
    assert target.shape == (401, 255) and ((target > 0).sum(-1) <= 2).all()
    assert torch.allclose(target.sum(-1), torch.ones(401))
    mean = (target.double() * BINS.double()).sum(-1).float()
    assert torch.allclose(mean, x, rtol=1e-4, atol=1e-6)
    assert torch.allclose(dreamer.twohot_decode(target.log(), BINS), x, rtol=1e-3, atol=1e-5)
    assert torch.equal(BINS, -BINS.flip(0)) and BINS[127] == 0
    assert torch.allclose(BINS[128:], torch.expm1(torch.arange(1, 128) * 20 / 127), rtol=1e-4)
    bins = torch.tensor([-1.0, 0.0, 1.0])
    assert twohot_encode(torch.tensor([-7.0, 9.0]), bins).tolist() == [[1, 0, 0], [0, 0, 1]]


def test_rewards_and_values_begin_at_exactly_zero_and_actions_nearly_uniform(agent):
    feat = torch.randn(3, D + Z)
    assert dreamer.twohot_decode(torch.zeros(3, 255), BINS).tolist() == [0, 0, 0]
    assert agent.critic(feat).tolist() == agent.world_model.predict(feat)[0].tolist() == [0, 0, 0]
    assert torch.allclose(agent.actor(feat).probs, torch.tensor(1 / A), atol=0.02)


@pytest.mark.parametrize("kind, sizes", [("Conv2d", (16, 64, 5)), ("Linear", (400, 64))])
def test_weights_begin_with_variance_one_over_fan_in(kind, sizes):
    layer = getattr(torch.nn, kind)(*sizes)
    dreamer.init_weights(layer)
    assert layer.weight.std().item() == pytest.approx(1 / 20, rel=0.02) and not layer.bias.any()


# Section 1.2 and 1.3: CNN and RSSM
def test_encoder_and_decoder_keep_leading_axes(agent):
    model = agent.world_model
    assert model.encoder(torch.zeros(2, 3, 64, 64, 3, dtype=torch.uint8)).shape == (2, 3, 256)
    frames = model.decoder(torch.zeros(2, 3, D + Z))
    assert frames.shape == (2, 3, 64, 64, 3) and 0 <= frames.min() and frames.max() <= 1


def test_decoder_is_three_transposed_convolutions(agent):
    """With kernel and stride 4, and a bias for each of the 4x4 pixels."""
    decoder, feat = agent.world_model.decoder, torch.randn(2, D + Z)
    x = feat[:, :, None, None]
    for layers in ([decoder[0]], decoder[1], decoder[2]):
        for layer in layers[:-1]:  # norm and SiLU
            x = layer(x.permute(0, 2, 3, 1)).permute(0, 3, 1, 2)
        weight = layers[-1].weight.T.unflatten(1, (4, 4, -1))  # [in, 4, 4, out]
        bias = torch.nn.init.normal_(layers[-1].bias).unflatten(0, (4, 4, -1))  # [4, 4, out]
        bias = bias.permute(2, 0, 1).tile(1, x.shape[-1], x.shape[-1])
        x = bias + torch.nn.functional.conv_transpose2d(x, weight.permute(0, 3, 1, 2), stride=4)
    frames = torch.sigmoid(x).permute(0, 2, 3, 1)
    assert torch.allclose(decoder(feat), frames, atol=1e-5) and frames.std() > 0.05


def test_kl_and_entropy_are_sums_over_categorical_variables(agent):
    p, q = torch.randn(2, 5, S, K).softmax(-1)
    expected = torch_kl(Categorical(probs=p), Categorical(probs=q)).sum(-1)
    assert RSSM.kl is dreamer.kl_divergence and torch.allclose(RSSM.kl(p, q), expected, atol=1e-6)
    probs = torch.tensor([0.5, 0.25, 0.25, 0.0]).expand(S, K)
    entropy = agent.world_model.rssm.entropy(probs).item()
    assert entropy == pytest.approx(S * 1.5 * math.log(2), rel=1e-5)


def test_no_class_is_less_likely_than_its_share_of_unimix_and_without_it_the_kl_stays_finite():
    first, last = torch.full((2, S, K), -1e4)
    first[:, 0], last[:, -1] = 1e4, 1e4
    for unimix in (0.01, 0.0):
        rssm = new_agent(unimix=unimix).world_model.rssm
        p, q = (rssm.params(x.flatten()).requires_grad_() for x in (first, last))
        assert p.shape == (S, K) and p.min().item() == pytest.approx(unimix / K, abs=1e-6)
        assert p.max().item() == pytest.approx(1 - unimix + unimix / K, abs=1e-6)
        kl = rssm.kl(p, q)
        gradients = torch.autograd.grad(kl, [p, q])
        assert kl.isfinite() and all(x.isfinite().all() for x in gradients)


def test_samples_are_one_hot_follow_the_probabilities_and_gradients_go_straight_through(agent):
    rssm, logits, weight = agent.world_model.rssm, torch.randn(7, Z), torch.randn(7, Z)
    probs = rssm.params(logits.requires_grad_())
    z = rssm.sample(probs)
    hot = z.detach().unflatten(-1, (S, K))
    for x in (hot.max(-1).values, hot.sum(-1)):
        assert torch.allclose(x, torch.ones(7, S), atol=1e-6)
    (gradient,) = torch.autograd.grad((z * weight).sum(), logits, retain_graph=True)
    (expected,) = torch.autograd.grad((probs.flatten(-2) * weight).sum(), logits)
    assert torch.allclose(gradient, expected, atol=1e-6)  # as if z were the probabilities
    probs = torch.tensor([0.1, 0.2, 0.3, 0.4])
    z = rssm.sample(probs.expand(20_000, S, K)).unflatten(-1, (S, K))
    assert torch.allclose(z.mean((0, 1)), probs, atol=0.01)


def test_the_recurrence_is_a_gru_with_layer_norm_that_knows_actions_as_they_are_clipped(agent):
    rssm, feat, action = agent.world_model.rssm, torch.randn(5, D + Z), 3 * torch.randn(5, A)
    h, z = feat.split([D, Z], -1)
    x = rssm.inputs(torch.cat([z, action.clip(-1, 1)], -1))
    r, c, u = rssm.gates(torch.cat([x, h], -1)).split(D, -1)
    u = 1 / (1 + torch.exp(1 - u))  # lowered by one
    expected = u * torch.tanh(r.sigmoid() * c) + (1 - u) * h
    assert torch.allclose(rssm.recur(feat, action), expected, atol=1e-6)


def test_acting_and_observe_reach_the_same_state_on_the_same_history(agent):
    frames, state, acted, actions = random_batch(1, 6)["obs"], None, [], [torch.zeros(A)]
    zs = torch.eye(K)[torch.randint(K, (6, S))].flatten(-2)  # the samples, one a step
    drawn = iter([*zs[:, None], *zs[:, None]])
    lively(agent).world_model.rssm.sample = lambda probs: next(drawn)
    for t in range(6):
        action, state = agent.act(frames[0, t].numpy(), state, explore=t > 2)
        acted.append(state[0][0])
        actions.append(torch.eye(A)[action])
    first = torch.tensor([[True] + 5 * [False]])
    embed = agent.world_model.encoder(frames)
    inputs = embed, torch.stack(actions[:6])[None], first
    feat, *_ = agent.world_model.rssm.observe(*inputs, torch.randn(1, D + Z))
    assert torch.allclose(torch.stack(acted), feat[0], atol=1e-5)


def test_exploration_draws_from_the_actor_and_evaluation_takes_the_most_likely(agent):
    agent.actor.net[-1].bias.data[1] = 0.3
    drawn = [{agent.act(BLACK, explore=x)[0] for _ in range(30)} for x in (False, True)]
    assert drawn == [{1}, {0, 1}]
    for last in (0, 1):  # a repeated action is the one in the state, and stays there
        state = agent.world_model.rssm.initial(1), torch.eye(2)[[last]]
        action, (_, kept) = agent.act(BLACK, state, explore=True, repeat=True)
        assert action == last and torch.equal(kept, state[1])


def sequence(agent, first=()):
    """Random inputs that want gradients, and what the RSSM makes of them from a zero state."""
    embed = torch.randn(3, 8, 256, requires_grad=True)
    action = torch.randn(3, 8, A, requires_grad=True)
    is_first = torch.zeros(3, 8, dtype=torch.bool)
    is_first[:, list(first)] = True
    rssm = agent.world_model.rssm
    return embed, action, rssm.observe(embed, action, is_first, rssm.initial(3))


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
    by_embed, by_action = torch.autograd.grad(early, [embed, action], retain_graph=True)
    assert (by_embed[:, 5:] == 0).all() and (by_action[:, 5:] == 0).all()
    assert (by_action[:, 4] != 0).any()  # row 4's action led to row 4
    # The frame of row 4 enters the posterior of row 4, but h and the prior only from row 5 on.
    for x, seen in ((feat[..., :D], False), (prior, False), (post, True)):
        loss = (x[:, 4] * torch.randn_like(x[:, 4])).sum()
        (by_embed,) = torch.autograd.grad(loss, embed, retain_graph=True)
        assert (by_embed[:, 4] != 0).any() == seen and (by_embed[:, 3] != 0).any()


def test_a_box_actor_is_a_bounded_normal():
    actor = dreamer.Actor(4, Box(-1, 1, (3,)), 8)
    actor.net[-1].weight.data.normal_(0, 100)
    policy = actor(torch.randn(50, 4))
    assert policy.mean.abs().max() <= 1
    assert 0.1 <= policy.stddev.min() and policy.stddev.max() <= 1
    action = policy.sample()
    expected = torch.distributions.Normal(policy.mean, policy.stddev).log_prob(action).sum(-1)
    assert torch.allclose(policy.log_prob(action), expected)


# Section 1.5: environment
@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("env_id", ["CartPole-v1", "Pendulum-v1"])
def test_pixel_env_passes_gymnasiums_checker(env_id):
    class Alone(PixelEnv):
        spec = None  # else the checker makes the environment again, without this wrapper

    check_env(Alone(env_id))


def test_pixels_are_averages_over_areas():
    env = PixelEnv("CartPole-v1")
    obs, _ = env.reset(seed=0)
    frame = env.env.render().astype(float)  # [400, 600, 3]
    wide = frame.repeat(4, 0).repeat(8, 1)  # 1600 = 64 * 25 rows, 4800 = 64 * 75 columns
    mean = wide.reshape(64, 25, 64, 75, 3).mean((1, 3))
    error = np.abs(obs - mean)  # of 255; Pillow counts every pixel of the frame once
    assert error.max() < 25 and error.mean() < 0.2
    assert len(np.unique(obs)) > 20  # no nearest neighbour: the pole has intermediate shades


GRAY = np.arange(64 * 64, dtype=np.uint8).reshape(64, 64)
COLOR = np.stack([GRAY, GRAY.T, 255 - GRAY], -1)
FRAMES = {
    "gray": (GRAY, np.stack(3 * [GRAY], -1)),
    "gray with an axis": (GRAY[..., None], np.stack(3 * [GRAY], -1)),
    "color": (COLOR, COLOR),
    "color with transparency": (np.dstack([COLOR, GRAY]), COLOR),
    "wide integers": (COLOR.astype(np.int64), COLOR),
    "flags": (GRAY > 99, np.stack(3 * [255 * (GRAY > 99)], -1)),
    "floats": ((COLOR + 0.25) / 255.5, np.uint8(255 * ((COLOR + 0.25) / 255.5))),
}


@pytest.mark.parametrize("kind", FRAMES)
def test_a_frame_may_be_gray_or_color_of_integers_flags_or_floats_up_to_one(kind):
    image, expected = FRAMES[kind]
    for picture in (image, image.repeat(2, 0).repeat(2, 1)):
        frame = dreamer.small_frame(picture)
        assert frame.dtype == np.uint8 and np.array_equal(frame, expected)


FAULTS = {
    "an error": (dict(error=RuntimeError("a wheel\n  came off")), "a wheel came off"),
    "a reward of nan": (dict(step=lambda r, *e: (np.nan, *e)), "step() gave reward=nan, terminat"),
    "no reward": (dict(step=lambda r, *e: (None, *e)), "step() gave reward=nan, terminated=False"),
    "two rewards": (dict(step=lambda r, *e: (np.ones(2), *e)), "size 1"),
    "no end": (dict(step=lambda r, *e: (r, None, 0)), "reward=1.0, terminated=None, truncated=0"),
    "no cut": (dict(step=lambda r, *e: (r, 0, None)), "reward=1.0, terminated=0, truncated=None"),
    "an end in words": (dict(step=lambda r, *e: (r, "no", False)), "float: 'no'"),
    "a cut in words": (dict(step=lambda r, *e: (r, False, "no")), "float: 'no'"),
    "two ends": (dict(step=lambda r, *e: (r, np.zeros(2, bool), False)), "more than one element"),
    "no frame": (dict(frame=lambda x: None), "render() gave NoneType (), no frame in 0...255"),
    "a list of frames": (dict(frame=lambda x: [x, x]), "list (2, 80, 120, 3)"),
    "text": (dict(frame=lambda x: "cell 3"), "no frame in 0...255"),
    "floats beyond 1": (dict(frame=lambda x: x.astype(np.float32)), "no frame in 0...255"),
    "five channels": (dict(frame=lambda x: x[..., [0] * 5]), "Cannot handle"),
    "channels first": (dict(frame=lambda x: x.transpose(2, 0, 1)), "Cannot handle"),
}


@pytest.mark.parametrize("fault", FAULTS)
def test_what_an_environment_does_wrong_is_named_with_environment_and_episode(fault):
    gives, message = FAULTS[fault]
    register("Faulty", gives=gives)
    with PixelEnv("Faulty-v0") as env:
        env.reset(seed=7)
        with pytest.raises(ValueError) as caught:
            for _ in range(4):
                env.step(5)
    error = " ".join(str(caught.value).split())
    assert error.startswith("Faulty-v0, episode with seed 7: ") and message in error


def test_box_actions_are_clipped_then_rescaled_and_the_row_keeps_the_clipped_one(recwarn):
    env = PixelEnv("Box-v0")  # in [-2, 2], as float64
    for action, clipped in [([1.0, -0.5], [1.0, -0.5]), ([7.0, -1.5], [1.0, -1.0])]:
        rows = episode(env, [np.array(action)])
        assert env.unwrapped.action.tolist() == [2 * x for x in clipped]
        assert rows[1]["prev_action"].tolist() == clipped
    assert not [w for w in recwarn if "overflow" in str(w)]


def test_rewards_of_repeated_actions_are_summed_and_an_episode_without_an_end_is_cut():
    rows = episode(PixelEnv("Counting-v0", action_repeat=3), [5, 5])
    assert [row["reward"] for row in rows] == [0, 1 + 2 + 3, 4]
    assert [row["terminated"] for row in rows] == [False, False, True]
    rows = episode(PixelEnv("Endless-v0"), 1_000 * [5])
    assert [i for i, row in enumerate(rows) if row["is_last"]] == [1_000]
    assert not rows[-1]["terminated"]


@pytest.mark.parametrize("env_id", ["Counting-v0", "Numbers-v0", "Arrays-v0"])
def test_rows_hold_the_action_that_led_to_their_frame(env_id):
    rows = episode(PixelEnv(env_id), [5, 7, 6, 5])
    assert [round(row["obs"].mean() / 10) for row in rows] == [0, 1, 2, 3, 4]
    assert [row["reward"] for row in rows] == [0, 1, 2, 3, 4]
    expected = [[0, 0, 0], [1, 0, 0], [0, 0, 1], [0, 1, 0], [1, 0, 0]]
    assert [row["prev_action"].tolist() for row in rows] == expected
    for name, expected in dict(is_first=[0], is_last=[4], terminated=[4]).items():
        assert [i for i, row in enumerate(rows) if row[name]] == expected
        assert all(type(row[name]) is bool for row in rows)


@pytest.mark.parametrize("env_id, ends", [("Counting-v0", True), ("Truncated-v0", False)])
def test_only_a_termination_sets_continue_to_zero(agent, env_id, ends):
    rows = episode(PixelEnv(env_id), [5, 5, 5, 5])
    assert rows[-1]["is_last"]
    batch = {name: x[None] for name, x in dreamer.stack_rows(rows).items()}
    batch["prev_action"] = batch["prev_action"][..., :A]
    batch["prev_feat"] = torch.zeros(1, 5, D + Z)
    head = agent.world_model.cont_head[-1]
    head.weight.data.zero_()
    head.bias.data.fill_(5.0)  # it says: the episode goes on, with probability sigmoid(5)
    *_, metrics = agent.world_model.loss(batch)
    goes_on, stops = np.log1p(np.exp(-5)), np.log1p(np.exp(5))
    expected = (4 * goes_on + (stops if ends else goes_on)) / 5
    assert metrics["wm/cont"].item() == pytest.approx(expected, rel=1e-5)


# Section 1.7: replay
@pytest.mark.parametrize("count", [9, 12, 35, 73])
def test_windows_are_of_consecutive_rows_the_newest_that_fit_and_new_ones_count_more(count):
    torch.manual_seed(0)
    replay = ReplayBuffer(50 if count == 73 else 12)
    for i in range(count):
        row = dict(obs=np.zeros((2, 2, 3), np.uint8), reward=np.float32(i))
        replay.add(row, torch.full((1, 5), i - 1.0))
    batch, begin = replay.sample(4_300, 8), max(0, count - replay.capacity)
    assert batch["obs"].shape == (4_300, 8, 2, 2, 3) and batch["obs"].dtype == torch.uint8
    assert (batch["reward"].diff(dim=1) == 1).all() and len(replay.rows) == count - begin
    starts = torch.bincount(batch["reward"][:, 0].int() - begin)
    windows = count - begin - 7
    expected = 4_300 * ((torch.arange(windows + 1) / windows) ** 2).diff()  # the later of two
    assert len(starts) == windows and ((starts - expected).abs() < 5 * expected.sqrt() + 5).all()
    assert torch.equal(batch["prev_feat"], batch["reward"][..., None].expand(-1, -1, 5) - 1)


def test_new_states_replace_those_before_the_next_rows_and_no_others():
    torch.manual_seed(0)
    replay = ReplayBuffer(20)
    for i in range(25):  # rows 5 to 24 remain
        replay.add(dict(number=np.int64(i)), torch.full((1, 3), -1.0))
    row = replay.sample(3, 6)["number"]
    replay.refresh(100.0 + row[..., None].expand(-1, -1, 3))
    seen = set(row.flatten().tolist())
    assert 24 in seen and len(seen) < 18  # the newest row has none after it
    for i, row in enumerate(replay.rows, start=5):
        assert row["number"] == i
        assert row["prev_feat"].tolist() == 3 * [99.0 + i if i - 1 in seen else -1.0]
        assert i - 1 not in seen or row["prev_feat"].base is None  # it keeps no other in memory


# Section 2: world model update
def test_dyn_trains_the_prior_alone_and_rep_the_posterior_alone_and_neither_below_the_free_nats():
    def gradients(dyn, rep, free_nats=0.0):
        model = new_agent(scale_dyn=dyn, scale_rep=rep, free_nats=free_nats).world_model
        model.loss(random_batch(T=1))[0].backward()  # one step: no path through earlier samples
        nets = model.rssm.prior_net, model.rssm.post_net
        return [torch.cat([p.grad.flatten() for p in net.parameters()]) for net in nets]

    no_prior, no_post = gradients(0.0, 0.0)  # of the other losses
    for free_nats in (0.0, 100.0):
        (dyn_prior, dyn_post), (rep_prior, rep_post) = (
            gradients(*scales, free_nats) for scales in ((1.0, 0.0), (0.0, 1.0))
        )
        assert dyn_prior.any() == (free_nats == 0) and not rep_prior.any() and not no_prior.any()
        assert torch.equal(rep_post, no_post) == (free_nats > 0) and torch.equal(dyn_post, no_post)


def test_the_world_model_loss_is_that_of_the_equations(agent):
    """Eq. 2.1 to 2.6; the free nats hold for a step, after the sum over groups."""
    model, batch = lively(agent).world_model, random_batch()
    with torch.no_grad():
        torch.manual_seed(3)
        embed = model.encoder(batch["obs"])
        inputs = batch["prev_action"], batch["is_first"], batch["prev_feat"][:, 0]
        feat, post, prior = model.rssm.observe(embed, *inputs)
        kl = torch_kl(Categorical(probs=post), Categorical(probs=prior)).sum(-1)
        model.config.free_nats = free = kl.median().item()  # half of the steps lie below
        torch.manual_seed(3)
        loss, states, m = model.loss(batch)
        m = {name.removeprefix("wm/"): x.item() for name, x in m.items()}
        recon = ((model.decoder(feat) - batch["obs"] / 255) ** 2).sum() / (4 * 6)
        log_p = model.reward_head.net(feat).log_softmax(-1)
        reward = -(twohot_encode(batch["reward"], BINS) * log_p).sum() / (4 * 6)
        bound = torch.where(kl > free, kl, free).mean().item()
    assert torch.equal(states, feat)
    expected = dict(recon=recon.item(), reward=reward.item(), dyn=bound, rep=bound)
    expected["kl"] = kl.mean().item()
    assert {name: m[name] for name in expected} == pytest.approx(expected, rel=1e-5)
    assert abs(bound - max(expected["kl"], free)) > 1e-3  # the mean would give another number
    total = m["recon"] + m["reward"] + m["cont"] + 1.0 * m["dyn"] + 0.1 * m["rep"]
    assert loss.item() == pytest.approx(total, rel=1e-5)


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
    returns = dreamer.lambda_return(reward, value, cont, 0.9, lam)
    assert returns.shape == (7, 3)
    for i in range(3):
        expected = brute_force_return(*(x[:, i].tolist() for x in (reward, value, cont)), 0.9, lam)
        assert returns[:, i].tolist() == pytest.approx(expected)


def test_lambda_zero_is_one_step_and_lambda_one_is_the_discounted_sum():
    reward, value, cont = torch.tensor([[9.0, 1, 2, 4], [9, 10, 20, 30], [0, 1, 1, 1]])
    returns = [dreamer.lambda_return(reward, value, cont, 0.5, lam).tolist() for lam in (0.0, 1.0)]
    assert returns == [[1 + 5, 2 + 10, 4 + 15], [1 + (2 + 19 / 2) / 2, 2 + (4 + 15) / 2, 4 + 15]]


def test_imagination_follows_prior_and_actor_without_environment(agent, monkeypatch):
    for name in ("reset", "step", "render"):
        monkeypatch.setattr(gym.Wrapper, name, None)
        monkeypatch.setattr(PixelEnv, name, None, raising=False)
    model, start = lively(agent).world_model, torch.randn(5, D + Z)
    with torch.no_grad():
        torch.manual_seed(3)
        feat, action = dreamer.imagine(model, agent.actor, start, 4)
        assert feat.shape == (5, 5, D + Z) and action.shape == (4, 5, A)
        assert torch.equal(feat[0], start)  # the start comes first
        torch.manual_seed(3)
        for t in range(4):  # action t leads from state t to state t + 1
            expected = OneHotCategorical(logits=agent.actor.net(feat[t])).sample()
            assert torch.equal(action[t], expected)
            h = model.rssm.recur(feat[t], action[t])
            z = model.rssm.sample(model.rssm.prior(h))
            assert torch.equal(feat[t + 1], torch.cat([h, z], -1))


@pytest.mark.parametrize("space, numbers", [(Discrete(A), 1), (Box(-1, 1, (A,)), A)])
def test_the_behavior_losses_are_those_of_the_equations(space, numbers, monkeypatch):
    """Eq. 3.2 to 3.6, a state at a time, on a dream that is given."""
    agent = new_agent(space=space)
    H, N, gamma, lam = 5, 4, agent.config.gamma, agent.config.lam
    lively(agent).config.entropy, agent.config.return_rate = 0.6, 0.5
    feat = torch.randn(H + 1, N, D + Z)
    action = torch.nn.functional.one_hot(torch.randint(A, (H, N)), A).float()
    losses, agent.return_range = {}, torch.tensor([0.0, 1000.0])
    monkeypatch.setattr(dreamer, "imagine", lambda *args: (feat, action))
    step = lambda agent, part, loss, _: losses.update({part: loss.item()})  # noqa: E731
    monkeypatch.setattr(dreamer, "gradient_step", step)
    with torch.no_grad():
        reward, cont = (x.tolist() for x in agent.world_model.predict(feat))
        value, slow = agent.critic(feat).tolist(), agent.slow_critic(feat[:-1])
        policy, outputs = agent.actor(feat[:-1]), agent.actor.net(feat[:-1])
        policy = policy if numbers > 1 else OneHotCategorical(logits=outputs)
        log_pi, entropy = policy.log_prob(action).tolist(), policy.entropy().tolist()
        columns = np.transpose([reward, value, cont], (2, 0, 1))  # [N, 3, H+1]
        returns = np.transpose([brute_force_return(*x, gamma, lam) for x in columns])
        low, high = np.quantile(returns, [0.05, 0.95])
        scale = (1000 + high) / 2 - low / 2
        log_probs = agent.critic.net(feat[:-1]).log_softmax(-1)
        targets = torch.stack([torch.tensor(returns.copy()).float(), slow])
        fits = (twohot_encode(targets, BINS).sum(0) * log_probs).sum(-1).tolist()
        excess = sum(max(0.0, abs(x) - 3) ** 2 for x in outputs.flatten().tolist())
        assert excess > 0  # but only a Box pays for outputs beyond 3
        actor_loss, critic_loss = 0.01 * excess / (H * N) if numbers > 1 else 0.0, 0.0
        for n in range(N):
            weight = 1.0
            for t in range(H):
                weight *= cont[0][n] if t == 0 else gamma * cont[t][n]
                advantage = (returns[t][n] - value[t][n]) / scale
                objective = advantage * log_pi[t][n] + 0.3 * entropy[t][n] / numbers**2
                actor_loss -= weight * objective / (H * N)
                critic_loss -= weight * fits[t][n] / (H * N)
    metrics = dreamer.update_behavior(agent, feat[0], anneal=0.5)
    expected = dict(actor=actor_loss, critic=critic_loss)
    assert losses == pytest.approx(expected, rel=1e-4)
    expected |= {"entropy": np.mean(entropy), "return": np.mean(returns), "return_scale": scale}
    expected = {f"ac/{name}": x for name, x in (expected | {"value": np.mean(value)}).items()}
    assert {name: x.item() for name, x in metrics.items()} == pytest.approx(expected, rel=1e-4)


def test_return_scale_is_a_running_percentile_range_of_at_least_one(agent, monkeypatch):
    agent.config.horizon = 100

    def scale(returns, begin=(0.0, 0.0), rate=0.01):
        agent.return_range, agent.config.return_rate = torch.tensor(begin), rate
        monkeypatch.setattr(dreamer, "lambda_return", lambda *args: returns.view(100, 4))
        return dreamer.update_behavior(agent, torch.zeros(4, D + Z))["ac/return_scale"].item()

    returns = torch.linspace(0, 1000, 400)[torch.randperm(400)]
    assert scale(returns) == pytest.approx(9.5 - 0.5, rel=1e-4)
    assert agent.return_range.tolist() == pytest.approx([0.5, 9.5], rel=1e-3)
    assert scale(returns, (50.0, 950.0)) == pytest.approx(900, rel=1e-4)
    assert scale(returns / 1e4, rate=1.0) == scale(returns, rate=0.0) == 1.0


def test_gradient_table(agent, monkeypatch):
    """World model loss: world model. Actor loss: actor. Critic loss: critic. And nothing else."""
    parts = ("world_model", "actor", "critic", "slow_critic")
    lively(agent).slow_critic.requires_grad_()
    seen = []

    def backward_only(agent, name, loss, anneal):
        agent.zero_grad()
        loss.backward(retain_graph=True)
        for part in parts:
            weights = dict(getattr(agent, part).named_parameters())
            reached = {n for n, p in weights.items() if p.grad is not None and p.grad.any()}
            assert reached == (set(weights) if part == name else set()), (name, part)
        seen.append(name)

    monkeypatch.setattr(dreamer, "gradient_step", backward_only)
    _, states, _ = agent.world_model.loss(random_batch())
    dreamer.update_world_model(agent, random_batch())
    monkeypatch.setattr(torch, "no_grad", contextlib.nullcontext)  # sg alone has to cut
    with contextlib.suppress(RuntimeError):  # the slow critic's own step, as a leaf that learns
        dreamer.update_behavior(agent, states.flatten(0, 1))
    assert seen == ["world_model", "actor", "critic"]


def test_each_update_moves_its_own_part_and_the_slow_critic_follows(agent, monkeypatch):
    feat, _ = dreamer.update_world_model(agent, random_batch())
    dreamer.update_behavior(agent, feat[0])  # now every part has moments to go on with
    steps, step, slow = [], dreamer.gradient_step, snapshot(agent.slow_critic)

    def watched(agent, part, loss, anneal):
        before = {name: snapshot(module) for name, module in agent.named_children()}
        norm = step(agent, part, loss, anneal)
        steps.append((part, {n for n, x in before.items() if changed(getattr(agent, n), x)}))
        return norm

    monkeypatch.setattr(dreamer, "gradient_step", watched)
    feat, _ = dreamer.update_world_model(agent, random_batch())
    assert not feat.requires_grad and not changed(agent.slow_critic, slow)
    dreamer.update_behavior(agent, feat[1])
    assert steps == [(part, {part}) for part in ("world_model", "actor", "critic")]
    fast = agent.critic.state_dict()
    for name, p in agent.slow_critic.named_parameters():
        assert torch.allclose(p, 0.9 * slow[name] + 0.1 * fast[name], atol=1e-7)
        assert not p.requires_grad


def test_a_gradient_step_is_adam_with_the_parts_learning_rate_and_a_bounded_gradient(agent):
    agent.config.lr, agent.config.behavior_lr = 2e-4, 1e-3
    before, loss = snapshot(agent), agent.world_model.decoder[0].weight.square().sum()
    dreamer.gradient_step(agent, "world_model", loss, anneal=0.1)
    moved = (agent.world_model.decoder[0].weight - before["world_model.decoder.0.weight"]).abs()
    assert moved.max().item() == pytest.approx(2e-5, rel=1e-2)
    before = snapshot(agent.actor)
    feat = agent.world_model.rssm.img_step(torch.randn(5, D + Z), torch.zeros(5, A))
    norm = dreamer.gradient_step(agent, "actor", 1e6 * agent.actor.net(feat).square().sum(), 0.1)
    others = [x for name, x in agent.world_model.named_parameters() if name != "decoder.0.weight"]
    assert all(p.grad is None for p in others)
    gradient = torch.cat([p.grad.flatten() for p in agent.actor.parameters()])
    assert norm > 100 and gradient.norm().item() == pytest.approx(10, rel=1e-3)
    moved = max((p - before[name]).abs().max() for name, p in agent.actor.state_dict().items())
    assert moved.item() == pytest.approx(1e-4, rel=1e-2)  # Adam's first step


@pytest.mark.parametrize("poison", ["loss", "gradient"])
def test_what_is_not_finite_stops_before_any_weight_is_moved(agent, poison):
    weight = agent.world_model.decoder[0].weight
    if poison == "loss":
        weight.data.fill_(np.nan)
    else:
        weight.register_hook(lambda gradient: gradient * np.inf)
    before = snapshot(agent)
    with pytest.raises(ValueError, match="the loss of the world_model is .*non-finite"):
        dreamer.update_world_model(agent, random_batch())
    for name in changed(agent, before):
        assert poison == "loss" and before[name].isnan().any(), name
    assert not agent.optimizers["world_model"].state


# Section 4: training loop
@pytest.fixture(scope="module")
def run(tmp_path_factory):
    """The folder of a finished run."""
    return train(Config(**RUN, runs=str(tmp_path_factory.mktemp("run"))))


def flags(options):
    return [x for k, v in options.items() for x in (f"--{k.replace('_', '-')}", str(v))]


def lines_of(folder):
    return [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]


def same_run(a, b):
    assert lines_of(a) == lines_of(b)
    a, b = dreamer.read_checkpoint(a), dreamer.read_checkpoint(b)
    for part in ("agent", "rows"):
        for name, x in a[part].items():
            assert torch.equal(x, b[part][name]), name
    assert torch.equal(a["random"], b["random"])


def test_a_line_comes_with_every_episode_and_a_checkpoint_with_every_evaluation(run, tmp_path):
    lines = lines_of(run)
    episodes = [line for line in lines if "env/return" in line]
    assert [line["env/step"] for line in lines] == [16, 32, 32, 48, 64, 64, 80, 96, 96]
    assert [line["env/step"] for line in lines if "eval/return" in line] == [32, 64, 96]
    updates = [dreamer.updates_due(Config(**RUN), step) for step in range(16, 97, 16)]
    assert [line["wm/updates"] for line in episodes] == updates and updates[-1] == 25
    assert ["wm/recon" in line for line in episodes] == [False, False, True, True, True, True]
    assert dreamer.read_checkpoint(run)["progress"] == (96, 6)
    assert json.loads((run / "config.json").read_text())["steps"] == 96
    log = dreamer.Log(tmp_path)
    log.write({"x": torch.tensor(2.0), "y": np.float32(0.5)})
    log.write({"x": 5})
    assert lines_of(tmp_path) == [{"x": 2.0, "y": 0.5}, {"x": 5.0}]


def test_the_same_config_gives_the_same_run_also_where_one_was_killed_at_once(run, tmp_path):
    folder = tmp_path / "Corridor-v0-0"
    folder.mkdir()
    (folder / "config.json").write_text("{")
    (folder / "new.pt").write_bytes(b"half")
    same_run(run, train(Config(**RUN, runs=str(tmp_path))))
    before = {path: path.read_bytes() for path in folder.iterdir()}
    assert {path.name for path in before} == {"config.json", "metrics.jsonl", "checkpoint.pt"}
    with pytest.raises(ValueError, match="exists: --resume or delete it"):  # no run is overwritten
        train(Config(**RUN, runs=str(tmp_path)))
    assert before == {path: path.read_bytes() for path in folder.iterdir()}


def test_a_checkpoint_holds_the_trained_agent_and_rows_that_are_freed_one_by_one(run, capsys):
    agent, last, replay = load_agent(run), lines_of(run)[-1], ReplayBuffer(1_000)
    metrics = evaluate(agent, 1, seed=0)
    assert metrics == {key: last[key] for key in metrics} and len(metrics) == 5
    assert dreamer.main(["--eval", str(run), "--episodes", "1"]) is None
    assert json.loads(capsys.readouterr().out) == metrics
    dreamer.load_checkpoint(agent, replay, dreamer.Log(run))
    assert len(replay.rows) == 102
    assert all(x.base is None for row in replay.rows for x in row.values())


def test_an_id_may_name_its_module_and_a_given_agent_is_trained_by_its_own_config(
    tmp_path, monkeypatch
):
    source = "import gymnasium as gym\ngym.register('Late-v0', 'test_dreamer:Counting')\n"
    (tmp_path / "late_module.py").write_text(source)
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.setattr(dreamer, "evaluate", lambda *args: {})
    config = Config(**RUN | dict(env="late_module:Late-v0", steps=41, runs=str(tmp_path)))
    agent = Agent(PixelEnv(config.env).action_space, config)
    before = snapshot(agent)
    assert train(Config(), agent).name == "late_module-Late-v0-0"  # Windows allows no colon
    assert any("world_model" in name for name in changed(agent, before))


def test_continuous_actions_train_in_a_full_buffer_and_every_environment_is_closed(
    tmp_path, monkeypatch
):
    Counting.opened.clear()
    monkeypatch.setattr(dreamer, "ReplayBuffer", lambda device: ReplayBuffer(50, device))
    config = RUN | dict(env="Box-v0", action_repeat=2, steps=60, eval_every=50)
    folder = train(Config(**config, runs=str(tmp_path)))
    agent = load_agent(folder)
    assert not Counting.opened
    assert len(dreamer.read_checkpoint(folder)["rows"]["obs"]) == 50
    assert agent.action_space.contains(agent.act(BLACK)[0])


# The command line
def test_the_file_runs_as_a_program_and_every_metric_is_explained(tmp_path, monkeypatch, capsys):
    """As `python dreamer.py` does, and a notebook's `%run dreamer.py`."""
    monkeypatch.chdir(tmp_path)
    program = str(HERE / "dreamer.py")
    config = RUN | dict(steps=60, eval_every=1000)
    monkeypatch.setattr(sys, "argv", [program, *flags(config)])
    monkeypatch.setenv("SDL_VIDEODRIVER", "dummy")
    runpy.run_path(program, run_name="__main__")
    printed, folder = capsys.readouterr(), Path("runs", "Corridor-v0-0")
    assert str(folder) in printed.out and "--resume" in printed.out
    assert "100%" in printed.err and "Warning" not in printed.err  # the bar counted all
    files = {"config.json", "metrics.jsonl", "curves.png", "checkpoint.pt"}
    assert {path.name for path in folder.iterdir()} == files
    keys = {key for line in lines_of(folder) for key in line} | {"eval/reward_rho"}
    assert {k.split("/")[0] for k in keys} == {"env", "wm", "ac", "eval"}
    assert not [key for key in keys if f"`{key}`" not in README]


@pytest.mark.parametrize("name", [k for k, v in vars(Config()).items() if not isinstance(v, str)])
def test_a_float_may_be_given_as_an_integer_and_a_count_is_at_least_one(name):
    if isinstance(getattr(Config, name), float) or name in (
        "resume",
        "seed",
        "pretrain",
        "posttrain",
    ):
        assert getattr(Config(**{name: 0}), name) == 0
    else:
        with pytest.raises(ValueError, match=f"{name} must lie between 1 and"):
            Config(**{name: 0})


BAD_INPUT = {
    "--stepz 3": "Unrecognized options: --stepz",
    "--steps many": "invalid literal for int",
    "--eval": "--eval",
    "--episodes 0": "episodes must lie between 1 and",
    "--lr nan": "lr must lie between 0 and 1000000000, not nan",
    "--free-nats -1": "free_nats must lie between 0",
    "--gamma 1.5": "gamma must lie between 0 and 1, not 1.5",
    "--return-rate 2": "return_rate must lie between 0 and 1, not 2",
    "--steps 1000": "batch_length <= prefill < steps must hold",
    "--batch-length 1501": "batch_length <= prefill < steps must hold",
    "--env CartPol-v1": "Did you mean: `CartPole`?",
    "--env no_such_module:Thing-v0": "No module named 'no_such_module'",
    "--env Blind-v0": "no frame in 0...255",
    "--env Broken-v0 --seed 3": "Broken-v0, episode with seed 6000000: no display, no luck",
    "--env Buttons-v0": "--env Buttons-v0",
    "--env Unbounded-v0": "--env Unbounded-v0",
    "--device tpu": "networks on --device tpu: ",
    "--hidden 1000000000": "networks on --device cpu: ",
    "--eval nowhere": "nowhere holds no checkpoint",
    "--eval run --device tpu": "networks on --device tpu: ",
    "--eval run --episodes 0": "episodes must lie between 1 and",
    "--eval broken.pt": "broken.pt holds no checkpoint",
    "--eval foreign.pt": "foreign.pt",
    "--resume --runs hurt": "CartPole-v1-0 holds no checkpoint that can be used",
    "--resume --runs .": "the agent of CartPole-v1-0 does not fit: ",
    "--runs .": "exists: --resume or delete it, or change --seed or --runs",
    "--runs broken.pt": "broken.pt",
}
if not torch.cuda.is_available():
    BAD_INPUT["--device cuda"] = "networks on --device cuda: "
register("Blind", gives=dict(at=0, frame=lambda frame: "only text"))
register("Broken", gives=dict(at=0, error=RuntimeError("no display,\n   no luck")))


@pytest.fixture(scope="module")
def workplace(run, tmp_path_factory):
    folder = tmp_path_factory.mktemp("workplace")
    (folder / "broken.pt").write_bytes(b"PK\x03\x04 not really")
    torch.save({"weights": torch.zeros(3)}, folder / "foreign.pt")
    shutil.copytree(run, folder / "run")
    shutil.copytree(run, folder / "CartPole-v1-0")
    (folder / "hurt" / "CartPole-v1-0").mkdir(parents=True)
    shutil.copy(folder / "broken.pt", folder / "hurt" / "CartPole-v1-0" / "checkpoint.pt")
    return folder


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("line", BAD_INPUT)
def test_bad_input_ends_in_one_clear_line_and_writes_nothing(line, workplace, monkeypatch, capsys):
    monkeypatch.chdir(workplace)
    before = {path: path.is_file() and path.read_bytes() for path in workplace.rglob("*")}
    with pytest.raises(SystemExit) as stop:
        dreamer.main(line.split())
    error = str(stop.value.code)
    if error == "2":  # of the parser, in a frame
        error = " ".join(re.sub("[│╭╮╰╯─]", " ", capsys.readouterr().err).split())
    else:
        assert error.startswith("dreamer.py: error: ") and "\n" not in error
    assert BAD_INPUT[line] in error and "Traceback" not in error
    after = {path: path.is_file() and path.read_bytes() for path in workplace.rglob("*")}
    assert after == before


def test_an_error_without_a_message_is_called_by_its_name(monkeypatch):
    with pytest.raises(ValueError, match=r"^here: AssertionError\(\)$"), dreamer.explain("here"):
        raise AssertionError
    monkeypatch.setattr(dreamer, "load_agent", Mock(side_effect=MemoryError))
    with pytest.raises(SystemExit, match=r"^dreamer.py: error: MemoryError\(\)$"):
        dreamer.main(["--eval", "x"])


def test_a_checkpoint_of_other_networks_ends_in_one_line(run, monkeypatch):
    def deeper(*sizes, layers):
        return dreamer.TwoHotHead(*sizes, layers + 1)

    monkeypatch.setattr(dreamer, "Critic", deeper)
    for argv in (["--eval", str(run)], [*flags(RUN | {"runs": run.parent}), "--resume"]):
        with pytest.raises(SystemExit) as stop:
            dreamer.main(argv)
        assert f"error: the agent of {run} does not fit: Error(s) in loading" in stop.value.code


def test_a_checkpoint_of_another_version_ends_in_one_line(run, tmp_path):
    folder = shutil.copytree(run, tmp_path / run.name)
    state = dreamer.read_checkpoint(folder)
    del state["rows"]["prev_feat"]
    torch.save(state | {"config": state["config"] | {"starts": 32}}, folder / "checkpoint.pt")
    for argv in (["--eval", str(folder)], [*flags(RUN | {"runs": tmp_path}), "--resume"]):
        with pytest.raises(SystemExit, match=r"does not fit: .* unexpected .* 'starts'$"):
            dreamer.main(argv)


def test_help_explains_every_option_with_its_default(capsys):
    with pytest.raises(SystemExit) as stop:
        dreamer.main(["--help"])
    text = " ".join(capsys.readouterr().out.replace("│", " ").split())
    assert stop.value.code == 0
    for name, default in vars(Config()).items():
        option, default = name.replace("_", "-"), re.escape(str(default) or "''")
        assert re.search(rf"--{option}( [A-Z]|, )[^(]+\(default: {default}\)", text), name


def test_the_file_opens_as_a_notebook_whose_cells_run_in_order_and_train_nothing(monkeypatch):
    source = (HERE / "dreamer.py").read_text(encoding="utf-8")
    notebook = types.ModuleType("__main__")
    monkeypatch.setitem(sys.modules, "__main__", notebook)
    monkeypatch.setattr(sys, "argv", ["ipykernel_launcher.py", "-f", "kernel.json"])
    monkeypatch.delitem(sys.modules, "ipykernel", raising=False)  # where one runs, it trains
    flags = __future__.annotations.compiler_flag  # IPython, too, carries it from cell to cell
    for cell in re.split(r"^# %%.*\n", source, flags=re.MULTILINE):
        exec(compile(cell, "cell", "exec", flags), vars(notebook))
    assert dreamer.tyro.cli(notebook.Config, args=notebook.ARGUMENTS.split()).resume


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
def test_a_cuda_run_trains_and_its_checkpoint_loads_on_the_cpu(tmp_path):
    folder = train(Config(**RUN, runs=str(tmp_path), device="cuda"))
    assert load_agent(folder).act(BLACK)[0] in (0, 1)


# Section 6: nothing is lost
ON_POSIX = pytest.mark.skipif(os.name != "posix", reason="needs fork and POSIX signals")


def in_child(argv, prepare):
    """dreamer.main(argv) in a child process that a signal may stop -> exit code, its output."""
    reader, writer = os.pipe()
    child = os.fork()
    if child == 0:
        os.close(reader)
        dreamer.tqdm.set_lock(threading.RLock())  # tqdm's own is shared with forks
        signal.alarm(120)  # a child that hangs fails its test
        signal.signal(signal.SIGINT, signal.default_int_handler)
        sys.stdout = sys.stderr = os.fdopen(writer, "w", buffering=1)
        code = 1
        try:
            prepare()
            dreamer.main(argv)
            code = 0
        except SystemExit as stop:
            print(stop.code)
        except BaseException as error:
            print("unexpected", repr(error))
        sys.stdout.flush()
        os._exit(code)
    os.close(writer)
    with open(reader, errors="replace") as file:
        output = file.read()
    return os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]), output


def signal_in(name, number, calls=1):
    """A signal arrives in the call of that number of a function of dreamer.py."""
    counted = iter(range(1, 10**6))
    note = lambda *args: next(counted) == calls and os.kill(os.getpid(), number)  # noqa: E731
    return lambda: spy(pytest.MonkeyPatch(), dreamer, name, note)


def killed_while_saving():
    def half(state, path):
        path.write_bytes(b"PK\x03\x04 half of it")
        os.kill(os.getpid(), signal.SIGKILL)

    dreamer.torch.save = half


@ON_POSIX
def test_kills_and_ctrl_c_change_nothing(run, tmp_path):
    argv, folder = [*flags(RUN | {"runs": tmp_path}), "--resume"], tmp_path / "Corridor-v0-0"
    kill = signal.SIGKILL
    assert in_child(argv, signal_in("evaluate", kill))[0] == -kill  # before the first checkpoint
    assert in_child(argv, signal_in("update_world_model", kill, 5))[0] == -kill
    code, output = in_child(argv, signal_in("update_behavior", signal.SIGINT, 3))
    assert code == 1 and output.splitlines()[-1].endswith("dreamer.py: error: KeyboardInterrupt()")
    assert "Traceback" not in output
    assert in_child(argv, killed_while_saving)[0] == -kill
    assert in_child(argv, signal_in("update_behavior", kill, 12))[0] == -kill
    assert dreamer.read_checkpoint(folder)["progress"] == (64, 4)
    assert in_child(argv, lambda: None)[0] == 0
    same_run(run, folder)
    assert not (folder / "new.pt").exists()


@ON_POSIX
def test_a_process_that_has_rendered_obeys_kill(tmp_path):
    argv = flags(SMALL | {"steps": 60, "eval_every": 99, "runs": tmp_path})
    code, output = in_child(argv, signal_in("update_world_model", signal.SIGTERM))
    assert code == -signal.SIGTERM, output


def test_a_finished_run_goes_on_with_more_steps_from_where_it_was(run, tmp_path):
    folder = shutil.copytree(run, tmp_path / run.name)
    argv, before = [*flags(RUN | {"runs": tmp_path}), "--resume"], lines_of(folder)
    assert dreamer.main(argv) == folder  # there is nothing left to do
    assert lines_of(folder) == before
    dreamer.main([*argv, "--steps", "112"])
    after = lines_of(folder)
    assert after[:9] == before and [line["env/step"] for line in after[9:]] == [112, 112]
    assert after[-2]["wm/updates"] == 3 + 72 * 6 // 18 + 4
    assert json.loads((folder / "config.json").read_text())["steps"] == 112


@ON_POSIX
def test_a_full_disk_ends_in_one_line_and_keeps_the_checkpoint(run, tmp_path):
    folder = shutil.copytree(run, tmp_path / run.name)

    def small_disk():
        import resource  # POSIX alone has it

        dreamer.evaluate = lambda *args: {}
        size = (folder / "checkpoint.pt").stat().st_size // 2
        resource.setrlimit(resource.RLIMIT_FSIZE, (size, size))

    code, output = in_child(
        flags(RUN | {"runs": tmp_path, "steps": 112}) + ["--resume"], small_disk
    )
    assert code == 1 and output.splitlines()[-1].startswith("dreamer.py: error: "), output
    agent = dreamer.read_checkpoint(run)["agent"]
    for name, x in dreamer.read_checkpoint(folder)["agent"].items():
        assert torch.equal(x, agent[name])


def test_a_damaged_checkpoint_is_refused_and_one_with_code_runs_none_of_it(run, tmp_path):
    class Trap:
        def __reduce__(self):
            return (Path.touch, (tmp_path / "sprung",))

    path, chance = tmp_path / "checkpoint.pt", np.random.default_rng(0)
    good, whole = (run / path.name).read_bytes(), dreamer.read_checkpoint(run)
    torch.save({"agent": Trap()}, path)
    bad = [path.read_bytes(), good[:-1], *(good[:n] for n in chance.integers(len(good), size=9))]
    for content in bad:
        path.write_bytes(content)
        with pytest.raises(ValueError, match="holds no checkpoint that can be used"):
            load_agent(tmp_path)
    assert not (tmp_path / "sprung").exists()
    refused, end = 0, len(good) - 3_000  # where the names and the sizes stand
    places = [*chance.integers(len(good), size=25), *chance.integers(end, len(good), size=15)]
    for place in places:
        damaged = bytearray(good)
        damaged[place] ^= 1 << chance.integers(8)
        path.write_bytes(damaged)
        try:
            state = dreamer.read_checkpoint(tmp_path)  # what was hit means nothing, as a date does
            for part in ("agent", "rows"):
                assert all(torch.equal(x, whole[part][name]) for name, x in state[part].items())
        except ValueError:
            refused += 1
    assert refused >= 25


# Section 5: self-evaluation metrics
def test_returns_are_of_unseen_seeds_and_random_actions_take_over_in_the_others(monkeypatch):
    agent, seeds, seen = new_agent(env="Corridor-v0"), [], []

    def watched(agent, env, seed, chance=0.0):
        seeds.append((seed, chance > 0))
        return 100 * [{"reward": seed % 8}], [seed]

    monkeypatch.setattr(dreamer, "play", watched)
    monkeypatch.setattr(
        dreamer, "dream_metrics", lambda agent, held_out: seen.extend(held_out) or {}
    )
    metrics = evaluate(agent, 2, seed=3)
    assert seeds == [(6_000_001 + 2 * i, i > 1) for i in range(4)]  # then 2 * 100 rows for rho
    assert [(len(rows), *states) for rows, states in seen] == [(100, seed) for seed, _ in seeds[2:]]
    assert metrics == {"eval/return": 100 * 2, "eval/return_std": 100 * 1}


def test_random_actions_take_over_for_fifteen_steps_and_the_agent_knows_what_was_done(monkeypatch):
    class Always:
        def act(self, obs, state=None):
            told.append(state and (state[0].item(), state[1][0].argmax().item()))
            return 5, (torch.tensor(obs[0, 0, :1] / 10), "what it chose")

    told, env = [], PixelEnv("Long-v0")
    chances = iter([0.9, 0.9, 0.1, *[0.9] * 17])
    monkeypatch.setattr(dreamer.torch, "rand", lambda shape: next(chances))
    rows, states = play(Always(), env, seed=3, chance=0.5)
    env.action_space.seed(3 + 2**40)
    expected = [5, 5, *(env.action_space.sample() for _ in range(15)), 5, 5, 5]
    assert [5 + row["prev_action"].argmax() for row in rows[1:]] == expected != 20 * [5]
    assert told == [None, *((t, action - 5) for t, action in enumerate(expected[:-1]))]
    assert [x.item() for x in states] == list(range(20))  # of frame t, before action t


class Known:
    """An agent whose model knows Counting: a state is the time, which is the reward, too, the
    action that led to it, and a random number that an acting state draws and a dream keeps."""

    def __init__(self, length=10):
        self.length, self.hidden = length, 1
        self.world_model = self.rssm = self
        self.entropy = lambda probs: RSSM.entropy(None, probs)

    def act(self, obs, state=None):
        feat = torch.tensor([[round(obs.mean() / 10), 0.0, torch.rand(())]])
        return 5 + torch.randint(3, ()).item(), (feat, None)

    def actor(self, feat):
        return OneHotCategorical(logits=feat[..., :1] * torch.tensor([0.1, 0.0, -0.1]))

    def img_step(self, feat, action):
        action = action.argmax(-1).float()
        return torch.stack([feat[..., 0] + 1, action, feat[..., 2]], -1)

    def predict(self, feat):
        return feat[..., 0].clone(), (feat[..., 0] != self.length).float()

    def prior(self, h):
        return torch.stack(3 * [torch.cat([1 + h, 31 - h], -1) / 32], -2)


def held_out(agent, *env_ids):
    torch.manual_seed(0)
    return [play(agent, PixelEnv(env_id), seed) for env_id in env_ids for seed in range(4)]


def test_the_metrics_of_dreams_are_those_of_the_equations(monkeypatch):
    """Eq. 5.1 to 5.3, a step at a time, with a model that errs in all of them. The start of a
    dream is known by its random number, and an action by its share in the dreamed reward."""
    agent, H, pairs = Known(), 6, []
    agent.predict = lambda feat: (
        feat[..., 0] ** 2 % 7 + 3 * feat[..., 1] + 20 * feat[..., 2],
        1 / (1 + 0.1 * feat[..., 0] + 0.1 * feat[..., 1]),
    )
    spy(monkeypatch, dreamer, "reward_rho", lambda *both: pairs.extend(both))
    episodes = held_out(agent, "Ten-v0", "TenCut-v0", "Truncated-v0")
    metrics = {name: float(x) for name, x in dreamer.dream_metrics(agent, episodes, H).items()}
    dreams, x, y, latent, policy = 0, [], [], [], []
    for rows, states in episodes:
        assert len(states) == len(rows) - 1 in (4, 10)
        for begin in range(0, len(rows) - 1, 4):  # the last row is no start
            dreams, alive, number = dreams + 1, 1.0, states[begin][0, 2].item()
            for k in range(1, H + 1):
                h, over = begin + k, begin + k >= len(rows)
                action = rows[-1 if over else h]["prev_action"].argmax().item()
                if not over or rows[-1]["terminated"]:  # after a time limit nothing is known
                    x.append(alive * (h**2 % 7 + 3 * action + 20 * number))
                    y.append(0.0 if over else float(h))
                alive /= 1 + 0.1 * h + 0.1 * action
                p = np.array([1 + h, 31 - h]) / 32
                latent.append(-3 * (p * np.log(p)).sum())
                logits = torch.tensor([0.1, 0.0, -0.1]) * (h - 1)
                policy.append(Categorical(logits=logits).entropy().item())
    dreamed, real = (x.T for x in pairs)
    assert dreamed.shape == real.shape == (dreams, H) == (4 * (3 + 3 + 1), 6)
    assert len(x) == 4 * (3 * 6 + (6 + 6 + 2) + 4)  # starts 0, 4 and 8 of 10; 0 of 4
    assert real[real.isfinite()].tolist() == y
    assert dreamed[real.isfinite()].tolist() == pytest.approx(x, rel=1e-5)
    assert set(metrics) == {"reward_rho", "latent_entropy", "policy_entropy"}
    assert metrics["reward_rho"] == pytest.approx(np.corrcoef(x, y)[0, 1], rel=1e-4)
    assert metrics["latent_entropy"] == pytest.approx(np.mean(latent), rel=1e-3)
    assert metrics["policy_entropy"] == pytest.approx(np.mean(policy), rel=1e-4)


def test_a_perfect_model_has_correlation_one_and_one_that_sees_no_end_has_not():
    def rho(agent, env_id):
        return dreamer.dream_metrics(agent, held_out(agent, env_id), 6)["reward_rho"]

    assert rho(Known(), "Ten-v0") == pytest.approx(1)
    assert rho(Known(length=100), "Ten-v0") < 0.5
    assert rho(Known(length=100), "TenCut-v0") == pytest.approx(1)  # nothing is assumed


@pytest.mark.filterwarnings("error::RuntimeWarning")  # of a correlation without variance
def test_reward_rho_is_pearsons_of_the_known_pairs_and_nan_where_nothing_varies():
    dreamed, nan = torch.tensor([[1.0, 2.0], [3.0, 7.0]]), math.nan
    assert dreamer.reward_rho(dreamed, torch.tensor([[6, 4], [2, nan]])) == pytest.approx(-1)
    # Deviations from the means: -2.25, -1.25, -0.25, 3.75 and -1, -1, 1, 1.
    expected, real = 7 / math.sqrt(20.75 * 4), torch.tensor([[0.0, 0.0], [2.0, 2.0]])
    assert dreamer.reward_rho(dreamed, real) == pytest.approx(expected)
    for real in ([[4, 4], [4, nan]], [[nan, 4], [nan, nan]], [[nan, nan], [nan, nan]]):
        assert math.isnan(dreamer.reward_rho(dreamed, torch.tensor(real)))
    assert math.isnan(dreamer.reward_rho(torch.ones(2, 2), dreamed))


@pytest.mark.filterwarnings("error::RuntimeWarning")
def test_evaluation_is_a_function_of_its_seed_and_what_does_not_exist_is_left_out(monkeypatch):
    """Here the rewards do not vary."""
    register("Still", ends_by="truncated", gives=dict(step=lambda r, *ends: (1.0, *ends)))
    agent = new_agent(space=Discrete(3, start=5), env="Still-v0")
    lengths = set()
    spy(monkeypatch, dreamer, "reward_rho", lambda dreamed, real: lengths.add(len(dreamed)))
    torch.manual_seed(1)
    state = torch.get_rng_state()
    metrics = evaluate(agent, 1, seed=5)
    assert lengths == {15} != {agent.config.horizon}  # rho has a length of its own
    assert torch.equal(torch.get_rng_state(), state)
    torch.rand(7)
    assert metrics == evaluate(agent, 1, seed=5) != evaluate(agent, 1, seed=6)
    names = {f"eval/{x}" for x in ("return", "return_std", "latent_entropy", "policy_entropy")}
    assert set(metrics) == names and np.isfinite(list(metrics.values())).all()


# The form of it all
def length(path):
    return len(path.read_text(encoding="utf-8").splitlines())


def test_the_files_can_be_read_in_one_sitting():
    limits = {"dreamer.py": 850, "test_dreamer.py": 1300, "README.md": 350}
    assert [name for name, limit in limits.items() if length(HERE / name) > limit] == []


@pytest.mark.parametrize("path", RECIPES, ids=[path.stem for path in RECIPES])
def test_a_recipe_says_what_it_is_for_on_one_page(path):
    assert length(path) <= 80
    assert re.match(r'(#.*\n)*"""\w', path.read_text(encoding="utf-8"))


def test_the_code_looks_as_ruff_format_writes_it():
    pytest.importorskip("ruff")
    paths = [HERE / "dreamer.py", HERE / "test_dreamer.py", *RECIPES]
    command = [sys.executable, "-m", "ruff", "format", "--check", *map(str, paths)]
    result = subprocess.run(command, cwd=HERE, capture_output=True, text=True)
    assert result.returncode == 0, result.stdout


# And all of it together
def test_it_learns_to_walk_the_corridor_from_pixels(tmp_path):
    """Of 8, random actions collect about 3; without world model or actor updates it is 1."""
    config = dict(env="Corridor-v0", steps=560, prefill=200, pretrain=40, train_ratio=40)
    config |= dict(posttrain=60)
    config |= dict(batch_size=8, batch_length=8, horizon=8, depth=2, hidden=32, groups=8)
    config |= dict(classes=8, units=64, entropy=1e-2, episodes=1)
    folder = train(Config(**config, runs=str(tmp_path)))
    assert evaluate(load_agent(folder), 5, seed=1)["eval/return"] >= 7
