"""Historic classifiers in the tests of the core."""

BACKBONE_OPTIONS = {
    "alexnet": [{"levels": [2, 3, 4, 5]}],
    "nin": [{"levels": [1, 2, 3]}],
    "googlenet": [{}, {"levels": ["conv3", "inception4a"]}],
    "densenet121": [{"levels": [2, 3]}, {"levels": [5]}],
}
LESS_PADDED = dict.fromkeys(("alexnet", "lenet", "nin"), "convolutions with little padding or none")

# Networks of torchvision that are converted as complete classifiers, and options of theirs.
CLASSIFIERS = {
    "alexnet": {},
    "googlenet": {"init_weights": False, "transform_input": True},
    "densenet121": {},
}
WITH_IMAGENET_WEIGHTS = dict.fromkeys(("alexnet", "googlenet", "densenet121"), True)
