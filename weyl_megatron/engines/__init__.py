"""The engines that AdamW² runs under, one folder each: what is theirs is there and nowhere else."""
