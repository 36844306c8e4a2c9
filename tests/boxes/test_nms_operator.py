"""`nms` under torch.compile, torch.export and make_fx. No backend here needs a C++ compiler."""

import io

import pytest
import torch
from box_samples import random_boxes
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.export import Dim
from torch.fx.experimental.proxy_tensor import make_fx
from torch.fx.experimental.symbolic_shapes import ShapeEnv
from torch.utils.flop_counter import FlopCounterMode

from detkit.boxes import nms, nms_operator  # noqa: F401  (the latter registers the operator)

SIZES = (40, 9, 2, 1, 0)
OPTIONS = [
    {},
    {"labels": True},
    {"image_index": True, "score_threshold": 0.3},
    {"labels": True, "image_index": True, "score_threshold": 0.3, "max_detections": 4},
]


def sample(count, seed=0):
    """Boxes, scores with ties, labels and images."""
    generator = torch.Generator().manual_seed(seed)
    scores = torch.randint(10, (count,), generator=generator) / 10
    labels = torch.randint(3, (count,), generator=generator)
    return random_boxes(count, seed), scores, labels, torch.randint(2, (count,), generator=generator)


class Suppress(torch.nn.Module):
    """`nms` among other operations, with the options of OPTIONS."""

    def __init__(self, options):
        super().__init__()
        self.options = options

    def forward(self, boxes, scores, labels, images):
        options = dict(self.options)
        if "labels" in options:
            options["labels"] = labels
        if "image_index" in options:
            options["image_index"] = images
        kept = nms(boxes, scores.sqrt(), 0.3, **options)
        return kept, boxes[kept] * 2


class SuppressSelected(torch.nn.Module):
    """Lengths that depend on data, and that no tracer knows to be equal."""

    def forward(self, boxes, scores):
        return nms(boxes[(scores > 0.2).nonzero().flatten()], scores[scores > 0.2], 0.3)


def assert_same(run, module):
    for count in SIZES:
        arguments = sample(count, seed=count)
        for result, expected in zip(run(*arguments), module(*arguments), strict=True):
            assert torch.equal(result, expected)


def node_count(graph):
    return sum(node.target is torch.ops.detkit.nms.default for node in graph.nodes)


@pytest.mark.parametrize("options", OPTIONS)
def test_opcheck(options):
    boxes, scores, labels, images = sample(30)
    arguments = {key: {"labels": labels, "image_index": images}.get(key, value) for key, value in options.items()}
    results = torch.library.opcheck(torch.ops.detkit.nms.default, (boxes.requires_grad_(), scores, 0.3), arguments)
    assert set(results.values()) == {"SUCCESS"}


@pytest.mark.parametrize("options", OPTIONS)
def test_compile_without_a_graph_break(options):
    torch.compiler.reset()
    module = Suppress(options)
    assert_same(torch.compile(module, fullgraph=True, backend="aot_eager"), module)


def test_compile_after_a_mask():
    torch.compiler.reset()
    module = SuppressSelected()
    compiled = torch.compile(module, fullgraph=True, backend="aot_eager")
    for count in SIZES:
        arguments = sample(count, count)[:2]
        assert torch.equal(compiled(*arguments), module(*arguments))


@pytest.mark.parametrize("strict", [True, False])
@pytest.mark.parametrize("options", OPTIONS)
def test_export_with_any_number_of_boxes(options, strict):
    module, count = Suppress(options), {0: Dim("count")}
    program = torch.export.export(module, sample(8), strict=strict, dynamic_shapes=(count,) * 4)
    assert node_count(program.graph) == 1
    assert_same(program.module(), module)
    assert node_count(program.run_decompositions().graph) == 1


