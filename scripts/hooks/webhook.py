#!/usr/bin/env python3
"""A message to a chat when a night ends, or of every keep: Slack, Mattermost, Discord and what speaks like them.

    mkdir -p hooks && cp scripts/hooks/webhook.py hooks/night_end
    export AUTORESEARCH_WEBHOOK=https://...    # reaches hooks only: no agent, no training, no log
"""

import json
import os
import sys
import urllib.request

about = json.load(sys.stdin)
if about["event"] == "after_experiment" and about["experiment"]["status"] != "keep":
    sys.exit()
url = os.environ.get("AUTORESEARCH_WEBHOOK")
if not url:
    sys.exit("AUTORESEARCH_WEBHOOK is not set; expected the address of a chat's incoming webhook")
text = about.get("summary") or f"kept {about['best']['val_bpb']:.4f}: {about['best']['description']}"
if about["event"] == "night_end":
    text += f" ({about['text']})"
key = "content" if "discord" in url else "text"
body = json.dumps({key: f"autoresearch {about['tag']}: {text}"}).encode()
urllib.request.urlopen(urllib.request.Request(url, body, {"Content-Type": "application/json"}), timeout=20).close()
