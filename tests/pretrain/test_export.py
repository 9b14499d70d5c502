"""Exports: what transformers makes of them, and what is refused."""

from __future__ import annotations

import json
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import transformers
from safetensors.torch import load_file

from pretrain import names, proof
from pretrain.batch import COLOR_RGB24, IMAGENET_MEAN, IMAGENET_STD
from pretrain.checkpoint import Facts, publish, read_parts, stage, staging_folder, write_part
from pretrain.data.decode import Frames
from pretrain.downstream.view import middle_crops
from pretrain.export import export, export_state
from pretrain.ledger import LineageHead
from pretrain.load import encode, load_encoder, load_export
from pretrain.model.embed import patchify
from pretrain.objective import ClipKeys, Pretraining
from pretrain.sections import FrameOrderConfig, MaskedFrameConfig, ObjectiveConfig
from shards.errors import UserError

CANARY = "c4n4ry-s3cr3t"


def make_run(
    size: str = "nano", *, frames: int = 6, pixels: int = 32, objective: ObjectiveConfig | None = None
) -> tuple[Pretraining, dict[str, Any]]:
    """A network whose every parameter differs from its initial value, so that none can be lost unseen."""
    objective = objective or ObjectiveConfig(
        masked_frame=MaskedFrameConfig(mask_ratio=0.5), frame_order=FrameOrderConfig(mask_ratio=0.5)
    )
    model = Pretraining(size, objective, frames=frames, size=pixels, seed=0)
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for value in model.parameters():
            value += 0.05 * torch.randn(value.shape, generator=generator)
    config = {
        "run": {"dir": f"/home/{CANARY}/runs/x", "seed": 0},
        "data": {
            "shards": f"s3://{CANARY}:{CANARY}@host/{CANARY}/films?sig={CANARY}",
            "frames": frames,
            "size": pixels,
            "stride": 3,
        },
        "model": {"size": size},
        "objective": objective.model_dump(mode="json"),
        "train": {"steps": 100, "global_batch": 8, "precision": "bf16", "init_from": None},
        "optim": {"name": "adamw", "lr": 0.001},
    }
    return model, config


@pytest.fixture(scope="module")
def nano(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Pretraining, dict[str, Any]]:
    folder = tmp_path_factory.mktemp("nano") / "export"
    model, config = make_run()
    export_state(model.state_dict(), config, folder, step=70)
    return folder, model, config


@pytest.mark.parametrize("size", ["nano", "tiny", "small"])
@pytest.mark.parametrize("biases", ["v5", "v4"])
def test_transformers_gives_our_features_and_our_loss(size: str, biases: Any, tmp_path: Path) -> None:
    model, config = make_run(size, frames=8, pixels=48)
    report = export_state(model.state_dict(), config, tmp_path / "export", biases=biases)
    assert set(report.proof.differences) == {"pixel values", "features", "predictions", "loss"}

    frames_BTHWC = np.random.default_rng(5).integers(0, 256, (2, 8, 48, 48, 3), dtype=np.uint8)
    processor = transformers.AutoImageProcessor.from_pretrained(tmp_path / "export")
    pixels_BTCHW = torch.cat([processor(list(clip), return_tensors="pt")["pixel_values"] for clip in frames_BTHWC])
    mean, std = torch.tensor(IMAGENET_MEAN), torch.tensor(IMAGENET_STD)
    ours_BCTHW = ((torch.from_numpy(frames_BTHWC) / 255 - mean) / std).permute(0, 4, 1, 2, 3).contiguous()

    theirs = transformers.VideoMAEModel.from_pretrained(tmp_path / "export").eval()
    with torch.no_grad():
        features = theirs(pixels_BTCHW).last_hidden_state
        torch.testing.assert_close(encode(model.encoder, ours_BCTHW), features, atol=1e-5, rtol=0)
        torch.testing.assert_close(encode(load_encoder(tmp_path / "export"), ours_BCTHW), features, atol=1e-5, rtol=0)

        objective: Any = model.objectives["masked_frame"]
        plan = objective.plan(ClipKeys(9, torch.zeros(2).long(), torch.arange(2), torch.zeros(2).long()))
        hidden_BN = torch.zeros(2, model.grid.num_tokens, dtype=torch.bool).scatter_(1, plan["masked_BM"], True)
        theirs = transformers.VideoMAEForPreTraining.from_pretrained(tmp_path / "export").eval()
        loss = theirs(pixels_BTCHW, bool_masked_pos=hidden_BN).loss
        ours = objective(model.encoder, patchify(ours_BCTHW), plan).value_B.mean()
    assert float(abs(loss - ours)) < 1e-5 * max(1.0, float(loss))


