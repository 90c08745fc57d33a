"""Configs of a few hundred bytes that stand for more than any memory holds."""

import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from hydra import compose, initialize_config_dir
from hydra.core.global_hydra import GlobalHydra

from fusion_bench.instantiate import instantiate
from fusion_bench.problems import ConfigError
from fusion_bench.scripts import hydra_patches
from fusion_bench.scripts.bounds import check_text


@pytest.fixture
def composed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Any]:
    """Return a function that composes the YAML ``main`` as the command line does."""
    from hydra._internal import hydra as hydra_internal

    monkeypatch.setattr(hydra_internal, "ConfigLoaderImpl", hydra_internal.ConfigLoaderImpl)
    monkeypatch.setattr(sys, "argv", ["fusion_bench"])
    hydra_patches.set_up_hydra()

    def composed(text: str, *words: str) -> Any:
        (tmp_path / "main.yaml").write_text(text)
        with initialize_config_dir(str(tmp_path), version_base="1.3"):
            return compose("main", list(words), return_hydra_config=True)

    yield composed
    GlobalHydra.instance().clear()


def chain(first: str, link: str, length: int = 40) -> str:
    """Return keys of which each names the one before; ``@`` stands for its number."""
    lines = [f"a0: {first}"]
    lines += [
        f"a{i}: {link.replace('@', str(i - 1)).replace('#', str(i))}" for i in range(1, length)
    ]
    return "\n".join(lines)


LONG = "x" * 300_000
BOMBS = {
    "lists of aliases": (chain("&a0 [x]", "&a# [*a@, *a@, *a@, *a@]"), "20,000 values"),
    "mappings of aliases": (chain("&a0 {x: 1}", "&a# {p: *a@, q: *a@}"), "20,000 values"),
    "merged mappings": (chain("&a0 {x: 1}", "&a# {<<: *a@, p#: *a@}"), "20,000 values"),
    "an alias of itself": ("a: &a [*a]", "20,000 values"),
    "many values": ("a: [" + "1," * 20_001 + "]", "20,000 values"),
    "many keys": ("\n".join(f"k{i}: 1" for i in range(20_001)), "20,000 values"),
    "long texts": (f"a: &a {LONG}\nb: [" + "*a," * 20 + "]", "4,194,304 characters"),
    "deep lists": ("a: " + "[" * 5_000 + "]" * 5_000, "50 nested lists"),
    "deep aliases": (chain("&a0 [x]", "&a# [*a@]", 300), "50 nested lists"),
    "a number of base 60": ("a: " + ":".join("1" * 100_000), "1,000 digits"),
    "a large file": ("a: " + "x" * 2**20, "1,048,576 bytes"),
    "a long interpolation": ("a: x\nb: " + "${a}" * 10_000, "10,000 characters"),
    "no UTF-8": ("a: \udcff", "UTF-8"),
}


@pytest.mark.parametrize("name", BOMBS)
def test_a_file_that_stands_for_too_much(composed: Any, tmp_path: Path, name: str) -> None:
    text, told = BOMBS[name]
    (tmp_path / "bomb.yaml").write_bytes(text.encode(errors="surrogateescape"))
    (tmp_path / "group").mkdir()
    (tmp_path / "bomb.yaml").rename(tmp_path / "group" / "bomb.yaml")
    with pytest.raises(ConfigError) as error:
        composed("defaults: [group: bomb]")
    assert told in str(error.value) and "group/bomb.yaml'" in str(error.value)


def test_the_main_config_is_measured_too(composed: Any) -> None:
    with pytest.raises(ConfigError, match=r"main\.yaml' expands to"):
        composed(BOMBS["lists of aliases"][0])


RESOLVED = {
    "texts": chain("lol", "${a@}${a@}"),
    "nodes": chain("{x: 1}", "{p: '${a@}', q: '${a@}'}"),
    "by a select": chain("lol", "'${oc.select:a@}${oc.select:a@}'"),
    "by a key that is another": chain("lol", "'${a@}${.${n#}}'\nn#: a@"),
    "decoded": chain("lol", """'${oc.decode:"${a@}${a@}"}'"""),
    "of long texts": f"a: {LONG}\nb: [" + "'${a}'," * 20 + "]",
    "in the run's folder": chain("lol", "${a@}${a@}") + "\nhydra: {run: {dir: '${a39}'}}",
    "in what Hydra itself reads": chain("lol", "${a@}${a@}")
    + "\nhydra: {job: {config: {override_dirname: {kv_sep: '${a39}'}}}}",
    "a YAML of aliases": "a: '{x: &x [1], y: [*x, *x]}'\nb: '${oc.create:${a}}'",
    "each within the other": "a: {x: '${b}'}\nb: {x: '${a}'}",
}


@pytest.mark.parametrize("name", RESOLVED)
def test_interpolations_that_stand_for_too_much(composed: Any, name: str) -> None:
    with pytest.raises(ConfigError, match="Write"):
        composed(RESOLVED[name])


def test_what_is_interpolated_only_later() -> None:
    """Escaped at first, so that it is a text of plain data by then, and stays one."""
    links = dict(line.split(": ") for line in chain("lol", "${a@}${a@}").splitlines())
    node = {"_target_": "fusion_bench.method.StackedLayers", "slices": [{"models": {"a": None}}]}
    assert instantiate({"of": links}) == {"of": links}
    with pytest.raises(ConfigError, match=r"'\$\{a0\}\$\{a0\}' is no range of layers"):
        instantiate({**node, "slices": [{"models": {"a": links["a1"]}}]})


def test_defaults_lists_that_double(composed: Any, tmp_path: Path) -> None:
    (tmp_path / "g").mkdir()
    for i in range(30):
        (tmp_path / "g" / f"d{i}.yaml").write_text(f"defaults: [d{i + 1}@x, d{i + 1}@y]\n")
    (tmp_path / "g" / "d30.yaml").write_text("z: 1\n")
    with pytest.raises(ConfigError, match="through its defaults lists"):
        composed("defaults: [g/d0@x]")


def test_a_large_file_named_often(composed: Any, tmp_path: Path) -> None:
    (tmp_path / "g").mkdir()
    (tmp_path / "g" / "d.yaml").write_text("a: [" + "1," * 900 + "]")
    with pytest.raises(ConfigError, match="100,000 values"):
        composed("defaults: [" + ",".join(f"g/d@x{i}" for i in range(200)) + "]")


def test_a_defaults_list_that_names_itself(composed: Any) -> None:
    with pytest.raises(ConfigError, match="refers to itself"):
        composed("defaults: [main@x]")


@pytest.mark.parametrize(
    "text",
    [
        "a: [" + ",".join(f"{i}" for i in range(5_000)) + "]",
        "a: &a {x: 1, y: [1, 2]}\nb: [" + "*a," * 500 + "]",
        "\n".join(f"m{i}: {{_target_: a.b, path: '${{root}}/{i}', n: 1}}" for i in range(1_000)),
        "a: " + "deadbeef" * 400,
        "a: " + "[" * 40 + "]" * 40,
        "a: [1",  # what is no YAML is told by Hydra, with its line
    ],
    ids=["values", "aliases", "a pool of models", "a hash", "depth", "no YAML"],
)
def test_what_people_write_is_below(text: str) -> None:
    check_text(text, "'x'")


def test_many_honest_interpolations(composed: Any) -> None:
    text = "root: /a\nhome: ${root}/b\n" + "\n".join(f"m{i}: '${{home}}/{i}'" for i in range(300))
    assert composed(text).m299 == "/a/b/299"
