"""What a training script does with its arguments before it makes process groups, and what it then
finds.
"""

from __future__ import annotations

import sys

from megatron.core.optimizer import OptimizerConfig
from megatron.training.arguments import parse_args, validate_args

if __name__ == "__main__":
    args = parse_args()
    validate_args(args)
    print("found", args.optimizer, args.use_distributed_optimizer, sys.argv[0], sys.path[0])
    try:
        from megatron.training.training import get_megatron_optimizer_config
    except ImportError:
        print("built", OptimizerConfig(optimizer=args.optimizer).optimizer)  # as 0.14 does
    else:
        config, _ = get_megatron_optimizer_config(args)
        print("built", config.optimizer, config.adam_beta2, config.weight_decay, args.optimizer)
