"""What does the state know? Read the simulator's own numbers out of (h, z) by a linear map.

    python -m recipes.probe runs/CartPole-v1-0

The agent sees pixels only. The program fits a linear map from (h, z) to the observation that
the environment itself gives, and prints R^2 on other episodes: 1 if a number can be read
exactly, 0 if the mean does as well. It shows whether the state holds what the reward depends
on. A low R^2 proves only that no linear map finds it. On CartPole expect 0.95 and more.
"""

import argparse
import sys

import gymnasium as gym
import numpy as np
import torch

from dreamer import Agent, PixelEnv, load_agent, play


class Watch(gym.ObservationWrapper):
    """Keeps the last observation of the environment, as a vector."""

    def observation(self, obs):
        self.last = gym.spaces.flatten(self.env.observation_space, obs)
        return obs


class Spy(PixelEnv):
    """A PixelEnv whose rows also hold the true state, which the agent does not see."""

    def __init__(self, env_id: str, action_repeat: int):
        super().__init__(env_id, action_repeat)
        self.env = Watch(self.env)

    def remember(self, *args, **flags):
        super().remember(*args, **flags)
        self.row["truth"] = self.env.last


@torch.no_grad()
def collect(agent: Agent, env: Spy, seeds: range) -> tuple[np.ndarray, np.ndarray]:
    """States with a constant 1 [L, F+1], and true numbers [L, .], of some episodes."""
    feats, truth = [], []
    for seed in seeds:
        rows, states = play(agent, env, seed, chance=0.1)
        feats += states
        truth += [row["truth"] for row in rows[:-1]]  # the last row has no state
    feat = np.pad(torch.cat(feats).double().numpy(), [(0, 0), (0, 1)], constant_values=1)
    return feat, np.stack(truth).astype(float)


def main(argv: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser("python -m recipes.probe")
    parser.add_argument("run", help="folder of a run")
    parser.add_argument("--episodes", type=int, default=100, help="to fit on; as many to test on")
    args = parser.parse_args(argv)

    try:
        torch.manual_seed(0)
        agent = load_agent(args.run)
        with Spy(agent.config.env, agent.config.action_repeat) as env:
            seeds = range(1, 4 * args.episodes, 2)
            feat, truth = collect(agent, env, seeds[::2])
            new_feat, new_truth = collect(agent, env, seeds[1::2])
    except ValueError as error:
        sys.exit(f"recipes.probe: error: {error}")

    # A small penalty keeps the fit defined: the one-hot groups of z each sum to 1.
    matrix = np.linalg.solve(feat.T @ feat + 1e-2 * np.eye(feat.shape[1]), feat.T @ truth)
    error = np.square(new_truth - new_feat @ matrix).mean(0)
    r2 = 1 - error / new_truth.var(0).clip(min=1e-12)
    print(f"R^2 of each number of the observation, over {len(new_truth)} rows:", r2.round(3))


if __name__ == "__main__":
    main()
