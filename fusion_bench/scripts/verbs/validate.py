"""Check a config: keys and values, the files that it names, and whether the models fit together.

Nothing is downloaded, loaded or written. Mistyped keys and values are found in a moment. If there
are none, the plan of the run is made from what is on this machine: that takes some seconds.

The exit code is 0 for a config that would run, 2 for one that would not, and 3 where something on
the Hub was needed to tell.
"""

import os
import tempfile
from argparse import ArgumentParser, Namespace
from pathlib import Path

EXAMPLES = """
fusion_bench validate my.yaml
fusion_bench validate demo_language method=ties
"""
#: Read by the libraries when they are imported.
_OFFLINE = ("HF_HUB_OFFLINE", "HF_DATASETS_OFFLINE", "TRANSFORMERS_OFFLINE")


def add_arguments(parser: ArgumentParser) -> None:
    """Add the config and its overrides."""
    parser.add_argument("config", help="a YAML, or a name that 'fusion_bench ls configs' lists")
    parser.add_argument("overrides", nargs="*", default=[], help="settings to change, as key=value")


def run(arguments: Namespace) -> None:
    """Make a dry run in a folder that is removed afterwards."""
    from fusion_bench.command import file_as_options
    from fusion_bench.configs import CONFIG_DIR
    from fusion_bench.scripts.run import run_composed

    os.environ.update(dict.fromkeys(_OFFLINE, "1"))
    folder, slash, name = arguments.config.rpartition("/")
    config = f"{CONFIG_DIR / folder / name}.yaml" if slash else arguments.config
    named = not arguments.config.endswith((".yaml", ".yml")) and Path(config).is_file()
    words = file_as_options([config if named else arguments.config, *arguments.overrides])
    if words[0] == arguments.config:
        words = ["--config-name", arguments.config, *arguments.overrides]
    with tempfile.TemporaryDirectory() as directory:
        run_composed([*words, "dry_run=true", f"hydra.run.dir={directory}"])
