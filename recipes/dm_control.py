"""Tasks of DeepMind Control, seen through camera 0, as in the papers.

    pip install "shimmy[dm-control]" "mujoco<4"
    python dreamer.py --env recipes.dm_control:cartpole-swingup-v0 --action-repeat 8 --steps 50000

This file is no program. It registers environments, and `--env` imports it. Camera 0 stands close:
from MuJoCo's default camera the pole of CartPole has ten pixels. MuJoCo draws with OpenGL. On a
machine without a screen this file chooses `MUJOCO_GL=egl` if there is a GPU, and else `osmesa`,
for which Debian's package libosmesa6 is needed. The tasks take seeds of at most 32 bits, so
`--seed` goes up to 2147. The command above has 783 with seed 0 (random actions: 143).
"""

import os
import sys
from functools import partial

import gymnasium
import torch

if sys.platform == "linux" and not {"DISPLAY", "MUJOCO_GL"} & os.environ.keys():
    os.environ["MUJOCO_GL"] = "egl" if torch.cuda.is_available() else "osmesa"
    print(f"recipes.dm_control: no screen, so MUJOCO_GL={os.environ['MUJOCO_GL']}", file=sys.stderr)

TASKS = (
    ("ball_in_cup", "catch"),
    ("cartpole", "balance"),
    ("cartpole", "swingup"),
    ("cheetah", "run"),
    ("finger", "spin"),
    ("pendulum", "swingup"),
    ("reacher", "easy"),
    ("walker", "walk"),
)


def make(domain: str, task: str, render_mode: str | None = None) -> gymnasium.Env:
    """A task whose frames are square, and twice as large as the agent's."""
    try:
        from dm_control import suite
        from shimmy.dm_control_compatibility import DmControlCompatibilityV0
    except ImportError as error:
        raise ImportError(f'pip install "shimmy[dm-control]" "mujoco<4" ({error})') from error

    env = suite.load(domain, task)
    # 64x64 pixels hardly show soft edges and sharp shadows. With them, drawing a frame without a
    # GPU takes five times as long.
    quality = env.physics.model.vis.quality
    quality.offsamples, quality.shadowsize = 0, 256
    picture = {"camera_id": 0, "height": 128, "width": 128}
    return DmControlCompatibilityV0(env, render_mode, picture)


for domain, task in TASKS:
    gymnasium.register(f"{domain}-{task}-v0", partial(make, domain, task))
