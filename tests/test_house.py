"""Statements about the files themselves: what imports what, and how long they are."""

import ast
import shutil
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).parent.parent
MASKRL = ROOT / "maskrl.py"
WORKBENCH = sorted((ROOT / "workbench").rglob("*.py"))
SCRIPTS = {"train_distill", "train_rl", "sample"}
SOURCES = [*ROOT.glob("*.py"), *WORKBENCH, *(ROOT / "tests").rglob("*.py")]


def short(path):
    return str(path.relative_to(ROOT))


def imported(path):
    """The names of all modules that a file imports, wherever it does so."""
    names = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            names |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            module = node.module or "."
            names |= {module, *(f"{module}.{alias.name}" for alias in node.names)}
    return names


def packages(path):
    return {name.partition(".")[0] for name in imported(path)}


def test_the_methods_need_torch_einops_and_tqdm_alone():
    assert packages(MASKRL) - sys.stdlib_module_names == {"torch", "einops", "tqdm"}


def test_imports_go_from_scripts_to_the_workbench_to_the_methods():
    """Studies, which nothing imports, may also run scripts."""
    assert WORKBENCH
    rooms = [path for path in WORKBENCH if "studies" not in path.parts]
    assert [short(path) for path in rooms if packages(path) & SCRIPTS] == []
    names = {short(path): " ".join(sorted(imported(path))) for path in rooms}
    assert [path for path, imports in names.items() if "workbench.studies" in imports] == []


def test_no_file_of_the_workbench_is_longer_than_400_lines():
    lines = {short(path): len(path.read_text().splitlines()) for path in WORKBENCH}
    assert {name: n for name, n in lines.items() if n > 400} == {}


def test_no_line_is_longer_than_100_columns():
    long = [
        f"{short(path)}:{i}"
        for path in SOURCES
        for i, line in enumerate(path.read_text().splitlines(), 1)
        if len(line) > 100
    ]
    assert long == []


def test_the_methods_need_no_lambda():
    """They are read beside the papers; a function there has a name."""
    nodes = list(ast.walk(ast.parse(MASKRL.read_text())))
    assert any(isinstance(node, ast.ClassDef) and node.name == "MAR" for node in nodes)
    assert not [node.lineno for node in nodes if isinstance(node, ast.Lambda)]


ALONE = """
import sys

folder, repository = sys.argv[1:]
sys.path[:] = [folder] + [path for path in sys.path if path != repository]
for name in ("workbench", "torchvision", "PIL", "open_clip", "filelock"):
    sys.modules[name] = None  # so that it cannot be imported

import torch

import maskrl

assert maskrl.__file__ == folder + "/maskrl.py", maskrl.__file__
torch.set_num_threads(1)
sizes = {"image_size": 8, "width": 32, "depth": 1, "head_width": 32, "steps": 4}
settings = maskrl.Settings(**sizes, denoise_steps=3)
teacher = maskrl.MAR(settings, ["a", "b"])
student = maskrl.student_of(teacher, settings)
policy = maskrl.policy_of(student, settings, True)
for model in (teacher, student, policy):
    maskrl.save("model.pt", model)
    images = maskrl.to_images(maskrl.generate(maskrl.load("model.pt"), [0, 1]), settings)
    assert images.shape == (2, 3, 8, 8) and images.isfinite().all()
    print(model.kind)
"""


def test_the_methods_work_in_a_folder_of_their_own(tmp_path):
    """A copy of maskrl.py is all that its reader needs."""
    shutil.copy(MASKRL, tmp_path)
    arguments = ["-I", "-c", ALONE, str(tmp_path), str(ROOT)]
    done = subprocess.run(
        [sys.executable, *arguments], cwd=tmp_path, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr
    assert done.stdout.split() == ["teacher", "student", "policy"]
    assert {path.name for path in tmp_path.iterdir()} <= {"maskrl.py", "model.pt", "__pycache__"}
