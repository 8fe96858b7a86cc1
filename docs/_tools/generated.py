"""Pages of the site that are made from the code: every option of every command, the operator table, the log's index.

Nothing here imports the site generator, so that the tests can read the same text.
"""

import inspect
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parents[2]
DOCS = ROOT / "docs"
PACKAGE = next(path.parent.name for path in ROOT.glob("*/py.typed"))


def command_line_page() -> str:
    """Every command with its arguments and options, as the command line itself has them."""
    lines = [
        "# Commands and options",
        "",
        "Made from the commands themselves. Words and progress go to stderr; the last line of stdout is one JSON",
        f"document. `{PACKAGE} COMMAND --help` prints the same. [Exit codes and errors](errors.md).",
        "",
    ]
    for name, command in commands().items():
        lines += [f"## {name}", "", str(command.help), "", *_example(command.epilog), ""]
        arguments = [p for p in command.params if p.param_type_name == "argument"]
        if arguments:
            lines += ["| argument | is |", "|---|---|"]
            lines += [f"| `{p.name.upper()}` | {_cell(p.help)} |" for p in arguments] + [""]
        for panel, options in _panels(command).items():
            lines += [f"**{panel}**", "", "| option | takes | default | does |", "|---|---|---|---|"]
            lines += [_option_row(command, option) for option in options] + [""]
    return "\n".join(lines)


def commands() -> dict[str, Any]:
    """Name -> command, in the order in which the help shows them."""
    from importlib import import_module

    import typer.main

    group = typer.main.get_command(import_module(f"{PACKAGE}.cli.app").app)
    return dict(group.commands)  # type: ignore[attr-defined]


def flags(command: Any) -> list[str]:
    """All flags of a command but --help, also those that say no."""
    options = [p for p in command.params if p.param_type_name == "option" and p.name != "help"]
    return [flag for option in options for flag in (*option.opts, *option.secondary_opts)]


def _example(epilog: str | None) -> list[str]:
    return ["```console", "$ " + epilog.removeprefix("Example: "), "```"] if epilog else []


def _panels(command: Any) -> dict[str, list[Any]]:
    """Panel of the help -> its options. What is rarely needed comes last."""
    found: dict[str, list[Any]] = {}
    for option in command.params:
        if option.param_type_name == "option" and option.name != "help":
            found.setdefault(getattr(option, "rich_help_panel", None) or "Options", []).append(option)
    return dict(sorted(found.items(), key=lambda item: item[0] == "Rarely needed"))


_WORDS = {"float": "number", "int": "whole number", "Path": "path", "str": "text"}


def _option_row(command: Any, option: Any) -> str:
    names = ", ".join(f"`{flag}`" for flag in (*option.opts, *option.secondary_opts))
    hint = str(inspect.signature(command.callback).parameters[option.name].annotation)
    kind = "" if option.is_flag else next(word for name, word in _WORDS.items() if re.search(rf"\b{name}\b", hint))
    default = option.default
    shown = "required" if option.required else ""
    if option.is_flag:
        shown = "on" if default is True else "off"
    elif isinstance(default, (str, int, float)) and default != "":
        shown = f"`{default}`"
    several = "; may be repeated" if option.multiple else ""
    return f"| {names} | {kind}{several} | {shown} | {_cell(option.help)} |"


def _cell(text: str | None) -> str:
    return (text or "").replace("\\[", "[").replace("|", "\\|")


def operators_page() -> str:
    """The operators that the table reads, and the models that the zoo ran."""
    from importlib import import_module

    table = import_module(f"{PACKAGE}.anatomy.operators")
    names = {name: rule.__module__ for name, rule in table.TABLE.items()}
    lines = [
        "# Operators and models",
        "",
        f"Made from the operator table: {len(names)} operators. Channels that meet an operator outside it are pinned,",
        "with operator and module named; they are never guessed. What each pin means:",
        "[groups and blocks](../concepts/groups_and_blocks.md). To add one: [architecture](../architecture.md).",
        "",
        "Attention heads are cut whole, with their biases and tables; so are hidden widths of LSTM, GRU and RNN.",
        "",
    ]
    for kind in table._KINDS:
        summary = (kind.__doc__ or "").strip().split("\n\n")[0].replace("\n", " ")
        lines += [f"## {kind.__name__.rsplit('.', 1)[1].capitalize()}", "", summary, ""]
        lines += [", ".join(f"`{name}`" for name in sorted(kind.RULES)), ""]
    return "\n".join([*lines, *_models()])


