"""Serve posteriors to other programs. Without torch, only the client can be imported."""

from importlib.util import find_spec

from bayestune.serving.client import Client as Client
from bayestune.serving.wire import Asked as Asked

if find_spec("torch") is not None:
    from bayestune.serving.launch import serve as serve
    from bayestune.serving.lora import export_lora as export_lora
