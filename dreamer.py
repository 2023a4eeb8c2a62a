"""Dreamer in one file: learn a world model from pixels, then to act in its imagination.

    python dreamer.py --device cpu               train on CartPole's pixels
    python dreamer.py --eval runs/CartPole-v1-0  measure what came out, on unseen episodes

The sections carry the lesson's numbers; the algorithm is DreamerV3 (arXiv:2301.04104).
Begin with `Agent` in 4.1 and the loop in 4.3, which show the whole; then read from the top.

Shapes    B batch   T time   N starts of imagination   H horizon   A action   E embedding
          D = |h|   S groups of K classes, |z| = Z = S*K; or S gaussians   feat = (h, z), F = |feat|
          Real sequences are batch first, [B, T, ...]; imagined ones time first, [H+1, N, ...].

Time      row t : prev_action a_{t-1} | obs o_t | reward r_t | terminated_t | is_first_t | is_last_t
          h_t = f(h_{t-1}, z_{t-1}, a_{t-1})  Eq. 1.1, recurrent state, the papers' deter
          z_t ~ q(. | h_t, o_t)               Eq. 1.2, posterior: saw the frame; the papers' stoch
          z_t ~ p(. | h_t)                    Eq. 1.3, prior: has to guess it, and so can dream
          o_t, r_t and c_t = 1 - terminated_t are predicted from (h_t, z_t).
          The action in row t is the one that led to o_t. The first row of an episode has a zero
          action, zero reward and is_first; its last frame has a row of its own, is_last.

Gradient of           reaches    encoder, RSSM, decoder, heads    actor    critic
world model loss                              yes                   -        -
actor loss                                     -                   yes       -
critic loss                                    -                    -       yes
"""

# %% [markdown]
# # Section 1: Setup (Eq. 1.1 to 1.3: the time diagram above)

# %% 1.1 Imports and configuration
from __future__ import annotations

import copy
import ctypes
import gzip
import json
import os
import sys
import time
from contextlib import closing, contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Literal

import gymnasium as gym
import numpy as np
import torch
import torch.nn.functional as F
import tyro
from gymnasium.spaces import Box, Discrete, flatdim, flatten, unflatten
from matplotlib.figure import Figure
from PIL import Image
from torch import Tensor, nn
from torch import distributions as td
from tqdm import tqdm

td.Distribution.set_default_validate_args(False)  # checks cost time
os.environ |= {"SDL_VIDEODRIVER": "dummy", "SDL_NO_SIGNAL_HANDLERS": "1"}  # SDL draws unseen
if sys.platform == "linux":  # keep an update's memory for the next: fresh pages cost a tenth more
    ctypes.CDLL(None).mallopt(-3, 2**25)  # glibc's M_MMAP_THRESHOLD
    ctypes.CDLL(None).mallopt(-1, 2**30)  # and M_TRIM_THRESHOLD

class DreamerError(Exception):
    """What the user can put right; the command line prints it without a traceback."""

@contextmanager
def explain(where: str):
    """What goes wrong in the block, in code or files of others: a DreamerError."""
    try:
        yield
    except Exception as error:
        raise DreamerError(f"{where}: {str(error) or repr(error)}") from error

@dataclass
class Config:
    """Options of a run; DreamerError for impossible numbers. Or: --resume RUN, or --eval RUN."""
    env: str = "CartPole-v1"  # Gymnasium id; module:Id imports the module first
    preset: Literal["v1", "v2", "v3"] = "v3"  # the paper whose choices replace the defaults
    seed: int = 0  # seed of weights, actions, batches and episodes
    steps: int = 5_000  # environment steps of the agent; the last episode is played out
    device: Literal["auto", "cpu", "cuda"] = "auto"  # auto takes cuda where there is one
    threads: int = 1  # of the CPU; more help only large networks on an idle machine
    runs: str = "runs"  # folder for results; a run writes to RUNS/ENV-SEED
    action_repeat: int = 1  # times that the environment repeats an action, rewards summed
    prefill: int = 1_500  # steps before the first update: an untrained actor is random
    pretrain: int = 750  # updates of the world model alone, before behavior learning
    train_ratio: float = 64.0  # replayed steps for each step after the prefill
    batch_size: int = 8  # B, sequences in a batch
    batch_length: int = 16  # T, steps in a sequence
    capacity: int = 100_000  # steps kept in the replay buffer, 12 kB each
    depth: int = 8  # the CNN's two layers have 2 and 8 times as many channels
    hidden: int = 128  # D, size of the recurrent state h
    groups: int = 16  # S, variables in z
    classes: int = 8  # K, classes of each of them, if they are categorical
    units: int = 128  # width of the hidden layers of every MLP
    unimix: float = 0.01  # share of the uniform distribution in the classes of z
    free_nats: float = 0.1  # KL of a step, in nats, below which it is not penalised
    scale_dyn: float = 1.0  # weight of the KL that pulls the prior to the posterior
    scale_rep: float = 0.05  # weight of the KL that pulls the posterior to the prior
    latent: Literal["categorical", "gaussian"] = "categorical"  # what z is drawn from
    lr: float = 1.5e-3  # learning rate of each part; falls to 0 in the last third
    max_grad_norm: float = 10.0  # norm that the gradient of each part is clipped to
    starts: int = 32  # N, random states of a batch to dream from; more teach little more
    horizon: int = 15  # H, imagined steps
    gamma: float = 0.99  # discount of a step
    lam: float = 0.95  # lambda of the lambda-return
    actor_grad: Literal["reinforce", "dynamics"] = "reinforce"  # what teaches the actor
    entropy: float = 3e-3  # eta, weight of the actor's entropy
    model_rate: float = 0.1  # the slow world model takes over this share of the new weights; 1: all
    critic_rate: float = 0.1  # the same for the slow critic
    return_rate: float = 0.01  # share of new returns in their running range; 0: not divided
    log_every: int = 500  # steps between lines of metrics.jsonl
    eval_every: int = 2_000  # steps between evaluations
    eval_episodes: int = 5  # episodes of an evaluation during training
    held_out: int = 1_000  # rows of unseen episodes for the other metrics of Section 5
    save_every: float = 60.0  # seconds between checkpoints, at least

    def __post_init__(self):
        for name, value in asdict(self).items():
            low = int(isinstance(getattr(Config, name), int) and name not in ("seed", "pretrain"))
            high = 1 if name in ("unimix", "gamma", "lam") or name.endswith("_rate") else 1e9
            if not isinstance(value, str) and not low <= value <= high:  # nan, too
                raise DreamerError(f"{name} must lie between {low} and {high:.0f}, not {value}")
        if self.batch_length > min(self.prefill, self.capacity):
            raise DreamerError("batch_length must not exceed prefill and capacity")
        if self.steps <= self.prefill:
            raise DreamerError(f"steps ({self.steps}) must exceed prefill ({self.prefill})")

