"""The import picture: modules lie in folders, folders on floors, and every import goes downward.

`python -m pytest tests/test_layout.py -n 0 -s` prints the picture.
"""

import ast
import graphlib
import os
import subprocess
import sys

import pytest
from conftest import ROOT

FLOORS = [  # from the top; each folder or program imports only what stands further down
    {"bench", "examples"},
    {"infer", "benchmarks"},
    {"train", "inference"},
    {"training", "inversion", "postprocess", "synth"},
    {"model", "data", "synthetic", "report"},
    {"cfg", "waves", "openfwi", "networks", "parallel"},
    {"options", "system", "utils"},
]
FLOOR_OF = {room: len(FLOORS) - k for k, rooms in enumerate(FLOORS) for room in rooms}  # floor 1 is lowest


def find_modules(root):
    """{module's name: its path} of the programs in `root` and of its packages, tests left out."""
    packages = [path.parent for path in root.glob("*/__init__.py")]
    folders = [root, *packages, root / "examples"]
    paths = [path for folder in folders for path in sorted(folder.glob("*.py"))]
    names = [".".join(path.relative_to(root).with_suffix("").parts) for path in paths]
    return {name.removesuffix(".__init__"): path for name, path in zip(names, paths, strict=True)}


def find_imports(modules):
    """{module: the modules of ours that it imports, at the top or within functions}."""
    found = {}
    for module, path in modules.items():
        names = []
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            if isinstance(node, ast.Import):
                names += [alias.name for alias in node.names]
            elif isinstance(node, ast.ImportFrom):
                assert node.level == 0, f"{path}: a relative import; write the folder's name"
                names += [f"{node.module}.{alias.name}" for alias in node.names]
        found[module] = set()
        for name in names:
            while name and name not in modules:  # from a module's member to its module
                name = name.rpartition(".")[0]
            if name and name != module:
                found[module].add(name)
    return found


def room_of(module):
    """The top-level program or the folder a module belongs to."""
    return module.split(".")[0]


def upward(imports, floor_of):
    """Imports between rooms that do not go down, as "module -> module"."""
    return [
        f"{module} -> {other}"
        for module, others in imports.items()
        for other in sorted(others)
        if room_of(module) != room_of(other) and floor_of[room_of(module)] <= floor_of[room_of(other)]
    ]


def check_no_circle(imports):
    """Raise graphlib.CycleError, which names its modules, if modules import each other in a circle."""
    graphlib.TopologicalSorter(imports).prepare()


def picture(modules, imports):
    """The house from the top floor down, with each room's size and the rooms that it imports."""
    arrows = {(room_of(a), room_of(b)) for a, others in imports.items() for b in others} - {
        (room, room) for room in FLOOR_OF
    }
    lines = [f"{len(FLOOR_OF)} rooms, {len(FLOORS)} floors, {len(arrows)} arrows"]
    for rooms in FLOORS:
        for room in sorted(rooms):
            paths = [path for module, path in modules.items() if room_of(module) == room]
            n_lines = sum(len(path.read_text(encoding="utf-8").splitlines()) for path in paths)
            lower = sorted((b for a, b in arrows if a == room), key=lambda b: (-FLOOR_OF[b], b))
            size = f"{len(paths):2} files {n_lines:5} lines"
            imported = " ".join(lower) or "nothing of ours"
            lines.append(f"floor {FLOOR_OF[room]}  {room:12}{size}  -> {imported}")
    return "\n".join(lines)


MODULES = find_modules(ROOT)
IMPORTS = find_imports(MODULES)


def test_every_room_has_a_floor_and_the_picture_can_be_printed():
    assert {room_of(module) for module in MODULES} == set(FLOOR_OF)
    text = picture(MODULES, IMPORTS)
    print("\n" + text)
    assert all(f"  {room} " in text for room in FLOOR_OF)


def test_imports_between_rooms_go_downward():
    assert not upward(IMPORTS, FLOOR_OF)
    assert upward(IMPORTS | {"waves.equation": {"training.loss"}}, FLOOR_OF) == [
        "waves.equation -> training.loss"
    ]
    assert upward({"cfg": {"waves.engine"}}, FLOOR_OF)  # neighbours on one floor do not know each other


def test_no_modules_import_each_other_in_a_circle():
    check_no_circle(IMPORTS)
    assert "waves.engine" in IMPORTS["waves.equation"]
    with pytest.raises(graphlib.CycleError, match="nodes are in a cycle"):
        check_no_circle(IMPORTS | {"waves.engine": {"waves.equation"}})


def test_imports_are_found_at_the_top_within_functions_and_by_folder(tmp_path):
    (tmp_path / "waves").mkdir()
    (tmp_path / "waves" / "__init__.py").write_text("from waves.equation import simulate\n")
    (tmp_path / "waves" / "equation.py").write_text("import math\n")
    (tmp_path / "cfg.py").write_text("def parse():\n    import waves.equation\n")
    (tmp_path / "data.py").write_text("from waves import equation, simulate\nfrom cfg import parse\n")
    assert find_imports(find_modules(tmp_path)) == {
        "cfg": {"waves.equation"},
        "data": {"waves.equation", "waves", "cfg"},
        "waves": {"waves.equation"},
        "waves.equation": set(),
    }


def test_no_module_has_the_name_of_one_of_pythons_own():
    assert "wave" in sys.stdlib_module_names
    assert not {part for module in MODULES for part in module.split(".")} & sys.stdlib_module_names


def test_simulate_is_imported_from_any_folder_and_pythons_own_wave_stays_itself(tmp_path):
    script = "from waves import simulate; import wave; print(simulate.__module__, wave.open.__module__)"
    done = subprocess.run(
        [sys.executable, "-c", script],
        cwd=tmp_path,
        env=os.environ | {"PYTHONPATH": str(ROOT)},
        capture_output=True,
        text=True,
    )
    assert done.stdout.split() == ["waves.equation", "wave"], done.stderr
