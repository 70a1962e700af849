"""Model cards of saved posteriors: they say to import bayestune, without which PEFT raises a bare KeyError."""

import json
import os
from pathlib import Path

import transformers
from peft import LoraConfig
from torch import nn
from transformers import PreTrainedModel

from bayestune.packaged import PACKAGED

HEADING = "## Loading this posterior"
_VARIATIONAL = """\
This folder holds a *distribution* over LoRA adapters, made with `bayestune`. Import it first, so PEFT knows the type.

```python
import bayestune  # without this line PEFT stops with KeyError: 'BAYES_LORA'
from peft import PeftModel
{base}
model = PeftModel.from_pretrained(base_model, "this/folder")  # or bayestune.load_posterior: it checks the files
```

`model` uses the posterior mean; `bayestune.predict(model, task, rows, draws=10)` averages draws. For programs that
know only LoRA, `bayestune.export_lora(model, "folder")` writes the mean and any draws as ordinary LoRA adapters.
"""
_POINT = """```python
from peft import PeftModel
{base}
model = PeftModel.from_pretrained(base_model, "this/folder")
```
"""
_OTHER = """The adapter in this folder is one part of the posterior: load all of it with `bayestune`.

```python
from bayestune.methods import load
{base}
posterior = load(base_model, "this/folder")
```

`bayestune.predict(posterior, task, rows)` answers with it.
"""


def add_notice(folder: str | os.PathLike[str]) -> None:
    """Append a note on loading a variational adapter to `folder`/README.md, once; create the file if it is missing."""
    card = Path(folder) / "README.md"
    text = card.read_text(encoding="utf-8") if card.exists() else ""
    if HEADING not in text:
        notice = f"{HEADING}\n\n{_VARIATIONAL.format(base='')}"
        card.write_text(f"{text.rstrip()}\n\n{notice}".lstrip(), encoding="utf-8")


def write_card(folder: Path, base: nn.Module, config: LoraConfig, kind: str, *, adapter_only: bool) -> None:
    """Write `folder`/README.md in place of PEFT's empty template.

    Args:
        folder: the saved posterior.
        base: the base model.
        config: the configuration of its adapter.
        kind: the kind of posterior.
        adapter_only: whether the posterior is only the adapter, so that PEFT can load it.
    """
    name, architecture = config.base_model_name_or_path, type(base).__name__
    lines = ""
    if name and isinstance(base, PreTrainedModel) and architecture in dir(transformers):
        labels = f", num_labels={base.config.num_labels}" if architecture.endswith("ForSequenceClassification") else ""
        source, imported = json.dumps(name), ""
        if name in PACKAGED or name.endswith(".gguf"):
            source, imported = f"model_source({source})", "from bayestune.packaged import model_source\n"
        call = f"{architecture}.from_pretrained({source}{labels})"
        lines = f"{imported}from transformers import {architecture}\n\nbase_model = {call}"
    loading = _OTHER if not adapter_only else _VARIATIONAL if kind == "variational" else _POINT
    names = config.target_modules
    targets = names if isinstance(names, str) else ", ".join(sorted({n.rpartition(".")[2] for n in names or ()}))
    local = not name or name in PACKAGED or name.endswith(".gguf") or os.path.isdir(name)
    on_hub = "" if local else f"base_model: {json.dumps(name)}\n"
    packaged = PACKAGED.get(name or "")
    about = f"`{name}` is {packaged.about}: `{packaged.install}`.\n\n" if packaged else ""
    distribution = getattr(config, "distribution", None)
    text = f"""---
{on_hub}library_name: peft
tags: [bayestune, lora]
---

# A posterior over LoRA adapters

| | |
|---|---|
| base model | {architecture}{f" `{name}`" if name else ""} |
| posterior | {kind}{f", {distribution}" if distribution else ""} |
| task type | {config.task_type or "none"} |
| LoRA | rank {config.r}, alpha {config.lora_alpha}, on `{targets}` |

{HEADING}

{about}{loading.format(base=lines)}"""
    (folder / "README.md").write_text(text, encoding="utf-8")
