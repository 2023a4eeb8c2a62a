"""The dashboard of the course's project P05: how far can the agent's dreams be trusted?

    python -m recipes.dashboard runs/CartPole-v1-0

In unseen episodes of random actions the agent sees one frame, and then dreams 20 steps with the
actions that were taken. Latent drift is the distance between class probabilities of z, prior and
posterior. Expect more than 30 dB, and at step 20 a rho of 0.8 (nan while all rewards are equal).
"""

import argparse
import sys

import torch
from matplotlib.figure import Figure

from recipes.lesson_parts import load_agent
from recipes.open_loop import STEPS, measure


def curves(axes, title: str, unit: str, lines: dict) -> None:
    """Draw lines over the steps 1 to 20, with their names in a legend."""
    for (name, line), style in zip(lines.items(), (".-", ".--"), strict=True):
        axes.plot(range(1, STEPS + 1), line, style, label=name)
    axes.set(title=title, xlabel="step after the first frame", ylabel=unit)
    axes.legend()


def draw(m: dict) -> Figure:
    figure = Figure(figsize=(16, 8), layout="constrained")
    axes = figure.subplot_mosaic("ABCD;EFGG")
    curves(axes["A"], "Frames, compared with the real ones", "PSNR in dB", m["PSNR in dB"])
    curves(axes["B"], "Latent drift: dreamed z and z of a frame", "distance", m["latent drift"])
    curves(axes["C"], "Correlation of rewards up to a step", "reward rho", m["reward rho"])
    curves(axes["F"], "Entropies along the agent's own dream", "nats", m["entropy in nats"])

    real, dreamed = m["rewards"]
    x = real.sum(1)
    axes["D"].scatter(x, dreamed.sum(1), alpha=0.5, label="one episode")
    axes["D"].axline((x.mean(), x.mean()), slope=1, color="gray", ls="--", label="equal")
    axes["D"].set(title="Returns of 20 steps", xlabel="real return", ylabel="imagined return")
    axes["D"].legend()
    n = real.std(1).argmax()
    one = {"real": real[n], "imagined": dreamed[n]}
    curves(axes["E"], f"Rewards of one episode (seed {2 * n + 1})", "reward", one)

    n = m["same"].sum(1).argmax()
    shown = [k for k in (1, 5, 10, STEPS) if m["same"][n, k - 1]]
    films = torch.stack(m["films"])[:, n, shown]  # [2, 4, 64, 64, 3]
    films[:, :, 0] = films[:, :, :, 0] = 0.5  # lines between the frames
    axes["G"].imshow(torch.vstack([torch.hstack([*film]) for film in films]).numpy())
    axes["G"].set_title(f"Frames of one episode (seed {2 * n + 1})")
    axes["G"].set_xticks([64 * i + 32 for i in range(len(shown))], [f"step {k}" for k in shown])
    axes["G"].set_yticks([32, 96], ["real", "dreamed"])
    return figure


def main(argv: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser("python -m recipes.dashboard")
    parser.add_argument("run", help="folder of a run")
    parser.add_argument("--episodes", type=int, default=20, help="unseen episodes")
    parser.add_argument("--out", default="dashboard.png", help="picture to write")
    args = parser.parse_args(argv)

    try:
        torch.manual_seed(0)
        m = measure(load_agent(args.run), max(args.episodes, 1))
        draw(m).savefig(args.out)
    except (ValueError, OSError) as error:
        sys.exit(f"recipes.dashboard: error: {error}")

    columns = (*range(1, 11), STEPS)
    print(f"{'step':29}", *(f"{k:6}" for k in columns))
    for group in ("PSNR in dB", "latent drift", "reward rho", "entropy in nats"):
        for name, line in m[group].items():
            print(f"{group + ', ' + name:29}", *(f"{line[k - 1]:6.2f}" for k in columns))
    print(f"Frechet distance by the agent's encoder, not by Inception-v3: {m['frechet']:.3f}")


if __name__ == "__main__":
    main()
