"""Dreamer in one file: learn a world model from pixels, then learn to act inside its imagination.

    python dreamer.py --device cpu               train on CartPole's pixels: runs/CartPole-v1-0
    python dreamer.py --eval runs/CartPole-v1-0  play unseen episodes with what came out

Read it from top to bottom with the lesson at hand; the sections carry the lesson's numbers:
1 Setup - 2 World Model Update - 3 Behavior Learning - 4 Training Loop - 5 Self-Evaluation Metrics.
The algorithm is DreamerV3 (Hafner et al., arXiv:2301.04104); README.md lists what is smaller here.

Shapes    B batch   T time   N = B*T starts of imagination   H horizon   A action   E embedding
          D = |h|   S groups of K classes, so |z| = S*K   feat = (h, z), F = |feat| = D + S*K
          Real sequences are batch first, [B, T, ...]; imagined ones time first, [H+1, N, ...].

Time      row t : prev_action a_{t-1} | obs o_t | reward r_t | terminated_t | is_first_t
          h_t = f(h_{t-1}, z_{t-1}, a_{t-1})      z_t ~ q(. | h_t, o_t)  posterior: saw the frame
                                                  z_t ~ p(. | h_t)       prior: has to guess it
          o_t, r_t and c_t = 1 - terminated_t are predicted from (h_t, z_t).
          The action in row t is the one that led to o_t. The first row of an episode has a zero
          action, zero reward and is_first; its last frame has a row of its own.
          (The papers call h deter and z stoch.)

Gradient of           reaches    encoder, RSSM, decoder, heads    actor    critic
world model loss                              yes                   -        -
actor loss                                     -                   yes       -
critic loss                                    -                    -       yes
"""

# %% [markdown]
# # Section 1: Setup
# The pixel environment, the parts of the world model, the actor, the critic and the replay buffer.
# Encoder and RSSM, which earlier lessons build, are written out in 1.4 and 1.5.
#
# - Eq. 1.1, recurrent state: `h_t = f(h_{t-1}, z_{t-1}, a_{t-1})`, the memory of the episode
# - Eq. 1.2, posterior: `z_t ~ q(z | h_t, o_t)`, what the frame adds to the memory
# - Eq. 1.3, prior: `z_t ~ p(z | h_t)`, the same guessed without the frame: this one dreams

# %% 1.1 Imports and configuration
from __future__ import annotations

import argparse
import copy
import difflib
import inspect
import json
import os
import re
import sys
import time
from collections import defaultdict
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import gymnasium as gym
import numpy as np
import torch
import torch.nn.functional as F
from matplotlib.figure import Figure
from torch import Tensor, nn
from torch.distributions import Distribution, Independent, Normal, OneHotCategorical
from tqdm import tqdm

# SDL draws many environments. It must not need a screen, nor take SIGTERM (`kill`) from Python.
os.environ |= {"PYGAME_HIDE_SUPPORT_PROMPT": "1", "SDL_NO_SIGNAL_HANDLERS": "1"}
if sys.platform == "linux" and not (os.environ.get("DISPLAY") or os.environ.get("WAYLAND_DISPLAY")):
    os.environ.setdefault("SDL_VIDEODRIVER", "dummy")
import pygame  # noqa: E402

Tensors = tuple[Tensor, ...]
Named = dict[str, Tensor]  # rows of replay by column, metrics by key
Optimizers = dict[str, torch.optim.Optimizer]  # for "world_model", "actor" and "critic"

class DreamerError(Exception):
    """Something that the user can put right; the command line prints it as one line."""

@dataclass
class Config:
    """The options of a run, and of the command line; DreamerError for a number out of its range."""

    env: str = "CartPole-v1"  # Gymnasium id; module:Id imports the module first
    seed: int = 0  # seed of weights, actions, batches and episodes
    steps: int = 10_000  # environment steps of the run, as the agent counts them
    device: str = "auto"  # auto, cpu or cuda; auto takes cuda where there is one
    runs: str = "runs"  # folder for results; a run writes to RUNS/ENV-SEED
    action_repeat: int = 1  # times that the environment repeats an action, rewards summed
    # replay and schedule
    prefill: int = 1_500  # steps with random actions before the first update
    pretrain: int = 1_000  # updates of the world model alone, before behavior learning starts
    train_ratio: float = 64.0  # replayed steps for each environment step after the prefill
    batch_size: int = 8  # B, sequences in a batch
    batch_length: int = 16  # T, steps in a sequence
    capacity: int = 100_000  # steps kept in the replay buffer, 12 kB each
    # world model
    depth: int = 8  # the CNN has 2, 4 and 8 times as many channels
    hidden: int = 128  # D, size of the recurrent state h
    groups: int = 16  # S, categorical variables in z
    classes: int = 8  # K, classes of each of them
    units: int = 128  # width of the hidden layers of every MLP
    unimix: float = 0.01  # share of the uniform distribution in prior and posterior
    free_nats: float = 1.0  # KL of a step, in nats, below which it is not penalised
    scale_recon: float = 1.0  # weight of the reconstruction loss
    scale_reward: float = 1.0  # weight of the reward loss
    scale_cont: float = 1.0  # weight of the continue loss
    scale_dyn: float = 1.0  # weight of the KL that pulls the prior to the posterior
    scale_rep: float = 0.1  # weight of the KL that pulls the posterior to the prior
    world_model_lr: float = 1e-3  # learning rate of the world model
    # behavior
    horizon: int = 15  # H, imagined steps
    gamma: float = 0.99  # discount of a step
    lam: float = 0.95  # lambda of the lambda-return
    entropy: float = 3e-3  # weight of the actor's entropy
    actor_lr: float = 1e-3  # learning rate of the actor
    critic_lr: float = 1e-3  # learning rate of the critic
    slow_rate: float = 0.02  # share of the critic that the slow critic takes over in an update
    return_rate: float = 0.01  # share of new returns in the running range of returns
    max_grad_norm: float = 10.0  # norm that gradients are clipped to
    # results
    log_every: int = 500  # steps between lines of metrics.jsonl; evaluations add theirs
    eval_every: int = 2_500  # steps between evaluations, each followed by a checkpoint
    eval_episodes: int = 5  # episodes of an evaluation during training

    def __post_init__(self):
        for name, value in asdict(self).items():
            low = 1 if isinstance(value, int) and name not in ("seed", "pretrain") else 0
            high = 1 if name in ("unimix", "gamma", "lam", "slow_rate", "return_rate") else 1e9
            if not isinstance(value, str) and not low <= value <= high:  # catches nan, too
                raise DreamerError(f"{name} has to be between {low} and {high:.0f}, not {value}")
        if self.batch_length > min(self.prefill, self.capacity) or self.gamma == 0:
            raise DreamerError("prefill and capacity must reach batch_length, and gamma exceed 0")

