"""The rules of the architecture: who may import whom. CONTRIBUTING.md states them."""

import ast
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
from conftest import on_windows

ROOT = Path(__file__).parent.parent
FRAMEWORKS = {"mlx", "mlx_lm", "torch"}
TRAIN_FILES = {"train_mlx", "train_torch"}
HARNESS = {"prepare_mlx", "harness"}
PARTS = sorted(path for path in (ROOT / "harness").rglob("*.py") if path.stem != "mlx_cpu")  # for train_mlx.py only
AGENT = sorted((ROOT / "agent").rglob("*.py"))
# A folder of agent/, or a file directly in it, imports what stands on an earlier line, and itself.
FLOORS = (
    {"errors", "files"},
    {"text"},
    {"process", "coders"},
    {"git", "journal", "chat"},
    {"trial", "views"},
    {"judgement"},
    {"proposal", "search"},
    {"night"},
    {"deep"},
    {"loop", "doctor", "local", "acp", "dashboard"},
)


def imports(path: Path, module_level_only: bool = False, whole: bool = False) -> set[str]:
    """Names of the modules that a file imports: top-level packages, or full names with `whole`."""
    nodes = ast.parse(path.read_text()).body if module_level_only else ast.walk(ast.parse(path.read_text()))
    found = set()
    for node in nodes:
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and node.module == "harness":  # from harness import corpus
            found |= {f"harness.{a.name}" if (ROOT / f"harness/{a.name}.py").exists() else "harness" for a in node.names}
        elif isinstance(node, ast.ImportFrom) and node.module and not node.level:
            found.add(node.module)
    return found if whole else {name.split(".")[0] for name in found}


@pytest.mark.parametrize("path", [ROOT / "prepare_mlx.py", *PARTS], ids=lambda p: p.stem)
def test_the_harness_needs_only_numpy_to_be_imported(path: Path) -> None:
    assert imports(path, module_level_only=True) - set(sys.stdlib_module_names) <= {"numpy", "harness"}
    assert not imports(path) & (TRAIN_FILES | FRAMEWORKS | {"agent", "prepare_mlx"})
    assert "harness.mlx_cpu" not in imports(path, whole=True)


def test_the_harness_is_imported_without_a_framework() -> None:
    parts = [f"harness.{path.stem}" for path in PARTS if path.stem != "__init__"]
    code = f"import sys, prepare_mlx, {', '.join(parts)}; print(*sorted({{m.split('.')[0] for m in sys.modules}}))"
    loaded = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=True).stdout.split()
    lazy = {"psutil", "sentencepiece", "pyarrow", "huggingface_hub", "rich"}
    assert not set(loaded) & (FRAMEWORKS | TRAIN_FILES | lazy | {"agent"})


def test_the_harness_is_imported_on_windows() -> None:
    parts = [f"harness.{path.stem}" for path in PARTS if path.stem != "__init__"]
    code = f"import sys, prepare_mlx, {', '.join(parts)}; print(sys.platform)"
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, env=os.environ | on_windows(), capture_output=True, text=True)
    assert (done.returncode, done.stdout) == (0, "win32\n"), done.stderr


def test_the_driver_sends_windows_to_wsl() -> None:
    argv = [sys.executable, "-m", "agent.loop"]
    done = subprocess.run(argv, cwd=ROOT, env=os.environ | on_windows(), capture_output=True, text=True)
    assert done.returncode == 1
    assert re.fullmatch(r"error: .* WSL 2.* docs/windows\.md .*\n", done.stderr), done.stderr
    assert (ROOT / "docs" / "windows.md").is_file()


def test_a_training_loads_its_own_part_of_the_harness() -> None:
    code = "import sys, prepare_mlx; print(*sorted(sys.modules))"
    loaded = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=True).stdout.split()
    assert {m for m in loaded if m.startswith("harness")} == {"harness", "harness.clock", "harness.machine", "harness.run"}


def test_the_parts_of_the_harness_form_no_circle() -> None:
    left = {f"harness.{p.stem}".removesuffix(".__init__"): imports(p, whole=True) for p in PARTS}
    while left:
        free = [name for name, needs in left.items() if not needs & (left.keys() - {name})]
        assert free, f"a circle among {sorted(left)}"
        for name in free:
            del left[name]


