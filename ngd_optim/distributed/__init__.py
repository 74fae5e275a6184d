"""Several processes that take the same steps, and the engines that run the model on them."""

from ngd_optim.distributed.ddp import quiet_ddp
from ngd_optim.distributed.parts import ParametersInParts
from ngd_optim.distributed.ranks import ALONE, Common, Ranks
from ngd_optim.distributed.sharded import ShardedModules

__all__ = [
    "ALONE",
    "Common",
    "ParametersInParts",
    "Ranks",
    "ShardedModules",
    "quiet_ddp",
]
