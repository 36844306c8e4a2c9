"""SegNet in the tests of the core."""

HEAD_MAPS = {"unpool": ((3,), (1,))}
HEAD_OPTIONS = {
    "unpool": [
        {"encoder": {"name": "vgg11", "batch_norm": True, "levels": [2]}},
        {"encoder": {"name": "vgg11", "levels": [3]}, "class_weights": [1.0, 2.0, 0.5]},
    ]
}
