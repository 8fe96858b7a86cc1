"""The README and the site: nothing is missing, every block holds against the code, every link leads somewhere."""

import ast
import inspect
import json
import os
import re
import shlex
import subprocess
import sys
from functools import cache
from pathlib import Path
from typing import get_args

import pytest
import torch
from torch import nn

ROOT = Path(__file__).parents[2]
DOCS = ROOT / "docs"
sys.path.insert(0, str(DOCS / "_tools"))
import generated  # noqa: E402  # of the site, beside it
import tutorials  # noqa: E402

import mimicut  # noqa: E402

# Pages that people wrote: what is below must hold on them. Log and generated pages record what was.
PAGES = [
    *(ROOT / name for name in ("README.md", "CONTRIBUTING.md", "CHANGELOG.md", "SECURITY.md", "CODE_OF_CONDUCT.md")),
    *(path for path in sorted(DOCS.rglob("*.md")) if "Made by `python" not in path.read_text(encoding="utf-8")[:600]),
]  # fmt: skip
WRITTEN = [path for path in PAGES if path.name != "LOG.md"]


def text_of(path: Path) -> str:
    return path.read_text(encoding="utf-8")


def named(path: Path) -> str:
    return str(path.relative_to(ROOT))


def blocks(language: str) -> list:
    """Each block of code of that language, with its page and number."""
    found = []
    for path in WRITTEN:
        pattern = rf"^( *)```{language}\n(.*?)^ *```$"
        for i, (indent, code) in enumerate(re.findall(pattern, text_of(path), re.MULTILINE | re.DOTALL)):
            unindented = re.sub(rf"^{indent}", "", code, flags=re.MULTILINE)
            found.append(pytest.param(unindented, id=f"{named(path)}-{i}"))
    return found


# ---- nothing is missing


def test_every_public_name_is_in_the_reference():
    listed = re.findall(rf"^::: {mimicut.__name__}\.(\w+)$", text_of(DOCS / "reference" / "python.md"), re.MULTILINE)
    assert sorted(listed) == mimicut.__all__


def test_every_option_is_in_the_reference():
    page = generated.command_line_page()
    parts = dict(re.findall(r"^## (\w+)\n(.*?)(?=^## |\Z)", page, re.MULTILINE | re.DOTALL))
    for name, function in functions().items():
        for option in inspect.signature(function).parameters.values():
            shown = f"`{option.name.upper()}`" if option.default is option.empty else f"`{flag(function, option)}`"
            if option.name == "out" and name in ("compress", "recover", "sweep"):
                shown = "`--out`"  # required, and an option
            assert f"| {shown}" in parts[name], f"{name}: {option.name} is missing"


def flag(function, option) -> str:
    """The flag of an option, if it is not named otherwise in its annotation."""
    hint = inspect.get_annotations(function, eval_str=True)[option.name]
    declared = [flag for info in get_args(hint) for flag in getattr(info, "param_decls", None) or ()]
    return declared[0] if declared else "--" + option.name.replace("_", "-")


@cache
def functions() -> dict:
    import mimicut.cli.app as app

    return {function.__name__: inspect.unwrap(function) for function in app._EXAMPLES}


def test_every_error_is_in_the_reference():
    import mimicut.base.errors as errors

    page = text_of(DOCS / "reference" / "errors.md")
    for name, kind in vars(errors).items():
        if isinstance(kind, type) and issubclass(kind, (mimicut.MimicutError, KeyboardInterrupt)):
            code = getattr(kind, "exit_code", 130)
            assert name == "MimicutError" or re.search(rf"\| `{name}` \| {code} \|", page), name


def test_every_field_of_a_plan_and_every_file_is_in_the_reference():
    from mimicut.results.files import BESIDE, FILES
    from mimicut.surgery.plan_check import KINDS

    page = text_of(DOCS / "reference" / "result_folder.md")
    fields = page.partition("## plan.json")[2].partition("## report.json")[0]
    assert not [name for name in KINDS if f"`{name}`" not in fields]
    assert not [name for name in (*FILES, *BESIDE) if f"`{name}`" not in page and not name.endswith(".data")]


def test_every_key_of_the_json_line_is_in_the_reference():
    from mimicut.cli.printing import result_line

    page = text_of(DOCS / "reference" / "result_folder.md").partition("## The JSON line")[2]
    assert not [key for key in result_line(mimicut.Report(), None) if f"`{key}`" not in page]


