"""How the packages stand on one another, which libraries they use, and the names and flags that users rely on."""

import ast
import subprocess
import sys
from functools import cache
from pathlib import Path

import pytest

PACKAGE = Path(__file__).parents[1] / "mimicut"
FILES = sorted(PACKAGE.rglob("*.py"))
# Each imports from those before it and from itself, never from one that comes later.
LAYERS = (
    "base", "surgery", "demo", "inputs", "anatomy", "recovery", "runtime", "planning", "proof", "results", "workflow",
    "cli",
)  # fmt: skip
# Library -> modules that may import it.
LIBRARIES = {
    "timm": {"inputs.timm_models"}, "torchvision.models": {"inputs.torchvision_models"},
    "transformers": {"inputs.hugging_face_models"}, "open_clip": {"inputs.open_clip_models"},
    "huggingface_hub": {"inputs.hugging_face_models", "inputs.timm_models", "results.hub"},
    "jinja2": {"results.html_page"}, "pydantic": {"base.schema", "results.report_schema"},
    "pickle": set(), "matplotlib": {"results.picture"}, "ray": {"workflow.jobs_on_ray"},
    "onnx": {
        "inputs.onnx_models", "inputs.onnx_operators", "inputs.onnx_reader", "results.export_checks", "runtime.export",
        "runtime.int8", "runtime.int8_network", "runtime.layer_values",
    },
    "onnxruntime": {
        "inputs.onnx_models", "runtime.export", "runtime.int8", "runtime.latency", "runtime.run_exported",
    },
    "onnxscript": {"runtime.export"},
    **{library: {"runtime.edge_converter"} for library in (
        "ai_edge_litert", "coremltools", "executorch", "litert_torch", "torch_tensorrt",
    )},
    "openvino": {"runtime.export", "runtime.latency", "runtime.layer_values", "runtime.run_exported"},
}  # fmt: skip


def dotted(path: Path) -> str:
    """ "surgery.plan", and "surgery" for the package's own file."""
    return ".".join(path.relative_to(PACKAGE).with_suffix("").parts).removesuffix(".__init__")


MODULES = {dotted(path): path for path in FILES}


@cache
def imported(path: Path) -> tuple[tuple[str, str], ...]:
    """(module, name) of all that is imported, in functions too; the name is "" for a plain import."""
    found = []
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            found += [(alias.name, "") for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path}: a relative import"
            found += [(node.module, alias.name) for alias in node.names]
    return tuple(found)


def own(path: Path) -> set[str]:
    """Modules of the package that `path` imports from."""
    found = set()
    for module, name in imported(path):
        if module == "mimicut" or module.startswith("mimicut."):
            place = module.removeprefix("mimicut").removeprefix(".")
            inner = f"{place}.{name}".removeprefix(".")
            found.add(inner if inner in MODULES else place)
    return found


def test_every_file_is_in_a_layer():
    packages = {path.relative_to(PACKAGE).parts[0] for path in FILES if path.parent != PACKAGE}
    assert packages == set(LAYERS)
    assert {path.name for path in FILES if path.parent == PACKAGE} == {"__init__.py", "__main__.py"}


@pytest.mark.parametrize("path", [p for p in FILES if p.parent != PACKAGE], ids=dotted)
def test_no_arrow_runs_upward(path):
    at = LAYERS.index(dotted(path).split(".")[0])
    above = sorted(d for d in own(path) if d.split(".")[0] not in LAYERS[: at + 1])
    assert not above, f"{dotted(path)} imports {', '.join(above)}, which come later"


def test_no_circle():
    arrows = {name: own(path) - {name} for name, path in MODULES.items()}
    while arrows:
        free = {name for name, others in arrows.items() if not others & set(arrows)}
        assert free, f"a circle among {', '.join(sorted(arrows))}"
        arrows = {name: others for name, others in arrows.items() if name not in free}


@pytest.mark.parametrize("path", FILES, ids=dotted)
def test_no_private_name_crosses_packages(path):
    package = dotted(path).split(".")[0]
    taken = [
        f"{module}.{name}"
        for module, name in imported(path)
        if module.startswith("mimicut.") and module.split(".")[1] != package
        if name.startswith("_") or any(part.startswith("_") for part in module.split("."))
    ]
    assert not taken


