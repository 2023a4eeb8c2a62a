"""Dreamer in one file: learn a world model from pixels, then act in its imagination.

    python dreamer.py --device cpu      (in a notebook: run all cells)

This is DreamerV3 (arXiv:2301.04104), changed as README.md says. Sections have the lesson's numbers.
Begin with the loop in 4.1 and the agent in 1.6. Weights of P01 and P02: recipes/earlier_lessons.py.

Shapes    B batch   T time   N starts of imagination   H horizon   A action   E embedding
          D size of h   S groups of K classes   Z = S * K size of z   feat = (h, z)   F = D + Z
          Real sequences are [B, T, ...]. Dreams have the time first: [H+1, N, ...].

Time      row t: prev_feat, prev_action a_{t-1}, obs o_t, reward r_t, terminated, is_first, is_last
          Eq. 1.1   h_t = f(h_{t-1}, z_{t-1}, a_{t-1})   recurrent (papers call h deter, z stoch)
          Eq. 1.2   z_t ~ q(. | h_t, o_t)                posterior: has seen the frame
          Eq. 1.3   z_t ~ p(. | h_t)                     prior: has not, so it can dream
          o_t, r_t and c_t = 1 - terminated_t are predicted from (h_t, z_t). The action led to o_t.
          prev_feat is (h, z)_{t-1}. Where is_first, r_t is 0, and Eq. 1.1 starts from zeros.

Gradient of ...    reaches:    encoder, RSSM, decoder, heads    actor    critic
world model loss                            yes                   -        -
actor loss                                   -                   yes       -
critic loss                                  -                    -       yes
"""

# %% tags=["parameters"]
ARGUMENTS = "--resume"  # in a notebook, this takes the place of the command line

# %% [markdown]
# # Section 1: Setup (1.2 Encoder, 1.3 RSSM, 1.4 Actor, 1.5 PixelEnv, 1.6 Agent, 1.7 ReplayBuffer)
# %% 1.1 Hyperparameters and small tools
import copy
import json
import os
import sys
import zipfile
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path

import gymnasium as gym
import numpy as np
import torch
import tyro
from gymnasium.spaces import Box, Discrete, flatdim, flatten, unflatten
from matplotlib.figure import Figure
from PIL import Image
from torch import Tensor, nn
from torch import distributions as td
from tqdm import tqdm

sg = Tensor.detach  # stop-gradient: to the loss, sg(x) is a constant
torch.empty(8_000_000)  # freeing 32 MB once makes glibc reuse large blocks, not unmap them (faster)
td.Distribution.set_default_validate_args(False)  # checking every argument takes time
os.environ.setdefault("SDL_VIDEODRIVER", "dummy")  # environments draw without a screen,
os.environ.setdefault("SDL_NO_SIGNAL_HANDLERS", "1")  # and leave Ctrl-C to Python


@dataclass
class Config:
    """Train an agent from pixels, go on with a run, or measure its agent."""

    eval: str = ""  # folder of a run to measure, with --episodes, --seed and --device
    resume: bool = False  # go on from the checkpoint, if there is one
    env: str = "CartPole-v1"  # Gymnasium id; module:Id imports the module
    seed: int = 0  # seed of weights, actions, batches and episodes
    steps: int = 5_000  # steps of the agent; the last episode is played out
    device: str = "cpu"  # cpu, cuda or mps
    threads: int = 1  # CPU threads
    runs: str = "runs"  # folder for results; a run writes to RUNS/ENV-SEED
    action_repeat: int = 1  # environment steps for which an action is held
    prefill: int = 1_500  # steps of the untrained actor before the first update
    pretrain: int = 500  # updates of the world model alone
    train_ratio: float = 32.0  # replayed steps for each step after the prefill
    posttrain: int = 300  # updates of actor and critic alone, once `steps` are reached
    batch_size: int = 8  # B, sequences in a batch
    batch_length: int = 16  # T, steps in a sequence
    depth: int = 8  # the CNN has 2 * depth and 8 * depth channels
    hidden: int = 128  # D, size of the recurrent state h
    groups: int = 16  # S, categorical variables in z
    classes: int = 8  # K, classes of each variable in z
    units: int = 128  # width of the hidden layers of every MLP
    unimix: float = 0.01  # share of the uniform distribution in z
    free_nats: float = 0.1  # free bits: KL of a step, in nats, that is not penalised
    scale_dyn: float = 1.0  # weight of the KL that trains the prior
    scale_rep: float = 0.1  # weight of the KL that trains the posterior
    lr: float = 2.5e-3  # learning rate of the world model; rises for 200 updates, ends at 0
    behavior_lr: float = 6e-3  # learning rate of actor and critic; falls to 0 in posttrain
    horizon: int = 25  # H, imagined steps
    gamma: float = 0.99  # discount of a step
    lam: float = 0.95  # lambda of the lambda-return
    entropy: float = 1.2e-2  # eta, entropy's weight; a Box of n numbers has eta / n^2; falls to 0
    critic_rate: float = 0.1  # how far the slow critic, a steadier copy, moves towards the critic
    return_rate: float = 0.01  # rate of the running mean in Eq. 3.4; with 0 the scale is 1
    eval_every: int = 1_250  # steps between evaluations, each with a checkpoint
    episodes: int = 2  # episodes for eval/return; eval/reward_rho uses 100 rows for each of them

    def __post_init__(self):
        for name, value in asdict(self).items():
            is_int = type(getattr(Config, name)) is int
            lowest = 1 if is_int and name not in ("seed", "pretrain", "posttrain") else 0
            highest = 1 if name in "unimix gamma lam critic_rate return_rate".split() else 10**9
            if not isinstance(value, str) and not lowest <= value <= highest:
                raise ValueError(f"{name} must lie between {lowest} and {highest}, not {value}")
        if not self.batch_length <= self.prefill < self.steps:
            raise ValueError("batch_length <= prefill < steps must hold")


@contextmanager
def explain(where: str):
    """Turn any error of the block into a ValueError that says where."""
    try:
        yield
    except Exception as error:
        raise ValueError(f"{where}: {str(error) or repr(error)}") from error