LARGER = dict(steps=20_000, train_ratio=32.0, hidden=256, units=256, eval_every=10_000)
SETTINGS = {  # what a task, and then a preset, sets in place of the defaults
    "Pendulum-v1": LARGER,
    "Acrobot-v1": LARGER | dict(entropy=1e-3),
    "MountainCarContinuous-v0": dict(steps=10_000),
    "shimmy:dm_control/cartpole-swingup-v0": dict(
        action_repeat=8, steps=20_000, depth=16, pretrain=1_500, eval_every=5_000, held_out=500),
    "v1": dict(latent="gaussian", groups=30, hidden=200, actor_grad="dynamics", entropy=0.0,
               free_nats=3.0, scale_rep=1.0, model_rate=1.0, critic_rate=1.0, return_rate=0.0),
    "v2": dict(unimix=0.0, free_nats=0.0, scale_dyn=0.8, scale_rep=0.2, entropy=1e-3,
               model_rate=1.0, critic_rate=0.01, return_rate=0.0), "v3": {}}

def settings(env: str = Config.env, preset: Literal["v1", "v2", "v3"] = "v3") -> Config:
    """The defaults for a task, in the manner of a paper."""
    return Config(**dict(env=env, preset=preset) | SETTINGS.get(env, {}) | SETTINGS[preset])

# %% 1.2 Small tools
def sg(x: Tensor) -> Tensor:
    """Stop-gradient. One cut more is in 3.4: REINFORCE dreams without gradients."""
    return x.detach()

def symlog(x: Tensor) -> Tensor:
    """sign(x) ln(1 + |x|): compresses what is large. DreamerV3 has it for vectors, not frames."""
    return torch.sign(x) * torch.log1p(torch.abs(x))

def symexp(x: Tensor) -> Tensor:
    """sign(x) (exp(|x|) - 1), the inverse of `symlog`."""
    return torch.sign(x) * torch.expm1(torch.abs(x))

def twohot_encode(x: Tensor, bins: Tensor) -> Tensor:
    """x [...] -> weights [..., len(bins)] on the two bins around x, with mean x."""
    x = x.clamp(bins[0], bins[-1]).unsqueeze(-1)
    above = torch.searchsorted(bins, x).clamp(min=1)
    weight = (x - bins[above - 1]) / (bins[above] - bins[above - 1])
    zeros = x.new_zeros(*x.shape[:-1], len(bins))
    return zeros.scatter(-1, above - 1, 1 - weight).scatter(-1, above, weight)

def twohot_decode(logits: Tensor, bins: Tensor) -> Tensor:
    """Logits [..., len(bins)] -> mean [...] of the bins; exactly 0 for zero logits."""
    terms = torch.softmax(logits, -1) * bins
    return (terms + terms.flip(-1)).sum(-1) / 2  # in pairs: the huge outer bins cancel

def init_weights(module: nn.Module) -> None:
    """For `apply`: weights of variance 1 / fan-in, three times PyTorch's; zero biases."""
    if isinstance(module, nn.Linear | nn.Conv2d):
        std = 1.1368 / module.weight[0].numel() ** 0.5  # makes up for tails cut at two sigma
        nn.init.trunc_normal_(module.weight, 0.0, std, -2 * std, 2 * std)
        nn.init.zeros_(module.bias)

def mlp(inputs: int, units: int, layers: int, outputs: int, outscale: float = 1.0) -> nn.Sequential:
    """`layers` times linear, norm, SiLU; then linear, its weights times `outscale`."""
    network = nn.Sequential()
    for _ in range(layers):
        network.extend([nn.Linear(inputs, units), nn.LayerNorm(units), nn.SiLU()])
        inputs = units
    network.append(nn.Linear(inputs, outputs)).apply(init_weights)
    network[-1].weight.data *= outscale
    return network

# %% 1.3 Pixel wrapper
class PixelEnv(gym.Wrapper):
    """Any registered Gymnasium environment through its pixels, uint8 [64, 64, 3]; Box actions
    in [-1, 1]; `row` is the newest row of the time diagram. Errors become a DreamerError."""
    spec = None  # its id names the environment without pixels

    def __init__(self, env_id: str, action_repeat: int = 1):
        self.env_id, self.action_repeat = env_id, action_repeat
        with explain(f"--env {env_id}"):
            super().__init__(gym.make(env_id, render_mode="rgb_array", disable_env_checker=True))
            getattr(self.unwrapped, "render_kwargs", {}).setdefault("camera_id", 0)  # Shimmy's
            if self.env.spec.max_episode_steps is None:  # evaluations have to end
                self.env = gym.wrappers.TimeLimit(self.env, 1_000)
            self.is_box = isinstance(self.action_space, Box) and self.action_space.is_bounded()
            if not self.is_box and not isinstance(self.action_space, Discrete):
                raise ValueError("its actions are neither Discrete nor a bounded Box")
            if self.is_box:
                one = self.action_space.dtype.type(1)
                self.env = gym.wrappers.RescaleAction(self.env, -one, one)
        self.observation_space = Box(0, 255, (64, 64, 3), np.uint8)
        self.reset(seed=0)  # some environments find out only here that they cannot render

    def reset(self, *, seed: int | None = None, options: dict | None = None):
        self.episode, self.age = f"{self.env_id}, episode with seed {seed}", 0
        self.action_space.seed(None if seed is None else seed + 2**40)  # else correlated
        with explain(self.episode):
            _, info = self.env.reset(seed=seed, options=options)
            self.remember(np.zeros(flatdim(self.action_space)), is_first=True)
        return self.row["obs"], info

    def step(self, action):
        total, self.age = 0.0, self.age + 1
        with explain(f"{self.episode}, step {self.age}"):
            taken = np.clip(action, -1, 1) if self.is_box else action  # in bounds
            for _ in range(self.action_repeat):
                _, reward, terminated, truncated, info = self.env.step(taken)
                total += float(reward)
                if terminated or truncated:
                    break
            if not np.isfinite(total):
                raise ValueError(f"the reward is {total}")
            self.remember(flatten(self.action_space, action), total, terminated, truncated)
        return self.row["obs"], total, terminated, truncated, info

    def remember(self, action, reward=0.0, terminated=False, truncated=False, is_first=False):
        frame = Image.fromarray(self.env.render()).convert("RGB")
        self.row = dict(
            obs=np.array(frame.resize((64, 64), Image.Resampling.BOX)),
            prev_action=np.float32(action), reward=np.float32(reward),  # the action as chosen
            terminated=terminated, is_first=is_first, is_last=terminated or truncated)

