"""The pages keep their promises: what they point to exists, what they show runs.

The site's strict build finds broken links between pages, anchors, snippets and references. Here is
what it lets pass.
"""

import re
import shlex
from pathlib import Path

import pytest
import yaml
from commandline import compose

import fusion_bench.method
from fusion_bench.configs import CONFIG_DIR
from fusion_bench.instantiate import instantiate
from fusion_bench.scripts.verbs import VERBS, parser_of

ROOT = Path(__file__).parents[2]
DOCS = ROOT / "docs"
METHODS = DOCS / "methods"
PAGES = sorted(DOCS.rglob("*.md"))
ON_DISK = sorted(ROOT.glob("*.md"))  # read where they lie, not on the site

_FENCE = re.compile(r"^( *)(`{3,})(.*)\n((?:.*\n)*?)\1\2 *$", re.MULTILINE)
_LINK = re.compile(r"\]\(<?([^)\s>]+)|(?:href|src)=\"([^\"]+)\"|^\[[^\]^]+\]: *(\S+)", re.MULTILINE)


def prose(page: Path) -> str:
    """Return a page without its code."""
    return re.sub(r"`[^`\n]*`", "", _FENCE.sub("", page.read_text(encoding="utf-8")))


def blocks(language: str) -> list[object]:
    """Return the code in a language, each block labelled with its place."""
    return [
        pytest.param(code, id=f"{page.relative_to(ROOT)}-{number}")
        for page in [*PAGES, *ON_DISK]
        for number, (_, _, info, code) in enumerate(_FENCE.findall(page.read_text("utf-8")))
        if info.split(" ")[0] == language and "--8<--" not in code
    ]


def commands() -> list[str]:
    """Return every command line of ours that a shell block shows."""
    found = set()
    for parameter in blocks("bash"):
        code = parameter.values[0].replace("\\\n", " ")
        found |= {" ".join(line.split()) for line in code.splitlines() if line.strip()}
    return sorted(found)


@pytest.fixture(scope="module")
def composed(tmp_path_factory: pytest.TempPathFactory) -> dict[str, tuple[int, str]]:
    """Return what the command line composes of all that is shown; nothing is loaded or written."""
    root = tmp_path_factory.mktemp("composed")
    words = {command: words_of(command) for command in commands() if not is_verb(command)}
    for number, block in enumerate(blocks("yaml")):
        (root / f"shown{number}.yaml").write_text(block.values[0], encoding="utf-8")
        name = ["--config-path", str(root), "--config-name", f"shown{number}"]
        words[str(block.values[0])] = name
    return dict(zip(words, compose(words.values(), cwd=ROOT), strict=True))


def is_verb(command: str) -> bool:
    return (words_of(command) or [""])[0] in VERBS


def words_of(command: str) -> list[str]:
    """Return a command's words, of a sweep with the first of its values."""
    words = shlex.split(command.replace("$PWD", str(ROOT)), comments=True)
    assert words[0] == "fusion_bench"
    # a sweep is composed when it runs; its values are put in one at a time
    return [re.sub(r"(=[^,\[{]+),.*", r"\1", word) for word in words[1:] if word != "-m"]


def nav_pages(node: object) -> list[str]:
    if isinstance(node, str):
        return [node]
    children = node.values() if isinstance(node, dict) else node
    return [page for child in children for page in nav_pages(child)]


@pytest.fixture(scope="module")
def site() -> dict[str, object]:
    return yaml.safe_load((ROOT / "mkdocs.yml").read_text(encoding="utf-8"))


@pytest.mark.parametrize("page", [*PAGES, *ON_DISK], ids=lambda p: str(p.relative_to(ROOT)))
def test_local_links_lead_somewhere(page: Path):
    links = ["".join(groups) for groups in _LINK.findall(prose(page))]
    local = [link.partition("#")[0] for link in links if not re.match(r"[a-z]+:", link)]
    targets = {link: (page.parent / link).resolve() for link in local if link}
    missing = [link for link, target in targets.items() if not target.exists()]
    assert not missing
    if page in PAGES:
        outside = [link for link, target in targets.items() if not target.is_relative_to(DOCS)]
        assert not outside, "the site does not carry these files"


def test_nav_lists_each_page_once(site):
    assert sorted(nav_pages(site["nav"])) == [str(p.relative_to(DOCS)) for p in PAGES]