def _models() -> list[str]:
    """By library the models of the zoo, and what became of those that did not go the whole way."""
    found: dict[str, list[str]] = {}
    for name, outcome in zoo_rows():
        library, _, model = name.partition(":")
        found.setdefault(library, []).append(f"`{model}`" + ("" if outcome == "done" else f" ({outcome})"))
    total = sum(map(len, found.values()))
    lines = [
        "## Models",
        "",
        f"{total} models were run: traced, cut, trained for a step, saved, loaded again and exported, or refused with",
        "the reason. What is pinned in each, and why: [the zoo](../zoo.md). Others of these families, and your own,",
        "are read in the same way.",
        "",
    ]
    for library, models in found.items():
        lines += [f"**{library}** ({len(models)}): {', '.join(models)}", ""]
    return lines


def zoo_rows() -> Iterator[tuple[str, str]]:
    """Name and outcome of each model in docs/zoo.md."""
    for line in (DOCS / "zoo.md").read_text(encoding="utf-8").splitlines():
        cells = [cell.strip() for cell in line.strip("|").split("|")]
        if re.match(r"\w+:", cells[0]) and len(cells) > 8:
            yield cells[0], cells[2]


def log_index_page() -> str:
    """The headings of docs/LOG.md by date, with the first sentence below each."""
    lines = [
        "# Log",
        "",
        "What was tried, with figures, failures included, in the order of the log: newest first.",
        "",
        "| day | entry |",
        "|---|---|",
    ]
    for title in re.findall(r"^## (.+)$", (DOCS / "LOG.md").read_text(encoding="utf-8"), re.MULTILINE):
        day, _, text = title.partition(": ")
        lines.append(f"| {day} | [{text or title}](LOG.md#{anchor(title)}) |")
    return "\n".join(lines) + "\n"


def anchor(title: str) -> str:
    """The anchor that Markdown gives to a heading."""
    plain = re.sub(r"[`*_]", "", re.sub(r"\[([^\]]*)\]\([^)]*\)", r"\1", title))
    plain = re.sub(r"[^\w\s-]", "", plain.lower(), flags=re.ASCII).strip()
    return re.sub(r"[-\s]+", "-", plain)


PAGES = {
    "reference/command_line.md": command_line_page,
    "reference/operators.md": operators_page,
    "log_index.md": log_index_page,
}


# Page -> what people type into the search who look for it.
SEARCHED = {
    "index.md": ["few-shot structured pruning", "pip install"],
    "concepts/groups_and_blocks.md": ["structured pruning", "channel pruning"],
    "concepts/mimic.md": ["distil without labels", "distill without labels", "knowledge distillation"],
    "how_to/detector.md": ["prune YOLO", "object detection"],
    "how_to/inputs_and_outputs.md": ["out of memory"],
    "how_to/int8.md": ["quantize", "quantise", "quantization"],
    "how_to/labelled.md": ["fine-tune"],
    "how_to/milliseconds.md": ["faster inference", "speed up", "Raspberry Pi"],
    "how_to/no_go.md": ["NO GO"],
    "how_to/onnx_file.md": ["smaller ONNX"],
    "how_to/own_network.md": ["make model smaller", "compress model"],
    "how_to/retrieval.md": ["image retrieval", "embeddings"],
    "how_to/segmentation.md": ["semantic segmentation"],
}


def public_names() -> dict[str, str]:
    """Public name -> the module that defines it, such as `cut` -> `surgery.cut`."""
    text = (ROOT / PACKAGE / "__init__.py").read_text(encoding="utf-8")
    return dict(re.findall(r'^    "(\w+)": "([\w.]+)",$', text, re.MULTILINE))
