"""Compare real and dreamed states: a Fréchet distance, and a map of both.

    python -m recipes.latents runs/CartPole-v1-0

In unseen episodes the world model dreams 15 steps with the actions that were taken. The states
that it reaches are compared with those inferred from the real frames. The distance is that of
the FID, but of the agent's own states: 0 for equal means and covariances, and more by chance.
The map in latents.png shows two principal components. Color is the critic's value.
"""

import argparse
import sys

import torch
from matplotlib.figure import Figure

from dreamer import Agent, PixelEnv, load_agent, play, stack_rows


@torch.no_grad()
def states(agent: Agent, episodes: int, steps: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Real and dreamed states [L, F], each a number of steps after the dream began."""
    model, real, dreamed = agent.world_model, [], []
    with PixelEnv(agent.config.env, agent.config.action_repeat) as env:
        for number in range(episodes):
            rows, feat = play(agent, env, seed=2 * number + 1, chance=0.02)
            if len(feat) <= steps:
                continue

            action, feat = stack_rows(rows)["prev_action"], torch.cat(feat)  # [L+1, A], [L, F]
            starts = torch.arange(0, len(feat) - steps, 5)
            dream = feat[starts]
            for k in range(1, steps + 1):
                dream = model.rssm.img_step(dream, action[starts + k])
            real.append(feat[starts + steps])
            dreamed.append(dream)
    if sum(map(len, real)) < 4:
        raise ValueError("the episodes are too short for --steps")
    return torch.cat(real), torch.cat(dreamed)


def frechet(x: torch.Tensor, y: torch.Tensor) -> float:
    """|m - n|^2 + trace(C + D - 2 (C D)^(1/2)) of the means m, n and the covariances C, D."""
    C, D = torch.cov(x.double().T), torch.cov(y.double().T)
    root = torch.linalg.eigvals(C @ D).real.clamp(min=0).sqrt().sum()
    return ((x.mean(0) - y.mean(0)).square().sum() + C.trace() + D.trace() - 2 * root).item()


def main(argv: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser("python -m recipes.latents")
    parser.add_argument("run", help="folder of a run")
    parser.add_argument("--episodes", type=int, default=20, help="episodes to play")
    parser.add_argument("--steps", type=int, default=15, help="steps of a dream")
    args = parser.parse_args(argv)

    try:
        torch.manual_seed(0)
        agent = load_agent(args.run)
        real, dreamed = states(agent, args.episodes, args.steps)
    except ValueError as error:
        sys.exit(f"recipes.latents: error: {error}")

    first, second = torch.randperm(len(real)).chunk(2)
    print(f"Fréchet distance of {len(first)} real states from as many others:")
    print(f"dreamed {frechet(real[first], dreamed[second]):.2f}")
    print(f"real {frechet(real[first], real[second]):.2f}, by chance")
    axes = torch.linalg.svd(real - real.mean(0)).Vh[:2].T  # [F, 2]
    figure = Figure(figsize=(10, 4.5), layout="constrained")
    panels = figure.subplots(1, 2, sharex=True, sharey=True)
    for panel, name, x in zip(panels, ("real", "dreamed"), (real, dreamed), strict=True):
        across, up = ((x - real.mean(0)) @ axes).T
        panel.scatter(across, up, 8, agent.critic(x).detach())
        panel.set(title=f"{name} states, colored by value")
    figure.savefig("latents.png")


if __name__ == "__main__":
    main()
