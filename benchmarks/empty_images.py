"""Training where nine images in ten have no object: SSD's loss beside torchvision's rule, which leaves such images out.

80 images with three objects and 720 without, SGD, batch 8, 4 epochs, EfficientNet-Lite0 pretrained on ImageNet (the
extra `weights`). Rules: `detkit`, as it is; `torchvision`, no negatives in images without objects; `summed`, detkit's
before 0.2: the negatives of those images in full.

    python benchmarks/empty_images.py --rule detkit --seed 0 --json benchmarks/results/empty_images.json
"""

import argparse
import json
import os
import tempfile
import time
from contextlib import nullcontext
from pathlib import Path
from typing import Any
from unittest import mock

import numpy as np
import torch

from detkit.config import load_experiment
from detkit.data.dataset import DETECTION_FIELDS, Dataset, Problems
from detkit.engine.train import train
from detkit.heads import ssd
from detkit.registry import datasets
from detkit.structures import ClassList, Meta, Sample, Target

SIDE, OBJECTS = 128, 3
CONFIG = """
data: {{name: squares, seed: {seed}}}
backbone: {{name: timm, network: tf_efficientnet_lite0, levels: [2, 3, 4], weights: package}}
neck: {{name: fpn, width: 64, norm: true}}
head: {head}
input: {{size: [128, 128]}}
train: {{epochs: 4, batch_size: 8, workers: 0, optimizer: sgd, lr: {lr}, warmup_epochs: 0.5, validate_every: 4,
  precision: 32-true, seed: {seed}}}
runs: {runs}
"""


ANCHORS = "{{name: pyramid, sizes: [[18.0, 25.0], [36.0, 50.0], {}], ratios: [0.6, 1.0, 1.67]}}"
LEVELS = ANCHORS.format("[72.0, 100.0]")  # as many anchors on each level, which shared layers need
HEADS = {
    "ssd": f"{{name: ssd, anchors: {ANCHORS.format('[72.0]')}}}",
    "retinanet": f"{{name: retinanet, anchors: {LEVELS}}}",
    "yolox": "{name: yolox}",
    "faster_rcnn": f"{{name: faster_rcnn, rpn: {{anchors: {LEVELS}}}}}",
}


@datasets.register("squares")
class Squares(Dataset):
    """Rectangles of one colour on noise; the first images have three each, the others none."""

    def __init__(self, split: str, seed: int = 0) -> None:
        self.classes, self.fields, self.problems = (
            ClassList.from_names(["square"]),
            DETECTION_FIELDS,
            Problems(split, "fail"),
        )
        self.with_objects, self.empty = (80, 720) if split == "train" else (100, 100)
        self.key = [seed, int(split == "train")]

    def __len__(self) -> int:
        return self.with_objects + self.empty

    def _draw(self, index: int) -> tuple[np.random.Generator, list[tuple[int, int, int, int]]]:
        rng = np.random.default_rng([*self.key, index])
        boxes: list[tuple[int, int, int, int]] = []
        while len(boxes) < OBJECTS and index < self.with_objects:
            width, height = rng.integers(SIDE // 8, SIDE // 3, 2)
            left, top = rng.integers(0, SIDE - width), rng.integers(0, SIDE - height)
            box = (left, top, left + width, top + height)
            if all(box[2] <= b[0] or b[2] <= box[0] or box[3] <= b[1] or b[3] <= box[1] for b in boxes):
                boxes.append(box)
        return rng, boxes

    def target(self, index: int) -> Target:
        boxes = torch.tensor(np.array(self._draw(index)[1], dtype=np.float32).reshape(-1, 4))
        return Target(boxes, torch.zeros(len(boxes), dtype=torch.int64))

    def __getitem__(self, index: int) -> Sample:
        rng, boxes = self._draw(index)
        image = rng.integers(60, 150, 3) + rng.normal(0, 12, (SIDE, SIDE, 3))
        for left, top, right, bottom in boxes:
            image[top:bottom, left:right] = rng.integers(0, 255, 3) + rng.normal(0, 12, (bottom - top, right - left, 3))
        meta = Meta(index, f"square {index}", (SIDE, SIDE))
        return Sample(image.clip(0, 255).astype(np.uint8), self.target(index), meta)

    def size(self, index: int) -> tuple[int, int]:
        return SIDE, SIDE


RULES: dict[str, dict[str, Any]] = {
    "detkit": {},
    "torchvision": {"MINIMUM_NEGATIVES": 0},
    "summed": {"weigh_empty_images": lambda losses, positive, negative: losses},
}
"""What is changed in the module of SSD, whose rules these are."""


def run(head: str, rule: str, seed: int, lr: float) -> dict[str, object]:
    """Train once; the scores and the time."""
    with tempfile.TemporaryDirectory() as folder:
        config = Path(folder, "config.yaml")
        config.write_text(CONFIG.format(head=HEADS[head], seed=seed, lr=lr, runs=folder))
        started = time.perf_counter()
        with mock.patch.multiple(ssd, **RULES[rule]) if RULES[rule] else nullcontext():
            found = train(load_experiment([str(config)]))
        assert found is not None
        rows = [line.split(",") for line in found.metrics.read_text().splitlines()]
        last = dict(zip(rows[0], rows[-1]))
    scores = {key: round(float(last[key]), 4) for key in last if key in ("mAP", "mAP50")}
    return {
        "head": head,
        "rule": rule,
        "seed": seed,
        "lr": lr,
        **scores,
        "seconds": round(time.perf_counter() - started),
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--head", choices=tuple(HEADS), default="ssd")
    parser.add_argument("--rule", choices=tuple(RULES), default="detkit", help="of SSD")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--lr", type=float, default=3e-3)
    parser.add_argument("--json", type=Path, help="add the result to those in this file")
    options = parser.parse_args()
    if options.head != "ssd" and options.rule != "detkit":
        parser.error("--rule is for --head ssd")
    result = run(options.head, options.rule, options.seed, options.lr)
    print(result)
    if options.json is not None:
        record = json.loads(options.json.read_text()) if options.json.exists() else {"runs": []}
        with open("/proc/cpuinfo") as file:
            names = [line.split(":")[1].strip() for line in file if line.startswith("model name")]
        record["hardware"] = f"{names[0]}, {os.cpu_count()} cores, torch {torch.__version__}"
        record["runs"].append(result)
        options.json.write_text(json.dumps(record, indent=2) + "\n")


if __name__ == "__main__":
    main()