def symexp(x: Tensor) -> Tensor:
    """sign(x) (exp(|x|) - 1), the inverse of symlog: it spaces the bins of 1.4."""
    return torch.sign(x) * torch.expm1(torch.abs(x))


def twohot_encode(x: Tensor, bins: Tensor) -> Tensor:
    """Numbers [...] -> weights [..., bins] of the two bins around each."""
    x = x.clamp(bins[0], bins[-1]).unsqueeze(-1)
    above = torch.searchsorted(bins, x).clamp(min=1)
    below = above - 1
    weight = (x - bins[below]) / (bins[above] - bins[below])
    zeros = x.new_zeros(*x.shape[:-1], len(bins))
    return zeros.scatter(-1, below, 1 - weight).scatter(-1, above, weight)


def twohot_decode(logits: Tensor, bins: Tensor) -> Tensor:
    """Logits [..., bins] -> mean of the bins [...]."""
    terms = torch.softmax(logits, -1) * bins
    # Bins -b and b, up to 4.85e8, cancel first. A plain sum gives -0.3 for equal weights, not 0.
    return (terms + terms.flip(-1)).sum(-1) / 2  # each pair is in it twice


def init_weights(module: nn.Module) -> None:
    """Truncated normal weights of variance 1 / inputs; zero biases."""
    if isinstance(module, nn.Linear | nn.Conv2d):
        std = 1.1368 / module.weight[0].numel() ** 0.5  # truncation at 2 std divides std by 1.1368
        nn.init.trunc_normal_(module.weight, 0.0, std, -2 * std, 2 * std)
        nn.init.zeros_(module.bias)


def mlp(inputs: int, units: int, layers: int, outputs: int, outscale=1.0) -> nn.Sequential:
    """Hidden layers, then a linear layer; with outscale 0 it starts at zero."""
    network = nn.Sequential()
    for _ in range(layers):
        network.extend([nn.Linear(inputs, units), nn.LayerNorm(units), nn.SiLU()])
        inputs = units
    network.append(nn.Linear(inputs, outputs)).apply(init_weights)
    network[-1].weight.data *= outscale
    return network


# %% 1.2 Encoder and decoder
class Encoder(nn.Module):
    """Frames uint8 [..., 64, 64, 3] -> [..., embed_size]. Agent(encoder=...) takes another."""

    def __init__(self, depth: int):
        super().__init__()
        few, many = 2 * depth, 8 * depth
        to_16x16 = nn.Conv2d(3, few, 8, stride=4, padding=2)
        to_4x4 = nn.Conv2d(few, many, 4, stride=4)
        self.convs = nn.ModuleList([to_16x16, to_4x4]).apply(init_weights)
        self.norms = nn.ModuleList([nn.LayerNorm(few), nn.LayerNorm(many)])
        self.embed_size = many * 4 * 4

    def forward(self, obs: Tensor) -> Tensor:
        x = obs.reshape(-1, 64, 64, 3) / 255 - 0.5
        for conv, norm in zip(self.convs, self.norms, strict=True):
            x = conv(x.permute(0, 3, 1, 2)).permute(0, 2, 3, 1)  # nn.Conv2d wants channels first
            x = nn.functional.silu(norm(x))
        return x.flatten(1).unflatten(0, obs.shape[:-3])


class Decoder(nn.ModuleList):
    """Features [..., F] -> mean frames [..., 64, 64, 3] in [0, 1]."""

    def __init__(self, feat_size: int, depth: int):
        few, many = 2 * depth, 8 * depth
        to_4x4 = nn.Linear(feat_size, 16 * many)
        to_16x16 = nn.Sequential(nn.LayerNorm(many), nn.SiLU(), nn.Linear(many, 16 * few))
        to_64x64 = nn.Sequential(nn.LayerNorm(few), nn.SiLU(), nn.Linear(few, 16 * 3))
        super().__init__([to_4x4, to_16x16, to_64x64])
        self.apply(init_weights)

    def forward(self, feat: Tensor) -> Tensor:
        x = feat[..., None, None, :]  # [..., n, n, channels]: n = 1 (F channels), then 4, 16, 64
        for stage in self:  # each pixel becomes 4x4: a transposed convolution with stride 4
            x = stage(x).unflatten(-1, (4, 4, -1)).transpose(-4, -3)  # [..., n, 4, n, 4, channels]
            x = x.flatten(-5, -4).flatten(-3, -2)  # [..., 4n, 4n, channels]
        return torch.sigmoid(x)


# %% 1.3 Recurrent state-space model (RSSM)
def kl_divergence(p: Tensor, q: Tensor) -> Tensor:
    """KL(p || q) [...] in nats, of probabilities [..., S, K]."""
    return (p * (p.log() - q.log())).sum((-2, -1))


