"""The rules of the architecture: who may import whom. CONTRIBUTING.md states them."""

import ast
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
FRAMEWORKS = {"mlx", "mlx_lm", "torch"}
TRAIN_FILES = {"train_mlx", "train_torch"}
HARNESS = {"prepare_mlx", "corpus", "counts", "machine", "probes", "stories", "tokenizer"}
AGENT = sorted((ROOT / "agent").rglob("*.py"))
# A folder of agent/, or a file directly in it, imports what stands on an earlier line, and itself.
FLOORS = (
    {"errors", "text"},
    {"process", "coders"},
    {"git", "journal", "chat"},
    {"trial", "views"},
    {"judgement", "fleet"},
    {"proposal", "search"},
    {"night"},
    {"loop", "doctor", "local"},
)


def imports(path: Path, module_level_only: bool = False) -> set[str]:
    """Top-level names of what a file imports."""
    tree = ast.parse(path.read_text())
    nodes = tree.body if module_level_only else list(ast.walk(tree))
    found = set()
    for node in nodes:
        if isinstance(node, ast.Import):
            found |= {alias.name.split(".")[0] for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and node.module and not node.level:
            found.add(node.module.split(".")[0])
    return found


def test_the_harness_needs_only_numpy_to_be_imported() -> None:
    third_party = imports(ROOT / "prepare_mlx.py", module_level_only=True) - set(sys.stdlib_module_names)
    assert third_party == {"numpy"}
    code = "import sys, prepare_mlx; print(*sorted({m.split('.')[0] for m in sys.modules}))"
    loaded = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=True).stdout
    assert not set(loaded.split()) & ((FRAMEWORKS | HARNESS | {"agent"}) - {"prepare_mlx"})


def test_the_harness_knows_no_train_file_and_no_driver() -> None:
    for name in HARNESS:
        assert not imports(ROOT / f"{name}.py") & (TRAIN_FILES | FRAMEWORKS | {"agent"})


@pytest.mark.parametrize("name", ["train_mlx.py", "train_torch.py"])
def test_a_train_file_imports_the_harness_and_its_framework_only(name: str) -> None:
    ours = imports(ROOT / name) & ({p.stem for p in ROOT.glob("*.py")} | {"agent", "scripts", "tests"})
    assert ours == {"prepare_mlx", "counts", "machine"}


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
        assert not path.read_text(), "nothing is imported through a folder"
        return
    room = path.relative_to(ROOT / "agent").parts[0].removesuffix(".py")
    floor = next(number for number, rooms in enumerate(FLOORS) if room in rooms)
    assert rooms_of(path) <= {room}.union(*FLOORS[:floor])


def outline(name: str) -> tuple[list[str], dict[str, str]]:
    """Names of classes, their methods and functions in order; source of the upper-case constants, in order."""
    order, constants = [], {}
    for node in ast.parse((ROOT / name).read_text()).body:
        if isinstance(node, ast.ClassDef):
            order += [node.name, *(f"{node.name}.{f.name}" for f in node.body if isinstance(f, ast.FunctionDef))]
        elif isinstance(node, ast.FunctionDef):
            order.append(node.name)
        elif isinstance(node, ast.Assign) and isinstance(node.targets[0], ast.Name) and node.targets[0].id.isupper():
            constants[node.targets[0].id] = ast.unparse(node.value)
    return [n.replace("__call__", "forward") for n in order], constants


def test_the_torch_file_is_a_translation() -> None:
    """Whatever one trainer has, the other has, in the same order and with the same value; each needs a few helpers more."""
    (mlx_order, mlx_constants), (torch_order, torch_constants) = outline("train_mlx.py"), outline("train_torch.py")
    assert set(mlx_order) - set(torch_order) == {"exp", "exp_vjp", "tanh", "keep_within"}
    assert set(torch_order) - set(mlx_order) == {
        "compiled", "rope", "masked_attention", "to_device", "synchronize", "later", "peak_memory", "copied"}
    assert [n for n in torch_order if n in mlx_order] == [n for n in mlx_order if n in torch_order]
    own = {"DEVICE", "GPU", "TIER", "DTYPE", "LANES"}
    assert [(n, v) for n, v in torch_constants.items() if n not in own] == [
        (n, v) for n, v in mlx_constants.items() if n not in own]


def test_no_file_records_a_registry_or_an_absolute_home() -> None:
    tracked = subprocess.run(["git", "ls-files", "-z"], cwd=ROOT, capture_output=True, text=True, check=True).stdout.split("\0")
    hosts = ["pypi" + ".org", "python" + "hosted", "registry." + "npmjs", "/ro" + "ot/"]
    found = [(name, host) for name in tracked if name and (ROOT / name).is_file() for host in hosts
             if host in (ROOT / name).read_bytes().decode("utf-8", "ignore")]
    assert not found