# %% 1.4 CNN encoder and decoder
class ChannelNorm(nn.LayerNorm):
    """Layer norm over the channels of [N, C, H, W]; channels-last in memory."""
    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x.permute(0, 2, 3, 1)).permute(0, 3, 1, 2)

class Encoder(nn.Sequential):
    """Frames uint8 [..., 64, 64, 3] -> embeddings [..., E], E = 128 * depth."""
    def __init__(self, depth: int):
        a, b = 2 * depth, 8 * depth
        super().__init__(
            nn.Conv2d(3, a, 8, stride=4, padding=2), ChannelNorm(a), nn.SiLU(),  # to 16x16
            nn.Conv2d(a, b, 4, stride=4), ChannelNorm(b), nn.SiLU(), nn.Flatten())  # to 4x4

    def forward(self, obs: Tensor) -> Tensor:
        x = obs.reshape(-1, 64, 64, 3).permute(0, 3, 1, 2) / 255 - 0.5
        return super().forward(x).unflatten(0, obs.shape[:-3])

class Decoder(nn.Sequential):
    """Features [..., F] -> mean frames [..., 64, 64, 3] in [0, 1]; channels become 4x4 pixels."""
    def __init__(self, feat_size: int, depth: int):
        a, b = 2 * depth, 8 * depth
        super().__init__(
            nn.Linear(feat_size, b * 16), nn.Unflatten(1, (b, 4, 4)), ChannelNorm(b), nn.SiLU(),
            nn.Conv2d(b, a * 16, 1), nn.PixelShuffle(4), ChannelNorm(a), nn.SiLU(),  # to 16x16
            nn.Conv2d(a, 3 * 16, 1), nn.PixelShuffle(4), nn.Sigmoid())  # to 64x64

    def forward(self, feat: Tensor) -> Tensor:
        x = super().forward(feat.reshape(-1, feat.shape[-1]))
        return x.permute(0, 2, 3, 1).unflatten(0, feat.shape[:-1])

# %% 1.5 RSSM
def kl_divergence(p: Tensor, q: Tensor, gaussian: bool = False) -> Tensor:
    """KL(p || q) in nats, over S variables: of classes [..., S, K]; of mean and std [..., S, 2]."""
    if gaussian:
        return td.kl_divergence(*(td.Normal(*x.unbind(-1)) for x in (p, q))).sum(-1)
    return (p * (p.log() - q.log())).sum((-2, -1))

class RSSM(nn.Module):
    """Recurrent state-space model (arXiv:1811.04551); z of classes (DreamerV2), or gaussian."""
    def __init__(self, embed_size: int, action_size: int, config: Config):
        super().__init__()
        self.unimix, self.gaussian = max(config.unimix, 1e-6), config.latent == "gaussian"
        self.shape = S, K = config.groups, 2 if self.gaussian else config.classes
        D, Z, units = config.hidden, S if self.gaussian else S * K, config.units
        self.hidden, self.feat_size = D, D + Z
        self.inputs = nn.Sequential(
            nn.Linear(Z + action_size, units), nn.LayerNorm(units), nn.SiLU())
        self.gates = nn.Sequential(nn.Linear(units + D, 3 * D), nn.LayerNorm(3 * D))
        self.apply(init_weights)
        self.prior_net = mlp(D, units, 1, S * K)
        self.post_net = mlp(D + embed_size, units, 1, S * K)

    def initial(self, batch: int) -> Tensor:
        return self.gates[0].weight.new_zeros(batch, self.feat_size)

    def recur(self, feat: Tensor, prev_action: Tensor) -> Tensor:
        """Eq. 1.1, a GRU with layer norm: (h, z) [.,F], action [.,A] -> next h [.,D]."""
        h, z = feat.split([self.hidden, self.feat_size - self.hidden], -1)
        x = self.inputs(torch.cat([z, prev_action.clamp(-1, 1)], -1))
        reset, candidate, update = self.gates(torch.cat([x, h], -1)).chunk(3, -1)
        candidate = torch.tanh(torch.sigmoid(reset) * candidate)
        update = torch.sigmoid(update - 1)  # -1: at first, remember
        return update * candidate + (1 - update) * h

    def params(self, outputs: Tensor) -> Tensor:
        """What a network says [.,S*K] -> parameters [.,S,K]; `unimix` of the classes uniform."""
        outputs = outputs.unflatten(-1, self.shape)
        if self.gaussian:
            return torch.stack([outputs[..., 0], F.softplus(outputs[..., 1]) + 0.1], -1)
        return (1 - self.unimix) * torch.softmax(outputs, -1) + self.unimix / self.shape[1]

    def prior(self, h: Tensor) -> Tensor:
        """Eq. 1.3: h [.,D] -> parameters [.,S,K] of z."""
        return self.params(self.prior_net(h))

    def sample(self, params: Tensor) -> Tensor:
        """z [.,Z]: gaussian, or one-hot in each group with the gradient straight through."""
        if self.gaussian:
            return params[..., 0] + params[..., 1] * torch.randn_like(params[..., 1])
        # Inverse CDF: count the classes whose cumulated share a random number exceeds
        drawn = (sg(params).cumsum(-1) < torch.rand_like(params[..., :1])).sum(-1)
        one_hot = F.one_hot(drawn.clamp(max=self.shape[1] - 1), self.shape[1])
        return (one_hot + (params - sg(params))).flatten(-2)  # the bracket is 0

    def img_step(self, feat: Tensor, action: Tensor) -> Tensor:
        """An imagined step, without a frame: the next (h, z), z from the prior."""
        h = self.recur(feat, action)
        return torch.cat([h, self.sample(self.prior(h))], -1)

    def obs_step(self, feat: Tensor, prev_action: Tensor, embed: Tensor) -> tuple[Tensor, Tensor]:
        """One step with a frame: the next (h, z), z from the posterior; the posterior."""
        h = self.recur(feat, prev_action)
        post = self.params(self.post_net(torch.cat([h, embed], -1)))  # Eq. 1.2
        return torch.cat([h, self.sample(post)], -1), post

    def observe(self, embed: Tensor, prev_action: Tensor, is_first: Tensor) -> tuple:
        """Sequences [B,T,...] -> (h, z) [B,T,F], posterior, prior [B,T,S,K]. is_first: from 0."""
        keep = (~is_first).float().unsqueeze(-1)  # [B,T,1]
        rows = embed.unbind(1), (prev_action * keep).unbind(1), keep.unbind(1)
        feat, steps = self.initial(len(embed)), []  # zeros, even in mid-episode
        for embed_t, prev_action_t, keep_t in zip(*rows, strict=True):
            feat, post = self.obs_step(feat * keep_t, prev_action_t, embed_t)
            steps.append((feat, post))
        feat, post = (torch.stack(x, 1) for x in zip(*steps, strict=True))
        return feat, post, self.prior(feat[..., : self.hidden])

