"""The verbs of the command line, ``fusion_bench VERB …``: a module each, imported when it is used.

A verb is a module of the same name in this package, with ``_`` for ``-``. Its docstring is the text
of its help. What is slow to import is imported inside ``run``.
"""

from argparse import ArgumentParser, Namespace, RawDescriptionHelpFormatter
from collections.abc import Mapping, Sequence
from importlib import import_module
from inspect import cleandoc
from textwrap import indent
from typing import NoReturn, Protocol, cast

from fusion_bench.problems import FusionBenchError

#: Each verb, and what it does.
VERBS: Mapping[str, str] = {
    "ls": "list methods, models, tasks, datasets or configs",
    "show": "show one of them: options, defaults, YAML, page",
    "cp": "copy one into a YAML of your own",
    "validate": "check a config without running it",
    "merge": "merge models into a folder",
    "export-recipe": "write a recipe of mergekit that means what a config does",
    "extract-lora": "extract a LoRA adapter from a model and its base",
    "evaluate": "evaluate models on tasks, side by side",
    "compare": "compare runs, with intervals",
    "index": "one page over all runs below a folder",
    "reproduce": "run a report's config again, and compare every figure",
    "verify": "check a merged model's files against its report",
    "new": "start a method of your own: a module, its YAML and its test",
    "push": "upload a merged model to the Hugging Face Hub",
    "schema": "write the JSON schemas that an editor checks YAMLs by",
    "completion": "complete words in bash, zsh or fish",
    "cache": "show what is kept between runs, and prune it",
}

_PAGE = """\
fusion_bench fuses fine-tuned neural networks into one, and shows what that gained and lost.

  fusion_bench                                  merge the built-in models; no network needed
  fusion_bench method=ties_merging              the same with another method
  fusion_bench my.yaml method.threshold=10      a config of your own; key=value changes a setting

verbs (fusion_bench VERB --help shows examples):
{verbs}

options:
  -m                     run once for each of several values: method=simple_average,ties_merging
  --config-name NAME     another config: demo_language, merge_llm, search, scaling_study …
  --config-path DIR      the folder of your own configs
  --cfg job              print the config instead of running it
  --plugins FILE.py      let a config use classes of your own file, and the YAMLs beside it
  --allow PACKAGE        let a config use classes of your own installed package
  --trust-remote-code    let models run code that they bring
  --hydra-help           all other options
  --version              the version

Set dry_run=true to see the plan and every mistake before anything is loaded.
"""


class Verb(Protocol):
    """What the module of a verb has."""

    #: Shown below the options, a command a line.
    EXAMPLES: str

    def add_arguments(self, parser: ArgumentParser) -> None:
        """Add the options."""

    def run(self, arguments: Namespace) -> int | None:
        """Do it; the exit code is 0 for ``None``.

        Raises:
            FusionBenchError: what the user can fix.
        """


class Parser(ArgumentParser):
    """A parser whose errors are messages like all others."""

    def error(self, message: str) -> NoReturn:
        """Refuse the command line.

        Raises:
            FusionBenchError: with the message.
        """
        text = message.removeprefix("argument ")
        raise FusionBenchError(f"{text.rstrip('.')}. '{self.prog} --help' explains it.")


def parser_of(name: str, *, with_name: bool = False) -> ArgumentParser:
    """Return the parser of a verb's words, among them its name if that is wanted."""
    verb = _module(name)
    parser = Parser(
        prog=f"fusion_bench {name}",
        description=cleandoc(verb.__doc__ or ""),
        epilog="examples:\n" + indent(cleandoc(verb.EXAMPLES), "  "),
        formatter_class=RawDescriptionHelpFormatter,
        allow_abbrev=False,
    )
    if with_name:
        parser.add_argument("verb", choices=[name])
    verb.add_arguments(parser)
    return parser


def run(name: str, words: Sequence[str]) -> int | None:
    """Run a verb with its words; returns the exit code.

    Raises:
        FusionBenchError: as the verb, and words that it does not take.
    """
    return _module(name).run(parser_of(name).parse_intermixed_args(words))


def page() -> str:
    """Return the page that ``fusion_bench --help`` shows."""
    width = max(map(len, VERBS), default=0)
    lines = "\n".join(f"  {name:{width}}  {does}" for name, does in VERBS.items())
    return _PAGE.format(verbs=lines)


def _module(name: str) -> Verb:
    return cast(Verb, import_module(f"{__name__}.{name.replace('-', '_')}"))
