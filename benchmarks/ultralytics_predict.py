"""Ultralytics' predict for the benchmark, run by a Python that has ultralytics and need not have detkit.

python ultralytics_predict.py MODEL SIZE THREADS: prints a line of JSON with the version and the model's FLOPs; then
for each line {"file": PATH, "conf": SCORE} predicts once, from the file to boxes, and prints a line with the
milliseconds on the clock and of the processor, and the number of boxes. MODEL is a network's description that
ultralytics holds, such as yolov8s.yaml; its weights are random.
"""

import json
import os
import sys
import time

os.environ["YOLO_OFFLINE"] = "1"

import cv2
import torch
import ultralytics  # type: ignore[import-not-found]
from ultralytics.utils import torch_utils  # type: ignore[import-not-found]


def serve(name: str, size: int, threads: int) -> None:
    """Answer until the input ends."""
    torch.manual_seed(0)
    network = ultralytics.YOLO(name)
    flops = torch_utils.get_flops(network.model, 640)
    # On its own it takes one thread less than there are cores, and sets that before each prediction.
    torch_utils.NUM_THREADS = threads
    torch.set_num_threads(threads)
    cv2.setNumThreads(threads)
    print(json.dumps({"version": ultralytics.__version__, "gflops": flops}), flush=True)
    for line in sys.stdin:
        asked = json.loads(line)
        clock, processor = time.perf_counter(), time.process_time()
        found = network.predict(asked["file"], imgsz=size, conf=asked["conf"], device="cpu", verbose=False)
        spent = {"ms": 1e3 * (time.perf_counter() - clock), "cpu_ms": 1e3 * (time.process_time() - processor)}
        threads_now = torch.get_num_threads()
        print(json.dumps({**spent, "boxes": len(found[0].boxes), "threads": threads_now}), flush=True)


if __name__ == "__main__":
    serve(sys.argv[1], int(sys.argv[2]), int(sys.argv[3]))
