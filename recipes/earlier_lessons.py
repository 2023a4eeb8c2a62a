"""Train with the encoder of the course's project P01 and the RSSM of its project P02.

    python -m recipes.earlier_lessons vae_encoder.pt rssm.pt
    python -m recipes.earlier_lessons --encoder vae_encoder.pt --freeze

It takes the options of dreamer.py, too. Without --rssm the RSSM is that of dreamer.py. Without
--encoder the encoder has P01's shape and new weights. With --freeze the files' weights stay. The
options for sizes do not change the networks of the two projects. P02's RSSM needs two actions.
"""

import argparse
import json
import sys

import torch
import tyro
from torch import nn

import dreamer
from dreamer import Agent, Config, PixelEnv
from recipes.lesson_parts import LessonEncoder, LessonRSSM


def load(part: nn.Module, path: str, *names: str) -> None:
    """Copy the weights of a file. They lie under one of the names, or at the top."""
    state = dreamer.read_checkpoint(path)
    for name in names:
        state = state.get(name, state) if isinstance(state, dict) else {}
    state = {str(name).removeprefix("encoder."): x for name, x in state.items()}

    for name, weight in part.state_dict().items():
        found = getattr(state.get(name), "shape", None)
        if found is None:
            known = ", ".join(state) or "no weights"
            raise ValueError(f"{path}: {name} {[*weight.shape]} was expected, it holds {known}")
        if found != weight.shape:
            raise ValueError(f"{path}: {name} is {[*found]}, but {[*weight.shape]} was expected")
        weight.copy_(state[name])


def lesson_agent(config: Config, encoder_path=None, rssm_path=None, freeze=False) -> Agent:
    """An agent whose encoder and RSSM have the weights of the files."""
    torch.manual_seed(config.seed)
    with PixelEnv(config.env, config.action_repeat) as env:
        space = env.action_space
    if rssm_path and str(space) != "Discrete(2)":
        raise ValueError(f"P02's RSSM knows the actions 0 and 1, but {config.env} has {space}")

    encoder, rssm = LessonEncoder(), None
    if encoder_path:
        load(encoder, encoder_path, "model_state_dict", "encoder")
        encoder.requires_grad_(not freeze)
    if rssm_path:
        rssm = LessonRSSM()
        load(rssm, rssm_path, "rssm_state_dict", "rssm")
        rssm.requires_grad_(not freeze)
    return Agent(space, config, encoder, rssm)


def main(argv: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(add_help=False, allow_abbrev=False)
    parser.add_argument("--encoder")
    parser.add_argument("--rssm")
    parser.add_argument("--freeze", action="store_true")
    argv = sys.argv[1:] if argv is None else argv
    files = next((i for i, word in enumerate(argv) if word.startswith("-")), len(argv))
    named = [x for pair in zip(("--encoder", "--rssm"), argv[:files], strict=False) for x in pair]
    args, others = parser.parse_known_args(named + argv[len(named) // 2 :])
    try:
        default = Config(runs="runs-lessons")
        config = tyro.cli(Config, description=__doc__, args=others, default=default)
        agent = lesson_agent(config, args.encoder, args.rssm, args.freeze)
        dreamer.train(config, agent)
        print(json.dumps(dreamer.evaluate(agent, config.episodes, config.seed), indent=2))
    except (ValueError, OSError) as error:
        sys.exit(f"recipes.earlier_lessons: error: {str(error).splitlines()[0]}")


if __name__ == "__main__":
    main()
