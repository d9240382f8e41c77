"""The pages: their code runs, their commands compose, their links lead somewhere, their pictures are up to date.

Each ```python block of README.md, CONTRIBUTING.md and docs/ is a program of its own, run in an empty folder. A word to
the test stands in an HTML comment right above the block, where neither GitHub nor the site shows it:

* `<!-- continues -->`: the block goes on where the one before it ended; they are run as one program.
* `<!-- needs: name -->`: it is skipped where that package is not installed.
* `<!-- not run: reason -->`: it is only compiled.

A block may leave to its reader what `docs_scene.py` binds: `model`, `images`, `datamodule` and a few more. Any other
name that it uses it must import or define. Of each line of a ```bash block that calls `lightning-prune`, the overrides
must compose, and the method that they choose must take its arguments.
"""

from __future__ import annotations

import ast
import builtins
import os
import re
import shlex
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from importlib.util import find_spec, module_from_spec, spec_from_file_location
from itertools import product
from multiprocessing import get_context
from pathlib import Path
from symtable import SymbolTable, symtable
from types import ModuleType

import docs_runner
import pytest
from hydra import compose, initialize_config_module
from hydra.core.override_parser.overrides_parser import OverridesParser
from hydra.utils import instantiate
from omegaconf import OmegaConf

from lightning_prune.cli import COMMANDS
from lightning_prune.cli.report import _parser

ROOT = Path(__file__).parent.parent
DOCS = ROOT / "docs"
PAGES = [ROOT / "README.md", ROOT / "CONTRIBUTING.md", *sorted(DOCS.rglob("*.md"))]
ENVIRONMENT = {**os.environ, "OMP_NUM_THREADS": "1"}

# Each block has a process of its own, forked from one that has imported torch and Lightning: seconds less a block.
PROCESSES = get_context("forkserver")
PROCESSES.set_forkserver_preload(docs_runner.PRELOADED)

# A fence with its language, and the comments on the lines above it.
FENCE = re.compile(r"((?:^<!--[^\n]*-->\n+)*)^```(\w+)[^\n]*\n(.*?)^```$", re.MULTILINE | re.DOTALL)


@dataclass(frozen=True)
class Program:
    """One block, or several that continue one another."""

    page: str
    line: int
    code: str
    needs: tuple[str, ...] = ()
    runs: bool = True

    def __str__(self) -> str:
        return f"{self.page}:{self.line}"


def programs(page: Path) -> Iterator[Program]:
    text = page.read_text(encoding="utf-8")
    found: list[Program] = []
    for match in FENCE.finditer(text):
        if match[2] != "python":
            continue
        words = re.findall(r"<!-- (.*?) -->", match[1])
        needs = tuple(word.partition(": ")[2] for word in words if word.startswith("needs: "))
        before = found.pop() if "continues" in words else None
        found.append(
            Program(
                page.relative_to(ROOT).as_posix(),
                text[: match.start(2)].count("\n") + 1,
                (before.code if before else "") + match[3],
                needs + (before.needs if before else ()),
                not any(word.startswith("not run: ") for word in words),
            )
        )
    yield from found


def commands(page: Path) -> Iterator[tuple[str, str]]:
    for match in FENCE.finditer(page.read_text(encoding="utf-8")):
        if match[2] in ("bash", "sh", "console"):
            for line in match[3].replace("\\\n", " ").splitlines():
                if re.match(r"(\$ )?(lightning-prune|python -m lightning_prune)\b", line.strip()):
                    yield f"{page.relative_to(ROOT).as_posix()}: {line.strip()}", line.strip().removeprefix("$ ")


PROGRAMS = [each for page in PAGES for each in programs(page)]
LINES = dict(each for page in PAGES for each in commands(page))


def unbound(code: ast.Module) -> set[str]:
    """Return the names that a program needs from outside: at the top in order, in functions by the end."""
    late, open_names, bound = {name for each in code.body for name in bound_at_top(each)}, set(), set(dir(builtins))
    for statement in code.body:
        scope = symtable(ast.unparse(statement), "block", "exec")
        own = bound_at_top(statement) if not isinstance(statement, ast.Assign | ast.AugAssign) else set()
        open_names |= {each.get_name() for each in scope.get_symbols() if each.is_referenced()} - bound - own
        open_names |= set().union(*map(globals_in, scope.get_children())) - bound - late
        bound |= bound_at_top(statement)
    return open_names - {"__file__", "__name__"}


def bound_at_top(statement: ast.stmt) -> set[str]:
    symbols = symtable(ast.unparse(statement), "block", "exec").get_symbols()
    return {each.get_name() for each in symbols if each.is_assigned() or each.is_imported()}


def globals_in(scope: SymbolTable) -> set[str]:
    names = {each.get_name() for each in scope.get_symbols() if each.is_global()}
    return names.union(*map(globals_in, scope.get_children()))


def scene_for(code: ast.Module) -> str:
    """Return the statements of docs_scene.py that bind what the code leaves open, and what these need themselves."""
    statements = ast.parse((Path(__file__).parent / "docs_scene.py").read_text(encoding="utf-8")).body
    binding = {name: each for each in statements for name in bound_at_top(each)}
    haste = next(each for each in statements if ast.unparse(each).startswith("pl.Trainer"))
    wanted, chosen = unbound(code) | needs_of(haste), {id(haste)}
    while wanted:
        name = wanted.pop()
        assert name in binding, f"`{name}` is neither imported nor defined, and docs_scene.py has none"
        if id(binding[name]) not in chosen:
            chosen.add(id(binding[name]))
            wanted |= needs_of(binding[name])
    return "\n".join(ast.unparse(each) for each in statements if id(each) in chosen)


