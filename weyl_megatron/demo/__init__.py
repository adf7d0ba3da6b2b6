"""`weyl-megatron demo`: one small GPT, five ways to start it, a report.

Read it in this order: `data` (the text), `model` (the GPT), `recipe` (the runs as DeepSpeed
configurations), `train` (the worker, which is what a user would write), `launch` (what the command
does), `results` and `report`.
"""
