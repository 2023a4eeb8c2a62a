"""Dreamer in one file: learn a world model from pixels, then learn to act inside its imagination.

    python dreamer.py --device cpu               train on CartPole's pixels: runs/CartPole-v1-0
    python dreamer.py --eval runs/CartPole-v1-0  play unseen episodes with what came out

The sections carry the lesson's numbers: 1 Setup, 2 World Model Update, 3 Behavior Learning,
4 Training Loop, 5 Self-Evaluation Metrics. The algorithm is DreamerV3 (arXiv:2301.04104).

Shapes    B batch   T time   N = B*T starts of imagination   H horizon   A action   E embedding
          D = |h|   S groups of K classes, so |z| = S*K   feat = (h, z), F = |feat| = D + S*K
          Real sequences are batch first, [B, T, ...]; imagined ones time first, [H+1, N, ...].

Time      row t : prev_action a_{t-1} | obs o_t | reward r_t | terminated_t | is_first_t
          h_t = f(h_{t-1}, z_{t-1}, a_{t-1})  Eq. 1.1, recurrent state, the papers' deter
          z_t ~ q(. | h_t, o_t)               Eq. 1.2, posterior: saw the frame; the papers' stoch
          z_t ~ p(. | h_t)                    Eq. 1.3, prior: has to guess it, and so can dream
          o_t, r_t and c_t = 1 - terminated_t are predicted from (h_t, z_t).
          The action in row t is the one that led to o_t. The first row of an episode has a zero
          action, zero reward and is_first; its last frame has a row of its own.

Gradient of           reaches    encoder, RSSM, decoder, heads    actor    critic
world model loss                              yes                   -        -
actor loss                                     -                   yes       -
critic loss                                    -                    -       yes
"""

# %% [markdown]
# # Section 1: Setup
# The pixel environment, the parts of the world model, the actor, the critic and the replay buffer.
# Eq. 1.1 to 1.3 stand in the time diagram above; in 1.5 they are `recur`, `obs_step` and `prior`.

# %% 1.1 Imports and configuration
from __future__ import annotations

import argparse
import copy
import gzip
import inspect
import itertools
import json
import os
import re
import signal
import sys
import threading
import time
from collections.abc import Callable
from contextlib import AbstractContextManager
from dataclasses import asdict, dataclass
from pathlib import Path

import gymnasium as gym
import numpy as np
import torch
import torch.nn.functional as F
from filelock import FileLock
from matplotlib.figure import Figure
from PIL import Image, ImageDraw
from psutil import virtual_memory
from torch import Tensor, nn
from torch.distributions import Distribution, Independent, Normal, OneHotCategorical
from tqdm import tqdm

# SDL draws many environments. It must not need a screen, nor take SIGTERM (`kill`) from Python.
os.environ |= {"PYGAME_HIDE_SUPPORT_PROMPT": "1", "SDL_NO_SIGNAL_HANDLERS": "1"}
HEADLESS = sys.platform == "linux" and not {"DISPLAY", "WAYLAND_DISPLAY"} & os.environ.keys()
if HEADLESS:
    os.environ.setdefault("SDL_VIDEODRIVER", "dummy")
import pygame  # noqa: E402

Tensors = tuple[Tensor, ...]
Named = dict[str, Tensor]  # rows of replay by column, metrics by key

class DreamerError(Exception):
    """Something that the user can put right; the command line prints it as one line."""

@dataclass
class Config:
    """The options of a run, and of the command line; DreamerError for a number out of its range."""
    # the run
    env: str = "CartPole-v1"  # Gymnasium id; module:Id imports the module first
    seed: int = 0  # seed of weights, actions, batches and episodes
    steps: int = 10_000  # environment steps of the run, as the agent counts them
    device: str = "auto"  # auto, cpu or cuda; auto takes cuda where there is one
    runs: str = "runs"  # folder for results; a run writes to RUNS/ENV-SEED
    init_from: str = ""  # file with weights of an earlier lesson's parts, or a run, to start from
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
    free_nats: float = 0.1  # KL of a step, in nats, below which it is not penalised
    scale_recon: float = 1.0  # weight of the reconstruction loss
    scale_reward: float = 1.0  # weight of the reward loss
    scale_cont: float = 1.0  # weight of the continue loss
    scale_dyn: float = 1.0  # weight of the KL that pulls the prior to the posterior
    scale_rep: float = 0.1  # weight of the KL that pulls the posterior to the prior
    lr: float = 1e-3  # learning rate of world model, actor and critic
    lr_decay: float = 0.3  # share of the steps, the last ones, over which lr falls to 0
    max_grad_norm: float = 10.0  # norm that gradients are clipped to
    # behavior
    horizon: int = 15  # H, imagined steps
    gamma: float = 0.99  # discount of a step
    lam: float = 0.95  # lambda of the lambda-return
    entropy: float = 3e-3  # weight of the actor's entropy
    slow_rate: float = 0.02  # share of the critic that the slow critic takes over in an update
    return_rate: float = 0.01  # share of new returns in the running range of returns
    # results
    log_every: int = 500  # steps between lines of metrics.jsonl; evaluations add theirs
    eval_every: int = 2_500  # steps between evaluations
    eval_episodes: int = 5  # episodes of an evaluation during training
    held_out: int = 2_000  # rows of unseen episodes for the other metrics of Section 5
    save_every: float = 120.0  # seconds between checkpoints, at most

    def __post_init__(self):
        best = "cuda" if torch.cuda.is_available() else "cpu"
        if self.device not in ("auto", "cpu", best):
            raise DreamerError(f"there is no device {self.device} here; --device auto takes {best}")
        self.device = best if self.device == "auto" else self.device
        shares = ("unimix", "gamma", "lam", "slow_rate", "return_rate", "lr_decay")
        for name, value in asdict(self).items():
            low = {"seed": 0, "pretrain": 0, "held_out": 4}.get(name, int(isinstance(value, int)))
            high = 1 if name in shares else 1e9
            if not isinstance(value, str) and not low <= value <= high:  # catches nan, too
                raise DreamerError(f"{name} has to be between {low} and {high:.0f}, not {value}")
        if self.batch_length > min(self.prefill, self.capacity) or self.gamma == 0:
            raise DreamerError("prefill and capacity must reach batch_length, and gamma exceed 0")

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

def fork_rng(device: str) -> AbstractContextManager:
    """A block whose random numbers leave those of the rest of the program as they were."""
    return torch.random.fork_rng(range(torch.cuda.device_count()) if device == "cuda" else [])

def init_weights(module: nn.Module) -> None:
    """For `network.apply`: truncated normal weights of variance 1 / fan-in, zero biases. With the
    third of this variance that PyTorch starts from, the pole's angle enters z much later."""
    if isinstance(module, nn.Linear | nn.Conv2d | nn.ConvTranspose2d):
        fan_in = module.weight[0].numel()
        if isinstance(module, nn.ConvTranspose2d):  # weight [in, out, k, k]
            fan_in = module.weight[:, 0].numel() / np.prod(module.stride)
        std = 1.1368 / fan_in**0.5  # 1.1368 makes up for the tails cut at two sigma
        nn.init.trunc_normal_(module.weight, 0.0, std, -2 * std, 2 * std)
        nn.init.zeros_(module.bias)

def mlp(inputs: int, units: int, layers: int, outputs: int, outscale: float = 1.0) -> nn.Sequential:
    """So many times linear, layer norm, SiLU; then linear, with weights `outscale` of the usual."""
    widths = itertools.pairwise([inputs, *layers * [units]])
    hidden = [m for a, b in widths for m in (nn.Linear(a, b), nn.LayerNorm(b), nn.SiLU())]
    network = nn.Sequential(*hidden, nn.Linear(units, outputs)).apply(init_weights)
    network[-1].weight.data *= outscale
    return network