def test_each_method_is_shown_with_its_yaml():
    pages = "".join(page.read_text("utf-8") for page in METHODS.glob("*.md"))
    shown = re.findall(r'^--8<-- "(config/method/.*)"$', pages, re.MULTILINE)
    there = (CONFIG_DIR / "method").rglob("*.yaml")
    assert sorted(shown) == sorted(p.relative_to(ROOT).as_posix() for p in there)


def test_table_of_methods_names_each_page_and_config():
    text = (METHODS / "index.md").read_text("utf-8")
    rows = "".join(line for line in text.splitlines() if line.startswith("|"))
    pages = {page.name for page in METHODS.glob("*.md")} - {"index.md"}
    configs = CONFIG_DIR / "method"
    names = {p.relative_to(configs).with_suffix("").as_posix() for p in configs.rglob("*.yaml")}
    assert set(re.findall(r"\]\((\w+\.md)\)", rows)) == pages
    assert set(re.findall(r"`([\w/]+)`", rows)) == names


def test_reference_lists_each_method():
    text = (DOCS / "reference.md").read_text("utf-8")
    listed = re.findall(r"^::: fusion_bench\.method\.(\w+)$", text, re.MULTILINE)
    there = {getattr(fusion_bench.method, name).__name__ for name in fusion_bench.method.__all__}
    assert sorted(listed) == sorted(there)


def test_site_brings_the_files_that_it_loads(site):
    local = [f for f in site.get("extra_javascript", []) if "://" not in f]
    assert [f for f in local if not (DOCS / f).is_file()] == []


def test_launch_entry_is_shown_whole():
    """The tutorial includes it by line numbers, which must move when the file does."""
    page = (DOCS / "get_started" / "clip_simple_average.md").read_text(encoding="utf-8")
    start, end = map(int, re.search(r"launch\.json:(\d+):(\d+)", page).groups())
    lines = (ROOT / ".vscode" / "launch.json").read_text(encoding="utf-8").splitlines()
    entry = yaml.safe_load("\n".join(lines[start - 1 : end]).strip().rstrip(","))
    assert entry["name"] == "clip_simple_average"
    assert entry["module"] == "fusion_bench.scripts.cli"


def test_annotations_match_the_comments_in_the_yaml():
    text = (CONFIG_DIR / "_get_started" / "clip_simple_average.yaml").read_text(encoding="utf-8")
    page = (DOCS / "get_started" / "clip_simple_average.md").read_text(encoding="utf-8")
    _, notes = page.split('--8<-- "config/_get_started/clip_simple_average.yaml"\n```\n\n')
    numbers = re.findall(r"^(\d)\. ", notes.partition("\n\n")[0], re.MULTILINE)
    assert re.findall(r"# \((\d)\)!$", text, re.MULTILINE) == numbers == ["1", "2", "3", "4"]


# The first takes 10 seconds: it composes what all pages show.
@pytest.mark.parametrize("command", commands())
def test_shown_commands_compose(command, composed):
    if is_verb(command):
        verb, *words = words_of(command)
        parser_of(verb).parse_args(words)
        return
    code, printed = composed[command]
    assert code == 0, printed
    assert "_target_" in printed


@pytest.mark.parametrize("code", blocks("yaml"))
def test_shown_yaml_fits_the_classes(code, composed):
    ended, printed = composed[code]
    assert ended == 0, printed
    config = yaml.safe_load(printed)
    for name in {"method", "modelpool", "taskpool"} & set(config):
        instantiate({"_recursive_": False, **config[name]}, name)


# What reads a run's result or the zoo runs in the end-to-end tests, where there are both.
@pytest.mark.parametrize(
    "code", [p for p in blocks("python") if not re.search("outputs/|zoo", str(p.values))]
)
def test_shown_python_runs(code):
    exec(compile(code, "page", "exec"), {})


def test_each_row_of_what_was_tried_is_a_test():
    text = (ROOT / "tests" / "tried.md").read_text(encoding="utf-8")
    named = re.findall(r"`((?:\w+/)*test_\w+\.py)(?:::(\w+))?`", text)
    assert len(named) > 150
    for file, function in set(named):
        code = (ROOT / "tests" / file).read_text(encoding="utf-8")
        assert not function or re.search(rf"def {function}\b", code), f"{file}::{function}"