def test_every_model_of_the_zoo_and_every_operator_is_named():
    from mimicut.anatomy.operators import TABLE

    page = generated.operators_page()
    assert not [name for name in TABLE if f"`{name}`" not in page]
    models = re.findall(r"^(\d+) models were run", page, re.MULTILINE)
    assert models == re.findall(r"^(\d+) of \d+ models were run", text_of(DOCS / "zoo.md"), re.MULTILINE)


def test_every_package_has_its_paragraph():
    page = text_of(DOCS / "architecture.md")
    packages = re.findall(r"^\*\*(\w+)\*\*: ", page, re.MULTILINE)
    layers = text_of(ROOT / "tests" / "test_layers.py").partition("LAYERS = (")[2].partition(")")[0]
    assert packages == re.findall(r'"(\w+)"', layers)


def test_the_index_of_the_log_has_every_entry():
    page = generated.log_index_page()
    titles = re.findall(r"^## (.+)$", text_of(DOCS / "LOG.md"), re.MULTILINE)
    assert len(titles) > 10
    assert re.findall(r"LOG\.md#([\w-]+)\)", page) == [generated.anchor(title) for title in titles]


def test_every_page_is_in_the_navigation():
    listed = re.findall(r"[\w/]+\.md", text_of(ROOT / "mkdocs.yml").partition("\nnav:")[2])
    there = {str(path.relative_to(DOCS)) for path in DOCS.rglob("*.md")}
    assert sorted(listed) == sorted(there | set(generated.PAGES))


def test_pages_that_people_search_for_exist():
    """Their words are tags, which the search puts first."""
    there = {str(path.relative_to(DOCS)) for path in DOCS.rglob("*.md")}
    assert set(generated.SEARCHED) <= there
    words = [words for each in generated.SEARCHED.values() for words in each]
    assert len(set(words)) == len(words)


# ---- blocks of code


@pytest.mark.parametrize("code", blocks("python"))
def test_python_calls_what_there_is(code):
    """Every name of the package exists, and takes the arguments that the block gives it."""
    for node in ast.walk(ast.parse(code)):
        if isinstance(node, ast.Attribute) and isinstance(node.value, ast.Name) and node.value.id == mimicut.__name__:
            assert node.attr in mimicut.__all__
        if isinstance(node, ast.Call) and isinstance(node.func, ast.Attribute):
            owner = node.func.value
            if isinstance(owner, ast.Name) and owner.id == mimicut.__name__:
                check_call(getattr(mimicut, node.func.attr), node)


def check_call(function, node: ast.Call) -> None:
    signature = inspect.signature(function)
    given = {keyword.arg: None for keyword in node.keywords if keyword.arg}
    signature.bind(*node.args, **given)
    for parameter in signature.parameters.values():
        if parameter.kind is parameter.VAR_KEYWORD:  # Unpack[a TypedDict]
            (options,) = get_args(inspect.get_annotations(function, eval_str=True)[parameter.name])
            assert set(given) <= set(signature.parameters) | set(options.__annotations__)


@pytest.mark.parametrize(
    "wrong", ["mimicut.compress(a, b, keap=0.5)", "mimicut.own_teacher(a, input_size=3)", "mimicut.load()"]
)
def test_a_wrong_call_is_found(wrong):
    with pytest.raises((AssertionError, TypeError)):
        test_python_calls_what_there_is(wrong)


def block_with(page: str, text: str) -> str:
    pages = [code.values[0] for code in blocks("python") if code.id.startswith(page) and text in code.values[0]]
    assert len(pages) == 1
    return pages[0]


def test_the_block_with_a_network_in_hand_runs():
    found = {}
    exec(block_with("docs/how_to/own_network.md", "own_teacher"), found)
    assert found["result"].report.macs_student <= 0.5 * found["result"].report.macs_teacher


@pytest.mark.parametrize(("page", "text"), [("own_network.md", "# mine.py"), ("pruned_elsewhere.md", "# pruned.py")])
def test_the_blocks_that_build_a_network_run(page, text):
    found = {}
    exec(block_with(f"docs/how_to/{page}", text), found)
    made = found["build"]()
    network = made[0] if isinstance(made, tuple) else made
    with torch.no_grad():
        assert len(network.eval()(torch.zeros(1, 3, 64, 64))) == 1


