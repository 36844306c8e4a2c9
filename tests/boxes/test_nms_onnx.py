"""The ONNX graph of `nms`, run by onnxruntime on the CPU, equals `nms` in indices and order."""

import numpy as np
import pytest
import torch
from box_samples import DEGENERATE, random_boxes

from detkit.boxes import decode, nms
from detkit.boxes.nms_onnx import _round_down, translation_table

for package in ("onnx", "onnxscript"):
    pytest.importorskip(package, reason=f"the extra `export` is not installed: no {package}")
onnxruntime = pytest.importorskip("onnxruntime", reason="the extra `export` is not installed: no onnxruntime")

pytestmark = pytest.mark.filterwarnings("ignore:# The axis name.*will not be used")


class Suppress(torch.nn.Module):
    """One `nms` for each of the given options: an export takes long, and so one serves for many."""

    def __init__(self, *options, by_label=False, by_image=False):
        super().__init__()
        self.by_label, self.by_image = by_label, by_image
        self.options = [{"iou_threshold": 0.3, **each} for each in options]

    def forward(self, boxes, scores, labels, images):
        labels, images = labels if self.by_label else None, images if self.by_image else None
        return [nms(boxes, scores, labels=labels, image_index=images, **options) for options in self.options]


class Detector(torch.nn.Module):
    """What follows a network: offsets and logits of N anchors become boxes, scores and labels."""

    def forward(self, offsets, anchors, logits):
        boxes = decode(offsets, anchors)
        scores, labels = logits.sigmoid().max(dim=1)
        kept = nms(boxes, scores, 0.5, labels, score_threshold=0.2, max_detections=50)
        return boxes[kept], scores[kept], labels[kept]


def sample(count, seed=0, whole=False, steps=10):
    """Boxes, scores of which many are equal and some are just a tenth, and labels and images far from 0."""
    generator = torch.Generator().manual_seed(seed)
    scores = torch.randint(-1, steps, (count,), generator=generator) / 10
    labels = torch.randint(-2, 3, (count,), generator=generator) * 2**40
    images = torch.randint(5, 8, (count,), generator=generator)
    return random_boxes(count, seed, whole=whole), scores, labels, images


def session_of(module, arguments):
    """The module as ONNX, for any number of boxes."""
    program = torch.onnx.export(
        module.eval(),
        arguments,
        dynamo=True,
        custom_translation_table=translation_table(),
        dynamic_shapes=({0: torch.export.Dim("count")},) * len(arguments),
        verbose=False,
    )
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = 1
    model = program.model_proto.SerializeToString()
    return onnxruntime.InferenceSession(model, options, providers=["CPUExecutionProvider"])


def run(session, names, arguments):
    """Its outputs as tensors; arguments that the graph does not use are left out of it."""
    values = {name: value.numpy() for name, value in zip(names, arguments, strict=True)}
    used = [argument.name for argument in session.get_inputs()]
    return [torch.from_numpy(output) for output in session.run(None, {name: values[name] for name in used})]


def assert_equal(module, samples):
    session = session_of(module, samples[0])
    for arguments in samples:
        results = run(session, ("boxes", "scores", "labels", "images"), arguments)
        for kept, expected, options in zip(results, module(*arguments), module.options, strict=True):
            assert kept.dtype == torch.int64
            assert kept.tolist() == expected.tolist(), options


@pytest.mark.parametrize(("by_label", "by_image"), [(False, False), (True, False), (False, True), (True, True)])
def test_equals_nms(by_label, by_image):
    module = Suppress(
        {},
        {"score_threshold": 0.1},
        {"max_detections": 4},
        {"score_threshold": 0.3, "max_detections": 2},
        {"max_detections": 0},
        by_label=by_label,
        by_image=by_image,
    )
    assert_equal(module, [sample(count, seed) for count in (9, 0, 1, 2, 40, 150) for seed in range(6)])