class RSSM(nn.Module):
    """arXiv:1811.04551. Agent(rssm=...) takes another (see recipes/lesson_parts.py)."""

    kl = staticmethod(kl_divergence)  # an RSSM with another kind of z brings its own

    def __init__(self, embed_size: int, action_size: int, config: Config):
        super().__init__()
        D, U, Z = config.hidden, config.units, config.groups * config.classes
        self.shape = config.groups, config.classes  # S, K
        self.hidden, self.feat_size = D, D + Z
        self.unimix = max(config.unimix, 1e-6)  # the KL never takes the logarithm of 0

        self.inputs = nn.Sequential(nn.Linear(Z + action_size, U), nn.LayerNorm(U), nn.SiLU())
        self.gates = nn.Sequential(nn.Linear(U + D, 3 * D), nn.LayerNorm(3 * D))
        self.apply(init_weights)
        self.prior_net = mlp(D, U, 1, Z)
        self.post_net = mlp(D + embed_size, U, 1, Z, outscale=3.0)  # so frames differ in z

    def initial(self, batch: int) -> Tensor:
        """The state before an episode: zeros [batch, F]."""
        return self.gates[0].weight.new_zeros(batch, self.feat_size)

    def recur(self, feat: Tensor, prev_action: Tensor) -> Tensor:
        """Eq. 1.1, the next h [..., D]: a GRU, but its reset gate scales the whole candidate."""
        h, z = feat.split([self.hidden, self.feat_size - self.hidden], -1)
        x = self.inputs(torch.cat([z, prev_action.clamp(-1, 1)], -1))  # Box actions may lie outside
        reset, candidate, update = self.gates(torch.cat([x, h], -1)).chunk(3, -1)
        candidate = torch.tanh(torch.sigmoid(reset) * candidate)
        update = torch.sigmoid(update - 1)  # 1: new, 0: old; at first mostly old
        return update * candidate + (1 - update) * h

    def params(self, outputs: Tensor) -> Tensor:
        """Outputs of a network [..., Z] -> parameters of z: its probabilities [..., S, K]."""
        probs = torch.softmax(outputs.unflatten(-1, self.shape), -1)
        return (1 - self.unimix) * probs + self.unimix / self.shape[1]

    def prior(self, h: Tensor) -> Tensor:
        """Eq. 1.3: h [..., D] -> probabilities of z [..., S, K]."""
        return self.params(self.prior_net(h))

    def sample(self, probs: Tensor) -> Tensor:
        """One-hot z [..., Z]. Straight-through: probs - sg(probs) is 0, with probs' gradient."""
        # The first class whose cumulative probability is >= u: faster than torch.distributions.
        u = torch.rand_like(probs[..., :1])
        drawn = (sg(probs).cumsum(-1) < u).sum(-1, keepdim=True).clamp(max=self.shape[1] - 1)
        one_hot = torch.zeros_like(probs).scatter_(-1, drawn, 1.0)
        return (one_hot + (probs - sg(probs))).flatten(-2)

    def entropy(self, probs: Tensor) -> Tensor:
        """Entropy [...] of z in nats."""
        return td.OneHotCategorical(probs).entropy().sum(-1)

    def img_step(self, feat: Tensor, action: Tensor) -> Tensor:
        """A step of imagination, without a frame: the next (h, z), z from the prior."""
        h = self.recur(feat, action)
        return torch.cat([h, self.sample(self.prior(h))], -1)

    def obs_step(self, feat: Tensor, prev_action: Tensor, embed: Tensor):
        """A step with a frame: the next (h, z), and the posterior of z."""
        h = self.recur(feat, prev_action)
        post = self.params(self.post_net(torch.cat([h, embed], -1)))  # Eq. 1.2
        return torch.cat([h, self.sample(post)], -1), post

    def observe(self, embed: Tensor, prev_action: Tensor, is_first: Tensor, feat: Tensor):
        """Sequences [B, T, ...] after states [B, F] -> [B, T, F], posterior, prior [B, T, S, K]."""
        keep = (~is_first).float().unsqueeze(-1)  # [B, T, 1]: 0 cuts off what was before
        prev_action = keep * prev_action
        feats, posts = [], []
        for t, embed_t in enumerate(embed.unbind(1)):  # embed[:, t] would have a slower gradient
            feat, post = self.obs_step(keep[:, t] * feat, prev_action[:, t], embed_t)
            feats.append(feat)
            posts.append(post)
        feats = torch.stack(feats, 1)
        return feats, torch.stack(posts, 1), self.prior(feats[..., : self.hidden])


# %% 1.4 Heads, actor and critic
class TwoHotHead(nn.Module):
    """Predicts a number as a distribution over 255 bins; gives its mean [...]."""

    def __init__(self, feat_size: int, units: int, layers: int):
        super().__init__()
        self.net = mlp(feat_size, units, layers, 255, outscale=0.0)
        half = symexp(torch.linspace(-20, 0, 128))  # from -4.85e8 to 0; then mirrored
        self.register_buffer("bins", torch.cat([half, -half[:-1].flip(0)]), persistent=False)

    def forward(self, feat: Tensor) -> Tensor:
        return twohot_decode(self.net(feat), self.bins)

    def loss(self, feat: Tensor, *targets: Tensor) -> Tensor:
        """Cross-entropy [...] with a target [...]; with two targets (Eq. 3.6) the sum of both."""
        weights = sum(twohot_encode(target, self.bins) for target in targets)
        return -(weights * torch.log_softmax(self.net(feat), -1)).sum(-1)


class Critic(TwoHotHead):
    """(h, z) -> value: the discounted rewards that are still to come."""


class Actor(nn.Module):
    """(h, z) -> distribution of actions: categorical, or normal for a Box."""

    def __init__(self, feat_size: int, action_space: gym.Space, units: int):
        super().__init__()
        size, self.discrete = flatdim(action_space), isinstance(action_space, Discrete)
        outputs, self.numbers = (size, 1) if self.discrete else (2 * size, size)  # means and stds
        self.net = mlp(feat_size, units, 2, outputs, outscale=0.01)
        self.limit = torch.inf if self.discrete else 3.0  # tanh and sigmoid are flat beyond 3

    def forward(self, feat: Tensor) -> td.Distribution:
        return self.policy(self.net(feat))

    def policy(self, outputs: Tensor) -> td.Distribution:  # outputs of self.net
        if self.discrete:
            return td.OneHotCategorical(logits=outputs)
        mean, std = outputs.chunk(2, -1)
        std = 0.9 * torch.sigmoid(std + 2) + 0.1  # between 0.1 and 1, at first 0.9
        return td.Independent(td.Normal(torch.tanh(mean), std), 1)


# %% 1.5 Environment
def small_frame(image) -> np.ndarray:
    """A gray or color frame, integers to 255 or floats to 1 -> uint8 [64, 64, 3]."""
    frame = np.squeeze(np.asarray(image))
    frame = 255 * frame if frame.dtype.kind in "fb" else frame  # in floats, 1 is white
    if frame.ndim not in (2, 3) or not 0 <= frame.min() <= frame.max() <= 255:
        raise ValueError(f"render() gave {type(image).__name__} {frame.shape}, no frame in 0...255")
    picture = Image.fromarray(frame.astype(np.uint8, copy=False)).convert("RGB")
    return np.array(picture.resize((64, 64), Image.Resampling.BOX))


