"""Weights & Biases beside TensorBoard, for those who use it."""

from __future__ import annotations

import uuid
from collections import defaultdict
from pathlib import Path

import yaml
from detectron2.config import CfgNode
from detectron2.utils.events import EventWriter, get_event_storage


class WandbWriter(EventWriter):
    """Send the scalars and drawings that the other writers write to the project WANDB.PROJECT.

    The run is named after OUTPUT_DIR, where wandb's files go too, and a run that goes on stays the same one. Without a network set
    WANDB_MODE=offline: ``wandb sync`` sends it later.

    Args:
        cfg: the run's config, which is sent along.
        window_size: scalars are medians over this many iterations, as in metrics.json.
    """

    def __init__(self, cfg: CfgNode, window_size: int = 20) -> None:
        import wandb

        self._wandb, self._window_size, self._last_write = wandb, window_size, -1
        output = Path(cfg.OUTPUT_DIR)
        known = output / "wandb_id.txt"
        if not known.is_file():
            known.write_text(uuid.uuid4().hex[:12])
        self._run = wandb.init(
            project=cfg.WANDB.PROJECT,
            name=output.resolve().name,
            dir=str(output),
            id=known.read_text().strip(),
            resume="allow",
            config=yaml.safe_load(cfg.dump()),
        )

    def write(self) -> None:
        storage = get_event_storage()
        rows = defaultdict(dict)
        for name, (value, iteration) in storage.latest_with_smoothing_hint(self._window_size).items():
            if iteration > self._last_write:
                rows[iteration][name] = value
        # TensorBoard's writer takes the images away, so this one comes before it.
        for name, image, iteration in storage._vis_data:
            rows[iteration][name] = self._wandb.Image(image.transpose(1, 2, 0))
        for iteration in sorted(rows):
            self._run.log(rows[iteration], step=iteration)
            self._last_write = max(self._last_write, iteration)

    def close(self) -> None:
        self._run.finish()
