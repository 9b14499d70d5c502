"""Every shipped config loads without a problem, is documented, and says where its numbers come from."""

from __future__ import annotations

from pathlib import Path

import pytest

from pretrain.config import load_config
from pretrain.geometry import allowed_counts
from pretrain.model.sizes import SIZES, Grid

ROOT = Path(__file__).resolve().parents[1]
CONFIGS = sorted((ROOT / "configs").glob("*.yaml"))


def test_the_configs_the_readme_names_exist() -> None:
    names = {file.stem for file in CONFIGS}
    assert {"demo", "laptop", "single_gpu", "vit_base_k400", "vit_large_k400"} <= names


@pytest.mark.parametrize("file", CONFIGS, ids=lambda file: file.stem)
def test_config_is_sound(file: Path) -> None:
    config = load_config(file)
    assert config.run.dir == f"runs/{file.stem}"
    assert config.model.size in SIZES
    grid = Grid.of(config.data.frames, config.data.size)
    masked = config.objective.masked_frame
    assert masked is not None, "an export needs the decoder of masked_frame"
    assert allowed_counts(grid.slots, grid.cells, masked.mask_ratio, masked.num_frames_masked)


@pytest.mark.parametrize("file", CONFIGS, ids=lambda file: file.stem)
def test_config_says_why_and_what_to_expect(file: Path) -> None:
    header = [line for line in file.read_text().splitlines() if line.startswith("#")]
    for word in ("Why", "Command", "Hardware", "Hours", "Expected"):
        lines = [line for line in header if line.removeprefix("#").split(maxsplit=1)[:1] == [word]]
        assert len(lines) == 1, f"{file.name} needs one header line '# {word} …'"
        assert len(lines[0].split()) > 2, f"{file.name}: '{word}' is empty"


@pytest.mark.parametrize("file", CONFIGS, ids=lambda file: file.stem)
def test_only_the_published_recipe_is_called_so(file: Path) -> None:
    objective = load_config(file).objective
    assert objective.masked_frame is not None
    is_published = objective.frame_order is None and objective.masked_frame.num_frames_masked == (0,)
    assert ("published recipe" in file.read_text().replace("VideoMAE ", "").lower()) == is_published


@pytest.mark.parametrize(("name", "epochs"), [("vit_base_k400", 1600), ("vit_large_k400", 1600)])
def test_published_recipe(name: str, epochs: int) -> None:
    """VideoMAE (Tong et al. 2022, appendix): lr 1.5e-4 x batch / 256, batch 2048, 40 epochs of warm-up."""
    config = load_config(ROOT / "configs" / f"{name}.yaml")
    num_videos = 240_000
    assert config.train.steps * config.train.global_batch == num_videos * epochs
    assert config.optim.lr == pytest.approx(1.5e-4 * config.train.global_batch / 256)
    assert config.schedule.final_lr == pytest.approx(1e-5 * config.train.global_batch / 256)
    assert config.optim.betas == (0.9, 0.95)
    assert config.optim.weight_decay == 0.05
    assert config.schedule.warmup_steps == round(40 * num_videos / config.train.global_batch + 0.5)
    assert config.objective.masked_frame is not None
    assert (config.objective.masked_frame.mask_ratio, config.objective.masked_frame.num_frames_masked) == (0.9, (0,))
    assert config.objective.frame_order is None
    assert (config.data.frames, config.data.stride, config.data.size, config.data.flip) == (16, 4, 224, False)
