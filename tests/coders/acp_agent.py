"""A scripted agent that speaks the Agent Client Protocol on standard input and output, written from the protocol's pages.

    acp_agent.py SCENARIO...      what it does in its turn, one after the other
"""

from __future__ import annotations

import json
import os
import sys
import time
from pathlib import Path
from typing import Any

USED = {"totalTokens": 1100, "inputTokens": 700, "outputTokens": 40, "thoughtTokens": 10, "cachedReadTokens": 350}
MODELS = [{"value": "small", "name": "Small"}, {"value": "large", "name": "Large"}]
scenario = sys.argv[1:]
answers: dict[str, Any] = {"permission": [], "errors": []}
count = 0


def send(**message: Any) -> None:
    print(json.dumps({"jsonrpc": "2.0", **message}), flush=True)


def receive() -> dict[str, Any]:
    line = sys.stdin.readline()
    if not line:
        sys.exit(0)
    return json.loads(line)


def request(method: str, **params: Any) -> dict[str, Any]:
    """Ask the client, and return its result; its error is remembered."""
    global count
    count += 1
    send(id=f"a{count}", method=method, params={"sessionId": "s1", **params})
    answer = receive()
    assert answer["id"] == f"a{count}", answer
    if "error" in answer:
        answers["errors"].append(answer["error"])
    return answer.get("result") or {}


def update(**content: Any) -> None:
    send(method="session/update", params={"sessionId": "s1", "update": content})


def say(text: str) -> None:
    update(sessionUpdate="agent_message_chunk", content={"type": "text", "text": text})


def permission(kind: str | None, path: Path | None, said_before: bool = False) -> str:
    """Ask for a permission and return the id of the option that the client chose, or `cancelled`."""
    told = {"kind": kind, "locations": [{"path": str(path)}] if path else []}
    call = {"toolCallId": f"t{count}", "title": f"{kind} {path}"}
    update(sessionUpdate="tool_call", **call, status="pending", **(told if said_before else {}))
    options = [{"optionId": word, "name": word, "kind": word} for word in ("allow_always", "allow_once", "reject_once")]
    asked = call if said_before else {**call, **told}
    outcome = request("session/request_permission", toolCall=asked, options=options)["outcome"]
    answers["permission"].append(outcome.get("optionId", outcome["outcome"]))
    return str(answers["permission"][-1])


def turn(prompt: str) -> dict[str, Any]:
    file, outside = Path.cwd() / "train_mlx.py", Path.cwd().parent / "outside.py"
    say("Let me look. DESCRIPTION: not the last word\n")
    for act in scenario:
        if act == "fs":  # through the client
            text = request("fs/read_text_file", path=str(file))["content"]
            request("fs/write_text_file", path=str(file), content=text.replace("GAIN = 0.0", "GAIN = 0.05"))
        elif act == "own-tool":  # itself, once it is allowed to
            if permission("edit", file, said_before=True) == "allow_once":
                file.write_text(file.read_text().replace("GAIN = 0.0", "GAIN = 0.05"))
        elif act == "asks":
            (Path.cwd() / "link.py").symlink_to(outside)
            for kind, path in [("read", file), ("read", outside), ("edit", outside), ("edit", Path.cwd() / "link.py"),
                               ("edit", Path.cwd() / "other.py"), ("edit", None), ("execute", None), ("fetch", None),
                               (None, file)]:  # fmt: skip
                permission(kind, path)
            (Path.cwd() / "link.py").unlink()
        elif act == "strays":
            for path in (outside, Path.cwd() / ".." / "outside.py", Path.cwd() / "other.py", Path("/etc/hostname")):
                request("fs/write_text_file", path=str(path), content="X = 1\n")
            request("fs/read_text_file", path=str(outside))
            request("terminal/create", command="sh", args=["-c", "echo"])
        elif act == "cost":
            update(sessionUpdate="usage_update", used=1, size=2, cost={"amount": 0.25, "currency": "USD"})
        elif act == "dies":
            sys.exit("Segmentation fault of the agent")
        elif act == "hangs":
            time.sleep(600)
        elif act == "dump":
            Path(os.environ["HOME"], "seen.json").write_text(json.dumps({**answers, "prompt": prompt, "env": dict(os.environ)}))
        elif act == "meta":  # the counts of gemini 0.61
            counts = {"input_tokens": 3000, "output_tokens": 150}
            return {"stopReason": "end_turn", "_meta": {"quota": {"token_count": counts}}}
        elif act.startswith("stop="):
            return {"stopReason": act[5:]}
    update(sessionUpdate="tool_call", toolCallId="last", title="done", kind="think", status="completed")
    say("Raised it.\n\nHYPOTHESIS: larger ")
    say("steps\nDESCRIPTION: double LR")
    return {"stopReason": "end_turn", "usage": USED}


while True:
    asked = receive()
    method, params = asked.get("method"), asked.get("params") or {}
    refusal = next((act for act in scenario if act.startswith("error=")), "").removeprefix("error=")
    if method == "initialize":
        send(id=asked["id"], result={"protocolVersion": 1, "agentCapabilities": {}, "authMethods": []})
    elif method == "session/new" and "auth" in scenario:
        send(id=asked["id"], error={"code": -32000, "message": "Authentication required"})
    elif method == "session/new":
        select = {"id": "m", "name": "Model", "category": "model", "type": "select", "currentValue": "small", "options": MODELS}
        send(id=asked["id"], result={"sessionId": "s1", "configOptions": [select] if "models" in scenario else []})
    elif method == "session/set_config_option":
        answers["model"] = params["value"]
        send(id=asked["id"], result={"configOptions": []})
    elif method == "session/prompt" and refusal:
        send(id=asked["id"], error={"code": -32603, "message": "Internal error", "data": {"details": refusal}})
    elif method == "session/prompt":
        send(id=asked["id"], result=turn(params["prompt"][0]["text"]))
