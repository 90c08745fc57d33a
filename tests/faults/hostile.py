"""Configs that want to run code, write files, or carry secrets away: each must be refused.

Every config is a file of a stranger's, put on the search path as a user would, and run through the
whole command line in a process of its own. A hook of the interpreter listens for what it starts,
opens and connects to.
"""

from collections.abc import Iterator, Mapping
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path
from subprocess import TimeoutExpired
from typing import Any

import yaml
from commandline import python

_CANARY = "canary"
_SECRET = "hf_" + "abcdefghijklmnop" * 2
_TOUCH = f"touch {_CANARY}"
_PYTHON = f"open('{_CANARY}', 'w')"

#: What runs code, writes or connects, with the arguments that would make it do so.
_CALLS: Mapping[str, list[Any]] = {
    "builtins.eval": [_PYTHON],
    "builtins.exec": [_PYTHON],
    "builtins.open": [_CANARY, "w"],
    "builtins.__import__": ["antigravity"],
    "builtins.getattr": ["os", "system"],
    "builtins.map": [],
    "os.system": [_TOUCH],
    "os.popen": [_TOUCH],
    "os.execv": ["/bin/touch", ["touch", _CANARY]],
    "os.spawnlp": [0, "touch", "touch", _CANARY],
    "os.remove": ["stranger.yaml"],
    "posix.system": [_TOUCH],
    "subprocess.run": [["touch", _CANARY]],
    "subprocess.Popen": [["touch", _CANARY]],
    "subprocess.check_output": [["touch", _CANARY]],
    "asyncio.create_subprocess_shell": [_TOUCH],
    "pty.spawn": [["touch", _CANARY]],
    "pickle.loads": ["cos\nsystem\n(S'touch canary'\ntR."],
    "pickle.load": [],
    "_pickle.loads": [],
    "marshal.loads": [],
    "shelve.open": [_CANARY],
    "torch.load": ["stranger.bin"],
    "torch.serialization.load": ["stranger.bin"],
    "torch.hub.load": ["stranger/repo", "model"],
    "torch.jit.load": ["stranger.pt"],
    "torch.ops.load_library": ["stranger.so"],
    "torch.utils.cpp_extension.load_inline": ["x", "int x;"],
    "torch.compile": [],
    "torch.optim.lr_scheduler.partial": [],
    "torch.save": [{}, _CANARY],
    "numpy.load": ["stranger.npy"],
    "numpy.savetxt": [_CANARY, [1]],
    "joblib.load": ["stranger.pkl"],
    "pandas.read_pickle": ["stranger.pkl"],
    "pandas.eval": [_PYTHON],
    "pathlib.Path.write_text": [],
    "pathlib.Path.touch": [],
    "shutil.rmtree": ["."],
    "shutil.copy": ["stranger.yaml", _CANARY],
    "importlib.import_module": ["stranger"],
    "runpy.run_path": ["stranger.py"],
    "ctypes.CDLL": ["stranger.so"],
    "code.InteractiveInterpreter": [],
    "types.FunctionType": [],
    "timeit.timeit": [_PYTHON],
    "cProfile.run": [_PYTHON],
    "functools.partial": [],
    "functools.reduce": [],
    "operator.methodcaller": ["system", _TOUCH],
    "operator.attrgetter": ["system"],
    "multiprocessing.Process": [],
    "concurrent.futures.ThreadPoolExecutor": [1],
    "urllib.request.urlopen": ["http://127.0.0.1:9/"],
    "socket.create_connection": [["127.0.0.1", 9]],
    "webbrowser.open": ["http://127.0.0.1:9/"],
    "logging.FileHandler": [_CANARY],
    "logging.config.dictConfig": [],
    "yaml.unsafe_load": ["!!python/object/apply:os.system [touch canary]"],
    "omegaconf.OmegaConf.register_new_resolver": [],
    "omegaconf.OmegaConf.save": [],
    "hydra.utils.instantiate": [{"_target_": "os.system"}],
    "hydra.utils.call": [{"_target_": "os.system"}],
    "hydra._internal.utils._locate": ["os.system"],
    "transformers.pipeline": ["text-generation"],
    "transformers.AutoModel.from_config": [],
    "transformers.dynamic_module_utils.get_class_from_dynamic_module": ["x.Y", "stranger/repo"],
    "transformers.CLIPModel.from_pretrained.__func__.__globals__": [],
    "transformers.Trainer": [],
    "datasets.Dataset.from_generator": [],
    "datasets.load.import_main_class": ["stranger"],
    "lightning.Fabric.launch": [],
    "lightning.pytorch.Trainer": [],
    "lightning.fabric.strategies.os.system": [_TOUCH],
    "fusion_bench.scripts.cli.hydra": [],
    "fusion_bench.scripts.cli.os.system": [_TOUCH],
    "fusion_bench.scripts.cli.main": [],
    "fusion_bench.instantiate.hydra_instantiate": [{"_target_": "os.system"}],
    "fusion_bench.trust.get_object": ["os.system"],
    "fusion_bench.storage.write_text": [_CANARY, "x"],
    "fusion_bench.storage.shutil.rmtree": ["."],
    "fusion_bench.method.base.torch.load": ["stranger.bin"],
    "fusion_bench.method.wudi.torch.hub.load": ["stranger/repo", "model"],
    "fusion_bench.programs.fabric_model_fusion.Path.write_text": [],
    "fusion_bench.programs.environment.sys.modules": [],
    "fusion_bench.method.SimpleAverageAlgorithm.run.__globals__": [],
    "fusion_bench.modelpool.__builtins__": [],
    "fusion_bench.weights.checkpoint.torch.load": ["stranger.bin"],
    "fusion_bench.zoo.ensure": [],
    "stranger.run": [],
    "": [],
    "..": [],
    "os.system()": [],
    "os:system": [],
    "${oc.decode:os.system}": [_TOUCH],
}