def test_overlaps_at_the_threshold():
    samples = [sample(100, seed, whole=True) for seed in range(30)]
    for scale in (1e-23, 1e18):  # areas are subnormal numbers, or overflow to infinity
        samples += [(boxes * scale, *others) for boxes, *others in samples[:10]]
    thresholds = (0.0, 1e-30, 0.1, 0.3, 1 / 3, 0.5, 1.0)
    assert_equal(Suppress(*({"iou_threshold": threshold} for threshold in thresholds)), samples)


def test_scores_at_the_threshold():
    thresholds = (-0.1, -1e-50, 0.0, 0.1, 0.3, 0.7, 2.0)
    module = Suppress(*({"score_threshold": threshold} for threshold in thresholds))
    assert_equal(module, [sample(50, seed) for seed in range(10)])


@pytest.mark.parametrize("dtype", [torch.float16, torch.float64])
def test_dtypes(dtype):
    def convert(boxes, scores, labels, images):
        # differences that only float64 holds, and scores that are just the threshold there
        scores = torch.where(torch.arange(len(scores)) % 3 == 0, 0.1, scores.double() + boxes[:, 0].double() * 1e-11)
        return boxes.to(dtype), scores.to(dtype), labels.sign().int(), images.to(torch.uint8)

    module = Suppress({"score_threshold": 0.1, "max_detections": 5}, by_label=True, by_image=True)
    assert_equal(module, [convert(*sample(count, count)) for count in range(50, 0, -1)])


def test_as_many_groups_as_boxes():
    boxes, scores, _, images = sample(200, 3)
    assert_equal(Suppress({}, by_label=True, by_image=True), [(boxes, scores, torch.arange(200), images)])


def test_detector():
    def arguments(count, seed):
        generator = torch.Generator().manual_seed(seed)
        offsets = torch.randn(count, 4, generator=generator)
        return offsets, random_boxes(count, seed), torch.randn(count, 5, generator=generator)

    module = Detector()
    session = session_of(module, arguments(7, 0))
    for count in (0, 1, 7, 60, 300):
        given = arguments(count, count)
        boxes, scores, labels = run(session, ("offsets", "anchors", "logits"), given)
        expected = module(*given)
        assert torch.equal(labels, expected[2])
        torch.testing.assert_close((boxes, scores), expected[:2])


def test_boxes_without_area_and_with_swapped_corners():
    samples = []
    for seed in range(20):
        boxes = torch.cat((DEGENERATE, DEGENERATE, random_boxes(20, seed), random_boxes(20, seed)[:, [2, 3, 0, 1]]))
        samples.append((boxes, *sample(len(boxes), seed)[1:]))
    assert_equal(Suppress({"iou_threshold": 0.0}, {"iou_threshold": 0.5}), samples)


def test_only_standard_operators():
    program = torch.onnx.export(
        Suppress({"score_threshold": 0.1, "max_detections": 5}, by_label=True, by_image=True).eval(),
        sample(9),
        dynamo=True,
        custom_translation_table=translation_table(),
        opset_version=18,
        verbose=False,
    )
    assert {(opset.domain, opset.version) for opset in program.model_proto.opset_import} == {("", 18)}
    assert {node.domain for node in program.model_proto.graph.node} == {""}
    assert not program.model_proto.functions


def test_without_the_table_the_export_is_refused():
    with pytest.raises(torch.onnx.OnnxExporterError, match=r"detkit\.nms"):
        torch.onnx.export(Suppress({}).eval(), sample(9), dynamo=True, verbose=False)


def test_thresholds_are_rounded_down():
    for threshold in (0.1, 0.3, 1 / 3, 0.5, 0.7, 1.0, 0.0, 1e-50, -0.1, -1e-50, -0.5):
        rounded = _round_down(threshold)
        assert rounded == np.float32(rounded)
        assert rounded <= threshold < float(np.nextafter(np.float32(rounded), np.float32(np.inf)))
