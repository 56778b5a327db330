"""The rows of the table: binary, arguments, environment and login of each coding agent.

Wherever a CLI can be held to editing, it is: no shell, no network tools, no path outside the worktree. Each is told not to
wait out rate limits for long, since the driver does that.
"""

from __future__ import annotations

import json
from functools import partial
from typing import Any

from agent.coders import shapes
from agent.coders.coder import Coder, Job, Login

AWS = ("AWS_PROFILE", "AWS_REGION", "AWS_ACCESS_KEY_ID", "AWS_SECRET_ACCESS_KEY", "AWS_SESSION_TOKEN",
       "AWS_BEARER_TOKEN_BEDROCK")  # fmt: skip
GOOGLE = ("GOOGLE_APPLICATION_CREDENTIALS", "GOOGLE_CLOUD_PROJECT", "GOOGLE_CLOUD_LOCATION", "GOOGLE_GENAI_USE_VERTEXAI",
          "GOOGLE_API_KEY", "GEMINI_API_KEY")  # fmt: skip
OPENAI = ("OPENAI_API_KEY", "OPENAI_BASE_URL", "OPENAI_API_BASE", "OPENAI_ORG_ID", "OPENAI_PROJECT_ID")
PROVIDERS = (*OPENAI, *GOOGLE, *AWS, "ANTHROPIC_API_KEY", "ANTHROPIC_BASE_URL", "OPENROUTER_API_KEY", "DEEPSEEK_API_KEY",
             "GROQ_API_KEY", "MISTRAL_API_KEY", "XAI_API_KEY", "TOGETHER_API_KEY", "OLLAMA_API_BASE",
             "LM_STUDIO_API_BASE", "LM_STUDIO_API_KEY")  # fmt: skip
SILENCE = 600.0  # seconds; of an agent that prints every step, more than any model thinks about one
PROVIDER_KEYS = tuple(name for name in PROVIDERS if name.endswith("_KEY"))
GEMINI_SETTINGS = {"general": {"maxAttempts": 2}, "privacy": {"usageStatisticsEnabled": False}}
OPENCODE_CONFIG = {
    "permission": {"edit": "allow", "bash": "deny", "webfetch": "deny", "websearch": "deny", "task": "deny",
                   "external_directory": "deny"},
    "share": "disabled",
    "autoupdate": False,
}  # fmt: skip
QWEN_SETTINGS = {
    "permissions": {"allow": ["Edit(/**)", "Read(/**)"], "deny": ["Bash", "WebFetch", "Agent"]},
    "privacy": {"usageStatisticsEnabled": False},
    "model": {"generationConfig": {"maxRetries": 0}},  # it has six more tries of its own above these
}


def model(job: Job, flag: str) -> list[str]:
    return [flag, job.model] if job.model else []


def settings_file(variable: str, content: dict[str, Any], job: Job) -> dict[str, str]:
    """A settings file in the scratch directory, named to the CLI by an environment variable: HOME stays as it is."""
    path = job.scratch_file("settings.json")
    with open(path, "w", encoding="utf-8") as file:
        json.dump(content, file)
    return {variable: path}


def claude(job: Job) -> list[str]:
    # acceptEdits: without it the write is denied, and the exit code is 0 all the same
    limit = ["--max-budget-usd", f"{job.max_cost_usd:g}"] if job.max_cost_usd is not None else []
    return ["-p", "--output-format", "json", "--permission-mode", "acceptEdits", "--tools", "Read,Edit,Write,Grep,Glob",
            "--no-session-persistence", "--setting-sources", "", "--strict-mcp-config",
            *model(job, "--model"), *limit]  # fmt: skip


def codex(job: Job) -> list[str]:
    # The user's config.toml may loosen the sandbox or start MCP servers; the login is read all the same.
    # There is no edit-only mode: the shell stays, inside a sandbox that writes to the worktree and has no network.
    options = ["sandbox_workspace_write.exclude_slash_tmp=true", "sandbox_workspace_write.exclude_tmpdir_env_var=true",
               "sandbox_workspace_write.network_access=false", "check_for_update_on_startup=false",
               "analytics.enabled=false"]  # fmt: skip
    given = [word for option in options for word in ("-c", option)]
    return ["exec", "--json", "--ephemeral", "--ignore-user-config", "--sandbox", "workspace-write",
            "-C", str(job.worktree), *given, *model(job, "-m"), *job.extra_args, "-"]  # fmt: skip


def gemini(job: Job) -> list[str]:
    # auto_edit: a shell command would have to be asked, and nobody answers
    return ["--skip-trust", "--approval-mode", "auto_edit", "--output-format", "json", *model(job, "-m")]


def opencode(job: Job) -> list[str]:
    # --print-logs: it retries a rate limit for ever, and says so nowhere else
    return ["run", "--format", "json", "--pure", "--print-logs", "--log-level", "WARN", *model(job, "-m")]


