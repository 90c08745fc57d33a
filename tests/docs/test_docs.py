"""The pages keep their promises: what they point to exists, what they show runs.

The site's strict build finds broken links between pages, anchors, snippets and references. Here is
what it lets pass.
"""

import os
import re
import shlex
import sys
import tomllib
from pathlib import Path

import pytest
import yaml
from commandline import compose, fusion_bench
from omegaconf import OmegaConf

import fusion_bench.method as methods
from fusion_bench.command import file_as_options
from fusion_bench.configs import CONFIG_DIR
from fusion_bench.instantiate import instantiate
from fusion_bench.resolving import to_container
from fusion_bench.scripts import verbs

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
    """Return every command line that a shell block shows, or a line of a console with a prompt."""
    found = set()
    for language, prompt in (("bash", ""), ("console", "$ ")):
        for parameter in blocks(language):
            for line in parameter.values[0].replace("\\\n", " ").splitlines():
                if line.strip() and line.startswith(prompt):
                    plain = line.removeprefix(prompt).replace("$PWD", ".")
                    found.add(shlex.join(shlex.split(plain, comments=True)))
    return sorted(found)


OURS = [command for command in commands() if command.split()[0] == "fusion_bench"]
VERBS = [command for command in OURS if command.split()[1:2] and command.split()[1] in verbs.VERBS]
COMPOSED = [command for command in OURS if command not in VERBS]
#: Other people's programs, whose words are not looked at.
_FOREIGN = {
    *("export", "git", "hf", "lm_eval", "python", "source", "srun", "tensorboard", "torchrun"),
    *("transformers", "vllm"),
}
OTHERS = [command for command in commands() if command not in OURS]


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Return a directory with what the pages' commands name: a checkout and files of one's own."""
    place = tmp_path_factory.mktemp("shown")
    for name in ("config", "docs", "examples"):
        (place / name).symlink_to(ROOT / name)
    (place / "my_methods.py").write_text(
        "from fusion_bench.method import SimpleAverageAlgorithm\n"
        "class Mine(SimpleAverageAlgorithm):\n    pass\n"
    )
    verbs.run("new", ["method", "soft_ties", "--dir", str(place)])
    verbs.run("cp", ["ties_merging", str(place / "my.yaml")])
    for name in ("my/digits.yaml", "outputs/2026-01-31/12-00-00/config.yaml"):
        (place / name).parent.mkdir(parents=True)
        node = {"_target_": "fusion_bench.programs.FabricModelFusionProgram"}
        (place / name).write_text(yaml.safe_dump(node))
    return place


@pytest.fixture(scope="module")
def composed(place: Path) -> dict[str, tuple[int, str]]:
    """Return what the command line composes of all that is shown; nothing is loaded or written."""
    words = {command: words_of(command) for command in COMPOSED}
    for number, block in enumerate(blocks("yaml")):
        (place / f"shown{number}.yaml").write_text(block.values[0], encoding="utf-8")
        name = ["--config-path", str(place), "--config-name", f"shown{number}"]
        words[str(block.values[0])] = name
    return dict(zip(words, compose(words.values(), cwd=place), strict=True))


def words_of(command: str) -> list[str]:
    """Return a command's words, of a sweep with the first of its values."""
    words = shlex.split(command)[1:]
    # a sweep is composed when it runs; its values are put in one at a time
    words = [re.sub(r"=interval\(([\d.]+),.*", r"=\1", word) for word in words if word != "-m"]
    return [re.sub(r"(=[^,\[{]+),.*", r"\1", word) for word in words]


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
    shown = re.findall(r'^--8<-- "(config/method/.*):2"$', pages, re.MULTILINE)
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
    there = {getattr(methods, name).__name__ for name in methods.__all__}
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


def test_the_file_that_is_open_is_run():
    entries = yaml.safe_load((ROOT / ".vscode" / "launch.json").read_text("utf-8"))
    run, *others = [e for e in entries["configurations"] if "current config" in e["name"]]
    assert run["args"] == ["${file}"]
    for entry in [run, *others]:
        words = [word.replace("${file}", "/a b/own.yaml") for word in entry["args"]]
        path, name = file_as_options(words)[1:4:2]
        assert (path, name) == ("/a b", "own")


