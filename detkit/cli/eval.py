"""Evaluate a checkpoint on validation data: detkit eval RUN [--data.root PATH ...]."""

from pathlib import Path

from detkit.cli.parser import take_option, wants_help
from detkit.errors import DetkitError, nearest
from detkit.io.terminal import Console

HELP = """usage: detkit eval RUN_OR_CHECKPOINT [--OPTION VALUE ...]

  --data.root PATH         evaluate on other data; accepts any option of data, or a complete --data '{...}'
  --data.val SPLIT         name of the validation split in this data
  --proposals '{...}'      for heads that need proposals, as in a config: '{name: file, path: FILE}'
  --precision PRECISION    auto, fp32, bf16 or fp16: evaluate the network as `detkit infer --precision` runs it;
                           default: the network as trained, in fp32
  --save-json FILE         write the predictions, with the data set's own ids
  --device DEVICE          auto, cpu, cuda or mps; default as in training
  --train.max_dets N       detections per class and image that the COCO metrics count; default 100
  --train.batch_size N     batch size; default as in training
  --train.workers N        number of processes that read images; default as in training"""
PARTS = frozenset({"data", "proposals"})
KEYS = frozenset({"train.batch_size", "train.workers", "train.device", "train.max_dets"})


def run(arguments: list[str]) -> None:
    """Evaluate, print the scores and, with --save-json, write the predictions."""
    if wants_help(arguments) or not arguments or arguments[0].startswith("--"):
        Console().print(HELP)
        if not wants_help(arguments):
            raise DetkitError(
                "detkit eval needs a run folder (runs/detect/quickstart) or a checkpoint file as its first argument."
            )
        return
    save_json, rest = take_option(arguments[1:], "--save-json")
    precision, rest = take_option(rest, "--precision")
    device, rest = take_option(rest, "--device")
    if device is not None:
        rest += ["--train.device", device]
    _check_overrides(rest)

    from detkit.inference.paths import check_results_file
    from detkit.io.runs import resolve_checkpoint

    path = resolve_checkpoint(arguments[0])  # before the slow imports
    if save_json is not None:
        check_results_file(Path(save_json))
    _evaluate(path, rest, save_json, precision)


def _check_overrides(arguments: list[str]) -> None:
    for argument in arguments:
        key = argument[2:].split("=")[0]
        if argument.startswith("--") and key.partition(".")[0] not in PARTS and key not in KEYS:
            raise DetkitError(
                f"'{argument}' cannot be changed in an evaluation, since the checkpoint defines the model. "
                f"{nearest(key, {'data.*', 'proposals.*', 'save-json', 'precision', 'device', *KEYS})}"
            )


def _evaluate(path: str, overrides: list[str], save_json: str | None, precision: str | None) -> None:
    import torch

    from detkit.config import experiment_to_dict, load_experiment
    from detkit.data.dataset_wrapper import in_order
    from detkit.data.proposals.dataset import check_needed, with_proposals, without_new_cache
    from detkit.data.splits import open_split
    from detkit.engine.evaluate import evaluate
    from detkit.engine.malloc import keep_freed_memory
    from detkit.inference.predictor import to_device
    from detkit.io.files import write_json
    from detkit.model import check_classes, load_model
    from detkit.tasks.base import task_of

    model = load_model(path)
    base = experiment_to_dict(model.experiment)
    base["proposals"] = without_new_cache(base["proposals"])
    experiment = load_experiment([], overrides, base=base)
    check_needed(experiment.proposals, model.head.needs, str(experiment.head["name"]))
    dataset = in_order(open_split(experiment.data, "val", model.head.needs), model.classes.names)
    if not model.head.open_set:
        check_classes(model.classes, dataset.classes, path)
    dataset = with_proposals(dataset, experiment.proposals, str(experiment.data.get("val", "val")), "validation")
    options = experiment.train
    console = Console()
    model = to_device(model, options.device).eval().to(memory_format=torch.channels_last)
    if next(model.parameters()).device.type == "cpu":
        keep_freed_memory()
    network, choices = None, f"{next(model.parameters()).device}, fp32"
    if precision is not None:
        from detkit.inference.optimization import FastNetwork

        network = FastNetwork(model, precision)  # type: ignore[arg-type]  # FastNetwork validates it
        choices = network.choices
    console.print(f"runs on    {choices}")
    batch_size = max(1, options.batch_size // (options.accumulate * options.devices))
    found = evaluate(
        model, dataset, batch_size=batch_size, workers=options.workers, network=network, max_dets=options.max_dets
    )
    console.print(f"{path} on {len(dataset)} images; {dataset.problems.summary()}")
    console.print(found.scores.table())
    if save_json is not None:
        write_json(save_json, found.results)
        console.print(f"{len(found.results)} {task_of(model.head).noun} -> {save_json}")