# %% 1.3 Pixel wrapper
class PixelEnv(gym.ObservationWrapper):
    """Any registered Gymnasium environment, seen through its pixels: uint8 [size, size, 3], the
    rendered frame averaged over areas. Actions are the environment's own if Discrete; in [-1, 1],
    clipped and rescaled, if Box; repeated `action_repeat` times, with their rewards summed.
    Episodes without a time limit of their own are cut after 1,000 of the environment's steps.
    Raises DreamerError for an unknown id, an environment without pixels, other action spaces."""
    spec = None  # gym.make would not give the same again

    def __init__(self, env_id: str, size: int = 64, action_repeat: int = 1):
        self.env_id, self.size, self.action_repeat = env_id, size, action_repeat
        try:
            super().__init__(gym.make(env_id, render_mode="rgb_array", disable_env_checker=True))
            self.reset()  # some environments find out only here that they cannot render
            if self.env.spec.max_episode_steps is None:  # else an evaluation might never end
                self.env = gym.wrappers.TimeLimit(self.env, 1_000)
            space = self.env.action_space
            if isinstance(space, gym.spaces.Box) and space.is_bounded() and space.dtype.kind == "f":
                self.env = gym.wrappers.RescaleAction(self.env, np.float32(-1), np.float32(1))
            elif not isinstance(space, gym.spaces.Discrete):
                raise ValueError("its actions are neither Discrete nor a bounded Box")
        except Exception as error:  # whatever an environment raises
            raise DreamerError(f"--env {env_id}: {error}") from error
        self.observation_space = gym.spaces.Box(0, 255, (size, size, 3), np.uint8)

    def step(self, action):
        if isinstance(self.action_space, gym.spaces.Box):  # the actor's normal has tails
            action = np.clip(action, -1, 1)
        total = 0.0
        for _ in range(self.action_repeat):
            _, reward, terminated, truncated, info = self.env.step(action)
            total += float(reward)
            if terminated or truncated:
                break
        return self.observation(), total, terminated, truncated, info

    def observation(self, observation=None) -> np.ndarray:
        """The frame now, in place of the environment's own observation: uint8 [size, size, 3]."""
        frame = self.env.render()
        if getattr(frame, "dtype", None) != np.uint8 or frame.shape[2:] != (3,):
            raise ValueError("it cannot render uint8 frames [height, width, 3]")
        surface = pygame.image.frombuffer(np.ascontiguousarray(frame), frame.shape[1::-1], "RGB")
        small = pygame.transform.smoothscale(surface, (self.size, self.size))
        return pygame.surfarray.array3d(small).transpose(1, 0, 2)  # pygame has [x, y, color]

# %% 1.4 CNN encoder and decoder
class ChannelNorm(nn.LayerNorm):
    """Layer norm over the channels of [N, C, H, W], whose memory is channels-last."""
    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x.permute(0, 2, 3, 1)).permute(0, 3, 1, 2)

class Encoder(nn.Sequential):
    """Frames uint8 [..., 64, 64, 3] -> embeddings [..., E], E = 128 * depth."""
    def __init__(self, depth: int):
        a, b, c = 2 * depth, 4 * depth, 8 * depth
        super().__init__(
            nn.Conv2d(3, a, 8, stride=4, padding=2), ChannelNorm(a), nn.SiLU(),  # 64 -> 16
            nn.Conv2d(a, b, 4, stride=2, padding=1), ChannelNorm(b), nn.SiLU(),  # 16 -> 8
            nn.Conv2d(b, c, 4, stride=2, padding=1), ChannelNorm(c), nn.SiLU(),  # 8 -> 4
            nn.Flatten())
        self.apply(init_weights)

    def forward(self, obs: Tensor) -> Tensor:
        x = obs.reshape(-1, *obs.shape[-3:]).permute(0, 3, 1, 2) / 255 - 0.5
        return super().forward(x).unflatten(0, obs.shape[:-3])

class Decoder(nn.Sequential):
    """Features [..., F] -> mean frames [..., 64, 64, 3] in [0, 1]."""
    def __init__(self, feat_size: int, depth: int):
        a, b, c = 2 * depth, 4 * depth, 8 * depth
        super().__init__(
            nn.Linear(feat_size, c * 4 * 4), nn.Unflatten(1, (c, 4, 4)), ChannelNorm(c), nn.SiLU(),
            nn.ConvTranspose2d(c, b, 4, stride=2, padding=1), ChannelNorm(b), nn.SiLU(),  # 4 -> 8
            nn.ConvTranspose2d(b, a, 4, stride=2, padding=1), ChannelNorm(a), nn.SiLU(),  # 8 -> 16
            nn.ConvTranspose2d(a, 3, 8, stride=4, padding=2), nn.Sigmoid())  # 16 -> 64
        self.apply(init_weights)

    def forward(self, feat: Tensor) -> Tensor:
        x = super().forward(feat.reshape(-1, feat.shape[-1]))
        return x.permute(0, 2, 3, 1).unflatten(0, feat.shape[:-1])

# %% 1.5 RSSM
def kl_divergence(p: Tensor, q: Tensor) -> Tensor:
    """KL(p || q) in nats, summed over the groups; log-probabilities [..., S, K] -> [...]."""
    return (p.exp() * (p - q)).sum((-2, -1))

class RSSM(nn.Module):
    """Recurrent state-space model (PlaNet, arXiv:1811.04551) with categorical z (DreamerV2)."""
    def __init__(self, embed_size: int, action_size: int, config: Config):
        super().__init__()
        self.groups, self.classes, self.unimix = config.groups, config.classes, config.unimix
        D, Z, units = config.hidden, config.groups * config.classes, config.units
        self.sizes = D, Z, action_size
        self.inputs = nn.Sequential(
            nn.Linear(Z + action_size, units), nn.LayerNorm(units), nn.SiLU())
        self.gates = nn.Sequential(nn.Linear(units + D, 3 * D), nn.LayerNorm(3 * D))
        self.apply(init_weights)
        self.prior_net = mlp(D, units, 1, Z)
        self.post_net = mlp(D + embed_size, units, 1, Z)

    def initial(self, batch: int) -> Tensors:
        """Before an episode: zero h [batch, D], z [batch, S*K] and action [batch, A]."""
        return tuple(self.gates[0].weight.new_zeros(batch, size) for size in self.sizes)

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

    def prior(self, h: Tensor) -> Tensor:
        """Eq. 1.3: h [., D] -> log-probabilities [., S, K] of z."""
        return self.log_probs(self.prior_net(h))

    def sample(self, log_probs: Tensor) -> Tensor:
        """z [., S*K], one-hot in each group; its gradient goes straight through to [., S, K]."""
        probs = log_probs.exp()
        # A race of exponential clocks: class k comes first with probability probs[k]
        drawn = (sg(probs) / torch.empty_like(probs).exponential_()).argmax(-1)
        return (F.one_hot(drawn, self.classes) + probs - sg(probs)).flatten(-2)

    def img_step(self, h: Tensor, z: Tensor, action: Tensor) -> Tensors:
        """One step without a frame: the next h, and z from the prior."""
        h = self.recur(h, z, action)
        return h, self.sample(self.prior(h))

    def obs_step(self, h: Tensor, z: Tensor, prev_action: Tensor, embed: Tensor,
                 is_first: Tensor) -> Tensors:
        """One step with a frame [., E]: the next h, z from the posterior, and the posterior.
        is_first [.] erases h, z and the action: nothing crosses the border of an episode."""
        keep = (~is_first).unsqueeze(-1)
        h = self.recur(h * keep, z * keep, prev_action * keep)
        post = self.log_probs(self.post_net(torch.cat([h, embed], -1)))  # Eq. 1.2
        return h, self.sample(post), post

    def observe(self, embed: Tensor, prev_action: Tensor, is_first: Tensor) -> Tensors:
        """Sequences [B,T,...] -> h [B,T,D], z [B,T,S*K], posterior and prior [B,T,S,K]."""
        (h, z, _), steps = self.initial(len(embed)), []  # a window in mid-episode starts so, too
        for t in range(embed.shape[1]):
            h, z, post = self.obs_step(h, z, prev_action[:, t], embed[:, t], is_first[:, t])
            steps.append((h, z, post))
        h, z, post = (torch.stack(x, 1) for x in zip(*steps, strict=True))
        return h, z, post, self.prior(h)

