"""`launch.container` -> words of the srun line: apptainer for a .sif file, else the --container options of pyxis.

What the ranks need from outside is mounted under its own name: the project, the code of the job, the run folder, and
the local folders that the config names.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from pathlib import Path

from pretrain.config import Config
from shards.errors import UserError


def container_words(config: Config, config_file: Path, env: Mapping[str, str]) -> tuple[list[str], list[str]]:
    """(options of srun, words before the command): empty without a container. Raises `UserError` for a missing file."""
    image = config.launch.container
    if image is None:
        return [], []
    folders = mounted(config, config_file, env)
    if not image.endswith(".sif"):
        mounts = ",".join(f"{folder}:{folder}" for folder in folders)
        return [f"--container-image={image}", f"--container-mounts={mounts}", f"--container-workdir={Path.cwd()}"], []
    if not Path(image).is_file():
        raise UserError(f"launch.container is {image}; it must be a file that all nodes see: give its path")
    has_gpus = any(env.get(name) for name in ("SLURM_JOB_GPUS", "SLURM_GPUS_ON_NODE", "CUDA_VISIBLE_DEVICES"))
    binds = ",".join(map(str, folders))
    return [], ["apptainer", "exec", *["--nv"] * has_gpus, "--bind", binds, "--pwd", str(Path.cwd()), image]


def mounted(config: Config, config_file: Path, env: Mapping[str, str]) -> list[Path]:
    """Local folders that must be there inside, none below another."""
    data = config.data
    named = [
        str(Path.cwd()),
        env.get("TUBELET_CODE", ""),
        config.run.dir,
        str(config_file.parent),
        *(source.url for source in data.sources),
        data.eval_shards or "",
        data.cache.dir if data.cache else "",
        config.train.init_from or "",
        config.checkpoint.mirror or "",
    ]
    folders = {_folder(name) for name in named if name and "://" not in name}
    return _outermost(folders - {Path("/")})


def _folder(name: str) -> Path:
    """The nearest folder that exists: of a brace pattern what precedes it, of a run that has not begun its parent."""
    path = Path(name.partition("{")[0]).resolve()
    return next(folder for folder in (path, *path.parents) if folder.is_dir())


def _outermost(folders: Iterable[Path]) -> list[Path]:
    kept: list[Path] = []
    for folder in sorted(folders, key=lambda folder: len(folder.parts)):
        if not any(folder.is_relative_to(outer) for outer in kept):
            kept.append(folder)
    return kept
