import importlib.util
import sys

if sys.platform == "win32":  # before a module fails on fcntl or os.fork: the driver is made of POSIX processes, locks and signals
    sys.exit("error: the driver needs macOS or Linux; on Windows run it in WSL 2, and see docs/windows.md for what runs without")

if importlib.util.find_spec("click") is None:
    sys.exit(f"error: {sys.executable} has none of the project's packages; first: source .venv/bin/activate (make demo or uv sync "
             "makes .venv)")