@pytest.mark.parametrize(("name", "more"), [("train_mlx.py", {"harness.mlx_cpu"}), ("train_torch.py", set())])
def test_a_train_file_imports_the_harness_and_its_framework_only(name: str, more: set[str]) -> None:
    ours = {p.stem for p in ROOT.glob("*.py")} | {"agent", "harness", "scripts", "tests"}
    found = {module for module in imports(ROOT / name, whole=True) if module.split(".")[0] in ours}
    assert "prepare_mlx" in found
    assert found <= {"prepare_mlx", *more}


@pytest.mark.parametrize("path", AGENT, ids=lambda p: str(p.relative_to(ROOT)))
def test_the_driver_imports_no_framework_no_harness_and_no_train_file(path: Path) -> None:
    assert not imports(path) & (FRAMEWORKS | TRAIN_FILES | HARNESS)


def rooms_of(path: Path) -> set[str]:
    """The folders of agent/, or files directly in it, that a file imports from."""
    found = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and node.module:
            found |= {f"{node.module}.{alias.name}" for alias in node.names}
    return {name.split(".")[1] for name in found if name.startswith("agent.")}


@pytest.mark.parametrize("path", AGENT, ids=lambda p: str(p.relative_to(ROOT)))
def test_a_room_imports_only_the_floors_below_it(path: Path) -> None:
    if path.name == "__init__.py":
        assert not rooms_of(path), "nothing is imported through a folder"
        return
    room = path.relative_to(ROOT / "agent").parts[0].removesuffix(".py")
    floor = next(number for number, rooms in enumerate(FLOORS) if room in rooms)
    assert rooms_of(path) <= {room}.union(*FLOORS[:floor])


def test_no_file_records_a_registry_or_an_absolute_home() -> None:
    tracked = subprocess.run(["git", "ls-files", "-z"], cwd=ROOT, capture_output=True, text=True, check=True).stdout.split("\0")
    hosts = ["pypi" + ".org", "python" + "hosted", "registry." + "npmjs", "/ro" + "ot/"]
    found = [(name, host) for name in tracked if name and (ROOT / name).is_file() for host in hosts
             if host in (ROOT / name).read_bytes().decode("utf-8", "ignore")]
    assert not found


def named_in_the_guide() -> list[tuple[str, list[str]]]:
    """Each bullet of "Where is what" in CONTRIBUTING.md: the folder it is about, and what it has between code marks."""
    section = (ROOT / "CONTRIBUTING.md").read_text().partition("\n## Where is what\n")[2].partition("\n## ")[0]
    part = folder = ""
    found = []
    for bullet in re.split(r"\n(?=- |#|\*\*|\n)", section):
        if bullet.startswith("### "):
            part = folder = "".join(re.findall(r"^### `(\w+/)`", bullet))
        elif heading := re.match(r"(?:\*\*|- )`(\w+/)`", bullet):  # a folder of agent/
            folder = part + heading[1]
        found.append((folder, re.findall(r"`([^`\s]+)`", bullet)))
    return found


def place(folder: str, name: str) -> str:
    """The path of a name in the guide: relative to the bullet's folder, else to the folder above it, else to the repository."""
    return next((path for path in (folder + name, folder.split("/")[0] + "/" + name, name) if (ROOT / path).exists()), "")


def test_the_guide_names_every_file_and_no_other() -> None:
    mentioned = {(folder, name) for folder, names in named_in_the_guide() for name in names}
    files = {(folder, name) for folder, name in mentioned if re.search(r"(/|\.(py|md|html|sh|ipynb))$", name)}
    assert not {name for folder, name in files if not place(folder, name)}
    tracked = subprocess.run(["git", "ls-files", "*.py"], cwd=ROOT, capture_output=True, text=True, check=True).stdout.split()
    ours = {name for name in tracked if name.startswith(("agent/", "harness/")) and not Path(name).stem.startswith("__")}
    assert not ours - {place(folder, name) for folder, name in files}


def test_a_function_in_the_guide_is_in_a_file_of_its_bullet() -> None:
    checked = 0
    for folder, names in named_in_the_guide():
        sources = "".join((ROOT / place(folder, name)).read_text() for name in names if name.endswith(".py"))
        for function in [name.removesuffix("()") for name in names if name.endswith("()")]:
            assert f"def {function}(" in sources, (function, names)
            checked += 1
    assert checked > 5
