"""The memory that a merge is said to take, beside what it takes."""

import sys
from pathlib import Path

import pytest
import torch
from commandline import python
from safetensors.torch import save_file
from torch import nn

from fusion_bench.method import (
    KnOTSMerging,
    SimpleAverageAlgorithm,
    TaskArithmeticAlgorithm,
    TiesMergingAlgorithm,
    WUDIMerging,
)
from fusion_bench.weights import Cost, Renamed, TensorWeights, merge, predicted_peak
from fusion_bench.weights.stream import threads_for

#: Merges with a method, and prints what was there, what was said and what the peak was.
MEASURE = """
import json, sys, tempfile, threading
from pathlib import Path
import torch
from fusion_bench import method
from fusion_bench.method.base import TensorwiseAlgorithm
from fusion_bench.weights import MergePolicy, open_checkpoint, write_checkpoint

def anonymous():
    status = Path("/proc/self/status").read_text()
    return int(status.partition("RssAnon:")[2].split()[0]) * 1024

class Pool:
    policy, vocabulary, has_pretrained = MergePolicy(), None, True
    model_names = ["m0", "m1", "m2", "m3"]
    def weights(self, name):
        return open_checkpoint(Path(sys.argv[1]) / f"{name}.safetensors")

torch.set_num_threads(2)
made = getattr(method, sys.argv[2])(show_pbar=False, **json.loads(sys.argv[3]))
said = made.predicted_peak(made.inputs(Pool()))
before = most = anonymous()
done = threading.Event()
def watch():
    global most
    while not done.wait(0.002):
        most = max(most, anonymous())
thread = threading.Thread(target=watch)
thread.start()
with tempfile.TemporaryDirectory() as place:
    write_checkpoint(made.fuse(Pool()), Path(place))
done.set()
thread.join()
print(json.dumps([before, said, most]))
"""
#: What a process has that has imported no more than it needs.
OWN = 160 * 2**20


@pytest.mark.skipif(sys.platform != "linux", reason="needs /proc")
@pytest.mark.parametrize(
    ("name", "options"),
    [
        ("SimpleAverageAlgorithm", "{}"),
        ("TiesMergingAlgorithm", '{"scope": "tensor"}'),
        ("ISO_C_Merge", "{}"),
    ],
)
def test_what_is_said_is_within_a_fifth_of_what_is_measured(
    name: str, options: str, checkpoints: Path
) -> None:
    done = python(MEASURE, str(checkpoints), name, options)
    before, said, most = map(int, done.stdout.strip("[]\n").split(","))
    assert OWN + said == pytest.approx(OWN + most - before, rel=0.2)
    assert OWN + most - before < 1e9


@pytest.fixture(scope="module")
def checkpoints(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Return a directory with five models of 67 MB, an embedding of 34 MB among them."""
    place = tmp_path_factory.mktemp("checkpoints")
    shapes = {"embed.weight": (2**15, 512)}
    for layer in range(2):  # so that threads have large ones at the same time
        shapes |= {f"up{layer}.weight": (4096, 1024), f"down{layer}.weight": (1024, 4096)}
    base = {key: torch.randn(shape) for key, shape in shapes.items()}
    for model in ("_pretrained_", "m0", "m1", "m2", "m3"):
        noise = 0.0 if model == "_pretrained_" else 0.1
        tensors = {
            key: (value + noise * torch.randn(value.shape)).bfloat16()
            for key, value in base.items()
        }
        save_file(tensors, place / f"{model}.safetensors")
    return place


def test_the_cost_of_an_entry() -> None:
    models = {name: TensorWeights({"w": torch.zeros(2**19)}) for name in "ab"}
    merged = merge(models, lambda key, tensors, base: tensors[0], elementwise=True)
    whole = merge(models, lambda key, tensors, base: tensors[0])
    assert models["a"].cost("w") == Cost(2**21, 0)
    assert merged.cost("w").bytes_read == 2**22
    assert 2 * merged.cost("w").peak_bytes == whole.cost("w").peak_bytes > 2**22
    assert Renamed(merged, {"v": "w"}).cost("v") == merged.cost("w")
    again = merge({"a": merged, "b": merged}, lambda key, tensors, base: tensors[0])
    assert again.cost("w").peak_bytes > whole.cost("w").peak_bytes
    assert predicted_peak(whole) == torch.get_num_threads() * whole.cost("w").peak_bytes
    assert predicted_peak(merged) == torch.get_num_threads() * merged.cost("w").peak_bytes


def test_what_first_passes_keep_is_counted() -> None:
    from fusion_bench.method.checks import Net, Pool, as_weights, family

    pool = Pool(as_weights(family(Net)))
    for method in (TiesMergingAlgorithm(), WUDIMerging(), KnOTSMerging(TiesMergingAlgorithm())):
        inputs = method.inputs(pool)
        assert method.kept_bytes(inputs) > 0 == SimpleAverageAlgorithm().kept_bytes(inputs)


def test_directions_of_a_tall_matrix_are_counted() -> None:
    """Side by side, their left singular vectors, and the copies of both."""
    from fusion_bench.method.checks import Pool, as_weights

    rows, columns = 4096, 8
    for count in (2, 16):
        modules = {name: nn.Linear(columns, rows, bias=False) for name in map(str, range(count))}
        pool = Pool(as_weights({"_pretrained_": nn.Linear(columns, rows, bias=False), **modules}))
        method = KnOTSMerging(TaskArithmeticAlgorithm())
        inputs = method.inputs(pool)
        needed = 24 * (columns * count) ** 2 + 16 * rows * columns * count
        beyond = max(0, needed - inputs.cost("weight").peak_bytes)
        assert method.kept_bytes(inputs) == beyond * threads_for(inputs)
        assert (beyond > 0) == (count == 16)
