"""What the first Dreamer chose (arXiv:1912.01603): both ideas, and its settings.

    python -m recipes.dreamer_v1                  both ideas
    python -m recipes.dreamer_v1 --only gaussian  the settings with one idea of the two
    python -m recipes.dreamer_v1 --only dynamics

The program takes the options of dreamer.py, too. The two ideas are `recipes.gaussian_latents`
and `recipes.dynamics_gradient`, which try each with the settings of dreamer.py. Sizes, rates and
the schedule stay those of dreamer.py here, too, so the result tells nothing about the first
Dreamer itself. Expect returns of 80 to 250 on CartPole after 5,000 steps.
"""

import argparse
import json
import sys

import tyro

import dreamer
from dreamer import Agent, Config, PixelEnv
from recipes.dynamics_gradient import update_behavior
from recipes.gaussian_latents import gaussian_agent

V1 = dict(
    groups=30,
    hidden=200,
    horizon=15,
    entropy=0.0,
    free_nats=3.0,
    scale_rep=1.0,
    critic_rate=1.0,
    return_rate=0.0,
)


def main(argv: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(add_help=False, allow_abbrev=False)
    parser.add_argument("--only", choices=["gaussian", "dynamics"])
    args, others = parser.parse_known_args(argv)

    try:
        runs = f"runs-v1-{args.only}" if args.only else "runs-v1"
        default = Config(runs=runs, **V1)
        config = tyro.cli(Config, description=__doc__, args=others, default=default)
        if args.only == "dynamics":
            dreamer.torch.manual_seed(config.seed)
            agent = Agent(PixelEnv(config.env).action_space, config)
        else:
            agent = gaussian_agent(config)
        if args.only != "gaussian":
            dreamer.update_behavior = update_behavior  # `train` looks it up by this name

        dreamer.train(config, agent)
        print(json.dumps(dreamer.evaluate(agent, config.episodes, config.seed), indent=2))
    except (ValueError, OSError) as error:
        sys.exit(f"recipes.dreamer_v1: error: {error}")


if __name__ == "__main__":
    main()