@dataclass(frozen=True)
class Hostile:
    """A stranger's config.

    Attributes:
        name: what it tries.
        config: what stands in it beside the default run.
        words: what the user types beside its name.
        files: more files beside it.
    """

    name: str
    config: Mapping[str, Any]
    words: list[str] = field(default_factory=list)
    files: Mapping[str, str] = field(default_factory=dict)


def cases() -> Iterator[Hostile]:
    """Yield all of them."""
    for target, arguments in _CALLS.items():
        node = {"_target_": target, "_args_": arguments}
        yield Hostile(f"method: {target or 'an empty name'}", {"method": node})
    yield from _nested()
    yield from _arguments()
    yield from _of_hydra()
    yield from _secrets()
    yield from _task_folders()


def _nested() -> Iterator[Hostile]:
    call = {"_target_": "os.system", "_args_": [_TOUCH]}
    yield Hostile("an argument of a method", {"method": {"inplace": call}})
    yield Hostile("four deep", {"method": {"inplace": [{"a": {"b": [call]}}]}})
    yield Hostile("_partial_", {"method": {**call, "_partial_": True}})
    yield Hostile("_partial_ below", {"method": {"inplace": {**call, "_partial_": True}}})
    yield Hostile("_recursive_: false", {"method": {"_recursive_": False, "inplace": call}})
    yield Hostile("a model", {"modelpool": {"models": {"digits": call}}})
    yield Hostile("a dataset", {"taskpool": {"test_datasets": {"digits": call}}})
    yield Hostile("training data", {"modelpool": {"train_datasets": {"digits": call}}})
    yield Hostile("Fabric's callbacks", {"fabric": {"callbacks": [call]}})
    yield Hostile("Fabric's logger", {"fabric": {"loggers": call}})
    yield Hostile("Fabric's strategy", {"fabric": {"strategy": call}})
    yield Hostile("the program", call)
    yield Hostile("the search", {"search": call})
    yield Hostile("an interpolation", {"fabric": call, "method": {"inplace": "${fabric}"}})
    created = "${oc.create:'{_target_: os.system, _args_: [touch canary]}'}"
    yield Hostile("oc.create", {"method": {"inplace": created}})
    decoded = "${oc.decode:'{_target_: os.system, _args_: [touch canary]}'}"
    yield Hostile("oc.decode", {"method": {"inplace": decoded}})
    yield Hostile("resolved twice", {"method": {"inplace": f"\\{created}"}})
    yield Hostile("resolved three times", {"method": {"inplace": f"\\\\\\{created}"}})
    yield Hostile("a target resolved twice", {"method": {"_target_": "\\${oc.decode:os.system}"}})
    for lookup in ("get_method", "get_class", "get_object"):
        found = {"_target_": f"hydra.utils.{lookup}", "path": "os.system"}
        yield Hostile(f"hydra.utils.{lookup}", {"method": {"inplace": found}})
    optimizer = {
        "_target_": "torch.optim.lr_scheduler.LambdaLR",
        "lr_lambda": {"_target_": "hydra.utils.get_method", "path": "os.system"},
    }
    yield Hostile("a scheduler that calls its argument", {"method": {"inplace": optimizer}})


