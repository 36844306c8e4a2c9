"""OpenCV's selective search for the benchmark, run by a Python that has opencv-contrib-python and need not have detkit.

python opencv_search.py MODE THREADS: prints a line of JSON with the version; then for each line with the path of an
.npy file, (H, W, 3) uint8 RGB, writes the proposals beside it as .npz, (P, 4) float32 xyxy pixels, best first, and
prints a line with the seconds it took.
"""

import json
import sys
import time

import cv2
import numpy as np


def serve(mode: str, threads: int) -> None:
    """Answer until the input ends."""
    cv2.setNumThreads(threads)
    print(json.dumps({"version": cv2.__version__}), flush=True)
    for line in sys.stdin:
        path = line.strip()
        image = np.ascontiguousarray(np.load(path)[:, :, ::-1])  # OpenCV's own order
        start = time.perf_counter()
        search = cv2.ximgproc.segmentation.createSelectiveSearchSegmentation()  # type: ignore[attr-defined]
        search.setBaseImage(image)
        if mode == "fast":
            search.switchToSelectiveSearchFast()
        else:
            search.switchToSelectiveSearchQuality()
        boxes = search.process()
        seconds = time.perf_counter() - start
        boxes = np.asarray(boxes, dtype=np.float32).reshape(-1, 4)
        boxes[:, 2:] += boxes[:, :2]
        np.savez(path.removesuffix(".npy") + ".npz", boxes=boxes)
        print(json.dumps({"seconds": seconds}), flush=True)


if __name__ == "__main__":
    serve(sys.argv[1], int(sys.argv[2]))
