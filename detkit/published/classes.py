"""The classes of published detectors."""

from detkit.structures import ClassList


def unnamed_classes(count: int, first_raw_id: int = 0) -> ClassList:
    """Create the classes "class 0", "class 1" ... for a model whose file has no names."""
    return ClassList.from_names([f"class {label}" for label in range(count)], first_raw_id)


def coco_classes() -> ClassList:
    """COCO's 90 ids, including unused ones."""
    from torchvision.models.detection import SSD300_VGG16_Weights

    names = SSD300_VGG16_Weights.COCO_V1.meta["categories"][1:]
    # COCO's ids have gaps, for which torchvision's heads have outputs.
    unique = [f"unused {raw_id}" if name == "N/A" else name for raw_id, name in enumerate(names, start=1)]
    return ClassList.from_names(unique, first_raw_id=1)


def coco_classes_without_gaps() -> ClassList:
    """COCO's 80 classes with their raw ids, for models without outputs for unused ids."""
    every = coco_classes()
    used = [(name, raw_id) for name, raw_id in zip(every.names, every.raw_ids) if name != f"unused {raw_id}"]
    return ClassList(tuple(name for name, _ in used), tuple(raw_id for _, raw_id in used))
