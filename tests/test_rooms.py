"""What each room may not import, and the names and flags that users rely on: both are frozen here."""

import ast
import subprocess
import sys
from pathlib import Path

import pytest

PACKAGE = Path(__file__).parents[1] / "understudy"
FILES = sorted(PACKAGE.rglob("*.py"))

# room -> what it must not import from the package
FORBIDDEN = {
    "errors": {"*"},
    "guard": {"*", "-errors"},
    "report": {"*", "-certificate", "-errors"},
    "seam": {"*", "-errors"},
    "channels": {"*"},
    "modules": {"*"},
    "trace": {"*", "-errors", "-guard", "-modules", "-seam"},
    "rules": {"*", "-channels", "-trace"},
    "attention": {"*", "-channels", "-rules", "-trace"},
    "recurrent": {"*", "-channels", "-rules", "-trace"},
    "operators": {"*", "-attention", "-channels", "-recurrent", "-rules", "-trace"},
    "calls": {"*", "-guard", "-modules", "-trace"},
    "graph": {"*", "-calls", "-channels", "-operators", "-rules", "-seam", "-trace"},
    "selection": {"*", "-errors", "-graph"},
    "plan": {"*", "-errors", "-guard", "-seam"},
    "cut": {"*", "-errors", "-guard", "-modules", "-plan"},
    "blocks": {"*", "-cost", "-cut", "-errors", "-graph", "-guard", "-modules", "-trace"},
    "preprocessing": {"*", "-errors"},
    "memory": {"*", "-errors"},
    "footprint": {"*", "-errors", "-graph", "-guard", "-memory", "-trace"},
    "decode": {"*", "-errors", "-preprocessing"},
    "sources": {"*", "-decode", "-errors"},
    "images": {"*", "-augment", "-decode", "-errors", "-memory", "-preprocessing", "-sources"},
    "augment": {"*"},
    "weights": {"*", "-errors"},
    "imagenet": {"*", "-errors"},
    "crops": {"*", "-demo", "-errors", "-photographs"},
    "answers": {"*", "-guard", "-images"},
    "builders": {"*", "-augment", "-errors", "-preprocessing", "-demo"},
    "teachers": {"*", "-augment", "-builders", "-errors", "-guard", "-preprocessing", "-store", "-weights"},
    "muon": {"*"},
    "layout": {"*"},
    "ways": {"*", "-layout"},
    "folded": {"*"},
    "config": {"*", "-augment", "-errors", "-layout", "-muon"},
    "batches": {"*", "-augment", "-errors"},
    "checkpoint": {"*"},
    "judge": {"*", "-batches", "-guard", "-seam"},
    "runtimes": {"*", "-errors", "-export", "-guard", "-report", "-trace"},
    "divisors": {"*", "-guard", "-runtimes"},
    "limits": {"*", "-cost", "-graph", "-guard", "-trace"},
    "recoverability": {
        "*",
        "-batches",
        "-blocks",
        "-closed_form",
        "-cost",
        "-cut",
        "-graph",
        "-guard",
        "-judge",
        "-layers",
        "-seam",
    },
    "budgets": {"mimic", "images", "store", "compress", "cli"},
    "picture": {"*", "-errors"},
    "mimic": {
        "*",
        "-batches",
        "-checkpoint",
        "-config",
        "-errors",
        "-folded",
        "-guard",
        "-layout",
        "-memory",
        "-seam",
        "-ways",
    },
    "norms": {"*", "-batches", "-guard"},
    "lockstep": {"*", "-batches", "-guard", "-memory"},
    "layers": {"*", "-graph", "-guard", "-lockstep", "-trace"},
    "gated": {"*"},
    "elimination": {"*"},
    "rehearsal": {
        "*",
        "-batches",
        "-closed_form",
        "-config",
        "-errors",
        "-graph",
        "-guard",
        "-judge",
        "-mimic",
        "-plan",
        "-spoken",
    },
    "spoken": {"*"},
    "closed_form": {
        "*",
        "-augment",
        "-batches",
        "-cost",
        "-gated",
        "-graph",
        "-guard",
        "-layers",
        "-layout",
        "-lockstep",
        "-memory",
        "-modules",
        "-plan",
        "-trace",
    },
    "score": {"*", "-graph", "-trace"},
    "planner": {"mimic", "restore", "closed_form", "reconstruction", "images", "store", "compress", "cli"},
    "replace": {"*", "-errors", "-guard", "-seam", "-verify"},
    "certificate": {"*", "-errors"},
    "tensorboard": {"*", "-errors", "-report"},
    "image_check": {"*", "-guard", "-images", "-layout", "-seam", "-verify"},
    "verify": {"*", "-certificate", "-errors", "-guard", "-images", "-layout", "-seam"},
    "export": {"*", "-errors", "-guard", "-int8", "-seam", "-trace"},
    "int8": {"*", "-trace"},
    "int8_table": {"*", "-certificate", "-export", "-guard", "-images", "-runtimes", "-trace", "-verify"},
    "deploy": {"compress", "cli", "mimic", "restore", "planner"},
    "run_exported": {"*"},
    "page": {"*", "-certificate", "-plan", "-report"},
    "readme": {"*", "-plan", "-report"},
    "store": {"compress", "cli", "mimic", "config", "planner", "graph", "anatomy"},
}
LIBRARIES = {"timm": {"builders"}, "torchvision.models": {"builders"}, "transformers": {"builders"}, "pickle": set()}
LIBRARIES |= {"onnx": {"deploy", "export", "int8"}, "onnxruntime": {"export", "int8", "runtimes", "run_exported"}}
LIBRARIES |= {"onnxscript": {"export"}, "openvino": {"export", "runtimes", "run_exported"}, "matplotlib": {"picture"}}


