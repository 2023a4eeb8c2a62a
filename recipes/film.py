"""Draw a dream as a film: what happened, what the agent dreamed, and the difference.

    python -m recipes.film runs/CartPole-v1-0

The agent sees the first five frames of an episode that it never trained on. After that it is
told only the actions, and the world model dreams the frames. The film is written to dream.gif:
the truth is on the left, the dream in the middle, and the difference on the right, where gray
means that both agree. Expect sharp frames that follow the truth for a second or two. Then the
two drift apart, because small errors grow.
"""

import argparse
import sys

import torch
from PIL import Image

from dreamer import PixelEnv, play, stack_rows
from recipes.lesson_parts import load_agent

SEEN = 5  # frames that the agent sees before it dreams


@torch.no_grad()
def film(run: str, seed: int, frames: int, chance: float) -> list[Image.Image]:
    """One image for each step of an episode."""
    torch.manual_seed(seed)
    agent = load_agent(run)
    with PixelEnv(agent.config.env, agent.config.action_repeat) as env:
        rows, states = play(agent, env, seed, chance)
    rows, feats = stack_rows(rows[:frames]), states[:SEEN]  # [L, ...], each [1, F]
    if len(rows["obs"]) <= SEEN:
        raise ValueError(f"the episode with seed {seed} has no more than {SEEN} frames")

    model, truth = agent.world_model, rows["obs"] / 255
    for action in rows["prev_action"][SEEN:]:
        feats.append(model.rssm.img_step(feats[-1], action[None]))
    dream = model.decoder(torch.cat(feats))  # [L, 64, 64, 3]
    difference = (1 + dream - truth) / 2
    panels = torch.cat([truth, dream, difference], 2)  # [L, 64, 192, 3]
    return [Image.fromarray(x).resize((576, 192)) for x in (255 * panels).byte().numpy()]


def main(argv: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser("python -m recipes.film", description=__doc__.split("\n")[0])
    parser.add_argument("run", help="folder of a run")
    parser.add_argument("--seed", type=int, default=1, help="of the episode; odd ones are unseen")
    parser.add_argument("--frames", type=int, default=60, help="frames of the film")
    parser.add_argument("--chance", type=float, default=0.02, help="of a burst of random actions")
    parser.add_argument("--out", default="dream.gif", help="file to write")
    args = parser.parse_args(argv)

    try:
        first, *others = film(args.run, args.seed, args.frames, args.chance)
        first.save(args.out, save_all=True, append_images=others, duration=80, loop=0)
    except (ValueError, OSError) as error:
        sys.exit(f"recipes.film: error: {error}")
    print(f"{args.out}: {1 + len(others)} frames, of which the agent saw {SEEN}")


if __name__ == "__main__":
    main()
