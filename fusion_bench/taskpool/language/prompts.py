"""Prompts: what a model reads before it answers."""

from collections.abc import Callable, Mapping
from typing import TYPE_CHECKING, Any

from fusion_bench.problems import FusionBenchError
from fusion_bench.taskpool.language.templates import Template

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase


class Prompt:
    """A template, and how its text becomes what a model reads.

    Args:
        template: a column's name or a template.
        chat: put the text into the tokenizer's chat template, as the user's message.
        system: the system's message there.

    Raises:
        FusionBenchError: a message of the system without a chat.
    """

    def __init__(self, template: str, chat: bool = False, system: str | None = None):
        self.template = Template(template)
        self._chat = chat
        self._system = system
        if system is not None and not chat:
            raise FusionBenchError(
                "needs a chat template.",
                "Add 'apply_chat_template: true'.",
                place=("system_prompt",),
            )

    @property
    def options(self) -> Mapping[str, Any]:
        """What decides what a model reads besides the template."""
        return {"chat": self._chat, "system": self._system}

    def text(
        self, row: Mapping[str, Any], of_models: "Callable[[], PreTrainedTokenizerBase]"
    ) -> str:
        """Return what a model reads of a row.

        Args:
            row: the row.
            of_models: returns the tokenizer, which only a chat needs.

        Raises:
            FusionBenchError: a row that has no such text, or a tokenizer without a chat template.
        """
        text = self.template.render(row)
        if not self._chat:
            return text
        tokenizer = of_models()
        if not tokenizer.chat_template:
            raise FusionBenchError(
                "the tokenizer has no chat template.", "Remove 'apply_chat_template'."
            )
        system = [] if self._system is None else [{"role": "system", "content": self._system}]
        try:
            return str(
                tokenizer.apply_chat_template(
                    [*system, {"role": "user", "content": text}],
                    tokenize=False,
                    add_generation_prompt=True,
                )
            )
        except Exception as error:  # of the template, which is the model's
            raise FusionBenchError(f"the tokenizer's chat template fails: {error}.") from error
