"""Raw outputs of the one-stage heads, with backbone and neck, are the same in ONNX as in torch."""

from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from detkit.model import Model, build_model
from detkit.structures import ClassList

SIZE = (96, 64)
TWO_MAPS = "{name: darknet_tiny, levels: [3, 4], widths: [4, 8, 8, 8, 16, 8, 8]}"
ONE_MAP = "{name: darknet_tiny, levels: [4], widths: [4, 8, 8, 8, 16, 8, 8]}"
FPN = "{name: fpn, width: 8, extra_levels: 1, norm: true}"
CASES = {
    "localize": (ONE_MAP, None, "{name: localize}"),
    "retinanet": (TWO_MAPS, FPN, "{name: retinanet, depth: 1}"),
    "retinanet with norms": (TWO_MAPS, FPN, "{name: retinanet, depth: 2, norm: true, box_loss: giou}"),
    "sliding_window": (TWO_MAPS, None, "{name: sliding_window, windows: [[2, 2], [3, 4]], width: 8}"),
    "yolov1": (ONE_MAP, None, "{name: yolov1, grid: 2, hidden: 16}"),
    "yolov1 of an uneven grid": (ONE_MAP, None, "{name: yolov1, grid: 5, layers: convolution, hidden: 16}"),
    "yolov2": (TWO_MAPS, None, "{name: yolov2, width: 8, passthrough: 4}"),
    "yolov2 as in darknet": (TWO_MAPS, None, "{name: yolov2, width: 8, passthrough: 4, reorg: darknet}"),
    "yolov3": (TWO_MAPS, "{name: yolov3_neck, widths: [8, 8], depths: [1]}", "{name: yolov3, widths: [8, 8]}"),
    "yolox": (
        "{name: csp_darknet, width: 0.0625, depth: 0.1}",
        "{name: pafpn, depth: 0.1}",
        "{name: yolox, l1_weight: 1.0}",
    ),
    "yolox depthwise": (
        "{name: csp_darknet, width: 0.0625, depth: 0.1, depthwise: true}",
        "{name: pafpn, depth: 0.1, depthwise: true}",
        "{name: yolox, depthwise: true}",
    ),
}


class RawOutputs(nn.Module):
    """Of a model for images of one size, the tensors that its head gives."""

    def __init__(self, model: Model) -> None:
        super().__init__()
        self.model = model

    def forward(self, images: Tensor) -> tuple[Tensor, ...]:
        outputs = self.model(images, (SIZE,) * len(images))
        return tuple(item for item in outputs if isinstance(item, Tensor))


def enliven(model: Model) -> None:
    """Weights with which outputs differ from image to image as after training: heads begin with all background."""
    for module in model.modules():
        if isinstance(module, nn.BatchNorm2d):
            nn.init.normal_(module.bias, std=0.5)
            module.running_var.fill_(0.2)  # type: ignore[union-attr]
        elif isinstance(module, (nn.Conv2d, nn.Linear)) and module.bias is not None:  # no norm follows
            nn.init.kaiming_normal_(module.weight)


@pytest.mark.parametrize("case", CASES.values(), ids=CASES)
def test_raw_outputs_export_to_onnx(tiny: Any, case: tuple[str, str | None, str]) -> None:
    for package in ("onnx", "onnxscript"):
        pytest.importorskip(package, reason=f"the extra `export` is not installed: no {package}")
    onnxruntime = pytest.importorskip("onnxruntime", reason="the extra `export` is not installed: no onnxruntime")
    backbone, neck, head = case
    experiment = tiny("--backbone", backbone, "--neck", neck or "null", "--head", head, "--input.size", str(list(SIZE)))
    torch.manual_seed(0)
    model = build_model(experiment, ClassList.from_names(["a", "b", "c"]))
    enliven(model)
    raw = RawOutputs(model).eval()
    images = torch.rand(2, 3, *SIZE) * torch.tensor([1.0, 0.3]).view(2, 1, 1, 1)
    with torch.no_grad():
        expected = raw(images)
    assert 0.05 < (expected[0][0] - expected[0][1]).abs().max() < 100
    program = torch.onnx.export(raw, (images,), dynamo=True, verbose=False)
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = 1
    graph = program.model_proto.SerializeToString()
    session = onnxruntime.InferenceSession(graph, options, providers=["CPUExecutionProvider"])
    found = session.run(None, {session.get_inputs()[0].name: images.numpy()})
    for mine, theirs in zip(found, expected, strict=True):
        np.testing.assert_allclose(mine, theirs.numpy(), rtol=1e-4, atol=1e-4)