@pytest.mark.parametrize("biases", ["v5", "v4"])
def test_biases_of_both_spellings_arrive_and_matter(biases: Any, tmp_path: Path) -> None:
    model, config = make_run()
    export_state(model.state_dict(), config, tmp_path / "export", biases=biases)
    stored = load_file(tmp_path / "export" / "model.safetensors")
    spelling = {"v5": "query.bias", "v4": "q_bias"}[biases]
    assert f"videomae.encoder.layer.0.attention.attention.{spelling}" in stored
    theirs = transformers.VideoMAEForPreTraining.from_pretrained(tmp_path / "export")
    for block, layer in zip(model.encoder.blocks, theirs.videomae.encoder.layer, strict=True):
        assert torch.equal(layer.attention.attention.query.bias, block.attention.q_bias)  # pyright: ignore
        assert torch.equal(layer.attention.attention.value.bias, block.attention.v_bias)  # pyright: ignore
        assert layer.attention.attention.key.bias is None
    decoder: Any = model.objectives["masked_frame"].decoder
    for block, layer in zip(decoder.blocks, theirs.decoder.decoder_layers, strict=True):
        assert torch.equal(layer.attention.attention.query.bias, block.attention.q_bias)


def test_names_go_there_and_back(nano: tuple[Path, Pretraining, dict[str, Any]]) -> None:
    _, model, _ = nano
    exported = {
        name: value for name, value in model.state_dict().items() if name.startswith((names.ENCODER, names.DECODER))
    }
    for biases in ("v5", "v4"):
        back = names.from_transformers(names.to_transformers(model.state_dict(), biases=biases))
        assert back.keys() == exported.keys()
        assert all(torch.equal(back[name], value) for name, value in exported.items())


def test_files_spell_out_what_libraries_would_guess(nano: tuple[Path, Pretraining, dict[str, Any]]) -> None:
    folder, _, _ = nano
    settings = json.loads((folder / "config.json").read_text())
    assert settings["use_mean_pooling"] is False
    assert settings["layer_norm_eps"] == 1e-12
    assert settings["norm_pix_loss"] is True
    assert (settings["num_frames"], settings["image_size"], settings["tubelet_size"]) == (6, 32, 2)
    processor = json.loads((folder / "preprocessor_config.json").read_text())
    assert processor["image_mean"] == list(IMAGENET_MEAN)
    assert processor["image_std"] == list(IMAGENET_STD)
    assert processor["crop_size"] == {"height": 32, "width": 32}
    assert processor["do_center_crop"] is True
    assert sorted(path.name for path in folder.iterdir()) == [
        "README.md",
        "config.json",
        "model.safetensors",
        "preprocessor_config.json",
        "tubelet.json",
    ]


def test_processor_and_our_middle_crop_agree_on_frames_of_another_shape(
    nano: tuple[Path, Pretraining, dict[str, Any]],
) -> None:
    folder, _, _ = nano
    rows, columns = np.mgrid[0:90, 0:160]
    frame_HW3 = np.stack([rows * 2, columns, 255 - columns], axis=-1).astype(np.uint8)
    frames_THWC = np.repeat(frame_HW3[None], 6, axis=0)
    processor = transformers.AutoImageProcessor.from_pretrained(folder)
    theirs_TCHW = processor(list(frames_THWC), return_tensors="pt")["pixel_values"][0]
    ours_CTHW = middle_crops([Frames(frames_THWC.reshape(6, -1), 90, 160, COLOR_RGB24)], 32)[0]
    levels = (theirs_TCHW.transpose(0, 1) - ours_CTHW).abs() * torch.tensor(IMAGENET_STD).view(3, 1, 1, 1) * 255
    assert float(levels.max()) < 3.0  # the processor crops a whole number of columns: up to half of one off