def imported(path: Path) -> set[str]:
    found = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            found |= {f"{node.module}.{alias.name}" for alias in node.names}
    return found


def rooms_of(names: set[str]) -> set[str]:
    known = {p.stem for p in FILES} | {"demo", "recover"}
    return {part for name in names if name.startswith("understudy") for part in name.split(".")[1:] if part in known}


@pytest.mark.parametrize("room", FORBIDDEN)
def test_no_forbidden_arrow(room):
    rule = FORBIDDEN[room]
    allowed = {r[1:] for r in rule if r.startswith("-")}
    found = rooms_of(imported(next(p for p in FILES if p.stem == room))) - {room, "recover"}
    bad = found - allowed if "*" in rule else found & rule
    assert not bad, f"{room} must not import {sorted(bad)}"


@pytest.mark.parametrize("path", FILES, ids=lambda p: p.stem)
def test_libraries_keep_to_their_rooms(path):
    for library, rooms in LIBRARIES.items():
        uses = any(f"{n}.".startswith(f"{library}.") for n in imported(path))
        assert not uses or path.stem in rooms, f"{path.stem} imports {library}"
    text = path.read_text()
    assert "from torchvision import models" not in text or path.stem == "builders"


def test_importing_the_package_imports_no_torch():
    code = "import sys, understudy, understudy.cli; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0


def test_public_names():
    import understudy

    assert understudy.__all__ == [
        "Anatomy", "Latency", "MimicConfig", "PRESETS", "Plan", "Preprocessing", "Report", "Result", "SCORES", "Seam",
        "SeamPoint", "Setting", "Teacher", "UnderstudyError", "capturing", "check_cut", "closed_form", "compress",
        "count", "crossfit", "cut", "export", "export_folder", "figures", "find_seam", "inspect", "load",
        "load_teacher", "make_plan", "measure", "mimic", "own_teacher", "preset", "read_images", "read_plan",
        "reconstruction", "recover_pruned", "recoverability", "replace", "replan", "restore", "save", "split", "trace",
    ]  # fmt: skip
    import understudy.cut

    for name in understudy.__all__:
        assert callable(getattr(understudy, name)) or isinstance(getattr(understudy, name), dict)
    with pytest.raises(AttributeError, match="nothing"):
        _ = understudy.nothing


BUDGET = """--keep --keep-width --params --size-mb --latency --latency-ms --runtime --batch --depth --scheme
    --spare-ends --no-spare-ends --drop --pin --exclude --min-channels --divisor
    --importance"""
TEACHER = "--weights --pretrained --no-pretrained --num-classes --part --input-size --seam --threads"
FLAGS = {
    "inspect": TEACHER,
    "plan": f"{BUDGET} {TEACHER} --images --out --picture --seed --force --no-force",
    "compress": f"""{BUDGET} {TEACHER} --out --plan --preset --effort --steps --max-seconds --seed --device --precision
        --layout --max-memory --views --held-out --held-out-share --crossfit --min-agreement --alternatives
        --no-alternatives --to --labelled --mean --std --resize --tensorboard --force --no-force --resume
        --no-resume""",
    "recover": """--out --to --preset --effort --steps --seed --device --precision --layout --max-memory
        --views --held-out --held-out-share --min-agreement --labelled --weights --pretrained --no-pretrained
        --num-classes --input-size --mean --std
        --resize --seam --tensorboard --force --no-force --threads""",
    "export": """--to --images --held-out --teacher --weights --pretrained --no-pretrained --normalise --no-normalise
        --force --no-force --threads""",
    "verify": """--teacher --labelled --weights --pretrained --no-pretrained --device --max-memory --min-agreement
        --threads""",
    "demo": """--teacher --keep --keep-width --images --preset --effort --steps --seed --out --force --no-force
        --threads""",
}


def test_commands_and_flags():
    import typer.main

    from understudy.cli import app

    commands = typer.main.get_command(app).commands
    found = {
        name: {o for p in command.params for o in (*p.opts, *p.secondary_opts) if o.startswith("--")} - {"--help"}
        for name, command in commands.items()
    }
    assert found == {name: set(flags.split()) for name, flags in FLAGS.items()}
    assert all((command.epilog or "").startswith("Example: understudy ") for command in commands.values())