def pick_device(name: str) -> torch.device:
    """auto, cpu or cuda -> device; DreamerError for others, and for cuda where there is none."""
    best = "cuda" if torch.cuda.is_available() else "cpu"
    if name not in ("auto", "cpu", best):
        raise DreamerError(f"there is no device {name} here; --device auto takes {best}")
    return torch.device(best if name == "auto" else name)

# %% 1.2 Small tools
def sg(x: Tensor) -> Tensor:
    """Stop-gradient, the only cut in a loss: search for `sg(` to see them all."""
    return x.detach()

def symlog(x: Tensor) -> Tensor:
    """sign(x) ln(1 + |x|): like x near 0, compresses what is large (DreamerV3)."""
    return torch.sign(x) * torch.log1p(torch.abs(x))

def symexp(x: Tensor) -> Tensor:
    """sign(x) (exp(|x|) - 1), the inverse of `symlog`."""
    return torch.sign(x) * torch.expm1(torch.abs(x))

def twohot_bins() -> Tensor:
    """The 255 values over which rewards and returns are spread: 0, and symexp-spaced to 4.85e8."""
    half = symexp(torch.linspace(-20, 0, 128))
    return torch.cat([half, -half[:-1].flip(0)])

def twohot_encode(x: Tensor, bins: Tensor) -> Tensor:
    """x [...] -> weights [..., len(bins)] on the two bins around x, with mean x (DreamerV3)."""
    x = x.clamp(bins[0], bins[-1]).unsqueeze(-1)
    above = torch.searchsorted(bins, x).clamp(min=1)
    weight = (x - bins[above - 1]) / (bins[above] - bins[above - 1])
    zeros = x.new_zeros(*x.shape[:-1], len(bins))
    return zeros.scatter(-1, above - 1, 1 - weight).scatter(-1, above, weight)

def twohot_decode(logits: Tensor, bins: Tensor) -> Tensor:
    """Logits [..., len(bins)] -> mean [...] of the bins. Bins of opposite sign are summed in
    pairs: the huge outer ones cancel, and zero logits give exactly 0."""
    terms = torch.softmax(logits, -1) * bins
    return (terms + terms.flip(-1)).sum(-1) / 2

def init_weights(module: nn.Module) -> None:
    """For `network.apply`: truncated normal weights of variance 1 / fan-in, zero biases.
    PyTorch's own start has a third of this variance; the pole's angle then enters z much later."""
    if isinstance(module, nn.Linear | nn.Conv2d | nn.ConvTranspose2d):
        fan_in = module.weight[0].numel()
        if isinstance(module, nn.ConvTranspose2d):  # weight [in, out, k, k]
            fan_in = module.weight[:, 0].numel() / np.prod(module.stride)
        std = 1.1368 / fan_in**0.5  # 1.1368 makes up for the tails cut at two sigma
        nn.init.trunc_normal_(module.weight, 0.0, std, -2 * std, 2 * std)
        nn.init.zeros_(module.bias)

def dense(inputs: int, units: int) -> nn.Sequential:
    """Linear layer, layer norm, SiLU."""
    return nn.Sequential(nn.Linear(inputs, units), nn.LayerNorm(units), nn.SiLU())

def mlp(inputs: int, units: int, layers: int, outputs: int, outscale: float = 1.0) -> nn.Sequential:
    """So many dense layers, then a linear one whose weights start at `outscale` of the usual."""
    hidden = [dense(units if i else inputs, units) for i in range(layers)]
    network = nn.Sequential(*hidden, nn.Linear(units, outputs)).apply(init_weights)
    network[-1].weight.data *= outscale
    return network

# %% 1.3 Pixel wrapper
class PixelEnv(gym.Env):
    """Any registered Gymnasium environment, seen through its pixels: uint8 [size, size, 3], the
    rendered frame averaged over areas. Actions are the environment's own if Discrete; in [-1, 1],
    clipped and rescaled, if Box; repeated `action_repeat` times, with their rewards summed.
    Raises DreamerError for an unknown id, an environment without pixels, other action spaces."""

    def __init__(self, env_id: str, size: int = 64, action_repeat: int = 1):
        try:
            self.env = gym.make(env_id, render_mode="rgb_array", disable_env_checker=True)
            self.env.reset()
            frame = self.env.render()  # some environments find out only here that they cannot
        except Exception as error:  # whatever an environment raises
            closest = difflib.get_close_matches(env_id, gym.registry, n=1, cutoff=0.0)[0]
            hint = f" The closest id is {closest}." if closest != env_id else ""
            raise DreamerError(f"--env {env_id}: {error}{hint}") from error
        if getattr(frame, "dtype", None) != np.uint8 or frame.shape[2:] != (3,):
            raise DreamerError(f"--env {env_id} cannot render uint8 frames [height, width, 3]")
        space = self.env.action_space
        if isinstance(space, gym.spaces.Box) and space.is_bounded() and space.dtype.kind == "f":
            self.env = gym.wrappers.RescaleAction(self.env, np.float32(-1), np.float32(1))
        elif not isinstance(space, gym.spaces.Discrete):
            raise DreamerError(f"--env {env_id}: actions are neither Discrete nor a bounded Box")
        self.size, self.action_repeat, self.render_mode = size, action_repeat, "rgb_array"
        self.metadata, self.action_space = self.env.metadata, self.env.action_space
        self.observation_space = gym.spaces.Box(0, 255, (size, size, 3), np.uint8)
        self.render, self.close = self.env.render, self.env.close

    def reset(self, *, seed: int | None = None, options: dict | None = None):
        super().reset(seed=seed)
        _, info = self.env.reset(seed=seed, options=options)
        return self.pixels(), info

    def step(self, action):
        if isinstance(self.action_space, gym.spaces.Box):  # the actor's normal has tails
            action = np.clip(action, -1, 1)
        total = 0.0
        for _ in range(self.action_repeat):
            _, reward, terminated, truncated, info = self.env.step(action)
            total += float(reward)
            if terminated or truncated:
                break
        return self.pixels(), total, terminated, truncated, info

    def pixels(self) -> np.ndarray:
        """The frame now, averaged over areas: uint8 [size, size, 3]."""
        frame = np.ascontiguousarray(self.render())
        surface = pygame.image.frombuffer(frame, frame.shape[1::-1], "RGB")
        small = pygame.transform.smoothscale(surface, (self.size, self.size))
        return pygame.surfarray.array3d(small).transpose(1, 0, 2)  # pygame has [x, y, color]