class PixelEnv(gym.Wrapper):
    """An environment seen through its pixels. `row` is the newest row."""

    def __init__(self, env_id: str, action_repeat: int = 1):
        self.env_id, self.action_repeat = env_id, action_repeat
        with explain(f"--env {env_id}"):
            env = gym.make(env_id, render_mode="rgb_array", disable_env_checker=True)
            if env.spec.max_episode_steps is None:  # evaluations have to end
                env = gym.wrappers.TimeLimit(env, 1_000)
            if not isinstance(env.action_space, Discrete):  # RescaleAction needs a bounded Box
                env = gym.wrappers.RescaleAction(env, -1, 1)
            super().__init__(env)
        self.observation_space = Box(0, 255, (64, 64, 3), np.uint8)

    def reset(self, *, seed: int | None = None, options: dict | None = None):
        self.where = f"{self.env_id}, episode with seed {seed}"
        self.action_space.seed(None if seed is None else seed + 2**40)  # apart from env's draws
        with explain(self.where):
            _, info = self.env.reset(seed=seed, options=options)
            self.remember(np.zeros(flatdim(self.action_space)), is_first=True)
        return self.row["obs"], info

    def step(self, action):
        if isinstance(self.action_space, Box):
            action = np.clip(action, -1, 1)
        total = 0.0
        with explain(self.where):
            for _ in range(self.action_repeat):
                _, reward, terminated, truncated, info = self.env.step(action)
                total += np.asarray(reward, float).item()
                if terminated or truncated:
                    break
            self.remember(flatten(self.action_space, action), total, terminated, truncated)
        return self.row["obs"], total, bool(terminated), bool(truncated), info

    def remember(self, action, reward=0.0, terminated=False, truncated=False, is_first=False):
        flags = [np.asarray(x, float).item() for x in (terminated, truncated)]  # nan for None
        if not np.isfinite([reward, *flags]).all():
            raise ValueError(f"step() gave {reward=}, {terminated=}, {truncated=}")
        self.row = {"obs": small_frame(self.env.render()), "prev_action": np.float32(action)}
        self.row |= {"reward": np.float32(reward), "terminated": bool(terminated)}
        self.row |= {"is_first": is_first, "is_last": bool(terminated or truncated)}


# %% 1.6 The models: initialised, or given
class Agent(nn.Module):
    """World model (2.1), actor, critic. Encoder and RSSM may be given: recipes/earlier_lessons."""

    def __init__(self, action_space: gym.Space, config: Config, encoder=None, rssm=None):
        super().__init__()
        torch.set_num_threads(config.threads)
        self.config, self.action_space = config, action_space
        with explain(f"networks on --device {config.device}"):
            self.world_model = WorldModel(flatdim(action_space), config, encoder, rssm)
            self.actor = Actor(self.world_model.rssm.feat_size, action_space, config.units)
            self.critic = Critic(self.world_model.rssm.feat_size, config.units, layers=2)
            self.slow_critic = copy.deepcopy(self.critic).requires_grad_(False)
            self.register_buffer("return_range", torch.zeros(2))  # two percentiles, Eq. 3.4
            self.to(config.device)

        self.optimizers = {}
        for part in ("world_model", "actor", "critic"):
            weights = [x for x in getattr(self, part).parameters() if x.requires_grad]
            self.optimizers[part] = torch.optim.Adam(weights, betas=(0.9, 0.95), fused=True)

    @torch.no_grad()
    def act(self, obs: np.ndarray, state: tuple | None = None, explore=False, repeat=False):
        """Frame uint8 [64, 64, 3], last state -> action, new state: a state here is (feat, action).
        The action is the most likely one, or drawn (explore), or the last one again (repeat)."""
        model = self.world_model
        obs = torch.as_tensor(obs, device=self.config.device)[None]  # [1, 64, 64, 3]
        if state is None:  # (h, z) [1, F] and the action [1, A] before an episode
            state = model.rssm.initial(1), obs.new_zeros(1, flatdim(self.action_space)).float()

        feat, _ = model.rssm.obs_step(*state, model.encoder(obs))
        action = self.actor(feat).sample() if explore else self.actor(feat).mode
        action = state[1] if repeat else action
        return unflatten(self.action_space, action[0].cpu().numpy()), (feat, action)


# %% 1.7 Replay buffer
def stack_rows(rows: list[dict]) -> dict[str, Tensor]:
    """L rows of the time diagram -> columns [L, ...]."""
    return {name: torch.from_numpy(np.stack([row[name] for row in rows])) for name in rows[0]}


class ReplayBuffer:
    """The last `capacity` rows (13 kB each) in the order in which they came."""

    def __init__(self, capacity: int = 100_000, device: str = "cpu"):
        self.capacity, self.device, self.rows = capacity, device, []

    def add(self, row: dict, prev_feat: Tensor) -> None:
        """Append a row, and the state (h, z) [1, F] before it."""
        self.rows.append(row | {"prev_feat": prev_feat[0].cpu().numpy()})
        del self.rows[: -self.capacity]

    def sample(self, batch_size: int, length: int) -> dict[str, Tensor]:
        """Sequences [B, T, ...] that start at the later of two random rows: new ones count more."""
        starts = torch.randint(len(self.rows) - length + 1, (2, batch_size)).amax(0)
        self.drawn = [start + t for start in starts.tolist() for t in range(length)]  # for refresh
        columns = stack_rows([self.rows[i] for i in self.drawn])  # [B * T, ...]
        return {name: x.unflatten(0, (-1, length)).to(self.device) for name, x in columns.items()}

    def refresh(self, feat: Tensor) -> None:
        """Store the new states [B, T, F] of the last sample, each in the row that follows it."""
        for i, x in zip(self.drawn, feat.flatten(0, 1).cpu().numpy(), strict=True):
            if i + 1 < len(self.rows):
                self.rows[i + 1]["prev_feat"] = x.copy()


