"""For comparison: PPO, an algorithm without a model, on the same pixels.

    pip install stable-baselines3
    python -m recipes.ppo runs/CartPole-v1-0

Stable-Baselines3's PPO is not tuned. It has a CNN, four stacked frames and eight environments.
The returns of a Dreamer run and of PPO with three seeds are drawn into ppo.png, over environment
steps. Expect PPO to have 250 to 440 after forty times as many steps, and 43 to 90 minutes a seed.
"""

import argparse
import json
import sys
from functools import partial
from pathlib import Path

import numpy as np
from matplotlib.figure import Figure

from dreamer import Config, PixelEnv


def main(argv: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser("python -m recipes.ppo")
    parser.add_argument("run", help="folder of the Dreamer run to compare with")
    parser.add_argument("--seeds", type=int, default=3, help="how many runs of PPO")
    parser.add_argument("--steps", type=int, default=200_000, help="environment steps of each")
    parser.add_argument("--every", type=int, default=20_000, help="steps between evaluations")
    parser.add_argument("--episodes", type=int, default=20, help="episodes of an evaluation")
    parser.add_argument("--out", default="ppo.png", help="picture to write")
    args = parser.parse_args(argv)

    try:
        from stable_baselines3 import PPO
        from stable_baselines3.common.callbacks import EvalCallback
        from stable_baselines3.common.env_util import make_vec_env
        from stable_baselines3.common.vec_env import VecFrameStack

        config = Config(**json.loads(Path(args.run, "config.json").read_text()))
        text = Path(args.run, "metrics.jsonl").read_text()
    except ImportError:
        sys.exit("recipes.ppo: error: pip install stable-baselines3")
    except (OSError, ValueError, TypeError) as error:
        sys.exit(f"recipes.ppo: error: {args.run} is not a run: {error}")

    figure = Figure(figsize=(8, 4), layout="constrained")
    axes = figure.subplots()
    lines = [line for line in map(json.loads, text.splitlines()) if "eval/return" in line]
    steps = [line["env/step"] for line in lines]
    axes.plot(steps, [line["eval/return"] for line in lines], "k.-", label="Dreamer")

    pixels = partial(PixelEnv, config.env, config.action_repeat)
    for seed in range(args.seeds):
        envs = VecFrameStack(make_vec_env(pixels, 8, seed=1_000 * seed), 4)
        unseen = VecFrameStack(make_vec_env(pixels, 1, seed=99), 4)
        every = max(args.every // 8, 1)  # each of the eight environments makes a step at a time
        curve = EvalCallback(
            unseen,
            n_eval_episodes=args.episodes,
            eval_freq=every,
            log_path=f"{args.run}/ppo-{seed}",
            verbose=0,
        )
        ppo = PPO("CnnPolicy", envs, n_steps=min(256, every), batch_size=256, seed=seed)
        ppo.learn(args.steps, callback=curve)

        results = np.asarray(curve.evaluations_results).mean(1)
        print(f"PPO, seed {seed}: returns {results.round(1).tolist()}")
        axes.plot(curve.evaluations_timesteps, results, ".-", label=f"PPO, seed {seed}")

    axes.set(xscale="log", xlabel="environment steps", ylabel="return of unseen episodes")
    axes.legend()
    figure.savefig(args.out)


if __name__ == "__main__":
    main()