# %% 1.4 CNN encoder and decoder
class ChannelNorm(nn.LayerNorm):
    """Layer norm over the channels of [N, C, H, W], whose memory is channels-last."""

    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x.permute(0, 2, 3, 1)).permute(0, 3, 1, 2)

class Encoder(nn.Module):
    """Frames uint8 [..., 64, 64, 3] -> embeddings [..., E], E = 128 * depth."""

    def __init__(self, depth: int):
        super().__init__()
        a, b, c = 2 * depth, 4 * depth, 8 * depth
        self.layers = nn.Sequential(
            nn.Conv2d(3, a, 8, stride=4, padding=2), ChannelNorm(a), nn.SiLU(),  # 64 -> 16
            nn.Conv2d(a, b, 4, stride=2, padding=1), ChannelNorm(b), nn.SiLU(),  # 16 -> 8
            nn.Conv2d(b, c, 4, stride=2, padding=1), ChannelNorm(c), nn.SiLU(),  # 8 -> 4
            nn.Flatten(),
        ).apply(init_weights)

    def forward(self, obs: Tensor) -> Tensor:
        x = obs.reshape(-1, *obs.shape[-3:]).permute(0, 3, 1, 2) / 255 - 0.5
        return self.layers(x).unflatten(0, obs.shape[:-3])

class Decoder(nn.Module):
    """Features [..., F] -> mean frames [..., 64, 64, 3] in [0, 1]."""

    def __init__(self, feat_size: int, depth: int):
        super().__init__()
        a, b, c = 2 * depth, 4 * depth, 8 * depth
        self.layers = nn.Sequential(
            nn.Linear(feat_size, c * 4 * 4), nn.Unflatten(1, (c, 4, 4)), ChannelNorm(c), nn.SiLU(),
            nn.ConvTranspose2d(c, b, 4, stride=2, padding=1), ChannelNorm(b), nn.SiLU(),  # 4 -> 8
            nn.ConvTranspose2d(b, a, 4, stride=2, padding=1), ChannelNorm(a), nn.SiLU(),  # 8 -> 16
            nn.ConvTranspose2d(a, 3, 8, stride=4, padding=2), nn.Sigmoid(),  # 16 -> 64
        ).apply(init_weights)

    def forward(self, feat: Tensor) -> Tensor:
        x = self.layers(feat.reshape(-1, feat.shape[-1]))
        return x.permute(0, 2, 3, 1).unflatten(0, feat.shape[:-1])

# %% 1.5 RSSM
def kl_divergence(p: Tensor, q: Tensor) -> Tensor:
    """KL(p || q) in nats, summed over the groups; log-probabilities [..., S, K] -> [...]."""
    return (p.exp() * (p - q)).sum((-2, -1))

class RSSM(nn.Module):
    """Recurrent state-space model (PlaNet, arXiv:1811.04551) with categorical z (DreamerV2)."""

    def __init__(self, embed_size: int, action_size: int, config: Config):
        super().__init__()
        self.hidden, self.groups, self.classes = config.hidden, config.groups, config.classes
        self.unimix, D, z_size = config.unimix, config.hidden, config.groups * config.classes
        self.inputs = dense(z_size + action_size, config.units)
        self.gates = nn.Sequential(nn.Linear(config.units + D, 3 * D), nn.LayerNorm(3 * D))
        self.apply(init_weights)
        self.prior_net = mlp(D, config.units, 1, z_size)
        self.post_net = mlp(D + embed_size, config.units, 1, z_size)

    def initial(self, batch: int) -> Tensors:
        """The state before an episode: zero h [batch, D] and z [batch, S*K]."""
        zeros = self.gates[0].weight.new_zeros
        return zeros(batch, self.hidden), zeros(batch, self.groups * self.classes)

    def recur(self, h: Tensor, z: Tensor, prev_action: Tensor) -> Tensor:
        """Eq. 1.1, a GRU with layer norm: h [., D], z [., S*K], action [., A] -> next h [., D]."""
        prev_action = prev_action / sg(prev_action.abs().clamp(min=1))  # clip to [-1, 1]
        x = self.inputs(torch.cat([z, prev_action], -1))
        reset, candidate, update = self.gates(torch.cat([x, h], -1)).chunk(3, -1)
        candidate = torch.tanh(torch.sigmoid(reset) * candidate)
        update = torch.sigmoid(update - 1)  # -1: at first, remember
        return update * candidate + (1 - update) * h

    def log_probs(self, logits: Tensor) -> Tensor:
        """Logits [., S*K] -> log-probabilities [., S, K]: softmax, and a share `unimix` of uniform.
        Samples, KL and entropy all use these, so no class is impossible and no KL infinite."""
        probs = torch.softmax(logits.unflatten(-1, (self.groups, self.classes)), -1)
        return torch.log((1 - self.unimix) * probs + self.unimix / self.classes)

    def sample(self, log_probs: Tensor) -> Tensor:
        """z [., S*K], one-hot in each group; its gradient goes straight through to [., S, K]."""
        probs = log_probs.exp()
        drawn = (sg(probs) / torch.empty_like(probs).exponential_()).argmax(-1)  # ~ probs
        return (F.one_hot(drawn, self.classes) + probs - sg(probs)).flatten(-2)

    def img_step(self, h: Tensor, z: Tensor, action: Tensor) -> Tensors:
        """One step without a frame: the next h, and z from the prior."""
        h = self.recur(h, z, action)
        return h, self.sample(self.log_probs(self.prior_net(h)))  # Eq. 1.3

    def obs_step(
        self, h: Tensor, z: Tensor, prev_action: Tensor, embed: Tensor, is_first: Tensor
    ) -> Tensors:
        """One step with a frame [., E]: the next h, z from the posterior, and the posterior.
        is_first [.] erases h, z and the action: nothing crosses the border of an episode."""
        keep = (~is_first).unsqueeze(-1)
        h = self.recur(h * keep, z * keep, prev_action * keep)
        post = self.log_probs(self.post_net(torch.cat([h, embed], -1)))
        return h, self.sample(post), post  # Eq. 1.2

    def observe(self, embed: Tensor, prev_action: Tensor, is_first: Tensor) -> Tensors:
        """Sequences [B,T,...] -> h [B,T,D], z [B,T,S*K], posterior and prior [B,T,S,K]."""
        h, z = self.initial(len(embed))  # in mid-episode, too: the first steps know little
        steps = []
        for t in range(embed.shape[1]):
            h, z, post = self.obs_step(h, z, prev_action[:, t], embed[:, t], is_first[:, t])
            steps.append((h, z, post))
        h, z, post = (torch.stack(x, 1) for x in zip(*steps, strict=True))
        return h, z, post, self.log_probs(self.prior_net(h))

