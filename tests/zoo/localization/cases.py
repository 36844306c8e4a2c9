"""Localisation and sliding windows in the tests of the core."""

HEAD_MAPS = dict.fromkeys(("localize", "sliding_window"), ((8, 12), (8, 16)))
HEAD_OPTIONS = {
    "localize": [{}, {"box_loss": "smooth_l1"}],
    "sliding_window": [{}, {"windows": [[3, 2]], "width": 16, "positive_fraction": 1.0}],
}

# Backbone, neck and head for raw outputs through ONNX.
BACKBONE = "{name: csp_darknet, width: 0.0625, depth: 0.1}"
EXPORTED = {
    "localize": (BACKBONE, None, "{name: localize}"),
    "sliding_window": (BACKBONE, None, "{name: sliding_window, windows: [[2, 2], [3, 2]], width: 8}"),
}