# %% 1.6 Head for rewards and values
class TwoHotHead(nn.Module):
    """Features [..., F] -> a number [...] of any size, 0 at first: a distribution over 255 bins."""
    def __init__(self, feat_size: int, units: int, layers: int):
        super().__init__()
        self.net = mlp(feat_size, units, layers, 255, outscale=0.0)
        half = symexp(torch.linspace(-20, 0, 128))  # the bins: 0, and symexp-spaced to 4.85e8
        self.register_buffer("bins", torch.cat([half, -half[:-1].flip(0)]), persistent=False)

    def forward(self, feat: Tensor) -> Tensor:
        return twohot_decode(self.net(feat), self.bins)

    def loss(self, feat: Tensor, *targets: Tensor) -> Tensor:
        """Cross-entropy [...] to the two-hot target [...]; summed, if there are several."""
        log_probs = torch.log_softmax(self.net(feat), -1)
        return -sum((twohot_encode(target, self.bins) * log_probs).sum(-1) for target in targets)

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
        self.capacity, self.count = capacity, 0  # count: of the rows that ever came
        kinds = {"obs": ((64, 64, 3), np.uint8), "prev_action": ((action_size,), np.float32),
                 "reward": ((), np.float32), "terminated": ((), bool), "is_first": ((), bool)}
        # NumPy's zeros, unlike PyTorch's, take memory only when a row is first written
        self.rows = {k: np.zeros((capacity, *shape), kind) for k, (shape, kind) in kinds.items()}

    def add(self, row: dict) -> None:
        for name, value in row.items():
            self.rows[name][self.count % self.capacity] = value
        self.count += 1

    def sample(self, batch_size: int, length: int, device: str = "cpu") -> Named:
        """[B, T, ...] windows of consecutive rows, uniform over where they can start. They run
        across episodes (is_first marks it), but never from the newest row to the oldest."""
        size = min(self.count, self.capacity)
        start = self.count - size + torch.randint(size - length + 1, (batch_size, 1)).numpy()
        index = (start + np.arange(length)) % self.capacity
        return {k: torch.from_numpy(rows[index]).to(device) for k, rows in self.rows.items()}

# %% [markdown]
# # Section 2: World Model Update
# Encode a batch of real sequences, run the RSSM over them, and predict from every state (h, z)
# what row t holds. The loss (Eq. 2.6) is the mean over B and T of the weighted sum of
# - Eq. 2.1 `recon = sum over pixels of (o_t - decoder(h_t, z_t))^2`
# - Eq. 2.2 `reward = -ln p(r_t | h_t, z_t)`, a cross-entropy with the two-hot reward
# - Eq. 2.3 `cont = -ln p(c_t | h_t, z_t)`, with `c_t = 1 - terminated_t`: a time limit ends nothing
# - Eq. 2.4 `dyn = max(free, KL(sg(q) || p))`: the prior learns to foresee the posterior
# - Eq. 2.5 `rep = max(free, KL(q || sg(p)))`: the posterior, gently, learns to be foreseeable
#
# The KL is summed over the groups of z before the max: `free_nats` a step are not pushed down.

# %% 2.1 World model loss
class WorldModel(nn.Module):
    """Encoder, RSSM, decoder, reward and continue heads: all that learns from real rows."""
    def __init__(self, action_size: int, config: Config):
        super().__init__()
        self.config = config
        self.feat_size = feat_size = config.hidden + config.groups * config.classes
        self.encoder = Encoder(config.depth)
        self.rssm = RSSM(128 * config.depth, action_size, config)
        self.decoder = Decoder(feat_size, config.depth)
        self.reward_head = TwoHotHead(feat_size, config.units, layers=1)
        self.cont_head = mlp(feat_size, config.units, 1, 1)  # the logit of c

    def predict(self, feat: Tensor) -> Tensors:
        """Features [..., F] -> reward [...], and probability [...] that the episode goes on."""
        return self.reward_head(feat), torch.sigmoid(self.cont_head(feat).squeeze(-1))

    def loss(self, batch: Named) -> tuple[Tensor, Tensor, Tensor, Named]:
        """Rows [B,T,...] -> loss [], h [B,T,D], z [B,T,S*K], metrics (Eq. 2.6)."""
        embed = self.encoder(batch["obs"])  # [B,T,E]
        h, z, post, prior = self.rssm.observe(embed, batch["prev_action"], batch["is_first"])
        feat = torch.cat([h, z], -1)  # [B,T,F]
        error = self.decoder(feat) - batch["obs"] / 255  # [B,T,64,64,3]
        logit, cont = self.cont_head(feat).squeeze(-1), 1 - batch["terminated"].float()  # [B,T]
        free = self.config.free_nats  # clamp has no gradient where the KL is below it
        losses = {  # each [B,T]
            "recon": error.square().sum((-3, -2, -1)),  # Eq. 2.1
            "reward": self.reward_head.loss(feat, batch["reward"]),  # Eq. 2.2
            "cont": F.binary_cross_entropy_with_logits(logit, cont, reduction="none"),  # Eq. 2.3
            "dyn": kl_divergence(sg(post), prior).clamp(min=free),  # Eq. 2.4
            "rep": kl_divergence(post, sg(prior)).clamp(min=free)}  # Eq. 2.5
        assert all(loss.shape == cont.shape for loss in losses.values())
        total = sum(getattr(self.config, f"scale_{name}") * loss for name, loss in losses.items())
        metrics = {f"wm/{name}": loss.detach().mean() for name, loss in losses.items()}
        metrics["wm/kl"] = kl_divergence(post, prior).detach().mean()  # before free nats
        return total.mean(), h, z, metrics

# %% 2.2 World model update step
def gradient_step(loss: Tensor, name: str, agent: Agent, metrics: Named) -> Tensor:
    """Move the weights that the loss of `name` reaches; returns the norm [] of its gradient.
    FloatingPointError, which names the guilty `metrics`, if loss or gradient is not finite."""
    agent.optimizer.zero_grad()  # to None: Adam does not move what has no gradient
    loss.backward()
    norm = nn.utils.clip_grad_norm_(agent.parameters(), agent.config.max_grad_norm)
    if not torch.isfinite(loss + norm):  # no weight has been touched
        terms = [key for key, value in metrics.items() if not torch.isfinite(value)]
        raise FloatingPointError(f"not finite: {', '.join(terms) or 'the gradient of ' + name}")
    agent.optimizer.step()
    return norm

def update_world_model(agent: Agent, batch: Named) -> tuple[Tensor, Tensor, Named]:
    """One step on rows [B,T,...] -> the states to dream from, h [N,D], z [N,S*K]; metrics."""
    loss, h, z, metrics = agent.world_model.loss(batch)
    metrics["wm/grad_norm"] = gradient_step(loss, "world_model", agent, metrics)
    return sg(h).flatten(0, 1), sg(z).flatten(0, 1), metrics

# %% [markdown]
# # Section 3: Behavior Learning
# From every state of the batch the actor dreams H steps ahead: prior and actor alternate, and no
# environment is asked. The critic learns what return v_t to expect in a dreamed state; an action
# whose return beats v_t becomes more likely (REINFORCE: no gradient flows through the dream). The
# slow critic, a trailing average of the critic, keeps its targets steady. With eta = `entropy`:
# - Eq. 3.1 `a_t ~ pi(. | h_t, z_t)`, `h_{t+1} = f(h_t, z_t, a_t)`, `z_{t+1} ~ p(. | h_{t+1})`
# - Eq. 3.2 `R_t = r_{t+1} + gamma c_{t+1} ((1 - lam) v_{t+1} + lam R_{t+1})`, `R_H = v_H`
# - Eq. 3.3 `w_t = c_0 (gamma c_1) ... (gamma c_t)`: the dream counts only while it is alive
# - Eq. 3.4 `scale = max(1, running mean of (95th - 5th percentile of R))`
# - Eq. 3.5 `actor loss = -w_t (sg((R_t - v_t) / scale) ln pi(a_t | h_t, z_t) + eta entropy)`
# - Eq. 3.6 `critic loss = -w_t (ln p(R_t | h_t, z_t) + ln p(slow critic's v_t | h_t, z_t))`

