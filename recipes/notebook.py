"""What the last cell of the notebook shows: curves, metrics, and dreamed beside real frames.

    from recipes.notebook import show
    show("runs/CartPole-v1-0")

dreamer.py calls it when all of its cells were run in a notebook. In the strip of frames, the upper
row is what happened in an unseen episode, and the lower row what the agent dreamed. It saw the
frames of the steps 0 to 4. After that it was told only the actions. Expect the same pole in both
rows for some 20 steps.
"""

import json
from pathlib import Path

import numpy as np
from IPython.display import Image, display
from matplotlib.figure import Figure

from recipes.film import SEEN, film


def strip(run: str | Path) -> Figure:
    """Six real frames of an episode above the dreamed ones."""
    frames = film(run, seed=1, frames=30, chance=0.02)
    figure = Figure(figsize=(12, 4.3), layout="constrained")
    steps = np.linspace(0, len(frames) - 1, 6).astype(int)
    for axes, step in zip(figure.subplots(2, 6).T, steps, strict=True):
        panels = np.hsplit(np.asarray(frames[step]), 3)  # real, dreamed, difference
        for axis, panel in zip(axes, panels, strict=False):
            axis.imshow(panel)
            axis.set(xticks=[], yticks=[])
        axes[0].set_title(f"step {step}, {'seen' if step < SEEN else 'dreamed'}")
    figure.axes[0].set_ylabel("real")
    figure.axes[6].set_ylabel("dreamed")
    return figure


def show(run: str | Path | None) -> None:
    """Show the run's curves, its last evaluation, and a strip of frames (dreams.png)."""
    if run is None:  # `--eval` has printed what it measured
        return
    run = Path(run)
    display(Image(filename=run / "curves.png"))
    lines = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    evaluation = [line for line in lines if "eval/return" in line][-1]
    for name, value in evaluation.items():
        print(f"{name:22} {value:8.2f}")
    strip(run).savefig(run / "dreams.png")
    display(Image(filename=run / "dreams.png"))
