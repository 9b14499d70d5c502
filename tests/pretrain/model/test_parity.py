"""Our network and transformers' VideoMAE are one function of the same weights."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor
from transformers import VideoMAEConfig, VideoMAEForPreTraining

from pretrain.batch import IMAGENET_MEAN, IMAGENET_STD
from pretrain.model.embed import patchify
from pretrain.model.sizes import SIZES
from pretrain.objective import ClipKeys, Pretraining
from pretrain.sections import MaskedFrameConfig, ObjectiveConfig

FRAMES, SIZE = 8, 64


def reference(name: str) -> VideoMAEForPreTraining:
    size = SIZES[name]
    return VideoMAEForPreTraining(
        VideoMAEConfig(
            image_size=SIZE,
            num_frames=FRAMES,
            hidden_size=size.width,
            num_hidden_layers=size.depth,
            num_attention_heads=size.heads,
            intermediate_size=size.mlp_width,
            decoder_hidden_size=size.decoder_width,
            decoder_num_hidden_layers=size.decoder_depth,
            decoder_num_attention_heads=size.decoder_heads,
            decoder_intermediate_size=size.decoder_mlp_width,
            use_mean_pooling=False,
        )
    ).eval()


def in_their_layout(weights: dict[str, Tensor]) -> dict[str, Tensor]:
    """Written out here a second time, so that the export's own mapping is not checked with itself."""
    theirs: dict[str, Tensor] = {}
    for name, value in weights.items():
        if name.startswith("encoder.blocks."):
            prefix, rest = "videomae.encoder.layer.", name.removeprefix("encoder.blocks.")
        elif name.startswith("objectives.masked_frame.decoder.blocks."):
            prefix, rest = "decoder.decoder_layers.", name.removeprefix("objectives.masked_frame.decoder.blocks.")
        else:
            theirs[OUTSIDE_OF_BLOCKS[name]] = value
            continue
        number, _, leaf = rest.partition(".")
        if leaf == "attention.qkv.weight":
            for part, piece in zip(("query", "key", "value"), value.chunk(3), strict=True):
                theirs[f"{prefix}{number}.attention.attention.{part}.weight"] = piece
        else:
            theirs[f"{prefix}{number}.{IN_BLOCKS[leaf]}"] = value
    embed = theirs["videomae.embeddings.patch_embeddings.projection.weight"]
    theirs["videomae.embeddings.patch_embeddings.projection.weight"] = embed.view(-1, 3, 2, 16, 16)
    theirs["mask_token"] = theirs["mask_token"].view(1, 1, -1)
    return theirs


OUTSIDE_OF_BLOCKS = {
    "encoder.embed.weight": "videomae.embeddings.patch_embeddings.projection.weight",
    "encoder.embed.bias": "videomae.embeddings.patch_embeddings.projection.bias",
    "encoder.norm.weight": "videomae.layernorm.weight",
    "encoder.norm.bias": "videomae.layernorm.bias",
    "objectives.masked_frame.decoder.embed.weight": "encoder_to_decoder.weight",
    "objectives.masked_frame.decoder.mask_token": "mask_token",
    "objectives.masked_frame.decoder.norm.weight": "decoder.norm.weight",
    "objectives.masked_frame.decoder.norm.bias": "decoder.norm.bias",
    "objectives.masked_frame.decoder.head.weight": "decoder.head.weight",
    "objectives.masked_frame.decoder.head.bias": "decoder.head.bias",
}
IN_BLOCKS = {
    "norm1.weight": "layernorm_before.weight",
    "norm1.bias": "layernorm_before.bias",
    "attention.q_bias": "attention.attention.query.bias",
    "attention.v_bias": "attention.attention.value.bias",
    "attention.proj.weight": "attention.output.dense.weight",
    "attention.proj.bias": "attention.output.dense.bias",
    "norm2.weight": "layernorm_after.weight",
    "norm2.bias": "layernorm_after.bias",
    "mlp.fc1.weight": "intermediate.dense.weight",
    "mlp.fc1.bias": "intermediate.dense.bias",
    "mlp.fc2.weight": "output.dense.weight",
    "mlp.fc2.bias": "output.dense.bias",
}


@pytest.mark.parametrize("name", ["nano", "tiny", "small"])
def test_features_and_loss_equal_transformers(name: str):
    config = ObjectiveConfig(masked_frame=MaskedFrameConfig(mask_ratio=0.75))
    ours = Pretraining(name, config, frames=FRAMES, size=SIZE, seed=1)
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for key, parameter in ours.named_parameters():
            if parameter.ndim == 1:  # biases, norms, mask token: nothing may be hidden by a zero or a one
                parameter += 0.3 * torch.randn(parameter.shape, generator=generator)
            assert parameter.any(), key
    theirs = reference(name)
    assert not theirs.load_state_dict(in_their_layout(ours.state_dict()), strict=False).missing_keys
    assert theirs.load_state_dict(in_their_layout(ours.state_dict()), strict=True)

    pixels_BCTHW = torch.rand(2, 3, FRAMES, SIZE, SIZE, generator=generator)
    mean, std = (torch.tensor(values).view(3, 1, 1, 1) for values in (IMAGENET_MEAN, IMAGENET_STD))
    frames_BCTHW = (pixels_BCTHW - mean) / std
    keys = ClipKeys(0, torch.zeros(2).long(), torch.tensor([3, 4]), torch.zeros(2).long())
    plans = ours.plan(keys)
    is_masked_BN = torch.zeros(2, ours.grid.num_tokens, dtype=torch.bool)
    is_masked_BN.scatter_(1, plans["masked_frame"]["masked_BM"], True)
    assert plans["masked_frame"]["whole_BM"].any()

    with torch.no_grad():
        every_BN = torch.arange(ours.grid.num_tokens).expand(2, -1)
        features = ours.encoder(patchify(frames_BCTHW), every_BN)
        losses = ours(frames_BCTHW, plans)["masked_frame"].value_B
        expected_features = theirs.videomae(frames_BCTHW.transpose(1, 2)).last_hidden_state
        expected_loss = theirs(frames_BCTHW.transpose(1, 2), bool_masked_pos=is_masked_BN).loss
    torch.testing.assert_close(features, expected_features, rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(losses.mean(), expected_loss, rtol=1e-5, atol=1e-5)