# %% [markdown]
# # Section 2: World Model Update (2.1 WorldModel, 2.2 update_world_model)
# Eq. 2.6 `loss = mean over B, T of recon + reward + cont + scale_dyn * dyn + scale_rep * rep`
# - Eq. 2.1 `recon = sum over pixels of (o_t / 255 - decoder(h_t, z_t))^2`
# - Eq. 2.2 `reward = -ln p(r_t | h_t, z_t)`, a cross-entropy with the two-hot reward
# - Eq. 2.3 `cont = -ln p(c_t | h_t, z_t)` (binary), `c_t = 1 - terminated_t`: truncation is no end
# - Eq. 2.4 `dyn = max(free, KL(sg(q) || p))`: the prior learns to predict the posterior
# - Eq. 2.5 `rep = max(free, KL(q || sg(p)))`: the posterior gets easier to predict (KL balancing)
# %% 2.1 World model loss
class WorldModel(nn.Module):
    """Encoder, RSSM, decoder and heads: the parts that learn from real rows."""

    def __init__(self, action_size: int, config: Config, encoder=None, rssm=None):
        super().__init__()
        self.config = config
        self.encoder = encoder or Encoder(config.depth)
        self.rssm = rssm or RSSM(self.encoder.embed_size, action_size, config)
        feat_size = self.rssm.feat_size
        self.decoder = Decoder(feat_size, config.depth)
        self.reward_head = TwoHotHead(feat_size, config.units, layers=1)
        self.cont_head = mlp(feat_size, config.units, 1, 1)  # continue head: the logit of c

    def predict(self, feat: Tensor) -> tuple[Tensor, Tensor]:
        """(h, z) -> reward, and probability that the episode goes on."""
        return self.reward_head(feat), torch.sigmoid(self.cont_head(feat).squeeze(-1))

    def loss(self, batch: dict[str, Tensor]) -> tuple[Tensor, Tensor, dict]:
        """Rows [B, T, ...] -> loss [], states (h, z) [B, T, F], metrics."""
        embed = self.encoder(batch["obs"])  # [B, T, E]
        inputs = batch["prev_action"], batch["is_first"], batch["prev_feat"][:, 0]  # [B, F]
        feat, post, prior = self.rssm.observe(embed, *inputs)
        frame = self.decoder(feat)  # [B, T, 64, 64, 3]
        error = nn.functional.mse_loss(frame, batch["obs"] / 255, reduction="none")
        goes_on = td.Bernoulli(logits=self.cont_head(feat).squeeze(-1))

        # The terms of Eq. 2.6 are losses, not predictions (see `predict`). Each is [B, T].
        recon = error.sum((-3, -2, -1))  # Eq. 2.1
        reward = self.reward_head.loss(feat, batch["reward"])  # Eq. 2.2
        cont = -goes_on.log_prob(1 - batch["terminated"].float())  # Eq. 2.3
        kl = self.rssm.kl(sg(post), prior)
        dyn = kl.clamp(min=self.config.free_nats)  # Eq. 2.4
        rep = self.rssm.kl(post, sg(prior)).clamp(min=self.config.free_nats)  # Eq. 2.5
        assert recon.shape == reward.shape == cont.shape == kl.shape

        scale_dyn, scale_rep = self.config.scale_dyn, self.config.scale_rep
        loss = (recon + reward + cont + scale_dyn * dyn + scale_rep * rep).mean()  # Eq. 2.6
        metrics = {"recon": recon, "reward": reward, "cont": cont, "dyn": dyn, "rep": rep, "kl": kl}
        return loss, feat, {f"wm/{name}": sg(x).mean() for name, x in metrics.items()}


# %% 2.2 World model update step
def gradient_step(agent: Agent, part: str, loss: Tensor, anneal: float = 1.0) -> Tensor:
    """One Adam step on the weights of one part: no other weight moves."""
    optimizer = agent.optimizers[part]
    weights = optimizer.param_groups[0]["params"]
    lr = agent.config.lr if part == "world_model" else agent.config.behavior_lr
    optimizer.param_groups[0]["lr"] = anneal * lr

    optimizer.zero_grad()
    loss.backward(inputs=weights)  # no gradient for any other part
    with explain(f"the loss of the {part} is {loss:.3g}"):
        norm = nn.utils.clip_grad_norm_(weights, max_norm=10.0, error_if_nonfinite=True)
    optimizer.step()
    return norm


def update_world_model(agent: Agent, batch: dict[str, Tensor], anneal: float = 1.0):
    """Rows [B, T, ...] -> states (h, z) [B, T, F], metrics. One step, at anneal * lr."""
    loss, feat, metrics = agent.world_model.loss(batch)
    grad_norm = gradient_step(agent, "world_model", loss, anneal)
    return sg(feat), metrics | {"wm/grad_norm": grad_norm}


# %% [markdown]
# # Section 3: Behavior Learning (3.1 imagine, 3.2 lambda_return, 3.3 update_behavior)
# - Eq. 3.1 `a_t ~ pi(. | h_t, z_t)`, `h_{t+1} = f(h_t, z_t, a_t)`, `z_{t+1} ~ p(. | h_{t+1})`
# - Eq. 3.2 `R_t = r_{t+1} + gamma c_{t+1} ((1 - lam) v_{t+1} + lam R_{t+1})`, `R_H = v_H`
# - Eq. 3.3 `w_t = c_0 (gamma c_1) ... (gamma c_t)`: discounted chance to be alive
# - Eq. 3.4 `scale = max(1, running mean of (95th - 5th percentile of R))`
# - Eq. 3.5 `actor loss = -mean w_t (sg((R_t - v_t) / scale) ln pi(a_t | h_t, z_t) + eta entropy)`
#   For a Box of n numbers eta is divided by n^2, and each output x adds `0.01 max(0, |x| - 3)^2`.
# - Eq. 3.6 `critic loss = mean w_t (CE(R_t) + CE(slow critic's v_t))`, CE: two-hot cross-entropy
# %% 3.1 Imagination
def imagine(model: WorldModel, actor: Actor, feat: Tensor, horizon: int) -> tuple[Tensor, Tensor]:
    """Eq. 3.1: start states [N, F] -> states [H+1, N, F], actions [H, N, A]."""
    feats, actions = [feat], []
    for t in range(horizon):
        actions.append(actor(feats[t]).sample())  # [N, A]
        feats.append(model.rssm.img_step(feats[t], actions[t]))  # [N, F]
    return torch.stack(feats), torch.stack(actions)


