"""Options of a command in a file."""

import json
import subprocess
import sys
from pathlib import Path

import pytest

from mimicut.base.errors import InputError
from mimicut.cli.config_file import read_config

KNOWN = {"keep": list[float] | None, "held_out_share": float, "out": Path, "steps": int | None, "force": bool}


def test_keys_are_flags_with_hyphens_or_underscores(tmp_path):
    file = tmp_path / "run.toml"
    file.write_text('keep = [0.5, 0.7]\nheld-out-share = 0.3\nout = "small"\n')
    assert read_config(file, KNOWN) == {"keep": [0.5, 0.7], "held_out_share": 0.3, "out": "small"}

    file.write_text("keep = 0.5\nsteps = 3\nforce = true\n")
    assert read_config(file, KNOWN) == {"keep": [0.5], "steps": 3, "force": True}


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ('out = "x"\n\nkeap = 0.5\n', r"line 3: there is no option 'keap'; did you mean 'keep'\?"),
        ('out = "x"\n[keep]\nshare = 1\n', "line 2: keep is a table"),
        ("keep = \n", "expected a TOML file"),
        ('out = "x"\nkeep = true\n', "line 2: keep is true, expected a number"),
        ("keep = [0.5, false]\n", "line 1: keep is false, expected a number"),
        ('keep = ["half"]\n', "line 1: keep is 'half', expected a number"),
        ("\n\nsteps = 0.5\n", "line 3: steps is 0.5, expected a whole number"),
        ("held-out-share = [0.5]\n", "line 1: held-out-share is a list, expected a number"),
        ("force = 1\n", "line 1: force is 1, expected true or false"),
        ('force = "yes"\n', "line 1: force is 'yes', expected true or false"),
        ("out = false\n", "line 1: out is false, expected text"),
        ("held_out_share = 0.1\nheld-out-share = 0.1\n", "line 2: held_out_share is given twice"),
    ],
)
def test_what_cannot_be_used_is_named_with_its_line(tmp_path, text, words):
    file = tmp_path / "run.toml"
    file.write_text(text)
    with pytest.raises(InputError, match=words):
        read_config(file, KNOWN)
    with pytest.raises(InputError, match=r"none\.toml"):
        read_config(tmp_path / "none.toml", KNOWN)


def run(*options):
    return subprocess.run(
        [sys.executable, "-m", "mimicut", "compress", *map(str, options)], capture_output=True, text=True, check=False
    )


@pytest.mark.long
def test_flags_override_the_file_and_arguments_may_stand_in_it(tmp_path):
    file = tmp_path / "run.toml"
    file.write_text(
        f'teacher = "demo:resnet14"\nimages = "none"\nout = {json.dumps(str(tmp_path / "o"))}\nkeep = [2]\n'
    )
    found = run("--config", file)
    assert (found.returncode, found.stdout) == (2, "")
    assert "keep is 2.0, expected a share" in found.stderr
    found = run("--config", file, "--keep", 0.5, "--scheme", "most")
    assert found.returncode == 2
    assert "keep is" not in found.stderr
    assert "scheme is 'most'" in found.stderr
