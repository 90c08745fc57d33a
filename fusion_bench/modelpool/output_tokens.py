"""A pool's models, seen by the tokens of one output tokenizer."""

import json
import re
import shutil
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from contextlib import suppress
from dataclasses import replace
from functools import cached_property
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import TYPE_CHECKING

import numpy as np
import torch

from fusion_bench.companions import CONFIGS, TEMPLATES, TOKENIZER
from fusion_bench.modelpool.build import skeleton
from fusion_bench.modelpool.chat_templates import chosen
from fusion_bench.modelpool.output_tokenizer import Made, ModelTokens, check_saved, make
from fusion_bench.modelpool.token_config import for_tokens
from fusion_bench.modelpool.token_rows import TokenRows, find_rows, rows_told
from fusion_bench.modelpool.token_setting import TokenSetting
from fusion_bench.problems import FusionBenchError, within
from fusion_bench.storage import read_json, write_text
from fusion_bench.tokenizer import TokenizerSource, tokenizer_files
from fusion_bench.weights import ByToken, Config, Model, Row, token_axis
from fusion_bench.weights.config import vocabulary

if TYPE_CHECKING:
    from transformers import PretrainedConfig, PreTrainedTokenizerBase


#: By how much the number of tokens is raised to see which entries grow.
_MORE = 64
#: What chat templates write between messages.
_MARK = re.compile(r"<\|\w+\|>")
#: Whose ids are the tokenizer's own where it is another than the model's.
_OWN_IDS = ("bos_token_id", "eos_token_id", "pad_token_id")


