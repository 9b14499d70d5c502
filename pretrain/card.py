"""The model card of an export: what the folder is, how to use it, how it was made, what is not known.

Nothing is invented: what the run does not tell is "unknown". The Python blocks are run by a test, as they stand.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, cast
from urllib.parse import urlsplit

UNKNOWN = "unknown"

_HEAD = """---
library_name: transformers
pipeline_tag: video-classification
tags: [video, videomae, self-supervised]
---

# {title}

{what}

It was pretrained without labels and names no classes. Fine-tune it, or take its features.

| input | value |
|---|---|
| frames of a clip | {frames} |
| frame stride in training | {stride} |
| height and width | {size} |
| tubelet | 2 frames x 16 x 16 pixels |
| tokens of a clip | {tokens} |
| pixel values | RGB, 0..255, then ImageNet mean and deviation (both are written out in the processor's file) |

Another number of frames or another size is not supported: the position table is computed from the grid.

## Use

```python
import numpy as np
import torch
from transformers import AutoImageProcessor, VideoMAEModel

folder = "."  # where this file lies
processor = AutoImageProcessor.from_pretrained(folder)
model = VideoMAEModel.from_pretrained(folder).eval()
video = list(np.zeros(({frames}, 240, 320, 3), np.uint8))  # your frames: RGB, uint8
with torch.no_grad():
    tokens = model(**processor(video, return_tensors="pt")).last_hidden_state
features = tokens.mean(1)  # one vector of {width} numbers per clip
```
"""

_CLASSIFY = """
## Classify

`use_mean_pooling` is false here, because the final norm of the encoder is kept. In that state
`VideoMAEForVideoClassification` classifies token 0 alone. Before fine-tuning, set it to true and copy the final
norm into `fc_norm`:

```python
from transformers import VideoMAEForVideoClassification, VideoMAEModel

folder = "."
norm = VideoMAEModel.from_pretrained(folder).layernorm
model = VideoMAEForVideoClassification.from_pretrained(folder, use_mean_pooling=True, num_labels=2)
model.fc_norm.load_state_dict(norm.state_dict())
```
"""

_RECONSTRUCT = """
## Reconstruct

```python
import numpy as np
import torch
from transformers import AutoImageProcessor, VideoMAEForPreTraining

folder = "."
processor = AutoImageProcessor.from_pretrained(folder)
model = VideoMAEForPreTraining.from_pretrained(folder).eval()
video = list(np.zeros(({frames}, {size}, {size}, 3), np.uint8))
hidden = torch.rand(1, {cells}).argsort(1) < {num_hidden}  # {num_hidden} of {cells} cells, the same in every slot
with torch.no_grad():
    output = model(**processor(video, return_tensors="pt"), bool_masked_pos=hidden.repeat(1, {slots}))
print(output.loss)
```

The decoder predicts tubelets normalised by their own mean and deviation, per channel (`norm_pix_loss`).
"""

_NO_DECODER = """
There is no decoder in this folder: the run had no masked-frame objective. `VideoMAEForPreTraining` would start with
a random one.
"""


def write_card(
    *,
    title: str,
    config: Mapping[str, Any],
    architecture: Mapping[str, Any],
    step: int | None,
    differences: Mapping[str, float],
    bias_names: str,
    has_decoder: bool,
) -> str:
    """The text of README.md.

    Args:
        title: Headline.
        config: The run's config, nested, as stored in its checkpoint; may be empty.
        architecture: config.json of the export.
        step: Optimizer step of the checkpoint, None if unknown.
        differences: Largest absolute difference to transformers by what was compared.
        bias_names: Spelling of the q and v biases.
        has_decoder: Whether the decoder is in the folder.
    """
    size, frames = int(architecture["image_size"]), int(architecture["num_frames"])
    cells, slots = (size // 16) ** 2, frames // 2
    data, objective = _section(config, "data"), _section(config, "objective")
    masked = _section(objective, "masked_frame")
    fields = {
        "title": title,
        "frames": frames,
        "size": size,
        "stride": data.get("stride", UNKNOWN),
        "tokens": cells * slots,
        "cells": cells,
        "slots": slots,
        "width": architecture["hidden_size"],
        "num_hidden": int(float(masked.get("mask_ratio", 0.9)) * cells),
        "what": _what(config, has_decoder),
    }
    text = _HEAD.format(**fields) + _CLASSIFY.format(**fields)
    text += _RECONSTRUCT.format(**fields) if has_decoder else _NO_DECODER
    text += "\n## Training\n\n" + _table(_training(config, step))
    text += "\nQuality on any downstream task: not measured here. Biases and limits of the training videos: unknown.\n"
    text += "\n## Checked\n\n" + _checked(differences, bias_names)
    return text


def _what(config: Mapping[str, Any], has_decoder: bool) -> str:
    size = _section(config, "model").get("size", UNKNOWN)
    parts = "encoder and decoder" if has_decoder else "encoder"
    return f"A video Transformer of the VideoMAE family (size: {size}), {parts}, pretrained with tubelet."


def _training(config: Mapping[str, Any], step: int | None) -> list[tuple[str, str]]:
    train, optim, data = (_section(config, name) for name in ("train", "optim", "data"))
    objective = _section(config, "objective")
    batch = train.get("global_batch")
    return [
        ("data", _data_name(data.get("shards"))),
        ("videos, hours, licence of the data", UNKNOWN),
        ("objectives", _objectives(objective)),
        ("optimizer steps", UNKNOWN if step is None else f"{step} of {train.get('steps', UNKNOWN)}"),
        ("clips per step", _text(batch)),
        ("clips seen", UNKNOWN if step is None or batch is None else str(step * int(batch))),
        ("precision", _text(train.get("precision"))),
        ("optimizer", f"{_text(optim.get('name'))}, learning rate {_text(optim.get('lr'))}"),
        ("seed", _text(_section(config, "run").get("seed"))),
        ("started from", "other weights" if train.get("init_from") else "random weights" if train else UNKNOWN),
    ]


def _objectives(objective: Mapping[str, Any]) -> str:
    named: list[str] = []
    for name, section in objective.items():
        if section is not None:
            values = ", ".join(
                f"{key} {value}" for key, value in _section(objective, name).items() if value is not None
            )
            named.append(f"{name} ({values})")
    return "; ".join(named) or UNKNOWN


def _data_name(shards: Any) -> str:
    """Last part of the path only: no user info, no query, no folder names of the machine (C14)."""
    if not shards:
        return UNKNOWN
    name = urlsplit(str(shards)).path.rstrip("/").removesuffix("/manifest.json").rpartition("/")[2]
    return (
        f"a packed data set called `{name}`" if name and name.replace("-", "").replace("_", "").isalnum() else UNKNOWN
    )


def _checked(differences: Mapping[str, float], bias_names: str) -> str:
    lines = [f"- {what}: largest absolute difference {value:.1e}" for what, value in differences.items()]
    spelling = "`query.bias`, `value.bias`" if bias_names == "v5" else "`q_bias`, `v_bias`"
    return (
        "Before this folder was finished, transformers opened it and was compared with the network that was trained, "
        "in fp32, from uint8 frames through the saved processor:\n\n"
        + "\n".join(lines)
        + f"\n\nThe biases of queries and values are called {spelling}. transformers 4 reads only `q_bias`, `v_bias`; "
        "early versions of 5 read only `query.bias`, `value.bias`; 5.23 reads both. "
        '`pretrain.export.export(RUN, FOLDER, biases="v4")` writes the old spelling.\n'
    )


def _section(config: Mapping[str, Any], name: str) -> Mapping[str, Any]:
    section: Any = config.get(name)
    return cast(Mapping[str, Any], section) if isinstance(section, Mapping) else {}


def _text(value: Any) -> str:
    return UNKNOWN if value is None else str(value)


def _table(rows: list[tuple[str, str]]) -> str:
    return "| what | value |\n|---|---|\n" + "".join(
        f"| {name} | {value.replace('|', ' ')} |\n" for name, value in rows
    )
