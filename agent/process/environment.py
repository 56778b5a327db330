"""The environment variables of a child: what it needs, and secrets only for coding agents. Also: the system and the data folder."""

import os
import platform
import re
import sys
from collections.abc import Mapping
from pathlib import Path

from agent.process.supervise import MARKER
from agent.text import is_secret_name

# Enough for Python, a C++ compiler (MLX compiles kernels on Linux), GPUs and BLAS libraries; HOME for their caches.
_ALLOWED = re.compile(
    r"PATH|HOME|USER|LOGNAME|SHELL|LANG|LANGUAGE|LC_\w+|TZ|TMPDIR|TERM|COLUMNS|VIRTUAL_ENV|CONDA_PREFIX|XDG_CACHE_HOME"
    r"|LD_LIBRARY_PATH|DYLD_LIBRARY_PATH|SDKROOT|DEVELOPER_DIR|CC|CXX|CUDA_\w+|MLX_\w+|MTL_\w+|METAL_\w+|PYTORCH_\w+|OMP_\w+"
    r"|MKL_\w+|OPENBLAS_\w+|VECLIB_\w+|AUTORESEARCH_\w+"
)
_DOWNLOADS = re.compile(r"(https?|all|no|ftp)_proxy|HF_\w+|HUGGINGFACE_\w+|SSL_CERT_\w+|(REQUESTS|CURL)_CA_BUNDLE", re.IGNORECASE)


def clean_env(extra: Mapping[str, str] | None = None, *, keep_secrets: bool = False, network: bool = False) -> dict[str, str]:
    """The environment for a child: the allowed variables of the driver's own environment, and `extra`.

    `keep_secrets` passes the driver's whole environment; coding agents need it for their keys. `network` adds proxy settings
    and the variables of Hugging Face including its token; only downloads need it.
    """
    kept = {}
    for name, value in os.environ.items():
        harmless = _ALLOWED.fullmatch(name) is not None and not is_secret_name(name)
        if keep_secrets or harmless or (network and _DOWNLOADS.fullmatch(name)):
            kept[name] = value
    kept.pop(MARKER, None)  # names the driver's own family, if something supervises the driver
    return {**kept, **(extra or {})}


def wsl() -> int:
    """The version of the Windows Subsystem for Linux that this runs in; 0 elsewhere."""
    release = platform.release()
    if sys.platform != "linux" or "microsoft" not in release.lower():
        return 0
    return 2 if "WSL2" in release or "microsoft" in release else 1  # 1: "4.4.0-19041-Microsoft", with a capital


def data_home(environ: Mapping[str, str] = os.environ) -> Path:
    """The folder where the harness keeps its data."""
    return Path(environ.get("AUTORESEARCH_HOME") or Path.home() / ".cache" / "autoresearch-mlx")
