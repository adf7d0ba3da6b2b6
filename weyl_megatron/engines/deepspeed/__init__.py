"""DeepSpeed: ZeRO 0 to 3, AutoTP, pipelines, Universal Checkpoints."""
