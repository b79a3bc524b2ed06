"""The module's former path: `ShardedGlobEnc` lies in `pyglobenc.scale.distributed`."""

from pyglobenc.scale.distributed import ShardedGlobEnc

__all__ = ["ShardedGlobEnc"]
