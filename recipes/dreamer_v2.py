"""What DreamerV2 chose (arXiv:2010.02193), as far as it is a setting of dreamer.py.

    python -m recipes.dreamer_v2

The program takes the options of dreamer.py, which win over these settings. Sizes, rates and the
schedule stay those of dreamer.py, so the result tells nothing about DreamerV2 itself. Expect
returns of 100 to 200 on CartPole after 5,000 steps: the posterior is pulled to the prior with
twice the weight that it has by default.
"""

import json
import sys

import tyro

from dreamer import Config, evaluate, load_agent, train

V2 = dict(
    horizon=15,
    unimix=0.0,
    free_nats=0.0,
    scale_dyn=0.8,
    scale_rep=0.2,
    entropy=1e-3,
    critic_rate=0.01,
    return_rate=0.0,
)


def main(argv: list[str] | None = None) -> None:
    try:
        config = tyro.cli(Config, args=argv, default=Config(runs="runs-v2", **V2))
        agent = load_agent(train(config))
        print(json.dumps(evaluate(agent, config.episodes, config.seed), indent=2))
    except (ValueError, OSError) as error:
        sys.exit(f"recipes.dreamer_v2: error: {error}")


if __name__ == "__main__":
    main()
