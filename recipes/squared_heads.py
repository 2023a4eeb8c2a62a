"""Rewards and values by squared error, as in the first two Dreamers.

    python -m recipes.squared_heads

By default reward head and critic predict a distribution over 255 bins. Here each predicts one
number and is trained by its squared error. The program takes the options of dreamer.py. On
CartPole, where all rewards are 1, expect hardly a difference. With rewards of very different
sizes the squared error of the large ones outweighs all else.
"""

import json
import sys

import tyro
from torch import Tensor

import dreamer
from dreamer import Config


class SquaredHead(dreamer.TwoHotHead):
    """(h, z) -> one number [...], which is 0 at first."""

    def __init__(self, feat_size: int, units: int, layers: int):
        super().__init__(feat_size, units, layers)
        self.net = dreamer.mlp(feat_size, units, layers, 1, outscale=0.0)

    def forward(self, feat: Tensor) -> Tensor:
        return self.net(feat).squeeze(-1)

    def loss(self, feat: Tensor, *targets: Tensor) -> Tensor:
        """Half of the squared distance [...] from each of the targets [...], summed."""
        prediction = self(feat)
        return sum((prediction - target).square() / 2 for target in targets)


def main(argv: list[str] | None = None) -> None:
    try:
        config = tyro.cli(Config, args=argv, default=Config(runs="runs-squared"))
        dreamer.TwoHotHead = SquaredHead  # for the reward
        dreamer.Critic = SquaredHead
        # `dreamer.py --eval` has the usual heads, so the agent is measured in this program.
        agent = dreamer.load_agent(dreamer.train(config))
        print(json.dumps(dreamer.evaluate(agent, config.episodes, config.seed), indent=2))
    except (ValueError, OSError) as error:
        sys.exit(f"recipes.squared_heads: error: {error}")


if __name__ == "__main__":
    main()
