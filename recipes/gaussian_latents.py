"""Gaussian states, as in PlaNet and the first Dreamer, in place of categorical ones.

    python -m recipes.gaussian_latents

Here z has one number for each of its `groups` variables, drawn from a normal distribution. The
program trains with 32 of them and takes the options of dreamer.py. It shows how an RSSM of your
own goes into the agent: override what differs. Expect returns of 120 to 220 on CartPole.
"""

import json
import sys
from dataclasses import replace

import torch
import tyro
from torch import Tensor
from torch import distributions as td

import dreamer
from dreamer import Config


def normal(params: Tensor) -> td.Normal:
    """Means and deviations [..., S, 2] -> S normal variables."""
    mean, std = params.unbind(-1)
    return td.Normal(mean, std)


class GaussianRSSM(dreamer.RSSM):
    """An RSSM whose z is S normal variables: [., S], with parameters [., S, 2]."""

    def __init__(self, embed_size: int, action_size: int, config: Config):
        super().__init__(embed_size, action_size, replace(config, classes=1))  # so |z| = S
        self.shape = config.groups, 2
        D, outputs = self.hidden, 2 * config.groups
        self.prior_net = dreamer.mlp(D, config.units, 1, outputs)
        self.post_net = dreamer.mlp(D + embed_size, config.units, 1, outputs)

    def kl(self, p: Tensor, q: Tensor) -> Tensor:
        """KL(p || q) in nats: [..., S, 2] -> [...]."""
        return td.kl_divergence(normal(p), normal(q)).sum(-1)

    def params(self, outputs: Tensor) -> Tensor:
        """Outputs of a network [., 2 S] -> mean and deviation [., S, 2]."""
        mean, std = outputs.unflatten(-1, self.shape).unbind(-1)
        # Without a smallest deviation the KL could grow without bound.
        std = torch.nn.functional.softplus(std) + 0.1
        return torch.stack([mean, std], -1)

    def sample(self, params: Tensor) -> Tensor:
        """z [., S], as mean + deviation * noise, which passes gradients to both."""
        return normal(params).rsample()

    def entropy(self, params: Tensor) -> Tensor:
        """Differential entropy [.] in nats. It may be negative."""
        return normal(params).entropy().sum(-1)


def gaussian_agent(config: Config) -> dreamer.Agent:
    torch.manual_seed(config.seed)
    with dreamer.PixelEnv(config.env, config.action_repeat) as env:
        space = env.action_space
    encoder = dreamer.Encoder(config.depth)
    rssm = GaussianRSSM(encoder.embed_size, dreamer.flatdim(space), config)
    return dreamer.Agent(space, config, encoder, rssm)


def main(argv: list[str] | None = None) -> None:
    try:
        config = tyro.cli(Config, args=argv, default=Config(runs="runs-gaussian", groups=32))
        agent = gaussian_agent(config)
        dreamer.train(config, agent)
        # `--eval` would build the usual RSSM.
        print(json.dumps(dreamer.evaluate(agent, config.episodes, config.seed), indent=2))
    except (ValueError, OSError) as error:
        sys.exit(f"recipes.gaussian_latents: error: {error}")


if __name__ == "__main__":
    main()
