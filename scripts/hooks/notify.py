#!/usr/bin/env python3
"""A desktop notification of every keep. The loop itself runs this file when a night ends, unless hooks/night_end exists.

    mkdir -p hooks && cp scripts/hooks/notify.py hooks/after_experiment
"""

import json
import subprocess
import sys

about = json.load(sys.stdin)
if about["event"] == "after_experiment" and about["experiment"]["status"] != "keep":
    sys.exit()
title = f"autoresearch {about['tag']}"
text = about.get("summary") or f"kept {about['best']['val_bpb']:.4f}: {about['best']['description']}"
if sys.platform == "darwin":  # the words are arguments, so that no description can become a script
    script = ("on run argv", "display notification (item 2 of argv) with title (item 1 of argv)", "end run")
    command = ["osascript", *(word for line in script for word in ("-e", line)), title, text]
else:
    command = ["notify-send", "--app-name=autoresearch", "--", title, text]
subprocess.run(command, check=True)