# %% 3.1 Imagination
def imagine(model: WorldModel, actor: Actor, h: Tensor, z: Tensor, horizon: int,
            given: Tensor | None = None) -> Tensors:
    """h [N,D], z [N,S*K] -> features [H+1,N,F], the start first, and actions [H,N,A]: the actor's,
    or those that are `given`. Eq. 3.1."""
    feats, actions = [torch.cat([h, z], -1)], []  # [N,F]
    for t in range(horizon):
        actions.append(actor(sg(feats[-1])).sample() if given is None else given[t])  # [N,A]
        h, z = model.rssm.img_step(h, z, actions[-1])  # [N,D], [N,S*K]
        feats.append(torch.cat([h, z], -1))  # [N,F]
    return torch.stack(feats), torch.stack(actions)

# %% 3.2 Lambda-return
def lambda_return(reward: Tensor, value: Tensor, cont: Tensor, gamma: float, lam: float) -> Tensor:
    """Eq. 3.2: reward, value and cont [H+1, ...] of the states 0 to H -> R [H, ...] of 0 to H-1.
    Entry 0 of reward and cont belongs to the action before the dream, and is not used."""
    returns = [value[-1]]
    for t in reversed(range(len(value) - 1)):
        mixed = (1 - lam) * value[t + 1] + lam * returns[-1]
        returns.append(reward[t + 1] + gamma * cont[t + 1] * mixed)
    return torch.stack(returns[:0:-1])  # in the order of time, without R_H

# %% 3.3 Return normalisation
def return_scale(return_range: Tensor, returns: Tensor, rate: float) -> Tensor:
    """Move the running [5th, 95th] percentile, in place, to returns [H,N]; scale []. Eq. 3.4."""
    percentiles = torch.quantile(returns.flatten(), returns.new_tensor([0.05, 0.95]))
    return_range.lerp_(percentiles, rate)
    return (return_range[1] - return_range[0]).clamp(min=1.0)

# %% 3.4 Actor and critic losses, behavior update step
def update_behavior(agent: Agent, h: Tensor, z: Tensor) -> Named:
    """Dream from h [N,D] and z [N,S*K], then one step of the actor and one of the critic."""
    config, model, actor, critic = agent.config, agent.world_model, agent.actor, agent.critic
    with torch.no_grad():  # allowed: REINFORCE needs the gradient of ln pi alone, computed below
        feat, action = imagine(model, actor, h, z, config.horizon)  # [H+1,N,F], [H,N,A]
        (reward, cont), value = model.predict(feat), critic(feat)  # each [H+1,N]
        returns = lambda_return(reward, value, cont, config.gamma, config.lam)  # [H,N]
        weight = torch.cumprod(config.gamma * cont[:-1], 0) / config.gamma  # [H,N] Eq. 3.3
        scale = return_scale(agent.return_range, returns, config.return_rate)  # []
    feat, advantage = feat[:-1], (returns - value[:-1]) / scale  # [H,N,F], [H,N]: no action in H
    policy = actor(sg(feat))
    entropy = policy.entropy()  # [H,N]
    gain = sg(advantage) * policy.log_prob(sg(action)) + config.entropy * entropy  # [H,N]
    actor_loss = -(sg(weight) * gain).mean()  # Eq. 3.5
    surprise = critic.loss(sg(feat), sg(returns), sg(agent.slow_critic(feat)))  # [H,N]
    critic_loss = (sg(weight) * surprise).mean()  # Eq. 3.6
    assert gain.shape == surprise.shape == weight.shape
    metrics = {
        "ac/actor": actor_loss.detach(), "ac/critic": critic_loss.detach(),
        "ac/entropy": entropy.detach().mean(), "ac/return": returns.mean(),
        "ac/value": value.mean(), "ac/return_scale": scale}
    gradient_step(actor_loss, "actor", agent, metrics)
    gradient_step(critic_loss, "critic", agent, metrics)
    with torch.no_grad():
        for slow, fast in zip(agent.slow_critic.parameters(), critic.parameters(), strict=True):
            slow.lerp_(fast, config.slow_rate)
    return metrics

# %% [markdown]
# # Section 4: Training Loop
# Random actions fill the replay buffer, and the world model alone learns from them for a while: an
# actor that learns from states without meaning settles on a policy that shows nothing new. Then
# act, update the world model, update the behavior, and again. The last cell of the file starts it.

# %% 4.1 Acting
class Agent(nn.Module):
    """All that learns: world model, actor, critic, its slow copy, and the range of returns."""
    def __init__(self, action_space: gym.Space, config: Config):
        super().__init__()
        self.config, self.action_space = config, action_space
        self.action_size = gym.spaces.flatdim(action_space)
        self.world_model = WorldModel(self.action_size, config)
        self.actor = Actor(self.world_model.feat_size, action_space, config.units)
        self.critic = Critic(self.world_model.feat_size, config.units, layers=2)
        self.slow_critic = copy.deepcopy(self.critic).requires_grad_(False)
        self.register_buffer("return_range", torch.zeros(2))  # running 5th and 95th percentile
        self.to(config.device)
        self.optimizer = torch.optim.Adam(self.parameters(), config.lr, fused=True)

    @torch.no_grad()
    def act(self, obs: np.ndarray, state: Tensors | None = None, explore: bool = False) -> tuple:
        """Frame uint8 [64,64,3], state from the last call (None: first frame) -> the most likely
        action (a sample if `explore`) for `PixelEnv.step`, state (h, z, action [1,A]). The
        recursion is the one that trains: a frame goes in with the action that led to it."""
        model, device = self.world_model, self.config.device
        embed = model.encoder(torch.as_tensor(obs, device=device).unsqueeze(0))
        is_first = torch.tensor([state is None], device=device)
        h, z, _ = model.rssm.obs_step(*(state or model.rssm.initial(1)), embed, is_first)
        policy = self.actor(torch.cat([h, z], -1))
        action = policy.sample() if explore else policy.mode
        return gym.spaces.unflatten(self.action_space, action[0].cpu().numpy()), (h, z, action)

# %% 4.2 Collecting
def episode_seed(seed: int, number: int, evaluation: bool) -> int:
    """Training episodes have even seeds, evaluation episodes odd ones: they never meet."""
    return 2 * (1_000_000 * seed + number) + evaluation

def play(env: PixelEnv, act: Callable, seed: int):
    """An episode of `act(obs, state) -> (action, state)`; yields rows of the time diagram, is_last.
    DreamerError, which says where, for whatever goes wrong in the environment."""
    env.action_space.seed(seed)
    action, state, prev_action = None, None, np.zeros(gym.spaces.flatdim(env.action_space))
    for step in itertools.count():
        try:
            obs, reward, terminated, truncated, *_ = env.step(action) if step else (
                env.reset(seed=seed)[0], 0.0, False, False)
            if not np.isfinite(reward):
                raise ValueError(f"the reward is {reward}")
        except Exception as error:  # whatever an environment raises
            where = f"{env.env_id}, episode with seed {seed}, step {step}"
            raise DreamerError(f"{where}: {error!r}") from error
        is_last = terminated or truncated  # a time limit ends the episode, but is not terminated
        yield dict(prev_action=prev_action, obs=obs, reward=reward, terminated=terminated,
                   is_first=step == 0), is_last
        if is_last:
            return
        action, state = act(obs, state)
        prev_action = gym.spaces.flatten(env.action_space, action)  # one-hot if Discrete

# %% 4.3 A run, which can stop and go on
CHECKPOINTS = "checkpoint.pt.gz", "checkpoint-before.pt.gz"  # the newest, and the one before