def needs_of(statement: ast.stmt) -> set[str]:
    return unbound(ast.Module([statement], []))


@pytest.mark.parametrize("program", PROGRAMS, ids=str)
def test_blocks_say_where_their_names_come_from(program: Program) -> None:
    code = ast.parse(program.code)
    if program.runs:
        assert ast.parse(scene_for(code))


@pytest.mark.slow
@pytest.mark.parametrize("program", [each for each in PROGRAMS if each.runs], ids=str)
def test_blocks_run(program: Program, tmp_path: Path) -> None:
    for package in program.needs:
        pytest.importorskip(package)
    path = tmp_path / "block.py"
    path.write_text(f"{scene_for(ast.parse(program.code))}\n{program.code}", encoding="utf-8")
    process = PROCESSES.Process(target=docs_runner.run, args=(path,))
    process.start()
    process.join()
    assert process.exitcode == 0, (tmp_path / "said").read_text(encoding="utf-8")


def told(override: str) -> list[str]:
    """Return an override with each of the values that a sweep would try; of a range, its ends."""
    parsed = OverridesParser.create().parse_override(override)
    if not parsed.is_sweep_override():
        return [override]
    if parsed.is_interval_sweep():
        interval = parsed.value()
        return [f"{parsed.get_key_element()}={end}" for end in (interval.start, interval.end)]  # type: ignore[union-attr]
    return [f"{parsed.get_key_element()}={value}" for value in parsed.sweep_string_iterator()]


@pytest.mark.parametrize("line", LINES.values(), ids=LINES)
def test_commands_compose(line: str) -> None:
    words = shlex.split(line, comments=True)
    words = words[1:] if words[0] == "lightning-prune" else words[3:]
    command = words.pop(0) if words[:1] and words[0] in COMMANDS else "run"
    if command == "report":
        assert _parser().parse_args(words).folders
        return
    overrides = [word for word in words if not word.startswith("-")]
    assert {word for word in words if word.startswith("-")} <= {"--multirun", "-m", "--cfg", "--help"}
    for choice in product(*map(told, [word for word in overrides if word not in ("job", "hydra", "all")])):
        with initialize_config_module("lightning_prune.conf", version_base="1.3"):
            name = "config" if command == "run" else command
            config = compose(name, overrides=list(choice), return_hydra_config=True)
        assert OmegaConf.to_container(config, resolve=False)
        if command == "run":
            assert instantiate(config.method)


def anchors(page: Path) -> set[str]:
    """Return what the headings of a page can be linked to by, as GitHub and the site make it."""
    headings = re.findall(r"^#+ +(.*)$", without_code(page), re.MULTILINE)
    found = {re.sub(r"[^\w\- ]", "", heading.strip().lower()).replace(" ", "-") for heading in headings}
    included = re.findall(r"^```{include} (\S+)", page.read_text(encoding="utf-8"), re.MULTILINE)
    return found.union(*(anchors(page.parent / name) for name in included))


def without_code(page: Path) -> str:
    text = page.read_text(encoding="utf-8")
    return re.sub(
        r"`[^`\n]+`", lambda code: code[0].replace("](", ""), re.sub(r"^```.*?^```$", "", text, flags=re.M | re.S)
    )


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.relative_to(ROOT).as_posix())
def test_links_lead_somewhere(page: Path) -> None:
    for link in re.findall(r"\]\(([^)\s]+)\)", without_code(page)):
        if re.match(r"[a-z]+:", link):
            continue
        name, _, anchor = link.partition("#")
        target = (page.parent / name).resolve() if name else page
        assert target.exists(), link
        if anchor:
            assert anchor in anchors(target), link


def test_every_page_is_in_the_table_of_contents() -> None:
    for index in (DOCS / "index.md", DOCS / "api" / "index.md"):
        listed = set(re.findall(r"^(\w+)$", index.read_text(encoding="utf-8"), re.MULTILINE))
        assert {page.stem for page in index.parent.glob("*.md")} - {"index"} <= listed


def test_every_package_has_a_page_of_reference() -> None:
    packages = {path.parent.name for path in (ROOT / "lightning_prune").rglob("__init__.py")}
    inside = {"cli", "gates", "handlers"}  # the command line, and rooms that a user of the package has no business in
    assert packages - inside <= {path.stem for path in (DOCS / "api").glob("*.md")}


def drawing() -> ModuleType:
    spec = spec_from_file_location("draw", DOCS / "pictures" / "draw.py")
    assert spec is not None
    assert spec.loader is not None
    module = module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_pictures_are_those_that_the_script_draws() -> None:
    drawn = {f"{name}.svg": draw() for name, draw in drawing().PICTURES.items()}
    assert drawn == {path.name: path.read_text(encoding="utf-8") for path in DOCS.glob("pictures/*.svg")}


@pytest.mark.slow
def test_the_site_builds_without_a_warning(tmp_path: Path) -> None:
    for package in ("sphinx", "myst_parser", "furo", "sphinx_copybutton"):
        if find_spec(package) is None:
            pytest.skip(f"needs {package}: pip install 'lightning-prune[docs]'")
    done = subprocess.run(
        [sys.executable, "-m", "sphinx", "-q", "-W", "--keep-going", "-b", "html", DOCS, tmp_path / "site"],
        cwd=ROOT,
        env=ENVIRONMENT,
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    assert "PruneCallback" in (tmp_path / "site" / "api" / "callbacks.html").read_text(encoding="utf-8")
