"""Hydra's command-line parser, with errors in one line."""

import re
from argparse import ArgumentParser, Namespace
from collections.abc import Sequence
from typing import NoReturn

from hydra._internal.utils import get_args_parser
from hydra.core.plugins import Plugins
from hydra.plugins.completion_plugin import CompletionPlugin

from fusion_bench.problems import FusionBenchError, did_you_mean

_COMMANDS = ("run", "multirun", "cfg", "info", "shell_completion")
_COMPLETION = ("install", "uninstall", "query")


def arguments_parser() -> ArgumentParser:
    """Return Hydra's parser, whose overrides may stand before and after its options."""
    parser = get_args_parser()

    def refuse(message: str) -> NoReturn:
        text = message.removeprefix("argument ")
        if unknown := re.match(r"unrecognized arguments: (\S+)", message):
            flags = [flag for flag in parser._option_string_actions if flag.startswith("--")]
            flags += ["--allow", "--plugins", "--trust-remote-code"]
            name = unknown[1].partition("=")[0]
            text = f"{name}: unknown option. {did_you_mean(name, flags)}"
        said = text if text.endswith("?") else f"{text.rstrip('.')}."
        raise FusionBenchError(f"{said} 'fusion_bench --hydra-help' lists all options.")

    def parse_args(args: Sequence[str] | None = None) -> Namespace:
        parsed = parser.parse_intermixed_args(args)
        _check(parsed)
        return parsed

    parser.error = refuse  # type: ignore[method-assign]
    parser.parse_args = parse_args  # type: ignore[assignment]
    return parser


def _check(parsed: Namespace) -> None:
    """Refuse arguments for which Hydra would raise a plain Python exception.

    Raises:
        FusionBenchError: for the first such thing.
    """
    if parsed.experimental_rerun is not None:
        raise FusionBenchError(
            "--experimental-rerun: would load a pickle, which may run code. Start the run's "
            "config again: '--config-path …/.hydra --config-name config'."
        )
    given = [f"--{name.replace('_', '-')}" for name in _COMMANDS if getattr(parsed, name)]
    if len(given) > 1:
        raise FusionBenchError(f"{' and '.join(given)} exclude each other. Use one of them.")
    if parsed.resolve and not (parsed.cfg or parsed.help):
        raise FusionBenchError("--resolve: needs --cfg or --help. Use '--cfg job --resolve'.")
    if parsed.shell_completion:
        plugins = Plugins.instance().discover(CompletionPlugin)
        shells = sorted(plugin.provides() for plugin in plugins)  # type: ignore[attr-defined]
        words = [word.partition("=") for word in parsed.overrides]
        named = [shell for name, _, shell in words if name in _COMPLETION]
        if len(named) != 1 or named[0] not in shells:
            raise FusionBenchError(
                f"--shell-completion: give the action and the shell: 'install={shells[0]}'. "
                f"Known: {', '.join(_COMPLETION)}; {', '.join(shells)}."
            )
        return
    for word in parsed.overrides:
        key, equals, _ = word.partition("=")
        if not key.strip("+~ "):
            raise FusionBenchError(f"'{word}': has no key. Write 'key=value'.")
        if not equals and not key.startswith("~"):
            raise FusionBenchError(f"'{word}': has no value. Write '{word}=…'.")
