"""LunarLander through a square that follows the lander, since 64x64 pixels hide it.

    python dreamer.py --env recipes.lander:CloseUp-v0 --action-repeat 4 --steps 40000 \\
        --prefill 4000 --train-ratio 48 --hidden 256 --units 256 --depth 16 --groups 32 \\
        --entropy 2e-3 --eval-every 5000

This file is no program. It registers an environment, and `--env` imports it. The task and its
rewards are Gymnasium's (`pip install "gymnasium[box2d]"`). Only the picture is another one: 160x160
pixels around those that have the lander's color. One pixel of the agent's frame is then 2.5
pixels of the task's, where it was 9 by 6. Expect landings after 390 to 430 episodes.
"""

import gymnasium
import numpy as np
from gymnasium.envs.box2d.lunar_lander import LunarLander

LANDER = 128, 102, 230  # the color that the lander and its legs are drawn in

# Waves in the black sky show where in the frame the square lies, and how fast the lander moves.
# A slow change of color tells one wave from the next.
y, x = np.mgrid[:400, :600]
red = 0.4 * x / 600 + 0.3 * np.sin(x / 12) + 0.3
green = 0.4 * y / 400 + 0.3 * np.sin(y / 12) + 0.3
SKY = (255 * np.stack([red, green, 0 * red], -1)).astype(np.uint8)


class CloseUp(LunarLander):
    """LunarLander whose frames [160, 160, 3] are cut out of [400, 600, 3]."""

    view = slice(0, 160), slice(220, 380)  # rows and columns of the task's frame

    def render(self):
        frame = super().render()
        rows, columns = (frame == LANDER).all(-1).nonzero()
        if len(rows) > 0:  # else the lander left the frame: look where it was seen last
            top = np.clip(int(rows.mean()) - 80, 0, 240)
            left = np.clip(int(columns.mean()) - 80, 0, 440)
            self.view = slice(top, top + 160), slice(left, left + 160)

        frame = frame[self.view]
        sky = ~frame.any(-1, keepdims=True)
        return np.where(sky, SKY[self.view], frame)


gymnasium.register("CloseUp-v0", CloseUp, max_episode_steps=1_000)