def _arguments() -> Iterator[Hostile]:
    model = {"pretrained_model_name_or_path": "stranger/repo"}
    load = {"_target_": "transformers.AutoModel.from_pretrained", **model}
    for name, options in {
        "trust_remote_code": {"trust_remote_code": True},
        "a kernel from the Hub": {"attn_implementation": "stranger/kernel"},
        "kernels": {"use_kernels": True},
        "pickled weights": {"weights_only": False},
        "pickled weights by a number": {"weights_only": 0},
        "a kernel by a mapping": {"attn_implementation": {"": "stranger/kernel"}},
        "a proxy for the token": {"proxies": {"http": "http://127.0.0.1:9"}},
        "arguments by place": {"_args_": ["stranger/repo"]},
    }.items():
        yield Hostile(name, {"modelpool": {"models": {"digits": {**load, **options}}}})
    data = {"_target_": "datasets.load_dataset", "path": "stranger/data"}
    for name, options in {
        "a dataset's code": {"trust_remote_code": True},
        "a generator": {"path": "generator"},
        "a pickled table": {"path": "pandas", "data_files": "stranger.pkl"},
        "a reader by place": {"_args_": ["sql"]},
        "the token to another host": {
            "storage_options": {"hf": {"endpoint": "http://127.0.0.1:9"}}
        },
        "a chain of addresses": {"data_files": "reference://x::http://127.0.0.1:9/refs.json"},
        "a chain in a list": {"data_files": {"test": ["simplecache::http://127.0.0.1:9/x"]}},
        "another scheme": {"data_dir": "memory://x"},
        "a chain for a path": {"path": "reference://x::http://127.0.0.1:9/refs.json"},
        "a chain in any key": {"revision": "reference://x::http://127.0.0.1:9/refs.json"},
        "a database": {"path": "sql", "sql": "select 1", "con": "sqlite:///canary"},
    }.items():
        yield Hostile(name, {"taskpool": {"test_datasets": {"digits": {**data, **options}}}})

    logger = {
        "_target_": "lightning.fabric.loggers.CSVLogger",
        "root_dir": "reference://x::http://127.0.0.1:9/refs.json",
    }
    yield Hostile("a chain for a logger", {"fabric": {"loggers": logger}})