# %% 1.6 Head for rewards and values
class TwoHotHead(nn.Module):
    """Features [..., F] -> a number [...], 0 at first: a distribution over 255 bins."""
    def __init__(self, feat_size: int, units: int, layers: int):
        super().__init__()
        self.net = mlp(feat_size, units, layers, 255, outscale=0.0)
        half = symexp(torch.linspace(-20, 0, 128))  # bins: 0, and symexp-spaced to 4.85e8
        self.register_buffer("bins", torch.cat([half, -half[:-1].flip(0)]), persistent=False)

    def forward(self, feat: Tensor) -> Tensor:
        return twohot_decode(self.net(feat), self.bins)

    def loss(self, feat: Tensor, *targets: Tensor) -> Tensor:
        """Cross-entropy [...] of the prediction and targets [...], summed over these."""
        weights = sum(twohot_encode(target, self.bins) for target in targets)  # [..., 255]
        return -(weights * torch.log_softmax(self.net(feat), -1)).sum(-1)

# %% 1.7 Actor and critic
class Actor(nn.Module):
    """Features [..., F] -> distribution of actions [..., A]: categorical, or normal."""
    def __init__(self, feat_size: int, action_space: gym.Space, units: int):
        super().__init__()
        self.discrete = isinstance(action_space, Discrete)
        outputs = flatdim(action_space) * (1 if self.discrete else 2)
        self.net = mlp(feat_size, units, 2, outputs, outscale=0.01)  # nearly uniform

    def forward(self, feat: Tensor) -> td.Distribution:
        if self.discrete:
            return td.OneHotCategoricalStraightThrough(logits=self.net(feat))
        mean, std = self.net(feat).chunk(2, -1)
        return td.Independent(td.Normal(torch.tanh(mean), 0.9 * torch.sigmoid(std + 2) + 0.1), 1)

class Critic(TwoHotHead):
    """Features [..., F] -> value [...]: the discounted rewards still to be collected."""

# %% 1.8 Replay buffer
def stack_rows(rows: list[dict], device: str) -> dict[str, Tensor]:
    """L rows of the time diagram as columns [L, ...]; frames stay uint8."""
    columns = {name: np.stack([row[name] for row in rows]) for name in (rows[0] if rows else ())}
    return {name: torch.from_numpy(column).to(device) for name, column in columns.items()}

class ReplayBuffer:
    """The last `capacity` rows in the order in which they came, 12 kB each."""
    def __init__(self, capacity: int, device: str = "cpu"):
        self.capacity, self.device, self.rows = capacity, device, []

    def add(self, row: dict) -> None:
        self.rows.append(row)
        del self.rows[: -self.capacity]

    def sample(self, batch_size: int, length: int) -> dict[str, Tensor]:
        """Windows [B,T,...] of rows, from the later of two random ones on: the new teaches more."""
        starts = torch.randint(len(self.rows) - length + 1, (2, batch_size)).amax(0).tolist()
        rows = [row for start in starts for row in self.rows[start : start + length]]
        columns = stack_rows(rows, self.device)
        return {name: x.unflatten(0, (batch_size, length)) for name, x in columns.items()}

# %% [markdown]
# # Section 2: World Model Update
# Run the RSSM over a batch of real sequences, and predict from every state (h, z) what row t
# holds. The loss (Eq. 2.6) is the mean over B and T of the weighted sum of
# - Eq. 2.1 `recon = sum over pixels of (o_t / 255 - decoder(h_t, z_t))^2`
# - Eq. 2.2 `reward = -ln p(r_t | h_t, z_t)`, a cross-entropy with the two-hot reward
# - Eq. 2.3 `cont = -ln p(c_t | h_t, z_t)`, with `c_t = 1 - terminated_t`, not truncated
# - Eq. 2.4 `dyn = max(free, KL(sg(q) || p))`: the prior learns to foresee the posterior
# - Eq. 2.5 `rep = max(free, KL(q || sg(p)))`: and the posterior, gently, to be foreseen

# %% 2.1 World model loss
class WorldModel(nn.Module):
    """Encoder, RSSM, decoder, reward and continue heads: what learns from real rows."""
    def __init__(self, action_size: int, config: Config):
        super().__init__()
        self.config = config
        self.encoder = Encoder(config.depth).apply(init_weights)
        self.rssm = RSSM(128 * config.depth, action_size, config)
        self.decoder = Decoder(self.rssm.feat_size, config.depth).apply(init_weights)
        self.reward_head = TwoHotHead(self.rssm.feat_size, config.units, layers=1)
        self.cont_head = mlp(self.rssm.feat_size, config.units, 1, 1)  # the logit of c

    def predict(self, feat: Tensor) -> tuple[Tensor, ...]:
        """Features [..., F] -> reward [...], probability [...] that it goes on."""
        return self.reward_head(feat), torch.sigmoid(self.cont_head(feat).squeeze(-1))

    def loss(self, batch: dict[str, Tensor]) -> tuple[Tensor, Tensor, dict]:
        """Rows [B,T,...] -> loss [], states (h, z) [B,T,F], metrics (Eq. 2.6)."""
        embed = self.encoder(batch["obs"])  # [B,T,E]
        feat, post, prior = self.rssm.observe(embed, batch["prev_action"], batch["is_first"])
        error = F.mse_loss(self.decoder(feat), batch["obs"] / 255, reduction="none")
        logit = self.cont_head(feat).squeeze(-1)  # [B,T]
        cont = 1 - batch["terminated"].float()  # [B,T]
        dyn = kl_divergence(sg(post), prior, self.rssm.gaussian)  # [B,T]
        rep = kl_divergence(post, sg(prior), self.rssm.gaussian)  # [B,T]
        losses = {  # each [B,T]
            "recon": error.sum((-3, -2, -1)),  # Eq. 2.1, over [64,64,3]
            "reward": self.reward_head.loss(feat, batch["reward"]),  # Eq. 2.2
            "cont": F.binary_cross_entropy_with_logits(logit, cont, reduction="none"),  # Eq. 2.3
            "dyn": dyn.clamp(min=self.config.free_nats),  # Eq. 2.4; no gradient if below
            "rep": rep.clamp(min=self.config.free_nats)}  # Eq. 2.5
        assert all(loss.shape == cont.shape for loss in losses.values())
        scales = {"dyn": self.config.scale_dyn, "rep": self.config.scale_rep}  # others: 1
        total = sum(scales.get(name, 1) * loss for name, loss in losses.items())  # Eq. 2.6
        shown = losses | {"kl": dyn}  # before free nats
        return total.mean(), feat, {f"wm/{name}": x.detach().mean() for name, x in shown.items()}