@pytest.mark.parametrize("path", FILES, ids=dotted)
def test_libraries_keep_to_their_modules(path):
    for library, modules in LIBRARIES.items():
        uses = any(f"{module}.{name}.".startswith(f"{library}.") for module, name in imported(path))
        assert not uses or dotted(path) in modules, f"{dotted(path)} imports {library}"


# Packages whose code saves, and what changes files: only base.disk does, so that every change is announced.
SAVING = ("base", "surgery", "recovery", "runtime", "planning", "proof", "results", "workflow", "cli")
CHANGES = {
    "write_text", "write_bytes", "unlink", "rmdir", "mkdir", "makedirs", "rename", "renames", "touch", "symlink_to",
    "hardlink_to", "symlink", "link", "chmod", "truncate", "rmtree", "copyfile", "copytree", "removedirs",
    "posix_fallocate", "NamedTemporaryFile", "mkdtemp", "mkstemp", "SpooledTemporaryFile",
}  # fmt: skip
# Calls of libraries that write a file: they stand inside `write_by`, or write to the system's temporary folder.
WRITERS = {"save_file", "save_model", "savefig", "savez", "quantize_static", "quant_pre_process", "quantise"}
TEMPORARY = {"results.export_checks.savez", "runtime.int8.quant_pre_process", "runtime.int8.quantize_static",
             "runtime.int8.save", "runtime.export.save", "runtime.edge_formats.savez", "runtime.latency.quantise",
             "runtime.layer_values.save",
             "runtime.layer_values.save_model", "runtime.run_exported.savez"}  # fmt: skip


def changes_of_files(tree: ast.AST, module: str) -> list[str]:
    """Calls that change files, and are neither in base.disk nor what `write_by` is given."""
    given = {
        id(inner)
        for node in ast.walk(tree)
        if isinstance(node, ast.Call) and getattr(node.func, "id", "") == "write_by"
        for argument in node.args
        for inner in ast.walk(argument)
    }
    found = []
    for node in ast.walk(tree):
        if not isinstance(node, ast.Call) or id(node) in given:
            continue
        owner = getattr(node.func, "value", None)
        name = getattr(node.func, "attr", None) or getattr(node.func, "id", "")
        texts = [a.value for a in [*node.args, *(k.value for k in node.keywords)] if isinstance(a, ast.Constant)]
        opens = name == "open" and any(isinstance(t, str) and set(t) & set("wax+") and len(t) < 4 for t in texts)
        of_os = getattr(owner, "id", "") in ("os", "shutil") and name in ("remove", "replace", "move", "copy", "copy2")
        saves = name == "save" and module not in ("workflow.compress",)  # store.save
        if name in CHANGES or opens or of_os or ((name in WRITERS or saves) and f"{module}.{name}" not in TEMPORARY):
            found.append(f"{name}, line {node.lineno}")
    return found


@pytest.mark.parametrize("path", [p for p in FILES if dotted(p).split(".")[0] in SAVING], ids=dotted)
def test_files_are_changed_in_one_place(path):
    found = changes_of_files(ast.parse(path.read_text(encoding="utf-8")), dotted(path))
    # runtime.edge_converter is what `write_by` lets another process do.
    assert dotted(path) in ("base.disk", "runtime.edge_converter") or not found, (
        f"{dotted(path)} changes files past base.disk: {', '.join(found)}"
    )


@pytest.mark.parametrize(
    "line",
    ["path.write_text('x')", "open(path, 'w')", "path.open('rb+')", "os.replace(a, b)", "shutil.rmtree(a)",
     "save_file(t, path)", "torch.save(t, path)", "with tempfile.NamedTemporaryFile() as f: pass"],
)  # fmt: skip
def test_a_change_of_files_elsewhere_is_found(line):
    assert changes_of_files(ast.parse(line), "results.store")


@pytest.mark.parametrize(
    "line", ["write_by(path, lambda to: save_file(t, to))", "open(path)", "text.replace('a', 'b')"]
)
def test_what_goes_through_the_one_place_is_no_such_change(line):
    assert not changes_of_files(ast.parse(line), "results.store")