def test_the_block_step_by_step_runs(monkeypatch):
    torch.manual_seed(0)
    body = nn.Sequential(nn.Conv2d(3, 8, 3), nn.ReLU(), nn.Conv2d(8, 8, 3), nn.ReLU())
    model = nn.Sequential(body, nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(8, 4)).eval()
    images = torch.rand(8, 3, 16, 16)
    quick = mimicut.preset("default", steps=1, views="pad_crop")
    monkeypatch.setitem(vars(mimicut), "preset", lambda name, views: quick)
    found = {"mimicut": mimicut, "model": model, "images": images, "example": images[:1]}
    exec(block_with("docs/index.md", "step by step"), found)
    assert torch.equal(found["model_small"][3].weight, model[3].weight)


@pytest.mark.parametrize("code", blocks("console"))
def test_commands_parse(code):
    import typer.main

    group = typer.main.get_command(sys.modules["mimicut.cli.app"].app if functions() else None)
    for line in code.splitlines():
        words = shlex.split(line.removeprefix("$ "), comments=True)
        if not line.startswith("$") or words[0] not in ("mimicut", "make"):
            continue
        if words[0] == "make":
            assert re.search(rf"^{words[1]}:", text_of(ROOT / "Makefile"), re.MULTILINE), line
            continue
        name, *rest = words[1:]
        if "--config" not in rest:  # which stands for all that is required
            with group.commands[name].make_context(name, rest) as context:
                check_values(name, context.params)


def check_values(name: str, given: dict) -> None:
    """The values of options are such as the code takes."""
    from mimicut.cli.option_values import formats_in
    from mimicut.recovery.config import preset
    from mimicut.runtime.export import FILES
    from mimicut.surgery.budget import BudgetOptions, or_whole, several_budgets

    if given.get("to"):  # whose packages need not be here
        assert set(formats_in(given["to"])) <= set(FILES)
    if "preset" in given:
        preset(given["preset"], given.get("effort"), steps=given.get("steps"))
    budget = {key: value for key, value in given.items() if key in BudgetOptions.__annotations__ and value}
    lists = {key: budget.pop(key) for key in ("keep", "latency", "latency_ms") if isinstance(budget.get(key), list)}
    sized = lists or {"keep", "params", "size_mb", "keep_width", "latency", "latency_ms", "drop"} & set(budget)
    showing = name == "plan" and given.get("images") and not sized
    if name in ("compress", "plan") and not given.get("plan") and not showing:
        for options in several_budgets(budget, **lists).values():
            mimicut.Budget.of(**(or_whole(options) if given.get("int8") else options))


@pytest.mark.parametrize(
    "wrong",
    [
        "$ mimicut compress net photos/ --keap 0.5 --out small/", "$ mimicut inspekt net", "$ make cake",
        "$ mimicut compress net photos/ --keep 50 --out small/", "$ mimicut export small/ --to tflight",
    ],
)  # fmt: skip
def test_a_wrong_command_is_found(wrong):
    with pytest.raises(Exception, match=r"."):
        test_commands_parse(wrong)


# ---- links, lengths, pictures


@pytest.mark.parametrize("path", PAGES, ids=named)
def test_links_lead_somewhere(path):
    text = re.sub(r"^ *```.*?^ *```$|`[^`\n]*`", "", text_of(path), flags=re.MULTILINE | re.DOTALL)
    links = re.findall(r"\]\(([^)\s]+)\)", text) + re.findall(r'(?:src|srcset)="([^"]+)"', text)
    for link in links:
        if re.match(r"https?:", link):
            continue
        target, _, anchor = link.partition("#")
        place = (path.parent / target).resolve() if target else path
        made = generated.PAGES.get(str(place.relative_to(DOCS)) if place.is_relative_to(DOCS) else "")
        assert place.exists() or made, f"{named(path)}: {link}"
        if anchor and (made or place.suffix == ".md") and not anchor.startswith(mimicut.__name__):
            titles = re.findall(r"^#+ (.+)$", made() if made else text_of(place), re.MULTILINE)
            assert anchor in map(generated.anchor, titles), f"{named(path)}: {link}"


def test_the_readme_is_short():
    text = re.sub(r"^```.*?^```$|^\|.*?$|<picture>.*?</picture>", "", text_of(ROOT / "README.md"), flags=re.M | re.S)
    words = re.sub(r"\]\([^)]*\)", "]", text).split()
    assert 450 <= len(words) <= 650, len(words)