# %% 1.6 Reward and continue heads
class TwoHotHead(nn.Module):
    """Features [..., F] -> a number [...] of any size, 0 at first: a distribution over 255 bins."""

    def __init__(self, feat_size: int, units: int, layers: int):
        super().__init__()
        self.net = mlp(feat_size, units, layers, 255, outscale=0.0)
        self.register_buffer("bins", twohot_bins(), persistent=False)

    def forward(self, feat: Tensor) -> Tensor:
        return twohot_decode(self.net(feat), self.bins)

    def loss(self, feat: Tensor, *targets: Tensor) -> Tensor:
        """Cross-entropy [...] to the two-hot target [...]; summed, if there are several."""
        log_probs = torch.log_softmax(self.net(feat), -1)
        return -sum((twohot_encode(target, self.bins) * log_probs).sum(-1) for target in targets)

class ContinueHead(nn.Module):
    """Features [..., F] -> c [...], the probability that the episode has not terminated here."""

    def __init__(self, feat_size: int, units: int):
        super().__init__()
        self.net = mlp(feat_size, units, 1, 1)

    def forward(self, feat: Tensor) -> Tensor:
        return torch.sigmoid(self.net(feat).squeeze(-1))

    def loss(self, feat: Tensor, cont: Tensor) -> Tensor:
        logits = self.net(feat).squeeze(-1)
        return F.binary_cross_entropy_with_logits(logits, cont, reduction="none")

# %% 1.7 Actor and critic
class Actor(nn.Module):
    """Features [..., F] -> distribution over actions [..., A]. Discrete: one-hot categorical;
    Box: normal, mean in (-1, 1), deviation in (0.1, 1)."""

    def __init__(self, feat_size: int, action_space: gym.Space, units: int):
        super().__init__()
        self.discrete = isinstance(action_space, gym.spaces.Discrete)
        outputs = gym.spaces.flatdim(action_space) * (1 if self.discrete else 2)
        self.net = mlp(feat_size, units, 2, outputs, outscale=0.01)  # nearly uniform at first

    def forward(self, feat: Tensor) -> Distribution:
        if self.discrete:
            return OneHotCategorical(logits=self.net(feat), validate_args=False)
        mean, std = self.net(feat).chunk(2, -1)
        normal = Normal(torch.tanh(mean), 0.9 * torch.sigmoid(std + 2) + 0.1, validate_args=False)
        return Independent(normal, 1, validate_args=False)

class Critic(TwoHotHead):
    """Features [..., F] -> value [...]: the discounted rewards that are still to be collected."""

# %% 1.8 Replay buffer
class ReplayBuffer:
    """The last `capacity` rows in the order in which they came; frames stay uint8, 12 kB each."""

    def __init__(self, capacity: int, action_size: int):
        self.capacity, self.size, self.cursor = capacity, 0, 0  # cursor: where the next row goes
        self.rows = {
            # NumPy's zeros, unlike PyTorch's, take memory only when a row is first written
            "obs": torch.from_numpy(np.zeros((capacity, 64, 64, 3), np.uint8)),
            "prev_action": torch.zeros(capacity, action_size),
            "reward": torch.zeros(capacity),
            "terminated": torch.zeros(capacity, dtype=torch.bool),
            "is_first": torch.zeros(capacity, dtype=torch.bool),
        }

    def add(self, row: dict[str, Any]) -> None:
        for name, value in row.items():
            self.rows[name][self.cursor] = torch.as_tensor(value)
        self.cursor = (self.cursor + 1) % self.capacity
        self.size = min(self.size + 1, self.capacity)

    def sample(self, batch_size: int, length: int, device: torch.device) -> Named:
        """[B, T, ...] windows of consecutive rows, uniform over where they can start. They run
        across episodes (is_first marks it), but never from the newest row to the oldest."""
        start = torch.randint(self.size - length + 1, (batch_size, 1))
        oldest = self.cursor - self.size
        index = (oldest + start + torch.arange(length)) % self.capacity
        return {name: rows[index].to(device) for name, rows in self.rows.items()}