# %% 2.2 World model update step
def gradient_step(agent: Agent, part: str, loss: Tensor) -> Tensor:
    """Move the weights of one part, world_model, actor or critic, down the gradient of its loss [];
    returns the norm []. DreamerError, before a weight is touched, if it is not finite."""
    agent.optimizer.zero_grad()  # from here on the other parts have no gradient
    loss.backward()
    norm = nn.utils.clip_grad_norm_(agent.parameters(), agent.config.max_grad_norm)
    if not torch.isfinite(loss + norm):
        raise DreamerError(f"the loss of the {part} is {loss:.3g}, its gradient's norm {norm:.3g}")
    agent.optimizer.step()
    return norm

def follow(slow: nn.Module, fast: nn.Module, rate: float) -> None:
    """Move the weights of `slow`, a trailing average, a share `rate` towards those of `fast`."""
    for average, weight in zip(slow.parameters(), fast.parameters(), strict=True):
        average.lerp_(sg(weight), rate)

def update_world_model(agent: Agent, batch: dict[str, Tensor]) -> tuple[Tensor, dict]:
    """One step on rows [B,T,...] -> states to dream from, (h, z) [N,F]; metrics."""
    loss, feat, metrics = agent.world_model.loss(batch)
    metrics["wm/grad_norm"] = gradient_step(agent, "world_model", loss)
    follow(agent.slow_model, agent.world_model, agent.config.model_rate)
    feat = sg(feat).flatten(0, 1)  # [B*T,F]
    return feat[torch.randperm(len(feat))[: agent.config.starts]], metrics

# %% [markdown]
# # Section 3: Behavior Learning
# From inferred states the actor dreams H steps in the world model's slow copy; v is the critic.
# - Eq. 3.1 `a_t ~ pi(. | h_t, z_t)`, `h_{t+1} = f(h_t, z_t, a_t)`, `z_{t+1} ~ p(. | h_{t+1})`
# - Eq. 3.2 `R_t = r_{t+1} + gamma c_{t+1} ((1 - lam) v_{t+1} + lam R_{t+1})`, `R_H = v_H`
# - Eq. 3.3 `w_t = c_0 (gamma c_1) ... (gamma c_t)`: the dream counts while it is alive
# - Eq. 3.4 `scale = max(1, running mean of (95th - 5th percentile of R))`
# - Eq. 3.5 `actor loss = -w_t (sg((R_t - v_t) / scale) ln pi(a_t | h_t, z_t) + eta entropy)`:
#   REINFORCE. With `dynamics` (V1) `-w_t (R_t / scale + eta entropy)`, through the dream.
# - Eq. 3.6 `critic loss = -w_t (ln p(R_t | h_t, z_t) + ln p(slow critic's v_t | h_t, z_t))`

# %% 3.1 Imagination
def imagine(model: WorldModel, actor: Actor, feat: Tensor, horizon: int,
            given: Tensor | None = None) -> tuple[Tensor, Tensor]:
    """Eq. 3.1: states (h, z) [N,F] -> H + 1 states [H+1,N,F], these first; actions [H,N,A]: the
    actor's, or those `given`. An end stops no dream, but takes its weight (Eq. 3.3)."""
    feats, actions = [feat], []
    for t in range(horizon):
        actions.append(actor(sg(feats[t])).rsample() if given is None else given[t])  # [N,A]
        feats.append(model.rssm.img_step(feats[t], actions[t]))  # [N,F]
    return torch.stack(feats), torch.stack(actions)

# %% 3.2 Lambda-return
def lambda_return(reward: Tensor, value: Tensor, cont: Tensor, gamma: float, lam: float) -> Tensor:
    """Eq. 3.2: reward, value, cont [H+1, ...] of states 0 to H -> R [H, ...] of 0 to H-1.
    Entry 0 of reward and cont belongs to the action before the dream, and is not used."""
    returns = [value[-1]]
    for t in reversed(range(len(value) - 1)):
        mixed = (1 - lam) * value[t + 1] + lam * returns[-1]
        returns.append(reward[t + 1] + gamma * cont[t + 1] * mixed)
    return torch.stack(returns[:0:-1])  # in the order of time, without R_H

# %% 3.3 Return normalisation
def return_scale(return_range: Tensor, returns: Tensor, rate: float) -> Tensor:
    """Move the running [5th, 95th] percentile, in place; returns [H,N] -> scale []."""
    percentiles = torch.quantile(returns.flatten(), returns.new_tensor([0.05, 0.95]))
    return_range.lerp_(percentiles, rate)
    return (return_range[1] - return_range[0]).clamp(min=1.0)

# %% 3.4 Actor and critic losses, behavior update step
def update_behavior(agent: Agent, start: Tensor) -> dict[str, Tensor]:
    """Dream from states (h, z) [N,F]; then a step of the actor, and one of the critic."""
    config, model, actor, critic = agent.config, agent.slow_model, agent.actor, agent.critic
    dynamics = config.actor_grad == "dynamics"
    with torch.set_grad_enabled(dynamics):  # REINFORCE needs the gradient of ln pi alone
        feat, action = imagine(model, actor, start, config.horizon)  # [H+1,N,F], [H,N,A]
        reward, cont = model.predict(feat)  # each [H+1,N]
        slow_value = agent.slow_critic(feat)  # [H+1,N]
        value = slow_value if dynamics else critic(feat)  # [H+1,N]; frozen: gradients only pass
    returns = lambda_return(reward, value, cont, config.gamma, config.lam)  # [H,N] Eq. 3.2
    weight = torch.cat([cont[:1], config.gamma * cont[1:-1]]).cumprod(0)  # [H,N] Eq. 3.3
    scale = return_scale(agent.return_range, sg(returns), config.return_rate)  # [] Eq. 3.4
    policy = actor(sg(feat[:-1]))  # state H has no action
    entropy = policy.entropy()  # [H,N]
    reinforce = sg((returns - value[:-1]) / scale) * policy.log_prob(sg(action))  # [H,N]
    objective = (returns / scale if dynamics else reinforce) + config.entropy * entropy  # [H,N]
    actor_loss = -(sg(weight) * objective).mean()  # [] Eq. 3.5
    error = critic.loss(sg(feat[:-1]), sg(returns), sg(slow_value[:-1]))  # [H,N]
    critic_loss = (sg(weight) * error).mean()  # [] Eq. 3.6
    assert objective.shape == error.shape == weight.shape
    gradient_step(agent, "actor", actor_loss)
    gradient_step(agent, "critic", critic_loss)
    follow(agent.slow_critic, critic, config.critic_rate)
    return {"ac/actor": actor_loss.detach(), "ac/critic": critic_loss.detach(),
            "ac/entropy": entropy.detach().mean(), "ac/return": sg(returns).mean(),
            "ac/value": sg(value).mean(), "ac/return_scale": scale}