def aider(job: Job) -> list[str]:
    # it refuses a path outside the repository by itself
    histories = [word for name in ("input", "chat", "llm")
                 for word in (f"--{name}-history-file", job.scratch_file(f"aider.{name}.history"))]  # fmt: skip
    return ["--message-file", str(job.prompt_file), "--yes-always", "--no-auto-commits", "--no-dirty-commits",
            "--no-gitignore", "--no-stream", "--no-pretty", "--no-check-update", "--no-show-release-notes",
            "--analytics-disable", "--no-suggest-shell-commands", "--no-detect-urls", "--map-tokens", "0", *histories,
            *model(job, "--model"), job.train_file]  # fmt: skip


def qwen(job: Job) -> list[str]:
    # not auto-edit, which writes outside the worktree: what the settings don't allow is asked, and nobody answers
    return ["--approval-mode", "default", "--output-format", "json", "--chat-recording", "false", *model(job, "-m")]


def copilot(job: Job) -> list[str]:
    # --disallow-temp-dir: the system's temporary directory would be writable without being asked for
    return ["--available-tools", "view", "create", "edit", "grep", "glob", "--allow-tool", "write",
            "--disallow-temp-dir", "--disable-builtin-mcps", "--output-format", "json", "--no-ask-user",
            "--no-auto-update", "--usage-output-file", job.scratch_file("usage.json"),
            *model(job, "--model")]  # fmt: skip


def cursor(job: Job) -> list[str]:
    # nothing holds it to editing
    return ["-p", "--force", "--trust", "--output-format", "json", "--workspace", str(job.worktree),
            *model(job, "--model"), job.prompt]  # fmt: skip


def goose(job: Job) -> list[str]:
    # nothing holds it to editing
    return ["run", "--no-session", "--with-builtin", "developer", "-q", "--output-format", "json",
            *model(job, "--model"), "-i", "-"]  # fmt: skip