def test_parameter_that_does_not_arrive_stops_the_export(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    model, config = make_run()
    to_transformers = names.to_transformers

    def lose_one(*args: Any, **kwargs: Any) -> Any:
        theirs = to_transformers(*args, **kwargs)
        del theirs["videomae.encoder.layer.1.attention.attention.value.bias"]
        return theirs

    monkeypatch.setattr(names, "to_transformers", lose_one)
    with pytest.raises(UserError, match=r"missing parameters.*value\.bias"):
        export_state(model.state_dict(), config, tmp_path / "export")
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    "name",
    [
        "videomae.encoder.layer.2.attention.attention.query.bias",
        "videomae.embeddings.patch_embeddings.projection.weight",
        "decoder.head.weight",
        "mask_token",
    ],
)
def test_altered_parameter_stops_the_export(name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    model, config = make_run()
    to_transformers = names.to_transformers

    def alter_one(*args: Any, **kwargs: Any) -> Any:
        theirs = to_transformers(*args, **kwargs)
        theirs[name].view(-1)[7] += 0.05  # one number: a shift of all of them is lost in the norm after it
        return theirs

    monkeypatch.setattr(names, "to_transformers", alter_one)
    with pytest.raises(UserError, match="does not reproduce this network"):
        export_state(model.state_dict(), config, tmp_path / "export")
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(("key", "value"), [("image_mean", [0.5] * 3), ("do_rescale", False)])
def test_wrong_processor_stops_the_export(
    key: str, value: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from pretrain import export as module

    model, config = make_run()
    settings = module.processor_settings
    monkeypatch.setattr(module, "processor_settings", lambda geometry: {**settings(geometry), key: value})
    with pytest.raises(UserError, match="pixel values within"):
        export_state(model.state_dict(), config, tmp_path / "export")


def test_nan_is_never_close() -> None:
    assert not proof.Difference(float("nan"), 1.0).is_close
    assert not proof.Difference(2e-5, 1.0).is_close
    assert proof.Difference(2e-5, 3.0).is_close


def test_run_without_masked_frame_gives_an_encoder(tmp_path: Path) -> None:
    model, config = make_run(objective=ObjectiveConfig(frame_order=FrameOrderConfig(mask_ratio=0.5)))
    report = export_state(model.state_dict(), config, tmp_path / "export")
    assert report.architecture == "VideoMAEModel"
    assert "encoder only" in report.notes[0]
    assert set(report.proof.differences) == {"pixel values", "features"}
    assert "There is no decoder" in (tmp_path / "export" / "README.md").read_text()
    assert load_export(tmp_path / "export").decoder is None
    run_card(tmp_path / "export")


@pytest.mark.parametrize("can_exchange", [True, False])
def test_folder_of_somebody_is_not_touched_and_an_export_is_replaced(
    can_exchange: bool,
    nano: tuple[Path, Pretraining, dict[str, Any]],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    if not can_exchange:
        monkeypatch.setattr("pretrain.export._exchange", lambda first, second: False)
    _, model, config = nano
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "thesis.txt").write_text("years")
    with pytest.raises(UserError, match="holds files that are no earlier export"):
        export_state(model.state_dict(), config, tmp_path / "mine")
    with pytest.raises(UserError, match="must not be a file"):
        export_state(model.state_dict(), config, tmp_path / "mine" / "thesis.txt")
    assert [path.name for path in tmp_path.iterdir()] == ["mine"]
    assert (tmp_path / "mine" / "thesis.txt").read_text() == "years"

    (tmp_path / "empty").mkdir()
    for step in (1, 2):
        export_state(model.state_dict(), config, tmp_path / "empty", step=step)
        assert json.loads((tmp_path / "empty" / "tubelet.json").read_text())["step"] == step
    assert sorted(path.name for path in tmp_path.iterdir()) == ["empty", "mine"]


def test_nothing_of_the_machine_or_the_storage_is_in_the_folder(
    nano: tuple[Path, Pretraining, dict[str, Any]],
) -> None:
    folder, _, _ = nano
    for path in folder.iterdir():
        content = path.read_bytes()
        assert CANARY.encode() not in content, path
        assert str(folder.parent).encode() not in content, path


def run_card(folder: Path) -> dict[str, Any]:
    """Run the Python of the card as it stands, in the folder."""
    blocks = re.findall(r"```python\n(.*?)```", (folder / "README.md").read_text(), re.DOTALL)
    assert len(blocks) >= 2
    namespace: dict[str, Any] = {}
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(folder)
        for block in blocks:
            exec(compile(block, "README.md", "exec"), namespace)
    return namespace


def test_card_says_what_is_known_and_its_code_runs(nano: tuple[Path, Pretraining, dict[str, Any]]) -> None:
    folder, _, _ = nano
    card = (folder / "README.md").read_text()
    assert "| optimizer steps | 70 of 100 |" in card
    assert "| clips seen | 560 |" in card
    assert "a packed data set called `films`" in card
    assert "licence of the data | unknown |" in card
    namespace = run_card(folder)
    assert namespace["features"].shape == (1, 128)
    assert float(namespace["output"].loss) >= 0


def test_recipe_of_the_card_classifies_the_mean_of_the_tokens(
    nano: tuple[Path, Pretraining, dict[str, Any]], monkeypatch: pytest.MonkeyPatch
) -> None:
    folder, model, _ = nano
    block = next(
        block
        for block in re.findall(r"```python\n(.*?)```", (folder / "README.md").read_text(), re.DOTALL)
        if "fc_norm" in block
    )
    monkeypatch.chdir(folder)
    namespace: dict[str, Any] = {}
    exec(compile(block, "README.md", "exec"), namespace)
    classifier = namespace["model"].eval()
    pixels_BTCHW = torch.randn(2, 6, 3, 32, 32)
    captured: list[torch.Tensor] = []
    handle = model.encoder.norm.register_forward_pre_hook(lambda _, inputs: captured.append(inputs[0]))
    with torch.no_grad():
        encode(model.encoder, pixels_BTCHW.transpose(1, 2))
        norm = torch.nn.LayerNorm(128)  # fc_norm has torch's eps
        norm.load_state_dict(model.encoder.norm.state_dict())
        expected = classifier.classifier(norm(captured[0].mean(1)))
        handle.remove()
        torch.testing.assert_close(classifier(pixels_BTCHW).logits, expected, atol=1e-5, rtol=0)
        token_0 = transformers.VideoMAEForVideoClassification.from_pretrained(folder).eval()
        features = encode(model.encoder, pixels_BTCHW.transpose(1, 2))
        torch.testing.assert_close(token_0(pixels_BTCHW).logits, token_0.classifier(features[:, 0]), atol=1e-5, rtol=0)


def test_unknown_config_is_called_unknown_in_the_card(tmp_path: Path) -> None:
    model, config = make_run()
    bare = {name: config[name] for name in ("model", "objective")}
    bare["data"] = {"frames": 6, "size": 32, "stride": 4}
    export_state(model.state_dict(), bare, tmp_path / "export")
    card = (tmp_path / "export" / "README.md").read_text()
    for row in ("data", "optimizer steps", "clips seen", "precision", "seed", "started from"):
        assert f"| {row} | unknown |" in card


def write_checkpoint(run_dir: Path, step: int, model: Pretraining, config: dict[str, Any]) -> Path:
    """A real one, as two ranks would save it: every parameter cut in the middle."""
    state = {name: value.detach().flatten() for name, value in model.named_parameters()}
    staging = staging_folder(run_dir, step, 0)
    for rank in (0, 1):
        slices = []
        for name, flat in state.items():
            middle = len(flat) // 2
            start, end = ((0, middle), (middle, len(flat)))[rank]
            slices.append((name, "fp32", start, flat[start:end]))
        write_part(staging, rank, slices)
    facts = Facts(
        step=step,
        optimizer_steps=step,
        attempt=0,
        cursor={},
        config=config,
        shapes={name: list(value.shape) for name, value in model.named_parameters()},
        versions={},
        changes=[],
    )
    parts, _ = read_parts(staging, 2)
    stage(staging, facts, parts, LineageHead("ledger/none.json", "0" * 64))
    return publish(staging, facts.step)


def test_export_of_a_run_takes_its_newest_checkpoint(tmp_path: Path) -> None:
    model, config = make_run()
    older = write_checkpoint(tmp_path / "run", 20, model, config)
    before = model.encoder.norm.bias.detach().clone()
    with torch.no_grad():
        model.encoder.norm.bias += 1
    write_checkpoint(tmp_path / "run", 40, model, config)
    report = export(tmp_path / "run", tmp_path / "export")
    assert report.step == 40
    assert torch.equal(load_encoder(tmp_path / "export").norm.bias, model.encoder.norm.bias)
    report = export(older, tmp_path / "export")
    assert report.step == 20
    assert torch.equal(load_encoder(tmp_path / "export").norm.bias, before)
    assert json.loads(json.dumps(report.to_json()))["step"] == 20
    assert any("features within" in line for line in report.lines())


def test_run_without_checkpoint_says_so(tmp_path: Path) -> None:
    (tmp_path / "run").mkdir()
    with pytest.raises(UserError, match="has no checkpoint"):
        export(tmp_path / "run", tmp_path / "export")
    with pytest.raises(UserError, match="is no folder"):
        export(tmp_path / "nowhere", tmp_path / "export")
    assert not (tmp_path / "export").exists()


def test_config_that_does_not_tell_the_shapes_is_named(tmp_path: Path) -> None:
    model, config = make_run()
    with pytest.raises(UserError, match="stride"):
        export_state(model.state_dict(), {**config, "data": {"frames": 6, "size": 32}}, tmp_path / "export")


@pytest.mark.slow
def test_export_and_load_work_without_deepspeed_and_wandb(tmp_path: Path) -> None:
    model, config = make_run()
    write_checkpoint(tmp_path / "run", 20, model, config)
    code = (
        "import sys\n"
        "sys.modules['deepspeed'] = sys.modules['wandb'] = None\n"
        "from pretrain.export import export\n"
        "from pretrain.load import load_encoder\n"
        "import pretrain.downstream.knn, pretrain.downstream.reconstruct\n"
        f"export({str(tmp_path / 'run')!r}, {str(tmp_path / 'export')!r})\n"
        f"print(sum(p.numel() for p in load_encoder({str(tmp_path / 'export')!r}).parameters()))\n"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert int(done.stdout.split()[-1]) == sum(value.numel() for value in model.encoder.parameters())


def test_folder_without_a_name_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    model, config = make_run()
    (tmp_path / "here").mkdir()
    monkeypatch.chdir(tmp_path / "here")
    for name in (".", "../here", "/", "/.."):
        with pytest.raises(UserError, match="must not be the root or the folder you are in"):
            export_state(model.state_dict(), config, Path(name))
        with pytest.raises(UserError, match="must not be the root or the folder you are in"):
            export(tmp_path, name)


def test_link_to_a_folder_is_followed(tmp_path: Path) -> None:
    model, config = make_run()
    (tmp_path / "disk").mkdir()
    (tmp_path / "export").symlink_to(tmp_path / "disk")
    for _ in range(2):  # the second one replaces the first
        assert export_state(model.state_dict(), config, tmp_path / "export").folder == tmp_path / "export"
        assert (tmp_path / "disk" / "model.safetensors").is_file()
        assert (tmp_path / "export").is_symlink()
    assert {file.name for file in tmp_path.iterdir()} == {"disk", "export"}