class Run:
    """A training run: `progress`, and what else `save` writes, is all that there is of it."""
    progress = ("step", "updates", "episodes", "past", "score", "state", "values", "lines")

    def __init__(self, config: Config, folder: Path):
        self.config, self.folder, self.start = config, folder, time.monotonic()
        self.env = PixelEnv(config.env, action_repeat=config.action_repeat)
        torch.manual_seed(config.seed)
        self.agent = Agent(self.env.action_space, config)
        self.replay = ReplayBuffer(config.capacity, self.agent.action_size)
        self.step = self.updates = self.episodes = self.score = self.signal = 0
        self.past, self.state = [], None  # actions of the episode under way; state of the agent
        self.values, self.lines = {}, []  # metrics since the last line; lines of metrics.jsonl

    def episode(self):
        """An episode into the replay buffer, from where the run is; yields after every step.
        A resumed run first takes the actions in `past` again, to come back into its episode."""
        space, again, seed = self.env.action_space, [*self.past], self.config.seed

        def act(obs: np.ndarray, _) -> tuple:
            if again:
                return gym.spaces.unflatten(space, again.pop(0).numpy()), None
            if self.step < self.config.prefill:  # seeded by the step, for runs that are resumed
                space.seed(episode_seed(seed, self.step, evaluation=False))
                return space.sample(), None
            action, self.state = self.agent.act(obs, self.state, explore=True)
            return action, None

        rows = play(self.env, act, episode_seed(seed, self.episodes, evaluation=False))
        known = len(again) + bool(again)  # rows of these actions, and the first: already in replay
        for row, is_last in itertools.islice(rows, known, None):
            self.replay.add(row)
            if row["is_first"]:  # no step has been made
                continue
            self.step, self.score = self.step + 1, self.score + row["reward"]
            self.past.append(torch.from_numpy(row["prev_action"]))
            if not is_last:
                yield
        self.log({"env/return": self.score, "env/length": len(self.past)})
        self.episodes, self.score, self.past, self.state = self.episodes + 1, 0, [], None
        yield

    def update(self) -> None:
        """An update of the world model and, after `pretrain` of those, one of the behavior."""
        config, left = self.config, 1 - self.step / self.config.steps
        decay = min(1, left / config.lr_decay) if config.lr_decay else 1
        self.agent.optimizer.param_groups[0]["lr"] = config.lr * decay
        batch = self.replay.sample(config.batch_size, config.batch_length, config.device)
        h, z, metrics = update_world_model(self.agent, batch)
        if self.updates >= config.pretrain:
            metrics |= update_behavior(self.agent, h, z)
        self.updates += 1
        self.log(metrics)

    def log(self, metrics: dict) -> None:
        for name, value in metrics.items():
            self.values.setdefault(name, []).append(float(value))
        shown = ("env/return", "wm/recon", "wm/kl", "ac/actor", "ac/critic", "ac/entropy")
        self.bar.set_postfix({k: self.values[k][-1] for k in shown if k in self.values}, False)
        self.bar.update(self.step - self.bar.n)

    def report(self, finished: bool) -> None:
        """If they are due: an evaluation, a line of metrics.jsonl with the means since the last."""
        config, seconds = self.config, time.monotonic() - self.start
        if finished or self.step % config.eval_every == 0:
            self.log(evaluate(self.agent, config.eval_episodes, config.seed, self.folder))
        elif self.step % config.log_every:
            return
        line = {"env/step": self.step, "env/episodes": self.episodes, "wm/updates": self.updates,
                "time/seconds": seconds, "time/env_steps_per_second": self.step / seconds,
                "time/updates_per_second": self.updates / seconds}
        line |= {name: float(np.mean(values)) for name, values in self.values.items()}
        self.lines, self.values = [*self.lines, line], {}
        with open(self.folder / "metrics.jsonl", "a") as file:
            file.write(json.dumps(line) + "\n")
        draw_curves(self.lines, self.folder / "curves.png")

    def save(self) -> None:
        """checkpoint.pt.gz, written beside and renamed when whole; the one before stays with it."""
        new, newest, before = (self.folder / name for name in ("new.pt.gz", *CHECKPOINTS))
        rows = {k: torch.from_numpy(x[: self.replay.count]) for k, x in self.replay.rows.items()}
        cuda = torch.cuda.get_rng_state_all() if self.config.device == "cuda" else []
        with gzip.open(new, "wb", compresslevel=1) as file:
            torch.save({
                "config": asdict(self.config), "seconds": time.monotonic() - self.start,
                "agent": self.agent.state_dict(), "optimizer": self.agent.optimizer.state_dict(),
                "random": [torch.get_rng_state(), *cuda],
                "progress": {name: getattr(self, name) for name in self.progress},
                "rows": rows, "count": self.replay.count}, file)
        if newest.exists():
            newest.replace(before)
        new.replace(newest)

    def load(self) -> None:
        """Go on from the checkpoint in the folder."""
        state = read_checkpoint(self.folder)
        for name, value in state["config"].items():
            if name not in ("steps", "device") and value != getattr(self.config, name):
                raise DreamerError(f"{name} was {value}, and cannot change when a run is resumed")
        if self.config.steps < state["progress"]["step"]:
            raise DreamerError(f"the run has made {state['progress']['step']} steps already")
        self.agent.load_state_dict(state["agent"])
        self.agent.optimizer.load_state_dict(state["optimizer"])
        for name, x in state["rows"].items():
            self.replay.rows[name][: len(x)] = x
        self.replay.count, self.start = state["count"], self.start - state["seconds"]
        vars(self).update(state["progress"])
        self.state = self.state and tuple(x.to(self.config.device) for x in self.state)
        torch.set_rng_state(state["random"][0])
        if self.config.device == "cuda":
            torch.cuda.set_rng_state_all(state["random"][1:])

    def stop(self, number: int, _) -> None:
        """For a signal: stop where the run can be saved; at a second one, at once."""
        self.signal = number
        signal.signal(signal.SIGINT, signal.default_int_handler)
        signal.signal(signal.SIGTERM, signal.SIG_DFL)

    def loop(self) -> None:
        """Act, update, report, until all steps are made or a signal comes."""
        config, saved = self.config, -np.inf
        steps = itertools.chain.from_iterable(iter(self.episode, None))  # without end
        ratio = config.train_ratio / (config.batch_size * config.batch_length)  # updates in a step
        while True:
            due = config.pretrain + int(ratio * (self.step - config.prefill))
            behind = self.step >= config.prefill and self.updates < due
            finished, stopped = self.step >= config.steps and not behind, self.signal
            if stopped or finished or time.monotonic() > saved + config.save_every:
                self.save()  # the one place where a run stops, and so the one from which it goes on
                saved = time.monotonic()
            if stopped:
                return
            if behind:
                self.update()
                continue
            if self.step:
                self.report(finished)
            if finished:  # saved before its last line: with more steps a run goes on without it
                return
            next(steps)

