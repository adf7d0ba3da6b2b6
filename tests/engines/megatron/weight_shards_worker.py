"""torchrun worker: builds a model whose weights megatron-core cuts further than tensor parallelism
does (GTP), asks for AdamW2, and prints what is said.
"""

from __future__ import annotations

import json
from functools import partial

import torch.distributed as dist

from tests import megatron_cpu
from weyl_megatron.engines.shutdown import shutdown

megatron_cpu.install()

from megatron.core import parallel_state  # noqa: E402
from megatron.core.optimizer import OptimizerConfig, get_megatron_optimizer  # noqa: E402
from megatron.core.tensor_parallel import model_parallel_cuda_manual_seed  # noqa: E402

from tests.engines.megatron import gpt  # noqa: E402
from weyl_megatron.engines import megatron  # noqa: E402


def main() -> None:
    dist.init_process_group("gloo")
    gpt.stop()
    parallel_state.initialize_model_parallel(gtp_remat_size=2)
    model_parallel_cuda_manual_seed(1)
    gpt.TransformerConfig = partial(gpt.TransformerConfig, tensor_parallel_num_weight_shards=2)
    gpt.named = lambda *_: iter(())  # the weights may have any values
    model = gpt.build({})
    shards = sum(getattr(param, "is_gtp_weight_remat", False) for param in model[0].parameters())
    megatron.enable()
    said = []
    for size in (2, 1):  # as Megatron has it; and were its mark on the parameters all that tells
        model[0].config.gtp_weight_remat_size = size
        try:
            get_megatron_optimizer(OptimizerConfig(optimizer="adamw2", lr=0.01), model)
        except ValueError as error:
            said.append(str(error))
    if dist.get_rank() == 0:
        print(f"shards {shards}\nsaid {json.dumps(said)}", flush=True)
    gpt.stop()
    shutdown()


if __name__ == "__main__":
    main()
