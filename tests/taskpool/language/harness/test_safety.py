"""A stranger's task is data: nothing in it runs, and what is wrong with it is one line."""

import os
import sys
from pathlib import Path
from typing import Any

import pytest
from fixtures_harness import (
    CHOICE,
    QUESTIONS,
    from_file,
    metrics,
    own_pool,
    tiny_llama,
    write_rows,
    write_task,
)
from lightning.fabric import Fabric

from fusion_bench.problems import FusionBenchError
from fusion_bench.taskpool import LMEvalHarnessTaskPool
from fusion_bench.taskpool.language.harness.folder import TaskFiles
from fusion_bench.taskpool.language.harness.safety import check
from fusion_bench.trust import take_options

ASKED = {**from_file("data.jsonl"), **CHOICE, "metric_list": metrics("acc")}
CODE = (
    "from pathlib import Path\nPath('{canary}').touch()\ndef run(docs): return docs.select([0])\n"
)
REACHES = [
    "{{ cycler.__init__.__globals__.os.system('touch CANARY') }}",
    "{{ lipsum.__globals__['os'].popen('touch CANARY').read() }}",
    "{{ question.__class__.__mro__[1].__subclasses__() }}",
    "{{ ''|attr('__class__')|attr('__mro__') }}",
    "{% set x = options.append('more') %}{{ question }}",
    "{% include '/etc/hostname' %}",
    "{{ self.__init__.__globals__ }}",
]


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    (tmp_path / "tasks").mkdir()
    write_rows(tmp_path / "tasks" / "data.jsonl", QUESTIONS)
    code = CODE.format(canary=tmp_path / "canary")
    (tmp_path / "tasks" / "own.py").write_text(code)
    return tmp_path / "tasks"


def add(folder: Path, text: str) -> None:
    path = folder / "one.yaml"
    path.write_text(path.read_text() + text)


def problems(folder: Path, tokenizer: Any, name: str = "one") -> str:
    plan = own_pool(name, folder, tokenizer).plan()
    return "\n".join(map(str, plan.problems))


@pytest.mark.parametrize("template", REACHES)
@pytest.mark.parametrize("key", ["doc_to_text", "doc_to_target", "description", "gen_prefix"])
def test_templates_reach_nothing(
    folder: Path, tokenizer: Any, fabric: Fabric, template: str, key: str
) -> None:
    canary = folder / "canary"
    text = template.replace("CANARY", str(canary))
    write_task(folder, "one", **{**ASKED, key: text})
    with pytest.raises(FusionBenchError, match=r"tasks\.one: ") as refused:
        own_pool("one", folder, tokenizer).prepare(fabric)
    assert not canary.exists() and len(str(refused.value).splitlines()) == 1


def test_code_runs_where_the_user_says_so(
    folder: Path, tokenizer: Any, fabric: Fabric, monkeypatch: pytest.MonkeyPatch
) -> None:
    write_task(folder, "one", **ASKED)
    add(folder, "process_docs: !function own.run\n")
    found = problems(folder, tokenizer)
    assert "tasks.one.process_docs: '!function own.run' would run 'own' of" in found
    assert "--allow lm_eval_tasks" in found
    with pytest.raises(FusionBenchError, match="would run 'own'"):
        own_pool("one", folder, tokenizer).prepare(fabric)
    assert not (folder.parent / "canary").exists()
    monkeypatch.setenv("FUSION_BENCH_ALLOW", "lm_eval_tasks")
    pool = own_pool("one", folder, tokenizer)
    pool.prepare(fabric)
    assert len(pool.tasks["one"]) == 1 and (folder.parent / "canary").exists()


def test_the_users_word_is_an_option(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("FUSION_BENCH_RUN_UNSAFE_CODE", "0")
    assert take_options(["seed=1", "--run-unsafe-code"]) == ["seed=1"]
    assert os.environ["FUSION_BENCH_RUN_UNSAFE_CODE"] == "1"


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        ("process_results: !function own.run", "process_results: '!function own.run' would run"),
        ("process_docs: own.run", "process_docs: would be called"),
        ("use_prompt: '/etc/x.yaml:a'", "use_prompt: '/etc/x.yaml:a' is read"),
    ],
)
@pytest.mark.parametrize("inside", [True, False])
def test_a_group_cannot_lend_its_code_to_shipped_tasks(
    folder: Path, tokenizer: Any, change: str, reason: str, inside: bool
) -> None:
    task = f"  - task: hellaswag\n    {change}\n" if inside else f"  - hellaswag\n{change}\n"
    (folder / "own.yaml").write_text(f"group: lent\ntask:\n{task}")
    assert f"tasks.hellaswag.{reason}" in problems(folder, tokenizer, "lent")


