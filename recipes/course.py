"""The two environments of the course: Bar-v0 (project P03) and Circle-v0 (project P05).

    python dreamer.py --env recipes.course:Bar-v0    (its options: recipes/README.md)
    python -m recipes.course    prints mean returns: for Bar -1.3 at random, 3.5 with the best rule

Bar is a red bar on noise. Action 0 moves it to the left, 1 to the right. A step to the middle is
rewarded with 1, any other with -1. Circle is a disc. Action 0 moves it to the right, 1 to the
left. The reward is 1 in the right half, else 0. A time limit cuts each episode after 20 steps.
"""

import gymnasium as gym
import numpy as np

ROW, COLUMN = np.mgrid[:64, :64]  # of each pixel


class Bar(gym.Env):
    """A bar of five columns at x in [-1, 1]. The observation is the frame."""

    metadata = {"render_modes": ["rgb_array"], "render_fps": 10}

    def __init__(self, render_mode: str | None = None):
        self.render_mode, self.action_space = render_mode, gym.spaces.Discrete(2)
        self.observation_space = gym.spaces.Box(0, 255, (64, 64, 3), np.uint8)

    def reset(self, *, seed: int | None = None, options: dict | None = None):
        super().reset(seed=seed)
        self.begin()
        self.noise = self.np_random.uniform(0, 0.05, (64, 64, 3))
        return self.render(), {}

    def step(self, action):
        reward = self.move(action)
        self.noise = self.np_random.uniform(0, 0.05, (64, 64, 3))
        return self.render(), reward, False, False, {}

    def render(self):
        return (255 * self.draw()).astype(np.uint8)

    def begin(self) -> None:
        self.x = self.np_random.uniform(-0.8, 0.8)

    def move(self, action: int) -> float:
        before, self.x = self.x, np.clip(self.x + (0.1 if action == 1 else -0.1), -1, 1)
        return 1.0 if abs(self.x) < abs(before) else -1.0

    def draw(self) -> np.ndarray:
        bar = abs(COLUMN - round(31.5 + 31.5 * self.x)) <= 2
        return np.clip(bar[..., None] * np.array([1, 0, 0]) + self.noise, 0, 1)


class Circle(Bar):
    def begin(self) -> None:
        self.x, self.y = self.np_random.integers(20, 44, 2)

    def move(self, action: int) -> float:
        self.x = np.clip(self.x + (4 if action == 0 else -4), 10, 54)
        return float(self.x > 32)

    def draw(self) -> np.ndarray:
        disc = (COLUMN - self.x) ** 2 + (ROW - self.y) ** 2 <= 8**2
        return disc[..., None] * np.array([0.9, 0.3, 0.3])


gym.register("Bar-v0", Bar, max_episode_steps=20)
gym.register("Circle-v0", Circle, max_episode_steps=20)


def main(argv=None) -> None:
    for env, best in (Bar(), lambda bar: bar.x < 0), (Circle(), lambda circle: 0):
        for name, rule in ("random", lambda env: env.np_random.integers(2)), ("best", best):
            total = 0.0
            for seed in range(400):
                env.reset(seed=seed)
                total += sum(env.step(rule(env))[1] for _ in range(20))
            print(f"{type(env).__name__}-v0: mean return {total / 400:.2f}, {name} actions")


if __name__ == "__main__":
    main()