def _of_hydra() -> Iterator[Hostile]:
    call = {"_target_": "os.system", "_args_": [_TOUCH]}
    write = {"_target_": "pathlib.Path.touch", "_args_": [_CANARY]}

    def hydra(name: str, config: Mapping[str, Any], **more: Any) -> Hostile:
        return Hostile(name, {"hydra": config}, **more)

    yield hydra("a callback", {"callbacks": {"x": call}})
    yield hydra("a callback of another kind", {"callbacks": {"x": write}})
    yield hydra("a callback's argument", {"callbacks": {"leaderboard": {"x": write}}})
    yield Hostile(
        "a callback by interpolation", {"evil": write, "hydra": {"callbacks": {"x": "${evil}"}}}
    )
    made = "${oc.create:'{_target_: pathlib.Path.touch, _args_: [canary]}'}"
    yield hydra("a callback out of a text", {"callbacks": {"x": made}})
    late = {"evil": {0: write}, "hydra": {"callbacks": {"x": "${evil.${hydra.job.num}}"}}}
    yield Hostile("a callback that is there later", late, ["-m", "seed=1"])
    pickled = {"_target_": "hydra.experimental.callbacks.PickleJobInfoCallback"}
    yield hydra("a callback that pickles", {"callbacks": {"x": pickled}})
    for kind in ("launcher", "sweeper"):
        yield hydra(f"a {kind}", {kind: call}, words=["-m", "seed=1"])
        deep = {kind: {"x": write}}
        yield hydra(f"an argument of the {kind}", deep, words=["-m", "seed=1"])
    space = {"sweeper": {"custom_search_space": "os.system"}}
    optuna = ["-m", "hydra/sweeper=optuna", "seed=1"]
    yield hydra("Optuna's search space", space, words=optuna)
    yield hydra("Optuna's storage", {"sweeper": {"storage": "sqlite:///canary"}}, words=optuna)
    sampler = {"sweeper": {"sampler": write}}
    yield hydra("Optuna's sampler", sampler, words=optuna)
    slurm = ["-m", "hydra/launcher=submitit_slurm", "seed=1"]
    yield hydra("a shell in sbatch", {"launcher": {"setup": [_TOUCH]}}, words=slurm)
    extra = {"launcher": {"additional_parameters": {"wrap": _TOUCH}}}
    yield hydra("more for sbatch", extra, words=slurm)
    line = {"launcher": {"partition": f"x\n{_TOUCH}"}}
    yield hydra("a second line in sbatch", line, words=slurm)
    yield hydra("sweeper.params that add a shell",
                {"sweeper": {"params": {"+hydra.job.env_set.LD_PRELOAD": "x.so"}}},
                words=["-m", "seed=1"])  # fmt: skip
    for name in ("LD_PRELOAD", "PYTHONPATH", "HF_ENDPOINT", "FUSION_BENCH_ALLOW", "PATH"):
        yield hydra(f"the variable {name}", {"job": {"env_set": {name: "stranger"}}})
    yield hydra("a copy of the environment", {"job": {"env_copy": ["HF_TOKEN"]}})
    stranger = {"stranger/__init__.py": _PYTHON, "stranger/x.yaml": ""}
    for name in ("NCCL_NET_PLUGIN", "NCCL_DEBUG_FILE"):
        yield hydra(f"the variable {name}", {"job": {"env_set": {name: "/stranger"}}})
    yield hydra("a job's name that leads elsewhere", {"job": {"name": "../../canary"}})
    yield hydra("Hydra's own files elsewhere", {"output_subdir": "/tmp/stranger"})
    yield hydra("a swept search path",
                {"sweeper": {"params": {"hydra.searchpath": "[pkg://this]"}}},
                words=["-m", "seed=1"])  # fmt: skip
    yield Hostile("a method that is none", {"method": {
        "_target_": "lightning.fabric.loggers.CSVLogger", "root_dir": _CANARY}})  # fmt: skip
    yield Hostile("variables by interpolation", {"hydra": {
        "callbacks": {"e": {"FUSION_BENCH_ALLOW": "os"}},
        "job": {"env_set": "${hydra.callbacks.e}"}}})  # fmt: skip
    logs = {"version": 1, "handlers": {"x": {"class": "logging.FileHandler", "filename": _CANARY}},
            "root": {"handlers": ["x"]}}  # fmt: skip
    yield Hostile("logging by interpolation", {"logs": logs, "hydra": {"job_logging": "${logs}"}})
    parts = {"handlers": "${logs.handlers}", "root": "${logs.root}"}
    yield Hostile("handlers by interpolation", {"logs": logs, "hydra": {"job_logging": parts}})
    hidden = {"formatters": {"simple": {"log_colors": write}}}
    found = {"mine": "${hydra.job_logging.formatters.simple.log_colors}"}
    yield hydra("a callback hidden in logging", {"job_logging": hidden, "callbacks": found})
    yield hydra("a list of filters", {"job_logging": {"filters": [write]}})
    yield hydra("a package to search", {"searchpath": ["pkg://stranger"]}, files=stranger)
    for section in ("job_logging", "hydra_logging"):
        for name, handler in {
            "a factory": {"()": "os.system", "command": _TOUCH},
            "a class": {"class": "pathlib.Path", "args": [_CANARY]},
            "a socket": {"class": "logging.handlers.SocketHandler", "host": "127.0.0.1", "port": 9},
            "a mail": {"class": "logging.handlers.SMTPHandler", "mailhost": "127.0.0.1"},
            "an object": {"class": "logging.StreamHandler", "stream": "ext://os.environ"},
            "a start-up file": {"class": "logging.FileHandler", "filename": ".bashrc"},
            "an attribute": {"class": "logging.FileHandler", ".": {"baseFilename": _CANARY}},
            "bytes for a name": {"class": "logging.FileHandler", "filename": b".profile"},
            "a file elsewhere": {"class": "logging.FileHandler", "filename": "../canary.log"},
            "an interpolation": {"class": "${oc.decode:logging.handlers.SocketHandler}"},
        }.items():
            handlers = {"handlers": {"console": handler, "x": handler}, "root": {"handlers": ["x"]}}
            yield hydra(f"{section}: {name}", {section: handlers})
        filters = {"filters": {"x": {"()": "os.system", "command": _TOUCH}}}
        yield hydra(f"{section}: a filter", {section: filters})
        formatters = {"formatters": {"x": {"()": "builtins.open", "file": _CANARY, "mode": "w"}}}
        yield hydra(f"{section}: a formatter", {section: formatters})
    plugin = {"hydra_plugins/stranger.py": _PYTHON}
    launcher = {"launcher": {"_target_": "hydra_plugins.stranger.Launcher"}}
    yield hydra("a plugin of its own", launcher, words=["-m", "seed=1"], files=plugin)


