"""What the benchmarks share with the tests: processes of several ranks, optimizers, DeepSpeed."""

import sys
from pathlib import Path

# A benchmark runs as a script, which puts this folder on the path but not its parent.
sys.path.append(str(Path(__file__).parents[1]))

from tests.distributed.deepspeed_engines import deepspeed_on_cpus
from tests.fleet import Fleet, RankError, rank_device
from tests.optimizers import OPTIMIZERS

__all__ = ["OPTIMIZERS", "Fleet", "RankError", "deepspeed_on_cpus", "rank_device"]