# %% 3.2 Lambda-return
def lambda_return(reward: Tensor, value: Tensor, cont: Tensor, gamma: float, lam: float) -> Tensor:
    """Eq. 3.2: reward, value, cont [H+1, ...], whose first entries are not used -> R [H, ...]."""
    returns = [value[-1]]
    for t in reversed(range(len(value) - 1)):
        mixed = (1 - lam) * value[t + 1] + lam * returns[-1]
        returns.append(reward[t + 1] + gamma * cont[t + 1] * mixed)
    return torch.stack(returns[1:][::-1])  # in the order of time, without R_H


# %% 3.3 Actor and critic losses, behavior update step
def update_behavior(agent: Agent, start: Tensor, anneal: float = 1.0) -> dict[str, Tensor]:
    """Dream from states [N, F]; then a step of the actor, the critic, the slow critic."""
    config, model = agent.config, agent.world_model

    # Dream, without gradients. So `sg` in the losses below only marks what is constant.
    with torch.no_grad():
        feat, action = imagine(model, agent.actor, start, config.horizon)  # [H+1, N, F], [H, N, A]
        reward, cont = model.predict(feat)  # each [H+1, N]
        value = agent.critic(feat)  # [H+1, N]
    feat = sg(feat[:-1])  # [H, N, F]: the last state has no action

    # Returns
    returns = lambda_return(reward, value, cont, config.gamma, config.lam)  # [H, N]
    factors = torch.cat([cont[:1], config.gamma * cont[1:-1]])  # [H, N] c_0, gamma c_1, ...
    weight = sg(factors.cumprod(0))  # [H, N] Eq. 3.3: near 0 if the start is terminated
    percentiles = torch.quantile(returns, returns.new_tensor([0.05, 0.95]))  # [2]
    low, high = agent.return_range.lerp_(percentiles, config.return_rate)  # the running mean
    scale = (high - low).clamp(min=1.0)  # [] Eq. 3.4

    # Actor: REINFORCE with the baseline v_t, so no gradient has to pass through the dream
    outputs = agent.actor.net(feat)  # [H, N, A], or for a Box [H, N, 2 * A]
    policy = agent.actor.policy(outputs)
    entropy = policy.entropy()  # [H, N]
    advantage = sg((returns - value[:-1]) / scale)  # [H, N]
    eta = anneal * config.entropy / agent.actor.numbers**2
    objective = advantage * policy.log_prob(sg(action)) + eta * entropy  # [H, N]
    excess = nn.functional.relu(outputs.abs() - agent.actor.limit).square().sum(-1)  # [H, N]
    actor_loss = 0.01 * excess.mean() - (weight * objective).mean()  # [] Eq. 3.5

    # Critic
    slow_value = sg(agent.slow_critic(feat))  # [H, N]
    cross_entropy = agent.critic.loss(feat, sg(returns), slow_value)  # [H, N]
    critic_loss = (weight * cross_entropy).mean()  # [] Eq. 3.6
    assert objective.shape == cross_entropy.shape == weight.shape

    gradient_step(agent, "actor", actor_loss, anneal)
    gradient_step(agent, "critic", critic_loss, anneal)
    for slow, fast in zip(agent.slow_critic.parameters(), agent.critic.parameters(), strict=True):
        slow.lerp_(sg(fast), config.critic_rate)  # slow <- (1 - rate) slow + rate fast

    metrics = {"actor": actor_loss, "critic": critic_loss, "entropy": entropy}
    metrics |= {"value": value, "return": returns, "return_scale": scale}
    return {f"ac/{name}": sg(x).mean() for name, x in metrics.items()}


# %% [markdown]
# # Section 4: Training Loop (4.1 train, 4.2 open_run, Log)
# %% 4.1 The training loop
def updates_due(config: Config, step: int) -> int:
    """Updates due by this step. By default 500 at 1,500, one every 4 steps, 300 more at 5,000."""
    if step < config.prefill:
        return 0
    replayed = (min(step, config.steps) - config.prefill) * config.train_ratio
    due = config.pretrain + int(replayed / (config.batch_size * config.batch_length))
    return due + (config.posttrain if step >= config.steps else 0)


def schedule(config: Config, step: int, updates: int) -> tuple[float, float]:
    """Two factors: of the world model's learning rate; of the behavior's, and of eta."""
    last_third = 3 * (config.steps - step) / (config.steps - config.prefill)
    left = updates_due(config, config.steps) - updates  # over the last `posttrain`, the rate falls
    warm_up = (updates + 1) / 200
    return max(0.0, min(warm_up, 1.0, last_third)), min(1.0, left / max(1, config.posttrain))


