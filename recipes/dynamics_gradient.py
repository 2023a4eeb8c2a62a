"""The actor climbs the gradient of the return through the dream, as in the first Dreamer.

    python -m recipes.dynamics_gradient

REINFORCE makes an action more likely if its return beat the critic's guess. Here the gradient
goes from the return through the critic, the reward head and the RSSM to the actions, and from
there to the actor. The program takes the options of dreamer.py. Expect returns near 500.
"""

import json
import sys

import torch
import tyro
from torch import Tensor
from torch import distributions as td

import dreamer
from dreamer import Agent, Config, gradient_step, lambda_return, sg


def rsample(policy: td.Distribution) -> Tensor:
    """An action [N, A] with a gradient: straight-through, or for a Box reparameterised."""
    if isinstance(policy, td.OneHotCategorical):
        policy = td.OneHotCategoricalStraightThrough(logits=policy.logits)
    return policy.rsample()


def imagine(agent: Agent, feat: Tensor) -> Tensor:
    """Eq. 3.1 from states [N, F] -> [H+1, N, F], each with a gradient to earlier actions."""
    feats = [feat]
    for _ in range(agent.config.horizon):
        # As in V1, no gradient flows from an action back into the state that the actor saw.
        action = rsample(agent.actor(sg(feats[-1])))  # [N, A]
        feats.append(agent.world_model.rssm.img_step(feats[-1], action))  # [N, F]
    return torch.stack(feats)


def update_behavior(agent: Agent, start: Tensor, anneal: float = 1.0) -> dict[str, Tensor]:
    """Dream from states [N, F]; then one step of the actor, one of the critic."""
    config = agent.config
    feat = imagine(agent, start)  # [H+1, N, F]
    reward, cont = agent.world_model.predict(feat)  # each [H+1, N]
    value = agent.critic(feat)  # [H+1, N]
    feat = sg(feat[:-1])  # [H, N, F]
    returns = lambda_return(reward, value, cont, config.gamma, config.lam)  # [H, N]
    factors = torch.cat([cont[:1], config.gamma * cont[1:-1]])  # [H, N]
    weight = sg(factors.cumprod(0))  # [H, N]
    percentiles = sg(returns).quantile(returns.new_tensor([0.05, 0.95]))  # [2]
    low, high = agent.return_range.lerp_(percentiles, config.return_rate)
    scale = (high - low).clamp(min=1.0)  # []

    # In place of Eq. 3.5. gradient_step moves the actor alone.
    entropy = agent.actor(feat).entropy()  # [H, N]
    eta = anneal * config.entropy / agent.actor.numbers**2
    actor_loss = -(weight * (returns / scale + eta * entropy)).mean()  # []
    error = agent.critic.loss(feat, sg(returns), sg(agent.slow_critic(feat)))  # [H, N]
    critic_loss = (weight * error).mean()  # []

    gradient_step(agent, "actor", actor_loss, anneal)
    gradient_step(agent, "critic", critic_loss, anneal)
    for slow, fast in zip(agent.slow_critic.parameters(), agent.critic.parameters(), strict=True):
        slow.lerp_(sg(fast), config.critic_rate)

    metrics = {"actor": actor_loss, "critic": critic_loss, "entropy": entropy, "return": returns}
    return {f"ac/{name}": sg(x).mean() for name, x in metrics.items()}


def main(argv: list[str] | None = None) -> None:
    try:
        config = tyro.cli(Config, args=argv, default=Config(runs="runs-dynamics"))
        dreamer.update_behavior = update_behavior  # `train` looks it up by this name
        agent = dreamer.load_agent(dreamer.train(config))
        print(json.dumps(dreamer.evaluate(agent, config.episodes, config.seed), indent=2))
    except (ValueError, OSError) as error:
        sys.exit(f"recipes.dynamics_gradient: error: {error}")


if __name__ == "__main__":
    main()
