"""Train a model, evaluate it and draw predictions: detkit train CONFIG.yaml [--train.epochs 50 ...]."""

import json

from detkit.cli.parser import experiment_help, leading_configs, load_config, take_option, wants_help
from detkit.errors import DetkitError
from detkit.io.terminal import Console


def run(arguments: list[str]) -> None:
    """Train a model and print the scores of the best epoch."""
    configs, rest = leading_configs(arguments)
    resume, rest = take_option(rest, "--resume")
    if resume == "":
        raise DetkitError("--resume needs a run folder, but got an empty string. Is a variable unset?")
    if resume is not None and not configs:
        configs = [f"{resume}/config.yaml"]
    if wants_help(rest):
        experiment_help("train", "--resume RUN continues an unfinished run, a folder runs/<task>/<name>.")
        return
    experiment = load_config(configs, rest, "train")
    if experiment is None:
        return
    from detkit.engine.train import train

    folder = train(experiment, resume)
    if folder is None:
        return
    console = Console()
    console.print(f"best checkpoint: {folder.best}\nimages:          {folder.images}")
    if folder.best_scores is not None:
        console.print(folder.best_scores.table())
        return
    from detkit.cli.eval import run as evaluate

    # The data may have moved since the checkpoint was written, if the run was resumed.
    evaluate([str(folder.best), "--data", json.dumps(experiment.data)])