@pytest.mark.parametrize("strict", [True, False])
def test_export_after_a_mask_saved_and_read(strict):
    module, count = SuppressSelected(), {0: Dim("count")}
    program, file = (
        torch.export.export(module, sample(8)[:2], strict=strict, dynamic_shapes=(count, count)),
        io.BytesIO(),
    )
    torch.export.save(program, file)
    file.seek(0)
    restored = torch.export.load(file).module()
    for size in SIZES:
        arguments = sample(size, size)[:2]
        assert torch.equal(restored(*arguments), module(*arguments))


@pytest.mark.parametrize("mode", ["real", "fake", "symbolic"])
def test_make_fx(mode):
    module = Suppress(OPTIONS[-1])
    graph = make_fx(module, tracing_mode=mode)(*sample(20))
    assert node_count(graph.graph) == 1
    assert_same(graph, module)


@pytest.mark.filterwarnings("ignore:.*torch.jit.* is deprecated")
def test_jit_trace_holds_no_constant_result():
    module = Suppress(OPTIONS[-1])
    assert_same(torch.jit.trace(module, sample(20), check_trace=False), module)


def test_fake_tensors_have_an_unknown_length_up_to_n():
    with FakeTensorMode(shape_env=ShapeEnv()):
        kept = nms(torch.rand(5, 4), torch.rand(5), 0.5)
        assert kept.dtype == torch.int64
        assert kept.device == torch.device("cpu")
        assert bool(kept.shape[0] <= 5)
        assert bool(kept.shape[0] >= 0)
        with pytest.raises(Exception, match="data-dependent"):
            bool(kept.shape[0] > 4)


def operators_of(call):
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU]) as profile:
        call()
    return {event.name for event in profile.events()}


def test_ordinary_calls_do_not_pass_the_dispatcher():
    boxes, scores = sample(30)[:2]
    assert "detkit::nms" not in operators_of(lambda: nms(boxes, scores, 0.3))
    assert "detkit::nms" in operators_of(lambda: torch.ops.detkit.nms(boxes, scores, 0.3))


def test_parameters_and_modes_have_the_same_result():
    boxes, scores, labels, _ = sample(30)
    expected = nms(boxes, scores, 0.3, labels)
    kept = nms(torch.nn.Parameter(boxes), torch.nn.Parameter(scores), 0.3, labels)
    assert torch.equal(kept, expected)
    assert not kept.requires_grad
    with FlopCounterMode(display=False):
        assert torch.equal(nms(boxes, scores, 0.3, labels), expected)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"iou_threshold": 1.5}, "iou_threshold must be in 0..1, but is 1.5"),
        ({"max_detections": -1}, "max_detections must be 0 or more"),
        ({"boxes": torch.zeros(3, 5)}, r"boxes must be \(N, 4\)"),
        ({"boxes": torch.zeros(3, 4, dtype=torch.int64)}, "boxes must be .* torch.int64"),
        ({"scores": torch.zeros(3, 1)}, r"scores must be \(N,\) of a float dtype"),
        ({"scores": torch.zeros(2)}, "scores must be as long as boxes"),
        ({"labels": torch.zeros(3)}, r"labels must be \(N,\) integers"),
        ({"image_index": torch.zeros(2, dtype=torch.int64)}, "image_index must be as long as boxes"),
    ],
)
def test_wrong_arguments_are_refused_while_tracing(change, message):
    arguments = {"boxes": torch.zeros(3, 4), "scores": torch.zeros(3), "iou_threshold": 0.5, **change}
    mode = FakeTensorMode(shape_env=ShapeEnv())
    arguments = {key: mode.from_tensor(value) if torch.is_tensor(value) else value for key, value in arguments.items()}
    with pytest.raises(ValueError, match=message):
        nms(**arguments)


def test_values_are_checked_when_the_graph_runs():
    torch.compiler.reset()
    boxes, scores = sample(20)[:2]
    compiled = torch.compile(lambda boxes, scores: nms(boxes, scores, 0.3), fullgraph=True, backend="eager")
    compiled(boxes, scores)
    scores[17] = torch.nan
    with pytest.raises(ValueError, match=r"scores\[17\] is nan"):
        compiled(boxes, scores)