# %% 4.4 Training
def train(config: Config, resume: str | Path | None = None) -> Path:
    """Train from scratch, or go on with the run in the folder `resume`; returns the run's folder.
    The same config gives the same metrics (times aside) on the same CPU and number of threads, no
    matter how often it was stopped. SIGINT and SIGTERM raise SystemExit, after saving.
    Raises DreamerError, before anything is written, for what is wrong with the config."""
    name = re.sub("[^A-Za-z0-9._-]", "-", f"{config.env}-{config.seed}")
    folder = Path(resume or Path(config.runs) / name)
    if not resume and any((folder / file).exists() for file in ("metrics.jsonl", *CHECKPOINTS)):
        raise DreamerError(f"{folder} exists: --resume it, or choose another seed or runs")
    if resume and not folder.is_dir():
        raise DreamerError(f"{folder} is not the folder of a run")
    need, free = 12.5e-6 * min(config.capacity, 2 * config.steps), virtual_memory().available / 1e9
    if need > free:
        raise DreamerError(f"replay needs {need:.1f} of {free:.1f} GB of memory: lower --capacity")
    run = Run(config, folder)
    if config.init_from and not resume:
        init_from(run.agent, config.init_from)
    folder.mkdir(parents=True, exist_ok=True)
    run.bar = tqdm(total=config.steps, unit="step", mininterval=0.5, miniters=0, dynamic_ncols=True)
    with FileLock(folder / "in-use.lock", timeout=0), run.bar:  # one process at a time
        if resume:
            run.load()
            lines = "".join(json.dumps(line) + "\n" for line in run.lines)
            (folder / "metrics.jsonl").write_text(lines)  # without those after the checkpoint
        (folder / "config.json").write_text(json.dumps(asdict(config), indent=2) + "\n")
        main_thread = threading.current_thread() is threading.main_thread()  # it alone may do this
        numbers = (signal.SIGINT, signal.SIGTERM) if main_thread else ()
        handlers = {number: signal.signal(number, run.stop) for number in numbers}
        try:
            run.loop()
        except FloatingPointError as error:
            raise DreamerError(f"step {run.step}, update {run.updates}: {error}") from error
        finally:
            for number, handler in handlers.items():
                signal.signal(number, handler)
    if run.signal:
        draw_curves(run.lines, folder / "curves.png")
        print(f"stopped at step {run.step} of {config.steps}, and saved; to go on: "
              f'python dreamer.py --resume "{folder}"', file=sys.stderr)
        raise SystemExit(128 + run.signal)
    return folder

# %% 4.5 Files and curves
def read_checkpoint(path: str | Path) -> dict:
    """A checkpoint file, or the newest in a run's folder that is whole: gzip's checksum tells.
    Runs no code from the file. Raises DreamerError if there is none, or of another version."""
    path, problems = Path(path), []
    for file in [path / name for name in CHECKPOINTS] if path.is_dir() else [path]:
        try:
            with gzip.open(file) as packed:
                state = torch.load(packed, map_location="cpu", weights_only=True)
            Config(**state["config"] | {"device": "cpu"})  # TypeError: another version wrote it
            if problems:
                print(f"{problems[0]}; took {file} in its place", file=sys.stderr)
            return state
        except Exception as error:  # a damaged file raises any of a dozen types
            problems.append(f"{file.name}: {error!r}")
    raise DreamerError(f"{path} is no checkpoint that can be used ({'; '.join(problems)})")

def load_agent(path: str | Path, device: str = "auto") -> Agent:
    """The agent in a run's folder or checkpoint file, ready for `agent.act` and `evaluate`.
    Raises DreamerError if there is no whole one."""
    state = read_checkpoint(path)
    config = Config(**state["config"] | {"device": device})
    agent = Agent(PixelEnv(config.env).action_space, config)
    agent.load_state_dict(state["agent"])
    return agent

def init_from(agent: Agent, path: str) -> None:
    """Start from the weights of a run, or from those in a .pt file: the state_dict of one of
    encoder, rssm, decoder, reward_head, cont_head, actor and critic, or {name: state_dict} of
    several. Prints what is loaded, and what does not fit."""
    def parts_of(agent: Agent) -> dict[str, nn.Module]:
        return dict(agent.world_model.named_children(), actor=agent.actor, critic=agent.critic)

    try:
        saved = torch.load(path, "cpu", weights_only=True) if path.endswith((".pt", ".pth")) else {
            name: part.state_dict() for name, part in parts_of(load_agent(path, "cpu")).items()}
        loaded = []
        for name, part in parts_of(agent).items():
            own, new = ({(key, getattr(x, "shape", None)) for key, x in weights.items()}
                        for weights in (part.state_dict(), saved.get(name, saved)))
            if own == new:  # all of a part, or nothing
                part.load_state_dict(saved.get(name, saved))
                loaded.append(name)
                print(f"{path}: {name} is loaded")
            elif name in saved:
                wrong = ", ".join(sorted({key for key, _ in own ^ new}))
                print(f"{path}: {name} does not fit: {wrong}")
        if not loaded:
            raise ValueError(f"it holds no {', '.join(parts_of(agent))} that fits")
    except Exception as error:  # a damaged file raises any of a dozen types
        raise DreamerError(f"--init-from {path}: {error}") from error
    agent.slow_critic.load_state_dict(agent.critic.state_dict())

def draw_curves(lines: list[dict], path: Path) -> None:
    """curves.png from the lines of metrics.jsonl: the panels below, over environment steps."""
    panels = {
        "episode return": ["env/return", "eval/return"], "reconstruction loss": ["wm/recon"],
        "KL of posterior and prior, nats": ["wm/dyn", "wm/rep", "wm/kl"],
        "actor entropy, nats": ["ac/entropy"],
        "correlation of dreamed and real": ["eval/reward_rho", "eval/return_rho"],
        "trajectory entropy, nats": ["eval/trajectory_entropy"]}
    figure = Figure(figsize=(12, 6.5), layout="constrained")
    for axes, (label, keys) in zip(figure.subplots(2, 3).flat, panels.items(), strict=True):
        for key in keys:
            points = [(x["env/step"], x[key], x.get(f"{key}_std", 0)) for x in lines if key in x]
            axes.errorbar(*np.reshape(points, (-1, 3)).T, marker=".", label=key)
        scale = "log" if "wm/recon" in keys else "linear"
        axes.set(xlabel="environment steps", ylabel=label, yscale=scale)
        axes.grid(alpha=0.3)
        axes.legend()
    figure.savefig(path, dpi=100)

# %% [markdown]
# # Section 5: Self-Evaluation Metrics
# Does the dream match the world, in episodes that were never trained on? From states that saw the
# frames the prior dreams on, K steps, under the actions that were really taken. A hat marks what
# was dreamed; alive_k is 1 until the real episode has terminated, then 0 (and any action goes).
# - Eq. 5.1 `reward_rho = corr(hat c_1 ... hat c_{k-1} hat r_k, alive_{k-1} r_k)`, over all k <= H
# - Eq. 5.2 `return_rho`: the same, of sums over k <= H discounted by `gamma^{k-1}`
# - Eq. 5.3 `reward_error_k`: mean difference of the two rewards of Eq. 5.1, k = 1, 5, 15, 50
# - Eq. 5.4 `pixel_error_k = |o_k - decoder(hat h_k, hat z_k)|^2`, summed as in Eq. 2.1, beside what
#   the last frame that was seen (`repeat`) and the mean frame (`mean`) miss
# - Eq. 5.5 `trajectory_entropy`: sum over H dreamed steps of the actor of `policy_entropy`, that of
#   pi(. | h_k, z_k), and `latent_entropy`, that of the prior p(. | h_{k+1})
# - Eq. 5.6 `latent_fid = |m - m'|^2 + tr(C + C' - 2 (C C')^{1/2})`, means, covariances of real and
#   dreamed (h_H, z_H): the lesson's FID with the agent's own features, for want of a pretrained net
# - Eq. 5.7 `value_error = mean |v_t - (r_{t+1} + gamma r_{t+2} + ...)|`, rewards that really came