# %% [markdown]
# # Section 2: World Model Update
# Encode a batch of real sequences, run the RSSM over them, and predict from every state (h, z)
# what row t holds. The loss (Eq. 2.6) is the mean over B and T of the weighted sum of
#
# - Eq. 2.1 `recon = sum over pixels of (o_t - decoder(h_t, z_t))^2`
# - Eq. 2.2 `reward = -ln p(r_t | h_t, z_t)`, a cross-entropy with the two-hot reward
# - Eq. 2.3 `cont = -ln p(c_t | h_t, z_t)`, with `c_t = 1 - terminated_t`: a time limit ends nothing
# - Eq. 2.4 `dyn = max(1, KL(sg(q) || p))`: the prior learns to foresee the posterior
# - Eq. 2.5 `rep = max(1, KL(q || sg(p)))`: the posterior, gently, learns to be foreseeable
#
# The KL is summed over the groups of z before the max; one nat a step is free, not pushed down.

# %% 2.1 World model loss
class WorldModel(nn.Module):
    """Encoder, RSSM, decoder, reward and continue heads: all that learns from real rows."""

    def __init__(self, action_size: int, config: Config):
        super().__init__()
        self.config = config
        feat_size = config.hidden + config.groups * config.classes
        self.encoder = Encoder(config.depth)
        self.rssm = RSSM(128 * config.depth, action_size, config)
        self.decoder = Decoder(feat_size, config.depth)
        self.reward_head = TwoHotHead(feat_size, config.units, layers=1)
        self.cont_head = ContinueHead(feat_size, config.units)

    def loss(self, batch: Named) -> tuple[Tensor, Tensor, Tensor, Named]:
        """Rows [B,T,...] -> loss [], h [B,T,D], z [B,T,S*K], metrics (Eq. 2.6)."""
        embed = self.encoder(batch["obs"])  # [B,T,E]
        h, z, post, prior = self.rssm.observe(embed, batch["prev_action"], batch["is_first"])
        feat = torch.cat([h, z], -1)  # [B,T,F]
        error = self.decoder(feat) - batch["obs"] / 255  # [B,T,64,64,3]
        cont = 1 - batch["terminated"].float()  # [B,T]
        free = self.config.free_nats  # clamp has no gradient where the KL is below it
        losses = {  # each [B,T]
            "recon": error.square().sum((-3, -2, -1)),  # Eq. 2.1
            "reward": self.reward_head.loss(feat, batch["reward"]),  # Eq. 2.2
            "cont": self.cont_head.loss(feat, cont),  # Eq. 2.3
            "dyn": kl_divergence(sg(post), prior).clamp(min=free),  # Eq. 2.4
            "rep": kl_divergence(post, sg(prior)).clamp(min=free),  # Eq. 2.5
        }
        assert all(loss.shape == cont.shape for loss in losses.values())
        total = sum(getattr(self.config, f"scale_{name}") * loss for name, loss in losses.items())
        metrics = {f"wm/{name}": loss.detach().mean() for name, loss in losses.items()}
        metrics["wm/kl"] = kl_divergence(post, prior).detach().mean()  # before free nats
        return total.mean(), h, z, metrics

# %% 2.2 World model update step
def gradient_step(loss: Tensor, name: str, agent: Agent, optimizers: Optimizers) -> Tensor:
    """Move the weights of `agent.<name>` (4.1) and no others; returns the gradient's norm []."""
    optimizers[name].zero_grad()
    loss.backward()
    parameters = getattr(agent, name).parameters()
    norm = nn.utils.clip_grad_norm_(parameters, agent.config.max_grad_norm)
    optimizers[name].step()
    return norm

def update_world_model(agent: Agent, optimizers: Optimizers, batch: Named) -> tuple:
    """One step on rows [B,T,...] -> the states to dream from, h [N,D], z [N,S*K]; metrics."""
    loss, h, z, metrics = agent.world_model.loss(batch)
    metrics["wm/grad_norm"] = gradient_step(loss, "world_model", agent, optimizers)
    return sg(h).flatten(0, 1), sg(z).flatten(0, 1), metrics

# %% [markdown]
# # Section 3: Behavior Learning
# From every state of the batch the actor dreams H steps ahead: prior and actor alternate, and no
# environment is asked. The critic learns what return v_t to expect in a dreamed state; an action
# whose return beats v_t becomes more likely (REINFORCE: no gradient flows through the dream). The
# slow critic, a trailing average of the critic, keeps its targets steady. With eta = `entropy`:
#
# - Eq. 3.1 `a_t ~ pi(. | h_t, z_t)`, `h_{t+1} = f(h_t, z_t, a_t)`, `z_{t+1} ~ p(. | h_{t+1})`
# - Eq. 3.2 `R_t = r_{t+1} + gamma c_{t+1} ((1 - lam) v_{t+1} + lam R_{t+1})`, `R_H = v_H`
# - Eq. 3.3 `w_t = c_0 (gamma c_1) ... (gamma c_t)`: the dream counts only while it is alive
# - Eq. 3.4 `scale = max(1, running mean of (95th - 5th percentile of R))`
# - Eq. 3.5 `actor loss = -w_t (sg((R_t - v_t) / scale) ln pi(a_t | h_t, z_t) + eta entropy)`
# - Eq. 3.6 `critic loss = -w_t (ln p(R_t | h_t, z_t) + ln p(slow critic's v_t | h_t, z_t))`

# %% 3.1 Imagination
def imagine(model: WorldModel, actor: Actor, h: Tensor, z: Tensor, horizon: int) -> Tensors:
    """h [N,D], z [N,S*K] -> features [H+1,N,F], the start first, and actions [H,N,A]. Eq. 3.1."""
    feats, actions = [torch.cat([h, z], -1)], []  # [N,F]
    for _ in range(horizon):
        actions.append(actor(sg(feats[-1])).sample())  # [N,A]
        h, z = model.rssm.img_step(h, z, actions[-1])  # [N,D], [N,S*K]
        feats.append(torch.cat([h, z], -1))  # [N,F]
    return torch.stack(feats), torch.stack(actions)

