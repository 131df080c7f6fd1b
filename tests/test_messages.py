"""Library messages name settings, the command line shows flags; settings are declared once."""

from __future__ import annotations

import ast
import re
from dataclasses import dataclass, fields
from pathlib import Path

import pytest
import typer
from hybridize.commands import app
from hybridize.commands.shared.output import flag_of

from hybridize.data import corpus
from hybridize.data.packing import epoch_order
from hybridize.distillation.settings import DistillSettings
from hybridize.errors import InputError, WorkError, setting, with_settings
from hybridize.options import check_bounds, described, option
from hybridize.scoring.settings import LooSettings, MmrSettings, RestoreSettings
from tests.conftest import TEMPLATE, Runner, make_place, write_traces

ROOT = Path(__file__).parents[1]
OTHERS = (
    "--max-restarts",
    "--no-",
    "--force-reinstall",
    "--index-url",
    "--upgrade",
    "--query-gpu",
    "--format=csv",
)  # of pip, ...


def test_a_setting_is_a_name_in_python_and_a_flag_on_the_command_line() -> None:
    error = InputError(f"{setting('lr_mixer')} 0 must be positive")
    assert str(error) == "lr_mixer 0 must be positive"
    assert with_settings(f"{error}", flag_of) == "--lr-mixer 0 must be positive"
    around = WorkError(f"step 3: {error}; {setting('calibrate', False)} does without, or another {setting('output')}")
    assert str(around) == "step 3: lr_mixer 0 must be positive; calibrate=False does without, or another output"
    shown = with_settings(f"{around}", flag_of)
    assert shown == "step 3: --lr-mixer 0 must be positive; --no-calibrate does without, or another -o"
    assert flag_of("form") == "--format"


@pytest.mark.parametrize("path", sorted((ROOT / "hybridize").rglob("*.py")), ids=lambda path: str(path.relative_to(ROOT)))
def test_no_library_error_names_a_flag(path: Path) -> None:
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Raise):
            texts = [part.value for part in ast.walk(node) if isinstance(part, ast.Constant) and isinstance(part.value, str)]
            flags = [flag for text in texts for flag in re.findall(r"(?<![\w-])--[a-z][\w-]*", text)]
            assert not [flag for flag in flags if not flag.startswith(OTHERS)], (node.lineno, flags)


@pytest.mark.parametrize(
    ("command", "settings"),
    [("distill", DistillSettings), ("score-loo", LooSettings), ("score-mmr", MmrSettings), ("score-restore", RestoreSettings)],
)
def test_flags_are_the_fields_of_the_settings(command: str, settings: type) -> None:
    found = {parameter.name: parameter for parameter in typer.main.get_command(app).commands[command].params}
    for name, text in described(settings).items():
        assert found[name].help == text
        assert text.endswith((".", "]"))
    assert {one.name for one in fields(settings)} <= set(found)


@dataclass(frozen=True)
class Small:
    rate: float = option(0.5, "A rate.", above=0)
    steps: int = option(3, "Steps.", least=0)
    name: str | None = option(None, "A name.")


def test_bounds_are_those_of_the_fields() -> None:
    check_bounds(Small())
    check_bounds(Small(steps=0))
    for wrong, said in ((Small(rate=0.0), "rate 0.0 must be positive"), (Small(steps=-1), "steps -1 must not be negative")):
        with pytest.raises(InputError, match=f"^{said}$"):
            check_bounds(wrong)
    assert described(Small) == {"rate": "A rate [default: 0.5].", "steps": "Steps [default: 3].", "name": "A name."}


def test_a_row_that_cannot_be_encoded_in_the_middle_of_a_run_fails_the_work(
    tmp_path: Path, cli: Runner, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Of many rows only the first are encoded beforehand: the run then has started, and keeps what
    it has."""
    place = make_place(tmp_path, ("replace", "--indices", "1", "--no-calibrate"))
    write_traces(place / "heldout.jsonl", 4)
    write_traces(place / "traces.jsonl", 600)
    rows = (place / "traces.jsonl").read_text().splitlines()
    late = list(epoch_order(600, 0, 0))[570]  # beyond those that the packing is reckoned from
    rows[late] = rows[late].replace(f'"{late} and', f'"Bad {late} and')
    (place / "traces.jsonl").write_text("\n".join(rows) + "\n")
    refuses = (
        "{% for m in messages %}{% if m['content'].startswith('Bad') %}{{ raise_exception('No.') }}{% endif %}{% endfor %}"
    )
    (place / "strict.jinja").write_text(refuses + TEMPLATE)
    monkeypatch.chdir(place)
    common = ("distill", "h1", "--batch-size", 4, "--seq-len", 64, "--eval-data", "heldout.jsonl", "--steps", 200)
    common = (*common, "--chat-template", "strict.jinja", "--save-every", 5)
    where = f"traces.jsonl:{late + 1}"
    assert where in cli.fails(*common, code=2)
    assert not (place / "h1-kd.run").exists()
    monkeypatch.setattr(corpus, "CHECKED", 2)
    assert where in cli.fails(*common, code=1)
    assert list((place / "h1-kd.run").glob("step-*"))