def test_what_a_model_writes_runs_where_the_user_says_so(
    folder: Path, tokenizer: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    write_task(folder, "one", **ASKED, unsafe_code=True)
    assert "tasks.one.unsafe_code: 'one' runs what the model has written." in problems(
        folder, tokenizer
    )
    monkeypatch.setenv("FUSION_BENCH_RUN_UNSAFE_CODE", "1")
    assert problems(folder, tokenizer) == ""


@pytest.mark.parametrize(
    ("more", "reason"),
    [
        (
            {"metric_list": metrics("accc")},
            "tasks.one.metric_list[0].metric: lm-eval has no metric",
        ),
        ({"metric_list": [{}]}, "tasks.one.metric_list[0]: names no 'metric'"),
        (
            {"metric_list": [{"metric": "acc", "aggregation": "avg"}]},
            "metric_list[0].aggregation: lm-eval has no aggregation 'avg'",
        ),
        (
            {"metric_list": [{"metric": "own", "hf_evaluate": True}]},
            "metric_list[0].hf_evaluate: 'own' would be run",
        ),
        ({"output_type": "choice"}, "output_type: lm-eval has no type of output 'choice'"),
        ({"doc_to_txt": "x"}, "doc_to_txt: is no key of a task. Did you mean 'doc_to_text'?"),
        ({"doc_to_image": "x"}, "doc_to_image: needs a model that takes more than texts"),
        (
            {"filter_list": [{"name": "x", "filter": [{"function": "regx"}]}]},
            "filter_list[0].filter[0].function: lm-eval has no filter 'regx'. Did you mean 'regex'",
        ),
        ({"fewshot_config": {"sampler": "best"}}, "fewshot_config.sampler: lm-eval has no sampler"),
        ({"process_results": "own.run"}, "process_results: would be called"),
        ({"use_prompt": "/etc/x.yaml:a"}, "use_prompt: '/etc/x.yaml:a' is read from another file"),
        ({"dataset_path": None}, "dataset_path: names no dataset"),
        ({"test_split": None}, "test_split: names no split"),
        ({"test_split": "tset"}, "dataset_path: Cannot read the dataset 'json': it has no split"),
        ({"dataset_path": "pandas"}, "is not supported"),
        ({"dataset_path": "./own"}, "dataset_path"),
    ],
)
def test_what_is_wrong_is_known_before_anything_runs(
    folder: Path, tokenizer: Any, more: dict[str, Any], reason: str
) -> None:
    write_task(folder, "one", **{**ASKED, **more})
    found = problems(folder, tokenizer)
    assert reason in found and "tasks.one." in found


@pytest.mark.parametrize("names", [["acc", "bleu"], ["exact_match", "perplexity"]])
def test_a_metric_of_other_tasks_is_refused(
    folder: Path, tokenizer: Any, fabric: Fabric, names: list[str]
) -> None:
    write_task(folder, "one", **{**ASKED, "metric_list": metrics(*names)})
    with pytest.raises(FusionBenchError, match=rf"metric_list: '{names[1]}' is not measured of"):
        own_pool("one", folder, tokenizer).prepare(fabric)


def test_files_outside_of_the_folder_are_not_read(folder: Path, tokenizer: Any) -> None:
    write_task(folder.parent, "other", **ASKED)
    write_task(folder, "included", **ASKED)
    (folder / "one.yaml").write_text("include: ../other.yaml\ntask: one\n")
    (folder / "two.yaml").symlink_to("../other.yaml")
    for name in ("one", "other"):
        with pytest.raises(FusionBenchError, match="lies outside of"):
            own_pool(name, folder, tokenizer)
    (folder / "one.yaml").write_text("include: included.yaml\ntask: one\n")
    assert problems(folder, tokenizer) == ""


def test_data_are_not_read_through_links(folder: Path, tokenizer: Any, fabric: Fabric) -> None:
    write_rows(folder.parent / "secret.jsonl", QUESTIONS)
    (folder / "inside").mkdir()
    (folder / "inside" / "data.jsonl").symlink_to("../../secret.jsonl")
    kept = {k: v for k, v in ASKED.items() if k != "dataset_kwargs"}
    write_task(folder, "one", **{**kept, "dataset_path": "./inside"})
    with pytest.raises(FusionBenchError, match=r"tasks\.one\.dataset_path: .*'\S*data.jsonl'"):
        own_pool("one", folder, tokenizer).prepare(fabric)


@pytest.mark.parametrize(
    ("text", "reason"),
    [
        ("task: one\nmetadata: !!python/object/apply:os.system [x]\n", "cannot be read"),
        ("task: one\ninclude: one.yaml\n", "includes itself"),
        ("task: one\n  x: [\n", "cannot be read"),
        ("- one\n", "holds no keys"),
        (f"task: one\nx: {'y' * 2**20}\n", "larger than 1 MiB"),
        ("task: one\nx: &a [1]\n" + "y: [" + "*a, " * 20_000 + "]\n", "more than 20000 values"),
    ],
)
def test_a_broken_file_is_told_where_its_task_is_wanted(
    folder: Path, tokenizer: Any, text: str, reason: str
) -> None:
    write_task(folder, "good", **ASKED)
    (folder / "one.yaml").write_text(text)
    assert problems(folder, tokenizer, "good") == ""
    with pytest.raises(FusionBenchError, match=rf"there is no task or group 'one'(.|\n)*{reason}"):
        own_pool("one", folder, tokenizer)


def test_a_group_may_change_a_shipped_task(folder: Path) -> None:
    text = "group: mine\ntask:\n  - task: hellaswag\n    num_fewshot: 3\n  - squadv2\n"
    (folder / "own.yaml").write_text(text)
    for definition in TaskFiles([folder]).find("mine"):
        check(definition)  # their own code may run
    assert TaskFiles([folder]).find("mine")[0].config["num_fewshot"] == 3


def test_unknown_names_get_the_nearest(folder: Path, tokenizer: Any) -> None:
    write_task(folder, "one", **ASKED)
    for name, nearest in (("ones", "one"), ("hellaswgg", "hellaswag"), ("arc_esy", "arc_easy")):
        with pytest.raises(FusionBenchError, match=rf"tasks\.{name}: .*Did you mean '{nearest}'"):
            own_pool(name, folder, tokenizer)
    with pytest.raises(FusionBenchError, match="lists those of the harness") as refused:
        own_pool("!?", folder, tokenizer)
    assert len(str(refused.value)) < 200


@pytest.mark.parametrize(
    ("options", "reason"),
    [
        ({"tasks": []}, "tasks: there is no task"),
        ({"tasks": {"arc_easy": {"shots": 1}}}, r"tasks\.arc_easy\.shots: is no key of a task"),
        ({"tasks": {"arc_easy": {"num_fewshot": -1}}}, r"tasks\.arc_easy\.num_fewshot"),
        ({"limit": 0}, "limit: '0' is neither"),
        ({"limit": 2.5}, "limit: '2.5' is neither"),
        ({"num_fewshot": "a"}, "num_fewshot: 'a'"),
        ({"fewshot_as_multiturn": True}, "fewshot_as_multiturn: needs a chat template"),
        ({"include_path": "no/where"}, "include_path: 'no/where' is no folder"),
        ({"verbosity": "LOUD"}, "verbosity: 'LOUD' is no level"),
        ({"batch_size": 0}, "batch_size"),
    ],
)
def test_wrong_arguments_are_refused(options: dict[str, Any], reason: str) -> None:
    with pytest.raises(FusionBenchError, match=reason):
        LMEvalHarnessTaskPool(**{"tasks": "arc_easy", **options})


def test_a_tokenizer_without_a_chat_template_is_refused(
    folder: Path, tokenizer: Any, fabric: Fabric
) -> None:
    write_task(folder, "one", **ASKED)
    pool = own_pool("one", folder, tokenizer, apply_chat_template=True)
    with pytest.raises(FusionBenchError, match=r"^tokenizer: has no chat template"):
        pool.prepare(fabric)


def test_without_the_harness_the_message_says_what_to_install(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setitem(sys.modules, "lm_eval", None)
    with pytest.raises(FusionBenchError, match=r"pip install 'fusion_bench\[lm-eval\]'"):
        LMEvalHarnessTaskPool("arc_easy")


def test_the_keys_of_fusion_bench_are_taken(
    folder: Path, tokenizer: Any, fabric: Fabric, caplog: pytest.LogCaptureFixture
) -> None:
    write_task(folder, "one", **ASKED)
    pool = own_pool(
        *("one", folder, tokenizer),
        apply_chat_template=False,
        batch_size=2,
        metadata={"lengths": [1]},
        verbosity="WARNING",
        output_path="outputs",
        log_samples=True,
    )
    assert pool.save_predictions and "results are in the report" in caplog.text
    assert pool.evaluate(tiny_llama(), fabric)["one"].num_samples == len(QUESTIONS)


def test_a_task_of_its_own_number_of_shots_and_owner(
    tasks: Path, tokenizer: Any, fabric: Fabric
) -> None:
    named = {"shots": {"num_fewshot": 1, "owner": "expert"}, "choice": None}
    pool = own_pool(named, tasks, tokenizer, num_fewshot=0)
    pool.prepare(fabric)
    assert pool.owners() == {"shots": "expert", "choice": None}
    prompts = {name: task.requests[0][0].args[0] for name, task in pool.tasks.items()}  # type: ignore[attr-defined]
    assert prompts["shots"].count("A:") == 2 and prompts["choice"].count("A:") == 1
