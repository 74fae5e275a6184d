"""Several processes that take the same steps, and the engines that run the model on them."""

from ngd_optim.distributed.ddp import quiet_ddp
from ngd_optim.distributed.ranks import ALONE, Common, Ranks, is_one_of_several
from ngd_optim.distributed.sharded import ShardedModules

__all__ = ["ALONE", "Common", "Ranks", "ShardedModules", "is_one_of_several", "quiet_ddp"]
