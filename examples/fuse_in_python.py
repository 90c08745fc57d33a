"""Fuse two modules in memory, without any config.

python examples/fuse_in_python.py
"""

import torch
from torch import nn

from fusion_bench.method import SimpleAverageAlgorithm, TaskArithmeticAlgorithm

torch.manual_seed(0)
models = {name: nn.Linear(4, 2) for name in ("_pretrained_", "cats", "dogs")}

average = SimpleAverageAlgorithm().run(models)
merged = nn.Linear(4, 2)
merged.load_state_dict(average)
print("average of the first weights:", merged.weight[0, 0].item())

arithmetic = TaskArithmeticAlgorithm(scaling_factor=0.5).run(models)
same = torch.allclose(arithmetic["weight"], average["weight"])
print("task arithmetic at 1/2 is the average of two:", same)
