#!/usr/bin/env python3
"""TensorBoard event files: the score, the best and the cost after each experiment, a folder a night.

    pip install tensorboard
    mkdir -p hooks && cp scripts/hooks/tensorboard_events.py hooks/after_experiment
    tensorboard --logdir runs/tensorboard

The driver starts the hook with the `python3` of its PATH, so install the package there.
"""

import json
import sys
from pathlib import Path

from tensorboard.summary import Writer

about = json.load(sys.stdin)
if about["event"] != "after_experiment":
    sys.exit()
one = about["experiment"]
writer = Writer(str(Path(about["folder"]).parent / "tensorboard" / about["tag"]))
if one["n"] == 1:
    writer.add_scalar("best_val_bpb", about["baseline_val_bpb"], 0)
if one["val_bpb"] is not None:
    writer.add_scalar("val_bpb", one["val_bpb"], one["n"])
writer.add_scalar("best_val_bpb", about["best"]["val_bpb"], one["n"])
writer.add_scalar("kept", about["kept"], one["n"])
writer.add_scalar("cost_usd", about["cost_usd"], one["n"])
writer.close()