def _task_folders() -> Iterator[Hostile]:
    """Yield folders with a task for lm-eval, which a user takes from somewhere."""
    touch = f"import os\nos.system('{_TOUCH}')\ndef run(*a, **k): return a[0]\n"
    data = {"tasks/data.jsonl": '{"q": "a", "right": 0}\n'}
    good = (
        "task: stranger\noutput_type: multiple_choice\ndataset_path: json\ntest_split: test\n"
        "dataset_kwargs: {data_files: {test: data.jsonl}}\ndoc_to_choice: ['a', 'b']\n"
        "doc_to_target: right\n"
    )
    ask = "doc_to_text: q\n"
    metric = good + ask + "metric_list:\n- {metric: scores, hf_evaluate: true}\n"
    bad: dict[str, str | Mapping[str, str]] = {
        **{
            f"!function in {key}": good + ask + f"{key}: !function code.run\n"
            for key in (
                *("process_docs", "process_results", "doc_to_choice", "custom_dataset"),
                *("doc_to_decontamination_query", "description", "gen_prefix"),
            )
        },
        "!function of Python": good + ask + "process_docs: !function os.system\n",
        "!function for text": good + "doc_to_text: !function code.run\n",
        "!function for shots": good + ask + "fewshot_config: {sampler: !function code.run}\n",
        "!function for a metric": good + ask + "metric_list: [{metric: !function code.run}]\n",
        "!function for an aggregation": good
        + ask
        + "metric_list: [{metric: acc, aggregation: !function code.run}]\n",
        "!function for a filter": good
        + ask
        + "filter_list: [{name: x, filter: [{function: custom, filter_fn: !function code.run}]}]\n",
        "!function as a key": good + ask + "metadata: {!function code.run : 1}\n",
        "class": "task: stranger\nclass: !function code.run\n",
        "class of Python": "task: stranger\nclass: !function os.system\n",
        "a metric's folder": {"tasks/stranger.yaml": metric, "scores/scores.py": touch},
        "a metric beside": {"tasks/stranger.yaml": metric, "scores.py": touch},
        "a metric's folder, unmarked": {
            "tasks/stranger.yaml": good + ask + "metric_list: [{metric: scores}]\n",
            "scores/scores.py": touch,
        },
        "a script of data": {
            "tasks/stranger.yaml": good.replace("json\n", "./own\n") + ask,
            "tasks/own/own.py": touch,
        },
        "pickled data": {
            "tasks/stranger.yaml": good.replace("path: json", "path: pandas") + ask,
            "tasks/data.jsonl": "cos\nsystem\n(S'touch canary'\ntR.",
        },
        "an unsafe task": good + ask + "unsafe_code: true\n",
        "an include of elsewhere": {
            "tasks/stranger.yaml": good + ask + "include: ../other.yaml\n",
            "other.yaml": "process_docs: !function code.run\n",
        },
        "an include of a secret": good + ask + "include: /etc/hostname\n",
        "an include of itself": good + ask + "include: stranger.yaml\n",
        "a prompt of elsewhere": good + ask + "use_prompt: '/etc/hostname.yaml:x'\n",
        "a tag of YAML": good + ask + "metadata: !!python/object/apply:os.system [touch canary]\n",
        "aliases": good
        + ask
        + "metadata:\n  a: &a [x, x, x, x, x, x, x, x]\n"
        + "".join(
            f"  {new}: &{new} [{', '.join([f'*{old}'] * 8)}]\n"
            for old, new in zip("abcdefg", "bcdefgh", strict=True)
        ),
        "data of an address": good.replace("data.jsonl", "'file::http://127.0.0.1:9/x.jsonl'")
        + ask,
        "a group with code": {
            "tasks/group.yaml": "group: stranger\ntask: [inner]\n"
            "process_docs: !function code.run\n",
            "tasks/inner.yaml": good.replace("task: stranger", "task: inner") + ask,
        },
    }
    for name, given in bad.items():
        files = {"tasks/stranger.yaml": given} if isinstance(given, str) else given
        pool = {"tasks": ["stranger"], "include_path": "tasks", "tokenizer": "./none"}
        yield Hostile(
            f"a task: {name}",
            {"taskpool": pool},
            words=["taskpool=LMEvalHarnessTaskPool/_template"],
            files={"tasks/code.py": touch, **data, **files},
        )


