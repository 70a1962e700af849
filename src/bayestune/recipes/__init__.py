"""Hyper-parameters of published experiments: one module a paper, one function a setting."""
