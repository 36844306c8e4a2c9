"""Selective search in the tests of the core."""

STORED_FEATURES = {
    "proposals": (
        *("--backbone", "{name: resnet18, levels: [3]}"),
        *("--head", "{name: fast_rcnn, regions: {trunk: {name: mlp, width: 8}, features: {name: roi_align}}}"),
        *("--proposals", "{name: selective_search}"),
    )
}
