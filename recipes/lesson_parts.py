"""The encoder of the course's project P01 and the RSSM of its project P02.

This file is no program. `recipes.earlier_lessons` trains with these networks. Their layers have
the names and sizes that the files of the two projects hold. Methods and attributes are those that
the agent asks of an encoder and an RSSM, so other networks can be brought in the same way.
"""

import torch
from torch import Tensor, nn

import dreamer
from dreamer import Agent
from recipes.gaussian_latents import GaussianRSSM


class LessonEncoder(nn.Module):
    """Frames uint8 [..., 64, 64, 3] -> mean of P01's z [..., 32]."""

    embed_size = 32

    def __init__(self):
        super().__init__()
        self.conv = nn.Sequential()
        for inputs, outputs in ((3, 32), (32, 64), (64, 128), (128, 256)):
            self.conv.extend([nn.Conv2d(inputs, outputs, 4, stride=2, padding=1), nn.ReLU()])
        self.fc_mu = nn.Linear(256 * 4 * 4, 32)

    def forward(self, obs: Tensor) -> Tensor:
        x = obs.reshape(-1, 64, 64, 3).permute(0, 3, 1, 2) / 255
        return self.fc_mu(self.conv(x).flatten(1)).unflatten(0, obs.shape[:-3])


class LessonRSSM(GaussianRSSM):
    """P02's network: h has 128 numbers, and z is 32 normal variables."""

    def __init__(self):
        nn.Module.__init__(self)  # none of the layers of dreamer.py
        self.hidden, self.feat_size = 128, 128 + 32
        self.gru = nn.GRUCell(32 + 1, 128)
        self.prior_net = nn.Sequential(nn.Linear(128, 128), nn.ELU(), nn.Linear(128, 64))
        self.post_net = nn.Sequential(nn.Linear(128 + 32, 128), nn.ELU(), nn.Linear(128, 64))

    def initial(self, batch: int) -> Tensor:
        """The state before an episode: zeros [batch, 160]."""
        return self.gru.weight_hh.new_zeros(batch, self.feat_size)

    def recur(self, feat: Tensor, prev_action: Tensor) -> Tensor:
        """State [N, 160], action one-hot [N, 2] -> the next h [N, 128]."""
        h, z = feat.split([128, 32], -1)
        index = prev_action[:, 1:]  # [N, 1]: 0 or 1, as P02 writes an action
        return self.gru(torch.cat([z, index], -1), h)

    def params(self, outputs: Tensor) -> Tensor:
        """Outputs of a network [., 64] -> mean and deviation [., 32, 2], as P03 reads them."""
        mean, std = outputs.chunk(2, -1)
        return torch.stack([mean, nn.functional.softplus(std) + 0.1], -1)


def load_agent(path: str) -> Agent:
    """As dreamer.load_agent. Encoder and RSSM can be those above, too: their weights tell."""
    names = dreamer.read_checkpoint(path, mmap=True)["agent"]
    encoder = LessonEncoder() if "world_model.encoder.fc_mu.weight" in names else None
    rssm = LessonRSSM() if "world_model.rssm.gru.weight_hh" in names else None
    return dreamer.load_agent(path, encoder=encoder, rssm=rssm)
