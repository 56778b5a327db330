#!/usr/bin/env python3
"""A trackio run a night: the score, the best, the verdict and the cost after each experiment. It stays on this machine.

    pip install trackio
    mkdir -p hooks && cp scripts/hooks/track.py hooks/after_experiment
    trackio show --project autoresearch

The driver starts the hook with the `python3` of its PATH, so install the package there.
"""

import json
import sys

import trackio

about = json.load(sys.stdin)
if about["event"] != "after_experiment":
    sys.exit()
one = about["experiment"]
trackio.init(project="autoresearch", name=about["tag"], resume="allow", embed=False)
trackio.log({
    "val_bpb": one["val_bpb"], "best_val_bpb": about["best"]["val_bpb"], "kept": about["kept"], "cost_usd": about["cost_usd"],
    "status": one["status"], "description": one["description"],
}, step=one["n"])
trackio.finish()