# %% [markdown]
# # Section 4: Training Loop

# %% 4.1 The agent, and acting
class Agent(nn.Module):
    """World model, actor, critic; slow copies: one dreams better, and acts; one steadies values."""
    def __init__(self, action_space: gym.Space, config: Config):
        super().__init__()
        torch.set_num_threads(config.threads)
        self.config, self.action_space = config, action_space
        if config.device == "auto":
            config.device = "cuda" if torch.cuda.is_available() else "cpu"
        with explain(f"networks on --device {config.device}"):
            self.world_model = WorldModel(flatdim(action_space), config)
            self.actor = Actor(self.world_model.rssm.feat_size, action_space, config.units)
            self.critic = Critic(self.world_model.rssm.feat_size, config.units, layers=2)
            self.slow_model = copy.deepcopy(self.world_model).requires_grad_(False)
            self.slow_critic = copy.deepcopy(self.critic).requires_grad_(False)
            self.register_buffer("return_range", torch.zeros(2))  # 5th and 95th percentile
            self.to(config.device)
        self.optimizer = torch.optim.Adam(  # a step moves only what a loss gave a gradient
            self.parameters(), config.lr, betas=(0.9, 0.95), fused=True)

    @torch.no_grad()
    def act(self, obs: np.ndarray, state: tuple | None = None, explore: bool = False) -> tuple:
        """Frame uint8 [64,64,3], state of the last call (None: first frame) -> the most likely
        action for `PixelEnv.step`, or a sample; state: (h, z) [1,F] and action [1,A]."""
        rssm, obs = self.slow_model.rssm, torch.as_tensor(obs, device=self.config.device)
        if state is None:
            state = rssm.initial(1), torch.zeros(1, flatdim(self.action_space), device=obs.device)
        feat, _ = rssm.obs_step(*state, self.slow_model.encoder(obs[None]))  # [1,F]
        action = self.actor(feat).sample() if explore else self.actor(feat).mode  # [1,A]
        return unflatten(self.action_space, action[0].cpu().numpy()), (feat, action)

# %% 4.2 Playing an episode, to evaluate
def episode_seed(seed: int, number: int, evaluation: bool = False) -> int:
    """Training episodes have even seeds, evaluations odd ones: they never meet."""
    return 2 * (1_000_000 * seed + number) + evaluation

def play(agent: Agent, env: PixelEnv, seed: int, chance: float = 0.0) -> list[dict]:
    """The rows of an episode of the most likely actions; by a `chance`, the next 15 are random."""
    env.reset(seed=seed)
    rows, state, at_random = [env.row], None, 0
    while not env.row["is_last"]:
        at_random = 15 if torch.rand(()) < chance else at_random - 1  # else few episodes fail
        action, (feat, _) = agent.act(env.row["obs"], state)
        env.step(env.action_space.sample() if at_random > 0 else action)
        state = feat, feat.new_tensor(env.row["prev_action"])[None]  # the one that was taken
        rows.append(env.row)
    return rows

# %% 4.3 The training loop
def updates_due(config: Config, step: int) -> int:
    """After the prefill `pretrain` updates; then train_ratio / (B T) for each step."""
    past_prefill = min(step, config.steps) - config.prefill  # none beyond `steps`
    updates = config.train_ratio / (config.batch_size * config.batch_length) * past_prefill
    return config.pretrain + int(updates) if past_prefill >= 0 else 0

def train(config: Config, resume: str | Path | None = None, agent: Agent | None = None) -> Path:
    """Train a new agent, or a given one of the same config, or go on with the run in `resume`;
    returns the run's folder. DreamerError if the run exists already, or cannot go on."""
    name = config.env.replace(":", "-").replace("/", "-")  # Windows allows neither
    folder = Path(config.runs) / f"{name}-{config.seed}" if resume is None else Path(resume)
    if resume is None and (folder / "checkpoint.pt.gz").exists():
        raise DreamerError(f"{folder} exists: --resume or delete it, or change --seed or --runs")
    torch.manual_seed(config.seed)
    env = PixelEnv(config.env, config.action_repeat)
    agent = agent or Agent(env.action_space, config)
    replay, log = ReplayBuffer(config.capacity, agent.config.device), Log(folder)
    step, episode, updates = (0, 0, 0) if resume is None else load_checkpoint(agent, replay, log)
    next_save = save_checkpoint(agent, replay, log, step, episode, updates)
    print(f'Results: {folder}. If it is stopped: python dreamer.py --resume "{folder}"')
    total = updates_due(config, config.steps)
    with closing(env), tqdm(total=total, initial=updates, unit="update") as bar:
        while step < config.steps:
            env.reset(seed=episode_seed(config.seed, episode))
            replay.add(env.row)
            state, score, begin = None, 0.0, step
            while not env.row["is_last"]:
                action, state = agent.act(env.row["obs"], state, explore=True)
                env.step(action)
                replay.add(env.row)
                step, score = step + 1, score + env.row["reward"]
                while updates < updates_due(config, step):
                    decay = min(1, 3 - 3 * step / config.steps)  # down to 0
                    agent.optimizer.param_groups[0]["lr"] = config.lr * decay
                    batch = replay.sample(config.batch_size, config.batch_length)
                    feat, metrics = update_world_model(agent, batch)
                    if updates >= config.pretrain:
                        metrics |= update_behavior(agent, feat)
                    bar.update()
                    updates += 1
                    log.add(metrics)
            episode += 1  # the environment remembers nothing now: a run can go on here
            log.add({"env/return": score, "env/length": step - begin})
            bar.set_postfix(step=step, episode_return=score)
            finished = step >= config.steps
            if finished or step // config.eval_every > begin // config.eval_every:
                log.add(evaluate(agent, config.eval_episodes, config.seed))
            if finished or step // config.log_every > begin // config.log_every:
                log.write(step, episode, updates)
                if finished or time.monotonic() > next_save:
                    next_save = save_checkpoint(agent, replay, log, step, episode, updates)
    return folder

