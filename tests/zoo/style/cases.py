"""Style transfer in the tests of the core."""

from detkit.zoo.style.structures import Rendering

HEAD_MAPS = {"style": ((3,), (1,))}
HEAD_OPTIONS = {
    "style": [
        {
            "network": {"name": "vgg11", "layers": ["conv1_1", "conv2_1", "conv3_1"]},
            "content_map": 2,
            "style_maps": [0, 1],
            "style_weights": [1.0, 10.0],
            "width": 4,
            "blocks": 1,
        },
    ]
}


def check_rendering(prediction: Rendering) -> None:
    assert ((prediction.image >= 0) & (prediction.image <= 1)).all()


PREDICTIONS = {"style": (Rendering, check_rendering)}

# A config of the command `style`: what is replaced in it, what is not, and keys that it does not have.
CONFIGS_OF_COMMANDS = {
    "style": (
        {
            "head": {"name": "style", "network": {"name": "vgg11", "layers": ["conv1_1"]}, "style_maps": [0]},
            "steps": 1,
            "size": 32,
        },
        {"content": "a.jpg", "style": "b.jpg"},
        [("head", "network", "weights")],
    )
}