# %% 3.2 Lambda-return
def lambda_return(reward: Tensor, value: Tensor, cont: Tensor, gamma: float, lam: float) -> Tensor:
    """Eq. 3.2: reward, value and cont [H+1, ...] of the states 0 to H -> R [H, ...] of 0 to H-1.
    Entry 0 of reward and cont belongs to the action before the dream, and is not used."""
    assert reward.shape == value.shape == cont.shape
    returns = [value[-1]]
    for t in reversed(range(len(value) - 1)):
        mixed = (1 - lam) * value[t + 1] + lam * returns[-1]
        returns.append(reward[t + 1] + gamma * cont[t + 1] * mixed)
    return torch.stack(returns[:0:-1])  # in the order of time, without R_H

# %% 3.3 Return normalisation, actor and critic losses
def return_scale(return_range: Tensor, returns: Tensor, rate: float) -> Tensor:
    """Move the running [5th, 95th] percentile, in place, to returns [H,N]; scale []. Eq. 3.4."""
    percentiles = torch.quantile(returns.flatten(), returns.new_tensor([0.05, 0.95]))
    return_range.lerp_(percentiles, rate)
    return (return_range[1] - return_range[0]).clamp(min=1.0)

def actor_loss(
    actor: Actor, feat: Tensor, action: Tensor, advantage: Tensor, weight: Tensor, eta: float
) -> Tensors:
    """REINFORCE, Eq. 3.5: feat [H,N,F], action [H,N,A], others [H,N] -> loss [], entropy []."""
    policy = actor(sg(feat))
    entropy = policy.entropy()  # [H,N]
    objective = sg(advantage) * policy.log_prob(sg(action)) + eta * entropy  # [H,N]
    assert objective.shape == weight.shape
    return -(sg(weight) * objective).mean(), entropy.detach().mean()

def critic_loss(
    critic: Critic, slow_critic: Critic, feat: Tensor, returns: Tensor, weight: Tensor
) -> Tensor:
    """Eq. 3.6: feat [H,N,F], returns and weight [H,N] -> loss []."""
    loss = critic.loss(sg(feat), sg(returns), sg(slow_critic(feat)))  # [H,N]
    assert loss.shape == weight.shape
    return (sg(weight) * loss).mean()

# %% 3.4 Behavior update step
def update_behavior(agent: Agent, optimizers: Optimizers, h: Tensor, z: Tensor) -> Named:
    """Dream from h [N,D] and z [N,S*K], then one step of the actor and one of the critic."""
    config, model, actor, critic = agent.config, agent.world_model, agent.actor, agent.critic
    # REINFORCE sends no gradient through the dream: only log-probabilities, computed again below,
    # carry it. That is why dreaming may run without a graph.
    with torch.no_grad():
        feat, action = imagine(model, actor, h, z, config.horizon)  # [H+1,N,F], [H,N,A]
        reward, cont = model.reward_head(feat), model.cont_head(feat)  # [H+1,N], [H+1,N]
        value = critic(feat)  # [H+1,N]
        returns = lambda_return(reward, value, cont, config.gamma, config.lam)  # [H,N]
        weight = torch.cumprod(config.gamma * cont[:-1], 0) / config.gamma  # [H,N] Eq. 3.3
        scale = return_scale(agent.return_range, returns, config.return_rate)  # []
        advantage = (returns - value[:-1]) / scale  # [H,N]
    feat = feat[:-1]  # [H,N,F]: the last state has no action
    loss_actor, entropy = actor_loss(actor, feat, action, advantage, weight, config.entropy)
    loss_critic = critic_loss(critic, agent.slow_critic, feat, returns, weight)
    norm_actor = gradient_step(loss_actor, "actor", agent, optimizers)
    norm_critic = gradient_step(loss_critic, "critic", agent, optimizers)
    with torch.no_grad():
        for slow, fast in zip(agent.slow_critic.parameters(), critic.parameters(), strict=True):
            slow.lerp_(fast, config.slow_rate)
    return {
        "ac/actor": loss_actor.detach(), "ac/critic": loss_critic.detach(), "ac/entropy": entropy,
        "ac/return": returns.mean(), "ac/value": value.mean(), "ac/return_scale": scale,
        "ac/actor_grad_norm": norm_actor, "ac/critic_grad_norm": norm_critic,
    }

# %% [markdown]
# # Section 4: Training Loop
# Random actions fill the replay buffer, and the world model alone learns from them for a while: an
# actor that learns from states without meaning settles on a policy that shows nothing new. Then
# act, update the world model, update the behavior, and again. The last cell of the file starts it.

# %% 4.1 Acting
class Agent(nn.Module):
    """All that has weights: world model, actor, critic, its slow copy; and the return range."""

    def __init__(self, action_space: gym.Space, config: Config):
        super().__init__()
        self.config, self.action_space = config, action_space
        self.action_size = gym.spaces.flatdim(action_space)
        feat_size = config.hidden + config.groups * config.classes
        self.world_model = WorldModel(self.action_size, config)
        self.actor = Actor(feat_size, action_space, config.units)
        self.critic = Critic(feat_size, config.units, layers=2)
        self.slow_critic = copy.deepcopy(self.critic).requires_grad_(False)
        self.register_buffer("return_range", torch.zeros(2))  # running 5th and 95th percentile

    @torch.no_grad()
    def act(self, obs: np.ndarray, state: tuple | None = None, explore: bool = False):
        """Frame uint8 [64,64,3], state from the last call (None: first frame) -> the most likely
        action (a sample if `explore`) for `PixelEnv.step`, state (h, z, action [1,A]). The
        recursion is the one that trains: a frame goes in with the action that led to it."""
        rssm, device = self.world_model.rssm, self.return_range.device
        is_first = torch.tensor([state is None], device=device)
        if state is None:
            state = *rssm.initial(1), torch.zeros(1, self.action_size, device=device)
        embed = self.world_model.encoder(torch.tensor(obs, device=device).unsqueeze(0))
        h, z, _ = rssm.obs_step(*state, embed, is_first)
        policy = self.actor(torch.cat([h, z], -1))
        action = policy.sample() if explore else policy.mode
        return gym.spaces.unflatten(self.action_space, action[0].cpu().numpy()), (h, z, action)

