"""Posteriors for other programs."""

from bayestune.serving.lora import export_lora as export_lora
