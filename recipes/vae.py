"""Train the variational autoencoder of the course's project P01, and write vae_encoder.pt.

    python -m recipes.vae shapes         on drawings of colored shapes on black, like P01
    python -m recipes.vae CartPole-v1    on frames of random play in an environment

In 75 seconds it prints squared errors of unseen frames. --beta is the weight of the KL.
"""

import argparse

import numpy as np
import torch
from PIL import Image, ImageDraw
from torch import Tensor, nn
from tqdm import trange

from dreamer import PixelEnv
from recipes.lesson_parts import LessonEncoder


class VAE(nn.Module):
    def __init__(self):
        super().__init__()
        self.encoder, self.decoder = LessonEncoder(), nn.Module()
        self.encoder.fc_log_var, self.decoder.fc = nn.Linear(4096, 32), nn.Linear(32, 4096)
        layers = [(nn.ConvTranspose2d(n, n // 2, 4, 2, 1), nn.ReLU()) for n in (256, 128, 64)]
        layers.append((nn.ConvTranspose2d(32, 3, 4, 2, 1), nn.Sigmoid()))
        self.decoder.deconv = nn.Sequential(*sum(layers, ()))

    def forward(self, x: Tensor, noise: float = 0.0) -> tuple[Tensor, Tensor]:
        """Frames [N, 3, 64, 64] in [0, 1] -> squared error and KL from N(0, 1), means over N."""
        features = self.encoder.conv(x).flatten(1)
        mean, v = self.encoder.fc_mu(features), self.encoder.fc_log_var(features)  # log(variance)
        z = mean + noise * (v / 2).exp() * torch.randn_like(mean)
        y = self.decoder.deconv(self.decoder.fc(z).unflatten(1, (256, 4, 4)))
        return (x - y).square().sum() / len(x), (mean**2 + v.exp() - 1 - v).sum() / 2 / len(x)


def frames(source: str, count: int, seed: int) -> Tensor:
    """Drawings (a circle has 60 sides), or frames of random play: [N, 3, 64, 64] in [0, 1]."""
    rng, images = np.random.default_rng(seed), []
    while source == "shapes" and len(images) < count:
        images.append(Image.new("RGB", (64, 64)))
        r, sides, color = rng.uniform(6, 16), rng.choice([3, 4, 60]), rng.integers(256, size=3)
        place = (*rng.uniform(r, 63 - r, 2), r)
        ImageDraw.Draw(images[-1]).regular_polygon(place, int(sides), fill=tuple(color.tolist()))
    while len(images) < count:
        with PixelEnv(source) as env:
            images.append(env.reset(seed=int(rng.integers(2**31)))[0])
            while not env.row["is_last"]:
                images.append(env.step(env.action_space.sample())[0])
    return torch.tensor(np.stack(images[:count])).movedim(3, 1) / 255


def main(argv: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser("python -m recipes.vae")
    parser.add_argument("source", help="shapes, or a Gymnasium environment")
    for name, value in {"steps": 700, "beta": 0.1, "seed": 0, "out": "vae_encoder.pt"}.items():
        parser.add_argument(f"--{name}", type=type(value), default=value, help=f"{value}")
    args = parser.parse_args(argv)
    try:
        data, new = frames(args.source, 3_500, args.seed).split([3_000, 500])
        open(args.out, "xb").close()  # no file is replaced
    except (ValueError, OSError) as error:
        raise SystemExit(f"recipes.vae: error: {error}") from error
    _, vae, mean = torch.manual_seed(args.seed), VAE(), data.mean(0)
    vae.decoder.deconv[-2].bias.data = mean.mean((1, 2)).clip(0.02, 0.98).logit()  # mean color
    optimizer = torch.optim.Adam(vae.parameters(), 1e-3)
    for _ in trange(args.steps):
        error, kl = vae(data[torch.randint(len(data), (16,))], noise=1.0)
        optimizer.zero_grad()
        (error + args.beta * kl).backward()
        optimizer.step()
    with torch.no_grad():
        print(f"error {vae(new)[0]:.1f}, mean frame {(new - mean).square().sum() / len(new):.1f}")
    torch.save({"model_state_dict": vae.state_dict()}, args.out)


if __name__ == "__main__":
    main()
