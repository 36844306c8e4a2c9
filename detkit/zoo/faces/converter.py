"""The MTCNN that its authors published, as facenet-pytorch (MIT) ships it, under detkit's names."""

import importlib.util
from collections.abc import Mapping
from pathlib import Path

from torch import Tensor

from detkit.config import Experiment, InputOptions
from detkit.errors import CheckpointError
from detkit.io.tensor_files import read_tensors
from detkit.registry import weight_files
from detkit.structures import ClassList

PREFIX = "mtcnn:"
NETWORKS = ("pnet", "rnet", "onet")
OUTPUTS = {
    **{"conv4_1": "face", "conv4_2": "box"},
    **{"dense5_1": "face", "dense5_2": "box"},
    **{"dense6_1": "face", "dense6_2": "box", "dense6_3": "points"},
}
"""The last layers of the three networks; of the others only the prefix differs."""


@weight_files.register("mtcnn")
class MTCNNFiles:
    """The three files of facenet-pytorch's MTCNN: "mtcnn:" and their folder."""

    def matches(self, source: str) -> bool:
        """Whether the source has the prefix."""
        return source.startswith(PREFIX)

    def read(self, source: str) -> tuple[dict[str, Tensor], Experiment, ClassList]:
        """See `mtcnn_files` and `convert_mtcnn`."""
        return convert_mtcnn({name: read_tensors(path) for name, path in mtcnn_files(source).items()})


def mtcnn_files(source: str) -> dict[str, Path]:
    """The file of each network.

    Args:
        source: "mtcnn:" and a folder with pnet.pt, rnet.pt and onet.pt; "mtcnn:" alone is that of the package
            facenet-pytorch, where it is installed.

    Raises:
        CheckpointError: a file is missing.
    """
    given = source.removeprefix(PREFIX)
    if given:
        folder = Path(given).expanduser()
    else:
        package = importlib.util.find_spec("facenet_pytorch")
        if package is None or package.origin is None:
            raise CheckpointError(
                f"'{PREFIX}' alone reads the weights that the package facenet-pytorch ships, but it is not installed. "
                f"`pip install --no-deps facenet-pytorch` (it wants an older PyTorch than detkit, hence --no-deps), or "
                f"give a folder with {', '.join(f'{name}.pt' for name in NETWORKS)}: '{PREFIX}FOLDER'."
            )
        folder = Path(package.origin).parent / "data"
    files = {name: folder / f"{name}.pt" for name in NETWORKS}
    for path in files.values():
        if not path.is_file():
            raise CheckpointError(
                f"There is no '{path}'. '{PREFIX}FOLDER' needs pnet.pt, rnet.pt and onet.pt, as in the folder data of "
                "the package facenet-pytorch."
            )
    return files


def convert_mtcnn(states: Mapping[str, Mapping[str, Tensor]]) -> tuple[dict[str, Tensor], Experiment, ClassList]:
    """Tensors, experiment and classes of the published networks.

    Args:
        states: the state dict of each of NETWORKS.
    """
    tensors = {
        f"head.{network}.{_renamed(name)}": tensor for network in states for name, tensor in states[network].items()
    }
    # configs/mtcnn_faces.yaml trains the same model.
    experiment = Experiment(
        data={"name": "coco"},
        backbone={"name": "pixels"},
        head={"name": "mtcnn"},
        input=InputOptions((48, 48), "crop"),
        name="mtcnn",
    )
    return tensors, experiment, ClassList.from_names(["face"])


def _renamed(name: str) -> str:
    layer, _, kind = name.partition(".")
    return f"{OUTPUTS[layer]}.{kind}" if layer in OUTPUTS else f"trunk.{name}"