# %% 5.1 Evaluation on unseen seeds
def evaluate(agent: Agent, episodes: int = 20, seed: int = 0, folder: Path | None = None) -> dict:
    """The metrics of this section as `eval/...`, without those that are not defined. Returns are
    sums of rewards of `episodes` unseen episodes, played with the most likely actions. `held_out`
    rows are kept: the first half from these (Eq. 5.7), the rest from further ones in which random
    actions take over (the others). Pictures go to `folder`. Leaves the random state as it was."""
    if episodes < 1:
        raise DreamerError(f"episodes has to be at least 1, not {episodes}")
    env, returns = PixelEnv(agent.config.env, action_repeat=agent.config.action_repeat), []
    held_out = ReplayBuffer(agent.config.held_out, agent.action_size)

    def policy_then_random(obs: np.ndarray, state) -> tuple:
        if state == "random" or torch.rand(()) < 0.02:  # after 50 steps, on average
            return env.action_space.sample(), "random"
        return agent.act(obs, state)

    bar = tqdm(total=episodes, desc="evaluation", unit="episode", leave=False)
    with bar, fork_rng(agent.config.device):
        torch.manual_seed(seed)
        while (number := len(returns)) < episodes or held_out.count < held_out.capacity:
            by_policy = number < episodes
            act = agent.act if by_policy else policy_then_random
            returns.append(0.0)
            for row, _ in play(env, act, episode_seed(seed, number, evaluation=True)):
                returns[-1] += row["reward"]
                if held_out.count < held_out.capacity // (1 + by_policy):
                    held_out.add(row)
            if by_policy:
                policy_rows = held_out.count
            bar.update(by_policy)
        metrics = dream_metrics(agent, held_out.rows, policy_rows, folder)
    env.close()
    statistics = {"": np.mean, "_std": np.std, "_min": np.min, "_max": np.max}
    metrics = {f"return{k}": float(f(returns[:episodes])) for k, f in statistics.items()} | metrics
    if missing := [name for name, value in metrics.items() if not np.isfinite(value)]:
        tqdm.write(f"not defined on these episodes: {', '.join(missing)}", sys.stderr)
    return {f"eval/{name}": metrics[name] for name in metrics if name not in missing}

# %% 5.2 Dreamed against real
def correlation(x: Tensor, y: Tensor) -> float:
    """Pearson's, of two vectors; nan where one of them does not vary."""
    if len(x) == 0 or x.min() == x.max() or y.min() == y.max():
        return np.nan
    return torch.corrcoef(torch.stack([x, y]).double())[0, 1].item()

def frechet_distance(x: Tensor, y: Tensor) -> float:
    """Eq. 5.6, for features [N,F] and [M,F] (FID, arXiv:1706.08500); nan for less than two."""
    if min(len(x), len(y)) < 2:
        return np.nan
    (m, c), (n, d) = ((feat.mean(0), torch.cov(feat.T)) for feat in (x.double(), y.double()))
    trace_of_root = torch.linalg.eigvals(c @ d).real.clamp(min=0).sqrt().sum()
    return ((m - n).square().sum() + c.trace() + d.trace() - 2 * trace_of_root).item()

def dream_along(agent: Agent, rows: Named, h: Tensor, z: Tensor, start: Tensor, K: int) -> Tensors:
    """From h, z [L,...] at rows start [N], dream under the actions that were taken -> features
    [K+1,N,F], the rows they stand for [K+1,N], whether the episode lasted until there [K+1,N]."""
    row = start + torch.arange(K + 1, device=start.device).unsqueeze(1)
    lasted, row, episode = row < len(h), row.clamp(max=len(h) - 1), rows["is_first"].cumsum(0)
    actions = rows["prev_action"][row[1:]]  # [K,N,A]
    feat, _ = imagine(agent.world_model, agent.actor, h[start], z[start], K, actions)
    return feat, row, lasted & (episode[row] == episode[start])

def value_and_return(agent: Agent, rows: Named, feat: Tensor) -> Tensors:
    """Eq. 5.7: critic's values and the returns that came [.], of rows [P,...] that the policy made.
    Where a time limit ended an episode, the value of its last state stands for what is not seen."""
    first, value = rows["is_first"][: len(feat)], agent.critic(feat)
    # An episode's first row gets the last value of the one before as its reward: a bootstrap
    reward = torch.where(first, value.roll(1), rows["reward"][: len(feat)])
    cont = (~first & ~rows["terminated"][: len(feat)]).float()
    came = lambda_return(reward, value, cont, agent.config.gamma, lam=1.0)
    return value[:-1][~first[1:]], came[~first[1:]]

@torch.no_grad()
def dream_metrics(agent: Agent, rows: dict, policy_rows: int, folder: Path | None = None) -> dict:
    """Eq. 5.1 to 5.7 on held-out rows [L,...]; the first `policy_rows` are the policy's alone."""
    model, H, gamma, metrics = agent.world_model, agent.config.horizon, agent.config.gamma, {}
    rows = {name: torch.as_tensor(x).to(agent.config.device) for name, x in rows.items()}
    obs, ends, first = rows["obs"], rows["terminated"], rows["is_first"]  # [L,...]
    h, z, *_ = model.rssm.observe(model.encoder(obs)[None], rows["prev_action"][None], first[None])
    h, z, episode = h[0], z[0], first.cumsum(0)  # [L,D], [L,S*K], [L]
    start = policy_rows + (~ends[policy_rows:]).nonzero()[::2, 0]  # [N]: every second row
    dream, row, lasted = dream_along(agent, rows, h, z, start, max(H, 50))  # [K+1,N,F]
    known = lasted | torch.isin(episode, episode[ends])[start]  # [K+1,N]: after a real end, too
    reward, cont = model.predict(dream)  # [K+1,N]
    cont[0] = 1  # at the start the episode is alive
    dreamed, real = cont.cumprod(0)[:-1] * reward[1:], (rows["reward"][row] * lasted)[1:]  # [K,N]
    sure, discount = known[1 : H + 1], gamma ** torch.arange(H, device=h.device)
    metrics["reward_rho"] = correlation(dreamed[:H][sure], real[:H][sure])  # Eq. 5.1
    sums = [(discount @ x[:H])[sure[-1]] for x in (dreamed, real)]
    metrics["return_rho"] = correlation(*sums)  # Eq. 5.2
    mean = obs.float().mean(0) / 255
    for k in (1, 5, 15, 50):
        metrics[f"reward_error_{k}"] = (dreamed - real)[k - 1][known[k]].abs().mean()  # Eq. 5.3
        guesses = {"": model.decoder(dream[k]), "_repeat": obs[start] / 255, "_mean": mean}
        for name, guess in guesses.items():
            error = (guess - obs[row[k]] / 255).square().sum((-3, -2, -1))  # [N]
            metrics[f"pixel_error{name}_{k}"] = error[lasted[k]].mean()  # Eq. 5.4
    imagined, _ = imagine(model, agent.actor, h[start], z[start], H)  # [H+1,N,F]
    policy = agent.actor(imagined[:-1]).entropy()  # [H,N]
    prior = model.rssm.prior(imagined[1:, :, : h.shape[1]])  # [H,N,S,K]
    latent = torch.special.entr(prior.exp()).sum((-2, -1))  # [H,N]
    metrics |= {"policy_entropy": policy.mean(), "latent_entropy": latent.mean()}
    metrics["trajectory_entropy"] = (policy + latent).sum(0).mean()  # Eq. 5.5
    feat = torch.cat([h, z], -1)  # [L,F]
    real, dreamed = feat[row[H][lasted[H]]], dream[H][lasted[H]]  # [M,F]
    metrics["latent_fid"] = frechet_distance(real[::2], dreamed[1::2])  # Eq. 5.6
    metrics["latent_fid_floor"] = frechet_distance(real[::2], real[1::2])
    value, came = value_and_return(agent, rows, feat[:policy_rows])  # [.]
    metrics |= {"value": value.mean(), "value_real": came.mean()}
    metrics["value_error"] = (value - came).abs().mean()  # Eq. 5.7
    if folder and len(real) > 1:
        draw_dream(agent, rows, h, z, folder / "dream.gif")
        draw_latents(agent, real, dreamed, folder / "latents.png")
    return {name: float(x) for name, x in metrics.items()}

