"""Play inside the dream: the learned world as a Gymnasium environment.

    python -m recipes.dream_env runs/CartPole-v1-0

Use the arrow keys, and Escape to stop. Without a key CartPole is pushed to the left. Only the
first frame is real. Expect a world that looks and reacts like the real one for some seconds.
"""

import argparse
import os
import sys

import gymnasium as gym
import pygame
import torch
from gymnasium.spaces import flatten
from gymnasium.utils.play import play

from dreamer import Agent, PixelEnv, load_agent

ARROWS = (pygame.K_LEFT,), (pygame.K_RIGHT,), (pygame.K_UP,)
# The action without a key, then those of the arrows, for CartPole, Acrobot and LunarLander.
ACTIONS = {"Discrete(2)": (0, 0, 1), "Discrete(3)": (1, 0, 2), "Discrete(4)": (0, 1, 3, 2)}


class DreamEnv(gym.Wrapper):
    """After a real first frame all is dreamed. Seed and actions determine the dream."""

    spec = None  # what makes the real environment does not make the dream

    def __init__(self, agent: Agent):
        super().__init__(PixelEnv(agent.config.env, agent.config.action_repeat))
        self.agent, self.model = agent, agent.world_model

    def reset(self, *, seed: int | None = None, options: dict | None = None):
        first, info = self.env.reset(seed=seed, options=options)
        # In this block torch draws from the environment's seed. Its own state is kept.
        with torch.random.fork_rng(range(torch.cuda.device_count())):
            torch.manual_seed(int(self.np_random.integers(2**31)))
            _, (self.feat, _) = self.agent.act(first)
        return self.render(), info

    @torch.no_grad()
    def step(self, action):
        action = torch.as_tensor(flatten(self.action_space, action)).to(self.feat)[None]
        with torch.random.fork_rng(range(torch.cuda.device_count())):
            torch.manual_seed(int(self.np_random.integers(2**31)))
            self.feat = self.model.rssm.img_step(self.feat, action)
            reward, cont = self.model.predict(self.feat)  # each [1]
            terminated = torch.rand(()).item() > cont.item()
        return self.render(), reward.item(), terminated, False, {}

    @torch.no_grad()
    def render(self):
        return (255 * self.model.decoder(self.feat)[0]).byte().cpu().numpy()


def main(argv: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser("python -m recipes.dream_env")
    parser.add_argument("run", help="folder of a run")
    run = parser.parse_args(argv).run
    if os.environ.get("SDL_VIDEODRIVER") == "dummy":
        del os.environ["SDL_VIDEODRIVER"]  # dreamer opens no window, but this program does

    try:
        pygame.display.init()
        if pygame.display.get_driver() in ("offscreen", "dummy"):
            raise ValueError("this program opens a window, and there is no display")
        env = DreamEnv(load_agent(run))
        noop, *actions = ACTIONS[str(env.action_space)]  # for others there are no keys
        keys = dict(zip(ARROWS, actions, strict=False))
        play(env, keys_to_action=keys, noop=noop, zoom=8, fps=10)
    except (ValueError, KeyError, pygame.error) as error:
        sys.exit(f"recipes.dream_env: error: {error}")


if __name__ == "__main__":
    main()
