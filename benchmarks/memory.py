"""How much memory a merge to the disk needs, method by method, as the command line does it.

    python benchmarks/memory.py                            # every method: 8 GB of files, long
    python benchmarks/memory.py --only ties_merging slerp/slerp --models 2 8
    python benchmarks/memory.py --small                    # the same on tiny files, to try it out

The checkpoints are random Llamas of 400 MB in bfloat16, a base and eight that differ from it by
noise: one is deep, the other has a vocabulary of 128,256 tokens. Each figure is of a process of its
own, `fusion_bench --config-name merge_llm …`: the peak of its anonymous memory (`RssAnon`, without
the mapped files, which the system may drop) and the seconds that the cores worked for it. What
Python and torch take before any merge has a row, imported as the command does. Rows that the file
of `--json` has are kept: a run that was stopped goes on. A method that does not suit the models is
left out and named.
"""

import sys
import tempfile
from pathlib import Path

import measure
import torch
from measure import CommandError, Record, watched
from safetensors.torch import save_file

#: What is merged besides the defaults of every method: those options that need whole tensors.
VARIANTS = {
    "ties_merging, scope=tensor": ("ties_merging", "method.scope=tensor"),
    "dare/task_arithmetic, rescale=l1": ("dare/task_arithmetic", "method.rescale=l1"),
    "dare/ties_merging, rescale=l1, scope=tensor": (
        "dare/ties_merging",
        "method.rescale=l1",
        "method.scope=tensor",
    ),
    "della/della, rescale=l1": ("della/della", "method.rescale=l1"),
    "breadcrumbs/breadcrumbs, scope=row": ("breadcrumbs/breadcrumbs", "method.scope=row"),
    "slerp/nuslerp, axis=-1": ("slerp/nuslerp", "method.axis=-1"),
    "slerp/nuslerp, axis=0": ("slerp/nuslerp", "method.axis=0"),
    "sce/sce, select_topk=0.5": ("sce/sce", "method.select_topk=0.5"),
    "pcb_merging/pcb_merging, released": ("pcb_merging/pcb_merging", "method.variant=released"),
    "wudi/wudi, solver=lstsq": ("wudi/wudi", "method.solver=lstsq"),
}
#: What a method needs besides its defaults, here.
SETTINGS = {"wudi/wudi": ["method.iter_num=10"]}  # more steps take longer and no more memory
#: Those that take two models only, and those that take two and the base.
TWO_ENDS = {
    "arcee_fusion",
    "linear/linear_interpolation",
    "nearswap",
    "rlhf/warp_liti",
    "slerp/slerp",
}
EXACTLY = {"rlhf/salsa": 2, "linear/expo": 1}
#: Methods that make a model for each task: as many checkpoints as models would be written.
FAMILIES = {"emr_merging/emr_merging", "tall_mask/task_arithmetic"}
BASELINE = "Python, torch and the program, before any merge"


def main() -> None:
    """Make the files, measure, print the table and write it."""
    parser = measure.parser(__doc__, rounds=False, workdir=True)
    parser.add_argument("--only", nargs="+", help="rows: methods as in method=…, or variants")
    parser.add_argument("--without", nargs="+", default=[], help="rows to leave out")
    parser.add_argument("--models", nargs="+", type=int, default=[2, 4, 8])
    parser.add_argument("--kinds", nargs="+", default=["deep", "wide vocabulary"])
    arguments = parser.parse_args()
    record = Record(arguments)
    measure.compile_package()
    with tempfile.TemporaryDirectory() as scratch:
        root = arguments.workdir or Path(scratch)
        rows = [row for row in arguments.only or all_rows() if row not in arguments.without]
        for kind in arguments.kinds:
            place = root / kind.replace(" ", "_")
            write_models(place, kind, max(arguments.models), small=arguments.small)
            title = f"{kind}, peak MB (CPU seconds)"
            for row in [BASELINE, *rows]:
                known = record.tables.get(title, {}).get(row, {})
                try:
                    found = measured(row, place, arguments.models, known)
                except CommandError as error:
                    print(f"{row} is left out: {error}", file=sys.stderr)
                    continue
                if found != known:
                    record.row(title, row, found)
    record.show()


