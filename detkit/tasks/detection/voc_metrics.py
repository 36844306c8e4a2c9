"""Average precision as the PASCAL VOC challenge computes it, at one IoU threshold.

Source: Everingham et al. 2010, "The PASCAL Visual Object Classes (VOC) Challenge", section 4.2, and VOCevaldet.m of
its development kit. A detection looks only at the ground truth of its class that it overlaps most:

    overlap < threshold                         a false positive
    that ground truth is difficult                     neither, and no matter how many detections fall on it
    that ground truth is free                          a true positive, which takes the ground truth
    a better-scored detection has taken it      a false positive, even where another ground truth is free

The kit's boxes are inclusive pixel indices, so it adds 1 to every width and height; detkit's have exclusive edges as
floats, so there is nothing to add. With boxes read from VOC XML (1 subtracted from xmin and ymin only) both agree.
"""

import numpy as np
import torch

from detkit.boxes.iou import pairwise_iou
from detkit.structures import Detections, Target


def match(detections: Detections, target: Target, iou_threshold: float = 0.5) -> tuple[np.ndarray, np.ndarray]:
    """Which detections of one image are right, and which do not count; all classes at once.

    Args:
        detections: N detections in any order; those of equal score rank in the order given.
        target: the ground truth, in the same pixels. Its difficult objects and crowd regions do not count.
        iou_threshold: a detection that overlaps a ground truth by this much, or more, is on it.

    Returns:
        Two (N,) bool arrays in the order of `detections`: true positive, and ignored. The rest are false positives.
    """
    true_positive = np.zeros(len(detections), dtype=bool)
    ignored = np.zeros(len(detections), dtype=bool)
    if not len(detections) or not len(target):
        return true_positive, ignored
    # float64: an overlap of exactly the threshold must not depend on rounding.
    overlap = pairwise_iou(detections.boxes.double(), target.boxes.double())
    overlap[detections.labels[:, None] != target.labels[None]] = -1
    overlaps = overlap.numpy()
    best = overlaps.argmax(1)
    on_target = overlaps.max(1) >= iou_threshold
    ignored = on_target & target.ignored.numpy()[best]

    by_score = np.argsort(-detections.scores.numpy(), kind="stable")
    candidates = by_score[(on_target & ~ignored)[by_score]]
    _, first = np.unique(best[candidates], return_index=True)
    true_positive[candidates[first]] = True
    return true_positive, ignored


def average_precision(scores: np.ndarray, true_positive: np.ndarray, targets: int) -> tuple[float, float]:
    """Average precision of one class over a whole data set.

    Args:
        scores: (N,) of every detection that counts; equal scores rank in the order given, as in the kit.
        true_positive: (N,) bool.
        targets: how many objects there are to find; difficult ones do not count.

    Returns:
        (eleven, area): the mean of the best precision at recall >= 0, 0.1 ... 1 (VOC 2007), and the area under
        precision made monotone (VOC 2010 on). Both nan where there is nothing to find.
    """
    if targets == 0:
        return float("nan"), float("nan")
    order = np.argsort(-scores, kind="stable")
    found = np.cumsum(true_positive[order])
    recall = found / targets
    precision = found / np.arange(1, len(order) + 1)
    # best[i]: the highest precision at recall[i] or beyond; the 0 at the end stands for recalls never reached.
    best = np.append(np.maximum.accumulate(precision[::-1])[::-1], 0.0)
    # k / 10 is the nearest float to each level, as 3 found of 10 is to 0.3; arange(0, 1.1, 0.1) overshoots at 0.3.
    eleven = best[np.searchsorted(recall, np.arange(11) / 10)].mean()
    area = np.sum(np.diff(recall, prepend=0.0) * best[:-1])
    return float(eleven), float(area)


def voc_average_precisions(
    detections: list[Detections], targets: list[Target], num_classes: int, iou_threshold: float = 0.5
) -> tuple[np.ndarray, np.ndarray]:
    """VOC average precision of every class.

    Args:
        detections: one for each image.
        targets: one for each image, in the same pixels.
        num_classes: C; every label is below it.
        iou_threshold: see `match`.

    Returns: Two (C,) float64 arrays, the 11-point and the area form of `average_precision`; nan for a class without
        ground truths.
    """
    matches = [match(found, target, iou_threshold) for found, target in zip(detections, targets)]
    true_positive = np.concatenate([right for right, _ in matches] or [np.zeros(0, dtype=bool)])
    counts = ~np.concatenate([ignored for _, ignored in matches] or [np.zeros(0, dtype=bool)])
    scores = torch.cat([torch.zeros(0), *(found.scores for found in detections)]).numpy()
    labels = torch.cat([torch.zeros(0, dtype=torch.int64), *(found.labels for found in detections)]).numpy()
    ground_truths = np.zeros(num_classes, dtype=np.int64)
    for target in targets:
        ground_truths += np.bincount(target.labels[~target.ignored].numpy(), minlength=num_classes)
    rows = []
    for label in range(num_classes):
        of_class = (labels == label) & counts
        rows.append(average_precision(scores[of_class], true_positive[of_class], int(ground_truths[label])))
    eleven, area = np.array(rows, dtype=np.float64).reshape(num_classes, 2).T
    return eleven, area