def test_annotations_match_the_comments_in_the_yaml():
    text = (CONFIG_DIR / "_get_started" / "clip_simple_average.yaml").read_text(encoding="utf-8")
    page = (DOCS / "get_started" / "clip_simple_average.md").read_text(encoding="utf-8")
    _, notes = page.split('--8<-- "config/_get_started/clip_simple_average.yaml:2"\n```\n\n')
    numbers = re.findall(r"^(\d)\. ", notes.partition("\n\n")[0], re.MULTILINE)
    assert re.findall(r"# \((\d)\)!$", text, re.MULTILINE) == numbers == ["1", "2", "3", "4"]


# The first takes 10 seconds: it composes what all pages show.
@pytest.mark.parametrize("command", COMPOSED)
def test_shown_commands_compose(command, composed):
    code, printed = composed[command]
    assert code == 0, printed
    assert "_target_" in printed


@pytest.mark.parametrize("command", VERBS)
def test_shown_verbs_take_these_words(command: str) -> None:
    _, verb, *words = shlex.split(command)
    verbs.parser_of(verb).parse_intermixed_args(words)


@pytest.mark.parametrize("command", OTHERS)
def test_other_commands_name_what_is_there(command: str) -> None:
    words = shlex.split(command)
    program = words[0]
    if program == "make":
        assert re.search(rf"^{words[1]}:", (ROOT / "Makefile").read_text(), re.MULTILINE)
    elif "pip" in words and "install" in words:
        project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
        extras = [extra for word in words for extra in re.findall(r"\[(.+)\]", word)]
        assert set(",".join(extras).split(",")) - {""} <= set(project["optional-dependencies"])
    elif program.startswith("."):
        assert program.startswith(".venv/") or (ROOT / program).is_file()
        files = [word for word in words[1:] if "/" in word]
        assert [file for file in files if not (ROOT / file).exists()] == []
    elif program == "python" and words[1].startswith(("benchmarks/", "examples/", "tools/")):
        assert (ROOT / words[1]).is_file()
    else:
        assert program in _FOREIGN


@pytest.mark.parametrize(
    "command", sorted(c for c in COMPOSED if "my_methods" in c), ids=lambda c: c.split()[1]
)
def test_own_code_runs_as_the_page_on_security_says(
    command: str, place: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("FUSION_BENCH_CACHE", str(tmp_path / "cache"))
    if "--allow" in command:  # as if it were installed
        monkeypatch.setenv("PYTHONPATH", os.pathsep.join([str(place), *sys.path]))
    done = fusion_bench(*shlex.split(command)[1:], "dry_run=true", cwd=place)
    assert done.returncode == 0, done.stderr


def anchors(page: Path) -> set[str]:
    """Return the anchors of a page's headings, written by hand or made of their text."""
    found = set()
    for heading in re.findall(r"^#+ +(.*?) *$", _FENCE.sub("", page.read_text("utf-8")), re.M):
        text, _, own = heading.partition("{ #")
        slug = re.sub(r"[^\w\s-]", "", text).strip().lower()
        found |= {own.removesuffix(" }"), re.sub(r"[\s-]+", "-", slug)}
    return found


@pytest.mark.parametrize("page", [*PAGES, *ON_DISK], ids=lambda p: str(p.relative_to(ROOT)))
def test_links_to_headings_and_other_sites_are_well_formed(page: Path) -> None:
    links = ["".join(groups) for groups in _LINK.findall(prose(page))]
    for link in links:
        if link.startswith("data:image/"):  # a picture, written out
            continue
        if re.match(r"[a-z]+:", link):
            assert re.fullmatch(r"https://[\w.-]+\.[a-z]{2,}(/[\w./~%#?=&+()-]*)?", link), link
            assert "arxiv.org" not in link or re.search(r"abs/\d{4}\.\d{4,5}$", link), link
            continue
        file, _, anchor = link.partition("#")
        target = (page.parent / file).resolve() if file else page
        if anchor and target.suffix == ".md" and "fusion_bench." not in anchor:
            own = f'id="{anchor}"' in target.read_text("utf-8")  # of a drawing in the page
            assert own or anchor in anchors(target), link


@pytest.mark.parametrize("code", blocks("yaml"))
def test_shown_yaml_fits_the_classes(code, composed):
    ended, printed = composed[code]
    assert ended == 0, printed
    config = OmegaConf.create(printed)
    for name in {"method", "modelpool", "taskpool"} & set(config):
        instantiate({"_recursive_": False, **(to_container(config[name]) or {})}, name)


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