# %% 4.2 Collecting
def play(env: gym.Env, act: Callable[[np.ndarray, Any], tuple], seed: int) -> Iterator[tuple]:
    """One episode of `act(obs, state) -> (action, state)`: (row of the time diagram, is_last)."""
    obs, _ = env.reset(seed=seed)
    env.action_space.seed(seed)
    no_action = np.zeros(gym.spaces.flatdim(env.action_space), np.float32)
    yield dict(prev_action=no_action, obs=obs, reward=0.0, terminated=False, is_first=True), False
    state, is_last = None, False
    while not is_last:
        action, state = act(obs, state)
        obs, reward, terminated, truncated, _ = env.step(action)
        prev_action = gym.spaces.flatten(env.action_space, action)  # one-hot if Discrete
        row = dict(prev_action=prev_action, obs=obs, reward=reward, terminated=terminated)
        is_last = terminated or truncated  # a time limit ends the episode, but is not terminated
        yield row | {"is_first": False}, is_last

def episode_seed(seed: int, number: int, evaluation: bool) -> int:
    """Training episodes have even seeds, evaluation episodes odd ones: they never meet."""
    return 2 * (1_000_000 * seed + number) + evaluation

# %% 4.3 Training
def updates_due(step: int, config: Config) -> int:
    """How many updates a run has made after this many environment steps."""
    ratio = config.train_ratio / (config.batch_size * config.batch_length)
    return 0 if step < config.prefill else config.pretrain + int(ratio * (step - config.prefill))

def train(config: Config) -> Path:
    """Train from scratch; returns the run's folder: config, metrics, curves and checkpoint. The
    same config gives the same metrics (times aside) on the same CPU and number of threads.
    Raises DreamerError, before anything is written, for what is wrong with the config."""
    device = pick_device(config.device)
    torch.manual_seed(config.seed)
    env = PixelEnv(config.env, action_repeat=config.action_repeat)
    agent = Agent(env.action_space, config).to(device)
    replay = ReplayBuffer(config.capacity, agent.action_size)
    optimizers = {}  # one each, so that a loss moves nothing but its own part
    for name in ("world_model", "actor", "critic"):
        rate = getattr(config, f"{name}_lr")
        optimizers[name] = torch.optim.Adam(getattr(agent, name).parameters(), rate, fused=True)
    log = Log(new_folder(config), config.steps)
    step = updates = episode = 0

    def act(obs: np.ndarray, state: tuple | None) -> tuple:
        if step < config.prefill:  # where it ends, the agent takes over with a zero state
            return env.action_space.sample(), None
        return agent.act(obs, state, explore=True)

    while step < config.steps:
        rewards = []
        for row, is_last in play(env, act, episode_seed(config.seed, episode, evaluation=False)):
            replay.add(row)
            if row["is_first"]:
                continue  # a reset is a row, but not a step
            step += 1
            rewards.append(row["reward"])
            while updates < updates_due(step, config):
                batch = replay.sample(config.batch_size, config.batch_length, device)
                h, z, metrics = update_world_model(agent, optimizers, batch)
                if updates >= config.pretrain:
                    metrics |= update_behavior(agent, optimizers, h, z)
                updates += 1
                log.add(metrics, step)
            if is_last:
                episode += 1
                log.add({"env/return": sum(rewards), "env/length": len(rewards)}, step)
            evaluate_now = step % config.eval_every == 0 or step == config.steps
            if evaluate_now:
                log.add(evaluate(agent, config.eval_episodes, config.seed), step)
                save_checkpoint(log.folder, agent, optimizers, step)
            if evaluate_now or step % config.log_every == 0:
                log.write({"env/step": step, "env/episodes": episode, "wm/updates": updates})
            if step == config.steps:
                break
    env.close()
    log.bar.close()
    return log.folder

# %% 4.4 Logging, curves, checkpoint
def new_folder(config: Config) -> Path:
    """RUNS/ENV-SEED with its config.json. Raises DreamerError if it exists or cannot be written."""
    folder = Path(config.runs) / f"{re.sub('[^A-Za-z0-9._-]', '-', config.env)}-{config.seed}"
    try:
        folder.mkdir(parents=True)
        (folder / "config.json").write_text(json.dumps(asdict(config), indent=2) + "\n")
    except OSError as error:
        raise DreamerError(f"{folder}: {error.strerror}; choose another seed or runs") from error
    return folder

class Log:
    """A run's progress bar, and metrics.jsonl: a line holds the means since the line before."""

    def __init__(self, folder: Path, steps: int):
        self.folder, self.values, self.start = folder, defaultdict(list), time.monotonic()
        self.bar = tqdm(total=steps, unit="step", miniters=0, mininterval=0.5, dynamic_ncols=True)

    def add(self, metrics: dict[str, Any], step: int) -> None:
        for name, value in metrics.items():
            self.values[name].append(float(value))
        shown = ("env/return", "wm/recon", "wm/kl", "ac/actor", "ac/critic", "ac/entropy")
        self.bar.set_postfix({k: self.values[k][-1] for k in shown if k in self.values}, False)
        self.bar.update(step - self.bar.n)

    def write(self, counters: dict[str, int]) -> None:
        line = counters | {name: float(np.mean(x)) for name, x in self.values.items()}
        line["time/seconds"] = seconds = time.monotonic() - self.start
        line["time/env_steps_per_second"] = counters["env/step"] / seconds
        line["time/updates_per_second"] = counters["wm/updates"] / seconds
        with open(self.folder / "metrics.jsonl", "a") as file:
            file.write(json.dumps(line) + "\n")
        self.values.clear()
        draw_curves(self.folder)