def all_rows() -> list[str]:
    """Return the methods that merge weights without data, and the variants."""
    from fusion_bench.configs import CONFIG_DIR

    root = Path(CONFIG_DIR) / "method"
    names = [str(file.relative_to(root).with_suffix("")) for file in sorted(root.rglob("*.yaml"))]
    learns = ("adamerging", "ensemble", "fisher", "model_soup/greedy", "model_soup/learned", "regm")
    return [*(name for name in names if not name.startswith(learns)), *VARIANTS]


def write_models(root: Path, kind: str, count: int, *, small: bool) -> None:
    """Write a base and so many models, unless they are there."""
    from transformers import LlamaConfig, LlamaForCausalLM

    tiny = {"hidden_size": 32, "intermediate_size": 64, "num_attention_heads": 2}
    size = {"hidden_size": 1024, "intermediate_size": 2816, "num_attention_heads": 16}
    deep = {"vocab_size": 320 if small else 32000, "num_hidden_layers": 2 if small else 12}
    wide = {"vocab_size": 2048 if small else 128256, "num_hidden_layers": 1 if small else 6}
    shape = deep if kind == "deep" else {**wide, "tie_word_embeddings": True}
    config = LlamaConfig(**(tiny if small else size), num_key_value_heads=2, **shape)
    config.architectures, config.dtype = ["LlamaForCausalLM"], "bfloat16"
    with torch.device("meta"):
        shapes = {k: v.shape for k, v in LlamaForCausalLM(config).state_dict().items()}
    if config.tie_word_embeddings:
        shapes.pop("lm_head.weight")
    for number in range(-1, count):
        place = root / ("base" if number < 0 else f"m{number}")
        if (place / "config.json").exists():
            continue
        place.mkdir(parents=True, exist_ok=True)
        tensors: dict[str, torch.Tensor] = {}
        for key, shape in shapes.items():
            same = torch.Generator().manual_seed(len(tensors))
            tensor = 0.02 * torch.randn(shape, generator=same) + ("norm" in key)
            if number >= 0:
                own = torch.Generator().manual_seed(1000 * (number + 1) + len(tensors))
                tensor += 0.002 * torch.randn(shape, generator=own)
            tensors[key] = tensor.bfloat16()
        save_file(tensors, place / "model.safetensors", metadata={"format": "pt"})
        config.save_pretrained(place)


def measured(row: str, root: Path, counts: list[int], known: dict[str, str]) -> dict[str, str]:
    """Return a row of the table: for each number of models, MB and seconds."""
    found = dict(known)
    for count in counts:
        column = f"{count} models"
        if column in found:
            continue
        if row == BASELINE:
            code = (
                "from fusion_bench.scripts.lightning_alone import import_fabric_alone as first;"
                "first(); import torch, transformers, fusion_bench.programs, fusion_bench.method"
            )
            megabytes, seconds, _ = watched([sys.executable, "-c", code])
        elif (exactly := 1 if row in TWO_ENDS else EXACTLY.get(row, count)) and (
            exactly != count and count != min(counts)
        ):
            found[column] = "–"
            continue
        else:
            megabytes, seconds, _ = watched(merge_command(row, root, exactly))
        found[column] = f"{megabytes:.0f} ({seconds:.0f})"
    return found


def merge_command(row: str, root: Path, count: int) -> list[str]:
    """Return the command that merges so many models, into a directory where it runs."""
    method, *options = VARIANTS.get(row, (row, *SETTINGS.get(row, [])))
    return [
        str(Path(sys.executable).with_name("fusion_bench")),
        "--config-name=merge_llm",
        f"method={method}",
        *options,
        f"modelpool.models._pretrained_={root / 'base'}",
        *(f"modelpool.models.m{i}={root / f'm{i}'}" for i in range(count)),
        "merged_model_save_path=merged",
    ]


if __name__ == "__main__":
    main()
