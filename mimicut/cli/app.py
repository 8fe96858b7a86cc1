"""The command line: words on stderr, one JSON line last on stdout. It reads options and prints; it decides nothing.

Exit codes: 0 done; 1 a law or a threshold failed, or no student meets a budget; 2 what was given cannot be used;
3 this model is not supported; 130 interrupted. Heavy imports stand inside the commands, so that --help answers at once.
"""

import sys
from collections.abc import Callable

import typer

from mimicut.cli.cmd_compress import compress
from mimicut.cli.cmd_demo import demo
from mimicut.cli.cmd_export import export
from mimicut.cli.cmd_inspect import inspect
from mimicut.cli.cmd_plan import plan
from mimicut.cli.cmd_push import push
from mimicut.cli.cmd_recover import recover
from mimicut.cli.cmd_sweep import sweep
from mimicut.cli.cmd_verify import verify
from mimicut.cli.printing import INTERRUPTED, say

app = typer.Typer(
    name="mimicut",
    help="Make a trained vision model smaller and faster from a few unlabelled images, and prove what was done.",
    epilog="Try it: mimicut demo",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    rich_markup_mode="rich",
)
# Command -> a line that runs.
_EXAMPLES: dict[Callable[..., None], str] = {
    inspect: "inspect torchvision:resnet50 --no-pretrained",
    plan: "plan torchvision:resnet34 --no-pretrained --keep 0.5 --out plan.json",
    compress: "compress torchvision:resnet50 photos/ --keep 0.5 --out small/ --labelled val/",
    sweep: "sweep jobs.toml --out fleet/ --jobs 2",
    recover: "recover timm:resnet50 pruned.py:build photos/ --out small/ --to pt2,onnx",
    verify: "verify small/ other-photos/ --labelled val/",
    export: "export small/ --to onnx,openvino --images photos/",
    push: "push small/ USER/NAME",
    demo: "demo --keep-width 0.3",
}
for _command, _example in _EXAMPLES.items():
    app.command(epilog=f"Example: mimicut {_example}")(_command)


def main() -> None:
    """Run the command line; every error of mimicut ends in one clear sentence and its exit code."""
    from mimicut.base.errors import MimicutError

    try:
        code = app(standalone_mode=False) or 0
        if code == INTERRUPTED:  # typer turns Ctrl-C into this code by itself
            raise KeyboardInterrupt
    except MimicutError as error:
        say(f"mimicut: {error}")
        code = error.exit_code
    except (KeyboardInterrupt, typer.Abort):
        say("mimicut: interrupted; nothing was written")
        code = INTERRUPTED
    except Exception as error:
        if not hasattr(error, "exit_code") or not hasattr(error, "show"):
            raise
        error.show()  # a wrong flag or argument, said by typer
        code = error.exit_code
    sys.exit(code)
