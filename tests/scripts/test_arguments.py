"""Odd command lines: one line that says how to fix it, or what was meant."""

import pytest

from fusion_bench.problems import FusionBenchError
from fusion_bench.scripts.arguments import arguments_parser

BAD = [
    ("--cfg nonsense", "'job', 'hydra', 'all'"),
    ("--cfg", "expected one argument"),
    ("--cfg job --package", "expected one argument"),
    ("--info x", "'defaults-tree'"),
    ("--info seed=1", "'seed=1'"),
    ("-cn", "--config-name"),
    ("seed=1 --nosuch", "--nosuch: unknown option"),
    ("--config-nam=x --multirn", "Did you mean '--multirun'?"),
    ("-x", "-x: unknown option"),
    ("=", "has no key"),
    ("=1", "has no key"),
    ("++", "has no key"),
    ("~", "has no key"),
    ("a", "Write 'a=…'"),
    ("+a", "Write '+a=…'"),
    ("-m --cfg job", "--multirun and --cfg exclude each other"),
    ("--run -m", "--run and --multirun exclude each other"),
    ("--resolve", "'--cfg job --resolve'"),
    ("--shell-completion", "'install=bash'"),
    ("-sc install=nosuch", "bash, fish, zsh"),
    ("-sc install=bash query=zsh", "'install=bash'"),
    ("--experimental-rerun config.pickle", "--config-path …/.hydra --config-name config"),
]


@pytest.mark.parametrize(("words", "told"), BAD, ids=[words for words, _ in BAD])
def test_bad_words_are_told_in_one_line(words: str, told: str) -> None:
    with pytest.raises(FusionBenchError) as error:
        arguments_parser().parse_args(words.split())
    assert told in str(error.value) and "\n" not in str(error.value)
    assert error.value.exit_code == 2


@pytest.mark.parametrize(
    ("words", "overrides"),
    [
        ("a=b -m c=1,2", ["a=b", "c=1,2"]),
        ("a=b --cfg job c=1 --resolve d=2", ["a=b", "c=1", "d=2"]),
        ("-m a=1", ["a=1"]),
        ("~a ~b=1 +c=2 ++d@e=3", ["~a", "~b=1", "+c=2", "++d@e=3"]),
        ("-m -m a=1,2", ["a=1,2"]),
        ("-sc query=bash", ["query=bash"]),
        ("a= -m", ["a="]),
    ],
)
def test_overrides_may_stand_anywhere(words: str, overrides: list[str]) -> None:
    assert arguments_parser().parse_args(words.split()).overrides == overrides