CLIS = (
    Coder(
        name="claude",
        binary="claude",
        arguments=claude,
        reader=shapes.claude,
        install_hint="npm install -g @anthropic-ai/claude-code",
        login_hint="run `claude` and /login, or `claude setup-token` and set CLAUDE_CODE_OAUTH_TOKEN",
        env_names=("ANTHROPIC_API_KEY", "ANTHROPIC_AUTH_TOKEN", "ANTHROPIC_BASE_URL", "ANTHROPIC_MODEL",
                   "ANTHROPIC_SMALL_FAST_MODEL", "ANTHROPIC_CUSTOM_HEADERS", "ANTHROPIC_VERTEX_PROJECT_ID",
                   "CLOUD_ML_REGION", "CLAUDE_CODE_OAUTH_TOKEN", "CLAUDE_CONFIG_DIR", "CLAUDE_CODE_USE_BEDROCK",
                   "CLAUDE_CODE_USE_VERTEX", *AWS, *GOOGLE[:2]),
        env_set={"DISABLE_AUTOUPDATER": "1", "CLAUDE_CODE_DISABLE_NONESSENTIAL_TRAFFIC": "1",
                 "CLAUDE_CODE_MAX_RETRIES": "2"},
        login_env=("ANTHROPIC_API_KEY", "ANTHROPIC_AUTH_TOKEN", "CLAUDE_CODE_OAUTH_TOKEN", "CLAUDE_CODE_USE_BEDROCK",
                   "CLAUDE_CODE_USE_VERTEX"),
        login_files=(Login(".claude/.credentials.json"), Login(".credentials.json", below="CLAUDE_CONFIG_DIR"),
                     Login(".claude.json", '"oauthAccount"')),  # macOS keeps the token itself in its keychain
    ),
    Coder(
        name="codex",
        binary="codex",
        arguments=codex,
        reader=shapes.codex,
        idle_seconds=SILENCE,
        install_hint="npm install -g @openai/codex",
        login_hint="codex login",
        env_names=("CODEX_HOME", "CODEX_API_KEY", *OPENAI),
        login_env=("CODEX_API_KEY",),
        login_files=(Login(".codex/auth.json"), Login("auth.json", below="CODEX_HOME")),
        extra_args_last=False,
    ),
    Coder(
        name="gemini",
        binary="gemini",
        arguments=gemini,
        reader=shapes.gemini,
        install_hint="npm install -g @google/gemini-cli",
        login_hint="run `gemini` and /auth, or set GEMINI_API_KEY",
        env_names=(*GOOGLE, "GOOGLE_GEMINI_BASE_URL", "GOOGLE_GENAI_USE_GCA", "GEMINI_MODEL", "GEMINI_CLI_HOME"),
        settings=partial(settings_file, "GEMINI_CLI_SYSTEM_SETTINGS_PATH", GEMINI_SETTINGS),
        login_env=("GEMINI_API_KEY", "GOOGLE_GENAI_USE_VERTEXAI"),
        login_files=(Login(".gemini/oauth_creds.json"), Login(".gemini/gemini-credentials.json")),
    ),
    Coder(
        name="opencode",
        binary="opencode",
        arguments=opencode,
        reader=shapes.opencode,
        idle_seconds=SILENCE,
        install_hint="npm install -g opencode-ai",
        login_hint="opencode auth login",
        env_names=("OPENCODE_CONFIG", "OPENCODE_CONFIG_DIR", "OPENCODE_API_KEY", *PROVIDERS),
        env_set={"OPENCODE_CONFIG_CONTENT": json.dumps(OPENCODE_CONFIG), "OPENCODE_DISABLE_AUTOUPDATE": "1"},
        login_env=("OPENCODE_API_KEY", *PROVIDER_KEYS),
        login_files=(Login(".local/share/opencode/auth.json", '"type"'),
                     Login("opencode/auth.json", '"type"', below="XDG_DATA_HOME")),
    ),
    Coder(
        name="aider",
        binary="aider",
        arguments=aider,
        reader=shapes.aider,
        tells_its_end=False,  # after what it prints it may ask its model again
        install_hint="python -m pip install aider-chat, or uv tool install aider-chat",
        login_hint="set the key of your provider, such as OPENAI_API_KEY, and --model",
        env_names=("AIDER_MODEL", "AIDER_OPENAI_API_BASE", "AIDER_OPENAI_API_KEY", "AIDER_ANTHROPIC_API_KEY", *PROVIDERS),
        login_env=("AIDER_OPENAI_API_KEY", "AIDER_ANTHROPIC_API_KEY", *PROVIDER_KEYS),
        login_files=(Login(".aider.conf.yml", "key"), Login(".aider/oauth-keys.env")),
        # without the first every start fetches a price list; without the others it writes a name to the user's .git/config
        env_set={"LITELLM_LOCAL_MODEL_COST_MAP": "True", "GIT_CONFIG_COUNT": "2",
                 "GIT_CONFIG_KEY_0": "user.name", "GIT_CONFIG_VALUE_0": "autoresearch",
                 "GIT_CONFIG_KEY_1": "user.email", "GIT_CONFIG_VALUE_1": "autoresearch@localhost"},
        prompt_on_stdin=False,
    ),
    Coder(
        name="qwen",
        binary="qwen",
        arguments=qwen,
        reader=shapes.qwen,
        install_hint="npm install -g @qwen-code/qwen-code",
        login_hint="run `qwen auth`, or set OPENAI_API_KEY and OPENAI_BASE_URL",
        env_names=("DASHSCOPE_API_KEY", "BAILIAN_CODING_PLAN_API_KEY", "OPENAI_MODEL", "QWEN_HOME", *OPENAI, *GOOGLE,
                   "ANTHROPIC_API_KEY", "ANTHROPIC_BASE_URL"),
        settings=partial(settings_file, "QWEN_CODE_SYSTEM_SETTINGS_PATH", QWEN_SETTINGS),
        login_env=("BAILIAN_CODING_PLAN_API_KEY", "DASHSCOPE_API_KEY"),
        login_files=(Login(".qwen/oauth_creds.json"), Login(".qwen/settings.json", "selectedType")),
    ),
    Coder(
        name="copilot",
        binary="copilot",
        arguments=copilot,
        reader=shapes.copilot,
        idle_seconds=SILENCE,
        install_hint="npm install -g @github/copilot",
        login_hint="copilot login, or set COPILOT_GITHUB_TOKEN",
        env_names=("COPILOT_GITHUB_TOKEN", "GH_TOKEN", "GITHUB_TOKEN", "GH_HOST", "COPILOT_HOME", "COPILOT_MODEL",
                   "COPILOT_OFFLINE", "COPILOT_PROVIDER_BASE_URL", "COPILOT_PROVIDER_TYPE", "COPILOT_PROVIDER_API_KEY",
                   "COPILOT_PROVIDER_BEARER_TOKEN"),
        login_env=("COPILOT_GITHUB_TOKEN", "COPILOT_PROVIDER_BASE_URL"),
        login_files=(Login(".copilot/config.json", '"login"'), Login("config.json", '"login"', below="COPILOT_HOME")),
    ),
    Coder(
        name="cursor",
        binary="cursor-agent",
        arguments=cursor,
        reader=shapes.claude,
        install_hint="see https://cursor.com/cli",
        login_hint="cursor-agent login, or set CURSOR_API_KEY",
        env_names=("CURSOR_API_KEY", "CURSOR_CONFIG_DIR"),
        login_env=("CURSOR_API_KEY",),
        login_files=(Login(".cursor/cli-config.json", "authInfo"), Login(".config/cursor/auth.json")),
        prompt_on_stdin=False,
    ),
    Coder(
        name="goose",
        binary="goose",
        arguments=goose,
        reader=shapes.goose,
        install_hint="see https://block.github.io/goose",
        login_hint="goose configure",
        env_names=("GOOSE_PROVIDER", "GOOSE_MODEL", "OPENAI_HOST", "OPENAI_BASE_PATH", *PROVIDERS),
        env_set={"GOOSE_MODE": "auto"},
        login_env=("GOOSE_PROVIDER",),
        login_files=(Login(".config/goose/config.yaml", "GOOSE_PROVIDER"),
                     Login("goose/config.yaml", "GOOSE_PROVIDER", below="XDG_CONFIG_HOME")),
    ),
)  # fmt: skip
