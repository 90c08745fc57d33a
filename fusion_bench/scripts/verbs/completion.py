"""Complete words with TAB: verbs, names of methods and pools, options of the chosen method.

'install' writes a script for your shell, and for bash and zsh a line into ~/.bashrc or ~/.zshrc
that reads it. Open a new terminal afterwards.
"""

import os
from argparse import ArgumentParser, Namespace
from pathlib import Path

EXAMPLES = """
fusion_bench completion install
fusion_bench completion install zsh
fusion_bench completion show fish
fusion_bench completion uninstall
"""
SHELLS = ("bash", "zsh", "fish")
_MARK = "# completion of fusion_bench"


def add_arguments(parser: ArgumentParser) -> None:
    """Add the action and the shell."""
    parser.add_argument("action", choices=["install", "uninstall", "show"])
    parser.add_argument("shell", nargs="?", choices=SHELLS, help="default: the one that you use")


def run(arguments: Namespace) -> None:
    """Install, remove or print the script.

    Raises:
        FusionBenchError: an unknown shell.
    """
    from fusion_bench.problems import FusionBenchError
    from fusion_bench.storage import write_text

    shell = arguments.shell or Path(os.environ.get("SHELL", "")).name
    if shell not in SHELLS:
        raise FusionBenchError(
            f"'{shell}' is none of {', '.join(SHELLS)}.", "Name one: 'completion install bash'."
        )
    if arguments.action == "show":
        print(script(shell), end="")
        return
    file, startup = places(shell)
    if arguments.action == "install":
        write_text(file, script(shell))
    else:
        file.unlink(missing_ok=True)
    if startup:
        _set_line(startup, f'source "{file}" {_MARK}', arguments.action == "install")
    done = "installed; open a new terminal" if arguments.action == "install" else "removed"
    print(f"{file}: {done}.")


def script(shell: str) -> str:
    """Return the shell's script."""
    import argcomplete

    code: str = argcomplete.shellcode(["fusion_bench"], shell=shell)
    if shell == "zsh":  # whose compdef is there once completion is on
        code = f"autoload -Uz compinit && (( $+functions[compdef] )) || compinit\n{code.lstrip()}"
        code = code.replace("#compdef fusion_bench\n", "")
    return code


def places(shell: str) -> tuple[Path, Path | None]:
    """Return where the script goes, and the file that has to read it, if one has to."""
    import platformdirs

    home = Path.home()
    if shell == "fish":
        config = Path(os.environ.get("XDG_CONFIG_HOME") or home / ".config")
        return config / "fish" / "completions" / "fusion_bench.fish", None
    data = Path(platformdirs.user_data_dir("fusion_bench", appauthor=False))
    folder = Path(os.environ.get("ZDOTDIR") or home) if shell == "zsh" else home
    return data / f"completion.{shell}", folder / f".{shell}rc"


def _set_line(file: Path, line: str, wanted: bool) -> None:
    """Put our line at the end of a startup file, or take it out; all else stays as it is."""
    from fusion_bench.storage import write_text

    text = file.read_text(encoding="utf-8") if file.exists() else ""
    kept = [own for own in text.splitlines(keepends=True) if not own.rstrip().endswith(_MARK)]
    if wanted:
        if kept and not kept[-1].endswith("\n"):
            kept[-1] += "\n"
        kept.append(f"{line}\n")
    if "".join(kept) != text:
        write_text(file.resolve(), "".join(kept))