def draw_curves(folder: Path) -> None:
    """Draw metrics.jsonl as curves.png: a panel a line below, over environment steps."""
    lines = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    panels = {
        "Episode return": ["env/return", "eval/return"],
        "Reconstruction loss (squared error of a frame)": ["wm/recon"],
        "KL(posterior || prior), nats": ["wm/kl"], "Actor entropy, nats": ["ac/entropy"]}
    figure = Figure(figsize=(10, 6), layout="constrained")
    for axes, (title, keys) in zip(figure.subplots(2, 2).flat, panels.items(), strict=True):
        for key in keys:
            points = [line for line in lines if key in line]
            steps = [line["env/step"] for line in points]
            axes.plot(steps, [line[key] for line in points], marker=".", label=key)
            if key == "eval/return":
                low, high = ([line[f"{key}_{end}"] for line in points] for end in ("min", "max"))
                axes.fill_between(steps, low, high, alpha=0.2, color="C1", label="its min to max")
        axes.set(title=title, xlabel="environment steps")
        axes.set_yscale("log" if "wm/recon" in keys else "linear")
        axes.grid(alpha=0.3)
        axes.legend()
    figure.savefig(folder / "curves.png", dpi=100)

def save_checkpoint(folder: Path, agent: Agent, optimizers: dict, step: int) -> None:
    """Write checkpoint.pt under another name, then rename it: there is never half of one."""
    states = {name: optimizer.state_dict() for name, optimizer in optimizers.items()}
    checkpoint = {"config": asdict(agent.config), "step": step, "agent": agent.state_dict()}
    torch.save(checkpoint | {"optimizers": states}, folder / "checkpoint.new")
    os.replace(folder / "checkpoint.new", folder / "checkpoint.pt")

def load_agent(path: str | Path, device: str = "auto") -> Agent:
    """The agent in a run's folder or checkpoint file, ready for `agent.act` and `evaluate`. Runs
    no code from the file; raises DreamerError if it is missing, broken or another program's."""
    path = Path(path) / "checkpoint.pt" if Path(path).is_dir() else Path(path)
    try:
        checkpoint = torch.load(path, map_location="cpu", weights_only=True)
        config = Config(**checkpoint["config"])
        agent = Agent(PixelEnv(config.env).action_space, config)
        agent.load_state_dict(checkpoint["agent"])
    except Exception as error:  # a broken file raises any of a dozen types
        reason = str(error) if isinstance(error, DreamerError) else type(error).__name__
        raise DreamerError(f"{path} is no checkpoint that can be used ({reason})") from error
    return agent.to(pick_device(device))

# %% [markdown]
# # Section 5: Self-Evaluation Metrics
# Does what was learned in dreams hold in the environment, in episodes that were never trained on?

# %% 5.1 Evaluation on unseen seeds
def evaluate(agent: Agent, episodes: int = 20, seed: int = 0) -> dict[str, float]:
    """Play evaluation episodes with the agent's most likely actions; statistics of their returns
    (undiscounted sums of rewards). Leaves the random state as it was."""
    if episodes < 1:
        raise DreamerError(f"episodes has to be at least 1, not {episodes}")
    env, returns = PixelEnv(agent.config.env, action_repeat=agent.config.action_repeat), []
    device = agent.return_range.device
    with torch.random.fork_rng([device] if device.type == "cuda" else []):
        for number in tqdm(range(episodes), desc="evaluation", unit="episode", leave=False):
            unseen = episode_seed(seed, number, evaluation=True)
            torch.manual_seed(unseen)
            returns.append(sum(row["reward"] for row, _ in play(env, agent.act, unseen)))
    env.close()
    return {"eval/return": float(np.mean(returns)), "eval/return_std": float(np.std(returns)),
            "eval/return_min": min(returns), "eval/return_max": max(returns)}

# %% Command line
def make_parser() -> argparse.ArgumentParser:
    """An option for each field of `Config`; help and groups are the comments in its source."""
    parser = argparse.ArgumentParser(
        prog="dreamer.py", usage="python dreamer.py [--OPTION VALUE ...]", allow_abbrev=False,
        description="Train Dreamer from pixels, or evaluate an agent that it trained.")
    parser.error = lambda message: parser.exit(2, f"dreamer.py: error: {message}\n")
    group = parser.add_argument_group("evaluation (with --device and --seed; others are ignored)")
    group.add_argument("--eval", metavar="RUN", help="a run's folder or checkpoint: do not train, "
                       "play unseen episodes and print mean, std, min and max of their returns")
    group.add_argument("--episodes", metavar="INT", type=int, default=20, help="how many (20)")
    group = parser.add_argument_group("run")
    defaults = asdict(Config())
    for line in inspect.getsource(Config).splitlines():
        if heading := re.fullmatch("    # (.+)", line):
            group = parser.add_argument_group(heading[1])
        elif field := re.fullmatch(r"    (\w+): (\w+) = .*  # (.+)", line):
            name, kind, text = field.groups()
            group.add_argument(
                f"--{name.replace('_', '-')}", type=type(defaults[name]), default=defaults[name],
                metavar=kind.upper(), help=f"{text} ({defaults[name]})")
    return parser

def main(argv: list[str] | None = None) -> int:
    """The command line; returns 0, 2 after one line of what to put right, 130 after Ctrl-C."""
    options = vars(make_parser().parse_args(argv))
    path, episodes = options.pop("eval"), options.pop("episodes")
    try:
        config = Config(**options)
        if path is None:
            folder = train(config)
            print(f"Results are in {folder}. Next: python dreamer.py --eval {folder}")
        else:
            agent = load_agent(path, config.device)
            mean, std, low, high = evaluate(agent, episodes, config.seed).values()
            print(f"{path}: return over {episodes} unseen episodes: "
                  f"mean {mean:.1f}, std {std:.1f}, min {low:.1f}, max {high:.1f}")
        return 0
    except DreamerError as error:
        print("dreamer.py: error:", " ".join(str(error).split()), file=sys.stderr)  # one line
        return 2
    except KeyboardInterrupt:
        print("\ndreamer.py: stopped; what it had written is kept", file=sys.stderr)
        return 130

# %% Run
if __name__ == "__main__":
    if "ipykernel" not in sys.modules:
        sys.exit(main())
    from IPython.display import Image, display  # opened as a notebook: train, show the curves

    display(Image(train(Config()) / "curves.png"))
