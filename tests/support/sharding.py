"""FSDP2 of accelerate on the processes of a test, which have no accelerators."""

from accelerate.state import PartialState
from accelerate.utils import DistributedType

from hf_rezero import ReZeroTrainingArguments


def sharded(args: ReZeroTrainingArguments) -> ReZeroTrainingArguments:
    """Let accelerate shard the model of the next Trainer, by `fully_shard` over gloo.

    It asks the kind of the processes, and shards on those with an accelerator only. Nothing else depends on the kind.
    """
    args.distributed_state.distributed_type = DistributedType.MULTI_GPU
    assert PartialState().distributed_type is DistributedType.MULTI_GPU
    return args