@pytest.mark.parametrize("path", FILES, ids=dotted)
def test_no_module_bears_a_name_of_the_standard_library(path):
    assert path.stem.startswith("__") or path.stem not in sys.stdlib_module_names


@pytest.mark.parametrize("package", LAYERS)
def test_every_package_says_what_lives_there(package):
    assert ast.get_docstring(ast.parse((PACKAGE / package / "__init__.py").read_text(encoding="utf-8")))


def test_importing_the_package_imports_no_torch():
    code = "import sys, mimicut, mimicut.cli.app; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0


def test_public_names():
    import mimicut

    assert mimicut.__all__ == [
        "Anatomy", "Budget", "ClosedFormOptions", "CutStudent", "InputSource", "Latency", "MeasuredLatency",
        "MimicConfig", "MimicutError", "PRESETS", "Plan", "Preprocessing", "Report", "Result", "SCORES", "Seam",
        "SeamPoint", "Setting", "Teacher", "WithExtra", "capturing", "channel_evidence", "check_cut", "closed_form",
        "compress", "count", "crossfit", "cut", "draw_pictures", "explain_export", "export", "export_folder", "figures",
        "find_seam", "from_pretrained", "inspect", "load", "load_teacher", "make_plan", "measure", "mimic",
        "own_teacher", "preset", "push_to_hub", "put_under_head", "read_extra", "read_images", "read_plan", "recover",
        "recover_pruned", "recoverability", "replan", "save", "split", "trace",
    ]  # fmt: skip
    for name in mimicut.__all__:
        assert callable(getattr(mimicut, name)) or isinstance(getattr(mimicut, name), dict)
    with pytest.raises(AttributeError, match="nothing"):
        _ = mimicut.nothing


BUDGET = """--keep --keep-width --params --size-mb --latency --latency-ms --runtime --batch --depth --scheme
    --spare-ends --no-spare-ends --drop --pin --exclude --min-channels --divisor
    --importance"""
TEACHER = "--weights --pretrained --no-pretrained --num-classes --part --input-size --seam --threads"
FLAGS = {
    "inspect": f"{TEACHER} --picture",
    "plan": f"{BUDGET} {TEACHER} --images --out --picture --seed --force --no-force",
    "compress": f"""{BUDGET} {TEACHER} --out --plan --preset --effort --steps --max-seconds --seed --device --devices
        --precision --layout --max-memory --views --held-out --held-out-share --extra --crossfit --max-error
        --min-agreement --class-names --output --alternatives --no-alternatives --to --int8 --no-int8 --labelled --mean
        --std --resize
        --tensorboard --force --no-force --resume --no-resume --config""",
    "recover": """--out --to --preset --effort --steps --seed --device --precision --layout --max-memory
        --views --held-out --held-out-share --extra --max-error --min-agreement --output --labelled --weights
        --pretrained --no-pretrained --num-classes --class-names --input-size --mean --std
        --resize --seam --tensorboard --force --no-force --threads --config""",
    "sweep": "--out --jobs --threads --gpus --max-memory --address --dry-run --force",
    "export": """--to --images --held-out --teacher --weights --pretrained --no-pretrained --normalise --no-normalise
        --dynamic-size --no-dynamic-size --explain --no-explain --int8-steps --extra --device
        --force --no-force --threads""",
    "verify": """--teacher --labelled --weights --pretrained --no-pretrained --device --max-memory --max-error
        --min-agreement --threads""",
    "push": "--private --no-private --message",
    "demo": """--teacher --keep --keep-width --images --preset --effort --steps --seed --out --force --no-force
        --resume --no-resume --threads""",
}


def test_commands_and_flags():
    import typer.main

    from mimicut.cli.app import app

    commands = typer.main.get_command(app).commands
    found = {
        name: {o for p in command.params for o in (*p.opts, *p.secondary_opts) if o.startswith("--")} - {"--help"}
        for name, command in commands.items()
    }
    assert found == {name: set(flags.split()) for name, flags in FLAGS.items()}
    assert all((command.epilog or "").startswith("Example: mimicut ") for command in commands.values())