def train(config: Config, agent: Agent | None = None) -> Path:
    """Train a new agent; or a given one, whose own config then replaces `config`."""
    config = agent.config if agent else config
    env, agent, replay, log, (step, episode) = open_run(config, agent)
    updates = updates_due(config, step)

    with env, tqdm(total=updates_due(config, config.steps), initial=updates, unit="update") as bar:
        while step < config.steps:
            env.reset(seed=2_000_000 * config.seed + 2 * episode)  # even; evaluations: odd
            replay.add(env.row, agent.world_model.rssm.initial(1))
            state, repeat = None, False
            score, episode_start, metrics = 0.0, step, {}
            # Every other episode has many repeats in the prefill, and while dreams pay the same.
            equal = agent.return_range.diff() < 0.1 * config.return_rate  # their spread, Eq. 3.4
            chance = 0.75 if (step < config.prefill or equal) and episode % 2 else 0.02

            while not env.row["is_last"]:
                # Act: draw an action, or repeat the last one. A repeat goes on in 75 % of cases.
                repeat = state is not None and torch.rand(()) < (0.75 if repeat else chance)
                action, state = agent.act(env.row["obs"], state, explore=True, repeat=repeat)
                env.step(action)
                replay.add(env.row, state[0])  # the (h, z) in which the action was chosen
                step, score = step + 1, score + env.row["reward"]

                # Learn: the world model from real rows, then the behavior from dreams.
                while updates < updates_due(config, step):
                    model_anneal, behavior_anneal = schedule(config, step, updates)
                    batch = replay.sample(config.batch_size, config.batch_length)
                    feat = batch["prev_feat"]  # [B, T, F]: the stored state of the row before each
                    if model_anneal > 0:  # 0 once step >= steps: dreams begin in these stored ones
                        feat, metrics = update_world_model(agent, batch, model_anneal)
                        replay.refresh(feat)
                    if updates >= config.pretrain:
                        start = feat[:, ::4].flatten(0, 1)  # [N, F]: every fourth state
                        metrics |= update_behavior(agent, start, behavior_anneal)
                    updates += 1
                    bar.update()

            # Log, evaluate, save: between two episodes, when env has no state to keep.
            episode += 1
            log.write({"env/step": step, "wm/updates": updates, "env/return": score} | metrics)
            bar.set_postfix(step=step, episode_return=score)
            passed = step // config.eval_every > episode_start // config.eval_every
            if passed or step >= config.steps:
                log.write({"env/step": step} | evaluate(agent, config.episodes, config.seed))
                log.draw()
                save_checkpoint(agent, replay, log, step, episode)
    return log.folder


# %% 4.2 The beginning of a run, its log and curves
def open_run(config: Config, agent: Agent | None) -> tuple:
    """Environment, agent, replay, log; step and episode so far. It overwrites no checkpoint."""
    folder = Path(config.runs, f"{config.env}-{config.seed}".replace(":", "-").replace("/", "-"))
    exists = (folder / "checkpoint.pt").exists()
    if exists and not config.resume:
        raise ValueError(f"{folder} exists: --resume or delete it, or change --seed or --runs")

    torch.manual_seed(config.seed)
    env = PixelEnv(config.env, config.action_repeat)
    agent = agent or Agent(env.action_space, config)
    replay, log = ReplayBuffer(device=config.device), Log(folder)
    progress = load_checkpoint(agent, replay, log) if exists else (0, 0)
    print(f"Results: {folder}. The same command with --resume goes on from a checkpoint.")
    return env, agent, replay, log, progress


class Log:
    """metrics.jsonl has a line for every episode and for every evaluation."""

    def __init__(self, folder: Path):
        self.folder, self.lines = folder, []

    def write(self, line: dict) -> None:
        self.lines.append({name: float(value) for name, value in line.items()})
        self.folder.mkdir(parents=True, exist_ok=True)
        text = "".join(json.dumps(line) + "\n" for line in self.lines)
        (self.folder / "metrics.jsonl").write_text(text)

    def draw(self) -> None:
        """Learning curves, over the steps of the agent."""
        names = "env/return eval/return wm/recon wm/kl ac/entropy".split()
        names += "eval/policy_entropy eval/latent_entropy eval/reward_rho".split()
        figure = Figure(figsize=(15, 6.5), layout="constrained")
        for axes, name in zip(figure.subplots(2, 4).flat, names, strict=True):
            lines = [line for line in self.lines if name in line]
            axes.plot([x["env/step"] for x in lines], [x[name] for x in lines], ".-")
            axes.set(title=name, xlabel="steps", yscale="log" if name == "wm/recon" else "linear")
            axes.locator_params("x", nbins=6)
        figure.savefig(self.folder / "curves.png", dpi=100)


# %% [markdown]
# # Section 5: Self-Evaluation Metrics (5.1 evaluate, 5.2 dream_metrics), Section 6: Save Checkpoint
# c' and r' are dreamed k <= 15 steps ahead, with the actions that were really taken.
# - Eq. 5.1 `reward_rho = corr(c'_1 ... c'_{k-1} r'_k, r_k)` (Pearson; alive before step k, then r')
# - Eq. 5.2 `latent_entropy` (trajectory entropy): the prior's entropy along the actor's dreams
# - Eq. 5.3 `policy_entropy`: of the actor in the same dreams
# %% 5.1 Evaluation on unseen seeds
def play(agent: Agent, env: PixelEnv, seed: int, chance: float = 0.0) -> tuple[list, list]:
    """Rows; (h, z) [1, F] before each action. With probability `chance` 15 random actions begin."""
    env.reset(seed=seed)
    rows, feats, state, burst = [env.row], [], None, 0
    while not env.row["is_last"]:
        burst = 15 if torch.rand(()) < chance else burst - 1  # random if > 0
        action, (feat, _) = agent.act(env.row["obs"], state)
        env.step(env.action_space.sample() if burst > 0 else action)
        rows.append(env.row)
        feats.append(feat)
        state = feat, feat.new_tensor(env.row["prev_action"])[None]  # the action really taken
    return rows, feats


@torch.no_grad()
def evaluate(agent: Agent, episodes: int = 2, seed: int = 0) -> dict[str, float]:
    """Returns of unseen episodes, and Eq. 5.1 to 5.3 where they are defined."""
    unseen = iter(range(2_000_000 * seed + 1, 2_000_000 * (seed + 1), 2))  # training: even seeds
    with PixelEnv(agent.config.env, agent.config.action_repeat) as env, torch.random.fork_rng():
        torch.manual_seed(seed)
        returns, held_out = [], []
        for _ in tqdm(range(episodes), "evaluation", leave=False):
            returns.append(sum(row["reward"] for row in play(agent, env, next(unseen))[0]))
        # If all rewards are 1, rho needs falls (r is 0 after one): random actions cause some.
        while sum(len(rows) for rows, _ in held_out) < 100 * episodes:
            held_out.append(play(agent, env, next(unseen), chance=0.02))
        metrics = dream_metrics(agent, held_out)
    metrics |= {"return": np.mean(returns), "return_std": np.std(returns)}
    return {f"eval/{name}": float(x) for name, x in metrics.items() if np.isfinite(float(x))}


