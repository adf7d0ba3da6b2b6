"""Forecasts before a run: for how long each τ would act as a warmup."""
