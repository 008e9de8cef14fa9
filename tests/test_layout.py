"""The layout of the package: imports between rooms, sizes of files and functions, light imports."""

import ast
import graphlib
import subprocess
import sys
from pathlib import Path

import pytest

REPOSITORY = Path(__file__).parents[1]
sys.path.insert(0, str(REPOSITORY / "docs"))
import draw_rooms as rooms  # noqa: E402

MOST_FILE_LINES, MOST_FUNCTION_LINES, MOST_FILES = 500, 60, 20
LIGHT_MODULES = ("unet", "checkpoint", "train_util")
HEAVY_LIBRARIES = ("av", "cv2", "matplotlib", "jinja2")

# What is not true yet, by the name of its check. An entry that no longer holds has to go.
EXCEPTIONS: dict[str, str] = {}


def exceptions(check):
    return set(EXCEPTIONS.get(check, "").split())


def modules_without_room(package):
    modules = {name.partition(".")[0] for name in rooms.modules_of(package)} - {""}
    return {name for name in modules if not rooms.room_of(name)}


def forbidden_arrows(package):
    arrows = rooms.imports_of(package)
    return {"->".join(arrow) for arrow in arrows if not rooms.is_allowed(arrow)}


def circular_imports(package):
    graph = {}
    for source, target in rooms.imports_of(package):
        graph.setdefault(source, set()).add(target)
    try:
        graphlib.TopologicalSorter(graph).prepare()
    except graphlib.CycleError as error:
        return {" <- ".join(error.args[1])}
    return set()


def nodes(package):
    """(module, node) for each node of each file's syntax tree."""
    for name, path in rooms.modules_of(package).items():
        for node in ast.walk(ast.parse(path.read_text())):
            yield name, node


def absolute_imports(package):
    found = set()
    for name, node in nodes(package):
        sources = []
        if isinstance(node, ast.Import):
            sources = [alias.name for alias in node.names]
        if isinstance(node, ast.ImportFrom) and node.level == 0:
            sources = [node.module]
        if any(source.partition(".")[0] == package.name for source in sources):
            found.add(name)
    return found


def long_files(package):
    files = rooms.modules_of(package).items()
    return {name for name, path in files if len(path.read_text().splitlines()) > MOST_FILE_LINES}


def long_functions(package):
    found = set()
    for name, node in nodes(package):
        is_function = isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef)
        if is_function and node.end_lineno - node.lineno >= MOST_FUNCTION_LINES:
            found.add(f"{name}.{node.name}")
    return found


def full_folders(package):
    folders = [package, *(path for path in package.rglob("*") if path.is_dir())]
    return {folder.name for folder in folders if len(list(folder.glob("*.py"))) > MOST_FILES}


def prints(package):
    calls = ((name, node.func) for name, node in nodes(package) if isinstance(node, ast.Call))
    return {name for name, function in calls if getattr(function, "id", "") == "print"}


CHECKS = (
    modules_without_room,
    forbidden_arrows,
    circular_imports,
    absolute_imports,
    long_files,
    long_functions,
    full_folders,
    prints,
)


@pytest.mark.parametrize("check", CHECKS, ids=lambda check: check.__name__)
def test_the_package_has_none_of(check):
    assert check(rooms.PACKAGE) == exceptions(check.__name__)


def test_networks_training_and_checkpoints_load_no_decoder_and_no_drawing_library():
    loads = f"*(f'{{module}}:{{name}}' for name in {HEAVY_LIBRARIES} if name in sys.modules)"
    script = f"""
import importlib, sys
for module in {LIGHT_MODULES}:
    importlib.import_module(f"mm_diffusion.{{module}}")
    print({loads})
"""
    command = [sys.executable, "-c", script]
    done = subprocess.run(
        command, cwd=REPOSITORY, capture_output=True, text=True, check=True, timeout=120
    )
    assert set(done.stdout.split()) == exceptions("heavy_imports")


# ------------------------------------------------------------ the checks themselves

MADE_UP = {
    "__init__.py": "",
    "logger.py": "from .data import decode\n",
    "nn.py": "print('here')\n",
    "unet.py": "from .nn import conv\nfrom . import config\n",
    "config.py": "import made_up.nn\nfrom . import missing\n",
    "helpers.py": "",
    "data/__init__.py": "",
    "data/decode.py": "def late():\n    from ..nn import conv\n",
    "data/toy.py": "from . import decode\n",
    "evaluation/scores.py": "from ..data.toy import ToyConfig\nfrom ..data.decode import probe\n",
    "training/states.py": "from .. import viewing\nfrom ..logger import log\n",
    "viewing/__init__.py": "",
    "viewing/gallery.py": "def long():\n" + "    pass\n" * 60 + "def fits():\n" + "    pass\n" * 59,
}


@pytest.fixture
def made_up(tmp_path):
    for name, text in MADE_UP.items():
        path = tmp_path / "made_up" / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text)
    return tmp_path / "made_up"


def test_imports_are_found_wherever_they_stand_and_whatever_they_name(made_up):
    arrows = rooms.imports_of(made_up)
    assert {("unet", "nn"), ("unet", "config"), ("data.decode", "nn"), ("config", "nn")} <= arrows
    assert {("evaluation.scores", "data.toy"), ("training.states", "viewing")} <= arrows
    assert not any("missing" in arrow or "" in arrow for arrow in arrows)


def test_every_forbidden_arrow_is_found_and_no_other(made_up):
    assert forbidden_arrows(made_up) == {
        "logger->data.decode",
        "data.decode->nn",
        "evaluation.scores->data.toy",
        "training.states->viewing",
    }


def test_other_violations_are_found(made_up):
    assert modules_without_room(made_up) == {"helpers"}
    assert absolute_imports(made_up) == {"config"}
    assert prints(made_up) == {"nn"}
    assert long_functions(made_up) == {"viewing.gallery.long"}
    assert not circular_imports(made_up) | long_files(made_up) | full_folders(made_up)
    (made_up / "nn.py").write_text("from .logger import log\n" + "\n" * 500)
    for number in range(20):
        (made_up / f"data/extra_{number}.py").touch()
    assert len(circular_imports(made_up)) == 1
    assert long_files(made_up) == {"nn"}
    assert full_folders(made_up) == {"data"}


# ------------------------------------------------------------ the drawing


def test_the_committed_drawing_is_what_the_script_makes():
    drawn = rooms.draw(rooms.PACKAGE, REPOSITORY / "py_scripts")
    assert (REPOSITORY / "docs/rooms.svg").read_text() == drawn, "run python docs/draw_rooms.py"


def test_forbidden_arrows_are_red_and_allowed_ones_that_follow_from_others_are_left_out(made_up):
    scripts = made_up.parent / "scripts"
    scripts.mkdir()
    (scripts / "train.py").write_text("from made_up import unet\nfrom made_up.nn import conv\n")
    allowed, forbidden = rooms.room_arrows(made_up, scripts)
    path = {("scripts", "unet"), ("unet", "config"), ("config", "networks")}
    assert allowed == {*path, ("training", "foundation")}
    assert forbidden == {
        ("foundation", "data"),
        ("data", "networks"),
        ("evaluation", "data"),
        ("training", "viewing"),
    }
    assert rooms.draw(made_up, scripts).count(f"stroke='{rooms.RED}'") == len(forbidden)
