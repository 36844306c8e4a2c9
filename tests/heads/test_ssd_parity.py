"""detkit's SSD300 against torchvision's own, with random weights and real images."""

from pathlib import Path

import numpy as np
import pytest
import torch
import yaml
from torch import Tensor, nn
from torchvision.models.detection import ssd300_vgg16

from detkit.config import load_experiment
from detkit.errors import CheckpointError
from detkit.inference.predictor import Predictor
from detkit.model import Model, build_model, load_model, load_tensors
from detkit.published.ssd import convert_ssd300_vgg16
from detkit.structures import ClassList, Target


@pytest.fixture(scope="module", params=[0, 1])
def reference(request: pytest.FixtureRequest) -> nn.Module:
    """Torchvision's model with random weights, scaled with its class scores spread out."""
    torch.manual_seed(request.param)
    model = ssd300_vgg16(weights=None, weights_backbone=None, num_classes=91).eval()
    with torch.no_grad():
        for predictor in model.head.classification_head.module_list:
            predictor.weight.mul_(0.1)
            predictor.bias.normal_(0, 1.5)
    return model


def converted(reference: nn.Module) -> Model:
    tensors, experiment, classes = convert_ssd300_vgg16(reference.state_dict())
    model = build_model(experiment, classes)
    load_tensors(model, tensors, "torchvision")
    return model.eval()


def photograph(height: int, width: int, seed: int) -> np.ndarray:
    """An image with structure at every scale, of any size."""
    random = np.random.default_rng(seed)
    coarse = torch.from_numpy(random.random((1, 3, 9, 12), dtype=np.float32))
    smooth = nn.functional.interpolate(coarse, (height, width), mode="bicubic")[0].permute(1, 2, 0).numpy()
    return (np.clip(smooth + random.normal(0, 0.05, smooth.shape), 0, 1) * 255).astype(np.uint8)


@pytest.mark.parametrize("size", [(300, 300), (480, 640), (211, 517)])
def test_same_boxes_labels_and_scores(reference: nn.Module, size: tuple[int, int]) -> None:
    image = photograph(*size, seed=size[1])
    with torch.no_grad():
        expected = reference([torch.from_numpy(image).permute(2, 0, 1).float() / 255])[0]
    found = Predictor(converted(reference), "cpu").predict(image, conf=0.01)
    assert len(found) == len(expected["scores"]) == 200
    assert expected["scores"].std() > 1e-3
    torch.testing.assert_close(found.scores, expected["scores"], rtol=0, atol=1e-4)
    # Scores closer than the tolerance may swap places; compare each detection with its own counterpart.
    for label in expected["labels"].unique():
        mine, theirs = found.boxes[found.labels == label - 1], expected["boxes"][expected["labels"] == label]
        assert mine.shape == theirs.shape
        distance = (mine[:, None] - theirs[None]).abs().amax(-1)
        # 0.001 pixels of the network's input of 300, which are more of a larger image's own.
        tolerance = 1e-3 * max(300, *size) / 300
        assert distance.amin(0).max() < tolerance
        assert distance.amin(1).max() < tolerance


BOXES = torch.tensor([[20.0, 30.0, 120.0, 200.0], [100.0, 90.0, 290.0, 280.0], [5.0, 5.0, 40.0, 30.0]])
LABELS = torch.tensor([3, 17, 60])


def both_losses(reference: nn.Module, targets: list[Target]) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
    """detkit's and torchvision's, of so many copies of one image."""
    model = converted(reference)
    image = torch.from_numpy(photograph(300, 300, 3)).permute(2, 0, 1).float() / 255
    count = len(targets)
    reference.train()
    with torch.no_grad():
        theirs = reference([image] * count, [{"boxes": one.boxes, "labels": one.labels + 1} for one in targets])
    reference.eval()
    with torch.no_grad():
        mine = model.head.loss(model(torch.stack([image] * count), ((300, 300),) * count), tuple(targets))
    return mine, {"box": theirs["bbox_regression"], "class": theirs["classification"]}


def test_same_losses(reference: nn.Module) -> None:
    """Same matching, hard negatives and smooth L1: losses equal torchvision's on the same ground truths."""
    for targets in ([Target(BOXES, LABELS)], [Target(BOXES, LABELS), Target(BOXES[:2], LABELS[1:])]):
        mine, theirs = both_losses(reference, targets)
        torch.testing.assert_close(mine["box"], theirs["box"], rtol=1e-4, atol=1e-5)
        torch.testing.assert_close(mine["class"], theirs["class"], rtol=1e-4, atol=1e-4)


def test_losses_where_images_have_no_object(reference: nn.Module) -> None:
    """To torchvision such an image is nothing; here all of them together count as one negative."""
    mine, theirs = both_losses(reference, [Target(BOXES, LABELS), *[Target.empty()] * 3])
    torch.testing.assert_close(mine["box"], theirs["box"], rtol=1e-4, atol=1e-5)
    assert mine["class"] > theirs["class"]
    torch.testing.assert_close(mine["class"], theirs["class"], rtol=0.1, atol=0)
    alone = []
    for count in (1, 2, 4):
        mine, theirs = both_losses(reference, [Target.empty()] * count)
        assert theirs["class"] == theirs["box"] == mine["box"] == 0
        alone.append(mine["class"])
    assert alone[0] > 0
    torch.testing.assert_close(alone[1:], [alone[0]] * 2)


def test_published_file_loads(reference: nn.Module, tmp_path: object) -> None:
    path = f"{tmp_path}/ssd300_vgg16_coco.pth"
    torch.save(reference.state_dict(), path)
    model = load_model(path)
    assert model.classes.names[0] == "person"
    assert model.classes.raw_ids[16] == 17
    assert model.classes.names[16] == "cat"
    expected: Tensor = reference.state_dict()["head.classification_head.module_list.2.weight"]
    assert torch.equal(model.state_dict()["head.class_predictors.2.weight"], expected)


def test_the_config_trains_the_same_model(reference: nn.Module) -> None:
    _, experiment, classes = convert_ssd300_vgg16(reference.state_dict())
    path = Path(__file__).parents[2] / "configs" / "ssd300_vgg16.yaml"
    config = load_experiment([str(path)], ["--data.root", "/nowhere"])
    mine = build_model(experiment, classes)
    trained = build_model(config, ClassList.from_names(classes.names))
    assert {k: v.shape for k, v in mine.state_dict().items()} == {k: v.shape for k, v in trained.state_dict().items()}
    assert torch.allclose(mine.mean, trained.mean)
    assert torch.allclose(mine.std, trained.std)
    assert config.head["anchors"] == yaml.safe_load(yaml.safe_dump(experiment.head["anchors"]))


def test_another_models_file_is_refused(tmp_path: object) -> None:
    path = f"{tmp_path}/other.pth"
    torch.save({"conv.weight": torch.zeros(1)}, path)
    with pytest.raises(CheckpointError, match=r"other\.pth' is not a torchvision model"):
        load_model(path)
    with pytest.raises(CheckpointError, match=r"There is no checkpoint .*missing\.pth"):
        load_model(f"{tmp_path}/missing.pth")