# %% 4.4 Log, curves, checkpoint
class Log:
    """The lines of metrics.jsonl: each holds the means since the line before."""
    def __init__(self, folder: Path):
        self.folder, self.start, self.lines, self.values = folder, time.monotonic(), [], {}

    def add(self, metrics: dict) -> None:
        for name, value in metrics.items():  # tensors are read when a line is due
            self.values.setdefault(name, []).append(value)

    def write(self, step: int, episodes: int, updates: int) -> None:
        """One more line of metrics.jsonl, and curves.png drawn anew."""
        line = {"env/step": step, "env/episodes": episodes, "wm/updates": updates,
                "time/seconds": time.monotonic() - self.start}
        line |= {name: float(np.mean([*map(float, x)])) for name, x in self.values.items()}
        self.lines, self.values = [*self.lines, line], {}
        (self.folder / "metrics.jsonl").write_text("\n".join(map(json.dumps, self.lines)) + "\n")
        keys = ["env/return", "eval/return", "wm/recon", "wm/kl",
                "ac/entropy", "eval/trajectory_entropy", "eval/reward_rho", "eval/return_rho"]
        figure = Figure(figsize=(15, 6.5), layout="constrained")
        for axes, key in zip(figure.subplots(2, 4).flat, keys, strict=True):
            points = [(line["env/step"], line[key]) for line in self.lines if key in line]
            axes.plot(*np.reshape(points, (-1, 2)).T, ".-")
            axes.set(title=key, xlabel="steps", yscale="log" if key == "wm/recon" else "linear")
        figure.savefig(self.folder / "curves.png", dpi=100)

def save_checkpoint(agent: Agent, replay: ReplayBuffer, log: Log, *progress: int) -> float:
    """All of a run into checkpoint.pt.gz, whole or not at all, in at most 5 % of its time."""
    start, config, folder = time.monotonic(), asdict(agent.config), log.folder
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "config.json").write_text(json.dumps(config, indent=2) + "\n")
    state = {
        "config": config, "agent": agent.state_dict(), "random": torch.get_rng_state(),
        "optimizer": agent.optimizer.state_dict(), "rows": stack_rows(replay.rows, "cpu"),
        "lines": log.lines, "seconds": start - log.start, "progress": progress}
    with gzip.open(folder / "new.pt.gz", "wb", compresslevel=1) as file:
        torch.save(state, file)  # gzip's checksum will tell whether it is whole
    (folder / "new.pt.gz").replace(folder / "checkpoint.pt.gz")
    return time.monotonic() + max(agent.config.save_every, 20 * (time.monotonic() - start))

def read_checkpoint(path: str | Path) -> dict:
    """The checkpoint in a run's folder, or a file; DreamerError if it is not whole."""
    with explain(f"{path} holds no checkpoint that can be used"):
        with gzip.open(Path(path) / "checkpoint.pt.gz" if Path(path).is_dir() else path) as packed:
            state = torch.load(packed, map_location="cpu", weights_only=True)
        Config(**state["config"])
        return state

def load_checkpoint(agent: Agent, replay: ReplayBuffer, log: Log) -> tuple[int, int, int]:
    """Go on from the checkpoint in the log's folder; returns step, episode, updates."""
    state = read_checkpoint(log.folder)
    agent.load_state_dict(state["agent"])
    agent.optimizer.load_state_dict(state["optimizer"])
    columns = [map(np.copy, x.numpy()) for x in state["rows"].values()]  # to be freed one by one
    replay.rows = [dict(zip(state["rows"], row, strict=True)) for row in zip(*columns, strict=True)]
    log.lines, log.start = state["lines"], log.start - state["seconds"]
    torch.set_rng_state(state["random"])
    return state["progress"]

def load_agent(path: str | Path, device: str = "auto") -> Agent:
    """The agent in a run's folder or checkpoint file, for `agent.act` and `evaluate`."""
    state = read_checkpoint(path)
    config = Config(**state["config"] | {"device": device})
    with closing(PixelEnv(config.env)) as env, explain(f"the agent of {path}"):
        agent = Agent(env.action_space, config)
        agent.load_state_dict(state["agent"])
        return agent

# %% [markdown]
# # Section 5: Self-Evaluation Metrics
# From states of unseen episodes the prior dreams on, M = max(H, 50) steps, with the actions taken.
# A hat marks what was dreamed; alive_k is 1 until the real episode has terminated, then 0.
# - Eq. 5.1 `reward_rho = corr(hat c_1 ... hat c_{k-1} hat r_k, alive_{k-1} r_k)`, k <= H
# - Eq. 5.2 `return_rho`: the same, of sums over k <= H discounted by `gamma^{k-1}`
# - Eq. 5.3 `pixel_error_k`: Eq. 2.1 after k steps; and of two guesses: last, mean frame
# - Eq. 5.4 `trajectory_entropy`: entropies of actor and prior, summed over H steps

# %% 5.1 Evaluation on unseen seeds
def evaluate(agent: Agent, episodes: int = 20, seed: int = 0) -> dict[str, float]:
    """Returns of `episodes` unseen episodes, and Eq. 5.1 to 5.4, if defined, on further ones."""
    if episodes < 1:
        raise DreamerError(f"episodes must be at least 1, not {episodes}")
    returns, held_out = [], []
    with (closing(PixelEnv(agent.config.env, agent.config.action_repeat)) as env, torch.no_grad(),
          torch.random.fork_rng([] if agent.config.device == "cpu" else None)):
        torch.manual_seed(seed)
        for number in tqdm(range(episodes), "evaluation", leave=False):
            rows = play(agent, env, episode_seed(seed, number, evaluation=True))
            returns.append(sum(row["reward"] for row in rows))
        while len(held_out) < agent.config.held_out:
            number += 1
            held_out += play(agent, env, episode_seed(seed, number, evaluation=True), chance=0.02)
        metrics = dream_metrics(agent, held_out)
    metrics |= {"return": np.mean(returns), "return_std": np.std(returns),
                "return_min": np.min(returns), "return_max": np.max(returns)}
    return {f"eval/{name}": float(x) for name, x in metrics.items() if np.isfinite(float(x))}