# %% 5.3 Pictures
def draw_dream(agent: Agent, rows: Named, h: Tensor, z: Tensor, path: Path) -> None:
    """dream.gif: truth, dream and difference in four episodes; 5 frames are seen, 45 dreamed."""
    first = rows["is_first"].nonzero()[:, 0]
    first = first[:-1][first.diff() > 4]  # those that last
    if len(first) == 0:
        return
    first = first[torch.linspace(0, len(first) - 1, 4).long()]
    seen = first + torch.arange(4, device=first.device).unsqueeze(1)  # [4,4]
    dream, row, lasted = dream_along(agent, rows, h, z, first + 4, 45)  # begins with the fifth
    feat = torch.cat([torch.cat([h, z], -1)[seen], dream])  # [50,4,F]
    lasted = torch.cat([seen >= 0, lasted]).view(50, 4, 1, 1, 1)
    truth = rows["obs"][torch.cat([seen, row])] * lasted  # black after the end
    dreamed = agent.world_model.decoder(feat) * 255
    films = torch.cat([truth, dreamed, (255 + dreamed - truth) / 2 * lasted], 2)  # [50,4,192,64,3]
    images = []
    for t, film in enumerate(films.transpose(1, 2).flatten(2, 3).byte().cpu().numpy()):
        title, color = (f"dream, step {t - 4}", "#e65a00") if t > 4 else (f"frame {t + 1}", "#555")
        images.append(Image.new("RGB", (512, 400), color))
        images[t].paste(Image.fromarray(film).resize((512, 384), Image.Resampling.NEAREST), (0, 16))
        for y, text in ((2, title), (18, "truth"), (146, "dream"), (274, "difference")):
            ImageDraw.Draw(images[t]).text((4, y), text, "white" if y == 2 else "red")
    images[0].save(path, save_all=True, append_images=images[1:], duration=100, loop=0)

def draw_latents(agent: Agent, real: Tensor, dreamed: Tensor, path: Path) -> None:
    """latents.png: features [M,F] after H steps, on the two principal components of the real."""
    components = torch.linalg.svd(real - real.mean(0), full_matrices=False).Vh[:2].T  # [F,2]
    low, high = agent.critic(real).aminmax()
    figure = Figure(figsize=(10, 4.5), layout="constrained")
    panels = figure.subplots(1, 2, sharex=True, sharey=True)
    for axes, name, feat in zip(panels, ("real", "dreamed"), (real, dreamed), strict=True):
        x, y = ((feat - real.mean(0)) @ components).T.cpu()
        dots = axes.scatter(x, y, 6, agent.critic(feat).cpu(), vmin=low.item(), vmax=high.item())
        axes.set(title=f"{name} states, {agent.config.horizon} steps on",
                 xlabel="first principal component", ylabel="second principal component")
    figure.colorbar(dots, ax=panels, label="predicted value")
    figure.savefig(path, dpi=100)

# %% 5.4 The dream as an environment
class DreamEnv(PixelEnv):
    """The learned world as a Gymnasium environment: a real first frame, and then only dreams. The
    prior, the reward head and the continue head (by chance) make a step; the decoder `render`, the
    observation, too: uint8 [64, 64, 3]. There is no time limit."""
    def __init__(self, agent: Agent):
        self.agent = agent  # first: PixelEnv resets
        super().__init__(agent.config.env, action_repeat=agent.config.action_repeat)

    def reset(self, *, seed: int | None = None, options: dict | None = None):
        obs, info = super().reset(seed=seed, options=options)
        return self.move(lambda: self.agent.act(obs)[1]), info

    def step(self, action):
        action = torch.as_tensor(gym.spaces.flatten(self.action_space, action)).to(self.h)[None]
        obs = self.move(lambda: self.agent.world_model.rssm.img_step(self.h, self.z, action))
        reward, cont = self.agent.world_model.predict(self.feat)
        return obs, reward.item(), self.np_random.random() > cont.item(), False, {}

    def move(self, step: Callable) -> np.ndarray:
        """To the h and z that `step` returns, by random numbers of the environment's own; frame."""
        with fork_rng(self.agent.config.device), torch.no_grad():
            torch.manual_seed(int(self.np_random.integers(2**31)))
            self.h, self.z, *_ = step()
        self.feat = torch.cat([self.h, self.z], -1)  # [1,F]
        return self.render()

    @torch.no_grad()
    def render(self) -> np.ndarray:
        return (self.agent.world_model.decoder(self.feat)[0] * 255).byte().cpu().numpy()

class SideBySide(DreamEnv):
    """Left the real environment, right the dream; `step(None)` leaves both to the agent."""
    def step(self, action):
        if action is None:
            mode = self.agent.actor(self.feat).mode[0].detach().cpu().numpy()
            action = gym.spaces.unflatten(self.action_space, mode)
        *_, terminated, truncated, _ = PixelEnv.step(self, action)
        obs, reward, ended, _, info = super().step(action)
        return obs, reward, terminated or ended, truncated, info

    def render(self) -> np.ndarray:
        return np.hstack([self.observation(), super().render()])

def play_dream(agent: Agent) -> None:
    """A window in which the arrow keys act, in dream and environment; without a key, the agent."""
    if HEADLESS:
        raise DreamerError("--play needs a screen, and there is none here")
    from gymnasium.utils.play import play  # it takes hold of a screen when it is imported

    keys = pygame.K_LEFT, pygame.K_RIGHT, pygame.K_DOWN, pygame.K_UP
    moves = np.eye(agent.action_size)
    if isinstance(agent.action_space, gym.spaces.Box):
        moves = np.kron(moves, [[-1], [1]])  # two keys for each axis
    actions = {(key,): gym.spaces.unflatten(agent.action_space, move)
               for key, move in zip(keys, moves, strict=False)}
    play(SideBySide(agent), zoom=6, keys_to_action=actions, noop=None)
    pygame.quit()

# %% Command line
def make_parser() -> argparse.ArgumentParser:
    """An option for each field of `Config`; help and groups are the comments in its source."""
    parser = argparse.ArgumentParser(
        "dreamer.py", "python dreamer.py [--OPTION VALUE ...]", allow_abbrev=False,
        description="Train Dreamer from pixels; or look at, or go on with, what was trained.")
    parser.error = lambda message: parser.exit(2, f"dreamer.py: error: {message}\n")
    group = parser.add_argument_group("a run's folder, in place of training a new one")
    one = group.add_mutually_exclusive_group()
    for name, text in (("resume", "go on where it was stopped, to --steps"),
                       ("eval", "measure its agent on unseen episodes"),
                       ("play", "step into its dream, with the arrow keys")):
        one.add_argument(f"--{name}", metavar="RUN", type=Path, help=text)
    group.add_argument("--episodes", metavar="INT", type=int, default=20, help="of --eval (20)")
    group.add_argument("--json", action="store_true", help="--eval prints one JSON object")
    for line in inspect.getsource(Config).splitlines():
        if heading := re.fullmatch("    # (.+)", line):
            group = parser.add_argument_group(heading[1])
        elif field := re.fullmatch(r"    (\w+): (\w+) = .*  # (.+)", line):
            name, kind, text = field.groups()
            default = getattr(Config, name)
            group.add_argument(
                f"--{name.replace('_', '-')}", type=type(default), metavar=kind.upper(),
                default=argparse.SUPPRESS, help=f"{text} ({default})")  # holds what was given
    return parser

def main(argv: list[str] | None = None) -> int:
    """The command line; returns 0, 2 after one line of what to put right, 130 after Ctrl-C."""
    given = vars(make_parser().parse_args(argv))
    resume, path, run, episodes, as_json = map(
        given.pop, ("resume", "eval", "play", "episodes", "json"))
    try:
        if run:
            play_dream(load_agent(run, given.get("device", "auto")))
        elif path:
            agent = load_agent(path, given.get("device", "auto"))
            metrics = evaluate(agent, episodes, Config(**given).seed)
            lines = [f"{name:28} {value:.4g}" for name, value in metrics.items()]
            print(json.dumps(metrics) if as_json else "\n".join(lines))
        else:
            saved = read_checkpoint(resume)["config"] if resume else {}
            folder = train(Config(**saved | given), resume)
            print(f'Results are in {folder}. Next: python dreamer.py --eval "{folder}"')
        return 0
    except (DreamerError, OSError) as error:
        print("dreamer.py: error:", " ".join(str(error).split()), file=sys.stderr)  # one line
        return 2
    except KeyboardInterrupt:
        print("\ndreamer.py: stopped at once", file=sys.stderr)
        return 130

# %% Run
if __name__ == "__main__":
    if "ipykernel" not in sys.modules:
        sys.exit(main())
    from IPython import display  # opened as a notebook: train, show the curves

    display.display(display.Image(train(Config()) / "curves.png"))
