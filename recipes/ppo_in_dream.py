"""Train another agent in the dream, and see how it does in the real environment.

    pip install stable-baselines3
    python -m recipes.ppo_in_dream runs/CartPole-v1-0

PPO, an algorithm without a model, learns from the states (h, z) of dreams of at most 50 steps.
It plays the real environment before and after, where the world model infers the states from
the frames. Expect a return of about 10 before, and of 50 to 150 after.
"""

import argparse
import sys

import gymnasium as gym
import numpy as np

from dreamer import Agent, PixelEnv, load_agent
from recipes.dream_env import DreamEnv


class StateDream(DreamEnv):
    """A dream that shows its states in place of its frames."""

    def __init__(self, agent: Agent):
        super().__init__(agent)
        size = (agent.world_model.rssm.feat_size,)
        self.observation_space = gym.spaces.Box(-np.inf, np.inf, size)

    def render(self):
        return self.feat[0].numpy()


class StateEnv(gym.Wrapper):
    """The real environment. Its observations are the states that the agent infers."""

    def __init__(self, agent: Agent):
        super().__init__(PixelEnv(agent.config.env, agent.config.action_repeat))
        self.agent, self.observation_space = agent, StateDream(agent).observation_space

    def reset(self, *, seed: int | None = None, options: dict | None = None):
        obs, info = self.env.reset(seed=seed, options=options)
        _, (self.feat, _) = self.agent.act(obs)
        return self.feat[0].numpy(), info

    def step(self, action):
        obs, *rest = self.env.step(action)
        taken = self.feat.new_tensor(self.env.row["prev_action"])[None]  # [1, A]
        _, (self.feat, _) = self.agent.act(obs, (self.feat, taken))
        return self.feat[0].numpy(), *rest


def main(argv: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser("python -m recipes.ppo_in_dream")
    parser.add_argument("run", help="folder of a run")
    parser.add_argument("--steps", type=int, default=20_000, help="dreamed steps of training")
    parser.add_argument("--episodes", type=int, default=5, help="episodes of an evaluation")
    args = parser.parse_args(argv)

    try:
        from stable_baselines3 import PPO
        from stable_baselines3.common.env_util import make_vec_env
        from stable_baselines3.common.evaluation import evaluate_policy

        agent = {"agent": load_agent(args.run)}
    except ImportError:
        sys.exit("recipes.ppo_in_dream: error: pip install stable-baselines3")
    except ValueError as error:
        sys.exit(f"recipes.ppo_in_dream: error: {error}")

    limit = dict(wrapper_class=gym.wrappers.TimeLimit, wrapper_kwargs={"max_episode_steps": 50})
    dreams = make_vec_env(StateDream, 4, seed=0, env_kwargs=agent, **limit)
    ppo = PPO("MlpPolicy", dreams, n_steps=256, batch_size=256, seed=0)
    real = make_vec_env(StateEnv, 1, seed=1, env_kwargs=agent)
    before, _ = evaluate_policy(ppo, real, args.episodes)
    after, _ = evaluate_policy(ppo.learn(args.steps), real, args.episodes)
    print(f"real return {before:.1f} before training in the dream, {after:.1f} after it")


if __name__ == "__main__":
    main()
