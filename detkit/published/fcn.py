"""Conversion of torchvision's fcn_resnet50 and fcn_resnet101."""

from collections.abc import Mapping

from torch import Tensor

from detkit.config import Experiment, InputOptions
from detkit.data.formats.semantic_masks import VOC_NAMES
from detkit.data.semantic import BACKGROUND
from detkit.errors import CheckpointError
from detkit.published.classes import unnamed_classes
from detkit.published.names import count_rows, renamed
from detkit.registry import weight_converters
from detkit.structures import ClassList

NAMES = (
    (r"backbone\.(.+)", r"backbone.\1"),
    (r"classifier\.(.+)", r"head.classifier.\1"),
    (r"aux_classifier\.(.+)", r"head.auxiliary.\1"),
)
THIRD_LAYERS = {6: "resnet50", 23: "resnet101"}
"""Network by number of blocks of the third layer."""
SHORT_SIDE, LONG_SIDE = 520, 2080
"""Torchvision scales the shorter side to 520 and does not limit the longer one."""


@weight_converters.register("classifier.1.running_mean")
def convert_fcn(state: Mapping[str, Tensor]) -> tuple[dict[str, Tensor], Experiment, ClassList]:
    """Convert torchvision's `fcn_resnet50` or `fcn_resnet101`; the published ones have VOC's 20 classes and background.

    Raises:
        CheckpointError: a tensor is unknown or missing.
    """
    tensors = {renamed(name, NAMES, "fcn_resnet50 or fcn_resnet101"): tensor for name, tensor in state.items()}
    count = count_rows(state, "classifier.4", "torchvision's FCN")
    blocks = len({name.split(".")[2] for name in state if name.startswith("backbone.layer3.")})
    if blocks not in THIRD_LAYERS:
        raise CheckpointError(
            f"The state dict is not torchvision's FCN: its backbone.layer3 has {blocks} blocks, but ResNet-50 has 6 "
            f"and ResNet-101 has 23."
        )
    # The model of configs/fcn_resnet50.yaml.
    head = {"name": "dilated_fcn", **({} if "aux_classifier.4.bias" in state else {"auxiliary_weight": 0.0})}
    experiment = Experiment(
        data={"name": "voc_segmentation"},
        backbone={"name": THIRD_LAYERS[blocks], "levels": [4, 5], "output_stride": 8},
        head=head,
        input=InputOptions((SHORT_SIDE, LONG_SIDE), "short_side"),
        name=f"fcn_{THIRD_LAYERS[blocks]}",
    )
    names = (BACKGROUND, *VOC_NAMES)
    return tensors, experiment, ClassList.from_names(names) if count == len(names) else unnamed_classes(count)