def test_the_figures_of_the_readme_are_those_of_the_pages():
    """Rows of its table stand on the page of results; its picture has the figures of docs/real.md."""
    rows = re.findall(r"^\| .* % \|.*\|$", text_of(ROOT / "README.md"), re.MULTILINE)
    assert len(rows) == 3
    assert all(row in text_of(DOCS / "measured.md") for row in rows)
    agreeing, sure = (
        table.partition("efficientnet_lite0, 160 pixels")[2].partition("**")[2].partition("**")[0]
        for table in text_of(DOCS / "real.md").split("## ")[1:4:2]
    )
    rows = [re.search(r"^\| 0\.7 \| 50 \| 400 \|(.*)$", table, re.MULTILINE)[1] for table in (agreeing, sure)]
    (cut, _, mir, ours), (*_, surely) = ([float(x) for x in re.findall(r"([\d.]+) \(", row)][:4] for row in rows)
    picture = text_of(DOCS / "figures" / "whole.svg")
    assert f">{ours:.0f} %<" in picture
    assert f">{surely:.0f} %<" in picture
    assert f"MiR as published: {mir:.0f} %; a cut of this size without training: {cut} %" in picture
    for words in (f"; {ours:.0f} % of", f"{surely:.0f} % where", f"MiR as published {mir:.0f} %"):
        assert words in text_of(ROOT / "README.md")


def test_the_figures_of_other_tasks_are_those_of_their_page():
    rows = re.findall(
        r"^\| \w+_tiny \| (.*?),? (?:%|dB) \| ([\d.]+) \| ([\d.]+) \| ([\d.]+) \|",
        text_of(DOCS / "other_tasks.md"),
        re.M,
    )
    assert len(rows) == 4
    page = " ".join(text_of(DOCS / "measured.md").split())
    for name, teacher, mir, ours in rows:
        assert re.search(rf"{name},? {ours} (%|dB) \((teacher )?{teacher}, (MiR )?{mir}\)", page), name


def test_the_count_of_networks_is_that_of_the_zoo():
    run, done = re.search(r"^(\d+) of \1 models were run: (\d+) done", text_of(DOCS / "zoo.md"), re.MULTILINE).groups()
    readme = " ".join(text_of(ROOT / "README.md").split())
    assert f"[{run} models](docs/zoo.md), with random weights, were cut" in readme
    assert f"exported: {done} the whole way" in readme


def test_the_cost_of_many_jobs_is_the_measured_one():
    found = json.loads(text_of(ROOT / "benchmarks" / "results" / "sweep_cost.json"))
    page = " ".join(text_of(DOCS / "how_to" / "many_jobs.md").split())
    assert f"{found['job']:.1f} s of processor time for each" in page
    assert f"for 1,000 jobs it makes {found['processor_hours_of_1000']} hours on one core" in page
    assert f"in {found['sweep']['10']} s and 1,000 in {found['sweep']['1000']} s" in page


def test_drawings_are_the_same_in_light_and_dark():
    def shapes(name: str) -> str:
        return re.sub(r"<style>.*?</style>", "", text_of(DOCS / "figures" / name), flags=re.DOTALL)

    assert shapes("whole.svg") == shapes("whole-dark.svg")
    styles = {re.search(r"<style>.*?</style>", text_of(p), re.DOTALL)[0] for p in (DOCS / "figures/concepts").iterdir()}
    assert len(styles) == 1


def test_workflows_call_scripts_that_exist():
    called = [
        script
        for path in (ROOT / ".github" / "workflows").iterdir()
        for script in re.findall(r"run: (\S+)", text_of(path))
    ]
    assert len(called) >= 4
    for script in called:
        place = ROOT / script
        assert script == "make" or (place.is_file() and place.stat().st_mode & 0o111), script


TUTORIALS = sorted((DOCS / "tutorials").glob("*.py"))


@pytest.mark.parametrize("path", TUTORIALS, ids=named)
def test_the_page_of_a_tutorial_has_its_code(path):
    shown = re.findall(r"^```python\n(.*?)^```", text_of(path.with_suffix(".md")), re.DOTALL | re.MULTILINE)
    assert [code.strip() for code in shown] == tutorials.code_cells(path)


@pytest.mark.long
@pytest.mark.parametrize("path", TUTORIALS, ids=named)
def test_a_tutorial_runs(path, tmp_path):
    """With two simulated users in place of twelve, as each takes as long as the first."""
    shorter = tmp_path / path.name
    code, users = path.read_text(encoding="utf-8"), "for seed in range(12):"
    assert (users in code) == (path.stem == "certificate_and_its_limits")
    shorter.write_text(code.replace(users, "for seed in range(2):"), encoding="utf-8")
    ran = subprocess.run(
        [sys.executable, shorter], capture_output=True, text=True, check=False, env=os.environ | {"MPLBACKEND": "agg"}
    )
    assert ran.returncode == 0, ran.stderr[-2000:]