class OutputTokens:
    """An output tokenizer, and a pool's models with its rows.

    Places in errors are relative to the pool.

    Args:
        setting: which tokenizer it is; None leaves tokenizer and rows as they are.
        template: the chat template: ``auto``, a name or a text; None for the tokenizer's own.
        names: the models whose tokens count, the reference first.
        pool: the names of all models.
        unchanged: the tokenizer where no setting is given.
        model: returns a model of the pool with its own rows.
        config_for: returns a model's config as transformers has it, if it has any.
        model_class: the class in transformers that a module is built by.
    """

    def __init__(
        self,
        setting: TokenSetting | None,
        template: str | None,
        names: Sequence[str],
        pool: Collection[str],
        unchanged: TokenizerSource,
        model: Callable[[str], Model],
        config_for: "Callable[[str], PretrainedConfig | None]",
        model_class: str,
    ):
        self._setting = setting
        self._template = template
        self._names = list(names)
        self._pool = pool
        self._unchanged = unchanged
        self._model = model
        self._config_for = config_for
        self._model_class = model_class
        self._originals: dict[str, Model] = {}
        self._known: dict[str, ModelTokens] = {}
        self._views: dict[str, Model] = {}

    @property
    def changes_rows(self) -> bool:
        """Whether models get other rows; else only the chat template changes."""
        return self._setting is not None

    @property
    def tokenizer(self) -> "PreTrainedTokenizerBase":
        """The output tokenizer, which nobody may change.

        Raises:
            FusionBenchError: a model without a tokenizer, or tokenizers that cannot be united.
        """
        return self._made.tokenizer

    def model(self, name: str) -> Model:
        """Return a model with the output's rows, and a config that says so.

        Raises:
            FusionBenchError: as ``tokenizer``, and a row that is not there.
        """
        if self._setting is None:
            return self._original(name)
        if name not in self._views:
            own = self._original(name)
            rows = self._rows.own.get(name)
            assert rows is not None
            weights, keys = own.weights, self._keys
            here = [weights.spec(key) for key in weights if key in keys]
            same = all(spec.shape[token_axis(spec)] == self._size for spec in here)
            if not (same and np.array_equal(rows, np.arange(self._size))):
                weights = ByToken(weights, rows, self._fill, keys)
            config = None if own.config is None else self.config(name, own.config)
            self._views[name] = replace(own, weights=weights, config=config)
        return self._views[name]

    def config(self, name: str, config: Config) -> Config:
        """Return a config of a model for the output's tokens: their number, and ids."""
        if self._setting is None:
            return config
        own, begins = self._tokens(name), name == self._donor
        others = not begins and self._setting.source not in ("base", "union")

        def moved(key: str, i: int) -> int | None:
            if begins and i < own.rows:
                return i
            named = getattr(self.tokenizer, key) if others and key in _OWN_IDS else None
            return named if isinstance(named, int) else self._made.ids.get(own.texts.get(i, ""))

        return for_tokens(config, vocabulary(config), self._size, moved)

    def built_by(self, name: str, config: "PretrainedConfig") -> "PretrainedConfig":
        """Return the same of a config as transformers has it."""
        if self._setting is None:
            return config
        return type(config).from_dict(dict(self.config(name, config.to_dict())))

    @property
    def identity(self) -> str:
        """A hash of the output tokenizer."""
        return TokenizerSource(lambda: self.tokenizer).identity

    def write(self, directory: Path) -> None:
        """Put the tokenizer into a model's directory, in place of another's files, and check it.

        The configs that are there get its ids and the number of its rows.

        Raises:
            FusionBenchError: what was saved is read as another tokenizer.
        """
        for name in (*TOKENIZER, "chat_template.jinja", "chat_template.json"):
            (directory / name).unlink(missing_ok=True)
        shutil.rmtree(directory / TEMPLATES, ignore_errors=True)
        self.tokenizer.save_pretrained(directory)
        for name in CONFIGS:
            if (file := directory / name).exists():
                config = self.config(self._names[0], read_json(file))
                write_text(file, json.dumps(config, indent=2) + "\n")
        self._check(directory)

    @cached_property
    def notes(self) -> list[str]:
        """What a plan says of the tokenizer and the rows.

        Raises:
            FusionBenchError: as ``tokenizer`` and ``model``, and a tokenizer that is not the same
                when it is read from its files.
        """
        with TemporaryDirectory() as place:
            self.tokenizer.save_pretrained(place)
            found = self._check(Path(place))
        return [*self._told(), *found]

    def _told(self) -> Iterator[str]:
        """Yield what is new about the tokenizer and the rows."""
        if self._template == "auto" and not self.tokenizer.chat_template:
            yield "chat_template=auto: no model has a chat template."
        if isinstance(template := self.tokenizer.chat_template, str) and self._template:
            marks = dict.fromkeys(_MARK.findall(template))
            if unknown := [mark for mark in marks if mark not in self._made.ids]:
                yield (
                    f"The chat template writes {', '.join(map(repr, unknown))}, which is no token "
                    "of the merged tokenizer; 'tokens' adds it."
                )
        if self._setting is None:
            return
        made, begun = self._made, len(self._made.ids) - sum(self._made.appended.values())
        parts = [f"{begun:,} tokens of '{self._donor}'"]
        parts += [
            f"{count:,} more of '{name}'" if name else f"{count:,} that only 'tokens' names"
            for name, count in made.appended.items()
        ]
        yield f"The merged tokenizer has {', '.join(parts)}; the model has {self._size:,} rows."
        if made.left_out:
            shown = ", ".join(map(repr, made.left_out[:3]))
            more = ", …" if len(made.left_out) > 3 else ""
            yield f"Tokens of '{self._donor}' without a row are left out: {shown}{more}."
        if count := sum(made.appended.values()):
            tokens = "1 token is" if count == 1 else f"{count:,} tokens are"
            yield (
                f"{tokens} appended as added tokens, which are found before the tokenizer of "
                f"'{self._donor}' cuts a text: texts that contain them are cut in another way."
            )
        if empty := self._size - len(set(made.ids.values())):
            rows = "1 row belongs" if empty == 1 else f"{empty:,} rows belong"
            yield f"{rows} to no token; the mean of the others is in their place."
        yield from rows_told(self._rows, self._setting)

    @property
    def _donor(self) -> str:
        """The model, or the folder, with whose ids the output tokenizer begins."""
        if self._setting is None or self._setting.source in ("base", "union"):
            return (self._setting and self._setting.base) or self._names[0]
        return self._setting.source

    @cached_property
    def _begin(self) -> TokenizerSource:
        """The tokenizer that the output's begins with."""
        if self._setting is None:
            with within("chat_template"):
                _ = self._unchanged.tokenizer
            return self._unchanged
        if self._donor in self._pool:
            return self._tokens(self._donor).source
        with within("tokenizer", "source"):
            found = TokenizerSource.named(self._donor)
            if not found.exists:
                remedy = "Give base, union, a model of the pool, or a folder with a tokenizer."
                raise FusionBenchError(f"'{self._donor}' has no tokenizer.", remedy)
            return found

    @cached_property
    def _made(self) -> Made:
        template = None
        if self._template is not None:
            template = chosen(self._template, [*self._templates()])
        setting = self._setting
        if setting is None:
            return make(self._begin, [], [], rows=None, union=False, template=template)
        order = sorted(self._names, key=lambda name: name != self._donor)
        cut = self._tokens(self._donor).rows if setting.source == "base" else None
        return make(
            self._begin,
            [self._tokens(name) for name in order],
            setting.tokens,
            rows=cut,
            union=setting.source == "union",
            template=template,
        )

    def _templates(self) -> Iterator[str | None]:
        """Yield the models' chat templates."""
        for name in self._names:
            if (source := self._source(name)) is not None:
                template = source.tokenizer.chat_template
                yield template.get("default") if isinstance(template, dict) else template

    @cached_property
    def _size(self) -> int:
        """How many rows there are."""
        multiple = 1 if self._setting is None else self._setting.multiple
        return -(-(max(self._made.ids.values()) + 1) // multiple) * multiple

    @cached_property
    def _rows(self) -> TokenRows:
        assert self._setting is not None
        models = [self._tokens(name) for name in self._names]
        with within("tokenizer"):
            return find_rows(self._setting, models, self._tokens, self._made.ids, self._size)

    @cached_property
    def _fill(self) -> dict[int, tuple[Row, ...]]:
        return {
            i: tuple(Row(self._original(name).weights, row) for name, row in rows)
            for i, rows in self._rows.fill.items()
        }

    def _original(self, name: str) -> Model:
        """Return a model with its own rows; the same each time."""
        if name not in self._originals:
            self._originals[name] = self._model(name)
        return self._originals[name]

    def _tokens(self, name: str) -> ModelTokens:
        """Return the tokens of a model of the pool."""
        if name not in self._known:
            own = self._original(name)
            weights, config, keys = own.weights, own.config, self._keys
            with within("models", name):
                if (source := self._source(name)) is None:
                    raise FusionBenchError(
                        "there is no tokenizer beside it, so its rows cannot be matched by token.",
                        "Put its tokenizer's files into its folder.",
                    )
                specs = [weights.spec(key) for key in weights if key in keys]
                sizes = [spec.shape[token_axis(spec)] for spec in specs]
                if not sizes:
                    raise FusionBenchError(
                        "it has no entry with a row for each token.", "Use a model of texts."
                    )
            self._known[name] = ModelTokens(
                name, source, min(*sizes, vocabulary(config) or sizes[0])
            )
        return self._known[name]

    def _source(self, name: str) -> TokenizerSource | None:
        """Return a model's tokenizer, in its own folder or in that of what it is made from."""
        folders = self._original(name).companions
        found = next((folder for folder in folders if tokenizer_files(folder)), None)
        return None if found is None else TokenizerSource(lambda: found)

    @cached_property
    def _keys(self) -> frozenset[str]:
        """The entries with a row a token, under the pool's keys.

        They are those whose shape in transformers' module changes with the number of tokens. For
        keys that no such module has, the shape alone tells.
        """
        name = self._names[0]
        weights, size = self._original(name).weights, vocabulary(self._original(name).config)
        if size is None:
            raise FusionBenchError(
                f"the config.json of '{name}' states no vocab_size: it has no rows by token.",
                "Remove {here}tokenizer.",
                place=("tokenizer",),
            )
        before: Mapping[str, torch.Size] = {}
        with suppress(FusionBenchError):  # an architecture that transformers does not know
            if (config := self._config_for(name)) is not None:
                old = vocabulary(config.to_dict()) or size
                larger = for_tokens(config.to_dict(), old, old + _MORE, lambda key, i: i)
                before, after = (
                    {
                        key: own.shape
                        for key, own in skeleton(self._model_class, c).state_dict().items()
                    }
                    for c in (config, type(config).from_dict(larger))
                )
        keys = {key for key, shape in before.items() if after[key] != shape}
        keys |= {k for k in weights if k not in before and size in weights.spec(k).shape[:2]}
        return frozenset(keys)

    def _check(self, directory: Path) -> list[str]:
        return check_saved(
            directory,
            self.tokenizer,
            self._begin.tokenizer,
            self._size if self._setting else len(self.tokenizer),
        )