# %% 5.2 Dreamed against real
def windows(rows: list[dict], feats: list[Tensor], length: int) -> tuple[Tensor, Tensor, Tensor]:
    """Every fourth (h, z) of an episode of `play`, and `length` actions and rewards after each."""
    # Beyond the end the last action repeats. The reward is 0 if terminated, else unknown (nan).
    after = rows[-1] | {"reward": np.float32(0 if rows[-1]["terminated"] else np.nan)}
    columns = stack_rows(rows[1:] + (length - 1) * [after])  # row i: the action taken in feats[i]
    action = columns["prev_action"].unfold(0, length, 4).permute(2, 0, 1)  # [length, N, A]
    reward = columns["reward"].unfold(0, length, 4).T  # [length, N]
    return torch.cat(feats[::4]), action, reward


def dream_metrics(agent: Agent, held_out: list[tuple[list, list]], H: int = 15) -> dict:
    """Eq. 5.1 to 5.3, in dreams of H steps from every fourth row of held-out episodes."""
    model = agent.world_model
    starts, actions, rewards = zip(*[windows(*episode, H) for episode in held_out], strict=True)
    start, action, real = torch.cat(starts), torch.cat(actions, 1), torch.cat(rewards, 1)

    # The dream with the actions that were really taken
    feats = [start]  # each [N, F]
    for t in range(H):
        feats.append(model.rssm.img_step(feats[t], action[t].to(start.device)))
    reward, cont = model.predict(torch.stack(feats[1:]))  # each [H, N], for k = 1 ... H
    reward[1:] *= cont[:-1].cumprod(0)  # c'_1 ... c'_{k-1} r'_k
    metrics = {"reward_rho": reward_rho(reward, real)}

    # Dreams in which the actor acts
    feat, _ = imagine(model, agent.actor, start, H)  # [H+1, N, F]
    prior = model.rssm.prior(feat[1:, :, : model.rssm.hidden])  # [H, N, S, K]
    metrics["latent_entropy"] = model.rssm.entropy(prior).mean()
    metrics["policy_entropy"] = agent.actor(feat[:-1]).entropy().mean()
    return metrics


def reward_rho(dreamed: Tensor, real: Tensor) -> float:
    """Dreamed and real rewards (unknown: nan) -> Eq. 5.1; nan if one never varies."""
    x, y = dreamed.cpu()[real.isfinite()], real[real.isfinite()]
    varies = len(x) > 1 and x.min() < x.max() and y.min() < y.max()
    return np.corrcoef(x, y)[0, 1] if varies else np.nan


# %% 6 Save Checkpoint
@explain("the checkpoint cannot be written")  # around the whole function
def save_checkpoint(agent: Agent, replay: ReplayBuffer, log: Log, *progress: int) -> None:
    """Save a run, but not a GPU's random state. If killed, the old file or the new one remains."""
    state = {"config": asdict(agent.config), "agent": agent.state_dict(), "progress": progress}
    state["optimizers"] = {part: x.state_dict() for part, x in agent.optimizers.items()}
    state |= {"rows": stack_rows(replay.rows), "lines": log.lines, "random": torch.get_rng_state()}
    (log.folder / "config.json").write_text(json.dumps(state["config"], indent=2))
    torch.save(state, log.folder / "new.pt")
    (log.folder / "new.pt").replace(log.folder / "checkpoint.pt")


def read_checkpoint(path: str | Path, mmap: bool = False) -> dict:
    """The checkpoint in a folder or file; ValueError if damaged. mmap: rows stay out of memory."""
    with explain(f"{path} holds no checkpoint that can be used"):
        path = Path(path, "checkpoint.pt") if Path(path).is_dir() else path
        if zipfile.ZipFile(path).testzip():
            raise ValueError("a checksum is wrong")
        return torch.load(path, map_location="cpu", weights_only=True, mmap=mmap)


def load_checkpoint(agent: Agent, replay: ReplayBuffer, log: Log) -> tuple[int, int]:
    """Go on from the checkpoint in the log's folder: step, episode."""
    state = read_checkpoint(log.folder)
    with explain(f"the agent of {log.folder} does not fit"):
        Config(**state["config"])  # refuses options that this version does not have
        agent.load_state_dict(state["agent"])
        for part, optimizer in agent.optimizers.items():
            optimizer.load_state_dict(state["optimizers"][part])
    for i in range(len(state["rows"]["obs"])):
        replay.rows.append({name: x[i].numpy().copy() for name, x in state["rows"].items()})
    log.lines = state["lines"]  # `write` then drops later lines from the file
    torch.set_rng_state(state["random"])
    return state["progress"]


def load_agent(path: str | Path, device: str = "cpu", encoder=None, rssm=None) -> Agent:
    """The agent in a run's folder or checkpoint. If encoder or RSSM were given, give them again."""
    state = read_checkpoint(path, mmap=True)
    with explain(f"the agent of {path} does not fit"), PixelEnv(state["config"]["env"]) as env:
        config = Config(**state["config"] | {"device": device})
        agent = Agent(env.action_space, config, encoder, rssm)
        agent.load_state_dict(state["agent"])
        return agent


# %% The command line, or the last cell of a notebook
def main(argv: list[str] | None = None) -> Path | None:
    """The command line. Its usual errors end it with one line, and exit code 1."""
    try:
        config = tyro.cli(Config, args=argv)
        if not config.eval:
            return train(config)
        agent = load_agent(config.eval, config.device)
        print(json.dumps(evaluate(agent, config.episodes, config.seed), indent=2))
    except (ValueError, OSError, MemoryError, KeyboardInterrupt) as error:
        sys.exit("dreamer.py: error: " + " ".join((str(error) or repr(error)).split())[:500])


if __name__ == "__main__":
    # As a script (also with %run) argv[0] is this file. As cells of a notebook it is the kernel.
    if Path(sys.argv[0]).name == Path(globals().get("__file__", "no file")).name:
        main()
    elif "ipykernel" in sys.modules:
        from recipes.notebook import show

        show(main(ARGUMENTS.split()))
