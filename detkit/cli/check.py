"""Read a whole data set and report every problem: detkit check CONFIG.yaml [--anchors N]."""

from typing import Any

from detkit.cli.parser import experiment_help, leading_configs, load_config, take_option, wants_help
from detkit.errors import DetkitError, counted, nearest

OUTCOMES = {"fail": "stops at them", "skip": "skips them", "repair": "repairs or skips them"}


def run(arguments: list[str]) -> None:
    """Check the data of a config.

    Raises:
        DetkitError: the data has problems.
    """
    configs, rest = leading_configs(arguments)
    anchors, rest = take_option(rest, "--anchors")
    if anchors is not None and not (anchors.isdecimal() and int(anchors) > 0):
        raise DetkitError(f"--anchors must be the number of anchors to propose, at least 1, but is '{anchors}'.")
    if wants_help(rest):
        experiment_help("check", "Uses only 'data'; --anchors N, which proposes N anchors for YOLO, also uses 'input'.")
        return
    experiment = load_config(configs, rest, "check")
    if experiment is None:
        return
    from detkit.data.check import check, propose_anchors
    from detkit.registry import heads
    from detkit.tasks.base import task_of

    inner = experiment.data.get("data")  # crops name their files in a nested 'data'
    policy = str((inner if isinstance(inner, dict) else experiment.data).get("broken", "fail"))
    if policy not in OUTCOMES:
        raise DetkitError(f"'data.broken' is '{policy}'. {nearest(policy, OUTCOMES)}")
    head: Any = heads.get(str(experiment.head.get("name")))
    problems = check(experiment.data, head.needs, head.open_set, task_of(head).check_data)
    if anchors is not None:
        propose_anchors(experiment.data, experiment.input, int(anchors))
    if problems:
        raise DetkitError(
            f"{counted(problems, 'problem')} found, listed above. With data.broken = {policy}, as set in "
            f"this config, training {OUTCOMES[policy]}."
        )
