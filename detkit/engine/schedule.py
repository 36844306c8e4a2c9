"""Learning-rate schedules."""

import bisect
import math

from detkit.config import TrainOptions


def learning_rate_factor(step: int, steps_per_epoch: int, options: TrainOptions) -> float:
    """Return the learning rate of optimiser step `step` (from 0) as a multiple of its peak.

    It rises linearly over `warmup_epochs` and then follows `schedule`, with epochs counted from the start of training:
    step and exponential multiply by gamma, inverse_time is 1 / (1 + gamma * epoch), cosine is half a cosine from the
    end of the warm-up to `final_lr_factor` at the last step (Loshchilov and Hutter 2017).
    """
    warmup_steps = round(options.warmup_epochs * steps_per_epoch)
    if step < warmup_steps:
        return (step + 1) / (warmup_steps + 1)
    epoch = step / steps_per_epoch
    match options.schedule:
        case "constant":
            return 1.0
        case "step":
            return options.gamma ** bisect.bisect_right(options.milestones, epoch)
        case "exponential":
            return options.gamma**epoch
        case "inverse_time":
            return 1.0 / (1.0 + options.gamma * epoch)
        case "cosine":
            remaining = max(1, options.epochs * steps_per_epoch - 1 - warmup_steps)
            progress = min(1.0, (step - warmup_steps) / remaining)
            return options.final_lr_factor + (1 - options.final_lr_factor) * (1 + math.cos(math.pi * progress)) / 2