def _secrets() -> Iterator[Hostile]:
    for name in ("HF_TOKEN", "HOME", "AWS_SECRET_ACCESS_KEY"):
        for resolver in ("oc.env", "env"):
            value = f"${{{resolver}:{name}}}"
            yield Hostile(f"{resolver}:{name}", {"modelpool": {"models": {"digits": value}}})
    address = "http://127.0.0.1:9/${oc.env:HF_TOKEN}"
    data = {"_target_": "datasets.load_dataset", "path": "parquet", "data_files": address}
    yield Hostile("a token in an address", {"taskpool": {"test_datasets": {"digits": data}}})
    yield Hostile("a token in plain sight", {"modelpool": {"token": _SECRET}})
    yield Hostile("a token under another name", {"modelpool": {"models": {"digits": _SECRET}}})
    yield Hostile("a password", {"taskpool": {"password": "hunter2"}})
    yaml_tag = "defaults: [fabric_model_fusion, _self_]\nx: !!python/object/apply:os.system [touch]"
    yield Hostile("a tag of YAML", {}, files={"stranger.yaml": yaml_tag})


@dataclass(frozen=True)
class Outcome:
    """What became of one.

    Attributes:
        case: its name.
        refused: whether it ended as it should: exit code 2, one message, nothing done.
        exit_code: of the process; ``None`` where it did not end.
        message: what the terminal shows.
        noticed: what it started, wrote or connected to.
    """

    case: str
    refused: bool
    exit_code: int | None
    message: str
    noticed: list[str]


#: Runs the command line, and writes down what is started, connected to, or written outside of the
#: run's directory.
_RUN = """
import os, re, sys, tempfile

root, secret = sys.argv[1:3]
os.environ |= {"HF_TOKEN": secret, "AWS_SECRET_ACCESS_KEY": secret}
sys.path[0] = root  # as a script in it would have it
sys.argv = ["fusion_bench", "--config-path", root, "--config-name", "stranger", *sys.argv[3:]]
heard = os.open(root + "/heard", os.O_WRONLY | os.O_CREAT | os.O_APPEND)
starts = re.compile(r"os\\.(system|exec|spawn|posix_spawn|remove)|subprocess\\.|pty\\.")
ours = (root, "/dev/null", "/dev/shm", "/proc/", tempfile.gettempdir())

def hook(event, arguments):
    if starts.match(event):
        inside = event == "os.remove" and str(arguments[0]).startswith(ours)
        note = "" if inside else f"{event} {arguments[:2]!r}"
    elif event == "open" and isinstance(arguments[1], str) and set("wax+") & set(arguments[1]):
        note = "" if str(arguments[0]).startswith(ours) else f"open {arguments[:2]!r}"
        if isinstance(arguments[0], str) and not arguments[0].startswith("/"):
            note = f"open {arguments[:2]!r}"
    elif event == "socket.connect" or (event == "ctypes.dlopen" and "stranger" in str(arguments)):
        note = f"{event} {arguments[1:]!r}"
    else:
        return
    if note and "__pycache__" not in note:
        os.write(heard, f"{note}\\n".encode())

sys.addaudithook(hook)
from fusion_bench.scripts.cli import main
main()
"""


def attempt(case: Hostile, root: Path, seconds: float = 120) -> Outcome:
    """Run one in ``root``, an empty directory."""
    files = {
        "stranger.yaml": yaml.safe_dump(
            {"defaults": ["fabric_model_fusion", "_self_"], **case.config}, sort_keys=False
        ),
        **case.files,
    }
    for name, text in files.items():
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        (root / name).write_text(text)
    try:
        done = python(_RUN, str(root), _SECRET, *case.words, cwd=root, timeout=seconds)
    except TimeoutExpired:
        return Outcome(case.name, False, None, "", [])
    heard: list[str] = []
    with suppress(FileNotFoundError):
        heard = (root / "heard").read_text().splitlines()
    message = done.stderr.strip()
    left = [str(p.relative_to(root)) for p in root.rglob(f"*{_CANARY}*")]
    plain = message.startswith("fusion_bench: ") and "Traceback" not in message
    leaked = _SECRET in message or _SECRET in done.stdout
    noticed = [*heard, *left, *(["the token is shown"] if leaked else [])]
    refused = done.returncode == 2 and plain and not noticed
    return Outcome(case.name, refused, done.returncode, message, noticed)
