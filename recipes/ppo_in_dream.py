"""Train another agent in the dream, and see how it does in the real environment.

    pip install stable-baselines3
    python -m recipes.ppo_in_dream runs/CartPole-v1-0

PPO, an algorithm without a model, learns from four stacked frames of the dream. Its dreams are cut
after 50 steps. Then it plays the real environment, of which it has never seen more than the
first frames. Expect far more than the 22 of random actions, but less than in the dream.
"""

import argparse
import sys
from functools import partial

import gymnasium as gym

from dreamer import Agent, PixelEnv, load_agent
from recipes.dream_env import DreamEnv


def dream(agent: Agent, length: int) -> gym.Env:
    """Dreams of at most `length` steps."""
    return gym.wrappers.TimeLimit(DreamEnv(agent), length)


def main(argv: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser("python -m recipes.ppo_in_dream")
    parser.add_argument("run", help="folder of a run")
    parser.add_argument("--steps", type=int, default=20_000, help="dreamed steps of training")
    parser.add_argument("--length", type=int, default=50, help="steps of a dream, at most")
    parser.add_argument("--episodes", type=int, default=5, help="episodes of the evaluations")
    args = parser.parse_args(argv)

    try:
        from stable_baselines3 import PPO
        from stable_baselines3.common.env_util import make_vec_env
        from stable_baselines3.common.evaluation import evaluate_policy
        from stable_baselines3.common.vec_env import VecFrameStack

        agent = load_agent(args.run)
    except ImportError:
        sys.exit("recipes.ppo_in_dream: error: pip install stable-baselines3")
    except ValueError as error:
        sys.exit(f"recipes.ppo_in_dream: error: {error}")

    dreams = VecFrameStack(make_vec_env(partial(dream, agent, args.length), 4, seed=0), 4)
    ppo = PPO("CnnPolicy", dreams, n_steps=64, seed=0).learn(args.steps)

    real = partial(PixelEnv, agent.config.env, agent.config.action_repeat)
    real = VecFrameStack(make_vec_env(real, 1, seed=1), 4)
    for name, env in {"dream": dreams, "real environment": real}.items():
        mean, std = evaluate_policy(ppo, env, n_eval_episodes=args.episodes)
        print(f"{name}: return {mean:.1f}, standard deviation {std:.1f}")


if __name__ == "__main__":
    main()
