"""What `recipes.dashboard` shows: dreams of 20 steps, beside the episodes that they retell.

This file is no program. `measure` plays unseen episodes of random actions. The agent sees the
first frame. After that it is told only the actions, and it dreams. After a termination the real
reward is 0. Each dreamed reward is multiplied by the probability that the dream still goes on.
"""

import numpy as np
import torch
from torch import Tensor

from dreamer import RSSM, Agent, PixelEnv, imagine, play, reward_rho, stack_rows
from recipes.latents import frechet

STEPS = 20


def random_rows(agent: Agent, episodes: int) -> tuple[dict[str, Tensor], Tensor]:
    """Rows [N, 21, ...] from each first frame on; whether they are of the episode [N, 20]."""
    batch = []
    with PixelEnv(agent.config.env, agent.config.action_repeat) as env:
        for number in range(episodes):  # with chance 1 every action is random
            rows, _ = play(agent, env, seed=2 * number + 1, chance=1.0)
            # After a termination the reward is known to be 0, after a time limit it is not known.
            after = rows[-1] | {"reward": np.float32(0 if rows[-1]["terminated"] else np.nan)}
            batch.append(stack_rows((rows + STEPS * [after])[: STEPS + 1]))

    real = {name: torch.stack([rows[name] for rows in batch]) for name in batch[0]}
    return real, real["is_last"][:, :-1].cumsum(1) == 0


def dream_on(rssm: RSSM, feat: Tensor, actions: Tensor) -> Tensor:
    """States [N, F] and actions [N, 20, A] -> dreamed states [N, 21, F]."""
    dream = [feat]
    for action in actions.unbind(1):
        dream.append(rssm.img_step(dream[-1], action))
    return torch.stack(dream, 1)


@torch.no_grad()
def measure(agent: Agent, episodes: int) -> dict:
    """Curves [20] over the steps; real and dreamed rewards [N, 20] and frames [N, 21, ...]."""
    model, rssm, D = agent.world_model, agent.world_model.rssm, agent.world_model.rssm.hidden
    real, same = random_rows(agent, episodes)
    embed = model.encoder(real["obs"])  # [N, 21, E]
    before = rssm.initial(len(embed))  # [N, F]
    feat, post, _ = rssm.observe(embed, real["prev_action"], real["is_first"], before)
    dream = dream_on(rssm, feat[:, 0], real["prev_action"][:, 1:])
    frames, dreamed, again = real["obs"] / 255, model.decoder(dream), model.decoder(feat)

    def mean(x: Tensor) -> Tensor:  # [N, 21] -> [20], over the episodes that reach a step
        return x[:, 1:].where(same, torch.nan).nanmean(0)

    psnr, drift = {"dreamed": dreamed, "reconstructed": again}, {}
    for name, x in psnr.items():
        psnr[name] = mean(-10 * (x - frames).square().mean((2, 3, 4)).log10())
    # z is one-hot: its distances are those of the class probabilities, prior and posterior.
    for name, x in {"same episode": post, "other episode": post.roll(1, 0)}.items():
        drift[name] = mean((rssm.prior(dream[..., :D]) - x).flatten(2).norm(dim=2))

    imagined, cont = model.predict(dream)  # each [N, 21]
    imagined[:, 2:] *= cont[:, 1:-1].cumprod(1)
    reward, imagined = real["reward"][:, 1:], imagined[:, 1:]  # each [N, 20]
    rho = [reward_rho(imagined[:, :k], reward[:, :k]) for k in range(1, STEPS + 1)]

    own, _ = imagine(model, agent.actor, feat[:, 0], STEPS)  # [21, N, F]: the actor's dream
    z, actor = rssm.entropy(rssm.prior(own[1:, :, :D])), agent.actor(own[:-1]).entropy()
    return {
        "PSNR in dB": psnr,
        "latent drift": drift,
        "reward rho": {"dream": rho, "goal": STEPS * [0.8]},
        "entropy in nats": {"z": z.mean(1), "actor": actor.mean(1)},
        "rewards": (reward.nan_to_num(), imagined.where(reward.isfinite(), 0)),
        "films": (frames, dreamed),
        "same": same,
        "frechet": frechet(embed[:, 1:][same], model.encoder(255 * again[:, 1:][same])),
    }
