"""How well can Pendulum be played? The mean return of a planner that knows the physics.

    python -m recipes.pendulum --seed 3    on the episodes of --eval RUN --seed 3 --episodes 50

The planner's state is the angle (0 is upright) and its speed. Value iteration computes the best
rewards that can still be had, for every step of an episode and every point of a grid of states.
Then the planner plays in the environment itself, and picks the torque with the best outlook.
Between the points of the grid values are interpolated, so it is nearly the best, not the best.
"""

import argparse

import gymnasium as gym
import numpy as np
from tqdm import tqdm

STEPS, REPEAT = 100, 2  # actions of an episode, and environment steps for each
ANGLES, SPEEDS = np.linspace(-np.pi, np.pi, 401), np.linspace(-8, 8, 321)
TORQUES = np.linspace(-2, 2, 41)


def simulate(angle, speed, torque) -> tuple:
    """Gymnasium's equations for one held action: the next angle and speed, and the reward."""
    reward = 0.0
    for _ in range(REPEAT):
        from_upright = (angle + np.pi) % (2 * np.pi) - np.pi
        reward = reward - (from_upright**2 + 0.1 * speed**2 + 0.001 * torque**2)
        speed = np.clip(speed + 0.05 * (15 * np.sin(angle) + 3 * torque), -8, 8)
        angle = angle + 0.05 * speed
    return angle, speed, reward


def interpolate(values: np.ndarray, angle, speed):
    """Values of the grid [401, 321] at states between its points (bilinear)."""
    x = (angle + np.pi) % (2 * np.pi) / (ANGLES[1] - ANGLES[0])
    y = (speed + 8) / (SPEEDS[1] - SPEEDS[0])
    i = np.minimum(x.astype(int), len(ANGLES) - 2)
    j = np.minimum(y.astype(int), len(SPEEDS) - 2)
    x, y = x - i, y - j  # how far into the cell
    lower = (1 - y) * values[i, j] + y * values[i, j + 1]
    upper = (1 - y) * values[i + 1, j] + y * values[i + 1, j + 1]
    return (1 - x) * lower + x * upper


def plan(steps: int = STEPS) -> list[np.ndarray]:
    """The best rewards still to come, on the grid, with 0, 1, ... `steps` actions left."""
    values = [np.zeros((len(ANGLES), len(SPEEDS)))]
    moves = [simulate(ANGLES[:, None], SPEEDS[None], torque) for torque in TORQUES[::5]]
    for _ in tqdm(range(steps), "value iteration", leave=False):
        outlooks = [reward + interpolate(values[-1], *state) for *state, reward in moves]
        values.append(np.max(outlooks, 0))
    return values


def play(env: gym.Env, values: list[np.ndarray], seed: int) -> float:
    """The planner's return in one episode."""
    env.reset(seed=seed)
    total = 0.0
    for left in reversed(range(len(values) - 1)):
        *state, reward = simulate(*env.unwrapped.state, TORQUES)
        torque = TORQUES[np.argmax(reward + interpolate(values[left], *state))]
        total += sum(env.step(np.array([torque]))[1] for _ in range(REPEAT))
    return total


def main(argv: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--seed", type=int, default=0, help="as of `dreamer.py --eval`")
    parser.add_argument("--episodes", type=int, default=50)
    args = parser.parse_args(argv)
    env, values = gym.make("Pendulum-v1"), plan()
    seeds = [2_000_000 * args.seed + 2 * i + 1 for i in range(args.episodes)]
    print("mean return:", round(np.mean([play(env, values, seed) for seed in seeds]), 1))


if __name__ == "__main__":
    main()