# %% 5.2 Dreamed against real
def dream_metrics(agent: Agent, held_out: list[dict]) -> dict:
    """Eq. 5.1 to 5.4 on rows of held-out episodes, in dreams from every seventh row."""
    model, H = agent.slow_model, agent.config.horizon
    rows = stack_rows(held_out, agent.config.device)  # [L,...]
    obs, embed = rows["obs"], torch.cat([model.encoder(x) for x in rows["obs"].split(128)])  # [L,.]
    feat, *_ = model.rssm.observe(embed[None], rows["prev_action"][None], rows["is_first"][None])
    start = (~rows["terminated"]).nonzero().flatten()[::7].contiguous()  # [N]
    ends = rows["is_last"].nonzero().flatten()
    end = ends[torch.searchsorted(ends, start)]  # [N]: the last row of the episode
    index = start + torch.arange(max(H, 50) + 1, device=start.device).unsqueeze(1)  # [M+1,N]
    lasted, index = index <= end, torch.minimum(index, end)  # [M+1,N]
    known = lasted | rows["terminated"][end]  # [M+1,N]: after a termination nothing comes
    actions = rows["prev_action"][index[1:]]  # [M,N,A]
    dream, _ = imagine(model, agent.actor, feat[0, start], len(actions), actions)  # [M+1,N,F]
    reward, cont = model.predict(dream[: H + 1])  # [H+1,N]
    cont[0] = 1  # at the start the episode is alive
    dreamed = cont[:-1].cumprod(0) * reward[1:]  # [H,N]
    real = (lasted * rows["reward"][index])[1 : H + 1]  # [H,N]
    metrics = reward_correlation(dreamed, real, known[1 : H + 1], agent.config.gamma)
    mean = obs.mean(0, dtype=torch.float32) / 255  # [64,64,3]
    for k in (1, 5, 15, 50):
        guesses = {"": model.decoder(dream[k]), "_repeat": obs[start] / 255, "_mean": mean}
        for name, guess in guesses.items():
            error = (guess - obs[index[k]] / 255).square().sum((-3, -2, -1))  # [N]
            metrics[f"pixel_error{name}_{k}"] = error[lasted[k]].mean()  # Eq. 5.3
    return metrics | trajectory_entropy(agent, feat[0, start])

def reward_correlation(dreamed: Tensor, real: Tensor, known: Tensor, gamma: float) -> dict:
    """Eq. 5.1 and 5.2, of the known rewards [H,N]; nan where one does not vary."""
    def rho(x, y):
        varies = len(x) > 1 and x.min() < x.max() and y.min() < y.max()
        return torch.corrcoef(torch.stack([x, y]).double())[0, 1] if varies else np.nan
    discount = gamma ** torch.arange(len(real), device=real.device)  # [H]
    return {"reward_rho": rho(dreamed[known], real[known]),
            "return_rho": rho(discount @ dreamed[:, known[-1]], discount @ real[:, known[-1]])}

def trajectory_entropy(agent: Agent, feat: Tensor) -> dict:
    """Eq. 5.4, in nats, in the agent's own dreams from states (h, z) [N,F]."""
    feat, _ = imagine(agent.slow_model, agent.actor, feat, agent.config.horizon)  # [H+1,N,F]
    policy = agent.actor(feat[:-1]).entropy()  # [H,N]
    prior = agent.slow_model.rssm.prior(feat[1:, :, : agent.config.hidden])  # [H,N,S,K]
    gaussian = agent.config.latent == "gaussian"
    latent = (td.Normal(*prior.unbind(-1)) if gaussian else td.Categorical(prior)).entropy().sum(-1)
    return {"policy_entropy": policy.mean(), "latent_entropy": latent.mean(),
            "trajectory_entropy": (policy + latent).sum(0).mean()}

# %% 5.3 The dream as an environment
class DreamEnv(gym.Wrapper):
    """The learned world as a Gymnasium environment: after a real first frame, all is dreamed."""
    def __init__(self, agent: Agent):
        super().__init__(PixelEnv(agent.config.env, agent.config.action_repeat))
        self.agent, self.model = agent, agent.slow_model

    def reset(self, *, seed: int | None = None, options: dict | None = None):
        first, info = self.env.reset(seed=seed, options=options)
        with torch.random.fork_rng([] if self.agent.config.device == "cpu" else None):
            torch.manual_seed(int(2**31 * self.np_random.random()))
            _, (self.feat, _) = self.agent.act(first)
        return self.render(), info

    @torch.no_grad()
    def step(self, action):
        action = torch.as_tensor(flatten(self.action_space, action)).to(self.feat)[None]
        with torch.random.fork_rng([] if self.agent.config.device == "cpu" else None):
            torch.manual_seed(int(2**31 * self.np_random.random()))
            self.feat = self.model.rssm.img_step(self.feat, action)
            reward, cont = self.model.predict(self.feat)
            return self.render(), reward.item(), torch.rand(()).item() > cont.item(), False, {}

    @torch.no_grad()
    def render(self) -> np.ndarray:
        return (255 * self.model.decoder(self.feat)[0]).byte().cpu().numpy()

# %% Command line
def measure(eval: Path, episodes: int = 20, seed: int = 0, device: str = "auto") -> None:
    """Print, as JSON, how the agent of the run in folder EVAL does on unseen episodes."""
    print(json.dumps(evaluate(load_agent(eval, device), episodes, seed), indent=2))

def go_on(resume: Path, steps: int = 0, device: str = "") -> Path:
    """Go on with the run in folder RESUME; by default with its own steps and device."""
    saved = read_checkpoint(resume / "checkpoint.pt.gz")["config"]
    new = {"steps": steps or saved["steps"], "device": device or saved["device"]}
    return train(Config(**saved | new), resume)

def main(argv: list[str] | None = None) -> int:
    """The command line; returns 0, 2 after an error, 130 after Ctrl-C."""
    argv = sys.argv[1:] if argv is None else argv
    options = {word.partition("=")[0] for word in argv}
    try:
        if "--eval" in options:
            tyro.cli(measure, args=argv)
        elif "--resume" in options:
            tyro.cli(go_on, args=argv)
        else:
            default, _ = tyro.cli(settings, args=argv, return_unknown_args=True, add_help=False)
            train(tyro.cli(Config, args=argv, default=default))
        return 0
    except (DreamerError, OSError, MemoryError, torch.OutOfMemoryError) as error:
        print("dreamer.py: error:", " ".join((str(error) or repr(error)).split()), file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print("\ndreamer.py: stopped; --resume goes on with a run", file=sys.stderr)
        return 130

if __name__ == "__main__" and not {"IPython", "pydevconsole"} & sys.modules.keys():
    sys.exit(main())
