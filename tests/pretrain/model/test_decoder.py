from __future__ import annotations

import torch

from pretrain.model.decoder import Decoder
from pretrain.model.sizes import PATCH_VALUES, SIZES

NANO = SIZES["nano"]


def test_predicts_one_tubelet_per_masked_token():
    decoder = Decoder(NANO, 16)
    visible_BV = torch.tensor([[0, 5, 9], [1, 2, 3]])
    masked_BM = torch.tensor([[n for n in range(16) if n not in row] for row in visible_BV.tolist()])
    assert decoder(torch.randn(2, 3, NANO.width), visible_BV, masked_BM).shape == (2, 13, PATCH_VALUES)


def test_a_prediction_belongs_to_its_position():
    decoder = Decoder(NANO, 16)
    visible_BV, masked_BM = torch.tensor([[0, 5]]), torch.tensor([[1, 2, 3, 9]])
    latent_BVD = torch.randn(1, 2, NANO.width)
    predicted = decoder(latent_BVD, visible_BV, masked_BM)
    turned = decoder(latent_BVD.flip(1), visible_BV.flip(1), masked_BM.flip(1)).flip(1)
    torch.testing.assert_close(turned, predicted, rtol=1e-5, atol=1e-5)
    assert not torch.allclose(predicted[0, 0], predicted[0, 1], atol=1e-3)


def test_mask_token_starts_small_and_not_flat():
    token = Decoder(SIZES["large"], 16).mask_token.detach()
    assert token.shape == (512,)
    assert 0.005 < float(token.std()) < 0.02
    assert float(token.abs().max()) <= 0.02
